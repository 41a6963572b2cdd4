//! From tract's model of a graph to a plan that runs, for all shapes at once where their symbols unify.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use mabert_graph::{Dim, ElementType, Tensor, TensorType};
use tract_core::model::SpecialOps as _;
use tract_core::ops::cast::cast;
use tract_core::optim::Optimizer;
use tract_core::runtime::RunOptions;
use tract_onnx::prelude::{
    Datum as _, DatumType, InferenceFact, InferenceModel, InferenceModelExt, TDim, TVec, TractResult, TypedModel,
    TypedRunnableModel,
};

use crate::bounded::Refused;
use crate::operators::{self, Bounds};
use crate::{Error, Result, limits, tract_values};

/// How plans are made.
pub(crate) struct Planner {
    pub(crate) run_options: RunOptions,
    pub(crate) optimise: bool,
    pub(crate) fuse: bool,
}

pub(crate) type Plan = Arc<TypedRunnableModel>;

pub(crate) enum Plans {
    /// One plan for every shape.
    Symbolic { plan: Plan, sharing: Sharing },
    /// tract cannot unify the model's symbolic dimensions: one plan for each combination of input shapes.
    PerShape { parsed: Box<InferenceModel>, cache: Mutex<Cache> },
}

/// Plans of one model share its constants but not their packed copies; beyond this many the oldest goes.
const CACHED_PLANS: usize = 8;
/// Elements of an input that may be a shape, axes, or what else tract must know while it plans.
const MOST_NUMBERS: usize = 64;

/// Plans for inputs that were given.
#[derive(Default)]
pub(crate) struct Cache {
    plans: Vec<(Key, Plan)>,
    /// Whether shapes alone do not make a plan.
    by_value: bool,
}

/// What a plan is for: the shapes of all inputs, and the values of those that are a few numbers, where they are needed.
#[derive(Clone, PartialEq)]
struct Key {
    shapes: Vec<Vec<usize>>,
    values: Vec<Option<Tensor>>,
}

impl Key {
    fn new(inputs: &[&Tensor], by_value: bool) -> Self {
        let numbers = |tensor: &Tensor| by_value && tensor.shape().len() < 2 && tensor.len() <= MOST_NUMBERS;
        Self {
            shapes: inputs.iter().map(|t| t.shape().to_vec()).collect(),
            values: inputs.iter().map(|t| numbers(t).then(|| (*t).clone())).collect(),
        }
    }
}

impl Plans {
    /// The plan that is used most: that of all shapes, or the last that was made.
    pub(crate) fn latest(&self) -> Option<Plan> {
        match self {
            Self::Symbolic { plan, .. } => Some(plan.clone()),
            Self::PerShape { cache, .. } => {
                let cache = cache.lock().unwrap_or_else(PoisonError::into_inner);
                cache.plans.last().map(|(_, plan)| plan.clone())
            }
        }
    }

    /// Which sizes of the inputs must be equal.
    pub(crate) fn sharing(&self) -> Sharing {
        match self {
            Self::Symbolic { sharing, .. } => *sharing,
            Self::PerShape { .. } => Sharing::Named,
        }
    }

    /// The plan for these values of the declared inputs, in their order.
    pub(crate) fn for_inputs(&self, planner: &Planner, declared: &[TensorType], inputs: &[&Tensor]) -> Result<Plan> {
        let (parsed, cache) = match self {
            Self::Symbolic { plan, .. } => return Ok(plan.clone()),
            Self::PerShape { parsed, cache } => (parsed, cache),
        };
        let mut cache = cache.lock().unwrap_or_else(PoisonError::into_inner);
        let mut key = Key::new(inputs, cache.by_value);
        if let Some((_, plan)) = cache.plans.iter().find(|(known, _)| *known == key) {
            return Ok(plan.clone());
        }
        let typed = |key: &Key| planner.typed(with_facts(parsed, key.facts(declared)?)?);
        let model = match typed(&key) {
            Err(error @ Error::Engine { .. }) if !cache.by_value => {
                key = Key::new(inputs, true);
                if key.values.iter().all(Option::is_none) {
                    return Err(error);
                }
                let model = typed(&key)?;
                cache.by_value = true;
                model
            }
            other => other?,
        };
        let plan = planner.plan(model)?;
        if cache.plans.len() >= CACHED_PLANS {
            cache.plans.remove(0);
        }
        cache.plans.push((key, plan.clone()));
        Ok(plan)
    }
}

impl Key {
    fn facts(&self, declared: &[TensorType]) -> Result<Vec<InferenceFact>> {
        let facts = self.shapes.iter().zip(&self.values).zip(declared).map(|((shape, value), input)| {
            let mut fact = fact(datum_type(input)?, shape);
            if let Some(value) = value {
                fact.value = Arc::new(tract_values::to_tract(value)).into();
            }
            Ok(fact)
        });
        facts.collect()
    }
}

/// Which sizes of different inputs are taken to be one. Exporters name the same dimension differently on each input, or not at
/// all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// Those that the model gives one name.
    Named,
    /// Those of all matrices of integers, which are `[batch, length]`.
    Tokens,
}

impl Sharing {
    /// What the size of an axis of `input` is called; `None` for one that is fixed, or has no name.
    pub(crate) fn name(self, input: &TensorType, axis: usize) -> Option<String> {
        let dims = input.dims.as_deref()?;
        let floating = matches!(input.element, Some(ElementType::F32 | ElementType::F16 | ElementType::F64));
        match &dims[axis] {
            Dim::Fixed(_) => None,
            _ if self == Self::Tokens && dims.len() == 2 && !floating => {
                Some(["batch size", "length"][axis].to_owned())
            }
            Dim::Symbol(name) => Some(name.clone()),
            Dim::Unknown => None,
        }
    }

    /// The axes of the inputs, numbered so that those that share a size have one number.
    fn numbered(self, inputs: &[TensorType]) -> Vec<usize> {
        let mut known: HashMap<String, usize> = HashMap::new();
        let axes =
            inputs.iter().flat_map(|input| (0..input.dims.as_ref().map_or(0, Vec::len)).map(move |at| (input, at)));
        let numbers = axes.enumerate().map(|(number, (input, axis))| match self.name(input, axis) {
            Some(name) => *known.entry(name).or_insert(number),
            None => number,
        });
        numbers.collect()
    }
}

impl Planner {
    /// The model for every shape, and which sizes that takes to be one: as few as can be. Where different sizes, or a bound and
    /// what it bounds, meet in one value, they are taken to be equal, as they are wherever the model can be run.
    pub(crate) fn symbolic(&self, parsed: &InferenceModel, inputs: &[TensorType]) -> Result<(TypedModel, Sharing)> {
        let sharings = match Sharing::Named.numbered(inputs) == Sharing::Tokens.numbered(inputs) {
            true => &[Sharing::Tokens][..],
            false => &[Sharing::Named, Sharing::Tokens],
        };
        let mut attempts: Vec<_> = sharings.iter().map(|&sharing| (sharing, Bounds::Clamped)).collect();
        if operators::has_slices(parsed) {
            attempts.push((Sharing::Tokens, Bounds::Trusted));
        }
        let mut failed = Error::tract("no plan was tried");
        for (at, &(sharing, bounds)) in attempts.iter().enumerate() {
            let is_last = at + 1 == attempts.len();
            match self.with_types(symbolic(parsed, inputs, sharing, bounds)?) {
                Ok(typed) if is_last || !sizes_meet(&typed) => return Ok((self.decluttered(typed)?, sharing)),
                Ok(_) => {}
                // No shape makes that sound.
                Err(refused @ Error::Graph(_)) => return Err(refused),
                Err(e) => failed = e,
            }
        }
        Err(failed)
    }

    /// The model with all types known and what is needless taken out.
    fn typed(&self, model: InferenceModel) -> Result<TypedModel> {
        self.decluttered(self.with_types(model)?)
    }

    fn with_types(&self, model: InferenceModel) -> Result<TypedModel> {
        guarded(|| {
            let mut typed: TypedModel = model.into_typed()?;
            limits::check_shapes(&typed)?;
            give_numbers(&mut typed)?;
            Ok(typed)
        })
    }

    fn decluttered(&self, mut typed: TypedModel) -> Result<TypedModel> {
        guarded(|| {
            if self.optimise {
                declutter(&mut typed)?;
            }
            Ok(typed)
        })
    }

    pub(crate) fn plan(&self, mut typed: TypedModel) -> Result<Plan> {
        guarded(|| {
            if self.optimise {
                generate(&mut typed, self.fuse)?;
            }
            typed.into_runnable_with_options(&self.run_options)
        })
    }
}

/// Whether a value's size is that of two that may differ.
fn sizes_meet(model: &TypedModel) -> bool {
    fn meet(size: &TDim) -> bool {
        match size {
            TDim::Broadcast(_) => true,
            TDim::Add(terms) | TDim::Mul(terms) | TDim::Min(terms) | TDim::Max(terms) => terms.iter().any(meet),
            TDim::MulInt(_, term) | TDim::Div(term, _) => meet(term),
            _ => false,
        }
    }
    let outputs = model.nodes().iter().flat_map(|node| &node.outputs);
    outputs.flat_map(|output| output.fact.shape.iter()).any(meet)
}

/// Has outputs that are sizes given as numbers: those that symbols stand for are known in a run alone.
fn give_numbers(model: &mut TypedModel) -> TractResult<()> {
    let mut outputs = model.output_outlets()?.to_vec();
    for (at, output) in outputs.iter_mut().enumerate() {
        if model.outlet_fact(*output)?.datum_type == TDim::datum_type() {
            let name = model.unique_name(format!("output-{at}.number"));
            *output = model.wire_node(name, cast(DatumType::I64), &[*output])?[0];
        }
    }
    model.select_output_outlets(&outputs)
}

/// tract's own optimisation, bounded: some of its passes never settle on axes of size 1 (as a sequence limit of 1 makes
/// them). Stopped anywhere, the model is valid. Models settle within about one step a node.
fn steps(model: &TypedModel) -> usize {
    500 + 6 * model.nodes.len()
}

/// What is independent of the machine.
pub(crate) fn declutter(model: &mut TypedModel) -> TractResult<()> {
    let mut optimizer = Optimizer::declutter();
    // Splits products with a mask in regions by what tract takes for its shape, which a broadcast may not have.
    optimizer.passes.retain(|pass| !format!("{pass:?}").starts_with("FoldUniformMask"));
    optimizer.stopping_at(steps(model)).optimize(model)
}

/// What is the machine's. With `fuse`, the operators of [`fuse`](crate::fuse) take the place of tract's where they are
/// recognised.
pub(crate) fn generate(model: &mut TypedModel, fuse: bool) -> TractResult<()> {
    let steps = steps(model);
    if fuse {
        let fused = crate::fuse::fuse(model)?;
        crate::not_a_number::keep_not_a_number(model)?;
        tracing::debug!("fused {} attentions and {} linear layers", fused.attentions, fused.linears);
    }
    crate::integer_square::square_integers(model);
    Optimizer::codegen().stopping_at(steps).optimize(model)
}

/// Runs tract code; a panic inside becomes an error.
pub(crate) fn guarded<T>(work: impl FnOnce() -> TractResult<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(|error| match error.chain().find_map(|cause| cause.downcast_ref::<Refused>()) {
            Some(refused) => mabert_graph::Error::Graph(refused.to_string()).into(),
            None => Error::tract(error),
        }),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            Err(Error::tract(format!("panicked: {}", text.unwrap_or("no message"))))
        }
    }
}

fn with_facts(parsed: &InferenceModel, facts: Vec<InferenceFact>) -> Result<InferenceModel> {
    let mut model = parsed.clone();
    for (at, fact) in facts.into_iter().enumerate() {
        guarded(|| model.set_input_fact(at, fact))?;
    }
    Ok(model)
}

fn fact<D: Into<TDim> + Clone>(datum_type: DatumType, dims: &[D]) -> InferenceFact {
    let dims: TVec<TDim> = dims.iter().cloned().map(Into::into).collect();
    InferenceFact::dt_shape(datum_type, dims)
}

fn datum_type(input: &TensorType) -> Result<DatumType> {
    Ok(match input.element {
        Some(ElementType::F32) => DatumType::F32,
        Some(ElementType::F64) => DatumType::F64,
        Some(ElementType::F16) => DatumType::F16,
        Some(ElementType::I64) => DatumType::I64,
        Some(ElementType::I32) => DatumType::I32,
        Some(ElementType::I8) => DatumType::I8,
        Some(ElementType::U8) => DatumType::U8,
        Some(ElementType::Bool) => DatumType::Bool,
        None => return Err(Error::tract(format!("input `{}` is of a type that is not supported", input.name))),
    })
}

/// Gives every input symbolic dimensions, which the checks hold callers to.
fn symbolic(
    parsed: &InferenceModel,
    inputs: &[TensorType],
    sharing: Sharing,
    bounds: Bounds,
) -> Result<InferenceModel> {
    let mut model = parsed.clone();
    operators::bound_slices(&mut model, bounds);
    let symbols = model.symbols.clone();
    let mut known: HashMap<String, TDim> = HashMap::new();
    let mut facts = Vec::new();
    for input in inputs {
        let Some(dims) = &input.dims else {
            return Err(Error::tract(format!("input `{}` declares no rank", input.name)));
        };
        let dims = dims.iter().enumerate().map(|(axis, dim)| {
            if let Dim::Fixed(size) = dim {
                return Ok(TDim::from(*size));
            }
            let name = sharing.name(input, axis).unwrap_or_else(|| format!("{}_{axis}", input.name));
            // tract parses symbol names as expressions elsewhere: keep to letters, digits and underscores.
            let name: String = name.chars().map(|c| if c.is_alphanumeric() { c } else { '_' }).collect();
            if let Some(symbol) = known.get(&name) {
                return Ok(symbol.clone());
            }
            let symbol = symbols.sym(&format!("mabert_{name}"));
            // No axis of an input is empty.
            guarded(|| symbols.add_assertion(format!("{symbol}>=1")))?;
            known.insert(name, symbol.clone().into());
            Ok(symbol.into())
        });
        facts.push(fact(datum_type(input)?, &dims.collect::<Result<Vec<TDim>>>()?));
    }
    for (at, fact) in facts.into_iter().enumerate() {
        guarded(|| model.set_input_fact(at, fact))?;
    }
    Ok(model)
}

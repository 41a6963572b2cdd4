//! From tract's model of a graph to a plan that runs, for all shapes at once where their symbols unify.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use mabert_graph::{Dim, ElementType, Tensor, TensorType};
use tract_core::optim::Optimizer;
use tract_core::runtime::RunOptions;
use tract_onnx::prelude::{
    DatumType, InferenceFact, InferenceModel, InferenceModelExt, TDim, TVec, TractResult, TypedModel,
    TypedRunnableModel,
};

use crate::bounded::Refused;
use crate::{Error, Result, limits};

/// How plans are made.
pub(crate) struct Planner {
    pub(crate) run_options: RunOptions,
    pub(crate) optimise: bool,
    pub(crate) fuse: bool,
}

pub(crate) type Plan = Arc<TypedRunnableModel>;
pub(crate) type Shapes = Vec<Vec<usize>>;

pub(crate) enum Plans {
    /// One plan for every shape.
    Symbolic(Plan),
    /// tract cannot unify the model's symbolic dimensions: one plan for each combination of input shapes.
    PerShape { parsed: Box<InferenceModel>, cache: Mutex<Vec<(Shapes, Plan)>> },
}

/// Plans of one model share its constants but not their packed copies; beyond this many the oldest goes.
const CACHED_PLANS: usize = 8;

impl Plans {
    /// The plan that is used most: that of all shapes, or the last that was made.
    pub(crate) fn latest(&self) -> Option<Plan> {
        match self {
            Self::Symbolic(plan) => Some(plan.clone()),
            Self::PerShape { cache, .. } => {
                let cache = cache.lock().unwrap_or_else(PoisonError::into_inner);
                cache.last().map(|(_, plan)| plan.clone())
            }
        }
    }

    /// The plan for these values of the declared inputs, in their order.
    pub(crate) fn for_inputs(&self, planner: &Planner, declared: &[TensorType], inputs: &[&Tensor]) -> Result<Plan> {
        let (parsed, cache) = match self {
            Self::Symbolic(plan) => return Ok(plan.clone()),
            Self::PerShape { parsed, cache } => (parsed, cache),
        };
        let shapes: Shapes = inputs.iter().map(|t| t.shape().to_vec()).collect();
        let mut cache = cache.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, plan)) = cache.iter().find(|(s, _)| *s == shapes) {
            return Ok(plan.clone());
        }
        let facts = shapes.iter().zip(declared).map(|(shape, input)| Ok(fact(datum_type(input)?, shape)));
        let plan = planner.plan(planner.typed(with_facts(parsed, facts.collect::<Result<_>>()?)?)?)?;
        if cache.len() >= CACHED_PLANS {
            cache.remove(0);
        }
        cache.push((shapes, plan.clone()));
        Ok(plan)
    }
}

impl Planner {
    /// The model with all types known and what is needless taken out.
    pub(crate) fn typed(&self, model: InferenceModel) -> Result<TypedModel> {
        guarded(|| {
            let mut typed: TypedModel = model.into_typed()?;
            limits::check_shapes(&typed)?;
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

/// tract's own optimisation, bounded: some of its passes never settle on axes of size 1 (as a sequence limit of 1 makes
/// them). Stopped anywhere, the model is valid. Models settle within about one step a node.
fn steps(model: &TypedModel) -> usize {
    500 + 6 * model.nodes.len()
}

/// What is independent of the machine.
pub(crate) fn declutter(model: &mut TypedModel) -> TractResult<()> {
    Optimizer::declutter().stopping_at(steps(model)).optimize(model)
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

/// Gives every input symbolic dimensions. Exporters name the same dimension differently on each input, or not at all;
/// integer matrices are all `[batch, length]`, and the checks hold callers to it.
pub(crate) fn symbolic(parsed: &InferenceModel, inputs: &[TensorType]) -> Result<InferenceModel> {
    let mut model = parsed.clone();
    let symbols = model.symbols.clone();
    let mut known: HashMap<String, TDim> = HashMap::new();
    let mut facts = Vec::new();
    for input in inputs {
        let Some(dims) = &input.dims else {
            return Err(Error::tract(format!("input `{}` declares no rank", input.name)));
        };
        let tokens = dims.len() == 2 && !matches!(input.element, Some(ElementType::F32 | ElementType::F16));
        let dims = dims.iter().enumerate().map(|(axis, dim)| {
            let name = match dim {
                Dim::Fixed(n) => return TDim::from(*n),
                _ if tokens => ["batch", "length"][axis].to_owned(),
                Dim::Symbol(name) => name.clone(),
                Dim::Unknown => format!("{}_{axis}", input.name),
            };
            // tract parses symbol names as expressions elsewhere: keep to letters, digits and underscores.
            let name: String = name.chars().map(|c| if c.is_alphanumeric() { c } else { '_' }).collect();
            known.entry(name.clone()).or_insert_with(|| symbols.sym(&format!("mabert_{name}")).into()).clone()
        });
        facts.push(fact(datum_type(input)?, &dims.collect::<Vec<_>>()));
    }
    for (at, fact) in facts.into_iter().enumerate() {
        guarded(|| model.set_input_fact(at, fact))?;
    }
    Ok(model)
}

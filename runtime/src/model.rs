//! A model on tract, ready to run at any batch size and length.

use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use mabert_graph::proto::ValueInfoProto;
use mabert_graph::{Dim, Model as Graph, Tensor, TensorType};
use tract_core::optim::Optimizer;
use tract_core::runtime::RunOptions;
use tract_linalg::multithread::Executor;
use tract_onnx::Onnx;
use tract_onnx::prelude::{
    DatumType, Framework, InferenceFact, InferenceModel, InferenceModelExt, IntoTValue, TDim, TVec, TractError,
    TractResult, TypedModel, TypedRunnableModel, TypedSimpleState,
};

use crate::check::Checks;
use crate::memory::Freed;
use crate::{ElementType, Error, Result, adapt, limits, tract_values};

/// Values by name, in the order of the model's outputs (and taps).
pub type Named = Vec<(String, Tensor)>;

/// Named values as [`Model::run`] takes them.
pub fn borrowed<S: AsRef<str>>(values: &[(S, Tensor)]) -> Vec<(&str, &Tensor)> {
    values.iter().map(|(name, value)| (name.as_ref(), value)).collect()
}

/// A model ready to run, on whichever engine.
pub trait Engine: Send + Sync {
    /// The inputs that a run needs.
    fn inputs(&self) -> &[TensorType];

    /// Runs the model once. Inputs may come in any order.
    ///
    /// # Errors
    /// The inputs do not fit the model, or the engine fails.
    fn run(&self, inputs: &[(&str, &Tensor)]) -> Result<Named>;
}

impl Engine for Model {
    fn inputs(&self) -> &[TensorType] {
        self.inputs()
    }

    fn run(&self, inputs: &[(&str, &Tensor)]) -> Result<Named> {
        self.run(inputs)
    }
}

/// Which inner values a run returns besides the outputs.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Taps {
    /// None.
    #[default]
    None,
    /// These, after the outputs.
    Values(Vec<String>),
    /// Every value that a node computes, and nothing optimised away: for inspection, not for speed.
    Everything,
}

/// How a model is prepared.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    taps: Taps,
    threads: Option<usize>,
    plain: bool,
}

impl LoadOptions {
    /// Also returns these inner values.
    pub fn taps(mut self, taps: Taps) -> Self {
        self.taps = taps;
        self
    }

    /// Uses this many threads in matrix products; one without this option.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Keeps to tract's own operators, without the fused ones of this crate: for comparisons.
    pub fn plain(mut self) -> Self {
        self.plain = true;
        self
    }

    /// Reads and prepares a model.
    ///
    /// # Errors
    /// The file is not a model, or tract cannot handle it.
    pub fn load(self, path: impl AsRef<Path>) -> Result<Model> {
        self.take(Graph::load(path)?)
    }

    /// Prepares a model that is in memory.
    ///
    /// # Errors
    /// tract cannot handle the model, or a tap names no value.
    pub fn prepare(self, graph: &Graph) -> Result<Model> {
        self.take(graph.clone())
    }

    fn take(self, mut graph: Graph) -> Result<Model> {
        mabert_graph::inline_functions(&mut graph)?;
        // CPUs have little arithmetic in half precision, and tract none that is fast: computed in single precision.
        mabert_graph::widen_half(&mut graph)?;
        // tract knows few fused operators and takes their domain for granted: it only sees plain ones.
        mabert_graph::decompose_fused(&mut graph)?;
        limits::check(&graph)?;
        // A part of the graph tells indices; it is adapted on its own.
        let checks = Checks::new(&graph)?;
        adapt::adapt(&mut graph)?;
        let declared = graph.inputs();
        let weights = tract_values::take_weights(&mut graph);
        let mut message = tract_values::message(&mut graph)?;
        let outputs = add_taps(&graph, &mut message, &self.taps)?;
        drop(graph);
        let mut parsed = guarded(|| {
            let onnx = tract_onnx::onnx().with_ignore_output_shapes(true).with_ignore_output_types(true);
            parse(&onnx.with_ignore_value_info(true), &message)
        })?;
        drop(message);
        let mut freed = Freed::default();
        for weight in weights {
            freed.add(weight.raw_data.len());
            tract_values::put_weight(&mut parsed, weight)?;
        }
        let executor = match self.threads {
            // tract panics where the system gives no more threads.
            Some(n) if n > 1 => guarded(|| Ok::<_, Error>(Executor::multithread(n)))?,
            _ => Executor::SingleThread,
        };
        let how = How {
            run_options: RunOptions { executor: Some(executor), ..RunOptions::default() },
            optimise: self.taps != Taps::Everything,
            fuse: !self.plain,
        };
        let typed = match how.optimise {
            true => symbolic(&parsed, &declared).and_then(|m| how.typed(m)),
            false => Err(Error::tract("every value is wanted: nothing is planned ahead")),
        };
        let plans = match typed {
            Ok(typed) => {
                // Weights are packed next, each in the place of the one that was read.
                drop(parsed);
                Plans::Symbolic(how.plan(typed)?)
            }
            Err(e) => {
                tracing::debug!("planned for each shape apart, as symbols do not unify: {e}");
                Plans::PerShape { parsed: Box::new(parsed), cache: Mutex::default() }
            }
        };
        Ok(Model { inputs: declared, outputs, checks, plans, how })
    }
}

/// A model on tract.
pub struct Model {
    inputs: Vec<TensorType>,
    outputs: Vec<String>,
    checks: Checks,
    plans: Plans,
    how: How,
}

/// How plans are made.
struct How {
    run_options: RunOptions,
    optimise: bool,
    fuse: bool,
}

type Plan = Arc<TypedRunnableModel>;
type Shapes = Vec<Vec<usize>>;

enum Plans {
    /// One plan for every shape.
    Symbolic(Plan),
    /// tract cannot unify the model's symbolic dimensions: one plan for each combination of input shapes.
    PerShape { parsed: Box<InferenceModel>, cache: Mutex<Vec<(Shapes, Plan)>> },
}

/// How long one operator took.
#[derive(Clone, Debug)]
pub struct Timed {
    /// The node of the plan; it carries the name of the ONNX node that it comes from.
    pub node: String,
    /// tract's name of the operator.
    pub operator: String,
    /// Seconds.
    pub seconds: f64,
}

/// Plans of one model share its constants but not their packed copies; beyond this many the oldest goes.
const CACHED_PLANS: usize = 8;

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("inputs", &self.inputs).field("outputs", &self.outputs).finish_non_exhaustive()
    }
}

impl Model {
    /// Reads and prepares a model, for one thread and without taps; see [`LoadOptions`] for more.
    ///
    /// # Errors
    /// The file is not a model, or tract cannot handle it.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        LoadOptions::default().load(path)
    }

    /// Prepares a model from the bytes of its file (without external data).
    ///
    /// # Errors
    /// The bytes are not a model, or tract cannot handle it.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        LoadOptions::default().take(Graph::from_bytes(bytes)?)
    }

    /// The inputs that [`run`](Self::run) needs.
    pub fn inputs(&self) -> &[TensorType] {
        &self.inputs
    }

    /// The names of the outputs, taps included, in the order in which they are returned.
    pub fn outputs(&self) -> &[String] {
        &self.outputs
    }

    /// The operators that tract runs, and how often each stands in the plan; empty before the first run where each shape has
    /// a plan of its own. Operators of this crate are `Linear` and `LinearAttention`, and `ToPanels` and `FromPanels` at
    /// the ends of a chain of them.
    pub fn operators(&self) -> BTreeMap<String, usize> {
        let plan = match &self.plans {
            Plans::Symbolic(plan) => Some(plan.clone()),
            Plans::PerShape { cache, .. } => {
                let cache = cache.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                cache.last().map(|(_, plan)| plan.clone())
            }
        };
        let mut operators = BTreeMap::new();
        for node in plan.iter().flat_map(|plan| plan.model().nodes()) {
            *operators.entry(node.op.name().into_owned()).or_default() += 1;
        }
        operators
    }

    /// Checks inputs without running the model on them.
    ///
    /// # Errors
    /// As those of [`run`](Self::run), up to where tract is called.
    pub fn check(&self, inputs: &[(&str, &Tensor)]) -> Result<()> {
        self.checks.check(&self.inputs, inputs).map(drop)
    }

    /// Runs the model once. Inputs may come in any order.
    ///
    /// # Errors
    /// Inputs of a wrong name, element type, rank or size; indices outside their tables; sequences that are too long;
    /// or a failure inside tract.
    pub fn run(&self, inputs: &[(&str, &Tensor)]) -> Result<Named> {
        let ordered = self.checks.check(&self.inputs, inputs)?;
        let plan = self.plan_of(&ordered)?;
        let values: TVec<_> = ordered.iter().map(|t| tract_values::to_tract(t).into_tvalue()).collect();
        let results = guarded(|| plan.run(values))?;
        let named = self.outputs.iter().zip(results.iter());
        named.map(|(name, value)| Ok((name.clone(), tract_values::from_tract(value)?))).collect()
    }

    /// Runs the model once and times each operator, in the order in which they ran.
    ///
    /// # Errors
    /// As those of [`run`](Self::run).
    pub fn profile(&self, inputs: &[(&str, &Tensor)]) -> Result<Vec<Timed>> {
        let ordered = self.checks.check(&self.inputs, inputs)?;
        let plan = self.plan_of(&ordered)?;
        let values: TVec<_> = ordered.iter().map(|t| tract_values::to_tract(t).into_tvalue()).collect();
        let mut timed = Vec::new();
        guarded(|| {
            let mut state = TypedSimpleState::new(&plan)?;
            state.run_plan_with_eval(values, |context, op_state, node, inputs| {
                let start = Instant::now();
                let result = tract_core::plan::eval(context, op_state, node, inputs);
                let seconds = start.elapsed().as_secs_f64();
                timed.push(Timed { node: node.name.clone(), operator: node.op.name().into_owned(), seconds });
                result
            })
        })?;
        Ok(timed)
    }

    fn plan_of(&self, inputs: &[&Tensor]) -> Result<Plan> {
        match &self.plans {
            Plans::Symbolic(plan) => Ok(plan.clone()),
            Plans::PerShape { parsed, cache } => self.plan_for(parsed, cache, inputs),
        }
    }

    fn plan_for(
        &self,
        parsed: &InferenceModel,
        cache: &Mutex<Vec<(Shapes, Plan)>>,
        inputs: &[&Tensor],
    ) -> Result<Plan> {
        let shapes: Shapes = inputs.iter().map(|t| t.shape().to_vec()).collect();
        let mut cache = cache.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some((_, plan)) = cache.iter().find(|(s, _)| *s == shapes) {
            return Ok(plan.clone());
        }
        let facts = shapes.iter().zip(&self.inputs).map(|(shape, input)| Ok(fact(datum_type(input)?, shape)));
        let plan = self.how.plan(self.how.typed(with_facts(parsed, facts.collect::<Result<_>>()?)?)?)?;
        if cache.len() >= CACHED_PLANS {
            cache.remove(0);
        }
        cache.push((shapes, plan.clone()));
        Ok(plan)
    }
}

impl How {
    /// The model with all types known and what is needless taken out.
    fn typed(&self, model: InferenceModel) -> Result<TypedModel> {
        guarded(|| {
            let mut typed: TypedModel = model.into_typed()?;
            if self.optimise {
                declutter(&mut typed)?;
            }
            Ok::<_, TractError>(typed)
        })
    }

    fn plan(&self, mut typed: TypedModel) -> Result<Plan> {
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
        tracing::debug!("fused {} attentions and {} linear layers", fused.attentions, fused.linears);
    }
    Optimizer::codegen().stopping_at(steps).optimize(model)
}

/// Adds the taps to the outputs of tract's message; returns all names in order.
fn add_taps(graph: &Graph, message: &mut tract_onnx::pb::ModelProto, taps: &Taps) -> Result<Vec<String>> {
    let mut names: Vec<String> = graph.graph().output.iter().map(|o: &ValueInfoProto| o.name.clone()).collect();
    let computed = || graph.graph().node.iter().flat_map(|n| &n.output).filter(|o| !o.is_empty());
    let wanted: Vec<String> = match taps {
        Taps::None => Vec::new(),
        Taps::Values(values) => values.clone(),
        Taps::Everything => computed().cloned().collect(),
    };
    for tap in wanted {
        let known = computed().any(|v| *v == tap) || graph.graph().input.iter().any(|i| i.name == tap);
        if !known {
            return Err(mabert_graph::Error::Graph(format!("no value is called `{tap}`")).into());
        }
        if !names.contains(&tap) {
            names.push(tap);
        }
    }
    let outputs = &mut message.graph.get_or_insert_default().output;
    for name in &names[outputs.len()..] {
        outputs.push(tract_onnx::pb::ValueInfoProto { name: name.clone(), ..Default::default() });
    }
    Ok(names)
}

fn parse(onnx: &Onnx, message: &tract_onnx::pb::ModelProto) -> TractResult<InferenceModel> {
    onnx.model_for_proto_model(message)
}

/// Runs tract code; a panic inside becomes an error.
fn guarded<T, E: std::fmt::Debug>(work: impl FnOnce() -> std::result::Result<T, E>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(result) => result.map_err(Error::tract),
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
fn symbolic(parsed: &InferenceModel, inputs: &[TensorType]) -> Result<InferenceModel> {
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

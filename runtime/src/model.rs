//! A model on tract, ready to run at any batch size and length.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Mutex;
use std::time::Instant;

use mabert_graph::proto::ValueInfoProto;
use mabert_graph::{Model as Graph, Tensor, TensorType};
use tract_core::runtime::RunOptions;
use tract_linalg::multithread::Executor;
use tract_onnx::Onnx;
use tract_onnx::prelude::{Framework, InferenceModel, IntoTValue, TValue, TVec, TractResult, TypedSimpleState};

use crate::check::Checks;
use crate::engine::{Engine, Named};
use crate::memory::Freed;
use crate::plan::{Plan, Planner, Plans, Sharing, guarded};
use crate::{Error, Result, adapt, bounded, limits, supported, tract_values};

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

    fn take(self, graph: Graph) -> Result<Model> {
        let origin = graph.origin().to_owned();
        self.plan(graph).map_err(|e| e.in_model(&origin))
    }

    fn plan(self, mut graph: Graph) -> Result<Model> {
        let origin = graph.origin().to_owned();
        mabert_graph::inline_functions(&mut graph)?;
        mabert_graph::check_nodes(&graph)?;
        // CPUs have little arithmetic in half precision, and tract none that is fast: computed in single precision.
        mabert_graph::widen_half(&mut graph)?;
        // tract has few of the quantised operators: in floats, which the integers are no larger than, they give the same.
        mabert_graph::dequantise(&mut graph, mabert_graph::Rounding::Kept)?;
        // tract knows few fused operators and takes their domain for granted: it only sees plain ones.
        mabert_graph::decompose_fused(&mut graph)?;
        limits::check(&graph)?;
        // A part of the graph tells indices; it is adapted on its own.
        let checks = Checks::new(&graph, &|part| Ok(Box::new(Self::default().prepare(part)?)))?;
        supported::refuse_own(&graph)?;
        if !self.plain {
            crate::fuse::gather(&mut graph)?;
        }
        adapt::adapt(&mut graph)?;
        if self.taps == Taps::None {
            graph.remove_dead();
        }
        supported::check(&graph)?;
        let declared = graph.inputs();
        let weights = tract_values::take_weights(&mut graph);
        let mut message = tract_values::message(&mut graph)?;
        let outputs = add_taps(&graph, &mut message, &self.taps)?;
        drop(graph);
        let mut parsed = guarded(|| {
            let onnx = tract_onnx::onnx().with_ignore_output_shapes(true).with_ignore_output_types(true);
            let mut onnx = onnx.with_ignore_value_info(true);
            bounded::check_operators(&mut onnx);
            parse(&onnx, &message)
        })?;
        drop(message);
        let mut freed = Freed::default();
        for weight in weights {
            freed.add(weight.raw_data.len());
            tract_values::put_weight(&mut parsed, weight)?;
        }
        let executor = match self.threads {
            // tract panics where the system gives no more threads.
            Some(n) if n > 1 => guarded(|| Ok(Executor::multithread(n)))?,
            _ => Executor::SingleThread,
        };
        let planner = Planner {
            run_options: RunOptions { executor: Some(executor), ..RunOptions::default() },
            optimise: self.taps != Taps::Everything,
            fuse: !self.plain,
        };
        let typed = match planner.optimise {
            true => planner.symbolic(&parsed, &declared),
            false => Err(Error::tract("every value is wanted: nothing is planned ahead")),
        };
        let plans = match typed {
            Ok((typed, sharing)) => {
                // Weights are packed next, each in the place of the one that was read.
                drop(parsed);
                Plans::Symbolic { plan: planner.plan(typed)?, sharing }
            }
            Err(refused @ Error::Graph(_)) => return Err(refused),
            Err(e) => {
                tracing::debug!("planned for each shape apart, as symbols do not unify: {e}");
                Plans::PerShape { parsed: Box::new(parsed), cache: Mutex::default() }
            }
        };
        Ok(Model { inputs: declared, outputs, checks, plans, planner, origin })
    }
}

/// A model on tract. A run takes `&self` and keeps nothing of its inputs: threads may share one model, each with its own
/// runs.
pub struct Model {
    inputs: Vec<TensorType>,
    outputs: Vec<String>,
    checks: Checks,
    plans: Plans,
    planner: Planner,
    /// Its file, for messages.
    origin: String,
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
        let plan = self.plans.latest();
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
        self.checks.check(&self.inputs, inputs, self.plans.sharing()).map(drop)
    }

    /// Runs the model once. Inputs may come in any order. Safe from many threads at once.
    ///
    /// # Errors
    /// Inputs of a wrong name, element type, rank or size; indices outside their tables; sequences that are too long;
    /// or a failure inside tract.
    pub fn run(&self, inputs: &[(&str, &Tensor)]) -> Result<Named> {
        self.compute(inputs).map_err(|e| e.in_model(&self.origin))
    }

    fn compute(&self, inputs: &[(&str, &Tensor)]) -> Result<Named> {
        let (plan, values) = self.planned(inputs)?;
        let results = guarded(|| plan.run(values)).map_err(|e| self.unequal(inputs).unwrap_or(e))?;
        let named = self.outputs.iter().zip(results.iter());
        named.map(|(name, value)| Ok((name.clone(), tract_values::from_tract(value)?))).collect()
    }

    /// The plan for `inputs`, and these as tract takes them.
    fn planned(&self, inputs: &[(&str, &Tensor)]) -> Result<(Plan, TVec<TValue>)> {
        let ordered = self.checks.check(&self.inputs, inputs, self.plans.sharing())?;
        let plan = self.plans.for_inputs(&self.planner, &self.inputs, &ordered);
        let plan = plan.map_err(|e| self.unequal(inputs).unwrap_or(e))?;
        Ok((plan, ordered.iter().map(|t| tract_values::to_tract(t).into_tvalue()).collect()))
    }

    /// What is said of inputs whose batch sizes or lengths differ, where that may be why a run failed.
    fn unequal(&self, inputs: &[(&str, &Tensor)]) -> Option<Error> {
        let fault = self.checks.check(&self.inputs, inputs, Sharing::Tokens).err()?;
        matches!(fault, Error::Shape { .. }).then_some(fault)
    }

    /// Runs the model once and times each operator, in the order in which they ran.
    ///
    /// # Errors
    /// As those of [`run`](Self::run).
    pub fn profile(&self, inputs: &[(&str, &Tensor)]) -> Result<Vec<Timed>> {
        let (plan, values) = self.planned(inputs)?;
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

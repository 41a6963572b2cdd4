//! A differentiable executor of ONNX graphs: what a student is made of, and what task heads use, on candle's tensors.
//!
//! Values of floats are tensors with gradients. Integers (shapes, indices) never need one and are computed beside them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use candle_core::{Tensor as Real, Var};
use mabert_graph::proto::NodeProto;
use mabert_graph::{Model, NodeExt as _, Tensor, attribute};
use mabert_passes::lower::MASK;

use super::accumulating::{self, Combination, Gradient};
use super::candle_values;
use super::device::device;
use super::hinge_probabilities::{self, HingeSite};
use super::operators::{refused, run_node};
use super::value::Value;
use crate::{Error, Result};

/// A graph whose chosen initializers are variables.
pub(crate) struct Graph {
    steps: Vec<Step>,
    constants: Vec<(usize, Value)>,
    variables: Vec<(String, usize, Var)>,
    inputs: Vec<usize>,
    outputs: Vec<usize>,
    slots: usize,
}

/// What is computed at a time.
enum Step {
    Node(Node),
    Hinges(HingeStep),
}

impl Step {
    fn inputs(&self) -> Vec<usize> {
        match self {
            Self::Node(node) => node.inputs.iter().flatten().copied().collect(),
            Self::Hinges(hinges) => [hinges.scores, hinges.mask].iter().chain(&hinges.parameters).copied().collect(),
        }
    }

    fn outputs(&self) -> &[usize] {
        match self {
            Self::Node(node) => &node.outputs,
            Self::Hinges(hinges) => std::slice::from_ref(&hinges.output),
        }
    }
}

/// All that hinges make of scores.
struct HingeStep {
    site: HingeSite,
    scores: usize,
    mask: usize,
    parameters: Vec<usize>,
    output: usize,
}

struct Node {
    proto: NodeProto,
    /// `None` for inputs that are left out.
    inputs: Vec<Option<usize>>,
    outputs: Vec<usize>,
    /// Where it combines an activation with a variable: how, the activation, and the variable's number.
    accumulates: Option<(Combination, usize, usize)>,
}

/// Whether a node combines one of its inputs with a variable.
fn accumulates(
    proto: &NodeProto,
    inputs: &[Option<usize>],
    numbers: &HashMap<usize, usize>,
) -> Option<(Combination, usize, usize)> {
    let combination = match proto.op_type.as_str() {
        "MatMul" => Combination::Product,
        "Add" => Combination::Sum,
        "Mul" => Combination::Scale,
        _ => return None,
    };
    let &[Some(first), Some(second)] = inputs else { return None };
    match (numbers.get(&first), numbers.get(&second)) {
        (None, Some(&variable)) => Some((combination, first, variable)),
        (Some(&variable), None) if combination != Combination::Product => Some((combination, second, variable)),
        _ => None,
    }
}

impl Graph {
    /// Prepares `model`, whose inputs are given to [`Graph::run`] in `inputs`' order. Initializers named in `trained` are
    /// variables. What lies between scores and probabilities of `hinges` is computed at once.
    pub(crate) fn new(
        model: &Model,
        inputs: &[&str],
        outputs: &[&str],
        trained: &[String],
        hinges: &[HingeSite],
    ) -> Result<Self> {
        let mut slots: HashMap<String, usize> = HashMap::new();
        let mut slot = |name: &str| {
            let next = slots.len();
            *slots.entry(name.to_owned()).or_insert(next)
        };
        let mut constants = Vec::new();
        let mut variables = Vec::new();
        for initializer in &model.graph().initializer {
            let value = Tensor::from_proto(initializer)?;
            let at = slot(&initializer.name);
            if trained.contains(&initializer.name) {
                let var = Var::from_tensor(&candle_values::to_candle(&value)?)?;
                variables.push((initializer.name.clone(), at, var));
            } else {
                constants.push((at, candle_values::to_value(&value)?));
            }
        }
        if let Some(missing) = trained.iter().find(|name| variables.iter().all(|(n, ..)| n != *name)) {
            return Err(Error::Gradient(format!("there is no initializer `{missing}` to train")));
        }
        let inputs = inputs.iter().map(|name| slot(name)).collect();
        let numbers: HashMap<usize, usize> = variables.iter().enumerate().map(|(i, (_, at, _))| (*at, i)).collect();
        let mut steps = Vec::new();
        for proto in &model.graph().node {
            if proto.is("Constant") {
                let value = attribute::constant(proto)?
                    .ok_or_else(|| refused(proto, "its value is neither floats nor integers"))?;
                constants.push((slot(&proto.output[0]), candle_values::to_value(&value)?));
                continue;
            }
            let used: Vec<Option<usize>> =
                proto.input.iter().map(|name| (!name.is_empty()).then(|| slot(name))).collect();
            let made = proto.output.iter().map(|name| slot(name)).collect();
            let accumulates = accumulates(proto, &used, &numbers);
            steps.push(Step::Node(Node { proto: proto.clone(), inputs: used, outputs: made, accumulates }));
        }
        let outputs: Vec<usize> = outputs.iter().map(|name| slot(name)).collect();
        if device().is_cpu() {
            hinges.iter().for_each(|site| put_hinges(&mut steps, site, &slots));
            steps = without_idle(steps, &outputs);
        }
        let slots = slots.len();
        Ok(Self { steps, constants, variables, inputs, outputs, slots })
    }

    /// The variables, by the names of their initializers.
    pub(crate) fn variables(&self) -> impl Iterator<Item = (&str, &Var)> {
        self.variables.iter().map(|(name, _, var)| (name.as_str(), var))
    }

    /// Runs the graph; every output must be of floats. Where a gradient is given, going back from the outputs adds to it
    /// what concerns large variables; [`Buffers::gradients`](super::Buffers::gradients) adds the others.
    pub(crate) fn run(&self, inputs: &[Value], gradient: Option<&Arc<Gradient>>) -> Result<Vec<Real>> {
        let mut values: Vec<Option<Value>> = vec![None; self.slots];
        for (at, value) in &self.constants {
            values[*at] = Some(value.clone());
        }
        for (_, at, var) in &self.variables {
            values[*at] = Some(Value::Real(var.as_tensor().clone()));
        }
        for (at, value) in self.inputs.iter().zip(inputs) {
            values[*at] = Some(value.clone());
        }
        for step in &self.steps {
            match step {
                Step::Node(node) => self.run_node(node, &mut values, gradient)?,
                Step::Hinges(hinges) => values[hinges.output] = Some(self.run_hinges(hinges, &values, gradient)?),
            }
        }
        let real = |at: &usize| match &values[*at] {
            Some(Value::Real(value)) => Ok(value.clone()),
            _ => Err(Error::Gradient("an output is not of floats".to_owned())),
        };
        self.outputs.iter().map(real).collect()
    }

    fn run_node(&self, node: &Node, values: &mut [Option<Value>], gradient: Option<&Arc<Gradient>>) -> Result<()> {
        if let Some((combination, x, number)) = node.accumulates
            && let Some(Value::Real(x)) = &values[x]
            && let variable = self.variables[number].2.as_tensor()
            && accumulating::fits(combination, x, variable)
        {
            let made = accumulating::apply(combination, x, variable, gradient.map(|g| (g.clone(), number)))?;
            values[node.outputs[0]] = Some(Value::Real(made));
            return Ok(());
        }
        let given: Vec<Option<&Value>> = node.inputs.iter().map(|at| at.and_then(|at| values[at].as_ref())).collect();
        let made = run_node(&node.proto, &given)?;
        for (at, value) in node.outputs.iter().zip(made) {
            values[*at] = Some(value);
        }
        Ok(())
    }

    fn run_hinges(
        &self,
        step: &HingeStep,
        values: &[Option<Value>],
        gradient: Option<&Arc<Gradient>>,
    ) -> Result<Value> {
        let real = |at: usize| match &values[at] {
            Some(Value::Real(value)) => Ok(value.clone()),
            _ => Err(Error::Gradient(format!("`{}` cannot be computed", step.site.probabilities))),
        };
        let parameters = step.parameters.iter().map(|at| real(*at)).collect::<Result<Vec<_>>>()?;
        let number = |at: &usize| self.variables.iter().position(|(_, slot, _)| slot == at);
        let gradient = gradient.map(|g| (g.clone(), step.parameters.iter().map(number).collect()));
        let (scores, mask) = (real(step.scores)?, real(step.mask)?);
        Ok(Value::Real(hinge_probabilities::apply(&step.site, &scores, &mask, &parameters, gradient)?))
    }
}

/// Puts one step in the place of the one that ends in the probabilities of `site`, where the graph has it.
fn put_hinges(steps: &mut [Step], site: &HingeSite, slots: &HashMap<String, usize>) {
    let slot = |name: &str| slots.get(name).copied();
    let parameters = site.parameters.names().into_iter().map(|name| slot(name)).collect();
    let (Some(scores), Some(mask), Some(output), Some(parameters)) =
        (slot(&site.scores), slot(MASK), slot(&site.probabilities), parameters)
    else {
        return;
    };
    if let Some(step) = steps.iter_mut().find(|step| step.outputs().contains(&output)) {
        *step = Step::Hinges(HingeStep { site: site.clone(), scores, mask, parameters, output });
    }
}

/// Steps without those that nothing needs.
fn without_idle(steps: Vec<Step>, outputs: &[usize]) -> Vec<Step> {
    let mut needed: HashSet<usize> = outputs.iter().copied().collect();
    let mut kept: Vec<Step> = Vec::new();
    for step in steps.into_iter().rev() {
        if step.outputs().iter().any(|output| needed.contains(output)) {
            needed.extend(step.inputs());
            kept.push(step);
        }
    }
    kept.reverse();
    kept
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use mabert_graph::{Boundary, ElementType};
    use mabert_passes::lower::ApproximatorOptions;
    use mabert_passes::pipeline::{Keep, Order, PassOptions, Rewriting, Student};
    use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

    use super::*;
    use crate::gradient::{Buffers, to_candle};
    use crate::part::Part;

    fn student(folder: &Path, keep: Keep) -> Student {
        let approximator = ApproximatorOptions::network(16, 5);
        let options = PassOptions { order: Order::Linear, keep, ..PassOptions::new(approximator) };
        let model = Model::load(folder.join("model.onnx")).unwrap();
        Rewriting::new(model, options).unwrap().approximate().unwrap()
    }

    fn exports() -> Vec<PathBuf> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/exports");
        let entries = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
        entries.filter(|p| p.join("model.onnx").exists()).collect()
    }

    /// The stream after the embeddings' sum, and the mask, of three sentences.
    fn inputs(student: &Student) -> [Tensor; 2] {
        let mut rng = StdRng::seed_from_u64(3);
        let channels = student.encoder.channels;
        let stream = (0..3 * 7 * channels).map(|_| rng.random_range(-1f32..1.0)).collect();
        let mask = [7, 4, 1].iter().flat_map(|&len| (0..7).map(move |at| if at < len { 1f32 } else { 0.0 })).collect();
        [Tensor::new(&[3, 7, channels], stream), Tensor::new(&[3, 7], mask)]
    }

    fn difference(a: &Tensor, b: &Tensor) -> f32 {
        a.largest_difference(b) / b.to_f32().iter().fold(1f32, |m, v| m.max(v.abs()))
    }

    /// From the embeddings to the outputs, student and teacher: what candle computes is what tract computes.
    #[test]
    fn every_export_gives_what_tract_gives() {
        let all = Keep { softmax: true, activation: true, norm: true };
        let found = exports();
        assert!(found.len() >= 15);
        for folder in found {
            for keep in [Keep::default(), all] {
                let student = student(&folder, keep);
                let input = student.encoder.embedding_norm.input.as_str();
                let channels = student.encoder.embedding_norm.gamma.len();
                let outputs = student.model.outputs();
                let outputs: Vec<&str> = outputs.iter().map(|o| o.name.as_str()).collect();
                let part = Part::new(&student.model, &[(input, Some(channels)), (MASK, None)], &outputs).unwrap();
                let given = inputs(&student);
                let expected = part.run(&[&given[0], &given[1]]).unwrap();
                let boundary = |name: &str, dims: &[&str]| Boundary::symbolic(name, ElementType::F32, dims);
                let boundaries = [boundary(input, &["b", "n", &channels.to_string()]), boundary(MASK, &["b", "n"])];
                let cut = student.model.extract(&boundaries, &outputs).unwrap();
                let graph = Graph::new(&cut, &[input, MASK], &outputs, &[], &[]).unwrap();
                let values = given.each_ref().map(|t| Value::Real(to_candle(t).unwrap()));
                for (x, y) in graph.run(&values, None).unwrap().iter().zip(&expected) {
                    let far = difference(&crate::gradient::from_candle(x).unwrap(), y);
                    assert!(far < 1e-4, "{}, {keep:?}: {far}", folder.display());
                }
            }
        }
    }

    /// Gradients against differences of the loss, for one element of every trained initializer of a layer.
    #[test]
    fn gradients_are_those_of_small_changes() {
        let folder = exports().into_iter().find(|f| f.ends_with("bert-sdpa-torchscript-17")).unwrap();
        let student = student(&folder, Keep::default());
        let layer = &student.encoder.layers[0];
        let input = layer.input.as_str();
        let channels = layer.query.inputs.to_string();
        let boundary = |name: &str, dims: &[&str]| Boundary::symbolic(name, ElementType::F32, dims);
        let boundaries = [boundary(input, &["b", "n", &channels]), boundary(MASK, &["b", "n"])];
        let output = layer.output_norm.output.as_str();
        let cut = student.model.extract(&boundaries, &[output]).unwrap();
        let of = &student.approximators[0];
        let mut trained: Vec<String> = of.parameters().into_iter().cloned().collect();
        for linear in [&layer.query, &layer.key, &layer.value, &layer.attention_output, &layer.output] {
            trained.extend([Some(linear.weight.clone()), linear.bias_name.clone()].into_iter().flatten());
        }
        let graph = Graph::new(&cut, &[input, MASK], &[output], &trained, &[]).unwrap();
        let given = inputs(&student).map(|t| Value::Real(to_candle(&t).unwrap()));
        let loss = |gradient: Option<&Arc<Gradient>>| {
            graph.run(&given, gradient).unwrap().remove(0).sqr().unwrap().mean_all().unwrap()
        };
        // Of the same piece twice: sums over pieces are what a step takes.
        let found = Buffers::default().gradients(&graph, &[0.5, 0.5], |w, g| Ok((loss(Some(g)) * *w)?)).unwrap();
        assert_eq!(graph.variables().count(), trained.len());
        for ((name, variable), gradient) in graph.variables().zip(found) {
            let at = (0..gradient.len()).max_by(|a, b| gradient[*a].abs().total_cmp(&gradient[*b].abs())).unwrap();
            let value = variable.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let moved = |by: f32| {
                let mut value = value.clone();
                value[at] += by;
                variable.set(&Real::from_vec(value, variable.dims(), variable.device()).unwrap()).unwrap();
                f64::from(loss(None).to_scalar::<f32>().unwrap())
            };
            let step = 4e-3;
            let slope = (moved(step) - moved(-step)) / (2.0 * f64::from(step));
            moved(0.0);
            let expected = f64::from(gradient[at]);
            let far = (slope - expected).abs() / expected.abs().max(1e-2);
            assert!(far < 0.05, "{name}: {slope} against {expected}");
        }
    }
}

//! Operators, and uses of them, that tract computes wrongly or not at all, spelled with others.

use mabert_graph::proto::NodeProto;
use mabert_graph::{Dependence, ElementType, Index, Model as Graph, NodeExt as _, Tensor, attribute, cast_node};

use super::Names;
use crate::Result;

/// Spells them.
///
/// # Errors
/// The graph is not valid.
pub(super) fn spell(graph: &mut Graph) -> Result<()> {
    let spellings: Vec<Option<Spelling>> = {
        let (version, index) = (graph.opset(), Index::new(graph)?);
        graph.graph().node.iter().map(|node| Spelling::of(node, &index, version)).collect()
    };
    let mut speller = Speller { names: Names::taken(graph), graph };
    let nodes = std::mem::take(&mut speller.graph.graph_mut().node);
    for (node, spelling) in nodes.into_iter().zip(spellings) {
        match spelling {
            None => speller.push(node),
            Some(Spelling::Backwards) => speller.read_backwards(node),
            Some(Spelling::Zeros) => speller.fill_with_zeros(node),
            Some(Spelling::Celu) => speller.celu(&node),
            Some(Spelling::Swish) => speller.swish(&node),
            Some(Spelling::OldDropout) => speller.drop_nothing(node),
            Some(Spelling::Numbers(operands)) => speller.count(node, &operands),
            Some(Spelling::Integers(element)) => speller.multiply_integers(node, element),
        }
    }
    forget_zeros(graph)
}

/// How a node is spelled.
enum Spelling {
    Backwards,
    Zeros,
    Celu,
    Swish,
    OldDropout,
    /// These operands are sizes, which must be numbers when the node is run.
    Numbers(Vec<usize>),
    /// A product of integers.
    Integers(ElementType),
}

impl Spelling {
    /// How `node` is spelled; `None` for nodes that stay as they are.
    fn of(node: &NodeProto, index: &Index<'_>, version: i64) -> Option<Self> {
        if !node.is(&node.op_type) {
            return None;
        }
        let element = || node.input.first().and_then(|input| index.element_type(input));
        let size = |at: usize| node.input.get(at).is_some_and(|input| index.dependence(input) == Dependence::Shape);
        Some(match node.op_type.as_str() {
            "LSTM" | "GRU" | "RNN" if node.text("direction").is_some_and(|way| way == "reverse") => Self::Backwards,
            "ConstantOfShape" if node.attribute("value").is_none() => Self::Zeros,
            "Celu" => Self::Celu,
            "Swish" if node.float("alpha", 1.0) != 1.0 => Self::Swish,
            "Dropout" if (10..12).contains(&version) && node.output.len() > 1 => Self::OldDropout,
            "TopK" | "GatherND" if size(1) => Self::Numbers(vec![1]),
            "MatMul" => Self::Integers(element().filter(|e| matches!(e, ElementType::I32 | ElementType::I64))?),
            _ => return None,
        })
    }
}

/// Leaves out first states that are zeros, which they are where none are named: two that are equal confuse tract.
fn forget_zeros(graph: &mut Graph) -> Result<()> {
    let index = Index::new(graph)?;
    let is_zero = |name: &String| {
        let (operand, node) = (index.behind_casts(name), index.producer(index.behind_casts(name)));
        let filled = node.is_some_and(|n| n.is("ConstantOfShape"));
        let value = match node {
            Some(node) if filled => node.attribute("value").and_then(|a| Tensor::from_proto(a.t.as_ref()?).ok()),
            Some(node) if node.is("Expand") => constant(&node.input[0], &index),
            _ => constant(operand, &index),
        };
        value.is_some_and(|value| value.to_f32().iter().all(|v| *v == 0.0))
    };
    let zeros: Vec<Vec<usize>> = graph
        .graph()
        .node
        .iter()
        .map(|node| {
            let recurrent = ["LSTM", "GRU", "RNN"].iter().any(|op| node.is(op));
            [5, 6].into_iter().filter(|&at| recurrent && node.input.get(at).is_some_and(is_zero)).collect()
        })
        .collect();
    for (node, zeros) in graph.graph_mut().node.iter_mut().zip(zeros) {
        zeros.into_iter().for_each(|at| node.input[at].clear());
    }
    Ok(())
}

/// The value of a constant, an initializer's or a node's.
fn constant(name: &str, index: &Index<'_>) -> Option<Tensor> {
    match index.producer(name) {
        Some(node) if node.is("Constant") => attribute::constant(node).ok().flatten(),
        Some(_) => None,
        None => index.graph().initializer.iter().find(|t| t.name == name).and_then(|t| Tensor::from_proto(t).ok()),
    }
}

struct Speller<'g> {
    names: Names,
    graph: &'g mut Graph,
}

impl Speller<'_> {
    fn push(&mut self, node: NodeProto) {
        self.graph.graph_mut().node.push(node);
    }

    /// Adds a node of one output.
    fn add(&mut self, operator: &str, inputs: &[&str], output: &str) {
        self.push(NodeProto {
            op_type: operator.to_owned(),
            name: output.to_owned(),
            input: inputs.iter().map(|&name| name.to_owned()).collect(),
            output: vec![output.to_owned()],
            ..NodeProto::default()
        });
    }

    fn constant(&mut self, beside: &str, part: &str, value: &Tensor) -> String {
        let name = self.names.fresh(beside, part);
        self.graph.set_constant(&name, value);
        name
    }

    /// Adds `to`, which is `from` with the order of an axis turned round.
    fn turn_round(&mut self, from: &str, to: &str, axis: i64) {
        let [first, end, step] = [("first", -1), ("end", i64::MIN), ("step", -1)]
            .map(|(part, value)| self.constant(to, part, &Tensor::ints(&[value])));
        let axis = self.constant(to, "axis", &Tensor::ints(&[axis]));
        self.add("Slice", &[from, &first, &end, &axis, &step], to);
    }

    /// tract reads a sequence backwards only together with forwards.
    fn read_backwards(&mut self, mut node: NodeProto) {
        let axis = node.int("layout", 0);
        let (Some(input), Some(output)) = (node.input.first().cloned(), node.output.first().cloned()) else {
            return self.push(node);
        };
        let turned = self.names.fresh(&input, "backwards");
        self.turn_round(&input, &turned, axis);
        node.input[0] = turned;
        node.attribute.retain(|a| a.name != "direction");
        if output.is_empty() {
            return self.push(node);
        }
        let backwards = self.names.fresh(&output, "backwards");
        node.output[0].clone_from(&backwards);
        self.push(node);
        self.turn_round(&backwards, &output, axis);
    }

    /// Zeros of single precision, where nothing is said; tract's are of double.
    fn fill_with_zeros(&mut self, mut node: NodeProto) {
        node.attribute.push(attribute::tensor("value", &Tensor::new(&[1], vec![0f32])));
        self.push(node);
    }

    /// `alpha * elu(x / alpha)`.
    fn celu(&mut self, node: &NodeProto) {
        let output = &node.output[0];
        let alpha = self.constant(output, "alpha", &Tensor::scalar(node.float("alpha", 1.0)));
        let [divided, curved] = ["divided", "curved"].map(|part| self.names.fresh(output, part));
        self.add("Div", &[&node.input[0], &alpha], &divided);
        self.add("Elu", &[&divided], &curved);
        self.add("Mul", &[&curved, &alpha], output);
    }

    /// `x * sigmoid(alpha * x)`.
    fn swish(&mut self, node: &NodeProto) {
        let (input, output) = (&node.input[0], &node.output[0]);
        let alpha = self.constant(output, "alpha", &Tensor::scalar(node.float("alpha", 1.0)));
        let [scaled, gate] = ["scaled", "gate"].map(|part| self.names.fresh(output, part));
        self.add("Mul", &[input, &alpha], &scaled);
        self.add("Sigmoid", &[&scaled], &gate);
        self.add("Mul", &[input, &gate], output);
    }

    /// Its mask says what was dropped; newer versions say what was kept.
    fn drop_nothing(&mut self, mut node: NodeProto) {
        let mask = node.output.remove(1);
        let input = node.input[0].clone();
        self.push(node);
        if !mask.is_empty() {
            self.add("Less", &[&input, &input], &mask);
        }
    }

    /// Sizes become numbers by way of 32 bits: of 64 they are symbols.
    fn count(&mut self, mut node: NodeProto, operands: &[usize]) {
        for &at in operands {
            let number = self.names.fresh(&node.output[0], "number");
            self.push(cast_node(&node.input[at], &number, ElementType::I32));
            node.input[at] = number;
        }
        self.push(node);
    }

    /// Products of integers, as those of floats of 53 bits.
    fn multiply_integers(&mut self, mut node: NodeProto, element: ElementType) {
        let output = node.output[0].clone();
        for input in &mut node.input {
            let wide = self.names.fresh(&output, "operand_f64");
            self.push(cast_node(input, &wide, ElementType::F64));
            *input = wide;
        }
        let product = self.names.fresh(&output, "f64");
        node.output[0].clone_from(&product);
        self.push(node);
        self.push(cast_node(&product, &output, element));
    }
}

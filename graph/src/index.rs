//! Who produces and who consumes each value of a graph, and what a value depends on.

use std::collections::{HashMap, HashSet};

use onnx_protobuf::{GraphProto, NodeProto, type_proto};

use crate::schema::fewest_inputs;
use crate::{ElementType, Error, Model, NodeExt, Result, attribute};

/// What a value depends on, from least to most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Dependence {
    /// On nothing: an initializer, or computed from constants alone.
    Constant,
    /// On the shapes of the inputs only.
    Shape,
    /// On the inputs' elements.
    Data,
}

/// An index over one graph, valid while the graph is not changed.
#[derive(Debug)]
pub struct Index<'g> {
    graph: &'g GraphProto,
    producer: HashMap<&'g str, usize>,
    consumers: HashMap<&'g str, Vec<usize>>,
    initializers: HashMap<&'g str, usize>,
    outputs: HashSet<&'g str>,
    inputs: HashSet<&'g str>,
    dependence: HashMap<&'g str, Dependence>,
    /// The nodes whose results reach an output of the graph by their elements, not by their shapes alone.
    used: HashSet<usize>,
}

impl<'g> Index<'g> {
    /// Indexes the main graph of `model`.
    ///
    /// # Errors
    /// A value is produced twice or never, or a node is used before it is defined.
    pub fn new(model: &'g Model) -> Result<Self> {
        Self::of_graph(model.graph()).map_err(|e| e.in_model(model.origin()))
    }

    fn of_graph(graph: &'g GraphProto) -> Result<Self> {
        let mut index = Self {
            graph,
            producer: HashMap::new(),
            consumers: HashMap::new(),
            initializers: graph.initializer.iter().enumerate().map(|(i, t)| (t.name.as_str(), i)).collect(),
            outputs: graph.output.iter().map(|o| o.name.as_str()).collect(),
            inputs: HashSet::new(),
            dependence: HashMap::new(),
            used: HashSet::new(),
        };
        for tensor in &graph.initializer {
            index.dependence.insert(&tensor.name, Dependence::Constant);
        }
        for input in &graph.input {
            if !index.initializers.contains_key(input.name.as_str()) {
                index.inputs.insert(&input.name);
                index.dependence.insert(&input.name, Dependence::Data);
            }
        }
        for (i, node) in graph.node.iter().enumerate() {
            index.add(i, node)?;
        }
        if let Some(output) = graph.output.iter().find(|o| !index.dependence.contains_key(o.name.as_str())) {
            return Err(Error::Graph(format!("output `{}` is never computed", output.name)));
        }
        for (at, node) in graph.node.iter().enumerate().rev() {
            if node.output.iter().any(|o| index.is_output(o) || index.readers_at(o).next().is_some()) {
                index.used.insert(at);
            }
        }
        Ok(index)
    }

    fn add(&mut self, at: usize, node: &'g NodeProto) -> Result<()> {
        let (inputs, fewest) = (node.input.len(), fewest_inputs(node));
        if inputs < fewest || node.output.is_empty() {
            let (label, op, outputs) = (node.label(), &node.op_type, node.output.len());
            let reason = format!(
                "node `{label}` ({op}) has {inputs} inputs and {outputs} outputs; {fewest} and 1 are the least"
            );
            return Err(Error::Graph(reason));
        }
        let mut dependence = Dependence::Constant;
        for name in used_values(node) {
            let Some(&input_dependence) = self.dependence.get(name) else {
                let label = node.label();
                return Err(Error::Graph(format!("node `{label}` uses `{name}`, which nothing before it computes")));
            };
            let most = if reads_elements(node, name) { Dependence::Data } else { Dependence::Shape };
            dependence = dependence.max(input_dependence.min(most));
            let consumers = self.consumers.entry(name).or_default();
            if consumers.last() != Some(&at) {
                consumers.push(at);
            }
        }
        if node.op_type.starts_with("Random") || node.is("Multinomial") || node.is("Bernoulli") {
            dependence = Dependence::Data;
        }
        for name in node.output.iter().filter(|o| !o.is_empty()) {
            self.dependence.insert(name, dependence);
            if self.producer.insert(name, at).is_some() {
                return Err(Error::Graph(format!("value `{name}` is computed twice")));
            }
        }
        Ok(())
    }

    /// The graph that is indexed.
    pub fn graph(&self) -> &'g GraphProto {
        self.graph
    }

    /// The position of the node that computes `value`; `None` for inputs and initializers.
    pub fn producer_at(&self, value: &str) -> Option<usize> {
        self.producer.get(value).copied()
    }

    /// The value behind casts and identities.
    pub fn behind_casts<'v>(&self, mut value: &'v str) -> &'v str
    where
        'g: 'v,
    {
        while let Some(node) = self.producer(value) {
            if !(node.is("Cast") || node.is("Identity")) {
                break;
            }
            value = &node.input[0];
        }
        value
    }

    /// The node that computes `value`.
    pub fn producer(&self, value: &str) -> Option<&'g NodeProto> {
        self.producer_at(value).map(|i| &self.graph.node[i])
    }

    /// The positions of the nodes that use `value`, in graph order, each once.
    pub fn consumers_at(&self, value: &str) -> &[usize] {
        self.consumers.get(value).map_or(&[], Vec::as_slice)
    }

    /// The nodes that use `value`.
    pub fn consumers(&self, value: &str) -> impl Iterator<Item = &'g NodeProto> + '_ {
        self.consumers_at(value).iter().map(|&i| &self.graph.node[i])
    }

    /// The positions of the nodes that use the elements of `value`. Those that ask for its shape are none, nor is anything
    /// that leads to nothing but such: what only feeds shapes is no path of data.
    pub fn readers_at<'s>(&'s self, value: &'s str) -> impl Iterator<Item = usize> + 's {
        let reads = move |at: &usize| self.used.contains(at) && reads_elements(&self.graph.node[*at], value);
        self.consumers_at(value).iter().copied().filter(reads)
    }

    /// Whether elements of what the node at `at` computes reach an output of the graph, not its shapes alone.
    pub fn is_used(&self, at: usize) -> bool {
        self.used.contains(&at)
    }

    /// Whether `value` is an output of the graph.
    pub fn is_output(&self, value: &str) -> bool {
        self.outputs.contains(value)
    }

    /// Whether `value` is an input of the graph that the caller gives.
    pub fn is_input(&self, value: &str) -> bool {
        self.inputs.contains(value)
    }

    /// Whether `value` is an initializer.
    pub fn is_initializer(&self, value: &str) -> bool {
        self.initializers.contains_key(value)
    }

    /// What `value` depends on; names that the graph does not know count as data.
    pub fn dependence(&self, value: &str) -> Dependence {
        self.dependence.get(value).copied().unwrap_or(Dependence::Data)
    }

    /// The element type of `value`, as far as constants, inputs and operators tell it: most give what their first operand
    /// holds.
    pub fn element_type(&self, value: &str) -> Option<ElementType> {
        const BOOLEAN: [&str; 11] =
            ["And", "Or", "Not", "Xor", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsNaN", "IsInf"];
        let mut value = value;
        // Each step goes to an earlier node.
        loop {
            if let Some(&at) = self.initializers.get(value) {
                return ElementType::from_onnx(self.graph.initializer[at].data_type);
            }
            let Some(node) = self.producer(value) else {
                let input = self.graph.input.iter().find(|i| i.name == value)?;
                let Some(type_proto::Value::TensorType(tensor)) = input.type_.as_ref()?.value.as_ref() else {
                    return None;
                };
                return ElementType::from_onnx(tensor.elem_type);
            };
            let operand = match node.op_type.as_str() {
                "Cast" => return ElementType::from_onnx(i32::try_from(node.int("to", 1)).ok()?),
                "Shape" | "Size" | "NonZero" | "ArgMax" | "ArgMin" => return Some(ElementType::I64),
                "Constant" | "ConstantOfShape" => return attribute::constant_element(node),
                op if BOOLEAN.contains(&op) => return Some(ElementType::Bool),
                "Where" | "CastLike" => 1,
                _ => 0,
            };
            value = node.input.get(operand)?;
        }
    }

    /// The inputs of `node` whose elements it reads and which depend on data, in order, each once.
    pub fn data_inputs(&self, node: &'g NodeProto) -> Vec<&'g str> {
        let mut names = Vec::new();
        for name in used_values(node) {
            let data = self.dependence(name) == Dependence::Data && reads_elements(node, name);
            if data && !names.contains(&name) {
                names.push(name);
            }
        }
        names
    }
}

/// Whether a node reads the elements of `value`, one of its operands: some ask for its shape or its type alone.
fn reads_elements(node: &NodeProto, value: &str) -> bool {
    match node.op_type.as_str() {
        "Shape" | "Size" | "EyeLike" if node.is(&node.op_type) => false,
        "CastLike" if node.is("CastLike") => node.input[0] == value,
        _ => true,
    }
}

/// The values that `node` reads, those that its subgraphs take from outside included.
pub(crate) fn used_values(node: &NodeProto) -> Vec<&str> {
    let mut used: Vec<&str> = node.input.iter().map(String::as_str).filter(|i| !i.is_empty()).collect();
    for graph in node.subgraphs() {
        let mut local: HashSet<&str> = graph.input.iter().map(|i| i.name.as_str()).collect();
        local.extend(graph.initializer.iter().map(|t| t.name.as_str()));
        for inner in &graph.node {
            used.extend(used_values(inner).into_iter().filter(|v| !local.contains(v)));
            local.extend(inner.output.iter().map(String::as_str));
        }
        let outputs = graph.output.iter().map(|o| o.name.as_str());
        used.extend(outputs.filter(|v| !local.contains(v)));
    }
    used
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Builder, ElementType, Tensor};

    #[test]
    fn dependence_tells_constants_shapes_and_data_apart() {
        let b = Builder::new(17, "test");
        let x = b.input("x", ElementType::F32, &["B", "4"]);
        let w = b.constant("w", &Tensor::new(&[4], vec![1f32; 4]));
        let doubled = (w * 2.0).named("doubled");
        let shape = x.shape().named("shape");
        let y = (x.relu() + doubled.reshape_to(shape)).named("y");
        let model = b.model(&[y]);
        let index = Index::new(&model).unwrap();
        assert_eq!(index.dependence("doubled"), Dependence::Constant);
        assert_eq!(index.dependence("shape"), Dependence::Shape);
        assert_eq!(index.dependence("y"), Dependence::Data);
        assert_eq!(index.consumers("x").map(|n| n.op_type.as_str()).collect::<Vec<_>>(), ["Shape", "Relu"]);
    }

    #[test]
    fn a_missing_value_is_named() {
        let b = Builder::new(17, "test");
        let x = b.input("x", ElementType::F32, &["4"]);
        let y = (x + b.value("ghost")).named("y");
        let message = Index::new(&b.model(&[y])).unwrap_err().to_string();
        assert!(message.contains("`ghost`"), "{message}");
    }
}

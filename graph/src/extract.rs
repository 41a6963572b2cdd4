//! A part of a model as a model of its own.

use std::collections::{HashMap, HashSet};

use onnx_protobuf::{GraphProto, ModelProto, ValueInfoProto};

use crate::index::used_values;
use crate::tensor_type::value_info;
use crate::{Dim, ElementType, Error, Model, Result};

/// A value that becomes an input of an extracted model.
#[derive(Clone, Debug)]
pub struct Boundary {
    /// The value's name.
    pub name: String,
    /// Its element type.
    pub element: ElementType,
    /// Its dimensions: numbers, symbols, or `?`.
    pub dims: Vec<String>,
}

impl Boundary {
    /// A boundary of known sizes.
    pub fn fixed(name: &str, element: ElementType, shape: &[usize]) -> Self {
        Self { name: name.to_owned(), element, dims: shape.iter().map(usize::to_string).collect() }
    }

    /// A boundary whose dimensions are numbers or symbols.
    pub fn symbolic(name: &str, element: ElementType, dims: &[&str]) -> Self {
        Self { name: name.to_owned(), element, dims: dims.iter().map(|d| (*d).to_owned()).collect() }
    }

    /// The boundary as a graph declares its inputs.
    pub fn declared(&self) -> ValueInfoProto {
        value_info(&self.name, self.element, &self.dims.iter().map(String::as_str).collect::<Vec<_>>())
    }
}

impl Model {
    /// The nodes between `inputs` and `outputs`, with the constants they use, as a model.
    ///
    /// # Errors
    /// An output depends on a graph input that is not among `inputs`, or does not exist.
    pub fn extract(&self, inputs: &[Boundary], outputs: &[&str]) -> Result<Self> {
        let graph = self.graph();
        let boundaries: HashSet<&str> = inputs.iter().map(|b| b.name.as_str()).collect();
        let initializers: HashMap<&str, usize> =
            graph.initializer.iter().enumerate().map(|(i, t)| (t.name.as_str(), i)).collect();
        let mut needed: HashSet<&str> = outputs.iter().copied().filter(|o| !boundaries.contains(o)).collect();
        let mut nodes = Vec::new();
        for node in graph.node.iter().rev() {
            if node.output.iter().any(|o| needed.contains(o.as_str())) {
                node.output.iter().for_each(|o| _ = needed.remove(o.as_str()));
                needed.extend(used_values(node).into_iter().filter(|v| !boundaries.contains(v)));
                nodes.push(node.clone());
            }
        }
        nodes.reverse();
        if let Some(missing) = needed.iter().find(|n| !initializers.contains_key(*n)) {
            let reason = format!("the part that ends in {outputs:?} also needs `{missing}`");
            return Err(Error::Graph(reason).in_model(self.origin()));
        }
        let mut constants: Vec<usize> = needed.iter().map(|n| initializers[n]).collect();
        constants.sort_unstable();
        let graph = GraphProto {
            name: format!("{} (part)", graph.name),
            node: nodes,
            initializer: constants.into_iter().map(|i| graph.initializer[i].clone()).collect(),
            input: inputs.iter().map(Boundary::declared).collect(),
            output: outputs.iter().map(|o| ValueInfoProto { name: (*o).to_owned(), ..Default::default() }).collect(),
            ..GraphProto::default()
        };
        let whole = self.proto();
        Model::from_proto(ModelProto {
            ir_version: whole.ir_version,
            opset_import: whole.opset_import.clone(),
            functions: whole.functions.clone(),
            graph: Some(graph).into(),
            ..ModelProto::default()
        })
    }

    /// What computes `outputs` from the model's own inputs and from the values of `cuts`; inputs that they do not need
    /// are left out.
    ///
    /// # Errors
    /// An output does not exist, or depends on an input of an element type that is not handled.
    pub fn extract_from_inputs(&self, cuts: &[Boundary], outputs: &[&str]) -> Result<Self> {
        let inputs = self.inputs().into_iter().filter_map(|input| {
            let dims = input.dims.unwrap_or_default().iter().map(Dim::to_string).collect();
            Some(Boundary { name: input.name, element: input.element?, dims })
        });
        let mut part = self.extract(&inputs.chain(cuts.iter().cloned()).collect::<Vec<_>>(), outputs)?;
        let graph = part.graph_mut();
        let used: HashSet<String> = graph.node.iter().flat_map(used_values).map(str::to_owned).collect();
        graph.input.retain(|i| used.contains(&i.name));
        // Some declare no rank.
        for input in &mut graph.input {
            if let Some(declared) = self.graph().input.iter().find(|i| i.name == input.name) {
                input.clone_from(declared);
            }
        }
        Ok(part)
    }
}

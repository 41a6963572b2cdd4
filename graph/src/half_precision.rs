//! Models that compute in half precision, brought to single precision and back; those of bfloat16 only brought to it.
//!
//! Work on a model (probing, calibrating, running where the CPU has no half-precision arithmetic) is done in `f32`; what
//! the model takes and gives keeps its type, unless that is bfloat16, which hardly any engine takes on a CPU.

use onnx_protobuf::tensor_proto::DataType;
use onnx_protobuf::{AttributeProto, GraphProto, NodeProto, TensorProto, ValueInfoProto, type_proto};

use crate::stored::to_single;
use crate::{ElementType, Error, Model, NodeExt as _, Result, Tensor, TensorType, attribute, cast_node};

/// The largest finite `f16`.
const LARGEST: f32 = 65_504.0;

/// Whether inner values of the model are of half precision: it holds constants of it, computes with inputs of it, or casts to it
/// what is no output.
pub fn is_half(model: &Model) -> bool {
    fn graph_is(graph: &GraphProto) -> bool {
        let half = ElementType::F16.onnx();
        let is_output = |node: &NodeProto| graph.output.iter().any(|o| node.output.contains(&o.name));
        let casts = |n: &NodeProto| n.is("Cast") && n.int("to", 0) == i64::from(half) && !is_output(n);
        let computed_with = |name: &str| graph.node.iter().any(|n| !n.is("Cast") && n.input.iter().any(|i| i == name));
        graph.initializer.iter().any(|t| t.data_type == half)
            || graph
                .input
                .iter()
                .any(|i| TensorType::declared(i).element == Some(ElementType::F16) && computed_with(&i.name))
            || graph.node.iter().any(|n| casts(n) || n.subgraphs().into_iter().any(graph_is))
    }
    graph_is(model.graph())
}

/// Makes every inner value of half precision one of single precision; returns whether there were any. Inputs and outputs of
/// the graph keep their types. Values of bfloat16 become single precision too, and so do inputs and outputs of it.
///
/// # Errors
/// A constant cannot be read.
pub fn widen_half(model: &mut Model) -> Result<bool> {
    let origin = model.origin().to_owned();
    widen_bfloat(model.graph_mut()).map_err(|e| e.in_model(&origin))?;
    if !is_half(model) {
        return Ok(false);
    }
    let any = |tensor, _: &str| Ok(tensor);
    Conversion { from: ElementType::F16.onnx(), to: ElementType::F32, check: &any }.model(model)?;
    Ok(true)
}

fn widen_bfloat(graph: &mut GraphProto) -> Result<()> {
    let any = |tensor, _: &str| Ok(tensor);
    let conversion = Conversion { from: DataType::BFLOAT16 as i32, to: ElementType::F32, check: &any };
    conversion.graph(graph)?;
    conversion.declarations(graph);
    Ok(())
}

/// Makes every inner value of single precision one of half precision. Inputs and outputs of the graph keep their types.
/// Single numbers beyond the range of `f16`, as masks add them to scores, become the largest it has.
///
/// # Errors
/// A constant cannot be read, or has an element beyond the range of `f16`.
pub fn narrow_to_half(model: &mut Model) -> Result<()> {
    let in_range = |tensor: Tensor, name: &str| {
        let values = tensor.to_f32();
        match values.iter().position(|v| v.abs() > LARGEST) {
            None => Ok(tensor),
            Some(_) if values.len() == 1 => Ok(values.mapv(|v| v.clamp(-LARGEST, LARGEST)).into()),
            Some(at) => {
                let value = values.iter().nth(at).copied().unwrap_or_default();
                Err(Error::tensor(name, format!("{value} at element {at} is beyond half precision's {LARGEST}")))
            }
        }
    };
    Conversion { from: ElementType::F32.onnx(), to: ElementType::F16, check: &in_range }.model(model)
}

type Check<'c> = dyn Fn(Tensor, &str) -> Result<Tensor> + 'c;

/// From one element type to another; each constant is checked before.
struct Conversion<'c> {
    /// ONNX's number of the type.
    from: i32,
    to: ElementType,
    check: &'c Check<'c>,
}

impl Conversion<'_> {
    fn model(&self, model: &mut Model) -> Result<()> {
        let origin = model.origin().to_owned();
        self.main_graph(model.graph_mut()).map_err(|e| e.in_model(&origin))
    }

    fn main_graph(&self, graph: &mut GraphProto) -> Result<()> {
        // Outputs that are cast already on their way out stay as they are.
        let mut outputs: Vec<String> =
            graph.output.iter().filter(|o| self.applies_to(o)).map(|o| o.name.clone()).collect();
        let cast_out = |node: &NodeProto| node.is("Cast") && node.output.first().is_some_and(|o| outputs.contains(o));
        let (leaving, staying): (Vec<NodeProto>, _) = std::mem::take(&mut graph.node).into_iter().partition(cast_out);
        graph.node = staying;
        outputs.retain(|name| leaving.iter().all(|node| !node.output.contains(name)));
        self.graph(graph)?;
        graph.value_info.clear();
        self.cast_inputs(graph);
        for output in outputs {
            let inner = format!("{output}/{}", self.to);
            for node in &mut graph.node {
                rename_uses(node, &output, &inner);
                node.output.iter_mut().filter(|o| **o == output).for_each(|o| o.clone_from(&inner));
            }
            let mut cast = cast_node(&inner, &output, self.to);
            cast.attribute = vec![attribute::int("to", i64::from(self.from))];
            graph.node.push(cast);
        }
        graph.node.extend(leaving);
        Ok(())
    }

    /// Whether a value is declared to be of the type that is converted.
    fn applies_to(&self, info: &ValueInfoProto) -> bool {
        match info.type_.as_ref().and_then(|t| t.value.as_ref()) {
            Some(type_proto::Value::TensorType(tensor)) => tensor.elem_type == self.from,
            _ => false,
        }
    }

    /// Casts what callers give on its way in. An input that is also an initializer has the constant's type.
    fn cast_inputs(&self, graph: &mut GraphProto) {
        let initialised: Vec<&String> = graph.initializer.iter().map(|t| &t.name).collect();
        let mut inputs = Vec::new();
        for input in &mut graph.input {
            if !self.applies_to(input) {
                continue;
            }
            if !initialised.contains(&&input.name) {
                inputs.push(input.name.clone());
            } else if let Some(type_proto::Value::TensorType(tensor)) =
                input.type_.as_mut().and_then(|t| t.value.as_mut())
            {
                tensor.elem_type = self.to.onnx();
            }
        }
        for input in inputs {
            let inner = format!("{input}/{}", self.to);
            graph.node.iter_mut().for_each(|n| rename_uses(n, &input, &inner));
            graph.node.insert(0, cast_node(&input, &inner, self.to));
        }
    }

    /// What graphs declare of their values.
    fn declarations(&self, graph: &mut GraphProto) {
        for info in graph.input.iter_mut().chain(&mut graph.output).chain(&mut graph.value_info) {
            if let Some(type_proto::Value::TensorType(tensor)) = info.type_.as_mut().and_then(|t| t.value.as_mut())
                && tensor.elem_type == self.from
            {
                tensor.elem_type = self.to.onnx();
            }
        }
        let attributes = graph.node.iter_mut().flat_map(|node| &mut node.attribute);
        attributes.flat_map(|a| a.g.as_mut().into_iter().chain(&mut a.graphs)).for_each(|g| self.declarations(g));
    }

    fn graph(&self, graph: &mut GraphProto) -> Result<()> {
        graph.initializer.iter_mut().try_for_each(|tensor| self.tensor(tensor))?;
        for node in &mut graph.node {
            let is_cast = node.is("Cast");
            for attribute in &mut node.attribute {
                if is_cast && attribute.name == "to" && attribute.i == i64::from(self.from) {
                    attribute.i = i64::from(self.to.onnx());
                }
                self.attribute(attribute)?;
            }
        }
        Ok(())
    }

    fn attribute(&self, attribute: &mut AttributeProto) -> Result<()> {
        let tensors = attribute.t.as_mut().into_iter().chain(&mut attribute.tensors);
        tensors.into_iter().try_for_each(|tensor| self.tensor(tensor))?;
        let mut graphs = attribute.g.as_mut().into_iter().chain(&mut attribute.graphs);
        graphs.try_for_each(|graph| self.graph(graph))
    }

    fn tensor(&self, tensor: &mut TensorProto) -> Result<()> {
        if tensor.data_type == self.from {
            let value = (self.check)(to_single(tensor)?.into(), &tensor.name)?;
            let value = match self.to {
                ElementType::F16 => value.to_f32().mapv(half::f16::from_f32).into(),
                _ => Tensor::F32(value.to_f32()),
            };
            *tensor = value.to_proto(&tensor.name);
        }
        Ok(())
    }
}

fn rename_uses(node: &mut NodeProto, from: &str, to: &str) {
    fn in_graph(graph: &mut GraphProto, from: &str, to: &str) {
        graph.node.iter_mut().for_each(|n| rename_uses(n, from, to));
        graph.output.iter_mut().filter(|o| o.name == from).for_each(|o| to.clone_into(&mut o.name));
    }
    node.input.iter_mut().filter(|i| *i == from).for_each(|i| to.clone_into(i));
    for attribute in &mut node.attribute {
        attribute.g.as_mut().into_iter().chain(&mut attribute.graphs).for_each(|g| in_graph(g, from, to));
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;
    use crate::Builder;

    fn model() -> Model {
        let b = Builder::new(17, "test");
        let x = b.input("x", ElementType::F16, &["n", "2"]);
        let w = b.constant("w", &Tensor::from(ndarray::arr1(&[1.5, -2.0].map(f16::from_f32)).into_dyn()));
        let y = (x * w).named("y");
        let mut model = b.model(&[y]);
        model.graph_mut().output[0] = crate::tensor_type::value_info("y", ElementType::F16, &["n", "2"]);
        model
    }

    #[test]
    fn inner_values_change_and_the_ends_keep_their_types() {
        let mut wide = model();
        assert!(widen_half(&mut wide).unwrap());
        assert_eq!(wide.constant("w").unwrap(), Tensor::new(&[2], vec![1.5f32, -2.0]));
        let ends = |m: &Model| (m.inputs()[0].element, m.outputs()[0].element);
        assert_eq!(ends(&wide), (Some(ElementType::F16), Some(ElementType::F16)));
        let casts: Vec<i64> = wide.graph().node.iter().filter(|n| n.is("Cast")).map(|n| n.int("to", 0)).collect();
        assert_eq!(casts, [1, 10]);
        let once = wide.proto().clone();
        assert!(!widen_half(&mut wide).unwrap());
        assert!(*wide.proto() == once);
    }

    #[test]
    fn bfloat16_becomes_single_precision_throughout() {
        let mut model = model();
        let bfloat = DataType::BFLOAT16 as i32;
        let graph = model.graph_mut();
        graph.initializer[0].data_type = bfloat;
        graph.initializer[0].raw_data =
            [1.5f32, -2.0].iter().flat_map(|&v| half::bf16::from_f32(v).to_le_bytes()).collect();
        for info in graph.input.iter_mut().chain(&mut graph.output) {
            let Some(type_proto::Value::TensorType(tensor)) = info.type_.as_mut().and_then(|t| t.value.as_mut()) else {
                panic!("a tensor")
            };
            tensor.elem_type = bfloat;
        }
        let mut cast = cast_node("y", "z", ElementType::F32);
        cast.attribute[0].i = i64::from(bfloat);
        graph.node.push(cast);
        assert_eq!(model.inputs()[0].element, None);
        assert!(!widen_half(&mut model).unwrap());
        assert_eq!(model.constant("w").unwrap(), Tensor::new(&[2], vec![1.5f32, -2.0]));
        assert_eq!([model.inputs()[0].element, model.outputs()[0].element], [Some(ElementType::F32); 2]);
        assert_eq!(model.graph().node[1].int("to", 0), 1);
    }

    #[test]
    fn what_half_precision_cannot_hold_is_named() {
        let b = Builder::new(17, "test");
        let x = b.input("x", ElementType::F32, &["n", "2"]);
        let w = b.constant("w", &Tensor::new(&[2], vec![1f32, 7e4]));
        let mut model = b.model(&[((x + -1e9) * w).named("y")]);
        let message = narrow_to_half(&mut model).unwrap_err().to_string();
        assert!(message.contains("`w`: 70000 at element 1"), "{message}");
        model.set_constant("w", &Tensor::new(&[2], vec![1f32, 7.0]));
        narrow_to_half(&mut model).unwrap();
        let scalar = &model.graph().node[1].input[1];
        assert_eq!(model.constant(scalar).unwrap().to_f32().sum(), -65_504.0);
    }
}

//! Small accessors on nodes and attributes.

use onnx_protobuf::attribute_proto::AttributeType;
use onnx_protobuf::{AttributeProto, GraphProto, NodeProto};

use crate::{ElementType, Tensor};

/// What passes ask of a node.
pub trait NodeExt {
    /// Whether this is `op` of the standard domain.
    fn is(&self, op: &str) -> bool;
    /// The attribute called `name`.
    fn attribute(&self, name: &str) -> Option<&AttributeProto>;
    /// An integer attribute, or `default` where it is not given.
    fn int(&self, name: &str, default: i64) -> i64;
    /// A float attribute, or `default` where it is not given.
    fn float(&self, name: &str, default: f32) -> f32;
    /// A list of integers.
    fn ints(&self, name: &str) -> Option<&[i64]>;
    /// A text attribute.
    fn text(&self, name: &str) -> Option<String>;
    /// The graphs that the node carries in its attributes (`If`, `Loop`, `Scan`).
    fn subgraphs(&self) -> Vec<&GraphProto>;
    /// The node's name, or its first output's where the exporter gave none.
    fn label(&self) -> &str;
}

impl NodeExt for NodeProto {
    fn is(&self, op: &str) -> bool {
        self.op_type == op && is_standard(&self.domain)
    }

    fn attribute(&self, name: &str) -> Option<&AttributeProto> {
        self.attribute.iter().find(|a| a.name == name)
    }

    fn int(&self, name: &str, default: i64) -> i64 {
        self.attribute(name).map_or(default, |a| a.i)
    }

    fn float(&self, name: &str, default: f32) -> f32 {
        self.attribute(name).map_or(default, |a| a.f)
    }

    fn ints(&self, name: &str) -> Option<&[i64]> {
        self.attribute(name).map(|a| a.ints.as_slice())
    }

    fn text(&self, name: &str) -> Option<String> {
        self.attribute(name).map(|a| String::from_utf8_lossy(&a.s).into_owned())
    }

    fn subgraphs(&self) -> Vec<&GraphProto> {
        self.attribute.iter().flat_map(|a| a.g.as_ref().into_iter().chain(&a.graphs)).collect()
    }

    fn label(&self) -> &str {
        match (self.name.is_empty(), self.output.first()) {
            (true, Some(output)) => output,
            _ => &self.name,
        }
    }
}

/// Whether operators of `domain` are ONNX's own.
pub(crate) fn is_standard(domain: &str) -> bool {
    domain.is_empty() || domain == "ai.onnx"
}

/// A `Cast` of `input` to `output`, named after the latter.
pub fn cast_node(input: &str, output: &str, to: ElementType) -> NodeProto {
    NodeProto {
        op_type: "Cast".to_owned(),
        name: output.to_owned(),
        input: vec![input.to_owned()],
        output: vec![output.to_owned()],
        attribute: vec![attribute::int("to", i64::from(to.onnx()))],
        ..NodeProto::default()
    }
}

/// Attributes by value.
pub mod attribute {
    use super::*;

    fn named(name: &str, kind: AttributeType) -> AttributeProto {
        AttributeProto { name: name.to_owned(), type_: kind.into(), ..AttributeProto::default() }
    }

    /// An integer.
    pub fn int(name: &str, value: i64) -> AttributeProto {
        AttributeProto { i: value, ..named(name, AttributeType::INT) }
    }

    /// A list of integers.
    pub fn ints(name: &str, values: &[i64]) -> AttributeProto {
        AttributeProto { ints: values.to_vec(), ..named(name, AttributeType::INTS) }
    }

    /// A float.
    pub fn float(name: &str, value: f32) -> AttributeProto {
        AttributeProto { f: value, ..named(name, AttributeType::FLOAT) }
    }

    /// A text.
    pub fn text(name: &str, value: &str) -> AttributeProto {
        AttributeProto { s: value.as_bytes().to_vec(), ..named(name, AttributeType::STRING) }
    }

    /// A tensor.
    pub fn tensor(name: &str, value: &Tensor) -> AttributeProto {
        AttributeProto { t: Some(value.to_proto("")).into(), ..named(name, AttributeType::TENSOR) }
    }

    /// The element type of the tensor that a `Constant` or `ConstantOfShape` node holds.
    pub(crate) fn constant_element(node: &onnx_protobuf::NodeProto) -> Option<crate::ElementType> {
        let Some(a) = node.attribute.first() else { return Some(crate::ElementType::F32) };
        match a.name.as_str() {
            "value" => crate::ElementType::from_onnx(a.t.as_ref()?.data_type),
            "value_int" | "value_ints" => Some(crate::ElementType::I64),
            "value_float" | "value_floats" => Some(crate::ElementType::F32),
            _ => None,
        }
    }

    /// The value of a `Constant` node, in any of its spellings; `None` for texts and sparse tensors.
    ///
    /// # Errors
    /// The data of its tensor does not fill its shape.
    pub fn constant(node: &onnx_protobuf::NodeProto) -> crate::Result<Option<Tensor>> {
        let Some(a) = node.attribute.first() else { return Ok(None) };
        Ok(match a.name.as_str() {
            "value" => a.t.as_ref().map(Tensor::from_proto).transpose()?,
            "value_int" => Some(Tensor::scalar(a.i)),
            "value_ints" => Some(Tensor::ints(&a.ints)),
            "value_float" => Some(Tensor::scalar(a.f)),
            "value_floats" => Some(Tensor::new(&[a.floats.len()], a.floats.clone())),
            _ => None,
        })
    }
}

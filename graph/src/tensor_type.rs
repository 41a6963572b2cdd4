//! What a graph declares of its inputs and outputs: element types and axes.

use onnx_protobuf::tensor_shape_proto::{Dimension, dimension};
use onnx_protobuf::{TensorShapeProto, TypeProto, ValueInfoProto, type_proto};

use crate::ElementType;

/// The size of one axis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dim {
    /// Always the same.
    Fixed(usize),
    /// Chosen at run time; the exporter's name for it.
    Symbol(String),
    /// Chosen at run time, without a name.
    Unknown,
}

impl std::fmt::Display for Dim {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Fixed(n) => write!(f, "{n}"),
            Self::Symbol(name) => f.write_str(name),
            Self::Unknown => f.write_str("?"),
        }
    }
}

/// What a graph input or output is declared to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorType {
    /// Its name.
    pub name: String,
    /// Its element type; `None` for types that this project does not handle.
    pub element: Option<ElementType>,
    /// Its axes; `None` where the rank is not declared.
    pub dims: Option<Vec<Dim>>,
}

impl std::fmt::Display for TensorType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let element = self.element.map_or("?", ElementType::name);
        match &self.dims {
            Some(dims) => {
                let dims: Vec<String> = dims.iter().map(Dim::to_string).collect();
                write!(f, "{} {element}[{}]", self.name, dims.join(","))
            }
            None => write!(f, "{} {element}[..]", self.name),
        }
    }
}

impl TensorType {
    /// What a graph says of an input or output.
    pub(crate) fn declared(info: &ValueInfoProto) -> Self {
        let name = info.name.clone();
        let Some(type_proto::Value::TensorType(tensor)) = info.type_.as_ref().and_then(|t| t.value.as_ref()) else {
            return Self { name, element: None, dims: None };
        };
        let dims = tensor.shape.as_ref().map(|shape| shape.dim.iter().map(Dim::declared).collect());
        Self { name, element: ElementType::from_onnx(tensor.elem_type), dims }
    }
}

impl Dim {
    fn declared(dim: &Dimension) -> Self {
        match &dim.value {
            Some(dimension::Value::DimValue(n)) => usize::try_from(*n).map_or(Self::Unknown, Self::Fixed),
            Some(dimension::Value::DimParam(name)) if !name.is_empty() => Self::Symbol(name.clone()),
            _ => Self::Unknown,
        }
    }
}

/// The declaration of a graph input or output; dimensions are numbers, symbols, or `?`.
pub(crate) fn value_info(name: &str, element: ElementType, dims: &[&str]) -> ValueInfoProto {
    let dim = |text: &&str| {
        let value = match text.parse::<i64>() {
            Ok(n) => Some(dimension::Value::DimValue(n)),
            Err(_) if *text == "?" => None,
            Err(_) => Some(dimension::Value::DimParam((*text).to_owned())),
        };
        Dimension { value, ..Dimension::default() }
    };
    let shape = TensorShapeProto { dim: dims.iter().map(dim).collect(), ..Default::default() };
    let tensor = type_proto::Tensor { elem_type: element.onnx(), shape: Some(shape).into(), ..Default::default() };
    let type_ = TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..TypeProto::default() };
    ValueInfoProto { name: name.to_owned(), type_: Some(type_).into(), ..ValueInfoProto::default() }
}

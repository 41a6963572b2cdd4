//! Which operators a rewritten encoder may hold.
//!
//! On floats that depend on the text: matrix products, additions, multiplication by constants or by what the mask alone
//! decides, ReLU, `Clip` to constant limits, which is a saturation of two ReLUs, and moving elements around. Integers (positions, shapes) may be computed as the exporter did.

use std::collections::HashSet;

use mabert_graph::proto::NodeProto;
use mabert_graph::{Dependence, ElementType, Index, Model, NodeExt as _};
use serde::Serialize;

use crate::Result;
use crate::recording::Recording;

/// Operators that are matrix arithmetic, ReLU, or move elements.
pub const MATRIX_OPERATORS: [&str; 20] = [
    "MatMul",
    "Gemm",
    "Add",
    "Sub",
    "Mul",
    "Relu",
    "Gather",
    "Reshape",
    "Transpose",
    "Slice",
    "Concat",
    "Split",
    "Shape",
    "Unsqueeze",
    "Squeeze",
    "Cast",
    "Constant",
    "Identity",
    "Expand",
    "Flatten",
];

/// A node that is not matrix arithmetic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct NonLinear {
    /// The node.
    pub node: String,
    /// Its operator.
    pub operator: String,
    /// Whether it is the task's head's: nothing of it leads to the encoder's end.
    pub in_head: bool,
}

/// The nodes that compute floats from text by other means than matrix arithmetic and ReLU. `encoder_end` is the value
/// that the encoder ends in; what does not lead to it is the head.
///
/// # Errors
/// The model cannot be run to find the types of its values.
pub fn non_linear_nodes(model: &Model, mask: Option<&str>, encoder_end: Option<&str>) -> Result<Vec<NonLinear>> {
    let index = Index::new(model)?;
    let recording = Recording::new(model, 2, 5)?;
    let is_float = |value: &str| {
        recording
            .value(value)
            .is_none_or(|t| matches!(t.element_type(), ElementType::F32 | ElementType::F16 | ElementType::F64))
    };
    let inputs = model.inputs();
    let mut text_values: HashSet<&str> = inputs.iter().map(|i| i.name.as_str()).filter(|i| Some(*i) != mask).collect();
    let encoder = encoder_end.map(|end| leading_to(&index, end));
    let mut non_linear = Vec::new();
    for node in &index.graph().node {
        let data = |v: &&String| index.dependence(v) == Dependence::Data;
        let from_text = node.input.iter().filter(data).filter(|v| text_values.contains(v.as_str())).count();
        if from_text == 0 {
            continue;
        }
        text_values.extend(node.output.iter().map(String::as_str));
        if node.output.first().is_some_and(|o| is_float(o)) && !is_linear(&index, node, from_text) {
            let operator =
                if node.is(&node.op_type) { node.op_type.clone() } else { format!("{}.{}", node.domain, node.op_type) };
            let leads_there = |encoder: &HashSet<&str>| node.output.iter().any(|o| encoder.contains(o.as_str()));
            let in_head = encoder.as_ref().is_some_and(|encoder| !leads_there(encoder));
            non_linear.push(NonLinear { node: node.label().to_owned(), operator, in_head });
        }
    }
    Ok(non_linear)
}

/// The values that `end` is computed from, itself included, and those that shapes on the way are asked of.
pub(crate) fn leading_to<'g>(index: &Index<'g>, end: &'g str) -> HashSet<&'g str> {
    let mut open = vec![end];
    let mut values = HashSet::from([end]);
    while let Some(value) = open.pop() {
        let inputs = index.producer(value).into_iter().flat_map(|node| &node.input).map(String::as_str);
        open.extend(inputs.filter(|input| values.insert(input)));
    }
    values
}

fn is_linear(index: &Index<'_>, node: &NodeProto, from_text: usize) -> bool {
    if !node.is(&node.op_type) {
        return false;
    }
    match node.op_type.as_str() {
        // A product of two values of the text is no longer linear in either.
        "Mul" => from_text < 2,
        // A saturation: two ReLUs.
        "Clip" => {
            let mut limits = node.input.iter().skip(1).filter(|limit| !limit.is_empty());
            limits.all(|limit| index.dependence(limit) == Dependence::Constant)
        }
        "Div" => node.input.get(1).is_some_and(|by| index.dependence(by) == Dependence::Constant),
        op => MATRIX_OPERATORS.contains(&op),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mabert_graph::{Builder, Tensor};

    #[test]
    fn what_the_mask_decides_is_not_the_texts() {
        let b = Builder::new(17, "test");
        let ids = b.input("input_ids", ElementType::I64, &["B", "N"]);
        let mask = b.input("attention_mask", ElementType::I64, &["B", "N"]).cast(ElementType::F32);
        let table = b.constant("table", &Tensor::new(&[8, 4], vec![0.5f32; 32]));
        let x = table.gather(ids);
        let kept = (x * mask.reshape(&[0, -1, 1]) * 2.0).relu().named("encoder");
        let squared = (kept * kept).named("squared");
        // Held between constants, from below alone, and by what the text says.
        let low = b.parameter("low", &Tensor::scalar(0.5f32));
        let held = b.op("Clip", &[squared.clip(-1.0, 1.0), low, b.value("")], vec![]);
        let most = b.op("ReduceMax", &[held], vec![mabert_graph::attribute::int("keepdims", 0)]);
        let y = b.op("Clip", &[held, low, most], vec![]).tanh().named("y");
        let model = b.model(&[y]);
        let found = non_linear_nodes(&model, Some("attention_mask"), Some("encoder")).unwrap();
        let names: Vec<(&str, bool)> = found.iter().map(|n| (n.operator.as_str(), n.in_head)).collect();
        assert_eq!(names, [("Mul", true), ("ReduceMax", true), ("Clip", true), ("Tanh", true)]);
    }
}

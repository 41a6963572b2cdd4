//! Fused operators spelled with plain ones, for engines and recognisers that only know the plain ones.

use onnx_protobuf::NodeProto;
use onnx_protobuf::TensorProto;

use crate::{Builder, ElementType, Expr, Index, Model, NodeExt, Patch, Result, Tensor, attribute};

/// Replaces the fused operators of `model` by what they compute; returns how many were replaced.
///
/// Handled are `Attention` of the standard domain (opset 23, without cache, causality or soft cap) and, of
/// `com.microsoft`, `Gelu`, `FastGelu`, `BiasGelu` and `SkipLayerNormalization`. Others, and variants that do more than
/// an encoder needs, are left as they are.
///
/// # Errors
/// The graph's wiring is broken.
pub fn decompose_fused(model: &mut Model) -> Result<usize> {
    let mut count = 0;
    let mut skipped = 0;
    // One node at a time: a patch changes the graph that the index describes.
    while let Some(replacement) = next(model, skipped)? {
        match replacement {
            Some(patch) => {
                patch.apply(model)?;
                count += 1;
            }
            None => skipped += 1,
        }
    }
    Ok(count)
}

/// The fused node after the first `skip` ones, and its replacement if it has one.
fn next(model: &Model, skip: usize) -> Result<Option<Option<Patch>>> {
    let index = Index::new(model)?;
    let fused = |n: &&NodeProto| n.is("Attention") || n.domain == "com.microsoft";
    let Some(node) = model.graph().node.iter().filter(fused).nth(skip) else { return Ok(None) };
    let output = node.output.first().cloned().unwrap_or_default();
    let builder = Builder::new(model.opset(), "decompose-fused");
    builder.scope(&format!("{}/plain", node.label()));
    let result = match (node.domain.as_str(), node.op_type.as_str()) {
        ("com.microsoft", "Gelu") => Some(gelu_erf(builder.value(&node.input[0]))),
        ("com.microsoft", "BiasGelu") => Some(gelu_erf(builder.value(&node.input[0]) + builder.value(&node.input[1]))),
        ("com.microsoft", "FastGelu") => Some(gelu_tanh(match operand(node, 1) {
            Some(bias) => builder.value(&node.input[0]) + builder.value(bias),
            None => builder.value(&node.input[0]),
        })),
        ("com.microsoft", "SkipLayerNormalization") => skip_layer_norm(&builder, &index, node),
        ("com.microsoft", _) => None,
        _ => attention(&builder, model, &index, node),
    };
    Ok(Some(result.map(|result| {
        let name = result.name();
        builder.patch().shunt(&output, &name)
    })))
}

fn operand(node: &NodeProto, at: usize) -> Option<&str> {
    node.input.get(at).map(String::as_str).filter(|i| !i.is_empty())
}

fn used(index: &Index<'_>, node: &NodeProto, at: usize) -> bool {
    node.output.get(at).is_some_and(|o| !o.is_empty() && (index.is_output(o) || !index.consumers_at(o).is_empty()))
}

/// `x / 2 (1 + erf(x / sqrt 2))`.
fn gelu_erf(x: Expr<'_>) -> Expr<'_> {
    0.5 * x * ((x / std::f32::consts::SQRT_2).erf() + 1.0)
}

/// `x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`.
fn gelu_tanh(x: Expr<'_>) -> Expr<'_> {
    let c = (2.0 / std::f32::consts::PI).sqrt();
    0.5 * x * ((c * (x + 0.044_715 * x * x * x)).tanh() + 1.0)
}

/// `LayerNorm(x + skip + bias)`.
fn skip_layer_norm<'b>(b: &'b Builder, index: &Index<'_>, node: &NodeProto) -> Option<Expr<'b>> {
    if used(index, node, 1) || used(index, node, 2) || used(index, node, 3) {
        return None;
    }
    let mut x = b.value(&node.input[0]) + b.value(&node.input[1]);
    if let Some(bias) = operand(node, 4) {
        x = x + b.value(bias);
    }
    let centred = x - x.mean_last();
    let variance = (centred * centred).mean_last();
    let normal = centred / (variance + node.float("epsilon", 1e-12)).sqrt();
    let scaled = normal * b.value(operand(node, 2)?);
    Some(operand(node, 3).map_or(scaled, |beta| scaled + b.value(beta)))
}

/// `softmax(scale Q K^T + mask) V`, rows without any key giving zero.
fn attention<'b>(b: &'b Builder, model: &Model, index: &Index<'_>, node: &NodeProto) -> Option<Expr<'b>> {
    let causal = node.int("is_causal", 0) != 0 || node.float("softcap", 0.0) != 0.0;
    let cached = operand(node, 4).is_some() || operand(node, 5).is_some() || operand(node, 6).is_some();
    if causal || cached || (1..4).any(|at| used(index, node, at)) || node.attribute("q_num_heads").is_some() {
        return None;
    }
    let [q, k, v] = [0, 1, 2].map(|at| b.value(&node.input[at]));
    let scale = match node.attribute("scale") {
        Some(scale) => b.parameter("scale", &Tensor::scalar(scale.f)),
        None => head_size_scale(q),
    };
    let mut scores = q.matmul(k.transpose(&[0, 1, 3, 2])) * scale;
    let mut guarded = false;
    if let Some(mask) = operand(node, 3) {
        let mask_value = b.value(mask);
        if is_float(model, index, mask) {
            scores = scores + mask_value;
        } else {
            let [zero, low] = [0.0, f32::NEG_INFINITY].map(|x| b.parameter("bias", &Tensor::scalar(x)));
            scores = scores + b.op("Where", &[mask_value, zero, low], vec![]);
            guarded = true;
        }
    }
    let mut probabilities = scores.softmax();
    if guarded {
        let nothing = b.op("IsNaN", &[probabilities], vec![]);
        let zero = b.parameter("zero", &Tensor::scalar(0f32));
        probabilities = b.op("Where", &[nothing, zero, probabilities], vec![]);
    }
    Some(probabilities.matmul(v))
}

/// `1 / sqrt(d)`, `d` read from the shape of `q` `[batch, heads, n, d]`.
fn head_size_scale(q: Expr<'_>) -> Expr<'_> {
    q.shape().slice(0, 3, 4).cast(ElementType::F32).sqrt().reciprocal()
}

/// Whether a mask holds floats, from what is declared of it or from the operator that makes it.
fn is_float(model: &Model, index: &Index<'_>, value: &str) -> bool {
    const BOOLEAN: [&str; 9] = ["And", "Or", "Not", "Xor", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"];
    let constant = |t: &TensorProto| t.data_type != ElementType::Bool.onnx();
    if let Some(known) = model.initializer(value).map(constant) {
        return known;
    }
    let Some(node) = index.producer(value) else {
        let input = model.inputs().into_iter().find(|i| i.name == value);
        return input.is_none_or(|i| i.element != Some(ElementType::Bool));
    };
    match node.op_type.as_str() {
        "Cast" => node.int("to", 1) != i64::from(ElementType::Bool.onnx()),
        op if BOOLEAN.contains(&op) => false,
        "Where" => is_float(model, index, &node.input[1]),
        "Expand" | "Unsqueeze" | "Squeeze" | "Reshape" | "Identity" | "Gather" | "GatherND" | "Slice" | "Transpose"
        | "Concat" => is_float(model, index, &node.input[0]),
        "Constant" => attribute::tensor_element(node) != Some(ElementType::Bool),
        _ => true,
    }
}

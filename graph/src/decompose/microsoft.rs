//! Fused operators of `com.microsoft`, as onnxruntime's optimisers write them. What each computes is as
//! <https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md> has it.

use super::{Fused, Outputs};
use crate::{ElementType, Expr, NodeExt as _, Tensor};

/// The node in plain operators, where it does no more than an encoder needs.
pub(super) fn plain<'b>(fused: &Fused<'b, '_>) -> Option<Outputs<'b>> {
    let only = |y: Option<Expr<'b>>| Some(vec![(0, y?)]);
    match fused.node.op_type.as_str() {
        "Gelu" => only(fused.operand(0).map(gelu_erf)),
        "BiasGelu" => only(Some(gelu_erf(fused.operand(0)? + fused.operand(1)?))),
        "FastGelu" => {
            let x = fused.operand(0)?;
            only(Some(gelu_tanh(fused.operand(1).map_or(x, |bias| x + bias))))
        }
        "QuickGelu" => {
            let x = fused.operand(0)?;
            let inner = x * fused.node.float("alpha", 1.702);
            only(Some(x * fused.b.op("Sigmoid", &[inner], vec![])))
        }
        "FusedMatMul" => only(fused_matmul(fused)),
        "FusedGemm" => only(fused_gemm(fused)),
        "SkipLayerNormalization" => skip_layer_norm(fused),
        "EmbedLayerNormalization" => embed_layer_norm(fused),
        "Attention" => only(attention(fused)),
        "MultiHeadAttention" => only(multi_head_attention(fused)),
        _ => None,
    }
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

/// `alpha A B`, either of them transposed in its last two axes where it is a matrix or a batch of heads.
fn fused_matmul<'b>(fused: &Fused<'b, '_>) -> Option<Expr<'b>> {
    let node = fused.node;
    if node.int("transBatchA", 0) != 0 || node.int("transBatchB", 0) != 0 {
        return None;
    }
    let side = |at: usize, flag: &str| {
        let value = fused.operand(at)?;
        if node.int(flag, 0) == 0 {
            return Some(value);
        }
        // The rank has to be known to be transposed: a constant tells its own; products of two computed values are those
        // of heads, whose rank is 4.
        let rank = match fused.model.initializer(fused.name(at)?) {
            Some(constant) => constant.dims.len() as i64,
            None => 4,
        };
        let mut order: Vec<i64> = (0..rank).collect();
        let last = order.len().checked_sub(2)?;
        order[last..].reverse();
        Some(value.transpose(&order))
    };
    let product = side(0, "transA")?.matmul(side(1, "transB")?);
    let alpha = node.float("alpha", 1.0);
    Some(if alpha == 1.0 { product } else { product * alpha })
}

/// A `Gemm` and an activation after it.
fn fused_gemm<'b>(fused: &Fused<'b, '_>) -> Option<Expr<'b>> {
    const ACTIVATIONS: [&str; 3] = ["Tanh", "Relu", "Sigmoid"];
    let activation = fused.node.text("activation")?;
    if !ACTIVATIONS.contains(&activation.as_str()) {
        return None;
    }
    let attributes = fused.node.attribute.iter().filter(|a| !a.name.starts_with("activation")).cloned().collect();
    let operands: Vec<Expr<'b>> = (0..3).map_while(|at| fused.operand(at)).collect();
    let product = fused.b.op("Gemm", &operands, attributes);
    Some(fused.b.op(&activation, &[product], vec![]))
}

/// `LayerNorm(x + skip + bias)`, and the sum as the fourth output.
fn skip_layer_norm<'b>(fused: &Fused<'b, '_>) -> Option<Outputs<'b>> {
    if fused.used(1) || fused.used(2) {
        return None;
    }
    let mut x = fused.operand(0)? + fused.operand(1)?;
    if let Some(bias) = fused.operand(4) {
        x = x + bias;
    }
    let y = x.layer_norm(fused.operand(2)?, fused.operand(3), fused.node.float("epsilon", 1e-12));
    let mut outputs = vec![(0, y)];
    outputs.extend(fused.used(3).then_some((3, x)));
    Some(outputs)
}

/// The embeddings of words, positions and token types, summed and normalised; the sum is the third output. The second, how
/// many tokens the mask keeps, is for attention alone, which reads the mask itself ([`keep`]).
fn embed_layer_norm<'b>(fused: &Fused<'b, '_>) -> Option<Outputs<'b>> {
    let b = fused.b;
    let (ids, words, positions) = (fused.operand(0)?, fused.operand(2)?, fused.operand(3)?);
    let mut x = words.gather(ids);
    if let (Some(types), Some(table)) = (fused.operand(1), fused.operand(4)) {
        x = x + table.gather(types);
    }
    x = x + match fused.operand(8) {
        Some(indices) => positions.gather(indices),
        None => positions.slice(0, 0, ids.shape().slice(0, 1, 2)),
    };
    let y = x.layer_norm(fused.operand(5)?, fused.operand(6), fused.node.float("epsilon", 1e-12));
    let mut outputs = vec![(0, y)];
    if fused.used(1) {
        let kept = match fused.operand(7) {
            Some(mask) => {
                let ones =
                    b.op("Expand", &[b.parameter("one", &Tensor::scalar(1f32)), ids.shape().slice(0, 1, 2)], vec![]);
                mask.cast(ElementType::F32).matmul(ones).cast(ElementType::I32)
            }
            None => {
                let zero = b.parameter("zero", &Tensor::scalar(0i32));
                b.op("Expand", &[zero, ids.shape().slice(0, 0, 1)], vec![])
            }
        };
        outputs.push((1, kept));
    }
    outputs.extend(fused.used(2).then_some((2, x)));
    Some(outputs)
}

/// Self-attention from the stream `[batch, n, channels]`, weights of queries, keys and values side by side.
fn attention<'b>(fused: &Fused<'b, '_>) -> Option<Expr<'b>> {
    let node = fused.node;
    let more = (4..node.input.len()).any(|at| fused.name(at).is_some()) || fused.used(1);
    if more
        || node.int("unidirectional", 0) != 0
        || node.int("do_rotary", 0) != 0
        || node.attribute("qkv_hidden_sizes").is_some()
    {
        return None;
    }
    let width = fused.size(fused.name(1)?, 1)? / 3;
    let (x, weight, bias) = (fused.operand(0)?, fused.operand(1)?, fused.operand(2));
    // Slices of constants are constants: a product for each, as exporters write them.
    let parts = [0, 1, 2].map(|i| {
        let part = x.matmul(weight.slice(1, i * width, (i + 1) * width));
        bias.map_or(part, |bias| part + bias.slice(0, i * width, (i + 1) * width))
    });
    attend_by_head(fused, parts, width, fused.name(3))
}

/// Attention on queries, keys and values `[batch, n, channels]`.
fn multi_head_attention<'b>(fused: &Fused<'b, '_>) -> Option<Expr<'b>> {
    let more = (5..fused.node.input.len()).any(|at| fused.name(at).is_some()) || fused.used(1) || fused.used(2);
    if more || fused.node.int("unidirectional", 0) != 0 {
        return None;
    }
    let mut parts = [fused.operand(0)?, fused.operand(1)?, fused.operand(2)?];
    // The bias tells how wide they are.
    let bias = fused.name(3)?;
    let width = fused.size(bias, 0)? / 3;
    let bias = fused.operand(3)?;
    for (i, part) in (0..).zip(&mut parts) {
        *part = *part + bias.slice(0, i * width, (i + 1) * width);
    }
    attend_by_head(fused, parts, width, fused.name(4))
}

/// Attention of all heads on queries, keys and values `[batch, n, width]`, heads side by side.
fn attend_by_head<'b>(fused: &Fused<'b, '_>, parts: [Expr<'b>; 3], width: i64, mask: Option<&str>) -> Option<Expr<'b>> {
    let node = fused.node;
    let heads = node.int("num_heads", 0);
    if heads < 1 || width < 1 || width % heads != 0 {
        return None;
    }
    let d = width / heads;
    let [q, k, v] = parts.map(|part| part.reshape(&[0, 0, heads, d]));
    let scale = node.attribute("scale").map_or(0.0, |a| a.f);
    let scale = if scale == 0.0 { 1.0 / (d as f32).sqrt() } else { scale };
    let mut scores = q.transpose(&[0, 2, 1, 3]).matmul(k.transpose(&[0, 2, 3, 1])) * scale;
    if let Some(mask) = mask {
        let removed = 1.0 - keep(fused, mask).cast(ElementType::F32).reshape(&[0, 1, 1, -1]);
        // The attribute may be the lowest float, which a score's own sign could carry over the edge.
        scores = scores + removed * node.float("mask_filter_value", -10_000.0).max(-1e9);
    }
    let context = scores.softmax().matmul(v.transpose(&[0, 2, 1, 3]));
    Some(context.transpose(&[0, 2, 1, 3]).reshape(&[0, 0, width]))
}

/// The mask `[batch, n]` behind what an attention is given: the mask itself, or the number of tokens that was counted in
/// it. A count stands for padding on the right; the mask that it was counted in says the same there, and is right for other
/// padding too.
fn keep<'b>(fused: &Fused<'b, '_>, mask: &str) -> Expr<'b> {
    let mut value = mask;
    let mut counted = None;
    while let (Some(node), None) = (fused.index.producer(value), counted) {
        let source = match node.op_type.as_str() {
            "Cast" => 0,
            "ReduceSum" if node.int("keepdims", 1) == 0 => 0,
            "EmbedLayerNormalization" if node.output.get(1).is_some_and(|o| o == value) => 7,
            _ => break,
        };
        let Some(source) = node.input.get(source) else { break };
        match node.is("Cast") {
            true => value = source,
            false => counted = Some(source.as_str()),
        }
    }
    fused.b.value(counted.unwrap_or(mask))
}

//! Fused operators of `com.microsoft`, as onnxruntime's optimisers write them. What each computes is as
//! <https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md> has it.

use super::{Fused, Outputs};
use crate::{ElementType, Expr, NodeExt as _, Tensor};

/// The node in plain operators, where it does no more than an encoder needs.
pub(super) fn plain<'b>(fused: &Fused<'b, '_>) -> Option<Outputs<'b>> {
    let only = |y: Option<Expr<'b>>| Some(vec![(0, y?)]);
    match fused.node.op_type.as_str() {
        "Gelu" => only(fused.operand(0).map(Expr::gelu_erf)),
        "BiasGelu" => only(Some((fused.operand(0)? + fused.operand(1)?).gelu_erf())),
        "FastGelu" => {
            let x = fused.operand(0)?;
            only(Some(fused.operand(1).map_or(x, |bias| x + bias).gelu_tanh()))
        }
        "QuickGelu" => {
            let x = fused.operand(0)?;
            let inner = x * fused.node.float("alpha", 1.702);
            only(Some(x * fused.b.op("Sigmoid", &[inner], vec![])))
        }
        "FusedMatMul" => only(fused_matmul(fused)),
        "FusedGemm" => only(fused_gemm(fused)),
        "SkipLayerNormalization" => skip_layer_norm(fused, (2, Some(3), 4)),
        "SkipSimplifiedLayerNormalization" => skip_layer_norm(fused, (2, None, 3)),
        "EmbedLayerNormalization" => embed_layer_norm(fused),
        "Attention" => only(attention(fused)),
        "MultiHeadAttention" => only(multi_head_attention(fused)),
        _ => None,
    }
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
        // The rank has to be known to be transposed: constants and inputs tell their own; products of two computed values
        // are those of heads, whose rank is 4.
        let name = fused.name(at)?;
        let declared =
            || fused.model.inputs().into_iter().find(|input| input.name == name)?.dims.map(|dims| dims.len());
        let rank = fused.dims(name).map(<[i64]>::len).or_else(declared).unwrap_or(4) as i64;
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

/// `LayerNorm(x + skip + bias)`, and the sum as the fourth output. Where gamma, beta and the bias are among the operands, is
/// told; without a place for beta it is the norm by the root of the mean square.
fn skip_layer_norm<'b>(
    fused: &Fused<'b, '_>,
    (gamma, beta, bias): (usize, Option<usize>, usize),
) -> Option<Outputs<'b>> {
    if fused.used(1) || fused.used(2) {
        return None;
    }
    let mut x = fused.operand(0)? + fused.operand(1)?;
    if let Some(bias) = fused.operand(bias) {
        x = x + bias;
    }
    let (gamma, epsilon) = (fused.operand(gamma)?, fused.node.float("epsilon", 1e-12));
    let y = match beta {
        Some(beta) => x.layer_norm(gamma, fused.operand(beta), epsilon),
        None => x.rms_norm(gamma, epsilon),
    };
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
    if more || node.int("do_rotary", 0) != 0 {
        return None;
    }
    let whole = fused.size(fused.name(1)?, 1)?;
    let widths = match node.ints("qkv_hidden_sizes") {
        None | Some([]) => [whole / 3; 3],
        Some(&[queries, keys, values]) if queries + keys + values == whole => [queries, keys, values],
        Some(_) => return None,
    };
    let (x, weight, bias) = (fused.operand(0)?, fused.operand(1)?, fused.operand(2));
    // Slices of constants are constants: a product for each, as exporters write them.
    let parts = side_by_side(widths).map(|(start, end)| {
        let part = x.matmul(weight.slice(1, start, end));
        bias.map_or(part, |bias| part + bias.slice(0, start, end))
    });
    attend_by_head(fused, parts, widths, fused.name(3))
}

/// Where each of three parts side by side starts and ends.
fn side_by_side([a, b, c]: [i64; 3]) -> [(i64, i64); 3] {
    [(0, a), (a, a + b), (a + b, a + b + c)]
}

/// Attention on queries, keys and values `[batch, n, channels]`.
fn multi_head_attention<'b>(fused: &Fused<'b, '_>) -> Option<Expr<'b>> {
    let more = (5..fused.node.input.len()).any(|at| fused.name(at).is_some()) || fused.used(1) || fused.used(2);
    if more {
        return None;
    }
    let mut parts = [fused.operand(0)?, fused.operand(1)?, fused.operand(2)?];
    // The maps that make them tell how wide they are, or the bias does, where all are as wide.
    let [queries, values] = [0, 2].map(|at| fused.name(at).and_then(|name| fused.width(name)));
    let bias = fused.name(3).map(|bias| fused.size(bias, 0));
    let widths = match (queries, values, bias) {
        (Some(keys), Some(values), _) => [keys, keys, values],
        (_, _, Some(whole)) => [whole? / 3; 3],
        _ => return None,
    };
    if let Some(bias) = fused.operand(3) {
        for ((start, end), part) in side_by_side(widths).into_iter().zip(&mut parts) {
            *part = *part + bias.slice(0, start, end);
        }
    }
    attend_by_head(fused, parts, widths, fused.name(4))
}

/// Attention of all heads on queries, keys and values `[batch, n, width]` of these widths, heads side by side.
fn attend_by_head<'b>(
    fused: &Fused<'b, '_>,
    parts: [Expr<'b>; 3],
    widths: [i64; 3],
    mask: Option<&str>,
) -> Option<Expr<'b>> {
    let node = fused.node;
    let heads = node.int("num_heads", 0);
    if heads < 1 || widths[0] != widths[1] || widths.iter().any(|&width| width < 1 || width % heads != 0) {
        return None;
    }
    let d = widths[0] / heads;
    let [q, k, v] = parts;
    let [q, k] = [q, k].map(|part| part.reshape(&[0, 0, heads, d]));
    let v = v.reshape(&[0, 0, heads, widths[2] / heads]);
    let scale = node.attribute("scale").map_or(0.0, |a| a.f);
    let scale = if scale == 0.0 { 1.0 / (d as f32).sqrt() } else { scale };
    let mut scores = q.transpose(&[0, 2, 1, 3]).matmul(k.transpose(&[0, 2, 3, 1])) * scale;
    if let Some(mask) = mask {
        let removed = 1.0 - keep(fused, mask).cast(ElementType::F32).reshape(&[0, 1, 1, -1]);
        // The attribute may be the lowest float, which a score's own sign could carry over the edge.
        scores = scores + removed * node.float("mask_filter_value", -10_000.0).max(-1e9);
    }
    if node.int("unidirectional", 0) != 0 {
        scores = scores + fused.later_keys(scores) * -1e9;
    }
    let context = scores.softmax().matmul(v.transpose(&[0, 2, 1, 3]));
    Some(context.transpose(&[0, 2, 1, 3]).reshape(&[0, 0, widths[2]]))
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

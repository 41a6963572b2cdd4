//! Fused operators of the standard domain.

use super::{Fused, Outputs};
use crate::{ElementType, Expr, NodeExt as _, Tensor};

/// `softmax(scale Q K^T + mask) V`, rows without any key giving zero.
pub(super) fn attention<'b>(fused: &Fused<'b, '_>) -> Option<Outputs<'b>> {
    let Fused { b, index, node, .. } = *fused;
    let windowed = ["left_window_size", "right_window_size"].iter().any(|name| node.int(name, -1) >= 0);
    let cached = (4..7).any(|at| fused.name(at).is_some());
    if node.float("softcap", 0.0) != 0.0
        || windowed
        || cached
        || (1..4).any(|at| fused.used(at))
        || node.attribute("q_num_heads").is_some()
    {
        return None;
    }
    let [q, k, v] = [fused.operand(0)?, fused.operand(1)?, fused.operand(2)?];
    let scale = match node.attribute("scale") {
        Some(scale) => b.parameter("scale", &Tensor::scalar(scale.f)),
        None => head_size_scale(q),
    };
    let mut scores = q.matmul(k.transpose(&[0, 1, 3, 2])) * scale;
    if node.int("is_causal", 0) != 0 {
        scores = scores + fused.later_keys(scores) * -1e9;
    }
    let mut guarded = false;
    if let Some(mask) = fused.name(3) {
        let mask_value = b.value(mask);
        if index.element_type(mask) != Some(ElementType::Bool) {
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
    Some(vec![(0, probabilities.matmul(v))])
}

/// `1 / sqrt(d)`, `d` read from the shape of `q` `[batch, heads, n, d]`.
fn head_size_scale(q: Expr<'_>) -> Expr<'_> {
    q.shape().slice(0, 3, 4).cast(ElementType::F32).sqrt().reciprocal()
}

/// One operand after the other.
pub(super) fn sum<'b>(fused: &Fused<'b, '_>) -> Option<Outputs<'b>> {
    let mut operands = (0..fused.node.input.len()).map(|at| fused.operand(at));
    let first = operands.next()??;
    let second = operands.next()??;
    operands.try_fold(first + second, |sum, operand| Some(sum + operand?)).map(|sum| vec![(0, sum)])
}

/// `x / sqrt(mean(x^2) + epsilon) scale`, over the last axis.
pub(super) fn rms_norm<'b>(fused: &Fused<'b, '_>) -> Option<Outputs<'b>> {
    if fused.used(1) || !fused.is_vector(fused.name(1)?) {
        return None;
    }
    let y = fused.operand(0)?.rms_norm(fused.operand(1)?, fused.node.float("epsilon", 1e-5));
    Some(vec![(0, y)])
}

/// `Cast` to the type of the other operand, which is needed for nothing else.
pub(super) fn cast_like<'b>(fused: &Fused<'b, '_>) -> Option<Outputs<'b>> {
    let element = fused.index.element_type(fused.name(1)?)?;
    Some(vec![(0, fused.operand(0)?.cast(element))])
}

/// A row of a table, looked up by a product with ones and zeros. An index outside the table, for which that product is
/// zero, becomes an error, as in every other lookup.
pub(super) fn one_hot_product<'b>(fused: &Fused<'b, '_>) -> Option<Outputs<'b>> {
    let Fused { b, model, index, .. } = *fused;
    let one_hot = index.producer(fused.name(0)?).filter(|node| node.is("OneHot") && node.int("axis", -1) == -1)?;
    let constant =
        |at: usize| Some(model.constant(one_hot.input.get(at)?).ok()?.to_f32().iter().copied().collect::<Vec<_>>());
    let rows = fused.size(fused.name(1)?, 0)?;
    let matrix = fused.dims(fused.name(1)?)?.len() == 2;
    if !matrix || constant(1)? != [rows as f32] || constant(2)? != [0.0, 1.0] {
        return None;
    }
    // As numbers of any type, of which a lookup takes integers only.
    let rows = b.value(&one_hot.input[0]).cast(ElementType::I64);
    Some(vec![(0, fused.operand(1)?.gather(rows))])
}

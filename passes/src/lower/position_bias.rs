//! What is added to the scores by position, read off as a table: the model computes it from nothing but the length.

use mabert_graph::{Builder, Expr, Model, Tensor, largest_difference};
use mabert_runtime::{LoadOptions, borrowed};
use ndarray::{ArrayD, Axis, Slice};

use super::canonical::MASK;
use crate::recording::made_up_inputs;
use crate::sites::Encoder;
use crate::{Error, Result};

/// How far a shorter text's bias may be from the corner of the longest one's.
const TOLERANCE: f32 = 1e-5;

/// The biases of an encoder, each `[1, heads, n', n']` for a batch of length `n'`; layers may share one.
pub(super) struct PositionBiases<'b>(Vec<(String, f32, Expr<'b>)>);

impl<'b> PositionBiases<'b> {
    /// Tables for up to `max_seq` tokens.
    pub(super) fn new(b: &'b Builder, model: &Model, encoder: &Encoder, max_seq: usize) -> Result<Self> {
        let mut found: Vec<(String, f32, Expr<'b>)> = Vec::new();
        for bias in encoder.layers.iter().filter_map(|layer| layer.attention.bias.as_ref()) {
            if found.iter().any(|(value, factor, _)| *value == bias.value && *factor == bias.factor) {
                continue;
            }
            let table = table(model, &bias.value, max_seq)?.mapv(|v| v * bias.factor);
            b.scope("position_bias");
            let length = b.value(MASK).shape().slice(0, 1, 2);
            let table = b.parameter("table", &Tensor::from(table)).slice(2, 0, length).slice(3, 0, length);
            found.push((bias.value.clone(), bias.factor, table));
        }
        Ok(Self(found))
    }

    /// The scores with what belongs to them.
    pub(super) fn add(&self, scores: Expr<'b>, bias: Option<&crate::sites::PositionBias>) -> Expr<'b> {
        let wanted =
            bias.and_then(|b| self.0.iter().find(|(value, factor, _)| *value == b.value && *factor == b.factor));
        wanted.map_or(scores, |(_, _, table)| scores + *table)
    }
}

/// The bias at `max_seq` tokens (or as many as the model takes), `[1, heads, n, n]`; that of any shorter text must be its
/// corner.
fn table(model: &Model, value: &str, max_seq: usize) -> Result<ArrayD<f32>> {
    let fault = |reason: String| Error::NotATable { value: value.to_owned(), reason };
    let part = model.extract_from_inputs(&[], &[value])?;
    let runnable = LoadOptions::default().prepare(&part)?;
    let at = |length: usize| -> Result<ArrayD<f32>> {
        let inputs = made_up_inputs(&part, 1, length, 1)?;
        let given = borrowed(&inputs);
        let mut found = runnable.run(&given)?.remove(0).1.to_f32();
        found.slice_axis_inplace(Axis(0), Slice::from(..1));
        Ok(found)
    };
    let whole = match at(max_seq) {
        Err(Error::Runtime(mabert_runtime::Error::TooLong { limit, .. })) => at(limit)?,
        other => other?,
    };
    let n = whole.shape().get(2).copied().unwrap_or(0);
    for length in [1, n / 3, n / 2, n - n.min(1)] {
        if length == 0 {
            continue;
        }
        let shorter = at(length)?;
        // A model of one length gives the same whatever is asked for.
        let length = shorter.shape()[2];
        let corner = whole.slice_each_axis(|axis| Slice::from(..if axis.axis.0 < 2 { axis.len } else { length }));
        if corner.shape() != shorter.shape() || largest_difference(&corner, &shorter) > TOLERANCE {
            return Err(fault(format!("at {length} tokens is not what it is at {n}")));
        }
    }
    Ok(whole)
}

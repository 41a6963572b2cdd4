//! What is added to the scores by position, read off as a table: the model computes it from nothing but the length.

use mabert_graph::{Builder, Expr, Model, Tensor, largest_difference};
use mabert_runtime::{LoadOptions, borrowed};
use ndarray::{ArrayD, Axis, Slice};

use super::mask::MASK;
use crate::inputs::EncoderInputs;
use crate::sites::{Encoder, PositionBias, ValueName};
use crate::{Error, Result};

/// How far a shorter text's bias may be from the corner of the longest one's.
const TOLERANCE: f32 = 1e-5;

/// The biases of an encoder, each `[1, heads, n', n']` for a batch of length `n'`; layers may share one.
pub(super) struct PositionBiases<'b>(Vec<Table<'b>>);

struct Table<'b> {
    value: ValueName,
    factor: f32,
    /// `[1, heads, n', n']`.
    corner: Expr<'b>,
}

impl Table<'_> {
    fn is(&self, bias: &PositionBias) -> bool {
        self.value == bias.value && self.factor == bias.factor
    }
}

impl<'b> PositionBiases<'b> {
    /// Tables for up to `max_seq` tokens.
    pub(super) fn new(b: &'b Builder, model: &Model, encoder: &Encoder, max_seq: usize) -> Result<Self> {
        let mut tables: Vec<Table<'b>> = Vec::new();
        for bias in encoder.layers.iter().filter_map(|layer| layer.attention.bias.as_ref()) {
            if tables.iter().any(|table| table.is(bias)) {
                continue;
            }
            let whole = whole(model, &bias.value, max_seq)?.mapv(|v| v * bias.factor);
            b.scope("position_bias");
            let length = b.value(MASK).shape().slice(0, 1, 2);
            let corner = b.parameter("table", &Tensor::from(whole)).slice(2, 0, length).slice(3, 0, length);
            tables.push(Table { value: bias.value.clone(), factor: bias.factor, corner });
        }
        Ok(Self(tables))
    }

    /// The scores with what belongs to them.
    pub(super) fn add(&self, scores: Expr<'b>, bias: Option<&PositionBias>) -> Expr<'b> {
        let table = bias.and_then(|bias| self.0.iter().find(|table| table.is(bias)));
        table.map_or(scores, |table| scores + table.corner)
    }
}

/// The bias at `max_seq` tokens (or as many as the model takes), `[1, heads, n, n]`; that of any shorter text must be its
/// corner.
fn whole(model: &Model, value: &str, max_seq: usize) -> Result<ArrayD<f32>> {
    let fault = |reason: String| Error::NotATable { value: value.to_owned(), reason };
    let part = model.extract_from_inputs(&[], &[value])?;
    let runnable = LoadOptions::default().prepare(&part)?;
    let part_inputs = EncoderInputs::new(&part, &[])?;
    let at = |length: usize| -> Result<ArrayD<f32>> {
        let inputs = part_inputs.made_up(1, length, 1)?;
        let mut bias = runnable.run(&borrowed(&inputs))?.remove(0).1.to_f32();
        bias.slice_axis_inplace(Axis(0), Slice::from(..1));
        Ok(bias)
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

#[cfg(test)]
mod tests {
    use mabert_graph::ElementType;

    use super::*;

    /// A table cut to the length of the text, plus `extra` of the length.
    fn bias(extra: impl for<'b> Fn(Expr<'b>) -> Expr<'b>) -> Model {
        let b = Builder::new(17, "test");
        let ids = b.input("input_ids", ElementType::I64, &["batch", "n"]);
        let length = ids.shape().slice(0, 1, 2);
        let table = Tensor::new(&[1, 1, 8, 8], (0..64).map(|i| (i % 7) as f32).collect());
        let corner = b.constant("table", &table).slice(2, 0, length).slice(3, 0, length);
        b.model(&[(corner + extra(length.cast(ElementType::F32))).named("bias")])
    }

    #[test]
    fn a_table_that_differs_by_nan_is_none() {
        assert_eq!(whole(&bias(|length| length - length), "bias", 8).unwrap().shape(), [1, 1, 8, 8]);
        // NaN but for the longest text, and for that alone.
        for model in [bias(|length| (length - 7.5).sqrt()), bias(|length| (7.5 - length).sqrt())] {
            let error = whole(&model, "bias", 8).unwrap_err();
            assert!(matches!(&error, Error::NotATable { value, .. } if value == "bias"), "{error}");
        }
    }
}

//! What tokens count: padding nothing, and in the last layer first tokens more, where the head reads them alone.

use mabert_graph::Tensor;
use mabert_passes::pipeline::Rewriting;
use ndarray::{Array2, Axis};

use super::head;
use crate::Result;
use crate::data::Batch;
use crate::pooling::Pooling;

/// Where the head reads first tokens alone, they have this share of the weight in the last layer. The others keep some:
/// they are more, and say how the weights answer in general.
const FIRST_TOKENS: f64 = 0.75;

/// What a text's first token counts where the others count 1.
#[derive(Clone, Copy, Debug)]
pub(super) struct TokenWeights {
    first: f64,
}

impl Default for TokenWeights {
    /// All count the same.
    fn default() -> Self {
        Self { first: 1.0 }
    }
}

impl TokenWeights {
    /// What a text's first token counts where the others count 1.
    pub(super) fn first(self) -> f32 {
        self.first as f32
    }

    /// Weights by which all first tokens together make up [`FIRST_TOKENS`]; `None` where the head reads others too, or users
    /// of hidden states do, who make vectors of texts of them by `pooling`; or where there are so few texts that their first
    /// tokens would be learnt by heart.
    pub(super) fn favouring_first(
        rewriting: &Rewriting,
        batches: &[Batch],
        pooling: Option<Pooling>,
    ) -> Result<Option<Self>> {
        let texts: usize = batches.iter().map(text_count).sum();
        let Some(longest) = batches.iter().max_by_key(|b| b.length) else { return Ok(None) };
        let Rewriting { teacher, encoder, .. } = rewriting;
        let enough = texts >= 2 * encoder.channels;
        let reads_first = match pooling {
            _ if !enough => false,
            Some(Pooling::First) => true,
            Some(Pooling::Mean) => false,
            _ => head::depends_on_first_token_alone(teacher, encoder, longest, pooling)?,
        };
        if !reads_first {
            return Ok(None);
        }
        let tokens: usize = batches.iter().map(Batch::tokens).sum();
        let others = (tokens - texts).max(1) as f64;
        let first = FIRST_TOKENS / (1.0 - FIRST_TOKENS) * others / texts.max(1) as f64;
        Ok(Some(Self { first: first.max(1.0) }))
    }

    /// The weights of a batch's tokens, `[batch, n, 1]`: 0 in padding and in sequences shorter than `shortest`.
    pub(super) fn of_tokens(self, batch: &Batch, shortest: usize) -> Tensor {
        let weight = |at: usize| {
            let (row, token) = (at / batch.length, at % batch.length);
            let length = batch.lengths[row];
            match token {
                _ if token >= length || length < shortest => 0.0,
                0 if !batch.made_up[row] => self.first as f32,
                _ => 1.0,
            }
        };
        let weights = (0..batch.size() * batch.length).map(weight).collect();
        Tensor::new(&[batch.size(), batch.length, 1], weights)
    }
}

/// Sequences of a batch that are text.
fn text_count(batch: &Batch) -> usize {
    batch.lengths.iter().zip(&batch.made_up).filter(|(length, made_up)| **length > 0 && !**made_up).count()
}

/// The rows of real tokens of a value `[batch, n, channels]`, `[tokens, channels]`.
pub(super) fn real_rows(batch: &Batch, value: &Tensor) -> Array2<f32> {
    let value = value.as_f32().expect("the stream is f32");
    let channels = *value.shape().last().expect("the stream has three axes");
    let rows = value.to_shape((batch.size() * batch.length, channels)).expect("[batch, n, channels]");
    let kept: Vec<usize> =
        (0..batch.size() * batch.length).filter(|at| at % batch.length < batch.lengths[at / batch.length]).collect();
    rows.select(Axis(0), &kept)
}

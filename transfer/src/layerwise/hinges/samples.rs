//! What hinges are fitted to: attention of one head in one sentence, as often as there are sentences.

use mabert_graph::Tensor;
use ndarray::{Array2, ArrayView4, Axis, Ix4, s};
use rand::seq::index;
use rand::{SeedableRng as _, rngs::StdRng};

use crate::data::Batch;
use crate::hinges::centre_rows;

/// Every sentence is represented by so many of its queries, or by all that it has.
const LEAST_ROWS: usize = 4;

/// Some rows of scores of one head in one sentence, with the probabilities that they should give, and the values that
/// these should bring together.
#[derive(Clone, Debug)]
pub(in super::super) struct Sample {
    /// From their row's mean where hinges are fitted, `[rows, len]`.
    pub(super) scores: Array2<f32>,
    /// `[rows, len]`.
    pub(super) probabilities: Array2<f32>,
    /// `[len, d]`.
    pub(super) values: Array2<f32>,
    /// What each row counts.
    pub(super) weights: Vec<f32>,
}

impl Sample {
    /// The contexts that its probabilities give, `[rows, d]`.
    pub(super) fn contexts(&self) -> Array2<f32> {
        self.probabilities.dot(&self.values)
    }

    /// The number of real tokens.
    pub(super) fn length(&self) -> usize {
        self.scores.ncols()
    }
}

/// Which rows are drawn.
pub(in super::super) struct Draw {
    /// The share of all queries.
    pub(in super::super) share: f64,
    /// Where the head reads first tokens alone, what such a query counts; the others count 1.
    pub(in super::super) first_token: Option<f32>,
    /// Without a mask all keys count, padding that a fixed length forces upon the model too.
    pub(in super::super) masked: bool,
    pub(in super::super) scores: Scores,
}

/// Where scores are counted from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Scores {
    /// Hinges do not see what is added to all scores of a row.
    FromTheirMean,
    /// Networks do.
    AsTheyAre,
}

impl Draw {
    /// The samples of each head in a batch, from `scores` and `probabilities` `[batch, heads, n, n]`, and `values`
    /// `[batch, heads, n, d]`.
    pub(in super::super) fn samples(
        &self,
        batch: &Batch,
        [scores, probabilities, values]: [&Tensor; 3],
        seed: u64,
    ) -> Vec<Vec<Sample>> {
        let [scores, probabilities, values] = [scores, probabilities, values].map(view);
        let mut rng = StdRng::seed_from_u64(seed);
        let mut samples = vec![Vec::new(); scores.shape()[1]];
        for (sentence, &length) in batch.lengths.iter().enumerate() {
            // One token alone attends to itself exactly.
            if length < 2 {
                continue;
            }
            let keys = if self.masked { length } else { batch.length };
            let count = ((self.share * length as f64).round() as usize).max(LEAST_ROWS).min(length);
            for (head, samples) in samples.iter_mut().enumerate() {
                let mut queries = index::sample(&mut rng, length, count).into_vec();
                let mut weights = vec![1f32; count];
                if let Some(first) = self.first_token.filter(|_| !batch.made_up[sentence]) {
                    // It is always there, the others as often as they are drawn.
                    let place = queries.iter().position(|&query| query == 0).unwrap_or(0);
                    (queries[place], weights[place]) = (0, first * count as f32 / length as f32);
                }
                let rows =
                    |from: &ArrayView4<'_, f32>| from.slice(s![sentence, head, .., ..keys]).select(Axis(0), &queries);
                let mut scores = rows(&scores);
                if self.scores == Scores::FromTheirMean {
                    centre_rows(&mut scores);
                }
                let values = values.slice(s![sentence, head, ..keys, ..]).to_owned();
                samples.push(Sample { scores, probabilities: rows(&probabilities), values, weights });
            }
        }
        samples
    }
}

fn view(tensor: &Tensor) -> ArrayView4<'_, f32> {
    let values = tensor.as_f32().expect("attention is f32");
    values.into_dimensionality::<Ix4>().expect("[batch, heads, n, ..]")
}

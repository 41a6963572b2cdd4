//! What approximators are fitted to: rows of scores with the probabilities that they should give, and how they depend on
//! the length.

use mabert_passes::lower::{ApproximatorOptions, LengthFeatures};
use ndarray::{Array1, Array2};

/// Rows of one gradient computation; of similar length.
const CHUNK: usize = 64;

/// Rows of scores with the probabilities that they should give, one head's or several heads'.
#[derive(Clone, Debug, Default)]
pub(super) struct Rows {
    /// Real tokens of the sentence of each row.
    lengths: Vec<usize>,
    /// As many scores a row as its length.
    scores: Vec<f32>,
    /// As many probabilities.
    probabilities: Vec<f32>,
}

impl Rows {
    pub(super) fn push(&mut self, scores: &[f32], probabilities: &[f32]) {
        self.lengths.push(scores.len());
        self.scores.extend_from_slice(scores);
        self.probabilities.extend_from_slice(probabilities);
    }

    pub(super) fn append(&mut self, mut other: Self) {
        self.lengths.append(&mut other.lengths);
        self.scores.append(&mut other.scores);
        self.probabilities.append(&mut other.probabilities);
    }

    /// The root mean square of the scores.
    pub(super) fn spread(&self) -> f32 {
        let square: f64 = self.scores.iter().map(|&s| f64::from(s).powi(2)).sum();
        ((square / self.scores.len().max(1) as f64).sqrt() as f32).max(1e-3)
    }

    /// Rows by length in chunks, scores divided by `spread`.
    pub(super) fn chunks(&self, spread: f32, lengths: &Lengths) -> Vec<Chunk> {
        let starts: Vec<usize> = self
            .lengths
            .iter()
            .scan(0, |at, &length| {
                *at += length;
                Some(*at - length)
            })
            .collect();
        let mut order: Vec<usize> =
            (0..self.lengths.len()).filter(|&row| self.lengths[row] >= lengths.shortest()).collect();
        order.sort_by_key(|&row| self.lengths[row]);
        order.chunks(CHUNK).map(|rows| self.chunk(rows, &starts, spread, lengths)).collect()
    }

    fn chunk(&self, rows: &[usize], starts: &[usize], spread: f32, lengths: &Lengths) -> Chunk {
        let row_lengths: Vec<usize> = rows.iter().map(|&row| self.lengths[row]).collect();
        let longest = row_lengths.iter().copied().max().unwrap_or(1);
        let matrix = |value: &dyn Fn(usize, usize) -> f32| {
            Array2::from_shape_fn((rows.len(), longest), |(i, j)| if j < row_lengths[i] { value(i, j) } else { 0.0 })
        };
        Chunk {
            scores: matrix(&|i, j| self.scores[starts[rows[i]] + j] / spread),
            probabilities: matrix(&|i, j| self.probabilities[starts[rows[i]] + j]),
            mask: matrix(&|_, _| 1.0),
            features: lengths.features(&row_lengths),
            features_over_length: lengths.features_over_length(&row_lengths),
            lengths: row_lengths,
        }
    }
}

/// Rows of similar length side by side.
pub(super) struct Chunk {
    /// `[rows, longest]`, zero beyond each row's length.
    pub(super) scores: Array2<f32>,
    /// `[rows, longest]`.
    pub(super) probabilities: Array2<f32>,
    /// 1 for real keys, `[rows, longest]`.
    pub(super) mask: Array2<f32>,
    /// See [`Lengths::features`], `[rows, K]`.
    pub(super) features: Array2<f32>,
    /// See [`Lengths::features_over_length`], `[rows, K]`.
    pub(super) features_over_length: Array2<f32>,
    pub(super) lengths: Vec<usize>,
}

/// How the parameters of an approximator depend on the number of real tokens.
pub(super) struct Lengths {
    features: LengthFeatures,
    /// What the rows of `scale` and `b2` are counted in while they are fitted, `[K]`: their knots' lengths, by which they
    /// will be divided. So equal rows mean the same function at every length, which is where training starts from: most
    /// heads change little with the length, and those that spread their attention evenly are solved for.
    units: Array1<f32>,
    tables: bool,
}

impl Lengths {
    pub(super) fn new(options: &ApproximatorOptions) -> Self {
        let features = options.length_features();
        let unit = |&knot: &usize| if options.length_tables { knot as f32 } else { 1.0 };
        let units = features.knots.iter().map(unit).collect();
        Self { features, units, tables: options.length_tables }
    }

    /// How many features a length has, `K`.
    pub(super) fn count(&self) -> usize {
        self.features.knots.len()
    }

    /// The units of `scale` and `b2`, `[K]`.
    pub(super) fn units(&self) -> &Array1<f32> {
        &self.units
    }

    /// Whether there are tables by length at all: without them `scale` is no parameter.
    pub(super) fn tables(&self) -> bool {
        self.tables
    }

    /// The shortest length that is fitted. With tables, the first knot is that of one token alone, and exact from the
    /// start.
    fn shortest(&self) -> usize {
        if self.tables { 2 } else { 1 }
    }

    /// The features of lengths, `[lengths, K]`.
    fn features(&self, lengths: &[usize]) -> Array2<f32> {
        let mut table = Array2::zeros((lengths.len(), self.count()));
        for (mut row, &length) in table.rows_mut().into_iter().zip(lengths) {
            row.assign(&Array1::from(self.features.at(length)));
        }
        table
    }

    /// Those by which `scale` and `b2` are multiplied, in their units, divided by the length where there are tables,
    /// `[lengths, K]`.
    fn features_over_length(&self, lengths: &[usize]) -> Array2<f32> {
        let mut table = self.features(lengths);
        if self.tables {
            for (mut row, &length) in table.rows_mut().into_iter().zip(lengths) {
                row *= &(&self.units / length as f32);
            }
        }
        table
    }
}

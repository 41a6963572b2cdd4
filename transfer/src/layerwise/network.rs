//! The network of one group of heads while it is fitted: `P = (scale[len] * relu((S m) W1 + b1[len]) W2 + b2[len]) m`.

use faer::linalg::solvers::Solve as _;
use faer::{Mat, Side};
use mabert_passes::lower::ApproximatorOptions;
use ndarray::linalg::general_mat_mul;
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis, concatenate, s};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use rayon::prelude::*;

use super::rows::{Chunk, Lengths};

/// The output layer's ridge, as a part of the mean diagonal.
const RIDGE: f64 = 1e-4;

/// The parameters of one group.
#[derive(Clone)]
pub(super) struct Network {
    /// `[n, h]`.
    pub(super) w1: Array2<f32>,
    /// `[h, n]`.
    pub(super) w2: Array2<f32>,
    /// `[K, h]`.
    pub(super) b1: Array2<f32>,
    /// `[K, h]`; no parameter without length tables, but ones.
    pub(super) scale: Array2<f32>,
    /// `[K, n]`.
    pub(super) b2: Array2<f32>,
    scale_is_fitted: bool,
}

impl Network {
    /// One hinge a key, or several keys a hinge where there are fewer: `relu(s + 1)`, then `relu(s - 1)`.
    pub(super) fn start(options: &ApproximatorOptions, lengths: &Lengths, seed: u64) -> Self {
        let (n, h, knots) = (options.max_seq, options.hidden, lengths.count());
        let mut rng = StdRng::seed_from_u64(seed);
        let mut w1 = Array2::from_shape_fn((n, h), |_| rng.random_range(-0.02f32..0.02));
        for (i, mut row) in w1.rows_mut().into_iter().enumerate() {
            (0..h).filter(|j| i % h == *j || j % n == i).for_each(|j| row[j] += 1.0);
        }
        let hinge = |j: usize| if (j / n).is_multiple_of(2) { 1.0 } else { -1.0 };
        let scale_is_fitted = lengths.tables();
        Self {
            w1,
            w2: Array2::zeros((h, n)),
            b1: Array2::from_shape_fn((knots, h), |(_, j)| hinge(j)),
            scale: Array2::from_shape_fn((knots, h), |(k, _)| if k == 0 && scale_is_fitted { 0.0 } else { 1.0 }),
            b2: Array2::from_shape_fn((knots, n), |(knot, _)| 1.0 / lengths.units()[knot]),
            scale_is_fitted,
        }
    }

    /// The hidden layer, `[rows, h]`.
    fn hidden(&self, chunk: &Chunk) -> Array2<f32> {
        let mut hidden = chunk.features.dot(&self.b1);
        let width = chunk.scores.ncols();
        general_mat_mul(1.0, &chunk.scores, &self.w1.slice(s![..width, ..]), 1.0, &mut hidden);
        hidden.mapv_inplace(|v| v.max(0.0));
        hidden
    }

    /// `scale` at the rows' lengths, `[rows, h]`.
    fn scales(&self, chunk: &Chunk) -> Array2<f32> {
        chunk.features_over_length.dot(&self.scale)
    }

    /// The probabilities that come of a scaled hidden layer, `[rows, longest]`.
    fn output(&self, chunk: &Chunk, scaled: &Array2<f32>) -> Array2<f32> {
        let width = chunk.scores.ncols();
        let mut output = chunk.features_over_length.dot(&self.b2.slice(s![.., ..width]));
        general_mat_mul(1.0, scaled, &self.w2.slice(s![.., ..width]), 1.0, &mut output);
        output * &chunk.mask
    }

    /// The relative error of the probabilities, against even attention as the constant.
    pub(super) fn error(&self, chunks: &[Chunk]) -> f64 {
        let sums = |chunk: &Chunk| {
            let scaled = self.hidden(chunk) * self.scales(chunk);
            let error = self.output(chunk, &scaled) - &chunk.probabilities;
            let (mut missed, mut spread) = (0f64, 0f64);
            for ((e, p), &length) in error.rows().into_iter().zip(chunk.probabilities.rows()).zip(&chunk.lengths) {
                for key in 0..length {
                    missed += f64::from(e[key]).powi(2);
                    spread += (f64::from(p[key]) - 1.0 / length as f64).powi(2);
                }
            }
            (missed, spread)
        };
        let (missed, spread) =
            chunks.par_iter().map(sums).collect::<Vec<_>>().into_iter().fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
        (missed / spread.max(f64::MIN_POSITIVE)).sqrt()
    }

    /// Solves for `W2` and `b2`, least squares with a ridge towards what they are. A key takes part in the rows that
    /// are long enough to have it, so each has a Gram matrix of its own; they only grow from the last key to the first.
    pub(super) fn solve_output(&mut self, chunks: &[Chunk]) {
        let (h, n, k) = (self.w2.nrows(), self.w2.ncols(), self.b2.nrows());
        let rows = self.output_rows(chunks);
        let mut sums = KeySums { gram: Mat::zeros(h + k, h + k), cross: Mat::zeros(h + k, n), rest: &rows };
        let mut change = Array2::<f64>::zeros((h + k, n));
        let keys: Vec<usize> = (0..n).rev().collect();
        // A Gram matrix a key is held for a few keys only.
        for some in keys.chunks(2 * rayon::current_num_threads()) {
            let grams: Vec<(usize, Mat<f64>)> = some.iter().map(|&key| (key, sums.gram_of(key))).collect();
            let solve = |(key, gram): (usize, Mat<f64>)| (key, sums.solve(key, gram));
            let solutions: Vec<(usize, Option<Mat<f64>>)> = grams.into_par_iter().map(solve).collect();
            for (key, solution) in solutions {
                if let Some(solution) = solution {
                    (0..h + k).for_each(|i| change[[i, key]] = solution[(i, 0)]);
                }
            }
        }
        let narrow = change.mapv(|v| v as f32);
        self.w2 += &narrow.slice(s![..h, ..]);
        self.b2 += &narrow.slice(s![h.., ..]);
    }

    /// What the output layer sees and still misses in all rows, longest sentences first.
    fn output_rows(&self, chunks: &[Chunk]) -> Vec<OutputRow> {
        let mut rows: Vec<OutputRow> = Vec::new();
        for chunk in chunks {
            let scaled = self.hidden(chunk) * self.scales(chunk);
            let residual = &chunk.probabilities - &self.output(chunk, &scaled);
            let features =
                concatenate(Axis(1), &[scaled.view(), chunk.features_over_length.view()]).expect("same rows");
            for (i, &length) in chunk.lengths.iter().enumerate() {
                let (features, residual) = (features.row(i).to_owned(), residual.row(i).to_owned());
                rows.push(OutputRow { length, features, residual });
            }
        }
        rows.sort_by_key(|row| std::cmp::Reverse(row.length));
        rows
    }

    /// The gradient of half the squared error, summed over a chunk's rows.
    pub(super) fn gradient(&self, chunk: &Chunk) -> Self {
        let width = chunk.scores.ncols();
        let hidden = self.hidden(chunk);
        let scales = self.scales(chunk);
        let scaled = &hidden * &scales;
        let error = self.output(chunk, &scaled) - &chunk.probabilities;
        let d_scaled = error.dot(&self.w2.slice(s![.., ..width]).t());
        let d_scales = &d_scaled * &hidden;
        let d_hidden = d_scaled * &scales * &hidden.mapv(|v| if v > 0.0 { 1.0 } else { 0.0 });
        let mut gradient = self.zeros();
        product(chunk.scores.t(), d_hidden.view(), gradient.w1.slice_mut(s![..width, ..]));
        product(scaled.t(), error.view(), gradient.w2.slice_mut(s![.., ..width]));
        product(chunk.features.t(), d_hidden.view(), gradient.b1.view_mut());
        product(chunk.features_over_length.t(), error.view(), gradient.b2.slice_mut(s![.., ..width]));
        if self.scale_is_fitted {
            product(chunk.features_over_length.t(), d_scales.view(), gradient.scale.view_mut());
        }
        gradient
    }

    /// As many zeros.
    pub(super) fn zeros(&self) -> Self {
        let zeros = |m: &Array2<f32>| Array2::zeros(m.dim());
        Self {
            w1: zeros(&self.w1),
            w2: zeros(&self.w2),
            b1: zeros(&self.b1),
            scale: zeros(&self.scale),
            b2: zeros(&self.b2),
            scale_is_fitted: self.scale_is_fitted,
        }
    }

    pub(super) fn parameters_mut(&mut self) -> [&mut Array2<f32>; 5] {
        [&mut self.w1, &mut self.w2, &mut self.b1, &mut self.scale, &mut self.b2]
    }
}

/// What the output layer is given for one row, and what it misses.
struct OutputRow {
    length: usize,
    /// `[h + K]`.
    features: Array1<f32>,
    /// A number a key; the row's chunk may have fewer keys than there are.
    residual: Array1<f32>,
}

/// Sums over the rows that have a key, as keys go from the last to the first.
struct KeySums<'r> {
    /// `[h + K, h + K]`.
    gram: Mat<f64>,
    /// `[h + K, n]`.
    cross: Mat<f64>,
    /// Rows that are too short so far.
    rest: &'r [OutputRow],
}

impl KeySums<'_> {
    /// Adds the rows that have `key` but not the keys after it; returns the Gram matrix of all that have it.
    fn gram_of(&mut self, key: usize) -> Mat<f64> {
        let (width, n) = (self.cross.nrows(), self.cross.ncols());
        let (rows, shorter) = self.rest.split_at(self.rest.partition_point(|row| row.length > key));
        self.rest = shorter;
        if !rows.is_empty() {
            let f = Mat::from_fn(rows.len(), width, |i, j| f64::from(rows[i].features[j]));
            let r = Mat::from_fn(rows.len(), n, |i, j| rows[i].residual.get(j).map_or(0.0, |v| f64::from(*v)));
            self.gram += f.transpose() * &f;
            self.cross += f.transpose() * &r;
        }
        self.gram.clone()
    }

    /// What is added to a key's output weights, `[h + K, 1]`. Shorter rows that were added since miss nothing at the key.
    fn solve(&self, key: usize, mut gram: Mat<f64>) -> Option<Mat<f64>> {
        let width = gram.nrows();
        let ridge = RIDGE * (0..width).map(|i| gram[(i, i)]).sum::<f64>() / width as f64;
        if ridge <= 0.0 || !ridge.is_finite() {
            return None;
        }
        (0..width).for_each(|i| gram[(i, i)] += ridge);
        let right = Mat::from_fn(width, 1, |i, _| self.cross[(i, key)]);
        gram.llt(Side::Lower).ok().map(|factor| factor.solve(&right))
    }
}

fn product(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>, mut into: ArrayViewMut2<'_, f32>) {
    general_mat_mul(1.0, &a, &b, 0.0, &mut into);
}

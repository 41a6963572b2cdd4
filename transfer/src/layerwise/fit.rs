//! Fits an approximator to probabilities: `P = (scale[len] * relu((S m) W1 + b1[len]) W2 + b2[len]) m`.
//!
//! It starts from one hinge a key, with the output layer solved for; Adam then moves all parameters to lower the mean
//! over queries of the summed squared error over real keys; last, the output layer is solved for once more. Rows are
//! sorted by length and cut to it, so short sentences cost little.

use faer::linalg::solvers::Solve as _;
use faer::{Mat, Side};
use mabert_graph::{Model, Tensor};
use mabert_passes::lower::{Approximator, ApproximatorOptions, LengthFeatures};
use ndarray::linalg::general_mat_mul;
use ndarray::{Array1, Array2, ArrayView2, ArrayViewMut2, Axis, concatenate, s};
use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use rayon::prelude::*;

/// Rows of one gradient computation; of similar length.
const CHUNK: usize = 64;
/// Chunks of one step; of any lengths.
const CHUNKS_A_STEP: usize = 4;
const LEARNING_RATE: f32 = 5e-3;
/// The output layer's ridge, as a part of the mean diagonal.
const RIDGE: f64 = 1e-4;

/// Rows of scores with the probabilities that they should give, one head's or several heads'.
#[derive(Clone, Debug, Default)]
pub(super) struct Rows {
    /// Real tokens of the sentence of each row.
    pub(super) lengths: Vec<usize>,
    /// As many scores a row as its length.
    pub(super) scores: Vec<f32>,
    /// As many probabilities.
    pub(super) probabilities: Vec<f32>,
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
}

/// The parameters of one group.
#[derive(Clone)]
pub(super) struct Net {
    w1: Array2<f32>,
    w2: Array2<f32>,
    b1: Array2<f32>,
    scale: Array2<f32>,
    b2: Array2<f32>,
}

/// Rows of similar length side by side.
struct Chunk {
    /// `[rows, longest]`, zero beyond each row's length.
    scores: Array2<f32>,
    probabilities: Array2<f32>,
    /// 1 for real keys.
    mask: Array2<f32>,
    /// `[rows, K]`.
    plain: Array2<f32>,
    /// `[rows, K]`: those divided by the length, in `units`.
    over_length: Array2<f32>,
    lengths: Vec<usize>,
}

/// Fits one group; `relative_error` is that of the probabilities, as in [`SiteError`](super::SiteError).
pub(super) fn fit(rows: &Rows, options: &ApproximatorOptions, steps: usize, seed: u64) -> (Net, f64) {
    let features = LengthFeatures::new(options);
    let (chunks, spread) = chunks(rows, options, &features);
    let mut net = Net::start(options, &features, seed);
    if chunks.is_empty() {
        return (net, f64::NAN);
    }
    net.solve_output(&chunks);
    let before = error(&net, &chunks);
    let mut trained = net.clone();
    train(&mut trained, &chunks, options, steps, seed);
    trained.solve_output(&chunks);
    let after = error(&trained, &chunks);
    // Training can only be worth it: where it is not, the solved start stands.
    let (mut best, error) = if after.is_finite() && after < before { (trained, after) } else { (net, before) };
    best.w1 /= spread;
    let units = units(options, &features).insert_axis(Axis(1));
    best.scale *= &units;
    best.b2 *= &units;
    (best, error)
}

/// Sorts rows by length into chunks, scores in units of their root mean square, which is returned too.
fn chunks(rows: &Rows, options: &ApproximatorOptions, features: &LengthFeatures) -> (Vec<Chunk>, f32) {
    let starts: Vec<usize> = rows
        .lengths
        .iter()
        .scan(0, |at, &length| {
            *at += length;
            Some(*at - length)
        })
        .collect();
    let square: f64 = rows.scores.iter().map(|&s| f64::from(s).powi(2)).sum();
    let spread = ((square / rows.scores.len().max(1) as f64).sqrt() as f32).max(1e-3);
    // With length tables, the first knot is that of one token alone, and exact from the start: there is nothing to fit.
    let shortest = if options.length_tables { 2 } else { 1 };
    let mut order: Vec<usize> = (0..rows.lengths.len()).filter(|&row| rows.lengths[row] >= shortest).collect();
    order.sort_by_key(|&row| rows.lengths[row]);
    let units = units(options, features);
    let chunk = |of: &[usize]| {
        let lengths: Vec<usize> = of.iter().map(|&row| rows.lengths[row]).collect();
        let longest = lengths.iter().copied().max().unwrap_or(1);
        let cut = |from: &[f32], unit: f32| {
            let at = |i: usize, j: usize| if j < lengths[i] { from[starts[of[i]] + j] / unit } else { 0.0 };
            Array2::from_shape_fn((of.len(), longest), |(i, j)| at(i, j))
        };
        let table = |divide: bool| {
            let mut table = Array2::zeros((of.len(), features.knots.len()));
            for (mut row, &length) in table.rows_mut().into_iter().zip(&lengths) {
                row.assign(&Array1::from(features.at(length)));
                if divide && options.length_tables {
                    row *= &(&units / length as f32);
                }
            }
            table
        };
        Chunk {
            scores: cut(&rows.scores, spread),
            probabilities: cut(&rows.probabilities, 1.0),
            mask: Array2::from_shape_fn((of.len(), longest), |(i, j)| if j < lengths[i] { 1.0 } else { 0.0 }),
            plain: table(false),
            over_length: table(true),
            lengths,
        }
    };
    (order.chunks(CHUNK).map(chunk).collect(), spread)
}

/// What the rows of `scale` and `b2` are counted in while they are fitted, `[K]`: their knots' lengths, by which they will
/// be divided. So equal rows mean the same function at every length, which is where training starts from: most heads
/// change little with the length, and those that spread their attention evenly are solved for.
fn units(options: &ApproximatorOptions, features: &LengthFeatures) -> Array1<f32> {
    let unit = |&knot: &usize| if options.length_tables { knot as f32 } else { 1.0 };
    features.knots.iter().map(unit).collect()
}

impl Net {
    /// One hinge a key, or several keys a hinge where there are fewer: `relu(s + 1)`, then `relu(s - 1)`.
    fn start(options: &ApproximatorOptions, features: &LengthFeatures, seed: u64) -> Self {
        let (n, h, knots) = (options.max_seq, options.hidden, features.knots.len());
        let units = units(options, features);
        let mut rng = StdRng::seed_from_u64(seed);
        let mut w1 = Array2::from_shape_fn((n, h), |_| rng.random_range(-0.02f32..0.02));
        for (i, mut row) in w1.rows_mut().into_iter().enumerate() {
            (0..h).filter(|j| i % h == *j || j % n == i).for_each(|j| row[j] += 1.0);
        }
        let hinge = |j: usize| if (j / n).is_multiple_of(2) { 1.0 } else { -1.0 };
        Self {
            w1,
            w2: Array2::zeros((h, n)),
            b1: Array2::from_shape_fn((knots, h), |(_, j)| hinge(j)),
            scale: Array2::from_shape_fn((knots, h), |(k, _)| if k == 0 && options.length_tables { 0.0 } else { 1.0 }),
            b2: Array2::from_shape_fn((knots, n), |(knot, _)| 1.0 / units[knot]),
        }
    }

    fn hidden(&self, chunk: &Chunk) -> Array2<f32> {
        let mut hidden = chunk.plain.dot(&self.b1);
        let width = chunk.scores.ncols();
        general_mat_mul(1.0, &chunk.scores, &self.w1.slice(s![..width, ..]), 1.0, &mut hidden);
        hidden.mapv_inplace(|v| v.max(0.0));
        hidden
    }

    /// `[rows, h]`: the rows of `scale`; ones without length tables, where it is not a parameter.
    fn scales(&self, chunk: &Chunk) -> Array2<f32> {
        chunk.over_length.dot(&self.scale)
    }

    fn output(&self, chunk: &Chunk, scaled: &Array2<f32>) -> Array2<f32> {
        let width = chunk.scores.ncols();
        let mut output = chunk.over_length.dot(&self.b2.slice(s![.., ..width]));
        general_mat_mul(1.0, scaled, &self.w2.slice(s![.., ..width]), 1.0, &mut output);
        output * &chunk.mask
    }

    /// Solves for `W2` and `b2`, least squares with a ridge towards what they are. A key takes part in the rows that
    /// are long enough to have it, so each has a Gram matrix of its own; they only grow from the last key to the first.
    fn solve_output(&mut self, chunks: &[Chunk]) {
        let (h, n, k) = (self.w2.nrows(), self.w2.ncols(), self.b2.nrows());
        let width = h + k;
        // Features and residuals of all rows, longest sentences first.
        let mut rows: Vec<(usize, Array1<f32>, Array1<f32>)> = Vec::new();
        for chunk in chunks {
            let scaled = self.hidden(chunk) * self.scales(chunk);
            let residual = &chunk.probabilities - &self.output(chunk, &scaled);
            let features = concatenate(Axis(1), &[scaled.view(), chunk.over_length.view()]).expect("same rows");
            for (i, &length) in chunk.lengths.iter().enumerate() {
                rows.push((length, features.row(i).to_owned(), residual.row(i).to_owned()));
            }
        }
        rows.sort_by_key(|(length, ..)| std::cmp::Reverse(*length));
        let mut gram = Mat::<f64>::zeros(width, width);
        let mut cross = Mat::<f64>::zeros(width, n);
        let mut rest = rows.as_slice();
        let mut change = Array2::<f64>::zeros((width, n));
        let keys: Vec<usize> = (0..n).rev().collect();
        // A Gram matrix a key is held for a few keys only.
        for some in keys.chunks(2 * rayon::current_num_threads()) {
            let mut grams: Vec<(usize, Mat<f64>)> = Vec::new();
            for &key in some {
                let (block, shorter) = rest.split_at(rest.partition_point(|(length, ..)| *length > key));
                rest = shorter;
                if !block.is_empty() {
                    let f = Mat::from_fn(block.len(), width, |i, j| f64::from(block[i].1[j]));
                    let r = Mat::from_fn(block.len(), n, |i, j| block[i].2.get(j).map_or(0.0, |v| f64::from(*v)));
                    gram += f.transpose() * &f;
                    cross += f.transpose() * &r;
                }
                grams.push((key, gram.clone()));
            }
            let solve = |(key, mut gram): (usize, Mat<f64>)| {
                let ridge = RIDGE * (0..width).map(|i| gram[(i, i)]).sum::<f64>() / width as f64;
                if ridge <= 0.0 || !ridge.is_finite() {
                    return (key, None);
                }
                (0..width).for_each(|i| gram[(i, i)] += ridge);
                let right = Mat::from_fn(width, 1, |i, _| cross[(i, key)]);
                (key, gram.llt(Side::Lower).ok().map(|factor| factor.solve(&right)))
            };
            let results: Vec<(usize, Option<Mat<f64>>)> = grams.into_par_iter().map(solve).collect();
            for (key, solution) in results {
                if let Some(solution) = solution {
                    (0..width).for_each(|i| change[[i, key]] = solution[(i, 0)]);
                }
            }
        }
        let narrow = change.mapv(|v| v as f32);
        self.w2 += &narrow.slice(s![..h, ..]);
        self.b2 += &narrow.slice(s![h.., ..]);
    }

    /// The gradient of half the squared error, summed over a chunk's rows.
    fn backward(&self, chunk: &Chunk, length_tables: bool) -> Net {
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
        product(chunk.plain.t(), d_hidden.view(), gradient.b1.view_mut());
        product(chunk.over_length.t(), error.view(), gradient.b2.slice_mut(s![.., ..width]));
        if length_tables {
            product(chunk.over_length.t(), d_scales.view(), gradient.scale.view_mut());
        }
        gradient
    }

    fn zeros(&self) -> Self {
        let zeros = |m: &Array2<f32>| Array2::zeros(m.dim());
        Self {
            w1: zeros(&self.w1),
            w2: zeros(&self.w2),
            b1: zeros(&self.b1),
            scale: zeros(&self.scale),
            b2: zeros(&self.b2),
        }
    }

    fn parameters(&mut self) -> [&mut Array2<f32>; 5] {
        [&mut self.w1, &mut self.w2, &mut self.b1, &mut self.scale, &mut self.b2]
    }
}

fn product(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>, mut into: ArrayViewMut2<'_, f32>) {
    general_mat_mul(1.0, &a, &b, 0.0, &mut into);
}

/// Adam (Kingma & Ba 2015) with a rate that decays to nothing as a cosine.
fn train(net: &mut Net, chunks: &[Chunk], options: &ApproximatorOptions, steps: usize, seed: u64) {
    const DECAY: (f32, f32) = (0.9, 0.98);
    let mut rng = StdRng::seed_from_u64(seed ^ 0xada);
    let (mut first, mut second) = (net.zeros(), net.zeros());
    let mut order: Vec<usize> = Vec::new();
    for step in 0..steps {
        while order.len() < CHUNKS_A_STEP {
            let mut round: Vec<usize> = (0..chunks.len()).collect();
            round.shuffle(&mut rng);
            order.append(&mut round);
        }
        let chosen: Vec<usize> = order.drain(..CHUNKS_A_STEP).collect();
        let parts: Vec<Net> = chosen.par_iter().map(|&c| net.backward(&chunks[c], options.length_tables)).collect();
        let mut gradient = net.zeros();
        for mut part in parts {
            for (sum, add) in gradient.parameters().into_iter().zip(part.parameters()) {
                *sum += &*add;
            }
        }
        let rate = LEARNING_RATE * 0.5 * (1.0 + (std::f32::consts::PI * step as f32 / steps as f32).cos());
        let correct = |decay: f32| 1.0 - decay.powi(step as i32 + 1);
        let (c1, c2) = (correct(DECAY.0), correct(DECAY.1));
        let all =
            net.parameters().into_iter().zip(gradient.parameters()).zip(first.parameters()).zip(second.parameters());
        for (((p, g), m), v) in all {
            ndarray::Zip::from(p).and(g).and(m).and(v).for_each(|p, g, m, v| {
                *m = DECAY.0 * *m + (1.0 - DECAY.0) * *g;
                *v = DECAY.1 * *v + (1.0 - DECAY.1) * *g * *g;
                *p -= rate * (*m / c1) / ((*v / c2).sqrt() + 1e-10);
            });
        }
    }
}

/// The relative error of the probabilities, against even attention as the constant.
fn error(net: &Net, chunks: &[Chunk]) -> f64 {
    let of = |chunk: &Chunk| {
        let scaled = net.hidden(chunk) * net.scales(chunk);
        let error = net.output(chunk, &scaled) - &chunk.probabilities;
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
        chunks.par_iter().map(of).collect::<Vec<_>>().into_iter().fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
    (missed / spread.max(f64::MIN_POSITIVE)).sqrt()
}

/// Writes the groups' parameters where the graph has them.
pub(super) fn store(model: &mut Model, approximator: &Approximator, options: &ApproximatorOptions, nets: &[Net]) {
    let stack = |part: fn(&Net) -> &Array2<f32>, axis: usize| {
        let views: Vec<_> = nets.iter().map(|n| part(n).view()).collect();
        let joined = if axis == 0 {
            ndarray::stack(Axis(0), &views).expect("groups of one shape").into_dyn()
        } else {
            concatenate(Axis(1), &views).expect("groups of one shape").into_dyn()
        };
        Tensor::from(joined.as_standard_layout().into_owned())
    };
    model.set_constant(&approximator.w1, &stack(|n| &n.w1, 0));
    model.set_constant(&approximator.w2, &stack(|n| &n.w2, 0));
    model.set_constant(&approximator.b1, &stack(|n| &n.b1, 1));
    model.set_constant(&approximator.b2, &stack(|n| &n.b2, 1));
    if options.length_tables {
        model.set_constant(&approximator.scale, &stack(|n| &n.scale, 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mabert_passes::lower::Sharing;

    /// Rows of random scores at lengths 1 to 16, with the probabilities that `of` gives key `j` of so many.
    fn rows(of: impl Fn(usize, usize) -> f32) -> Rows {
        let mut rng = StdRng::seed_from_u64(3);
        let mut rows = Rows::default();
        for row in 0..800 {
            let length = 1 + row % 16;
            let scores: Vec<f32> = (0..length).map(|_| rng.random_range(-2.0..2.0)).collect();
            rows.push(&scores, &(0..length).map(|j| of(j, length)).collect::<Vec<_>>());
        }
        rows
    }

    #[test]
    fn heads_that_look_at_one_key_or_at_all_alike_are_solved_for_at_every_length() {
        let sharing = Sharing::PerHead;
        let options = ApproximatorOptions { max_seq: 16, hidden: 16, sharing, length_tables: true };
        let first = rows(|key, _| if key == 0 { 1.0 } else { 0.0 });
        let halves = rows(|key, length| 0.5 / length as f32 + if key == 0 { 0.5 } else { 0.0 });
        for rows in [first, halves] {
            let (_, error) = fit(&rows, &options, 0, 1);
            assert!(error < 0.02, "{error}");
        }
    }
}

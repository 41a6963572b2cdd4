//! One head's hinges: what they make of rows of scores, and the gradient of that. The formula is that of
//! [`HingeParameters`](mabert_passes::lower::HingeParameters).

use mabert_passes::lower::{HingeSizes, LengthFeatures};
use ndarray::{Array1, Array2, ArrayD, ArrayView1, ArrayView2, Axis, Ix2, Ix3, concatenate, s, stack};

/// One head's parameters.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Hinges {
    pub(crate) sizes: HingeSizes,
    /// `[1, R]`.
    pub(crate) statistics: Array2<f32>,
    /// `[X, hidden]`.
    pub(crate) w1: Array2<f32>,
    /// `[K, hidden]`.
    pub(crate) b1: Array2<f32>,
    /// `[hidden + X, T]`.
    pub(crate) w2: Array2<f32>,
    /// `[K, T]`.
    pub(crate) b2: Array2<f32>,
    /// `[K, G]`.
    pub(crate) weight: Array2<f32>,
    /// `[K, 1]`.
    pub(crate) even: Array2<f32>,
}

/// What hinges make of rows of scores.
pub(crate) struct Pass {
    /// `[rows, X]`.
    features: Array2<f32>,
    /// `[rows, hidden + X]`.
    inner: Array2<f32>,
    /// `[rows, T]`.
    pub(crate) thresholds: Array2<f32>,
    /// What each hinge counts, `[G]`.
    weights: Array1<f32>,
    /// `[rows, len]`.
    pub(crate) probabilities: Array2<f32>,
}

impl Hinges {
    pub(crate) fn zeros(&self) -> Self {
        let mut zeros = self.clone();
        zeros.parameters_mut().into_iter().for_each(|parameter| parameter.fill(0.0));
        zeros
    }

    pub(crate) fn parameters_mut(&mut self) -> [&mut Array2<f32>; 7] {
        [&mut self.statistics, &mut self.w1, &mut self.b1, &mut self.w2, &mut self.b2, &mut self.weight, &mut self.even]
    }

    /// What is known of each row, `[rows, X]`.
    fn features(&self, scores: ArrayView2<'_, f32>) -> Array2<f32> {
        let (r, length) = (self.sizes.statistics, scores.ncols());
        let mut features = Array2::zeros((scores.nrows(), self.sizes.features()));
        for (row, mut into) in scores.rows().into_iter().zip(features.rows_mut()) {
            let row = elements(row);
            for (at, &threshold) in self.statistics.iter().enumerate() {
                into[at] = sum_pairs(row, row, |score, _| (score - threshold).max(0.0)) / length as f32;
            }
            (into[r], into[r + 1]) = (row[0], row[length - 1]);
        }
        features
    }

    /// What hinges make of `scores` `[rows, len]`, two tokens or more, from their row's mean; `at` are the length's
    /// features, `[1, K]`.
    pub(crate) fn pass(&self, scores: ArrayView2<'_, f32>, at: &Array2<f32>) -> Pass {
        let (g, length) = (self.sizes.hinges, scores.ncols());
        let features = self.features(scores);
        let hidden = (features.dot(&self.w1) + at.dot(&self.b1)).mapv_into(|v| v.max(0.0));
        let inner = concatenate(Axis(1), &[hidden.view(), features.view()]).expect("same rows");
        let thresholds = inner.dot(&self.w2) + at.dot(&self.b2);
        let weights = at.dot(&self.weight).row(0).mapv(|v| v / length as f32);
        let even = at.dot(&self.even)[[0, 0]] / length as f32;
        let mut probabilities = Array2::from_elem(scores.dim(), even);
        let rows = scores.rows().into_iter().zip(thresholds.rows());
        for ((scores, thresholds), mut into) in rows.zip(probabilities.rows_mut()) {
            for (weight, threshold) in weights.iter().zip(thresholds) {
                ndarray::Zip::from(&mut into).and(scores).for_each(|p, s| *p += weight * (s - threshold).max(0.0));
            }
            into[0] += thresholds[g].max(0.0);
            into[length - 1] += thresholds[g + 1].max(0.0);
        }
        Pass { features, inner, thresholds, weights, probabilities }
    }

    /// Adds what `d_probabilities` `[rows, len]`, the gradient of the probabilities, makes of the parameters' to `sum`.
    /// Returns the gradient of what is known of each row, `[rows, X]`.
    pub(crate) fn add_gradient(
        &self,
        scores: ArrayView2<'_, f32>,
        at: &Array2<f32>,
        pass: &Pass,
        d_probabilities: ArrayView2<'_, f32>,
        sum: &mut Self,
    ) -> Array2<f32> {
        let Pass { features, inner, .. } = pass;
        let (length, hidden) = (scores.ncols() as f32, self.sizes.hidden);
        let (d_thresholds, d_weights) = self.thresholds_gradient(scores, pass, d_probabilities);
        let d_inner = d_thresholds.dot(&self.w2.t());
        let is_active = inner.slice(s![.., ..hidden]).mapv(|v| if v > 0.0 { 1f32 } else { 0.0 });
        let d_hidden = &d_inner.slice(s![.., ..hidden]) * &is_active;
        let d_features = &d_inner.slice(s![.., hidden..]) + &d_hidden.dot(&self.w1.t());
        sum.w2 += &inner.t().dot(&d_thresholds);
        sum.w1 += &features.t().dot(&d_hidden);
        let by_length = |d: ArrayView2<'_, f32>| at.t().dot(&d.sum_axis(Axis(0)).insert_axis(Axis(0)));
        sum.b2 += &by_length(d_thresholds.view());
        sum.b1 += &by_length(d_hidden.view());
        sum.weight += &at.t().dot(&d_weights);
        sum.even += &(at.t().to_owned() * (d_probabilities.sum() / length));
        for (r, &threshold) in self.statistics.iter().enumerate() {
            let rows = scores.rows().into_iter().map(elements);
            let slopes = rows
                .zip(d_features.column(r))
                .map(|(row, d)| d * sum_pairs(row, row, |score, _| if score > threshold { 1.0 } else { 0.0 }));
            sum.statistics[[0, r]] -= slopes.sum::<f32>() / length;
        }
        d_features
    }

    /// The gradients of thresholds and sinks, `[rows, T]`, and of what hinges count, `[1, G]`.
    fn thresholds_gradient(
        &self,
        scores: ArrayView2<'_, f32>,
        pass: &Pass,
        d_probabilities: ArrayView2<'_, f32>,
    ) -> (Array2<f32>, Array2<f32>) {
        let (g, length) = (self.sizes.hinges, scores.ncols());
        let mut d_thresholds = Array2::<f32>::zeros(pass.thresholds.dim());
        let mut d_weights = Array2::<f32>::zeros((1, g));
        let rows = scores.rows().into_iter().zip(d_probabilities.rows());
        for ((i, (scores, error)), thresholds) in rows.enumerate().zip(pass.thresholds.rows()) {
            let (scores, error) = (elements(scores), elements(error));
            for hinge in 0..g {
                let threshold = thresholds[hinge];
                let slope = sum_pairs(scores, error, |s, e| if s > threshold { e } else { 0.0 });
                let height = sum_pairs(scores, error, |s, e| e * (s - threshold).max(0.0));
                d_thresholds[[i, hinge]] = -pass.weights[hinge] * slope;
                d_weights[[0, hinge]] += height / length as f32;
            }
            for (sink, error) in [(g, error[0]), (g + 1, error[length - 1])] {
                d_thresholds[[i, sink]] = if thresholds[sink] > 0.0 { error } else { 0.0 };
            }
        }
        (d_thresholds, d_weights)
    }

    /// The gradient of `scores` before their row's mean was taken from them, `[rows, len]`, of that of the probabilities and
    /// what [`add_gradient`](Self::add_gradient) returns.
    pub(crate) fn scores_gradient(
        &self,
        scores: ArrayView2<'_, f32>,
        pass: &Pass,
        d_probabilities: ArrayView2<'_, f32>,
        d_features: &Array2<f32>,
    ) -> Array2<f32> {
        let (r, length) = (self.sizes.statistics, scores.ncols());
        let mut d_scores = Array2::<f32>::zeros(scores.dim());
        for (i, mut into) in d_scores.rows_mut().into_iter().enumerate() {
            let (scores, error, known) = (scores.row(i), d_probabilities.row(i), d_features.row(i));
            for (weight, &threshold) in pass.weights.iter().zip(pass.thresholds.row(i)) {
                ndarray::Zip::from(&mut into).and(scores).and(error).for_each(|d, s, e| {
                    *d += if *s > threshold { weight * e } else { 0.0 };
                });
            }
            for (&threshold, d) in self.statistics.iter().zip(known) {
                let slope = d / length as f32;
                ndarray::Zip::from(&mut into)
                    .and(scores)
                    .for_each(|d, s| *d += if *s > threshold { slope } else { 0.0 });
            }
            into[0] += known[r];
            into[length - 1] += known[r + 1];
            let row = into.as_slice().expect("rows are contiguous");
            let mean = sum_pairs(row, row, |d, _| d) / length as f32;
            into -= mean;
        }
        d_scores
    }

    /// The heads of a layer, of the values of its parameters in [`HingeParameters`](mabert_passes::lower::HingeParameters)'
    /// order.
    pub(crate) fn split(values: &[ArrayD<f32>], sizes: HingeSizes, heads: usize) -> Vec<Self> {
        let (statistics, others) = values.split_at(sizes.statistics);
        let [w1, b1, w2, b2, weight, even] = others else { unreachable!("six parameters besides the statistics") };
        let stacked = |value: &ArrayD<f32>, head: usize| {
            let heads = value.view().into_dimensionality::<Ix3>().expect("[H, .., ..]");
            heads.index_axis(Axis(0), head).to_owned()
        };
        let beside = |value: &ArrayD<f32>, head: usize| {
            let all = value.view().into_dimensionality::<Ix2>().expect("[K, H * ..]");
            let width = all.ncols() / heads;
            all.slice(s![.., head * width..(head + 1) * width]).to_owned()
        };
        let head = |head: usize| Self {
            sizes,
            statistics: Array2::from_shape_fn((1, sizes.statistics), |(_, r)| statistics[r][[head, 0, 0]]),
            w1: stacked(w1, head),
            b1: beside(b1, head),
            w2: stacked(w2, head),
            b2: beside(b2, head),
            weight: beside(weight, head),
            even: beside(even, head),
        };
        (0..heads).map(head).collect()
    }

    /// What [`split`](Self::split) takes apart.
    pub(crate) fn join(heads: &[Self]) -> Vec<ArrayD<f32>> {
        let views = |part: fn(&Self) -> &Array2<f32>| heads.iter().map(|h| part(h).view()).collect::<Vec<_>>();
        let stacked = |part| stack(Axis(0), &views(part)).expect("heads of one shape").into_dyn();
        let beside = |part| {
            let joined = concatenate(Axis(1), &views(part)).expect("heads of one shape");
            joined.as_standard_layout().into_owned().into_dyn()
        };
        let statistics = heads.first().map_or(0, |head| head.sizes.statistics);
        let statistic = |r: usize| {
            let of_heads: Array1<f32> = heads.iter().map(|head| head.statistics[[0, r]]).collect();
            of_heads.insert_axis(Axis(1)).insert_axis(Axis(2)).into_dyn()
        };
        let others = [
            stacked(|h| &h.w1),
            beside(|h| &h.b1),
            stacked(|h| &h.w2),
            beside(|h| &h.b2),
            beside(|h| &h.weight),
            beside(|h| &h.even),
        ];
        (0..statistics).map(statistic).chain(others).collect()
    }
}

/// The features of one length, `[1, K]`.
pub(crate) fn features_at(lengths: &LengthFeatures, length: usize) -> Array2<f32> {
    Array1::from(lengths.at(length)).insert_axis(Axis(0))
}

/// Takes their mean from all scores of each row `[rows, len]`.
pub(crate) fn centre_rows(scores: &mut Array2<f32>) {
    for mut row in scores.rows_mut() {
        let values = row.as_slice().expect("rows are contiguous");
        let mean = sum_pairs(values, values, |score, _| score) / values.len() as f32;
        row -= mean;
    }
}

fn elements(row: ArrayView1<'_, f32>) -> &[f32] {
    row.to_slice().expect("rows are contiguous")
}

/// The sum of `f` over pairs, in as many parts as a vector has numbers: one sum alone would wait for itself.
fn sum_pairs(x: &[f32], y: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    const LANES: usize = 16;
    let mut lanes = [0f32; LANES];
    let (xs, ys) = (x.chunks_exact(LANES), y.chunks_exact(LANES));
    let rest: f32 = xs.remainder().iter().zip(ys.remainder()).map(|(x, y)| f(*x, *y)).sum();
    for (x, y) in xs.zip(ys) {
        lanes.iter_mut().zip(x.iter().zip(y)).for_each(|(lane, (x, y))| *lane += f(*x, *y));
    }
    lanes.iter().sum::<f32>() + rest
}

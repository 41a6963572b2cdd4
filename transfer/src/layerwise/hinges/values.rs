//! The fit of one head's hinges: where they start, how far they are from a sample, the gradient of that, and what can be
//! solved for. Scores are in units of the head's spread.

use faer::linalg::solvers::Solve as _;
use faer::{Mat, Side};
use mabert_passes::lower::{HingeSizes, LengthFeatures};
use ndarray::linalg::general_mat_mul;
use ndarray::{Array1, Array2, Axis, concatenate, s};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::samples::Sample;
use crate::hinges::{Hinges, features_at};

/// What the relative squared error of the probabilities counts beside that of the contexts. Probabilities alone would be
/// all about the few keys that have most of them.
const PROBABILITIES: f32 = 0.3;
/// The ridge of what is solved for, as a part of the mean diagonal.
const RIDGE: f64 = 1e-4;
/// What a sink gets at first; below zero it would get no gradient.
const SINK: f32 = 0.05;

/// What squared errors are divided by: the mean over rows of what there is to miss.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scale {
    pub(super) probabilities: f32,
    pub(super) contexts: f32,
}

impl Hinges {
    /// Hinges at the row's mean and above it, so that a row of scores spread as a Gaussian sums to 1.
    pub(super) fn start(sizes: HingeSizes, knots: usize, seed: u64) -> Self {
        let HingeSizes { hinges, hidden, .. } = sizes;
        let mut rng = StdRng::seed_from_u64(seed);
        let mut random = |shape: (usize, usize), size: f32| {
            Array2::from_shape_fn(shape, |_| size * (rng.random_range(-1f32..1.0) + rng.random_range(-1f32..1.0)))
        };
        let w1 = random((sizes.features(), hidden), 0.3);
        let mut w2 = random((hidden + sizes.features(), sizes.thresholds()), 0.1);
        w2.slice_mut(s![hidden.., ..]).fill(0.0);
        let threshold = |t: usize| if t < hinges { t as f32 } else { SINK };
        let weight = |g: usize| 1.0 / (hinges as f32 * mean_above(g as f32));
        Self {
            sizes,
            statistics: Array2::from_shape_fn((1, sizes.statistics), |(_, r)| r as f32),
            w1,
            b1: Array2::zeros((knots, hidden)),
            w2,
            b2: Array2::from_shape_fn((knots, sizes.thresholds()), |(_, t)| threshold(t)),
            // The first knot is that of one token alone.
            weight: Array2::from_shape_fn((knots, hinges), |(k, g)| if k == 0 { 0.0 } else { weight(g) }),
            even: Array2::from_shape_fn((knots, 1), |(k, _)| if k == 0 { 1.0 } else { 0.0 }),
        }
    }

    /// The weighted sum of squared errors of probabilities and of contexts.
    pub(super) fn error(&self, sample: &Sample, at: &Array2<f32>) -> [f64; 2] {
        let missed = self.pass(sample.scores.view(), at).probabilities - &sample.probabilities;
        let contexts = missed.dot(&sample.values);
        [missed, contexts].map(|missed| {
            let rows = missed.rows().into_iter().zip(&sample.weights);
            rows.map(|(row, weight)| f64::from(weight * row.dot(&row))).sum()
        })
    }

    /// Adds the gradient of half the weighted squared errors over `scale` to `sum`.
    pub(super) fn add_error_gradient(&self, sample: &Sample, at: &Array2<f32>, scale: Scale, sum: &mut Self) {
        let scores = sample.scores.view();
        let pass = self.pass(scores, at);
        let missed = &pass.probabilities - &sample.probabilities;
        let contexts = missed.dot(&sample.values);
        let mut error = missed * (PROBABILITIES / scale.probabilities);
        general_mat_mul(1.0 / scale.contexts, &contexts, &sample.values.t(), 1.0, &mut error);
        error.rows_mut().into_iter().zip(&sample.weights).for_each(|(mut row, weight)| row *= *weight);
        self.add_gradient(scores, at, &pass, error.view(), sum);
    }

    /// Solves for `weight` and `even`, least squares with a ridge towards what they are.
    pub(super) fn solve(&mut self, samples: &[Sample], lengths: &LengthFeatures, scale: Scale) {
        let (k, g) = (self.weight.nrows(), self.sizes.hinges);
        let size = k * (g + 1);
        let (mut gram, mut right) = (Mat::<f64>::zeros(size, size), Mat::<f64>::zeros(size, 1));
        for sample in samples {
            let at = features_at(lengths, sample.length());
            let (products, missed) = self.bases(sample, &at, scale);
            for (i, j) in (0..size).flat_map(|i| (0..=i).map(move |j| (i, j))) {
                let knots = f64::from(at[[0, i / (g + 1)]] * at[[0, j / (g + 1)]]);
                if knots != 0.0 {
                    gram[(i, j)] += knots * products[[i % (g + 1), j % (g + 1)]];
                }
            }
            (0..size).for_each(|i| right[(i, 0)] += f64::from(at[[0, i / (g + 1)]]) * missed[i % (g + 1)]);
        }
        let ridge = RIDGE * (0..size).map(|i| gram[(i, i)]).sum::<f64>() / size as f64;
        if ridge <= 0.0 || !ridge.is_finite() {
            return;
        }
        (0..size).for_each(|i| gram[(i, i)] += ridge);
        let Ok(factor) = gram.llt(Side::Lower) else { return };
        let change = factor.solve(&right);
        // The first knot is exact as it is.
        for i in g + 1..size {
            let (knot, base) = (i / (g + 1), i % (g + 1));
            let value = if base < g { &mut self.weight[[knot, base]] } else { &mut self.even[[knot, 0]] };
            *value += change[(i, 0)] as f32;
        }
    }

    /// Products of what hinges and even attention give for a sample with each other, `[G + 1, G + 1]`, and with what is
    /// missed, `[G + 1]`.
    fn bases(&self, sample: &Sample, at: &Array2<f32>, scale: Scale) -> (Array2<f64>, Array1<f64>) {
        let (g, length) = (self.sizes.hinges, sample.length() as f32);
        let pass = self.pass(sample.scores.view(), at);
        let missed = &sample.probabilities - &pass.probabilities;
        let base = |base: usize| {
            let mut values = Array2::from_elem(sample.scores.dim(), 1.0 / length);
            if base < g {
                let rows = values.rows_mut().into_iter().zip(sample.scores.rows());
                for ((mut into, scores), threshold) in rows.zip(pass.thresholds.column(base)) {
                    into.assign(&scores.mapv(|s| (s - threshold).max(0.0) / length));
                }
            }
            values
        };
        let mut all: Vec<Array2<f32>> = (0..=g).map(base).chain([missed]).collect();
        // One row of numbers each, of probabilities and contexts, as much as they count.
        for values in &mut all {
            let mut contexts = values.dot(&sample.values) / scale.contexts.sqrt();
            *values *= (PROBABILITIES / scale.probabilities).sqrt();
            for (i, weight) in sample.weights.iter().enumerate() {
                contexts.row_mut(i).mapv_inplace(|v| v * weight.sqrt());
                values.row_mut(i).mapv_inplace(|v| v * weight.sqrt());
            }
            *values = concatenate(Axis(1), &[values.view(), contexts.view()]).expect("same rows");
        }
        let product = |a: usize, b: usize| f64::from((&all[a] * &all[b]).sum());
        let products = Array2::from_shape_fn((g + 1, g + 1), |(a, b)| product(a, b));
        (products, Array1::from_shape_fn(g + 1, |a| product(a, g + 1)))
    }
}

/// The mean of `max(x - threshold, 0)` for a Gaussian `x`, to two digits: `phi(t) - t (1 - Phi(t))`, where the tail is that of
/// the logistic function.
fn mean_above(threshold: f32) -> f32 {
    let density = (-0.5 * threshold * threshold).exp() / std::f32::consts::TAU.sqrt();
    let tail = 1.0 / (1.0 + (1.702 * threshold).exp());
    (density - threshold * tail).max(0.02)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(length: usize, seed: u64) -> Sample {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut random = |rows, columns| Array2::from_shape_fn((rows, columns), |_| rng.random_range(-1.5f32..1.5));
        let mut scores = random(3, length);
        scores.rows_mut().into_iter().for_each(|mut row| row -= row.mean().unwrap());
        let probabilities = scores.mapv(f32::exp);
        let probabilities = &probabilities / &probabilities.sum_axis(Axis(1)).insert_axis(Axis(1));
        Sample { scores, probabilities, values: random(length, 4), weights: vec![1.0, 0.5, 2.0] }
    }

    const SCALE: Scale = Scale { probabilities: 0.2, contexts: 0.7 };

    fn loss(hinges: &Hinges, sample: &Sample, at: &Array2<f32>) -> f64 {
        let [probabilities, contexts] = hinges.error(sample, at);
        let of_probabilities = f64::from(PROBABILITIES / SCALE.probabilities) * probabilities;
        0.5 * (of_probabilities + contexts / f64::from(SCALE.contexts))
    }

    #[test]
    fn the_gradient_is_that_of_the_error() {
        let lengths = LengthFeatures::new(12, 12);
        let sizes = HingeSizes { statistics: 2, hinges: 2, hidden: 4 };
        let hinges = Hinges::start(sizes, lengths.knots.len(), 5);
        let (sample, at) = (sample(7, 1), features_at(&lengths, 7));
        let mut gradient = hinges.zeros();
        hinges.add_error_gradient(&sample, &at, SCALE, &mut gradient);
        let mut checked = 0;
        for parameter in 0..7 {
            let count = hinges.clone().parameters_mut()[parameter].len();
            for element in (0..count).step_by(1 + count / 9) {
                let moved = |by: f32| {
                    let mut hinges = hinges.clone();
                    *hinges.parameters_mut()[parameter].iter_mut().nth(element).unwrap() += by;
                    loss(&hinges, &sample, &at)
                };
                let slope = (moved(1e-3) - moved(-1e-3)) / 2e-3;
                let found = f64::from(*gradient.parameters_mut()[parameter].iter().nth(element).unwrap());
                assert!((slope - found).abs() < 2e-3 + 0.02 * slope.abs(), "{parameter} {element}: {slope} {found}");
                checked += usize::from(slope.abs() > 1e-3);
            }
        }
        assert!(checked > 15, "{checked}");
    }

    #[test]
    fn what_is_solved_for_is_the_best_of_its_kind() {
        let lengths = LengthFeatures::new(12, 12);
        let mut hinges = Hinges::start(HingeSizes::default(), lengths.knots.len(), 5);
        let samples: Vec<Sample> = (0..40).map(|seed| sample(2 + seed as usize % 11, seed)).collect();
        let total = |hinges: &Hinges| -> f64 {
            samples.iter().map(|sample| loss(hinges, sample, &features_at(&lengths, sample.length()))).sum()
        };
        let before = total(&hinges);
        hinges.solve(&samples, &lengths, SCALE);
        let solved = total(&hinges);
        assert!(solved < 0.7 * before, "{before} {solved}");
        for (knot, by) in [(2, 0.1), (2, -0.1), (4, 0.1), (5, -0.1)] {
            let mut moved = hinges.clone();
            moved.weight[[knot, 0]] += by;
            assert!(total(&moved) > solved * 0.999);
        }
        assert_eq!((hinges.weight[[0, 0]], hinges.even[[0, 0]]), (0.0, 1.0));
    }
}

//! The fit of one head: from a closed-form start, Adam moves all parameters to lower the error of the contexts, with a part
//! for that of the probabilities; last, what can be solved for is solved for once more.

use mabert_graph::{Model, Tensor};
use mabert_passes::lower::{HingeParameters, HingeSizes, LengthFeatures};
use ndarray::{Array1, Array2, s};
use rand::{SeedableRng as _, rngs::StdRng};

use super::samples::Sample;
use super::values::Scale;
use crate::adam_step::Adam;
use crate::hinges::{Hinges, features_at};
use crate::schedule::{Rounds, cosine};

/// Sentences of one step.
const SAMPLES_A_STEP: usize = 16;
const LEARNING_RATE: f32 = 1e-2;
/// Gradients are scaled down to this norm.
const CLIP: f32 = 1.0;

/// Fits one head; returns the relative error of the contexts too, as in [`SiteError`](super::super::SiteError).
pub(in super::super) fn fit(
    mut samples: Vec<Sample>,
    sizes: HingeSizes,
    lengths: &LengthFeatures,
    steps: usize,
    seed: u64,
) -> (FittedHinges, f64) {
    let spread = in_units_of_spread(&mut samples);
    let mut best = Hinges::start(sizes, lengths.knots.len(), seed);
    if samples.is_empty() {
        return (FittedHinges { hinges: best, spread }, f64::NAN);
    }
    let scale = scale(&samples);
    best.solve(&samples, lengths, scale);
    let mut trained = best.clone();
    train(&mut trained, &samples, lengths, scale, steps, seed);
    trained.solve(&samples, lengths, scale);
    let [before, after] = [&best, &trained].map(|hinges| relative_error(hinges, &samples, lengths, scale));
    // Training can only be worth it: where it is not, the solved start stands.
    let is_gain = after.is_finite() && after < before;
    let (hinges, error) = if is_gain { (trained, after) } else { (best, before) };
    (FittedHinges { hinges, spread }, error)
}

/// One head's hinges, and what one of their units is in scores.
pub(in super::super) struct FittedHinges {
    hinges: Hinges,
    spread: f32,
}

/// Divides all scores by their root mean square, which is returned.
fn in_units_of_spread(samples: &mut [Sample]) -> f32 {
    let count: usize = samples.iter().map(|sample| sample.scores.len()).sum();
    let square: f64 = samples.iter().flat_map(|sample| &sample.scores).map(|s| f64::from(*s).powi(2)).sum();
    let spread = ((square / count.max(1) as f64).sqrt() as f32).max(1e-3);
    samples.iter_mut().for_each(|sample| sample.scores /= spread);
    spread
}

/// What there is to miss: the mean over rows of the probabilities' squares, and the variance of the contexts.
fn scale(samples: &[Sample]) -> Scale {
    let mut rows = 0f64;
    let (mut probabilities, mut contexts) = (0f64, 0f64);
    let mut mean = Array1::<f64>::zeros(samples[0].values.ncols());
    for sample in samples {
        let of_contexts = sample.contexts();
        for (i, weight) in sample.weights.iter().map(|w| f64::from(*w)).enumerate() {
            let (p, c) = (sample.probabilities.row(i), of_contexts.row(i));
            rows += weight;
            probabilities += weight * f64::from(p.dot(&p));
            contexts += weight * f64::from(c.dot(&c));
            mean.scaled_add(weight, &c.mapv(f64::from));
        }
    }
    let variance = contexts / rows - mean.dot(&mean) / (rows * rows);
    // Contexts that are all alike have no variance to speak of.
    let floor = 1e-4 * contexts / rows + f64::MIN_POSITIVE.sqrt();
    Scale { probabilities: (probabilities / rows) as f32, contexts: variance.max(floor) as f32 }
}

/// The root of the contexts' squared error over their variance.
fn relative_error(hinges: &Hinges, samples: &[Sample], lengths: &LengthFeatures, scale: Scale) -> f64 {
    let missed: f64 = samples.iter().map(|s| hinges.error(s, &features_at(lengths, s.length()))[1]).sum();
    let rows: f64 = samples.iter().flat_map(|sample| &sample.weights).map(|w| f64::from(*w)).sum();
    (missed / (rows * f64::from(scale.contexts))).sqrt()
}

/// The same of any `probabilities` `[rows, len]` that are made of scores.
pub(in super::super) fn context_error(samples: &[Sample], probabilities: impl Fn(&Array2<f32>) -> Array2<f32>) -> f64 {
    if samples.is_empty() {
        return f64::NAN;
    }
    let (mut missed, mut rows) = (0f64, 0f64);
    for sample in samples {
        let difference = (probabilities(&sample.scores) - &sample.probabilities).dot(&sample.values);
        for (row, weight) in difference.rows().into_iter().zip(&sample.weights) {
            missed += f64::from(*weight) * f64::from(row.dot(&row));
            rows += f64::from(*weight);
        }
    }
    (missed / (rows * f64::from(scale(samples).contexts))).sqrt()
}

/// Adam (Kingma & Ba 2015) with a rate that decays to nothing as a cosine.
fn train(hinges: &mut Hinges, samples: &[Sample], lengths: &LengthFeatures, scale: Scale, steps: usize, seed: u64) {
    const ADAM: Adam = Adam { decay: (0.9, 0.99), epsilon: 1e-8 };
    let mut rounds = Rounds::new(samples.len(), StdRng::seed_from_u64(seed ^ 0xada));
    let (mut first, mut second) = (hinges.zeros(), hinges.zeros());
    for step in 0..steps {
        let mut gradient = hinges.zeros();
        let mut rows = 0f32;
        for chosen in rounds.draw(SAMPLES_A_STEP.min(samples.len())) {
            let sample = &samples[chosen];
            hinges.add_error_gradient(sample, &features_at(lengths, sample.length()), scale, &mut gradient);
            rows += sample.weights.iter().sum::<f32>();
        }
        let square: f32 = gradient.parameters_mut().iter().map(|g| g.iter().map(|v| v * v).sum::<f32>()).sum();
        let norm = square.sqrt() / rows;
        if !norm.is_finite() {
            continue;
        }
        let factor = (CLIP / norm.max(CLIP)) / rows;
        let step = ADAM.step(step as i32, LEARNING_RATE * cosine(step, steps));
        let parameters = hinges.parameters_mut().into_iter().zip(gradient.parameters_mut());
        let moments = first.parameters_mut().into_iter().zip(second.parameters_mut());
        for ((p, g), (m, v)) in parameters.zip(moments) {
            ndarray::Zip::from(p).and(g).and(m).and(v).for_each(|p, g, m, v| step.take(p, m, v, *g * factor));
        }
    }
}

/// Writes all heads' parameters where the graph has them, in the scores' own units.
pub(in super::super) fn store(model: &mut Model, parameters: &HingeParameters, mut heads: Vec<FittedHinges>) {
    heads.iter_mut().for_each(FittedHinges::rescale);
    let heads: Vec<Hinges> = heads.into_iter().map(|head| head.hinges).collect();
    for (name, value) in parameters.names().into_iter().zip(Hinges::join(&heads)) {
        model.set_constant(name, &Tensor::from(value));
    }
}

impl FittedHinges {
    /// From units of the spread to scores: what is known of a row, and thresholds, are scores; sinks are probabilities.
    fn rescale(&mut self) {
        let Self { hinges, spread } = self;
        let (g, hidden) = (hinges.sizes.hinges, hinges.sizes.hidden);
        hinges.statistics *= *spread;
        hinges.w1 /= *spread;
        hinges.w2.slice_mut(s![hidden.., ..]).mapv_inplace(|v| v / *spread);
        hinges.w2.slice_mut(s![.., ..g]).mapv_inplace(|v| v * *spread);
        hinges.b2.slice_mut(s![.., ..g]).mapv_inplace(|v| v * *spread);
        hinges.weight /= *spread;
        *spread = 1.0;
    }
}

//! Fits a [`Network`] to probabilities.
//!
//! It starts from one hinge a key, with the output layer solved for; Adam then moves all parameters to lower the mean
//! over queries of the summed squared error over real keys; last, the output layer is solved for once more. Rows are
//! sorted by length and cut to it, so short sentences cost little.

use mabert_graph::{Model, Tensor};
use mabert_passes::lower::{ApproximatorOptions, NetworkParameters};
use ndarray::{Array2, Axis, concatenate, s};
use rand::{SeedableRng as _, rngs::StdRng};
use rayon::prelude::*;

use super::network::Network;
use super::rows::{Chunk, Lengths, Rows};
use crate::adam_step::Adam;
use crate::hinges::features_at;
use crate::schedule::{Rounds, cosine};

/// Chunks of one step; of any lengths.
const CHUNKS_A_STEP: usize = 4;
const LEARNING_RATE: f32 = 5e-3;

/// Fits one group; returns the relative error of the probabilities too, as in [`SiteError`](super::SiteError).
pub(super) fn fit(rows: &Rows, options: &ApproximatorOptions, steps: usize, seed: u64) -> (Network, f64) {
    let lengths = Lengths::new(options);
    let spread = rows.spread();
    let chunks = rows.chunks(spread, &lengths);
    let mut start = Network::start(options, &lengths, seed);
    if chunks.is_empty() {
        return (start, f64::NAN);
    }
    start.solve_output(&chunks);
    let before = start.error(&chunks);
    let mut trained = start.clone();
    train(&mut trained, &chunks, steps, seed);
    trained.solve_output(&chunks);
    let after = trained.error(&chunks);
    // Training can only be worth it: where it is not, the solved start stands.
    let (mut best, error) = if after.is_finite() && after < before { (trained, after) } else { (start, before) };
    best.w1 /= spread;
    let units = lengths.units().view().insert_axis(Axis(1));
    best.scale *= &units;
    best.b2 *= &units;
    (best, error)
}

/// Adam (Kingma & Ba 2015) with a rate that decays to nothing as a cosine.
fn train(network: &mut Network, chunks: &[Chunk], steps: usize, seed: u64) {
    const ADAM: Adam = Adam { decay: (0.9, 0.98), epsilon: 1e-10 };
    let mut rounds = Rounds::new(chunks.len(), StdRng::seed_from_u64(seed ^ 0xada));
    let (mut first, mut second) = (network.zeros(), network.zeros());
    for step in 0..steps {
        let chosen = rounds.draw(CHUNKS_A_STEP);
        let mut gradient = gradient(network, chunks, &chosen);
        let step = ADAM.step(step as i32, LEARNING_RATE * cosine(step, steps));
        let parameters = network.parameters_mut().into_iter().zip(gradient.parameters_mut());
        let moments = first.parameters_mut().into_iter().zip(second.parameters_mut());
        for ((p, g), (m, v)) in parameters.zip(moments) {
            ndarray::Zip::from(p).and(g).and(m).and(v).for_each(|p, g, m, v| step.take(p, m, v, *g));
        }
    }
}

/// The gradient over the chosen chunks, summed in their order.
fn gradient(network: &Network, chunks: &[Chunk], chosen: &[usize]) -> Network {
    let parts: Vec<Network> = chosen.par_iter().map(|&chunk| network.gradient(&chunks[chunk])).collect();
    let mut sums = network.zeros();
    for mut part in parts {
        for (sum, add) in sums.parameters_mut().into_iter().zip(part.parameters_mut()) {
            *sum += &*add;
        }
    }
    sums
}

/// What a fitted network makes of rows of scores `[rows, len]` of one length, all of them real.
pub(super) fn probabilities(network: &Network, options: &ApproximatorOptions, scores: &Array2<f32>) -> Array2<f32> {
    let length = scores.ncols();
    let at = features_at(&options.length_features(), length);
    let over = if options.length_tables { 1.0 / length as f32 } else { 1.0 };
    let hidden = (scores.dot(&network.w1.slice(s![..length, ..])) + at.dot(&network.b1)).mapv_into(|v| v.max(0.0));
    let hidden = hidden * (at.dot(&network.scale) * over);
    hidden.dot(&network.w2.slice(s![.., ..length])) + at.dot(&network.b2).slice(s![.., ..length]).mapv(|v| v * over)
}

/// Writes the groups' parameters where the graph has them.
pub(super) fn store(
    model: &mut Model,
    approximator: &NetworkParameters,
    options: &ApproximatorOptions,
    networks: &[Network],
) {
    let views = |part: fn(&Network) -> &Array2<f32>| networks.iter().map(|n| part(n).view()).collect::<Vec<_>>();
    let tensor = |joined: ndarray::ArrayD<f32>| Tensor::from(joined.as_standard_layout().into_owned());
    // A group a matrix, or side by side.
    let stacked = |part| tensor(ndarray::stack(Axis(0), &views(part)).expect("groups of one shape").into_dyn());
    let beside = |part| tensor(concatenate(Axis(1), &views(part)).expect("groups of one shape").into_dyn());
    model.set_constant(&approximator.w1, &stacked(|n| &n.w1));
    model.set_constant(&approximator.w2, &stacked(|n| &n.w2));
    model.set_constant(&approximator.b1, &beside(|n| &n.b1));
    model.set_constant(&approximator.b2, &beside(|n| &n.b2));
    if options.length_tables {
        model.set_constant(&approximator.scale, &beside(|n| &n.scale));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::Rng as _;

    /// Rows of random scores at lengths 1 to 16, with what `probability` says of a key of so many.
    fn rows(probability: impl Fn(usize, usize) -> f32) -> Rows {
        let mut rng = StdRng::seed_from_u64(3);
        let mut rows = Rows::default();
        for row in 0..800 {
            let length = 1 + row % 16;
            let scores: Vec<f32> = (0..length).map(|_| rng.random_range(-2.0..2.0)).collect();
            rows.push(&scores, &(0..length).map(|key| probability(key, length)).collect::<Vec<_>>());
        }
        rows
    }

    #[test]
    fn heads_that_look_at_one_key_or_at_all_alike_are_solved_for_at_every_length() {
        let options = ApproximatorOptions::network(16, 16);
        let first = rows(|key, _| if key == 0 { 1.0 } else { 0.0 });
        let halves = rows(|key, length| 0.5 / length as f32 + if key == 0 { 0.5 } else { 0.0 });
        for rows in [first, halves] {
            let (_, error) = fit(&rows, &options, 0, 1);
            assert!(error < 0.02, "{error}");
        }
    }
}

//! Which sequences a step sees, and how fast it goes.

use rand::seq::SliceRandom as _;
use rand::{SeedableRng as _, rngs::StdRng};

use super::{DEFAULT_POSITIONS, FullOptions};
use crate::data::Sequence;

/// Sequences are sorted by length within so many: those of a step are of like lengths, and the steps of all.
const WINDOW: usize = 1024;
/// The share of the steps over which the rate rises.
const WARM_UP: f32 = 0.1;

/// The sequences of so many steps: each as often as any other, those of a step of like lengths.
pub(super) fn plan(training: &[usize], sequences: &[Sequence], options: &FullOptions, count: usize) -> Vec<Vec<usize>> {
    let length = |at: usize| sequences[at].ids.len();
    let (most, positions) = options.batch.map_or((usize::MAX, DEFAULT_POSITIONS), |batch| (batch, usize::MAX));
    let mut steps: Vec<Vec<usize>> = Vec::new();
    let mut rng = StdRng::seed_from_u64(options.seed);
    while steps.len() < count {
        let mut round = training.to_vec();
        round.shuffle(&mut rng);
        for window in round.chunks_mut(WINDOW) {
            window.sort_by_key(|&at| length(at));
            let mut steps_in_window: Vec<Vec<usize>> = Vec::new();
            for &at in &*window {
                match steps_in_window.last_mut() {
                    Some(step) if step.len() < most && (step.len() + 1).saturating_mul(length(at)) <= positions => {
                        step.push(at);
                    }
                    _ => steps_in_window.push(vec![at]),
                }
            }
            steps_in_window.shuffle(&mut rng);
            steps.append(&mut steps_in_window);
        }
    }
    steps.truncate(count);
    steps
}

/// The share of the rate after a share of the way: it rises, then falls, both evenly.
pub(super) fn rate(way: f32) -> f32 {
    if way < WARM_UP { way / WARM_UP } else { (1.0 - way).max(0.0) / (1.0 - WARM_UP) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequences(lengths: &[usize]) -> Vec<Sequence> {
        lengths.iter().map(|&length| Sequence::with_length(length)).collect()
    }

    #[test]
    fn every_sequence_is_seen_as_often_and_steps_have_like_lengths() {
        let lengths: Vec<usize> = (0..40).map(|at| 2 + at * 7 % 31).collect();
        let all = sequences(&lengths);
        let training: Vec<usize> = (0..40).collect();
        let options = FullOptions { batch: Some(4), seed: 5, ..FullOptions::default() };
        let made = plan(&training, &all, &options, 20);
        assert_eq!(made.len(), 20);
        let mut seen = vec![0; 40];
        made.iter().flatten().for_each(|&at| seen[at] += 1);
        assert!(seen.iter().all(|&times| times == 2), "{seen:?}");
        let spread = |step: &Vec<usize>| {
            let of = step.iter().map(|&at| lengths[at]);
            of.clone().max().unwrap() - of.min().unwrap()
        };
        assert!(made.iter().all(|step| spread(step) <= 6));
        assert_eq!(plan(&training, &all, &options, 20), made);
        assert_ne!(plan(&training, &all, &FullOptions { seed: 6, ..options }, 20), made);
    }

    #[test]
    fn a_step_takes_fewer_long_texts() {
        let largest = |length: usize, batch: Option<usize>| {
            let all = sequences(&vec![length; 64]);
            let steps = plan(&(0..64).collect::<Vec<_>>(), &all, &FullOptions { batch, ..FullOptions::default() }, 9);
            steps.iter().map(Vec::len).max().unwrap()
        };
        assert_eq!(largest(20, None), DEFAULT_POSITIONS / 20);
        assert_eq!(largest(60, None), DEFAULT_POSITIONS / 60);
        assert_eq!(largest(1000, None), 1);
        assert_eq!(largest(1000, Some(20)), 20);
    }

    #[test]
    fn the_rate_rises_and_falls() {
        let rates: Vec<f32> = (0..=100).map(|step| rate(step as f32 / 100.0)).collect();
        assert_eq!((rates[0], rates[10], rates[100]), (0.0, 1.0, 0.0));
        assert!(rates[..10].windows(2).all(|w| w[1] > w[0]) && rates[10..].windows(2).all(|w| w[1] < w[0]));
        assert_eq!(rate(1.5), 0.0);
    }
}

//! The course of a training: a running mean of the weights, what it was judged to be worth on the way, and when to stop.

use std::collections::HashMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::gradient::AdamW;

/// The running mean forgets by this factor a step at most; less at first, when all weights are new.
const DECAY: f32 = 0.99;
/// Training is judged so often, evenly spread over it.
pub(super) const JUDGEMENTS: usize = 10;
/// It stops where so many judgements in a row were no better than the start: fewer would not tell, since weights gain
/// most while the rate falls.
const PATIENCE: usize = 6;

/// What the running mean was worth at some step, on sequences kept apart.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Judgement {
    /// Steps that were taken.
    pub step: usize,
    /// The loss.
    pub loss: f64,
}

/// Where a training stands.
pub(super) struct Course {
    /// The running mean of each variable.
    mean: Vec<Vec<f32>>,
    /// What the student had at first is worth.
    start_loss: f64,
    /// The least that was judged below that, with the weights.
    best: Option<(f64, Vec<Vec<f32>>)>,
    pub(super) judgements: Vec<Judgement>,
    /// Seconds that the steps took so far, in earlier runs of the same training too.
    pub(super) seconds: f64,
    /// Seconds that they may take, if that is limited.
    time: Option<f64>,
}

impl Course {
    /// At the start, which is worth `loss`, with so much time for the steps.
    pub(super) fn new(adam: &AdamW, loss: f64, time: Option<Duration>) -> Self {
        // A start that overflows is no better than anything.
        let start_loss = if loss.is_nan() { f64::INFINITY } else { loss };
        let mean = adam.values().map(<[f32]>::to_vec).collect();
        Self { mean, start_loss, best: None, judgements: Vec::new(), seconds: 0.0, time: time.map(|t| t.as_secs_f64()) }
    }

    /// Takes the weights after `step` steps into the mean.
    pub(super) fn add(&mut self, adam: &AdamW, step: usize) {
        let step = step as f32;
        let decay = DECAY.min((1.0 + step) / (10.0 + step));
        for (mean, value) in self.mean.iter_mut().zip(adam.values()) {
            mean.iter_mut().zip(value).for_each(|(m, v)| *m += (1.0 - decay) * (v - *m));
        }
    }

    /// The share of the way that lies behind at the middle of a step: of the steps, or of the time, where that runs faster.
    pub(super) fn way(&self, step: usize, steps: usize) -> f32 {
        let way = (step as f64 + 0.5) / steps as f64;
        self.time.map_or(way, |time| way.max(self.seconds / time)) as f32
    }

    /// Whether it is time for a judgement after `step` of `steps`.
    pub(super) fn is_due(step: usize, steps: usize) -> bool {
        step == steps || (step * JUDGEMENTS / steps) > ((step - 1) * JUDGEMENTS / steps)
    }

    pub(super) fn mean(&self) -> &[Vec<f32>] {
        &self.mean
    }

    /// Takes down what the mean is worth after `step` steps.
    pub(super) fn judge(&mut self, step: usize, loss: f64) {
        self.judgements.push(Judgement { step, loss });
        if loss < self.best.as_ref().map_or(self.start_loss, |(best, _)| *best) {
            self.best = Some((loss, self.mean.clone()));
        }
    }

    /// Whether nothing was gained for long.
    pub(super) fn is_over(&self) -> bool {
        let gains = |judgement: &Judgement| judgement.loss < self.start_loss;
        self.judgements.iter().rev().take_while(|judgement| !gains(judgement)).count() >= PATIENCE
    }

    /// The weights to end with: the last mean where it is better than the start, since few sequences are too few to tell
    /// a lesser loss on the way from chance; else the best that was judged; `None` where the start is.
    pub(super) fn result(&self) -> Option<&[Vec<f32>]> {
        let gained = self.judgements.last().is_some_and(|judgement| judgement.loss < self.start_loss);
        if gained { Some(&self.mean) } else { self.best.as_ref().map(|(_, weights)| weights.as_slice()) }
    }

    /// What a file must hold to go on from here, besides the optimizer's state: numbers exactly, and weights by name.
    pub(super) fn state(&self) -> (String, HashMap<&'static str, &[Vec<f32>]>) {
        let judgements = self.judgements.iter().map(|j| (j.step, j.loss.to_bits())).collect();
        let best_loss = self.best.as_ref().map(|(loss, _)| loss.to_bits());
        let start_loss = self.start_loss.to_bits();
        let saved = Saved { start_loss, best_loss, judgements, seconds: self.seconds, time: self.time };
        let text = serde_json::to_string(&saved).expect("plain structures are valid JSON");
        let weights =
            [(MEAN, Some(self.mean.as_slice())), (BEST, self.best.as_ref().map(|(_, weights)| weights.as_slice()))];
        (text, weights.into_iter().filter_map(|(name, weights)| Some((name, weights?))).collect())
    }

    /// The other way round; `None` where it does not fit.
    pub(super) fn restore(&mut self, text: &str, mut weights: HashMap<&str, Vec<Vec<f32>>>) -> Option<()> {
        let saved: Saved = serde_json::from_str(text).ok()?;
        let sizes = |weights: &[Vec<f32>]| weights.iter().map(Vec::len).collect::<Vec<_>>();
        let fits = weights.values().all(|weights| sizes(weights) == sizes(&self.mean));
        self.mean = weights.remove(MEAN).filter(|_| fits)?;
        self.best = saved.best_loss.map(f64::from_bits).zip(weights.remove(BEST));
        self.start_loss = f64::from_bits(saved.start_loss);
        let judgement = |(step, bits)| Judgement { step, loss: f64::from_bits(bits) };
        self.judgements = saved.judgements.into_iter().map(judgement).collect();
        (self.seconds, self.time) = (saved.seconds, saved.time);
        Some(())
    }
}

/// The names of weights in a state.
pub(super) const WEIGHTS: [&str; 2] = [MEAN, BEST];
const MEAN: &str = "mean";
const BEST: &str = "best";

/// Losses bit by bit: numbers written out may differ in their last digit.
#[derive(Serialize, Deserialize)]
struct Saved {
    start_loss: u64,
    best_loss: Option<u64>,
    judgements: Vec<(usize, u64)>,
    seconds: f64,
    time: Option<f64>,
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};

    use super::*;
    use crate::gradient::Trained;

    fn adam(value: f32) -> AdamW {
        let variable = Var::from_slice(&[value], 1, &Device::Cpu).unwrap();
        AdamW::new([Trained { variable, rate: 0.1, decay: 0.0 }], 1.0).unwrap()
    }

    fn course() -> Course {
        Course::new(&adam(1.0), 1.0, None)
    }

    #[test]
    fn the_mean_follows_the_weights() {
        let mut course = course();
        let moved = adam(3.0);
        course.add(&moved, 0);
        // At first nine parts in ten are new.
        approx::assert_abs_diff_eq!(course.mean()[0][0], 2.8, epsilon = 1e-6);
        (1..2000).for_each(|step| course.add(&moved, step));
        approx::assert_abs_diff_eq!(course.mean()[0][0], 3.0, epsilon = 1e-5);
    }

    #[test]
    fn the_way_is_that_of_the_steps_or_of_the_time() {
        let mut course = Course::new(&adam(1.0), 1.0, Some(Duration::from_secs(10)));
        approx::assert_abs_diff_eq!(course.way(0, 10), 0.05);
        course.seconds = 9.0;
        approx::assert_abs_diff_eq!(course.way(4, 10), 0.9);
        assert!(course.way(9, 10) > 0.9);
    }

    #[test]
    fn training_is_judged_evenly_and_at_its_end() {
        let due = |steps: usize| (1..=steps).filter(|step| Course::is_due(*step, steps)).collect::<Vec<_>>();
        assert_eq!(due(100), [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]);
        assert_eq!(due(3), [1, 2, 3]);
        assert!((8..=11).contains(&due(37).len()) && due(37).last() == Some(&37));
    }

    #[test]
    fn the_last_is_taken_where_it_gains_else_the_best() {
        let mut course = course();
        assert!(course.result().is_none());
        course.mean = vec![vec![1.5]];
        course.judge(10, 0.8);
        course.mean = vec![vec![1.6]];
        course.judge(20, 0.9);
        assert_eq!(course.result().unwrap(), [vec![1.6]]);
        course.judge(30, f64::NAN);
        assert_eq!(course.result().unwrap(), [vec![1.5]]);
        // A start that is no number is worth nothing.
        let mut course = Course::new(&adam(1.0), f64::NAN, None);
        course.judge(10, 1e9);
        assert!(course.result().is_some());
    }

    #[test]
    fn nothing_gained_for_long_ends_it() {
        let mut course = course();
        course.judge(10, 0.9);
        for step in 2..7 {
            course.judge(step * 10, 1.1);
            assert!(!course.is_over());
        }
        course.judge(70, f64::INFINITY);
        assert!(course.is_over());
        course.judge(80, 0.95);
        assert!(!course.is_over());
    }

    #[test]
    fn a_state_is_taken_up_as_it_was() {
        let mut course = course();
        course.judge(10, 0.1 + 0.2);
        course.add(&adam(3.0), 0);
        let (text, weights) = course.state();
        let weights = weights.into_iter().map(|(name, weights)| (name, weights.to_vec())).collect();
        let mut other = Course::new(&adam(7.0), 5.0, Some(Duration::from_secs(3)));
        other.restore(&text, weights).unwrap();
        assert_eq!(other.state(), course.state());
        let strange = HashMap::from([(MEAN, vec![vec![0.0, 1.0]])]);
        assert!(other.restore(&text, strange).is_none());
    }
}

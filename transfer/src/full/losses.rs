//! The parts of the loss, what each counts, and what a mean over a step is divided by.

use serde::Serialize;

use super::FullOptions;
use crate::data::Batch;
use crate::heads::RowUnit;

/// The parts of the loss, each a mean over the step; those that do not apply are 0. Rows that are far off count by the
/// logarithm of their distance.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct Losses {
    /// Outputs against the teacher's: squared temperature times Kullback-Leibler divergence of logits, or the squared
    /// error of values relative to the teacher's variance; a mean over outputs.
    pub outputs: f64,
    /// Against labels: cross entropy, or the squared error relative to the teacher's variance; a mean over what has one.
    pub labels: f64,
    /// Squared error at the norms relative to the teacher's variance there; a mean over norms.
    pub hidden: f64,
    /// Squared error of attention's probabilities; a mean over layers.
    pub attention: f64,
    /// Of a feature model, 1 minus the cosine of a text's vectors, relative to what two texts' of the teacher's have.
    pub vectors: f64,
    /// What `hidden` is the mean of: a value a norm.
    #[serde(skip)]
    pub(super) norms: Vec<f64>,
}

/// How much each part counts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Weights {
    /// Outputs have this share, labels the rest.
    pub(super) alpha: f64,
    pub(super) hidden: f64,
    pub(super) attention: f64,
    pub(super) vectors: f64,
    pub(super) temperature: f64,
}

impl From<&FullOptions> for Weights {
    fn from(options: &FullOptions) -> Self {
        Self {
            alpha: options.alpha,
            hidden: options.hidden_weight,
            attention: options.attention_weight,
            vectors: options.vector_weight,
            temperature: options.temperature,
        }
    }
}

impl Losses {
    /// What is brought down.
    pub(super) fn total(&self, weights: &Weights) -> f64 {
        let parts = [
            (weights.alpha, self.outputs),
            (1.0 - weights.alpha, self.labels),
            (weights.hidden, self.hidden),
            (weights.attention, self.attention),
            (weights.vectors, self.vectors),
        ];
        // A part that does not count may well be infinite.
        parts.into_iter().filter(|(weight, _)| *weight > 0.0).map(|(weight, part)| weight * part).sum()
    }

    /// The sum over the pieces of a step.
    pub(super) fn sum(parts: &[Self]) -> Self {
        let mut sum = Self::default();
        parts.iter().for_each(|part| sum.add(part));
        sum
    }

    fn add(&mut self, other: &Self) {
        self.outputs += other.outputs;
        self.labels += other.labels;
        self.hidden += other.hidden;
        self.attention += other.attention;
        self.vectors += other.vectors;
        self.norms.resize(other.norms.len().max(self.norms.len()), 0.0);
        self.norms.iter_mut().zip(&other.norms).for_each(|(sum, other)| *sum += other);
    }
}

/// What a mean over a step is divided by.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Totals {
    pub(super) texts: usize,
    pub(super) tokens: usize,
    /// Pairs of query and key.
    pub(super) pairs: usize,
    /// Texts, or tokens, that have a label.
    pub(super) labels: usize,
}

impl Totals {
    /// Rows of a unit.
    pub(super) fn rows(&self, unit: RowUnit) -> usize {
        match unit {
            RowUnit::Text => self.texts,
            RowUnit::Token => self.tokens,
        }
    }

    pub(super) fn add(&mut self, batch: &Batch) {
        self.texts += batch.lengths.iter().filter(|l| **l > 0).count();
        self.tokens += batch.tokens();
        self.pairs += batch.lengths.iter().map(|l| l * l).sum::<usize>();
    }
}

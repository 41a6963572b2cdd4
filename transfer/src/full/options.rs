//! How the stage works.

use std::time::Duration;

use serde::{Serialize, Serializer};

/// Tokens of a short text.
const SHORT: usize = 12;
/// What is drawn for a given time: more than a small model sees of it, and no more than is worth holding.
const MOST_TOKENS_A_SECOND: f64 = 10_000.0;
const MOST_TOKENS: usize = 1 << 22;

/// How the stage works: [`default`](Self::default) or the [paper's](Self::paper), with fields set as wished.
///
/// ```
/// let mut options = mabert_transfer::full::FullOptions::paper();
/// options.steps = 2_000;
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct FullOptions {
    /// Gradient steps.
    pub steps: usize,
    /// In place of a number of steps: as many as fit into this time. A [`Job`](crate::job::Job)'s includes the stages
    /// before, which take what they take; the steps then have the rest, or a tenth where there is less. Two runs need not
    /// take as many steps.
    #[serde(serialize_with = "as_seconds")]
    pub time: Option<Duration>,
    /// Sequences a step. Without a number, as many as have [`DEFAULT_POSITIONS`]: a step takes as long for any text, and
    /// a token counts as much in a short text as in a long one.
    pub batch: Option<usize>,
    /// Learning rate once warm; it rises over the first tenth of the steps and falls to nothing over the others. Without a
    /// number, [`DEFAULT_RATE`], less for wide models, divided by how often each sequence is seen: few texts are learnt by
    /// heart at the rate that many need.
    pub rate: Option<f32>,
    /// What the weights of linear maps lose a step, times the rate.
    pub weight_decay: f32,
    /// Logits are divided by it before they are compared.
    pub temperature: f64,
    /// The share of the teacher's outputs in the loss; labels have the rest.
    pub alpha: f64,
    /// What the hidden states at the norms count.
    pub hidden_weight: f64,
    /// What attention's probabilities count.
    pub attention_weight: f64,
    /// What the vectors of texts count that users of a feature model compare.
    pub vector_weight: f64,
    /// Seed of the order of the sequences.
    pub seed: u64,
}

impl Default for FullOptions {
    fn default() -> Self {
        Self {
            steps: 900,
            time: None,
            batch: None,
            rate: None,
            weight_decay: 0.01,
            temperature: 2.0,
            alpha: 1.0,
            hidden_weight: 1.0,
            attention_weight: 0.0,
            vector_weight: 1.0,
            seed: 0,
        }
    }
}

/// Learning rate for texts that are seen once, by a model of up to [`DEFAULT_CHANNELS`].
pub const DEFAULT_RATE: f32 = 4e-5;
/// Channels of a model that takes the whole of [`DEFAULT_RATE`].
pub const DEFAULT_CHANNELS: usize = 128;
/// Positions a step where no number of sequences is asked for, padding counted, unless one sequence has more.
pub const DEFAULT_POSITIONS: usize = 840;

impl FullOptions {
    /// Sequences worth drawing, and tokens: what goes through all steps. Where texts are so short that more sequences
    /// would, each is seen again.
    pub(crate) fn worth_drawing(&self) -> (usize, usize) {
        let tokens = match self.time {
            None => self.steps * DEFAULT_POSITIONS,
            Some(time) => ((time.as_secs_f64() * MOST_TOKENS_A_SECOND) as usize).clamp(DEFAULT_POSITIONS, MOST_TOKENS),
        };
        match (self.batch, self.time) {
            (Some(batch), None) => (self.steps * batch, usize::MAX),
            _ => (tokens / SHORT, tokens),
        }
    }

    /// Learning rate once warm, of a stream of so many channels where every sequence is seen `times` on average. Wide
    /// models take less in proportion: a product's sum moves with the number of weights that each move by the rate (Yang
    /// et al. 2022).
    pub(super) fn rate_for(&self, times: f32, channels: usize) -> f32 {
        let width = (DEFAULT_CHANNELS as f32 / channels.max(1) as f32).min(1.0);
        self.rate.unwrap_or(DEFAULT_RATE * width / times.max(1.0))
    }

    /// This many steps of so many sequences.
    #[must_use]
    pub fn with_steps(mut self, steps: usize, batch: usize) -> Self {
        (self.steps, self.batch) = (steps, Some(batch));
        self
    }

    /// The paper's distillation (Neo et al. 2023): temperature 15, 0.9 of the loss of the outputs from the
    /// teacher and the rest from labels, hidden states once, attention a hundred times.
    pub fn paper() -> Self {
        Self { temperature: 15.0, alpha: 0.9, attention_weight: 100.0, ..Self::default() }
    }
}

fn as_seconds<S: Serializer>(time: &Option<Duration>, to: S) -> Result<S::Ok, S::Error> {
    time.map(|time| time.as_secs_f64()).serialize(to)
}

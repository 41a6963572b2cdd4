//! What the passes work on.

use mabert_graph::Model;

use super::options::PassOptions;
use super::outcome::Outcome;
use super::table::Pass;
use crate::lower::{Approximator, Bounds, FoldReport, Form, NormRanges};
use crate::sites::{Encoder, Precision};

/// A student under way: first a copy of the teacher, then what the passes make of it.
#[derive(Debug)]
#[non_exhaustive]
pub struct Student {
    /// Its graph.
    pub model: Model,
    /// Its sites.
    pub encoder: Encoder,
    /// The approximator of each layer; empty where softmax is kept.
    pub approximators: Vec<Approximator>,
    /// How it is made.
    pub options: PassOptions,
    /// What the passes did so far.
    pub outcomes: Vec<Outcome>,
    /// What folding did.
    pub fold: FoldReport,
    /// What its norms' outputs were seen to be, where they were.
    pub(super) seen: Option<NormRanges>,
    /// How they are held.
    pub(crate) bounds: Bounds,
    pub(super) completeness: Completeness,
    pub(super) precision: Precision,
}

/// Whether every site of the encoder was recognised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Completeness {
    Whole,
    /// Some were missed, and that is accepted.
    Partial,
}

impl Student {
    /// Whether attention cannot do without the scores as a value: a network's linear order has none to add a bias to.
    pub(super) fn needs_scores(&self) -> bool {
        self.options.approximator.form == Form::Network && self.encoder.has_position_bias()
    }

    /// Whether a pass ran and was not skipped.
    pub fn ran(&self, pass: Pass) -> bool {
        self.outcomes.iter().any(|o| o.pass == pass && o.skipped.is_none())
    }
}

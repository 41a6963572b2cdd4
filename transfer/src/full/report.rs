//! What the stage did.

use mabert_passes::sites::{Encoder, NormSite, SiteId};
use serde::Serialize;

use super::{FullOptions, Judgement, Losses};

/// What the stage did.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct FullReport {
    /// How.
    pub options: FullOptions,
    /// Where gradients were computed: `CPU` or `GPU`.
    pub device: &'static str,
    /// Learning rate once warm.
    pub rate: f32,
    /// Sequences to draw from.
    pub sequences: usize,
    /// Sequences a step, on average.
    pub sequences_a_step: f64,
    /// Parameters that were trained, in elements.
    pub trained: usize,
    /// Real tokens that went through the student.
    pub tokens: usize,
    /// Every norm, in order, on sequences kept apart.
    pub sites: Vec<SiteChange>,
    /// Steps that were planned.
    pub planned: usize,
    /// And taken.
    pub taken: usize,
    /// Why there were no more.
    pub ended: Ended,
    /// What the running mean of the weights was worth on the way, on sequences kept apart.
    pub judgements: Vec<Judgement>,
    /// Losses before, on sequences kept apart.
    pub before: Losses,
    /// And of what was taken, or of the last where nothing was better than the start.
    pub after: Losses,
    /// Whether anything was taken: the student is put back where sequences kept apart never showed a lesser loss.
    pub kept: bool,
    /// Steps whose gradient was not finite.
    pub skipped: usize,
    /// Steps that a checkpoint had taken before.
    pub resumed_at: usize,
    /// Real tokens a second, of the steps alone.
    pub tokens_per_second: f64,
    /// Seconds in all.
    pub seconds: f64,
}

/// Why training ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Ended {
    /// All steps were taken.
    StepsTaken,
    /// Nothing was gained for long.
    NothingGained,
    /// The time was over.
    TimeUp,
}

/// What the stage did to one norm. Errors are roots of the mean squared difference over the teacher's variance on the texts
/// that are trained on; tokens that are far off count by the logarithm of their distance.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct SiteChange {
    /// The norm.
    pub site: SiteId,
    /// Relative error before.
    pub before: f64,
    /// And after, whether or not the result was kept.
    pub after: f64,
}

/// The relative error of each norm.
pub(super) fn changes(encoder: &Encoder, before: &Losses, after: &Losses) -> Vec<SiteChange> {
    let errors = before.norms.iter().zip(&after.norms);
    let change = |((site, _), (before, after)): ((SiteId, &NormSite), (&f64, &f64))| SiteChange {
        site,
        before: before.sqrt(),
        after: after.sqrt(),
    };
    encoder.norms().into_iter().zip(errors).map(change).collect()
}

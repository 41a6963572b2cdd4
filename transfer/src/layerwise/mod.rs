//! The layerwise stages, closed-form and blockwise: the student's parameters, layer by layer, through the student's own
//! activations.
//!
//! Teacher and student walk through the encoder side by side (`walk`). For each layer, in order: the approximator is
//! fitted to the teacher's probabilities (`approximators`, `fit`), in the cheaper form that is close enough (`weigh`); the student is run up to there; what leads from the
//! context to the norm is solved for (`solve`, `regression`), with gradient steps on the block and once more where they
//! are wanted; then the same for the feed-forward half. What an earlier layer could not match, a later one sees and makes
//! up for.

mod approximators;
mod choice;
mod fit;
mod head;
mod hinges;
mod network;
mod regression;
mod rows;
mod seen;
mod solve;
mod token_weights;
mod walk;
mod weigh;

use std::time::Instant;

use mabert_passes::lower::NormRanges;
use mabert_passes::pipeline::{Rewriting, Student};
use mabert_passes::sites::SiteId;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::blockwise::{self, Fitted};
use crate::data::Batch;
use crate::pooling::Pooling;
use crate::progress::Progress;
pub use choice::{AttentionSize, ByForm, FormChoice, Reason, Target, Weighing};
pub use seen::norm_ranges;

/// How the stage works.
#[derive(Clone, Copy, Debug, Serialize)]
#[non_exhaustive]
pub struct LayerwiseOptions {
    /// Seed of what is drawn at random.
    pub seed: u64,
    /// Where each layer gets the cheaper of the two forms that is close enough; without it layers keep theirs.
    pub weighing: Option<Weighing>,
    /// Rows of scores (queries) that each network is fitted to, at most.
    pub fit_rows: usize,
    /// Steps of each network's fit.
    pub fit_steps: usize,
    /// Rows of scores (queries) that a head's hinges are fitted to, about; short texts add to them.
    pub hinge_rows: usize,
    /// Steps of the fit of a head's hinges.
    pub hinge_steps: usize,
    /// How users of a feature model make vectors of texts: first tokens count more in the last layer where these are read.
    pub pooling: Option<Pooling>,
    /// Gradient steps on each half of a layer before it is solved for a last time, see [`blockwise`].
    pub blockwise: Option<blockwise::BlockwiseOptions>,
}

impl Default for LayerwiseOptions {
    fn default() -> Self {
        Self {
            seed: 0,
            weighing: None,
            fit_rows: 12_000,
            fit_steps: 1_500,
            hinge_rows: 8_000,
            hinge_steps: 600,
            pooling: None,
            blockwise: None,
        }
    }
}

/// How far one site of the student is from the teacher's, on the calibration text.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct SiteError {
    /// The site.
    pub site: SiteId,
    /// Root of the summed squared difference over that of the teacher's deviation from its mean: 0 is equal, 1 is no
    /// better than a constant.
    pub relative_error: f64,
}

/// What gradient steps did to a half of a layer.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BlockReport {
    /// The norm that the half ends in.
    pub site: SiteId,
    /// What was gained.
    #[serde(flatten)]
    pub fitted: Fitted,
}

/// What the stage did.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LayerwiseReport {
    /// Real tokens that went through the student.
    pub tokens: usize,
    /// Every site, in order.
    pub sites: Vec<SiteError>,
    /// What became of each layer's softmax, where forms were weighed.
    #[serde(default)]
    pub choices: Vec<FormChoice>,
    /// What the blockwise stage did to each half of a layer, in order; empty without it.
    pub blocks: Vec<BlockReport>,
    /// Seconds spent on fitting approximators.
    pub fit_seconds: f64,
    /// Seconds spent on the blockwise stage.
    pub block_seconds: f64,
    /// Seconds in all.
    pub seconds: f64,
}

/// Sets the parameters of `student`, made by [`Rewriting::approximate`] and not yet finished. Gives what its norms then
/// put out, too.
///
/// # Errors
/// A part of teacher or student cannot be run, or the statistics are not finite.
pub fn calibrate(
    rewriting: &Rewriting,
    student: &mut Student,
    batches: &[Batch],
    options: &LayerwiseOptions,
    progress: &dyn Progress,
) -> Result<(LayerwiseReport, NormRanges)> {
    let start = Instant::now();
    let stage = if options.blockwise.is_some() { "blockwise" } else { "closed-form" };
    progress.begin(stage, rewriting.encoder.layers.len());
    let mut walk = walk::Walk::new(rewriting, student, batches, options)?;
    walk.fit_shared_approximator()?;
    walk.embeddings()?;
    let tokens: usize = batches.iter().map(Batch::tokens).sum();
    for layer in 0..rewriting.encoder.layers.len() {
        walk.layer(layer)?;
        let Some(site) = walk.sites.last() else { continue };
        let speed = (tokens * (layer + 1)) as f64 / start.elapsed().as_secs_f64();
        progress.step(&format!("{} off by {:.3}, {speed:.0} tokens/s a layer", site.site, site.relative_error));
    }
    progress.end();
    let walk::Walk { sites, choices, blocks, seen, fit_seconds, block_seconds, .. } = walk;
    let seconds = start.elapsed().as_secs_f64();
    Ok((LayerwiseReport { tokens, sites, choices, blocks, fit_seconds, block_seconds, seconds }, seen))
}

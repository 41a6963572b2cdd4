//! The closed-form stage: the student's parameters, layer by layer, through the student's own activations.
//!
//! For each layer, in order: the approximator is fitted to the teacher's probabilities (`approximator`); the student
//! is run up to there; what leads from the context to the norm is solved for (`regression`); the same for the
//! feed-forward part. What an earlier layer could not match, a later one sees and makes up for.

mod fit;
mod head;
mod layers;
mod regression;

use std::time::Instant;

use mabert_passes::pipeline::{Rewriting, Student};
use mabert_passes::sites::SiteId;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::blockwise::{self, Fitted};
use crate::data::Batch;
use crate::progress::Progress;

/// How the stage works.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct LayerwiseOptions {
    /// Seed of what is drawn at random.
    pub seed: u64,
    /// Rows of scores (queries) that each approximator is fitted to, at most.
    pub fit_rows: usize,
    /// Steps of each approximator's fit.
    pub fit_steps: usize,
    /// Gradient steps on each attention block before it is solved for a last time, see [`blockwise`].
    pub blockwise: Option<blockwise::BlockwiseOptions>,
}

impl Default for LayerwiseOptions {
    fn default() -> Self {
        Self { seed: 0, fit_rows: 12_000, fit_steps: 1_500, blockwise: None }
    }
}

/// How far one site of the student is from the teacher's, on the calibration text.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SiteError {
    /// The site.
    pub site: SiteId,
    /// Root of the summed squared difference over that of the teacher's deviation from its mean: 0 is equal, 1 is no
    /// better than a constant.
    pub relative_error: f64,
}

/// What the stage did.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LayerwiseReport {
    /// Real tokens that went through the student.
    pub tokens: usize,
    /// Every site, in order.
    pub sites: Vec<SiteError>,
    /// What the blockwise stage did to each attention block, in order; empty without it.
    pub blocks: Vec<Fitted>,
    /// Seconds spent on fitting approximators.
    pub fit_seconds: f64,
    /// Seconds spent on the blockwise stage.
    pub block_seconds: f64,
    /// Seconds in all.
    pub seconds: f64,
}

/// Sets the parameters of `student`, made by [`Rewriting::approximate`] and not yet finished.
///
/// # Errors
/// A part of teacher or student cannot be run, or the statistics are not finite.
pub fn calibrate(
    rewriting: &Rewriting,
    student: &mut Student,
    batches: &[Batch],
    options: &LayerwiseOptions,
    progress: &dyn Progress,
) -> Result<LayerwiseReport> {
    let start = Instant::now();
    let stage = if options.blockwise.is_some() { "blockwise" } else { "closed-form" };
    progress.begin(stage, rewriting.encoder.layers.len());
    let mut work = layers::Work::new(rewriting, student, batches, options)?;
    work.shared_approximator()?;
    work.embeddings()?;
    let tokens: usize = batches.iter().map(Batch::tokens).sum();
    for layer in 0..rewriting.encoder.layers.len() {
        work.layer(layer)?;
        let Some(site) = work.sites.last() else { continue };
        let speed = (tokens * (layer + 1)) as f64 / start.elapsed().as_secs_f64();
        progress.step(&format!("{} off by {:.3}, {speed:.0} tokens/s a layer", site.site, site.relative_error));
    }
    progress.end();
    let layers::Work { sites, blocks, fit_seconds, block_seconds, .. } = work;
    Ok(LayerwiseReport { tokens, sites, blocks, fit_seconds, block_seconds, seconds: start.elapsed().as_secs_f64() })
}

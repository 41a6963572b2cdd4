//! The main job: from a model to a rewritten, calibrated and measured student.
//!
//! Each step is a room: [`prepare`](self) the teacher and the text, find the parameters in stages, finish with the exact
//! passes, check what they did, report.

mod beyond;
mod bounded;
mod finish;
mod measure;
mod origin;
mod prepare;
mod quantised;
mod report;
mod sequences;
mod settings;
mod softmax;
mod stages;

use mabert_graph::Model;

pub use beyond::BeyondReport;
pub use bounded::{BoundsReport, LARGEST_VALUE_KEY};
pub use quantised::Dequantised;
pub use report::{DevReport, DevScore, OddInputs, Report, SiteReport, StageReport};
pub use sequences::{DEFAULT_TOKENS, Source, VECTOR_TOKENS};
pub use settings::{CheckpointFolder, Dev, FullStage, Job, Transfer, TransferKind};

use crate::Result;
pub use crate::data::Data;
pub use crate::layerwise::{ByForm, FormChoice, Reason, Target};
pub use crate::pooling::Pooling;
use crate::progress::Progress;
use prepare::Prepared;

/// The longest sequence where none is asked for.
pub const DEFAULT_MAX_SEQ: usize = 128;
/// The largest hidden size of an approximator where none is asked for.
pub const DEFAULT_HIDDEN: usize = 128;
/// The squared error of a layer's contexts, relative to their variance, up to which the cheaper form is close enough, where
/// no other is asked for.
pub const DEFAULT_SOFTMAX_ERROR: f64 = 0.1;
/// What the exact passes may change, relative to outputs above 1.
const EXACT: f64 = 1e-3;

/// Rewrites a model: makes a student of it, finds the student's parameters, and measures it against its teacher.
///
/// The model's [`origin`](Model::origin) names it in messages. Where that is a file and the job has a
/// [checkpoint](FullStage::checkpoint), the file's contents tell the job from others: a model that was changed since it
/// was loaded should have no checkpoint.
///
/// # Errors
/// The model is no encoder, has sites that are not recognised, or options or data do not fit it; or a check of the
/// result does not hold.
pub fn rewrite(model: Model, job: &Job, progress: &dyn Progress) -> Result<(Model, Report)> {
    let origin = model.origin().to_owned();
    make(model, job, progress).map_err(|e| e.in_model(&origin))
}

fn make(model: Model, job: &Job, progress: &dyn Progress) -> Result<(Model, Report)> {
    let prepared = Prepared::new(model, job, progress)?;
    let mut transferring = prepared.approximate()?;
    transferring.calibrate()?;
    transferring.train()?;
    let mut finished = transferring.finish()?;
    finished.check()?;
    finished.report()
}

//! Where a job starts from: a student made before, and what tells one job from another.

use std::hash::{DefaultHasher, Hasher as _};
use std::io::Read as _;
use std::path::Path;

use mabert_graph::Model;
use mabert_passes::pipeline::PassOptions;
use serde_json::{Value, json};

use super::Job;
use super::report::pass_options;
use super::settings::FullStage;
use crate::{Error, Result, Setting, full};

/// A student made before, whose parameters are gone on from.
pub(super) struct StartStudent {
    pub(super) model: Model,
    /// How its teacher is brought into the same form; this time it is folded.
    pub(super) options: PassOptions,
}

impl StartStudent {
    /// # Errors
    /// The file is no student, or one whose norms are folded.
    pub(super) fn load(path: &Path) -> Result<Self> {
        let model = Model::load(path)?;
        let options = pass_options(&model)?;
        if options.fold {
            let reason = "its norms are folded into the weights; make one that is not folded".to_owned();
            let settings = &[Setting::Unfolded];
            return Err(Error::Student { model: path.display().to_string(), reason, settings });
        }
        Ok(Self { options: PassOptions { fold: true, until: None, ..options }, model })
    }
}

/// The folder for the state of the full stage, where the job has one.
///
/// # Errors
/// The folder cannot be used, or holds the state of another job.
pub(super) fn checkpoint(model: &Model, job: &Job) -> Result<Option<full::Checkpoint>> {
    let Some(stage) = job.transfer.full() else { return Ok(None) };
    let Some(folder) = &stage.checkpoint else { return Ok(None) };
    let files = job.data.iter().map(|data| &data.path).chain(&job.extra_data).chain(&job.tokenizer);
    if let Some(pipe) = files.into_iter().find(|path| std::fs::metadata(path).is_ok_and(|facts| !facts.is_file())) {
        let reason = format!("{}: a run that goes on reads its files again: give a file", pipe.display());
        return Err(Error::setting(reason, &[Setting::Checkpoint]));
    }
    full::Checkpoint::new(&folder.path, made_by(model, job, stage)?, folder.resume).map(Some)
}

/// All that the state of the full stage depends on.
fn made_by(model: &Model, job: &Job, stage: &FullStage) -> Result<Value> {
    let file = |path: &Path| (path.display().to_string(), contents(path));
    Ok(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model": model_identity(model)?,
        "student": stage.start.as_deref().map(model_file_identity),
        "data": job.data.as_ref().map(|d| (file(&d.path), &d.columns)),
        "extra data": job.extra_data.iter().map(|p| file(p)).collect::<Vec<_>>(),
        "augmentation": job.augmentation,
        "tokenizer": job.tokenizer.as_deref().map(file),
        "max-seq": job.max_seq,
        "hidden": job.hidden,
        "softmax": (job.softmax, job.target, job.softmax_error),
        "share": job.sharing,
        "length-tables": job.length_tables,
        "keep": job.keep,
        "bounds": job.bounds,
        "until": job.until,
        "partial": job.partial,
        "calibration-tokens": job.calibration_tokens,
        "pooling": (job.pooling, job.features(model.origin()).config().map(file)),
        "training": stage.options,
        "seed": job.seed,
        "positions a step": full::DEFAULT_POSITIONS,
    }))
}

/// What tells a model from others: where it came from a file, the contents of that file and of its data files; else its
/// own bytes.
fn model_identity(model: &Model) -> Result<Value> {
    let path = Path::new(model.origin());
    if path.is_file() {
        return Ok(model_file_identity(path));
    }
    let mut hasher = DefaultHasher::new();
    hasher.write(&model.to_bytes()?);
    Ok(json!([model.origin(), hasher.finish()]))
}

/// The file's name, its contents, and those of the files that it keeps its weights in.
fn model_file_identity(path: &Path) -> Value {
    let data = mabert_graph::data_files(path).unwrap_or_default();
    json!([path.display().to_string(), contents(path), data.iter().map(|file| contents(file)).collect::<Vec<_>>()])
}

/// A number that tells a file's contents from others; `None` where it cannot be read.
fn contents(path: &Path) -> Option<u64> {
    let mut file = std::fs::File::open(path).ok()?;
    let mut hasher = DefaultHasher::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).ok()? {
            0 => return Some(hasher.finish()),
            read => hasher.write(&buffer[..read]),
        }
    }
}

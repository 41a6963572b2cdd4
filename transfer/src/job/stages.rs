//! The stages of transfer, one after the other, each measured.

use std::time::{Duration, Instant};

use mabert_passes::lower::{Form, NormRanges};
use mabert_passes::pipeline::{Rewriting, Student};

use super::measure::Measured;
use super::origin::StartStudent;
use super::prepare::Context;
use super::report::{DevReport, StageReport};
use super::softmax::weighing;
use super::{Job, Transfer, TransferKind};
use crate::Result;
use crate::blockwise::BlockwiseOptions;
use crate::full::{self, Checkpoint, FullOptions, FullReport, Training};
use crate::layerwise::{self, LayerwiseOptions, LayerwiseReport};

/// A job under way.
pub(super) struct Transferring<'j> {
    pub(super) context: Context<'j>,
    pub(super) rewriting: Rewriting,
    pub(super) student: Student,
    pub(super) start: Option<StartStudent>,
    pub(super) checkpoint: Option<Checkpoint>,
    pub(super) record: Record,
}

/// What the stages did.
pub(super) struct Record {
    /// Whether the student's parameters are found at all.
    pub(super) calibrates: bool,
    pub(super) layerwise: Option<LayerwiseReport>,
    /// What the norms put out for the calibration text, where no later stage changed that.
    seen: Option<NormRanges>,
    pub(super) full: Option<FullReport>,
    pub(super) stages: Vec<StageReport>,
    /// What the labelled texts say after the last stage, where there are any.
    pub(super) dev: Option<DevReport>,
    /// The most that exact passes changed, relative to outputs above 1.
    pub(super) exact_change: f64,
    /// When the stage that is under way began.
    stage_begun: Instant,
}

impl Transferring<'_> {
    /// Finds the student's parameters: those of the checkpoint or of the student to start from, or layer by layer.
    pub(super) fn calibrate(&mut self) -> Result<()> {
        self.rehearse()?;
        self.record.stage_begun = Instant::now();
        let teacher = &self.rewriting.teacher;
        let resumed = self.checkpoint.as_ref().map(Checkpoint::start).transpose()?.flatten();
        // No model is held longer than its parameters are taken over.
        match (resumed, self.start.take()) {
            (Some((model, report)), _) => {
                if let Some(report) = report.as_ref().filter(|report| !report.choices.is_empty()) {
                    let forms: Vec<Form> = report.choices.iter().map(|choice| choice.form).collect();
                    self.student = self.rewriting.approximate_as(&forms)?;
                }
                full::adopt(teacher, &mut self.student, &model)?;
                self.record.layerwise = report;
            }
            (None, Some(start)) => full::adopt(teacher, &mut self.student, &start.model)?,
            (None, None) if self.record.calibrates => {
                let pooling = self.context.pooling;
                let weighing = weighing(self.context.job, &self.rewriting).ok();
                let options = LayerwiseOptions { pooling, weighing, ..layerwise_options(self.context.job) };
                let Context { texts, progress, .. } = &self.context;
                let (report, seen) =
                    layerwise::calibrate(&self.rewriting, &mut self.student, &texts.calibration, &options, *progress)?;
                self.record.layerwise = Some(report);
                self.record.seen = Some(seen);
            }
            (None, None) => {}
        }
        Ok(())
    }

    /// Tries out the full stage before the long work, not after it.
    fn rehearse(&self) -> Result<()> {
        match self.full_options() {
            Some(options) => training(&self.context, &self.rewriting, &options).rehearse(&self.student),
            None => Ok(()),
        }
    }

    /// The end-to-end stage, where the job has one.
    pub(super) fn train(&mut self) -> Result<()> {
        let Some(options) = self.full_options() else { return Ok(()) };
        self.save_start()?;
        let measured = self.context.reference.run(&self.student.model)?;
        let stage = if self.context.job.start().is_some() { "start" } else { TransferKind::Blockwise.name() };
        self.record.note(&self.context, stage, &measured)?;
        drop(measured);
        self.record.stage_begun = Instant::now();
        let Self { context, rewriting, .. } = self;
        let options = FullOptions { time: options.time.map(|time| time_left(time, context.begun)), ..options };
        let training = training(context, rewriting, &options);
        let report = training.train(&mut self.student, self.checkpoint.as_ref(), context.progress)?;
        self.record.full = Some(report);
        self.record.seen = None;
        Ok(())
    }

    /// What the norms of the student put out for the calibration text; `None` where nothing is calibrated, or bounds are
    /// off.
    pub(super) fn seen(&mut self) -> Result<Option<NormRanges>> {
        let options = &self.student.options;
        if !self.record.calibrates || !options.bounds || options.keep.norm {
            return Ok(None);
        }
        match self.record.seen.take() {
            None => layerwise::norm_ranges(&self.student, &self.context.texts.calibration).map(Some),
            seen => Ok(seen),
        }
    }

    /// How the full stage works, where there is one and a student that can be trained.
    fn full_options(&self) -> Option<FullOptions> {
        self.context.job.full_options().filter(|_| self.record.calibrates)
    }

    /// Keeps the student with which the full stage starts, unless it was taken up from there.
    fn save_start(&self) -> Result<()> {
        let Some(checkpoint) = self.checkpoint.as_ref().filter(|c| !c.has_start()) else { return Ok(()) };
        if self.context.job.resumes() {
            self.context.progress.summary("there was no checkpoint to resume: this run starts anew");
        }
        checkpoint.save_start(&self.student.model, self.record.layerwise.as_ref())
    }
}

impl Record {
    pub(super) fn new(calibrates: bool) -> Self {
        Self {
            calibrates,
            layerwise: None,
            seen: None,
            full: None,
            stages: Vec::new(),
            dev: None,
            exact_change: 0.0,
            stage_begun: Instant::now(),
        }
    }

    /// Takes down what a stage achieved.
    pub(super) fn note(&mut self, context: &Context<'_>, stage: &'static str, measured: &Measured) -> Result<()> {
        let seconds = self.stage_begun.elapsed().as_secs_f64();
        let outputs = context.reference.distances(&measured.outputs)?;
        self.dev = context.reference.dev_report(&measured.runnable)?;
        let report = StageReport { stage, seconds, outputs, dev: self.dev.as_ref().map(|d| d.student) };
        context.progress.summary(&report.summary(self.dev.as_ref()));
        self.stages.push(report);
        Ok(())
    }
}

/// What the end-to-end stage has of a job's time: what the stages before it left, without what it takes to finish and
/// to measure, and never less than a tenth.
fn time_left(time: Duration, begun: Instant) -> Duration {
    const TO_FINISH: f64 = 0.06;
    let left = time.mul_f64(1.0 - TO_FINISH).saturating_sub(begun.elapsed());
    left.max(time / 10)
}

/// The full stage on a job's texts.
fn training<'t>(context: &'t Context<'_>, rewriting: &'t Rewriting, options: &'t FullOptions) -> Training<'t> {
    let data = context.texts.training_data();
    Training { rewriting, data, options, features: &context.reference.features }
}

/// How the layers are calibrated, with gradient steps on each block where they are wanted.
fn layerwise_options(job: &Job) -> LayerwiseOptions {
    let for_text = LayerwiseOptions { seed: job.seed, ..LayerwiseOptions::default() };
    // Random tokens are all alike: few rows and steps tell what there is to know.
    let for_random_tokens =
        LayerwiseOptions { fit_rows: 6_000, fit_steps: 600, hinge_rows: 4_000, hinge_steps: 300, ..for_text };
    let options = if job.data.is_some() { for_text } else { for_random_tokens };
    let takes_steps = matches!(job.transfer, Transfer::Blockwise | Transfer::Full(_));
    LayerwiseOptions { blockwise: takes_steps.then(BlockwiseOptions::default), ..options }
}

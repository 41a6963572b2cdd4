//! The main job: from a model's file to a rewritten, calibrated and measured student.

mod report;
mod rounding;
mod sequences;

use std::path::{Path, PathBuf};
use std::time::Instant;

use mabert_graph::Model;
use mabert_passes::contract::non_linear_nodes;
use mabert_passes::lower::{ApproximatorOptions, Sharing};
use mabert_passes::pipeline::{Keep, Order, Pass, PassOptions, Rewriting, Student};
use mabert_passes::recognise::PROBED;
use mabert_passes::recording::{check_sizes, longest_sequence};
use mabert_passes::sites::{Encoder, Precision};
use mabert_runtime::{LoadOptions, Named, Taps, borrowed};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

pub use report::{DevReport, OddInputs, Report, SiteReport, Stage};
pub use sequences::{DEFAULT_TOKENS, Source};

use crate::compare::{self, Distances, OutputDistance, Tolerance};
use crate::data::{
    Batch, BatchShape, Columns, Overlong, Sequence, TextEncoder, batches, odd_sequences, read_sequences,
};
use crate::evaluate::{self, Metric, Spread};
use crate::progress::Progress;
use crate::{Error, Result, blockwise, full, layerwise};
use report::{describe, peak_memory, sites};
use sequences::{HELD_OUT_SEED, Sequences, vocabulary};

/// The longest sequence where none is asked for.
pub const DEFAULT_MAX_SEQ: usize = 128;
/// The largest hidden size of an approximator where none is asked for.
pub const DEFAULT_HIDDEN: usize = 128;
/// Positions of one batch, and rows at most.
const BATCH_TOKENS: usize = 1024;
const BATCH_ROWS: usize = 64;
/// Batches on which the model in canonical form is compared with itself.
const CANONICAL_BATCHES: usize = 4;
/// What the exact passes may change, relative to outputs above 1.
const EXACT: f64 = 1e-3;
/// The same where weights are rounded to half precision at the end.
const EXACT_IN_HALF: f64 = 5e-2;

/// How the student's parameters are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transfer {
    /// They are not: for looking at the structure.
    None,
    /// Layer by layer, by least squares.
    ClosedForm,
    /// The same, with gradient steps on each attention block.
    Blockwise,
    /// After that, gradient steps on everything at once.
    Full,
}

impl Transfer {
    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::ClosedForm => "closed-form",
            Self::Blockwise => "blockwise",
            Self::Full => "full",
        }
    }
}

/// Text to calibrate on.
#[derive(Clone, Debug)]
pub struct Data {
    /// The file.
    pub path: PathBuf,
    /// Its columns.
    pub columns: Columns,
}

/// A labelled file on which teacher and student are compared.
#[derive(Clone, Debug)]
pub struct Dev {
    /// The file, and its columns with the label's.
    pub data: Data,
    /// What is measured.
    pub metric: Metric,
}

/// A folder for the state of the full stage, see [`full::Checkpoint`].
#[derive(Clone, Debug)]
pub struct CheckpointFolder {
    /// The folder.
    pub path: PathBuf,
    /// Whether an interrupted run is gone on with.
    pub resume: bool,
}

/// What is to be done. By default: everything, on made-up tokens, by the closed form.
#[derive(Clone, Debug)]
pub struct Job {
    /// The longest sequence, `n`; without it the model's own limit, up to [`DEFAULT_MAX_SEQ`].
    pub max_seq: Option<usize>,
    /// The approximators' hidden size, `h`; without it `n`, up to [`DEFAULT_HIDDEN`].
    pub hidden: Option<usize>,
    /// Which heads share an approximator.
    pub sharing: Sharing,
    /// Whether approximators depend on the number of real tokens.
    pub length_tables: bool,
    /// The order of attention's products.
    pub order: Order,
    /// What is left as it is.
    pub keep: Keep,
    /// Whether norms are folded.
    pub fold: bool,
    /// The last pass to run.
    pub until: Option<Pass>,
    /// Whether missed sites are accepted.
    pub partial: bool,
    /// How parameters are found.
    pub transfer: Transfer,
    /// Options of the full stage.
    pub full: full::FullOptions,
    /// A student that was not folded: its parameters are taken in place of the closed form's, and the options of the
    /// passes in place of these.
    pub parameters: Option<PathBuf>,
    /// Where the full stage leaves its state.
    pub checkpoint: Option<CheckpointFolder>,
    /// Text; random tokens are made up without it. The label's column is read where [`full::FullOptions::alpha`] is below 1.
    pub data: Option<Data>,
    /// Files of more text, to calibrate and train on but not to measure on: half of all comes from them.
    pub extra_data: Vec<PathBuf>,
    /// Labelled data to measure on after each stage.
    pub dev: Option<Dev>,
    /// The model's `tokenizer.json`: for data that is text, and for the special tokens around random ones.
    pub tokenizer: Option<PathBuf>,
    /// Tokens that go through the student.
    pub calibration_tokens: Option<usize>,
    /// Seed of everything drawn at random.
    pub seed: u64,
}

impl Default for Job {
    fn default() -> Self {
        Self {
            max_seq: None,
            hidden: None,
            sharing: Sharing::PerHead,
            length_tables: true,
            order: Order::Linear,
            keep: Keep::default(),
            fold: true,
            until: None,
            partial: false,
            transfer: Transfer::ClosedForm,
            full: full::FullOptions::default(),
            parameters: None,
            checkpoint: None,
            data: None,
            extra_data: Vec::new(),
            dev: None,
            tokenizer: None,
            calibration_tokens: None,
            seed: 0,
        }
    }
}

/// Rewrites the model in `path` in memory.
///
/// # Errors
/// The file is no model or no encoder, has sites that are not recognised, or options or data do not fit it; or a
/// check of the result does not hold.
pub fn rewrite(path: &Path, job: &Job, progress: &dyn Progress) -> Result<(Model, Report)> {
    let start = Instant::now();
    progress.begin("prepare", 3);
    let original = Model::load(path)?;
    let runnable = LoadOptions::default().prepare(&original)?;
    check_sizes(&original, &runnable, PROBED)?;
    let given = job.parameters.as_deref().map(Given::load).transpose()?;
    let options = match &given {
        Some(given) => given.options.clone(),
        None => options(job, max_seq(&original, &runnable, job.max_seq)?)?,
    };
    progress.step("loaded");
    let max_seq = options.approximator.max_seq;
    let encoder = TextEncoder::new(job.tokenizer.as_deref(), max_seq, Overlong::Truncate)?;
    let vocabulary = vocabulary(&original, &encoder)?;
    let checkpoint = job.checkpoint.as_ref().map(|c| full::Checkpoint::new(&c.path, made_by(path, job), c.resume));
    let checkpoint = checkpoint.transpose()?;
    let Sequences { source, calibration, training, judges, held_out } = Sequences::new(job, &encoder, &vocabulary)?;
    let odd = odd_sequences(&vocabulary, max_seq, job.seed ^ HELD_OUT_SEED);
    let shape = BatchShape::of(runnable.inputs());
    let [calibration, held_out, odd] =
        [calibration, held_out, odd].map(|s| batches(&s, BATCH_TOKENS, BATCH_ROWS, shape));
    let of_teacher = outputs(&runnable, &held_out)?;
    if let bad @ 1.. = overflows(&held_out, &of_teacher) {
        let reason = format!("its outputs are not finite on {bad} of {} sequences", count(&held_out));
        return Err(Error::Calibration { site: path.display().to_string(), reason });
    }
    let dev = job.dev.as_ref().map(|dev| DevSet::new(dev, &encoder, &runnable)).transpose()?;
    // Large models are held as few times as possible: nothing prepared is kept longer than it runs.
    drop(runnable);
    progress.step("teacher measured");
    let operators_before = original.operators();
    let rewriting = Rewriting::new(original, options)?;
    // The passes that make the teacher canonical are exact: a few batches show where one is not.
    let few = held_out.len().min(CANONICAL_BATCHES);
    let canonical = outputs(&LoadOptions::default().prepare(&rewriting.teacher)?, &held_out[..few])?;
    let canonical = furthest(&held_out[..few], &of_teacher[..few], &canonical)?;
    if canonical > EXACT {
        return Err(Error::Check(format!(
            "the model in canonical form differs from itself by {canonical:.1e} of its size"
        )));
    }
    let mut student = rewriting.approximate()?;
    progress.step("recognised");
    progress.end();

    let measure = |model: &Model| -> Result<(mabert_runtime::Model, Vec<Named>)> {
        let prepared = LoadOptions::default().prepare(model)?;
        let outputs = outputs(&prepared, &held_out)?;
        Ok((prepared, outputs))
    };
    let mut stages: Vec<Stage> = Vec::new();
    let mut note = |stage: &'static str, seconds: f64, engine: &mabert_runtime::Model, of_student: &[Named]| {
        let outputs = distances(&held_out, &of_teacher, of_student)?;
        let dev = dev.as_ref().map(|dev| dev.measure(engine)).transpose()?;
        let stage = Stage { stage, seconds, outputs, dev: dev.as_ref().map(|d| d.student) };
        progress.summary(&stage.summary(dev.as_ref()));
        stages.push(stage);
        Ok::<_, Error>(dev)
    };
    let data = full::Data { sequences: &training, judges: &judges, shape };
    let full_options = full::FullOptions { seed: job.seed, ..job.full };
    let calibrates = job.transfer != Transfer::None && student.ran(Pass::Canonical);
    if job.transfer == Transfer::Full && calibrates {
        // Before the long work, not after it.
        full::rehearse(&rewriting, &student, &data, &full_options)?;
    }
    let resumed = checkpoint.as_ref().map(full::Checkpoint::start).transpose()?.flatten();
    let mut stage_start = Instant::now();
    let mut closed_form = None;
    match (resumed, &given) {
        (Some((start, report)), _) => {
            full::adopt(&rewriting.teacher, &mut student, &start)?;
            closed_form = report;
        }
        (None, Some(given)) => full::adopt(&rewriting.teacher, &mut student, &given.model)?,
        (None, None) if calibrates => {
            closed_form = Some(calibrate(&rewriting, &mut student, &calibration, job, progress)?);
        }
        _ => {}
    }
    let mut full = None;
    if job.transfer == Transfer::Full && calibrates {
        if let Some(checkpoint) = checkpoint.as_ref().filter(|c| !c.has_start()) {
            if job.checkpoint.as_ref().is_some_and(|c| c.resume) {
                progress.summary("there was no checkpoint to resume: this run starts anew");
            }
            checkpoint.save_start(&student.model, closed_form.as_ref())?;
        }
        let (prepared, found) = measure(&student.model)?;
        note(
            if given.is_some() { "start" } else { "blockwise" },
            stage_start.elapsed().as_secs_f64(),
            &prepared,
            &found,
        )?;
        drop((prepared, found));
        stage_start = Instant::now();
        full = Some(full::train(&rewriting, &mut student, &data, &full_options, checkpoint.as_ref(), progress)?);
    }

    progress.begin("finish", 3);
    let Rewriting { teacher, encoder, misses, precision, .. } = rewriting;
    let half = precision == Precision::Half;
    let end = |of: &Encoder| of.layers.last().map(|l| l.output_norm.output.clone());
    let mask = encoder.mask.as_ref().map(|m| m.input.as_str());
    let non_linear_before = non_linear_nodes(&teacher, mask, end(&encoder).as_deref())?.len();
    drop(teacher);
    let (_, unfinished) = measure(&student.model)?;
    if let (true, bad @ 1..) = (calibrates, overflows(&held_out, &unfinished)) {
        return Err(Error::Check(format!(
            "the student's outputs overflow on {bad} of {} sequences that were kept apart: give it more text \
             (--data, --calibration-tokens), or keep what holds it (--keep norm)",
            count(&held_out)
        )));
    }
    progress.step("student measured");
    let uncalibrated = (!calibrates).then(|| student.model.clone());
    student.finish()?;
    let sites = sites(&encoder, &student, closed_form.as_ref());
    describe(&mut student.model, job, &student.options, &sites);
    progress.step("folded");
    let (prepared, finished) = measure(&student.model)?;
    let odd_inputs = OddInputs { sequences: count(&odd), overflow: overflows(&odd, &outputs(&prepared, &odd)?) };
    progress.end();
    let exact = furthest(&held_out, &unfinished, &finished)?;
    let mut bound = if half { EXACT_IN_HALF } else { EXACT };
    let bad = overflows(&held_out, &unfinished);
    if !calibrates && bad > 0 {
        progress.summary(&format!(
            "the exact passes were not checked: before it is calibrated, the student overflows on {bad} of {} sequences",
            count(&held_out)
        ));
        bound = f64::INFINITY;
    }
    if let Some(uncalibrated) = &uncalibrated
        && exact > bound
    {
        let by = if half { 2f32.powi(-11) } else { 2f32.powi(-23) };
        let moved = rounding::sensitivity(uncalibrated, by, &held_out, &unfinished)?;
        // Where rounding alone overflows, nothing can be told.
        if moved.is_finite() {
            bound = bound.max(4.0 * moved);
        }
    }
    if exact > bound {
        let hint = match calibrates {
            true => "",
            false => ": nothing holds its values before it is calibrated; use --transfer closed-form",
        };
        return Err(Error::Check(format!("the exact passes changed the outputs by {exact:.1e} of their size{hint}")));
    }
    if half && calibrates {
        refuse_beyond_half(&student.model, &held_out)?;
    }
    let dev = note(job.transfer.name(), stage_start.elapsed().as_secs_f64(), &prepared, &finished)?;
    drop(prepared);
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        model: path.display().to_string(),
        options: student.options.clone(),
        transfer: job.transfer,
        seed: job.seed,
        passes: student.outcomes.clone(),
        sites,
        misses,
        fold: student.fold,
        source: calibrates.then_some(source),
        closed_form,
        full,
        stages,
        dev,
        outputs: distances(&held_out, &of_teacher, &finished)?,
        odd_inputs,
        exact_passes_differ_by: exact.max(canonical),
        operators_before,
        operators_after: student.model.operators(),
        non_linear_before,
        non_linear_after: non_linear_nodes(&student.model, mask, end(&student.encoder).as_deref())?,
        parameters: student.model.graph().initializer.iter().map(|t| t.dims.iter().product::<i64>() as usize).sum(),
        seconds: start.elapsed().as_secs_f64(),
        peak_memory: peak_memory(),
    };
    Ok((student.model, report))
}

/// Every value that the student computes on `batches` must fit half precision, in which it will be run.
fn refuse_beyond_half(student: &Model, batches: &[Batch]) -> Result<()> {
    const LARGEST: f32 = 65_504.0;
    let everything = LoadOptions::default().taps(Taps::Everything).prepare(student)?;
    for batch in batches {
        let inputs = batch.inputs(everything.inputs())?;
        let given = borrowed(&inputs);
        for (name, value) in everything.run(&given)? {
            let largest = value.as_f32().map_or(0.0, |v| v.iter().fold(0f32, |m, x| m.max(x.abs())));
            if largest > LARGEST {
                return Err(Error::Check(format!(
                    "`{name}` of the student reaches {largest:.1e}, beyond half precision's {LARGEST}: keep what holds it \
                     (--keep norm), or rewrite the model in single precision"
                )));
            }
        }
    }
    Ok(())
}

/// The closed form, with gradient steps on each block where they are wanted.
fn calibrate(
    rewriting: &Rewriting,
    student: &mut Student,
    calibration: &[Batch],
    job: &Job,
    progress: &dyn Progress,
) -> Result<layerwise::LayerwiseReport> {
    let defaults = layerwise::LayerwiseOptions { seed: job.seed, ..layerwise::LayerwiseOptions::default() };
    // Random tokens are all alike: few rows and steps tell what there is to know.
    let quick = layerwise::LayerwiseOptions { fit_rows: 6_000, fit_steps: 600, ..defaults };
    let options = if job.data.is_some() { defaults } else { quick };
    let blockwise =
        matches!(job.transfer, Transfer::Blockwise | Transfer::Full).then(blockwise::BlockwiseOptions::default);
    layerwise::calibrate(
        rewriting,
        student,
        calibration,
        &layerwise::LayerwiseOptions { blockwise, ..options },
        progress,
    )
}

/// A student made before, whose parameters are gone on from.
struct Given {
    model: Model,
    options: PassOptions,
}

impl Given {
    fn load(path: &Path) -> Result<Self> {
        let model = Model::load(path)?;
        let options = report::options_of(&model)?;
        if options.fold {
            let reason = "its norms are folded into the weights; make it with `rewrite --no-fold`".to_owned();
            return Err(Error::Calibration { site: path.display().to_string(), reason });
        }
        Ok(Self { options: PassOptions { fold: true, until: None, ..options }, model })
    }
}

/// Labelled texts, and what the teacher makes of them.
struct DevSet {
    file: PathBuf,
    metric: Metric,
    sequences: Vec<Sequence>,
    labels: Vec<f64>,
    teacher: Vec<f64>,
}

impl DevSet {
    fn new(dev: &Dev, encoder: &TextEncoder, teacher: &mabert_runtime::Model) -> Result<Self> {
        let sequences = read_sequences(&dev.data.path, &dev.data.columns, encoder)?;
        let labels = evaluate::labels(&dev.data.path, &sequences)?;
        let logits = evaluate::logits(teacher, &sequences, Spread::Batches)?;
        evaluate::check_labels(dev.metric, logits.ncols(), &dev.data.path, &sequences, &labels)?;
        let teacher = evaluate::predictions(dev.metric, &logits)?;
        Ok(Self { file: dev.data.path.clone(), metric: dev.metric, sequences, labels, teacher })
    }

    fn measure(&self, student: &mabert_runtime::Model) -> Result<DevReport> {
        let logits = evaluate::logits(student, &self.sequences, Spread::Batches)?;
        // A text without an answer is answered wrongly; it does not stop the work.
        let (found, overflow) = evaluate::predictions_with_overflow(self.metric, &logits)?;
        Ok(DevReport {
            overflow,
            file: self.file.clone(),
            examples: self.sequences.len(),
            metric: self.metric,
            teacher: self.metric.of(&self.teacher, &self.labels),
            student: self.metric.of(&found, &self.labels),
            agreement: self.metric.likeness().of(&found, &self.teacher),
        })
    }
}

/// A number that tells a file's contents from others; `None` where it cannot be read.
fn contents(path: &Path) -> Option<u64> {
    use std::hash::Hasher as _;
    use std::io::Read as _;
    let mut file = std::fs::File::open(path).ok()?;
    let mut hasher = std::hash::DefaultHasher::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).ok()? {
            0 => return Some(hasher.finish()),
            read => hasher.write(&buffer[..read]),
        }
    }
}

/// Where a model's external data lies, as this program writes it.
fn with_data(model: &Path) -> PathBuf {
    let mut data = model.as_os_str().to_owned();
    data.push(".data");
    data.into()
}

/// All that the state of the full stage depends on.
fn made_by(model: &Path, job: &Job) -> serde_json::Value {
    let file = |path: &Path| (path.display().to_string(), contents(path), contents(&with_data(path)));
    let optional = |path: &Option<PathBuf>| path.as_deref().map(file);
    serde_json::json!({
        "version": env!("CARGO_PKG_VERSION"),
        "model": file(model),
        "student": optional(&job.parameters),
        "data": job.data.as_ref().map(|d| (file(&d.path), &d.columns)),
        "extra data": job.extra_data.iter().map(|p| file(p)).collect::<Vec<_>>(),
        "tokenizer": optional(&job.tokenizer),
        "max-seq": job.max_seq,
        "hidden": job.hidden,
        "softmax": job.sharing,
        "length-tables": job.length_tables,
        "keep": job.keep,
        "until": job.until,
        "partial": job.partial,
        "calibration-tokens": job.calibration_tokens,
        "training": job.full,
        "seed": job.seed,
        "positions a step": full::DEFAULT_POSITIONS,
    })
}

/// How the passes are told to work.
fn options(job: &Job, max_seq: usize) -> Result<PassOptions> {
    let hidden = job.hidden.unwrap_or(max_seq.min(DEFAULT_HIDDEN));
    if hidden == 0 {
        return Err(Error::option("--hidden must be at least 1"));
    }
    let approximator = ApproximatorOptions { max_seq, hidden, sharing: job.sharing, length_tables: job.length_tables };
    Ok(PassOptions {
        approximator,
        order: job.order,
        keep: job.keep,
        fold: job.fold,
        until: job.until,
        partial: job.partial,
    })
}

/// The longest sequence that the student will take: what was asked for, if the model can do it.
fn max_seq(model: &Model, runnable: &mabert_runtime::Model, wanted: Option<usize>) -> Result<usize> {
    // One position leaves no room for text between [CLS] and [SEP], and nothing to attend to.
    if wanted.is_some_and(|n| n < 2) {
        return Err(Error::option("--max-seq must be at least 2"));
    }
    if let Some(fixed) = BatchShape::of(runnable.inputs()).length {
        return match wanted {
            Some(n) if n != fixed => {
                Err(Error::option(format!("--max-seq {n}: the model's inputs have a fixed length of {fixed}")))
            }
            _ => Ok(fixed),
        };
    }
    match (longest_sequence(model, runnable, wanted.unwrap_or(DEFAULT_MAX_SEQ))?, wanted) {
        ((limit, Some(limited_by)), Some(n)) => {
            Err(Error::option(format!("--max-seq {n} is beyond the model's limit of {limit} ({limited_by})")))
        }
        ((longest, _), _) => Ok(longest),
    }
}

/// The outputs for every batch.
fn outputs(model: &mabert_runtime::Model, batches: &[Batch]) -> Result<Vec<Named>> {
    let run = |batch: &Batch| -> Result<Named> {
        let inputs = batch.inputs(model.inputs())?;
        let given = borrowed(&inputs);
        Ok(model.run(&given)?)
    };
    batches.par_iter().map(run).collect()
}

/// How far the outputs of `second` are from those of `first`, in units of `1 + |first|` where `exceeds` is concerned.
fn distances(batches: &[Batch], first: &[Named], second: &[Named]) -> Result<Vec<OutputDistance>> {
    let mut distances = Distances::new(Tolerance { elements: Some((1.0, 1.0)), cosine: None });
    for (batch, (a, b)) in batches.iter().zip(first.iter().zip(second)) {
        distances.add(a, b, Some(&batch.lengths))?;
    }
    Ok(distances.outputs())
}

/// The furthest of all outputs, relative to outputs above 1.
fn furthest(batches: &[Batch], first: &[Named], second: &[Named]) -> Result<f64> {
    Ok(distances(batches, first, second)?.iter().map(|o| o.exceeds).fold(0.0, f64::max))
}

/// Sequences in batches.
fn count(batches: &[Batch]) -> usize {
    batches.iter().map(|b| b.rows.len()).sum()
}

/// How many sequences have an output that is not finite.
fn overflows(batches: &[Batch], outputs: &[Named]) -> usize {
    batches.iter().zip(outputs).map(|(batch, outputs)| compare::overflows(outputs, &batch.lengths)).sum()
}

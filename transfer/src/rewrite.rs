//! The main job: from a model's file to a rewritten, calibrated and measured student.

use std::path::{Path, PathBuf};
use std::time::Instant;

use mabert_graph::{Model, Tensor};
use mabert_passes::contract::{NonLinear, non_linear_nodes};
use mabert_passes::pipeline::{Keep, Options as PassOptions, Order, Outcome, Pass, Rewriting, Student, VERSION_KEY};
use mabert_passes::recognise::Miss;
use mabert_passes::recording::{longest_sequence, token_rows};
use mabert_passes::rewrite::{ApproximatorOptions, FoldReport, Sharing};
use mabert_passes::sites::{Activation, Encoder};
use mabert_runtime::{MAX_SEQ_KEY, Named, Options as RunOptions};
use rayon::prelude::*;
use serde::Serialize;

use crate::blockwise;
use crate::closed_form::{self, SiteError};
use crate::compare::{self, Distances, OutputDistance, Tolerance};
use crate::data::{
    Batch, BatchShape, Columns, Overlong, Sequence, TextEncoder, Vocabulary, batches, calibration_sample,
    made_up_sequences, odd_sequences,
};
use crate::progress::Progress;
use crate::{Error, Result};

/// The longest sequence where none is asked for.
pub const DEFAULT_MAX_SEQ: usize = 128;
/// The largest hidden size of an approximator where none is asked for.
pub const DEFAULT_HIDDEN: usize = 128;
/// Tokens that go through the student where no number is asked for: of text, and made up.
pub const DEFAULT_TOKENS: (usize, usize) = (40_000, 12_000);
/// Sequences kept apart to measure the outputs on.
const HELD_OUT: usize = 256;
/// Where sequences are made up, those kept apart are drawn with another seed.
const HELD_OUT_SEED: u64 = 0x5eed;
/// Positions of one batch, and rows at most.
const BATCH_TOKENS: usize = 1024;
const BATCH_ROWS: usize = 64;
/// What the exact passes may change, relative to outputs above 1.
const EXACT: f64 = 1e-3;

/// The `metadata_props` keys under which the student says how it was made.
const OPTIONS_KEY: &str = "onnx_mabert.options";
const SITES_KEY: &str = "onnx_mabert.sites";

/// How the student's parameters are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transfer {
    /// They are not: for looking at the structure.
    None,
    /// Layer by layer, by least squares.
    ClosedForm,
    /// The same, with gradient steps on each attention block.
    Blockwise,
}

/// Text to calibrate on.
#[derive(Clone, Debug)]
pub struct Data {
    /// The file.
    pub path: PathBuf,
    /// Its columns.
    pub columns: Columns,
}

/// What is to be done.
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
    /// Text; random tokens are made up without it.
    pub data: Option<Data>,
    /// The model's `tokenizer.json`: for data that is text, and for the special tokens around random ones.
    pub tokenizer: Option<PathBuf>,
    /// Tokens that go through the student.
    pub calibration_tokens: Option<usize>,
    /// Seed of everything drawn at random.
    pub seed: u64,
}

/// Where calibration came from.
#[derive(Clone, Debug, Serialize)]
pub struct Source {
    /// The data file; `None` for made-up tokens.
    pub file: Option<PathBuf>,
    /// Examples that it holds.
    pub examples: usize,
    /// Sequences that went through the student.
    pub sequences: usize,
    /// Sequences kept apart to measure on.
    pub held_out: usize,
    /// Texts that were cut to the longest length.
    pub truncated: usize,
}

/// A few random tokens, and one token over and over, see [`odd_sequences`]: no norm bounds a student, and what text
/// does not prepare it for may overflow.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct OddInputs {
    /// Sequences tried; none of them was calibrated on.
    pub sequences: usize,
    /// Those with an output that is not finite.
    pub overflow: usize,
}

/// One site and what became of it.
#[derive(Clone, Debug, Serialize)]
pub struct SiteReport {
    /// Its name, as in `layer.0/attention`.
    pub site: String,
    /// attention, activation or norm.
    pub kind: &'static str,
    /// The node around which it was recognised.
    pub node: String,
    /// What it was: an operator, or the function that its nodes compute.
    pub was: String,
    /// What it is now.
    pub now: &'static str,
    /// How far from the teacher on the calibration data, see [`SiteError`].
    pub relative_error: Option<f64>,
}

/// What was done, and how far the student is from its teacher.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The tool's version.
    pub version: &'static str,
    /// The teacher's file.
    pub model: String,
    /// How the passes were told to work.
    pub options: PassOptions,
    /// The stage of transfer.
    pub transfer: Transfer,
    /// The seed.
    pub seed: u64,
    /// What each pass did.
    pub passes: Vec<Outcome>,
    /// Every site.
    pub sites: Vec<SiteReport>,
    /// Sites that were missed and accepted.
    pub misses: Vec<Miss>,
    /// What folding did.
    pub fold: FoldReport,
    /// What the student was calibrated on; `None` where it was not.
    pub source: Option<Source>,
    /// What the closed-form stage did.
    pub closed_form: Option<closed_form::Report>,
    /// The student against its teacher on sequences that were kept apart.
    pub outputs: Vec<OutputDistance>,
    /// How the student takes inputs unlike text.
    pub odd_inputs: OddInputs,
    /// The finished student against itself before the exact passes: largest difference, relative to outputs above 1.
    pub exact_passes_differ_by: f64,
    /// Operators of the teacher.
    pub operators_before: std::collections::BTreeMap<String, usize>,
    /// Operators of the student.
    pub operators_after: std::collections::BTreeMap<String, usize>,
    /// Nodes that are not matrix arithmetic, in the teacher.
    pub non_linear_before: usize,
    /// Those of the student.
    pub non_linear_after: Vec<NonLinear>,
    /// Parameters of the student, in elements.
    pub parameters: usize,
    /// Seconds in all.
    pub seconds: f64,
    /// The process's largest memory so far in bytes, where the system tells.
    pub peak_memory: Option<u64>,
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
    let runnable = RunOptions::default().prepare(&original)?;
    let options = options(job, max_seq(&original, &runnable, job.max_seq)?)?;
    progress.step("loaded");
    let max_seq = options.approximator.max_seq;
    let encoder = TextEncoder::new(job.tokenizer.as_deref(), max_seq, Overlong::Truncate)?;
    let vocabulary = vocabulary(&original, &encoder)?;
    let (source, calibration, held_out) = sequences(job, &encoder, &vocabulary)?;
    let odd = odd_sequences(&vocabulary, max_seq, job.seed ^ HELD_OUT_SEED);
    let shape = BatchShape::of(runnable.inputs());
    let [calibration, held_out, odd] =
        [calibration, held_out, odd].map(|s| batches(&s, BATCH_TOKENS, BATCH_ROWS, shape));
    let of_teacher = outputs(&runnable, &held_out)?;
    if let bad @ 1.. = overflows(&held_out, &of_teacher) {
        let reason = format!("its outputs are not finite on {bad} of {} sequences", count(&held_out));
        return Err(Error::Calibration { site: path.display().to_string(), reason });
    }
    // Large models are held as few times as possible: nothing prepared is kept longer than it runs.
    drop(runnable);
    progress.step("teacher measured");
    let operators_before = original.operators();
    let rewriting = Rewriting::new(original, options)?;
    let mut student = rewriting.approximate()?;
    progress.step("recognised");
    progress.end();

    let calibrates = job.transfer != Transfer::None && student.ran(Pass::Canonical);
    let closed_form = calibrates.then(|| {
        let defaults = closed_form::Options { seed: job.seed, ..closed_form::Options::default() };
        // Random tokens are all alike: few rows and steps tell what there is to know.
        let quick = closed_form::Options { fit_rows: 6_000, fit_steps: 600, ..defaults };
        let options = if job.data.is_some() { defaults } else { quick };
        let blockwise = (job.transfer == Transfer::Blockwise).then(blockwise::Options::default);
        let options = closed_form::Options { blockwise, ..options };
        closed_form::calibrate(&rewriting, &mut student, &calibration, &options, progress)
    });
    let closed_form = closed_form.transpose()?;

    progress.begin("finish", 3);
    let Rewriting { teacher, encoder, misses, .. } = rewriting;
    let last = encoder.layers.last().map(|l| l.output_norm.output.as_str());
    let mask = encoder.mask.as_ref().map(|m| m.input.as_str());
    let non_linear_before = non_linear_nodes(&teacher, mask, last)?.len();
    drop(teacher);
    let unfinished = outputs(&RunOptions::default().prepare(&student.model)?, &held_out)?;
    if let (true, bad @ 1..) = (calibrates, overflows(&held_out, &unfinished)) {
        return Err(Error::Check(format!(
            "the student's outputs overflow on {bad} of {} sequences that were kept apart: give it more text \
             (--data, --calibration-tokens), or keep what holds it (--keep norm)",
            count(&held_out)
        )));
    }
    progress.step("student measured");
    student.finish()?;
    let sites = sites(&encoder, &student, closed_form.as_ref());
    describe(&mut student.model, job, &student.options, &sites);
    progress.step("folded");
    let prepared = RunOptions::default().prepare(&student.model)?;
    let finished = outputs(&prepared, &held_out)?;
    let odd_inputs = OddInputs { sequences: count(&odd), overflow: overflows(&odd, &outputs(&prepared, &odd)?) };
    drop(prepared);
    let exact = distances(&held_out, &unfinished, &finished)?.iter().map(|o| o.exceeds).fold(0.0, f64::max);
    progress.end();
    if exact > EXACT {
        return Err(Error::Check(format!("the exact passes changed the outputs by {exact:.1e} of their size")));
    }
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
        outputs: distances(&held_out, &of_teacher, &finished)?,
        odd_inputs,
        exact_passes_differ_by: exact,
        operators_before,
        operators_after: student.model.operators(),
        non_linear_before,
        non_linear_after: non_linear_nodes(&student.model, mask, last)?,
        parameters: student.model.graph().initializer.iter().map(|t| t.dims.iter().product::<i64>() as usize).sum(),
        seconds: start.elapsed().as_secs_f64(),
        peak_memory: peak_memory(),
    };
    Ok((student.model, report))
}

/// How the passes are told to work.
fn options(job: &Job, max_seq: usize) -> Result<PassOptions> {
    let hidden = job.hidden.unwrap_or(max_seq.min(DEFAULT_HIDDEN));
    if hidden == 0 {
        return Err(option("--hidden must be at least 1"));
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

/// The high-water mark of resident memory, from Linux's `/proc`.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

fn option(reason: impl Into<String>) -> Error {
    mabert_passes::Error::Option(reason.into()).into()
}

/// The longest sequence that the student will take: what was asked for, if the model can do it.
fn max_seq(model: &Model, runnable: &mabert_runtime::Model, wanted: Option<usize>) -> Result<usize> {
    // One position leaves no room for text between [CLS] and [SEP], and nothing to attend to.
    if wanted.is_some_and(|n| n < 2) {
        return Err(option("--max-seq must be at least 2"));
    }
    if let Some(fixed) = BatchShape::of(runnable.inputs()).length {
        return match wanted {
            Some(n) if n != fixed => {
                Err(option(format!("--max-seq {n}: the model's inputs have a fixed length of {fixed}")))
            }
            _ => Ok(fixed),
        };
    }
    match (longest_sequence(model, runnable, wanted.unwrap_or(DEFAULT_MAX_SEQ))?, wanted) {
        ((limit, Some(limited_by)), Some(n)) => {
            Err(option(format!("--max-seq {n} is beyond the model's limit of {limit} ({limited_by})")))
        }
        ((longest, _), _) => Ok(longest),
    }
}

/// What the student is calibrated and measured on.
fn sequences(
    job: &Job,
    encoder: &TextEncoder,
    vocabulary: &Vocabulary,
) -> Result<(Source, Vec<Sequence>, Vec<Sequence>)> {
    let max_seq = encoder.longest();
    let odd = odd_sequences(vocabulary, max_seq, job.seed);
    let Some(data) = &job.data else {
        let tokens = job.calibration_tokens.unwrap_or(DEFAULT_TOKENS.1);
        let mut calibration = made_up_sequences(vocabulary, max_seq, tokens, job.seed);
        calibration.extend(odd);
        let held_out = made_up_sequences(vocabulary, max_seq, 32 * max_seq, job.seed ^ HELD_OUT_SEED);
        let (sequences, apart) = (calibration.len(), held_out.len());
        let source = Source { file: None, examples: 0, sequences, held_out: apart, truncated: 0 };
        return Ok((source, calibration, held_out));
    };
    let tokens = job.calibration_tokens.unwrap_or(DEFAULT_TOKENS.0);
    let mut sample = calibration_sample(&data.path, &data.columns, encoder, tokens, HELD_OUT, job.seed)?;
    for sequence in sample.calibration.iter().chain(&sample.held_out) {
        if let Some(id) = sequence.ids.iter().find(|id| !vocabulary.holds(**id)) {
            let size = vocabulary.size;
            let reason =
                format!("token id {id} is outside the model's vocabulary of {size}: is the tokenizer this model's?");
            return Err(Error::line(&data.path, sequence.line, reason));
        }
    }
    let source = Source {
        file: Some(data.path.clone()),
        examples: sample.examples,
        sequences: sample.calibration.len() + odd.len(),
        held_out: sample.held_out.len(),
        truncated: sample.truncated,
    };
    // A file of a few texts leaves none to keep apart: then it is measured on what it was calibrated on.
    let held_out = if sample.held_out.is_empty() { sample.calibration.clone() } else { sample.held_out };
    sample.calibration.extend(odd);
    Ok((source, sample.calibration, held_out))
}

/// As many token ids as the table of word embeddings has rows, the largest that an input indexes; and the tokenizer's
/// special tokens.
fn vocabulary(model: &Model, encoder: &TextEncoder) -> Result<Vocabulary> {
    let index = mabert_graph::Index::new(model)?;
    let rows = model.inputs().iter().filter_map(|i| token_rows(&index, model, &i.name)).max();
    let size = rows.ok_or_else(|| {
        let reason = "no input indexes a table of embeddings".to_owned();
        mabert_passes::Error::NotBert { origin: model.origin().to_owned(), reason }
    })?;
    let vocabulary = Vocabulary { size, frame: encoder.frame()? };
    let (before, after) = &vocabulary.frame;
    match before.iter().chain(after).find(|id| !vocabulary.holds(**id)) {
        Some(id) => Err(option(format!(
            "--tokenizer: its special token {id} is outside the model's vocabulary of {size}: is it this model's?"
        ))),
        None => Ok(vocabulary),
    }
}

/// The outputs for every batch.
fn outputs(model: &mabert_runtime::Model, batches: &[Batch]) -> Result<Vec<Named>> {
    let run = |batch: &Batch| -> Result<Named> {
        let inputs = batch.inputs(model.inputs())?;
        let given: Vec<(&str, Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t.clone())).collect();
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

/// Sequences in batches.
fn count(batches: &[Batch]) -> usize {
    batches.iter().map(|b| b.rows.len()).sum()
}

/// How many sequences have an output that is not finite.
fn overflows(batches: &[Batch], outputs: &[Named]) -> usize {
    batches.iter().zip(outputs).map(|(batch, outputs)| compare::overflows(outputs, &batch.lengths)).sum()
}

/// Every site with what became of it.
fn sites(encoder: &Encoder, student: &Student, calibration: Option<&closed_form::Report>) -> Vec<SiteReport> {
    let error = |site: &str| {
        let sites = calibration.map_or(&[] as &[SiteError], |c| &c.sites);
        sites.iter().find(|s| s.site == site).map(|s| s.relative_error)
    };
    let norm_now = match (student.ran(Pass::Norm), student.ran(Pass::Fold)) {
        (false, _) => "kept",
        (true, false) => "affine",
        (true, true) => "affine, folded",
    };
    let attention_now = match (student.ran(Pass::Softmax), student.ran(Pass::Reassociate)) {
        (false, _) => "kept",
        (true, false) => "approximator, paper's order",
        (true, true) => "approximator, linear order",
    };
    let norm = |site: String, node: &str, was: &str| SiteReport {
        relative_error: error(&site),
        site,
        kind: "norm",
        node: node.to_owned(),
        was: was.to_owned(),
        now: norm_now,
    };
    let mut reports = Vec::new();
    for (name, site) in encoder.norms() {
        reports.push(norm(name, &site.node, &site.spelling));
    }
    for layer in &encoder.layers {
        let site = format!("layer.{}/attention", layer.index);
        reports.push(SiteReport {
            relative_error: error(&site).or_else(|| error("encoder/approximator")),
            site,
            kind: "attention",
            node: layer.attention.node.clone(),
            was: "Softmax".to_owned(),
            now: attention_now,
        });
        let function = layer.activation.function;
        reports.push(SiteReport {
            site: format!("layer.{}/activation", layer.index),
            kind: "activation",
            node: layer.activation.node.clone(),
            was: match function {
                Activation::GeluErf => "GELU (erf)",
                Activation::GeluTanh => "GELU (tanh)",
                Activation::Relu => "ReLU",
            }
            .to_owned(),
            now: if function == Activation::Relu || student.ran(Pass::Activation) { "ReLU" } else { "kept" },
            relative_error: None,
        });
    }
    let order = |s: &SiteReport| {
        let layer = s.site.strip_prefix("layer.").and_then(|s| s.split('/').next()?.parse::<usize>().ok());
        (
            layer.map_or(0, |l| l + 1),
            ["attention", "attention/norm", "activation", "output/norm"]
                .iter()
                .position(|p| s.site.ends_with(&format!("/{p}"))),
        )
    };
    reports.sort_by_key(order);
    reports
}

/// Writes into the model how it was made.
fn describe(model: &mut Model, job: &Job, options: &PassOptions, sites: &[SiteReport]) {
    #[derive(Serialize)]
    struct How<'a> {
        passes: &'a PassOptions,
        transfer: Transfer,
        seed: u64,
    }
    let how = How { passes: options, transfer: job.transfer, seed: job.seed };
    let json = |value: serde_json::Result<String>| value.expect("plain structures are valid JSON");
    model.set_metadata(VERSION_KEY, env!("CARGO_PKG_VERSION"));
    model.set_metadata(MAX_SEQ_KEY, &options.approximator.max_seq.to_string());
    model.set_metadata(OPTIONS_KEY, &json(serde_json::to_string(&how)));
    model.set_metadata(SITES_KEY, &json(serde_json::to_string(sites)));
}

//! What is told of a student, and written into it.

use std::path::PathBuf;

use mabert_graph::Model;
use mabert_passes::contract::NonLinear;
use mabert_passes::lower::{FoldReport, Form};
use mabert_passes::pipeline::{ENCODER_END_KEY, Outcome, Pass, PassOptions, Student, VERSION_KEY};
use mabert_passes::recognise::Miss;
use mabert_passes::sites::{Activation, Encoder, LayerSite, SiteId, SiteKind};
use mabert_runtime::MAX_SEQ_KEY;
use serde::{Deserialize, Serialize};

use super::beyond::BeyondReport;
use super::bounded::BoundsReport;
use super::finish::{Finished, non_linear};
use super::measure::Measured;
use super::quantised::Dequantised;
use super::sequences::Source;
use super::{Job, TransferKind};
use crate::compare::OutputDistance;
use crate::evaluate::Metric;
use crate::layerwise::{FormChoice, LayerwiseReport, SiteError};
use crate::{Error, Result, Setting, full};

/// The `metadata_props` keys under which the student says how it was made.
const OPTIONS_KEY: &str = "onnx_mabert.options";
const SITES_KEY: &str = "onnx_mabert.sites";

/// A few random tokens, and one token over and over, see [`odd_sequences`](crate::data::odd_sequences): no norm holds a student, and without
/// bounds what text does not prepare it for may overflow.
#[derive(Clone, Copy, Debug, Serialize)]
#[non_exhaustive]
pub struct OddInputs {
    /// Sequences tried; none of them was calibrated on.
    pub sequences: usize,
    /// Those with an output that is not finite.
    pub overflow: usize,
}

/// One site and what became of it.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct SiteReport {
    /// The site.
    pub site: SiteId,
    /// What it is.
    pub kind: SiteKind,
    /// The node around which it was recognised.
    pub node: String,
    /// What it was: an operator, or the function that its nodes compute.
    pub was: String,
    /// What it is now.
    pub now: &'static str,
    /// How far from the teacher on the calibration data, see [`SiteError`].
    pub relative_error: Option<f64>,
}

/// What one stage of transfer achieved.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct StageReport {
    /// closed-form, blockwise (which includes it) or full; start, where parameters were given.
    pub stage: &'static str,
    /// Seconds it took.
    pub seconds: f64,
    /// The student against its teacher on sequences that were kept apart.
    pub outputs: Vec<OutputDistance>,
    /// The metric on the dev file.
    pub dev: Option<f64>,
}

impl StageReport {
    /// One line for people.
    pub(super) fn summary(&self, dev: Option<&DevReport>) -> String {
        let mut line = format!("{}: {:.0} s", self.stage, self.seconds);
        for output in &self.outputs {
            line += &format!("; {} differs by {:.4} on average", output.output, output.mean_abs);
            if let Some(vectors) = &output.vectors {
                line += &format!(", mean cosine {:.4}", vectors.mean_cosine);
            }
            let neighbours = output.vectors.as_ref().and_then(|vectors| vectors.same_neighbour);
            for (name, share) in [("same neighbour", neighbours), ("same argmax", output.agreement)] {
                line += &share.map_or_else(String::new, |share| format!(", {name} {:.1} %", 100.0 * share));
            }
        }
        if let Some(dev) = dev {
            let metric = dev.metric.name();
            if dev.overflow > 0 {
                line += &format!("; {} dev texts overflow", dev.overflow);
            }
            line += &format!(
                "; dev {metric} {:.4} (teacher {:.4}, agreement {:.4})",
                dev.student, dev.teacher, dev.agreement
            );
        }
        line
    }
}

/// What the dev file says.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct DevReport {
    /// The file.
    pub file: PathBuf,
    /// Its examples.
    pub examples: usize,
    /// The metric.
    pub metric: Metric,
    /// The teacher's.
    pub teacher: f64,
    /// The student's.
    pub student: f64,
    /// The share of classes, or the correlation of values, that both give.
    pub agreement: f64,
    /// Texts whose logits are not finite; they count as wrong.
    pub overflow: usize,
    /// This and other metrics of the task.
    pub scores: Vec<DevScore>,
}

/// A metric on the dev file.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct DevScore {
    /// Which.
    pub metric: Metric,
    /// The teacher's.
    pub teacher: f64,
    /// The student's.
    pub student: f64,
}

/// What was done, and how far the student is from its teacher.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Report {
    /// The tool's version.
    pub version: &'static str,
    /// The teacher's file.
    pub model: String,
    /// How the passes were told to work.
    pub options: PassOptions,
    /// How its parameters were found.
    pub transfer: TransferKind,
    /// The seed.
    pub seed: u64,
    /// What each pass did.
    pub passes: Vec<Outcome>,
    /// Every site.
    pub sites: Vec<SiteReport>,
    /// What became of each layer's softmax, and why; empty where it is kept.
    pub softmax: Vec<FormChoice>,
    /// Sites that were missed and accepted.
    pub misses: Vec<Miss>,
    /// How the teacher was read, where it is quantised: what is said of the teacher is said of it in single precision.
    pub dequantised: Option<Dequantised>,
    /// What folding did.
    pub fold: FoldReport,
    /// What the student was calibrated on; `None` where it was not.
    pub source: Option<Source>,
    /// What makes it doubtful that the data and the tokenizer are the model's, or say anything.
    pub notes: Vec<String>,
    /// What the closed-form stage did.
    pub closed_form: Option<LayerwiseReport>,
    /// What the full stage did.
    pub full: Option<full::FullReport>,
    /// The distance from the teacher after each stage.
    pub stages: Vec<StageReport>,
    /// The student on the dev file.
    pub dev: Option<DevReport>,
    /// The student against its teacher on sequences that were kept apart.
    pub outputs: Vec<OutputDistance>,
    /// The same on texts longer than the student is fitted to; `None` where it takes none, or none was there.
    pub beyond: Option<BeyondReport>,
    /// How the student takes inputs unlike text.
    pub odd_inputs: OddInputs,
    /// What holds its values; `None` where nothing does, and why that is, the outcome of the pass tells.
    pub bounds: Option<BoundsReport>,
    /// The finished student against itself before the exact passes, and the model in canonical form against itself: largest
    /// difference, relative to outputs above 1.
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

/// The high-water mark of resident memory, from Linux's `/proc`.
pub(super) fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// More would mean nothing, and what a checkpoint keeps as text would differ from it in the last.
fn six_digits(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

impl Finished<'_> {
    /// Tells what was done.
    ///
    /// # Errors
    /// The student cannot be run.
    pub(super) fn report(self) -> Result<(Model, Report)> {
        let Self { context, record, student, measured, sites, softmax, misses, beyond, odd_inputs, bounds, .. } = self;
        let Measured { runnable, outputs } = measured;
        let non_linear_before = self.non_linear_before;
        // The student is run once more for what is not matrix arithmetic: no other is held by then.
        drop(runnable);
        let report = Report {
            version: env!("CARGO_PKG_VERSION"),
            model: context.origin,
            options: student.options.clone(),
            transfer: context.job.transfer.kind(),
            seed: context.job.seed,
            passes: student.outcomes.clone(),
            sites,
            softmax,
            misses,
            dequantised: context.dequantised,
            fold: student.fold,
            source: record.calibrates.then_some(context.texts.source),
            notes: context.notes,
            closed_form: record.layerwise,
            full: record.full,
            stages: record.stages,
            dev: record.dev,
            outputs: context.reference.distances(&outputs)?,
            beyond,
            odd_inputs,
            bounds,
            exact_passes_differ_by: record.exact_change,
            operators_before: context.operators_before,
            operators_after: student.model.operators(),
            non_linear_before,
            non_linear_after: non_linear(&student.model, &self.encoder, &student.encoder)?,
            parameters: parameter_count(&student.model),
            seconds: context.begun.elapsed().as_secs_f64(),
            peak_memory: peak_memory(),
        };
        Ok((student.model, report))
    }
}

fn parameter_count(model: &Model) -> usize {
    model.graph().initializer.iter().map(|t| t.dims.iter().product::<i64>() as usize).sum()
}

/// Every site with what became of it, in the order of the layers.
pub(super) fn site_reports(
    encoder: &Encoder,
    student: &Student,
    calibration: Option<&LayerwiseReport>,
) -> Vec<SiteReport> {
    let error = |site: SiteId| {
        let sites = calibration.map_or(&[] as &[SiteError], |c| &c.sites);
        sites.iter().find(|s| s.site == site).map(|s| six_digits(s.relative_error))
    };
    let mut reports: Vec<SiteReport> = Vec::new();
    for (site, norm) in encoder.norms() {
        reports.push(SiteReport {
            relative_error: error(site),
            site,
            kind: site.kind(),
            node: norm.node.clone(),
            was: norm.spelling.clone(),
            now: norm_now(student),
        });
    }
    for (index, layer) in encoder.layers.iter().enumerate() {
        let site = layer.site(LayerSite::Attention);
        reports.push(SiteReport {
            relative_error: error(site).or_else(|| error(SiteId::SharedNetwork)),
            site,
            kind: site.kind(),
            node: layer.attention.node.clone(),
            was: "Softmax".to_owned(),
            now: attention_now(student, index),
        });
        let function = layer.activation.function;
        reports.push(SiteReport {
            site: layer.site(LayerSite::Activation),
            kind: SiteKind::Activation,
            node: layer.activation.node.clone(),
            was: function_name(function).to_owned(),
            now: if function == Activation::Relu || student.ran(Pass::Activation) { "ReLU" } else { "kept" },
            relative_error: None,
        });
    }
    reports.sort_by_key(|report| report.site);
    reports
}

fn norm_now(student: &Student) -> &'static str {
    match (student.ran(Pass::Norm), student.ran(Pass::Fold)) {
        (false, _) => "kept",
        (true, false) => "affine",
        (true, true) => "affine, folded",
    }
}

fn attention_now(student: &Student, layer: usize) -> &'static str {
    match (student.ran(Pass::Softmax), student.options.approximator_of(layer).form, student.ran(Pass::Reassociate)) {
        (false, ..) => "kept",
        (true, Form::Hinges, _) => "hinges",
        (true, Form::Network, false) => "network, paper's order",
        (true, Form::Network, true) => "network, linear order",
    }
}

fn function_name(function: Activation) -> &'static str {
    match function {
        Activation::GeluErf => "GELU (erf)",
        Activation::GeluTanh => "GELU (tanh)",
        Activation::GeluSigmoid => "GELU (sigmoid)",
        Activation::Relu => "ReLU",
    }
}

/// How a student was made, as it says itself.
#[derive(Serialize, Deserialize)]
struct How<'a> {
    passes: std::borrow::Cow<'a, PassOptions>,
    transfer: TransferKind,
    seed: u64,
}

/// Writes into the model how it was made.
pub(super) fn describe(
    model: &mut Model,
    job: &Job,
    options: &PassOptions,
    sites: &[SiteReport],
    encoder_end: Option<&str>,
) {
    let how = How { passes: std::borrow::Cow::Borrowed(options), transfer: job.transfer.kind(), seed: job.seed };
    let json = |value: serde_json::Result<String>| value.expect("plain structures are valid JSON");
    model.set_metadata(VERSION_KEY, env!("CARGO_PKG_VERSION"));
    model.set_metadata(MAX_SEQ_KEY, &options.approximator.longest().to_string());
    model.set_metadata(OPTIONS_KEY, &json(serde_json::to_string(&how)));
    model.set_metadata(SITES_KEY, &json(serde_json::to_string(sites)));
    if let Some(end) = encoder_end {
        model.set_metadata(ENCODER_END_KEY, end);
    }
    describe_limit(model, options.approximator.longest());
    raise_ir_version(model);
}

/// Says where people and tools look how long a sequence may be: an engine that is given a longer one only says that some
/// shapes do not match.
fn describe_limit(model: &mut Model, max_seq: usize) {
    let add = |to: &mut String, said: &str| *to = if to.is_empty() { said.to_owned() } else { format!("{to}; {said}") };
    let version = env!("CARGO_PKG_VERSION");
    let said = format!("rewritten by onnx-mabert {version} for sequences of at most {max_seq} tokens");
    add(&mut model.proto_mut().doc_string, &said);
    let given: Vec<String> =
        model.inputs().into_iter().filter(|i| i.dims.as_ref().is_none_or(|d| d.len() == 2)).map(|i| i.name).collect();
    for input in model.graph_mut().input.iter_mut().filter(|input| given.contains(&input.name)) {
        add(&mut input.doc_string, &format!("[batch, n], n at most {max_seq}"));
    }
}

/// Before this version every initializer was to be an input too, which those of a student are not; from it on, engines take
/// such inputs for what may change from run to run.
const IR_WITH_INITIALIZERS_ALONE: i64 = 4;

fn raise_ir_version(model: &mut Model) {
    if model.proto().ir_version < IR_WITH_INITIALIZERS_ALONE {
        let given: Vec<String> = model.inputs().into_iter().map(|input| input.name).collect();
        model.graph_mut().input.retain(|input| given.contains(&input.name));
        model.proto_mut().ir_version = IR_WITH_INITIALIZERS_ALONE;
    }
}

/// How the passes were told to work when a student was made.
///
/// # Errors
/// The model is no student, or another version's.
pub(super) fn pass_options(model: &Model) -> Result<PassOptions> {
    let fault = |reason: &str| Error::Student {
        model: model.origin().to_owned(),
        reason: reason.to_owned(),
        settings: &[Setting::Unfolded],
    };
    let text = model.metadata(OPTIONS_KEY).ok_or_else(|| fault("it is no student that this program made"))?;
    let how: How<'_> = serde_json::from_str(text).map_err(|_| fault("another version of this program made it"))?;
    Ok(how.passes.into_owned())
}

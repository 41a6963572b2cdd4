//! `eval`: the metric of a task, model by model.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Args;
use mabert_graph::Model;
use mabert_transfer::data::Overlong;
use mabert_transfer::evaluate::{Answered, Labelled, Metric, Spread, TaskRun};
use mabert_transfer::progress::Progress as _;
use serde::Serialize;

use crate::arguments::{Choice as _, DataArguments, Global, VectorArguments, one_of};
use crate::bars::Bars;
use crate::bounds;
use crate::engines::{EngineName, LONGEST, Reads};
use crate::failure::{CheckFailed, Usage};
use crate::print::{self, Page};

#[derive(Debug, Args)]
pub(crate) struct EvalArguments {
    /// The models; agreement is with the first
    #[arg(required = true)]
    models: Vec<PathBuf>,
    #[command(flatten)]
    data: DataArguments,
    #[command(flatten)]
    vectors: VectorArguments,
    /// The column of the label; columns of 0 and 1 between commas, where texts may have several. Tagged words and questions
    /// have theirs under usual names
    #[arg(long, value_name = "NAME")]
    label_column: Option<String>,
    /// The metric [default: what fits labels and outputs]
    #[arg(long, value_parser = one_of(Metric::ALL))]
    metric: Option<Metric>,
    /// Fail (exit code 1) where a model's metric is below this
    #[arg(long, value_name = "X")]
    min: Option<f64>,
    /// The engine
    #[arg(long, default_value = EngineName::Tract.name(), value_parser = one_of(EngineName::ALL))]
    engine: EngineName,
}

#[derive(Serialize)]
struct Evaluation {
    data: String,
    examples: usize,
    /// The longest sequence that every model takes; longer texts are cut to it.
    max_seq: usize,
    truncated: usize,
    engine: &'static str,
    metric: Metric,
    min: Option<f64>,
    models: Vec<Evaluated>,
    /// What makes it doubtful that the figures say something.
    notes: Vec<String>,
}

#[derive(Serialize)]
struct Evaluated {
    model: String,
    value: f64,
    /// The share of classes, or the correlation of values, that the first model gives too.
    agreement: f64,
    /// Texts on which a value where the encoder ends, or an output, is not finite.
    overflow: usize,
    /// The metrics of the task.
    scores: Vec<Score>,
}

#[derive(Serialize)]
struct Score {
    metric: Metric,
    value: f64,
}

pub(super) fn eval(arguments: &EvalArguments, global: &Global) -> Result<()> {
    arguments.data.check("")?;
    let compares_pairs = arguments.metric == Some(Metric::Sts);
    if !compares_pairs && arguments.vectors.pooling.is_some() {
        let reason = "--pooling makes vectors of texts, which --metric sts alone compares";
        return Err(Usage(reason.to_owned()).into());
    }
    // Before models are tried out.
    let file = arguments.data.open(arguments.label_column.as_deref())?;
    if arguments.label_column.is_none() && file.usual_label()?.is_none() {
        return Err(Usage("--label-column is needed: which column holds the label?".to_owned()).into());
    }
    let mut longest = LONGEST;
    let mut models = Vec::new();
    for path in &arguments.models {
        let reads = Reads::new(&Model::load(path)?, longest, &arguments.data.input_roles)?;
        longest = reads.max_seq;
        models.push((path.as_path(), reads));
    }
    let encoder = arguments.data.encoder(longest, Overlong::Truncate)?;
    let rows = models.iter().filter_map(|(_, reads)| reads.vocabulary()).min();
    let read = if compares_pairs { Labelled::read_pairs } else { Labelled::read };
    let labelled = read(file, &encoder, rows)?;
    let mut notes = rows.map(|rows| encoder.notes(rows)).transpose()?.unwrap_or_default();
    notes.extend_from_slice(labelled.notes());
    let bars = Bars::new(global);
    bars.begin("eval", models.len());
    let mut evaluated: Vec<Evaluated> = Vec::new();
    let mut first: Option<Answered> = None;
    for (path, reads) in &models {
        // Among outputs, where the encoder ends would be taken for one to be pooled.
        let taps: &[String] = if compares_pairs { &[] } else { reads.encoder_end() };
        let engine = arguments.engine.load_tapped(path, taps, global)?;
        let shape = reads.shape(&encoder);
        let (channels, tokenizer) = (reads.channels(), arguments.data.tokenizer.as_deref());
        let features = arguments.vectors.features(path, tokenizer, channels);
        let (engine, features) = (engine.as_ref(), Some(&features));
        let run = TaskRun { engine, shape: &shape, channels, features, spread: Spread::Inside };
        let metric = arguments.metric.or_else(|| first.as_ref().map(|first| first.metric));
        let told = evaluate(&labelled, &run, metric, path, &mut notes).with_context(|| path.display().to_string())?;
        let (answered, scores) = told;
        notes.extend(bounds::of_texts(&Model::load(path)?, &shape, labelled.sequences(), global)?);
        evaluated.push(Evaluated {
            model: path.display().to_string(),
            value: scores[0].value,
            agreement: answered.agreement(first.as_ref().unwrap_or(&answered)),
            overflow: answered.overflow,
            scores,
        });
        first.get_or_insert(answered);
        bars.step("");
    }
    bars.end();
    let evaluation = Evaluation {
        data: labelled.file().display().to_string(),
        examples: labelled.examples(),
        max_seq: encoder.longest(),
        truncated: labelled.sequences().iter().filter(|s| s.truncated).count(),
        engine: arguments.engine.name(),
        metric: first.context("there are no models")?.metric,
        min: arguments.min,
        models: evaluated,
        notes,
    };
    print::notes(&evaluation.notes, global);
    if global.json {
        print::json(&evaluation)?;
    } else {
        print_evaluation(&evaluation)?;
    }
    check_minimum(&evaluation)
}

/// What one model answers, and its metrics, the one that is asked for first.
fn evaluate(
    labelled: &Labelled,
    run: &TaskRun<'_>,
    metric: Option<Metric>,
    path: &Path,
    notes: &mut Vec<String>,
) -> Result<(Answered, Vec<Score>)> {
    let answered = labelled.answers(run, metric)?;
    let (model, count) = (path.display(), labelled.examples());
    if answered.unusable > 0 {
        let bad = answered.unusable;
        let what = if answered.metric == Metric::Sts { "pairs get vectors" } else { "texts get logits" };
        let reason = format!("{bad} of {count} {what} that are not finite: the model overflows");
        return Err(mabert_transfer::Error::Compare(reason).into());
    }
    if answered.overflow > 0 {
        notes.push(format!(
            "{model}: its encoder overflows on {} of {} texts: what the head answers to them means nothing",
            answered.overflow,
            labelled.sequences().len()
        ));
    }
    for note in &answered.notes {
        // What is said of the labels is the same for every model.
        let is_of_labels = note.starts_with(&labelled.file().display().to_string());
        let note = if is_of_labels { note.clone() } else { format!("{model}: {note}") };
        if !notes.contains(&note) {
            notes.push(note);
        }
    }
    let score = |metric: Metric| Ok(Score { metric, value: labelled.score(metric, &answered)? });
    let scores = labelled.metrics(&answered).into_iter().map(score).collect::<Result<Vec<_>>>()?;
    Ok((answered, scores))
}

fn check_minimum(evaluation: &Evaluation) -> Result<()> {
    let Some(min) = evaluation.min else { return Ok(()) };
    // A metric that is not a number is below every threshold.
    let reaches = |model: &Evaluated| model.value >= min;
    let below: Vec<&str> = evaluation.models.iter().filter(|m| !reaches(m)).map(|m| m.model.as_str()).collect();
    match below.as_slice() {
        [] => Ok(()),
        below => Err(CheckFailed(format!("below {min}: {}", below.join(", "))).into()),
    }
}

fn print_evaluation(e: &Evaluation) -> Result<()> {
    let mut page = Page::default();
    page.line(format!(
        "{} examples of {} on {}, {} of them cut to {} tokens",
        e.examples, e.data, e.engine, e.truncated, e.max_seq
    ));
    let scores = |m: &Evaluated| m.scores.iter().map(|s| format!("{:.4}", s.value)).collect::<Vec<_>>();
    let rows =
        e.models.iter().map(|m| [vec![m.model.clone()], scores(m), vec![format!("{:.4}", m.agreement)]].concat());
    let metrics = e.models.first().map_or(&[] as &[_], |m| m.scores.as_slice());
    let names: Vec<String> = metrics.iter().map(|s| format!("{:?}", s.metric)).collect();
    let names = names.iter().map(String::as_str);
    let header: Vec<&str> = ["Model"].into_iter().chain(names).chain(["Agrees with the first"]).collect();
    page.lines(print::table(&header, 1, rows));
    page.print()
}

//! `eval`: the metric of a task, model by model.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Args;
use mabert_graph::Model;
use mabert_runtime::Engine;
use mabert_transfer::data::{BatchShape, Overlong, Sequence, TextEncoder, sameness_note};
use mabert_transfer::evaluate::{
    Metric, Spread, chance_note, check_labels, label_notes, labels, logits_and_overflow, predictions,
};
use mabert_transfer::pooling::Features;
use mabert_transfer::progress::Progress as _;
use mabert_transfer::sts::{self, Cosines};
use serde::Serialize;

use crate::arguments::{
    Choice as _, DataArguments, Global, Texts, VectorArguments, one_of, read_pair_texts, read_texts,
};
use crate::bars::Bars;
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
    /// The column of the label, a number
    #[arg(long, value_name = "NAME")]
    label_column: String,
    /// The metric
    #[arg(long, default_value = Metric::Accuracy.name(), value_parser = one_of(Metric::ALL))]
    metric: Metric,
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
}

pub(super) fn eval(arguments: &EvalArguments, global: &Global) -> Result<()> {
    arguments.data.check("")?;
    let compares_pairs = arguments.metric == Metric::Sts;
    if !compares_pairs && arguments.vectors.pooling.is_some() {
        let reason = "--pooling makes vectors of texts, which --metric sts alone compares";
        return Err(Usage(reason.to_owned()).into());
    }
    // Before models are tried out.
    let file = arguments.data.open(Some(&arguments.label_column))?;
    let mut longest = LONGEST;
    let mut models = Vec::new();
    for path in &arguments.models {
        let reads = Reads::new(&Model::load(path)?, longest, &arguments.data.input_roles)?;
        longest = reads.max_seq;
        models.push((path.as_path(), reads));
    }
    let encoder = arguments.data.encoder(longest, Overlong::Truncate)?;
    let rows = models.iter().filter_map(|(_, reads)| reads.vocabulary()).min();
    let read = if compares_pairs { read_pair_texts } else { read_texts };
    let mut texts = read(&file, &encoder, rows)?;
    texts.notes.extend(sameness_note(&texts.file, &texts.sequences));
    let evaluated = evaluate_models(arguments, &models, &encoder, &mut texts, global)?;
    let evaluation = Evaluation {
        data: texts.file.display().to_string(),
        examples: if compares_pairs { texts.sequences.len() / 2 } else { texts.sequences.len() },
        max_seq: texts.max_seq,
        truncated: texts.truncated(),
        engine: arguments.engine.name(),
        metric: arguments.metric,
        min: arguments.min,
        models: evaluated,
        notes: texts.notes,
    };
    print::notes(&evaluation.notes, global);
    if global.json {
        print::json(&evaluation)?;
    } else {
        print_evaluation(&evaluation)?;
    }
    check_minimum(&evaluation)
}

fn evaluate_models(
    arguments: &EvalArguments,
    models: &[(&Path, Reads)],
    encoder: &TextEncoder,
    texts: &mut Texts,
    global: &Global,
) -> Result<Vec<Evaluated>> {
    let metric = arguments.metric;
    let mut labels = labels(&texts.file, &texts.sequences)?;
    if metric == Metric::Sts {
        labels = sts::of_pairs(&labels);
    }
    let mut evaluated = Vec::new();
    let mut reference: Option<Vec<f64>> = None;
    let bars = Bars::new(global);
    bars.begin("eval", models.len());
    for (path, reads) in models {
        // Among outputs, where the encoder ends would be taken for one to be pooled.
        let taps: &[String] = if metric == Metric::Sts { &[] } else { reads.encoder_end() };
        let engine = arguments.engine.load_tapped(path, taps, global)?;
        let shape = reads.shape(encoder);
        let predicted = match metric {
            Metric::Sts => {
                let tokenizer = arguments.data.tokenizer.as_deref();
                let features = arguments.vectors.features(path, tokenizer, reads.channels());
                finite_cosines(engine.as_ref(), &shape, &texts.sequences, &features)
            }
            _ => logits_and_overflow(engine.as_ref(), &shape, &texts.sequences, reads.channels(), Spread::Inside)
                .and_then(|(logits, overflow)| {
                    check_labels(metric, logits.ncols(), &texts.file, &texts.sequences, &labels)?;
                    let doubts = label_notes(metric, logits.ncols(), &texts.file, &labels);
                    let new: Vec<String> = doubts.into_iter().filter(|note| !texts.notes.contains(note)).collect();
                    texts.notes.extend(new);
                    Ok((predictions(metric, &logits)?, overflow))
                }),
        };
        let (predicted, overflow) = predicted.with_context(|| path.display().to_string())?;
        let (model, count) = (path.display(), labels.len());
        if overflow > 0 {
            texts.notes.push(format!(
                "{model}: its encoder overflows on {overflow} of {count} texts: what the head answers to them means nothing"
            ));
        }
        let chance = chance_note(metric, &predicted, &labels);
        texts.notes.extend(chance.map(|note| format!("{model}: {note}")));
        let reference = reference.get_or_insert_with(|| predicted.clone());
        evaluated.push(Evaluated {
            model: path.display().to_string(),
            value: metric.score(&predicted, &labels),
            agreement: metric.likeness().score(&predicted, reference),
            overflow,
        });
        bars.step("");
    }
    bars.end();
    Ok(evaluated)
}

/// The cosines of pairs, where all are numbers.
fn finite_cosines(
    engine: &dyn Engine,
    shape: &BatchShape,
    pairs: &[Sequence],
    features: &Features,
) -> mabert_transfer::Result<(Vec<f64>, usize)> {
    let Cosines { values, overflow } = sts::cosines(engine, shape, pairs, features, Spread::Inside)?;
    if overflow > 0 {
        let count = values.len();
        let reason = format!("{overflow} of {count} pairs get vectors that are not finite: the model overflows");
        return Err(mabert_transfer::Error::Compare(reason));
    }
    Ok((values, overflow))
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
    let rows = e.models.iter().map(|m| vec![m.model.clone(), format!("{:.4}", m.value), format!("{:.4}", m.agreement)]);
    let metric = format!("{:?}", e.metric);
    page.lines(print::table(&["Model", &metric, "Agrees with the first"], 1, rows));
    page.print()
}

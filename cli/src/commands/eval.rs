//! `eval`: the metric of a task, model by model.

use anyhow::{Context as _, Result};
use mabert_graph::Model;
use mabert_transfer::data::Overlong;
use mabert_transfer::evaluate::{Metric, Spread, check_labels, labels, logits, predictions};
use serde::Serialize;

use super::longest;
use crate::arguments::{Eval, Global};
use crate::failure::{CheckFailed, Usage};
use crate::print;

/// Texts are cut to this, or to what every model takes.
const LONGEST: usize = 8192;

#[derive(Serialize)]
struct Evaluation {
    data: String,
    examples: usize,
    /// The longest sequence; longer texts are cut to it.
    max_seq: usize,
    truncated: usize,
    engine: &'static str,
    metric: Metric,
    min: Option<f64>,
    models: Vec<Evaluated>,
}

#[derive(Serialize)]
struct Evaluated {
    model: String,
    value: f64,
    /// The share of classes, or the correlation of values, that the first model gives too.
    agreement: f64,
}

pub(super) fn eval(arguments: &Eval, global: &Global) -> Result<()> {
    let Some(data) = &arguments.data.data else { return Err(Usage("--data is needed".to_owned()).into()) };
    let metric = arguments.metric.metric();
    let mut max_seq = LONGEST;
    for path in &arguments.models {
        max_seq = longest(&Model::load(path)?, max_seq)?;
    }
    let sequences = arguments.data.sequences(max_seq, Overlong::Truncate, Some(&arguments.label_column))?;
    let labels = labels(data, &sequences)?;
    let mut models = Vec::new();
    let mut first: Option<Vec<f64>> = None;
    for path in &arguments.models {
        let engine = arguments.engine.load(path, global)?;
        let found = logits(engine.as_ref(), &sequences, Spread::Inside).and_then(|logits| {
            check_labels(metric, logits.ncols(), data, &sequences, &labels)?;
            predictions(metric, &logits)
        });
        let found = found.with_context(|| path.display().to_string())?;
        let reference = first.get_or_insert_with(|| found.clone());
        models.push(Evaluated {
            model: path.display().to_string(),
            value: metric.score(&found, &labels),
            agreement: metric.likeness().score(&found, reference),
        });
    }
    let evaluation = Evaluation {
        data: data.display().to_string(),
        examples: sequences.len(),
        max_seq,
        truncated: sequences.iter().filter(|s| s.truncated).count(),
        engine: arguments.engine.name(),
        metric,
        min: arguments.min,
        models,
    };
    if global.json {
        print::json(&evaluation)?;
    } else {
        print_evaluation(&evaluation);
    }
    // A metric that is not a number is below every threshold.
    let reaches = |m: &&Evaluated| evaluation.min.is_none_or(|min| m.value >= min);
    let below: Vec<&str> = evaluation.models.iter().filter(|m| !reaches(m)).map(|m| m.model.as_str()).collect();
    match (below.as_slice(), evaluation.min) {
        ([], _) | (_, None) => Ok(()),
        (below, Some(min)) => Err(CheckFailed(format!("below {min}: {}", below.join(", "))).into()),
    }
}

fn print_evaluation(e: &Evaluation) {
    println!(
        "{} examples of {} on {}, {} of them cut to {} tokens",
        e.examples, e.data, e.engine, e.truncated, e.max_seq
    );
    let rows = e.models.iter().map(|m| vec![m.model.clone(), format!("{:.4}", m.value), format!("{:.4}", m.agreement)]);
    let metric = format!("{:?}", e.metric);
    println!("{}", print::table(&["Model", &metric, "Agrees with the first"], 1, rows));
}

//! How well a model does its task: outputs for labelled sequences, and the metrics of GLUE, of tagged words, of answers to
//! questions, and of texts of several classes.

mod entities;
mod labelled;
mod metric;
mod outputs;
mod several;
mod spans;
mod squad;
mod sts;
mod tag_classes;
mod tokens;

use mabert_runtime::{Engine, Named, Tensor, borrowed};
use ndarray::{Array2, ArrayD, Axis, IxDyn, Slice};
use rayon::prelude::*;

use crate::compare::{argmax, overflows};
use crate::data::{Batch, BatchShape, Label, Sequence, batches};
use crate::heads::HeadKind;
use crate::{Error, Result, Setting};
use metric::classes;

pub(crate) use labelled::with_label;
pub use labelled::{Answered, Labelled};
pub use metric::Metric;
pub use outputs::TaskRun;
pub(crate) use several::{marks_width, set_of_classes};
pub(crate) use tag_classes::number_tags;

/// Positions of one batch, and rows at most.
const BATCH_TOKENS: usize = 2048;
const BATCH_ROWS: usize = 64;

/// Where work is spread over threads: not in both places, for then one would wait for the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spread {
    /// Inside the engine, which was given its threads; batches run one after the other.
    Inside,
    /// Over batches, for an engine of one thread.
    Batches,
}

/// The labels of sequences as numbers.
///
/// # Errors
/// A label is missing or not a number.
pub fn labels(file: &std::path::Path, sequences: &[Sequence]) -> Result<Vec<f64>> {
    sequences.iter().map(|sequence| number(file, sequence)).collect()
}

/// The label of a sequence as a number.
///
/// # Errors
/// It is missing or not a number.
pub(crate) fn number(file: &std::path::Path, sequence: &Sequence) -> Result<f64> {
    let text = match &sequence.label {
        None => "",
        Some(Label::One(text)) => text,
        Some(other) => {
            let reason = format!("its label is {}, one class or value is needed", other.noun());
            return Err(Error::line(file, sequence.line, reason));
        }
    };
    let number = text.parse::<f64>().ok().filter(|v| v.is_finite());
    number.ok_or_else(|| {
        let reason = format!("label `{text}` is not a number: name the classes in the model's order");
        Error::line(file, sequence.line, reason).helped_by(&[Setting::Classes])
    })
}

/// Whether labels are such as `metric` compares with what a model of so many `columns` predicts.
///
/// # Errors
/// A metric of classes, but the model gives one value a text, or a label is none of its classes; or a metric of values,
/// but the model gives several.
pub fn check_labels(
    metric: Metric,
    columns: usize,
    file: &std::path::Path,
    sequences: &[Sequence],
    labels: &[f64],
) -> Result<()> {
    check_columns(metric, columns)?;
    let is_class = |label: f64| label >= 0.0 && label < columns as f64 && label.fract() == 0.0;
    match labels.iter().position(|&label| metric.compares_classes() && !is_class(label)) {
        None => Ok(()),
        Some(at) => {
            let label = labels[at];
            let reason = format!("label {label} is none of the model's {columns} classes, which start at 0");
            Err(Error::line(file, sequences[at].line, reason))
        }
    }
}

fn check_columns(metric: Metric, columns: usize) -> Result<()> {
    let name = metric.name();
    let reason = match (metric.compares_classes(), columns) {
        (true, 0 | 1) => {
            format!("{name} is a metric of classes, the model gives one value a text: take pearson or spearman")
        }
        (true, 3..) if metric == Metric::F1 => {
            format!("f1 is that of class 1 of two, the model has {columns} classes: take macro-f1, mcc or accuracy")
        }
        (true, _) | (false, 1) => return Ok(()),
        (false, _) => {
            format!("{name} is a metric of one value a text, the model gives {columns}: take accuracy, macro-f1 or mcc")
        }
    };
    Err(Error::Compare(reason))
}

/// What makes it doubtful that labels say something of a model with so many `columns` of logits.
pub fn label_notes(metric: Metric, columns: usize, file: &std::path::Path, labels: &[f64]) -> Vec<String> {
    let different = classes(labels, &[]);
    let said = match (different.as_slice(), metric.compares_classes()) {
        ([one], _) => Some(format!("all {} labels are {one}", labels.len())),
        // What is no classifier, but an embedding, has many more values than there are labels.
        ([.., last], true) if columns > MANY_CLASSES && *last < columns as f64 / 4.0 => Some(format!(
            "the labels name {} classes, none above {last}, but the model's output has {columns} values a text: is it one \
             of classes?",
            different.len()
        )),
        _ => None,
    };
    said.into_iter().map(|said| format!("{}: {said}", file.display())).collect()
}

/// What is said of predictions that are hardly better than one answer to every text would be: the tokenizer, the classes'
/// order or the column of labels may be another's.
pub fn chance_note(metric: Metric, predictions: &[f64], labels: &[f64]) -> Option<String> {
    const FEW: usize = 20;
    let count = labels.len();
    if count < FEW || classes(labels, &[]).len() < 2 {
        return None;
    }
    // Two standard errors.
    let margin = |variance: f64| 2.0 * (variance / count as f64).sqrt();
    if metric.compares_classes() {
        let times = |class: &f64| labels.iter().filter(|label| *label == class).count();
        let most = classes(labels, &[]).iter().map(times).max().unwrap_or(0) as f64 / count as f64;
        let accuracy = Metric::Accuracy.score(predictions, labels);
        (accuracy < most + margin(most * (1.0 - most))).then(|| {
            format!(
                "{accuracy:.3} of the answers are right, where {most:.3} would be if every text got the most frequent label: \
                 are tokenizer, labels and the classes' order this model's?"
            )
        })
    } else {
        let value = metric.score(predictions, labels);
        (!value.is_finite() || value < margin(1.0)).then(|| {
            format!("its values go with the labels no better than by chance ({value:.3}): are tokenizer and labels this model's?")
        })
    }
}

/// Few tasks have more classes.
const MANY_CLASSES: usize = 16;

/// The logits `[sequences, classes]`: the first output of classes with one row a sequence, or else of one value. What is as
/// wide as the model's stream of so many `channels`, where these are known, is an embedding.
///
/// # Errors
/// The engine fails, or no output has one row a sequence.
pub fn logits(
    engine: &dyn Engine,
    shape: &BatchShape,
    sequences: &[Sequence],
    channels: Option<usize>,
    spread: Spread,
) -> Result<Array2<f32>> {
    Ok(logits_and_overflow(engine, shape, sequences, channels, spread)?.0)
}

/// The same, and on how many sequences any value that the engine gives is not finite: where inner values are among them, a
/// head cannot hide it.
///
/// # Errors
/// As those of [`logits`].
pub fn logits_and_overflow(
    engine: &dyn Engine,
    shape: &BatchShape,
    sequences: &[Sequence],
    channels: Option<usize>,
    spread: Spread,
) -> Result<(Array2<f32>, usize)> {
    let (batches, outputs): (Vec<Batch>, Vec<Named>) =
        run_batches(engine, shape, sequences, spread)?.into_iter().unzip();
    let overflow = overflows(&batches, &outputs);
    let parts: Vec<(Batch, Named)> = batches.into_iter().zip(outputs).collect();
    Ok((class_logits(&parts, sequences.len(), channels)?, overflow))
}

/// The logits `[rows, classes]` among the outputs for some batches, see [`logits`].
fn class_logits(parts: &[(Batch, Named)], rows: usize, channels: Option<usize>) -> Result<Array2<f32>> {
    let Some((_, first)) = parts.first() else { return Err(Error::Compare("there are no sequences".to_owned())) };
    let kind = |at: usize| {
        let (name, value) = &first[at];
        let shapes: Vec<_> = parts.iter().map(|(b, o)| (b.length, o[at].1.shape().to_vec())).collect();
        // An answer's start and end are a row a text too, but of positions.
        let kind = HeadKind::from_shapes(name, &shapes, channels.unwrap_or(0));
        let width = if let [_, width] = value.shape() { *width } else { 1 };
        match (value.shape().len(), kind) {
            (1 | 2, HeadKind::Classes) => Some(HeadKind::Classes),
            (1 | 2, HeadKind::Values) if width == 1 => Some(HeadKind::Values),
            _ => None,
        }
    };
    let wanted = |wanted: HeadKind| (0..first.len()).find(|&at| kind(at) == Some(wanted));
    let Some(at) = wanted(HeadKind::Classes).or_else(|| wanted(HeadKind::Values)) else {
        let names = first.iter().map(|(n, t)| format!("{n} {:?}", t.shape())).collect::<Vec<_>>().join(", ");
        let reason = format!(
            "no output has one row of classes, or one value, a text; the model gives {names}: embeddings and hidden states \
             name no class; `sts` compares their cosines with scores of pairs"
        );
        return Err(Error::Compare(reason));
    };
    let joined = join(parts, at, rows).to_f32();
    let columns = joined.len() / rows.max(1);
    Ok(joined.into_shape_with_order((rows, columns)).expect("a row a sequence"))
}

/// What a metric looks at in logits: the class, or the value of the only column.
///
/// # Errors
/// A metric of values, but several columns; or logits that are not finite, which name no class.
pub fn predictions(metric: Metric, logits: &Array2<f32>) -> Result<Vec<f64>> {
    match predictions_with_overflow(metric, logits)? {
        (predictions, 0) => Ok(predictions),
        (predictions, bad) => {
            let count = predictions.len();
            let reason = format!("{bad} of {count} texts get logits that are not finite: the model overflows");
            Err(Error::Compare(reason))
        }
    }
}

/// The same, where a text whose logits are not finite gets no number; and how many there are.
///
/// # Errors
/// A metric of values, but several columns.
pub fn predictions_with_overflow(metric: Metric, logits: &Array2<f32>) -> Result<(Vec<f64>, usize)> {
    check_columns(metric, logits.ncols())?;
    let prediction = |row: ndarray::ArrayView1<'_, f32>| match row.iter().all(|v| v.is_finite()) {
        false => f64::NAN,
        true if metric.compares_classes() => argmax(&row.to_vec()) as f64,
        true => f64::from(row[0]),
    };
    let predictions: Vec<f64> = logits.rows().into_iter().map(prediction).collect();
    let bad = predictions.iter().filter(|v| v.is_nan()).count();
    Ok((predictions, bad))
}

/// The outputs for every sequence, in their order; values with an axis of tokens are padded with zeros to the longest.
///
/// # Errors
/// The engine fails.
pub fn run_sequences(engine: &dyn Engine, shape: &BatchShape, sequences: &[Sequence], spread: Spread) -> Result<Named> {
    let parts = run_batches(engine, shape, sequences, spread)?;
    let Some((_, first)) = parts.first() else { return Ok(Named::new()) };
    let joined = (0..first.len()).map(|at| (first[at].0.clone(), join(&parts, at, sequences.len())));
    Ok(joined.collect())
}

fn run_batches(
    engine: &dyn Engine,
    shape: &BatchShape,
    sequences: &[Sequence],
    spread: Spread,
) -> Result<Vec<(Batch, Named)>> {
    each_batch(engine, shape, sequences, spread, |_, outputs| Ok(outputs))
}

/// What `keep` keeps of the outputs for each batch.
fn each_batch<T: Send>(
    engine: &dyn Engine,
    shape: &BatchShape,
    sequences: &[Sequence],
    spread: Spread,
    keep: impl Fn(&Batch, Named) -> Result<T> + Sync,
) -> Result<Vec<(Batch, T)>> {
    let run = |batch: Batch| -> Result<(Batch, T)> {
        let inputs = batch.inputs(engine.inputs())?;
        let kept = keep(&batch, engine.run(&borrowed(&inputs))?)?;
        Ok((batch, kept))
    };
    let all = batches(sequences, BATCH_TOKENS, BATCH_ROWS, shape);
    match spread {
        Spread::Inside => all.into_iter().map(run).collect(),
        Spread::Batches => all.into_par_iter().map(run).collect(),
    }
}

/// One output of all batches, a row a sequence.
fn join(parts: &[(Batch, Named)], at: usize, rows: usize) -> Tensor {
    let first = &parts[0].1[at].1;
    let over_tokens = parts.iter().all(|(b, o)| o[at].1.shape().get(1) == Some(&b.length));
    let mut full = first.shape().to_vec();
    if full.is_empty() {
        return first.clone();
    }
    full[0] = rows;
    if over_tokens {
        full[1] = parts.iter().map(|(b, _)| b.length).max().unwrap_or(0);
    }
    let mut all = ArrayD::<f32>::zeros(IxDyn(&full));
    for (batch, outputs) in parts {
        let value = outputs[at].1.to_f32();
        for (from, &to) in batch.rows.iter().enumerate() {
            let mut row = all.index_axis_mut(Axis(0), to);
            let source = value.index_axis(Axis(0), from);
            if over_tokens {
                row.slice_axis_mut(Axis(0), Slice::from(0..batch.length)).assign(&source);
            } else {
                row.assign(&source);
            }
        }
    }
    Tensor::from(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logits_that_are_not_finite_name_no_class() {
        let logits = ndarray::arr2(&[[0f32, 1.0], [f32::NAN, f32::NAN], [2.0, 1.0]]);
        let message = predictions(Metric::Accuracy, &logits).unwrap_err().to_string();
        assert!(message.contains("1 of 3"), "{message}");
        assert_eq!(predictions(Metric::Accuracy, &logits.slice(ndarray::s![0..1, ..]).to_owned()).unwrap(), [1.0]);
    }

    #[test]
    fn metrics_that_say_nothing_are_refused_or_doubted() {
        let path = std::path::Path::new("dev.tsv");
        let three = ndarray::arr2(&[[0f32, 1.0, 2.0]]);
        let reason = predictions(Metric::F1, &three).unwrap_err().to_string();
        assert!(reason.contains("3 classes") && reason.contains("macro-f1"), "{reason}");
        assert!(predictions(Metric::MacroF1, &three).is_ok());
        let notes = |columns: usize, labels: &[f64]| label_notes(Metric::Accuracy, columns, path, labels).concat();
        assert!(notes(2, &[1.0; 30]).contains("all 30 labels are 1"));
        assert!(notes(384, &[0.0, 1.0, 1.0]).contains("384 values a text"));
        assert_eq!(notes(3, &[0.0, 1.0]), "");
        assert_eq!(notes(150, &[0.0, 1.0, 149.0]), "");
    }

    #[test]
    fn answers_by_chance_are_doubted() {
        let labels: Vec<f64> = (0..200).map(|at| f64::from(at % 2)).collect();
        let right = |share: usize| -> Vec<f64> {
            labels.iter().enumerate().map(|(at, l)| if at / 2 % 10 < share { *l } else { 1.0 - l }).collect()
        };
        let note = |predictions: &[f64]| chance_note(Metric::Mcc, predictions, &labels);
        assert!(note(&right(5)).unwrap().contains("0.500 of the answers are right, where 0.500"));
        assert!(note(&right(0)).is_some() && note(&vec![1.0; 200]).is_some());
        assert_eq!((note(&right(8)), note(&labels)), (None, None));
        assert!(chance_note(Metric::Pearson, &right(5), &labels).unwrap().contains("chance"));
        assert_eq!(chance_note(Metric::Pearson, &right(8), &labels), None);
        assert_eq!(chance_note(Metric::Accuracy, &[0.0; 5], &[1.0; 5]), None);
    }
}

//! Semantic textual similarity: the cosines of pairs of texts, to be compared with scores that people gave.
//!
//! Pairs are sequences in turn, the first text of a pair and then its second: each is read alone, and its vector made as
//! [`Features`] say.

use std::path::Path;

use mabert_runtime::{Named, Tensor};
use ndarray::{Array1, Array2};

use super::{TaskRun, each_batch};
use crate::data::{Batch, Content, Example, Sequence, TextEncoder};
use crate::pooling::{Features, Form};
use crate::vectors::{cosine, pool};
use crate::{Error, Result, Setting};

/// Reads pairs, both sequences of one with its label.
///
/// # Errors
/// An example cannot be used, or is no pair of texts.
pub(super) fn read(
    path: &Path,
    examples: impl Iterator<Item = Result<Example>>,
    encoder: &TextEncoder,
) -> Result<Vec<Sequence>> {
    let mut sequences = Vec::new();
    for example in examples {
        let Example { content, label, line } = example?;
        let Content::Text { text, pair: Some(second) } = content else {
            let reason = "it holds one text, not two to be compared: name the column of the second";
            return Err(Error::line(path, line, reason).helped_by(&[Setting::PairColumn]));
        };
        for text in [text, second] {
            let content = Content::Text { text, pair: None };
            sequences.push(encoder.encode(path, Example { content, label: label.clone(), line })?);
        }
    }
    Ok(sequences)
}

/// The cosines between the vectors that a model gives for the texts of pairs; not a number where one is not finite.
///
/// # Errors
/// The engine fails, or no output of the model is a vector of texts.
pub(super) fn cosines(run: &TaskRun<'_>, pairs: &[Sequence]) -> Result<Vec<f64>> {
    let TaskRun { engine, shape, channels, features, spread } = *run;
    let features = features.cloned().unwrap_or_else(|| Features::default().channels(channels));
    let parts = each_batch(engine, shape, pairs, spread, |batch, outputs| vectors(batch, &outputs, &features))?;
    let mut vectors: Vec<Array1<f32>> = vec![Array1::zeros(0); pairs.len()];
    for (batch, of_batch) in &parts {
        // Rows that fill up a batch come last.
        batch.rows.iter().zip(of_batch.rows()).for_each(|(&row, vector)| vectors[row] = vector.to_owned());
    }
    let is_finite = |vector: &Array1<f32>| vector.iter().all(|v| v.is_finite());
    let value = |pair: &[Array1<f32>]| match pair {
        [first, second] if is_finite(first) && is_finite(second) => cosine(first.view(), second.view()),
        _ => f64::NAN,
    };
    Ok(vectors.chunks(2).map(value).collect())
}

/// The vectors of a batch's texts, `[texts, channels]`.
fn vectors(batch: &Batch, outputs: &Named, features: &Features) -> Result<Array2<f32>> {
    let form =
        |(name, value): &(String, Tensor)| Form::new(features, name, value, &[(batch.length, value.shape().to_vec())]);
    let forms: Vec<Form> = outputs.iter().map(form).collect();
    let vectors = features.vectors(&forms)?;
    let main = vectors.main.and_then(|at| Some((&outputs[at].1, vectors.poolings[at]?)));
    let Some((value, pooling)) = main else {
        let names: Vec<String> = forms.iter().map(|form| format!("`{}`", form.name)).collect();
        let reason = format!(
            "the model gives {}, of which none is taken for vectors of texts: say how these are made",
            names.join(", ")
        );
        return Err(Error::setting(reason, &[Setting::Pooling]));
    };
    pool(value, batch, pooling).ok_or_else(|| {
        Error::Compare(format!("a value of shape {:?} has no vector for each text of a batch", value.shape()))
    })
}

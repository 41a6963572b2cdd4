//! Semantic textual similarity: the cosines of pairs of texts, to be compared with scores that people gave.
//!
//! Pairs are sequences in turn, the first text of a pair and then its second, as [`read_pairs`](crate::data::read_pairs)
//! gives them: each text is read alone, and its vector made as [`Features`] say.

use mabert_runtime::{Engine, Named, Tensor};
use ndarray::{Array1, Array2};

use crate::data::{Batch, BatchShape, Sequence};
use crate::evaluate::{Spread, each_batch};
use crate::pooling::{Features, Form};
use crate::vectors::{cosine, pool};
use crate::{Error, Result, Setting};

/// The cosines of pairs.
#[derive(Clone, Debug, PartialEq)]
pub struct Cosines {
    /// As many as there are pairs; not a number where a text's vector is none.
    pub values: Vec<f64>,
    /// Pairs that have a vector which is not finite.
    pub overflow: usize,
}

/// What a pair's two sequences have once each.
pub fn of_pairs<T: Copy>(of_sequences: &[T]) -> Vec<T> {
    of_sequences.iter().copied().step_by(2).collect()
}

/// The cosines between the vectors that a model gives for the texts of pairs.
///
/// # Errors
/// The engine fails, or no output of the model is a vector of texts.
pub fn cosines(
    engine: &dyn Engine,
    shape: &BatchShape,
    pairs: &[Sequence],
    features: &Features,
    spread: Spread,
) -> Result<Cosines> {
    let parts = each_batch(engine, shape, pairs, spread, |batch, outputs| vectors(batch, &outputs, features))?;
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
    let values: Vec<f64> = vectors.chunks(2).map(value).collect();
    let overflow = values.iter().filter(|value| value.is_nan()).count();
    Ok(Cosines { values, overflow })
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

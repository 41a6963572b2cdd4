//! Of a feature model: which vectors of texts its users compare, and how far apart the teacher's are.

use mabert_runtime::Tensor;

use super::criterion::{Source, TextVectors};
use crate::Result;
use crate::data::Batch;
use crate::pooling::{Features, Form, Pooling};
use crate::vectors::pool;

/// An output of the model: what it is for the loss, its name, and what the teacher gives.
pub(super) type Given<'g> = (Source, &'g str, &'g Tensor);

/// The vectors that users compare, found by what the teacher gives for one batch; their spread is not known yet.
pub(super) fn text_vectors(features: &Features, outputs: &[Given<'_>], batch: &Batch) -> Result<Option<TextVectors>> {
    let form =
        |(_, name, value): &Given<'_>| Form::new(features, name, value, &[(batch.length, value.shape().to_vec())]);
    let forms: Vec<Form> = outputs.iter().map(form).collect();
    let vectors = features.vectors(&forms)?;
    let found = vectors.main.and_then(|at| Some((outputs[at].0, vectors.poolings[at]?)));
    Ok(found.map(|(source, pooling)| TextVectors { source, pooling, spread: 1.0 }))
}

/// Adds up how far directions are from each other.
#[derive(Clone, Debug, Default)]
pub(super) struct Spread {
    texts: f64,
    sum: Vec<f64>,
}

impl Spread {
    /// Adds the vectors of a batch's texts.
    pub(super) fn add(&mut self, value: &Tensor, batch: &Batch, pooling: Pooling) {
        let Some(vectors) = pool(value, batch, pooling) else { return };
        self.sum.resize(vectors.ncols(), 0.0);
        for vector in vectors.rows() {
            let norm = vector.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
            if norm > 0.0 {
                self.texts += 1.0;
                self.sum.iter_mut().zip(vector).for_each(|(sum, &v)| *sum += f64::from(v) / norm);
            }
        }
    }

    /// 1 minus the mean cosine of two; 1 where they are all one, so that it can be divided by.
    pub(super) fn value(&self) -> f64 {
        let spread = 1.0 - self.sum.iter().map(|v| (v / self.texts).powi(2)).sum::<f64>();
        if spread > 1e-6 { spread } else { 1.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{BatchShape, Sequence, batches};

    #[test]
    fn the_spread_is_that_of_directions() {
        let texts = [Sequence::with_length(2), Sequence::with_length(2)];
        let batch = batches(&texts, 1000, 100, &BatchShape::default()).remove(0);
        let spread = |values: [f32; 4]| {
            let mut spread = Spread::default();
            spread.add(&Tensor::new(&[2, 2], values.to_vec()), &batch, Pooling::Output);
            spread.value()
        };
        // Half of all pairs are a text and itself.
        approx::assert_abs_diff_eq!(spread([3.0, 0.0, 0.0, 0.5]), 0.5, epsilon = 1e-9);
        approx::assert_abs_diff_eq!(spread([3.0, 0.0, -1.0, 0.0]), 1.0, epsilon = 1e-9);
        assert_eq!((spread([2.0, 1.0, 4.0, 2.0]), spread([0.0; 4])), (1.0, 1.0));
    }
}

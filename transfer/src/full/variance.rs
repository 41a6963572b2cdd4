//! The variances of the teacher's values, by which errors are measured.

use mabert_runtime::Tensor;

use crate::data::Batch;
use crate::heads::RowUnit;

/// Adds up the variance of a value over what it is given, around the mean of each column.
#[derive(Clone, Debug, Default)]
pub(super) struct Variance {
    rows: f64,
    sum: Vec<f64>,
    square: f64,
}

impl Variance {
    /// Adds the rows that count.
    pub(super) fn add(&mut self, value: &Tensor, batch: &Batch, unit: RowUnit) {
        let value = value.to_f32();
        let count = match unit {
            RowUnit::Token => batch.size() * batch.length,
            RowUnit::Text => batch.size(),
        };
        if !value.len().is_multiple_of(count.max(1)) {
            return; // It has no row for each.
        }
        let columns = value.len() / count.max(1);
        self.sum.resize(columns, 0.0);
        let elements: Vec<f32> = value.iter().copied().collect();
        for (row, values) in elements.chunks_exact(columns.max(1)).enumerate() {
            let real = match unit {
                RowUnit::Token => row % batch.length < batch.lengths[row / batch.length],
                RowUnit::Text => batch.lengths[row] > 0,
            };
            if real {
                self.rows += 1.0;
                for (sum, &v) in self.sum.iter_mut().zip(values) {
                    *sum += f64::from(v);
                    self.square += f64::from(v).powi(2);
                }
            }
        }
    }

    /// A mean over columns; 1 where there is none, so that it can be divided by.
    pub(super) fn value(&self) -> f64 {
        let means: f64 = self.sum.iter().map(|s| s * s).sum::<f64>() / self.rows;
        let variance = (self.square - means) / (self.rows * self.sum.len() as f64);
        if variance.is_finite() && variance > 1e-12 { variance } else { 1.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{BatchShape, Sequence, batches};

    #[test]
    fn variances_are_around_the_mean_of_each_column() {
        let mut sum = Variance::default();
        let value = Tensor::new(&[2, 3, 2], vec![1f32, 10., 3., 10., 99., 99., 1., 10., 3., 10., 2., 10.]);
        let texts = [Sequence::with_length(2), Sequence::with_length(3)];
        let batch = batches(&texts, 1000, 100, &BatchShape::default()).remove(0);
        sum.add(&value, &batch, RowUnit::Token);
        // Of 1 3 1 3 2, and of five tens.
        approx::assert_abs_diff_eq!(sum.value(), 0.8 / 2.0, epsilon = 1e-9);
        assert_eq!(Variance::default().value(), 1.0);
    }
}

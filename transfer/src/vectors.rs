//! Vectors of texts, and how far those of two models are apart.

use mabert_runtime::Tensor;
use ndarray::{Array2, ArrayView1, ArrayView2, Axis, Ix2, Ix3, concatenate, s};
use rayon::prelude::*;
use serde::Serialize;

use crate::data::Batch;
use crate::pooling::Pooling;

/// Among more texts than this no neighbours are looked for: each is compared with all others.
const MOST_NEIGHBOURS: usize = 4096;
/// Rows of products that are held at once.
const BLOCK: usize = 256;
/// Texts whose cosines with another are as near as this are equally near to it, as two copies of one text are.
const TIE: f32 = 1e-6;

/// How far a model's vectors of texts are from another's.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct VectorDistance {
    /// What the vectors are.
    pub pooling: Pooling,
    /// Texts compared.
    pub texts: usize,
    /// Mean cosine between both models' vectors of a text.
    pub mean_cosine: f64,
    /// The smallest.
    pub least_cosine: f64,
    /// The share of texts whose nearest text, of all others (the first 4,096), is the same by both models' cosines.
    /// `None` for fewer than three texts.
    pub same_neighbour: Option<f64>,
}

/// The vectors of a batch's texts, `[texts, channels]`: of a value `[batch, channels]`, or `[batch, n, channels]` where
/// tokens are pooled. `None` where the value has another shape. Rows that only fill up the batch are left out.
pub(crate) fn pool(value: &Tensor, batch: &Batch, pooling: Pooling) -> Option<Array2<f32>> {
    let texts: Vec<usize> = (0..batch.size()).filter(|&row| batch.lengths[row] > 0).collect();
    if value.shape().first() != Some(&batch.size()) {
        return None;
    }
    let value = value.to_f32();
    if pooling == Pooling::Output {
        return Some(value.into_dimensionality::<Ix2>().ok()?.select(Axis(0), &texts));
    }
    let value = value.into_dimensionality::<Ix3>().ok().filter(|value| value.dim().1 == batch.length)?;
    let mut vectors = Array2::zeros((texts.len(), value.dim().2));
    for (mut vector, &row) in vectors.rows_mut().into_iter().zip(&texts) {
        let tokens = if pooling == Pooling::First { 1 } else { batch.lengths[row] };
        vector.assign(&value.slice(s![row, ..tokens, ..]).mean_axis(Axis(0))?);
    }
    Some(vectors)
}

/// The cosine of two vectors: 0 with one that is all zeros (1 where both are), -1 where it is not a number.
pub(crate) fn cosine(a: ArrayView1<'_, f32>, b: ArrayView1<'_, f32>) -> f64 {
    let (mut ab, mut aa, mut bb) = (0f64, 0f64, 0f64);
    for (&x, &y) in a.iter().zip(b) {
        let (x, y) = (f64::from(x), f64::from(y));
        (ab, aa, bb) = (ab + x * y, aa + x * x, bb + y * y);
    }
    let norm = (aa * bb).sqrt();
    let cosine = if norm == 0.0 { f64::from(u8::from(aa == bb)) } else { ab / norm };
    if cosine.is_nan() { -1.0 } else { cosine }
}

/// Adds up what tells two models' vectors apart.
#[derive(Clone, Debug)]
pub(crate) struct VectorSums {
    pooling: Pooling,
    texts: usize,
    cosines: f64,
    least: f64,
    /// `[texts, channels]` of some batches, as many of both models.
    kept: [Vec<Array2<f32>>; 2],
}

impl VectorSums {
    pub(crate) fn new(pooling: Pooling) -> Self {
        Self { pooling, texts: 0, cosines: 0.0, least: 1.0, kept: Default::default() }
    }

    /// Adds a batch's values, of the same shape.
    pub(crate) fn add(&mut self, first: &Tensor, second: &Tensor, batch: &Batch) {
        let pooled = [first, second].map(|value| pool(value, batch, self.pooling));
        let [Some(first), Some(second)] = pooled else { return };
        for (a, b) in first.rows().into_iter().zip(second.rows()) {
            let cosine = cosine(a, b);
            self.cosines += cosine;
            self.least = self.least.min(cosine);
        }
        let are_enough = self.texts >= MOST_NEIGHBOURS;
        self.texts += first.nrows();
        if !are_enough {
            let [firsts, seconds] = &mut self.kept;
            firsts.push(first);
            seconds.push(second);
        }
    }

    /// The distance; `None` where there are no vectors.
    pub(crate) fn distance(&self) -> Option<VectorDistance> {
        (self.texts > 0).then(|| VectorDistance {
            pooling: self.pooling,
            texts: self.texts,
            mean_cosine: self.cosines / self.texts as f64,
            least_cosine: self.least,
            same_neighbour: self.same_neighbour(),
        })
    }

    fn same_neighbour(&self) -> Option<f64> {
        let [first, second] = self.kept.each_ref().map(|parts| {
            let views: Vec<ArrayView2<'_, f32>> = parts.iter().map(|part| part.view()).collect();
            let joined = concatenate(Axis(0), &views).expect("all batches have as many channels");
            let most = joined.nrows().min(MOST_NEIGHBOURS);
            unit_rows(joined.slice(s![..most, ..]))
        });
        (first.nrows() > 2).then(|| {
            let same = nearest(&first).into_iter().zip(nearest(&second)).enumerate();
            let count = same.filter(|(text, (a, b))| match (a, b) {
                (Some((_, best)), Some((other, _))) => first.row(*text).dot(&first.row(*other)) >= best - TIE,
                _ => false,
            });
            count.count() as f64 / first.nrows() as f64
        })
    }
}

/// Rows of length 1; what has no direction stays as it is.
fn unit_rows(rows: ArrayView2<'_, f32>) -> Array2<f32> {
    let mut units = rows.to_owned();
    for mut row in units.rows_mut() {
        let norm = row.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt();
        if norm > 0.0 {
            row.mapv_inplace(|v| (f64::from(v) / norm) as f32);
        }
    }
    units
}

/// The nearest of all other rows, and its product with the row; `None` for a row whose products are not numbers.
fn nearest(units: &Array2<f32>) -> Vec<Option<(usize, f32)>> {
    let starts: Vec<usize> = (0..units.nrows()).step_by(BLOCK).collect();
    let block = |&start: &usize| {
        let products = units.slice(s![start..(start + BLOCK).min(units.nrows()), ..]).dot(&units.t());
        let nearest = |(row, products): (usize, ArrayView1<'_, f32>)| {
            let others = products.iter().enumerate().filter(|(at, product)| *at != start + row && !product.is_nan());
            others.map(|(at, &product)| (at, product)).reduce(|best, next| if next.1 > best.1 { next } else { best })
        };
        products.rows().into_iter().enumerate().map(nearest).collect::<Vec<_>>()
    };
    starts.par_iter().flat_map_iter(block).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{BatchShape, Sequence, batches};

    fn batch(lengths: &[usize]) -> Batch {
        let all: Vec<Sequence> = lengths.iter().map(|&length| Sequence::with_length(length)).collect();
        batches(&all, 1000, 100, &BatchShape { batch: Some(3), ..BatchShape::default() }).remove(0)
    }

    #[test]
    fn tokens_are_pooled_without_padding_and_filling() {
        // Texts of one and of two tokens, and a row that fills up the batch.
        let batch = batch(&[1, 2]);
        let tokens = Tensor::new(&[3, 2, 2], vec![1f32, 2., 9., 9., 3., 4., 5., 8., 7., 7., 7., 7.]);
        let pooled = |value: &Tensor, pooling| pool(value, &batch, pooling);
        assert_eq!(pooled(&tokens, Pooling::Mean), Some(ndarray::arr2(&[[1f32, 2.], [4., 6.]])));
        assert_eq!(pooled(&tokens, Pooling::First), Some(ndarray::arr2(&[[1f32, 2.], [3., 4.]])));
        let texts = Tensor::new(&[3, 2], vec![1f32, 2., 3., 4., f32::NAN, 0.]);
        assert_eq!(pooled(&texts, Pooling::Output), Some(ndarray::arr2(&[[1f32, 2.], [3., 4.]])));
        assert_eq!((pooled(&texts, Pooling::Mean), pooled(&tokens, Pooling::Output)), (None, None));
    }

    fn distance(first: &[[f32; 2]], second: &[[f32; 2]]) -> VectorDistance {
        let value = |rows: &[[f32; 2]]| Tensor::new(&[rows.len(), 2], rows.concat());
        let mut sums = VectorSums::new(Pooling::Output);
        // In two batches: neighbours are looked for among all.
        for (a, b) in first.chunks(3).zip(second.chunks(3)) {
            sums.add(&value(a), &value(b), &batch(&vec![2; a.len()]));
        }
        sums.distance().unwrap()
    }

    #[test]
    fn vectors_are_compared_by_direction_and_by_neighbours() {
        // At 0, 10, 25 and 90, 120, 135 degrees, of different lengths.
        let at =
            |degrees: [f32; 6]| degrees.map(|d| [d.to_radians().cos() * (1.0 + d), d.to_radians().sin() * (1.0 + d)]);
        let teacher = at([0.0, 10.0, 25.0, 90.0, 120.0, 135.0]);
        let same = distance(&teacher, &at([3.0, 13.0, 28.0, 93.0, 123.0, 138.0]));
        assert_eq!((same.texts, same.same_neighbour), (6, Some(1.0)));
        approx::assert_abs_diff_eq!(same.mean_cosine, f64::from(3f32).to_radians().cos(), epsilon = 1e-6);
        // The second text moves to the third, whose nearest it stays: nearest of the second is another then.
        let moved = distance(&teacher, &at([0.0, 20.0, 25.0, 90.0, 120.0, 135.0]));
        approx::assert_abs_diff_eq!(moved.least_cosine, f64::from(10f32).to_radians().cos(), epsilon = 1e-6);
        approx::assert_abs_diff_eq!(moved.same_neighbour.unwrap(), 5.0 / 6.0, epsilon = 1e-9);
    }

    #[test]
    fn copies_of_a_text_are_equally_near_and_what_is_no_number_is_near_nothing() {
        let teacher = [[1f32, 0.0], [1.0, 0.1], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [0.0, -1.0]];
        // Of the two copies the student takes the other for the nearest.
        let mut student = teacher;
        student[1] = [1.0, 0.100_001];
        assert_eq!(distance(&teacher, &student).same_neighbour, Some(1.0));
        student[4] = [f32::NAN, 1.0];
        let broken = distance(&teacher, &student);
        assert_eq!((broken.least_cosine, broken.texts), (-1.0, 6));
        // Its own, and that of the text that it was nearest to.
        approx::assert_abs_diff_eq!(broken.same_neighbour.unwrap(), 4.0 / 6.0, epsilon = 1e-9);
    }
}

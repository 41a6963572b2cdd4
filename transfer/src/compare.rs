//! How far values are from those of another model.

use mabert_runtime::{Named, Tensor};
use ndarray::{Array1, ArrayView2, Axis};
use serde::Serialize;

/// The size of a difference against that of what was to be reached: root of the summed squared difference over the
/// summed squared deviation of the target from its mean, channel by channel. 0 is equal, 1 no better than a constant.
#[derive(Clone, Debug, Default)]
pub struct RelativeError {
    rows: f64,
    missed: f64,
    sum: Option<Array1<f64>>,
    square: f64,
}

impl RelativeError {
    /// Adds rows, both `[rows, channels]`.
    pub fn add(&mut self, value: ArrayView2<'_, f32>, target: ArrayView2<'_, f32>) {
        let wide = target.mapv(f64::from);
        self.rows += target.nrows() as f64;
        self.missed += value.iter().zip(&target).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum::<f64>();
        self.square += wide.iter().map(|v| v * v).sum::<f64>();
        let sum = wide.sum_axis(Axis(0));
        self.sum = Some(match self.sum.take() {
            Some(before) => before + sum,
            None => sum,
        });
    }

    /// The error; not a number where nothing was added or the target is constant.
    pub fn value(&self) -> f64 {
        let means = self.sum.as_ref().map_or(0.0, |s| s.dot(s) / self.rows);
        (self.missed / (self.square - means).max(0.0)).sqrt()
    }
}

/// How far one output is from the other model's, over all that was run.
#[derive(Clone, Debug, Serialize)]
pub struct OutputDistance {
    /// The output.
    pub output: String,
    /// Elements compared.
    pub elements: usize,
    /// Largest absolute difference.
    pub max_abs: f64,
    /// Mean absolute difference.
    pub mean_abs: f64,
    /// Largest difference over what the tolerance allows there: above 1 it does not hold.
    pub exceeds: f64,
    /// The smallest cosine between rows (the last axis), where it has more than one element.
    pub cosine: Option<f64>,
    /// Mean cosine between rows.
    pub mean_cosine: Option<f64>,
    /// For rows of at least two: the share whose largest element is the same.
    pub agreement: Option<f64>,
}

/// What is allowed between two outputs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Tolerance {
    /// Absolute, and relative to the first model's element: `|a - b| <= atol + rtol |a|`, where asked for.
    pub elements: Option<(f64, f64)>,
    /// The smallest cosine of a row, where asked for.
    pub cosine: Option<f64>,
}

impl OutputDistance {
    /// Whether the tolerance holds.
    pub fn holds(&self, tolerance: &Tolerance) -> bool {
        let cosine = tolerance.cosine.zip(self.cosine).is_none_or(|(least, smallest)| smallest >= least);
        let elements = tolerance.elements.is_none() || self.exceeds <= 1.0;
        cosine && elements && self.max_abs.is_finite()
    }
}

/// Adds up distances of one output over several runs.
#[derive(Clone, Debug, Default)]
struct Sums {
    elements: usize,
    max_abs: f64,
    total: f64,
    exceeds: f64,
    least: f64,
    cosines: f64,
    rows: usize,
    same: usize,
    wide: bool,
}

/// Distances of all outputs that two models share, over several runs.
#[derive(Clone, Debug)]
pub struct Distances {
    tolerance: Tolerance,
    outputs: Vec<(String, Sums)>,
}

impl Distances {
    /// Nothing compared yet.
    pub fn new(tolerance: Tolerance) -> Self {
        Self { tolerance, outputs: Vec::new() }
    }

    /// Adds what both models gave for the same inputs. Where the tokens of each sequence are given as `lengths`, only real
    /// sequences count, and of values `[batch, n, ...]` only real tokens.
    ///
    /// # Errors
    /// An output of both has two shapes.
    pub fn add(&mut self, first: &Named, second: &Named, lengths: Option<&[usize]>) -> crate::Result<()> {
        for (name, a) in first {
            let Some((_, b)) = second.iter().find(|(n, _)| n == name) else { continue };
            if a.shape() != b.shape() {
                let reason =
                    format!("output `{name}` is {:?} in one model and {:?} in the other", a.shape(), b.shape());
                return Err(crate::Error::Compare(reason));
            }
            let at = match self.outputs.iter().position(|(n, _)| n == name) {
                Some(at) => at,
                None => {
                    self.outputs.push((name.clone(), Sums { least: 1.0, ..Sums::default() }));
                    self.outputs.len() - 1
                }
            };
            self.outputs[at].1.add(a, b, lengths, &self.tolerance);
        }
        Ok(())
    }

    /// The distances so far.
    pub fn outputs(&self) -> Vec<OutputDistance> {
        let distance = |(name, s): &(String, Sums)| OutputDistance {
            output: name.clone(),
            elements: s.elements,
            max_abs: s.max_abs,
            mean_abs: s.total / s.elements.max(1) as f64,
            exceeds: s.exceeds,
            cosine: s.wide.then_some(s.least),
            mean_cosine: s.wide.then_some(s.cosines / s.rows.max(1) as f64),
            agreement: s.wide.then_some(s.same as f64 / s.rows.max(1) as f64),
        };
        self.outputs.iter().map(distance).collect()
    }
}

impl Sums {
    fn add(&mut self, a: &Tensor, b: &Tensor, lengths: Option<&[usize]>, tolerance: &Tolerance) {
        let shape = a.shape().to_vec();
        let (a, b) = (a.to_f32(), b.to_f32());
        let width = if shape.len() < 2 { 1 } else { shape[shape.len() - 1] };
        self.wide |= width > 1;
        let (a, b) = (a.iter().copied().collect::<Vec<f32>>(), b.iter().copied().collect::<Vec<f32>>());
        for (row, (x, y)) in a.chunks_exact(width.max(1)).zip(b.chunks_exact(width.max(1))).enumerate() {
            if lengths.is_some_and(|lengths| !is_real(&shape, row, lengths)) {
                continue;
            }
            self.row(x, y, tolerance);
        }
    }

    fn row(&mut self, x: &[f32], y: &[f32], tolerance: &Tolerance) {
        let (mut xy, mut xx, mut yy) = (0f64, 0f64, 0f64);
        for (&x, &y) in x.iter().zip(y) {
            let (x, y) = (f64::from(x), f64::from(y));
            let difference = if x == y { 0.0 } else { (x - y).abs() };
            // A NaN is infinitely far: `max` alone would drop it.
            let difference = if difference.is_nan() { f64::INFINITY } else { difference };
            self.max_abs = self.max_abs.max(difference);
            self.total += difference;
            if let (Some((atol, rtol)), true) = (tolerance.elements, difference > 0.0) {
                let bound = atol + rtol * x.abs();
                let times =
                    if difference.is_finite() && bound.is_finite() { difference / bound } else { f64::INFINITY };
                self.exceeds = self.exceeds.max(times);
            }
            (xy, xx, yy) = (xy + x * y, xx + x * x, yy + y * y);
        }
        self.elements += x.len();
        self.rows += 1;
        if x.len() > 1 {
            let norm = (xx * yy).sqrt();
            let cosine = if norm > 0.0 { xy / norm } else { f64::from(u8::from(xx == yy)) };
            let cosine = if cosine.is_nan() { -1.0 } else { cosine };
            self.least = self.least.min(cosine);
            self.cosines += cosine;
            // A NaN has no largest element to agree with.
            self.same += usize::from(!xy.is_nan() && argmax(x) == argmax(y));
        }
    }
}

/// The position of the largest element, the first of equal ones.
pub fn argmax(row: &[f32]) -> usize {
    (1..row.len()).fold(0, |best, at| if row[at] > row[best] { at } else { best })
}

/// How many sequences of a batch, `lengths` tokens each, have a value that is not finite. Padding does not count.
pub fn overflows(outputs: &Named, lengths: &[usize]) -> usize {
    let mut bad = vec![false; lengths.len()];
    for (_, value) in outputs.iter().filter(|(_, value)| value.shape().first() == Some(&lengths.len())) {
        let shape = value.shape();
        let width = if shape.len() < 2 { 1 } else { shape[shape.len() - 1] };
        let elements: Vec<f32> = value.to_f32().iter().copied().collect();
        let rows_each = (elements.len() / width.max(1) / lengths.len().max(1)).max(1);
        for (row, x) in elements.chunks_exact(width.max(1)).enumerate() {
            bad[row / rows_each] |= is_real(shape, row, lengths) && x.iter().any(|v| !v.is_finite());
        }
    }
    bad.into_iter().filter(|bad| *bad).count()
}

/// Whether a row belongs to a real sentence and, in values `[batch, n, ...]`, to a real token.
fn is_real(shape: &[usize], row: usize, lengths: &[usize]) -> bool {
    match shape {
        [batch, n, _] if *batch == lengths.len() => row % n < lengths[row / n],
        [batch, rest @ ..] if *batch == lengths.len() => {
            let rows_each: usize = rest[..rest.len().saturating_sub(1)].iter().product();
            lengths[row / rows_each.max(1)] > 0
        }
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_that_overflow_are_counted_without_their_padding() {
        // Two sequences of one and two tokens, and a row that only fills up the batch.
        let lengths = [1, 2, 0];
        let hidden = |row: usize, token: usize| {
            let mut value = ndarray::Array3::<f32>::zeros((3, 2, 4));
            value[[row, token, 3]] = f32::NAN;
            vec![("hidden".to_owned(), Tensor::from(value.into_dyn()))]
        };
        assert_eq!(overflows(&hidden(0, 1), &lengths), 0, "the first sequence has one token");
        assert_eq!(overflows(&hidden(0, 0), &lengths), 1);
        assert_eq!(overflows(&hidden(2, 0), &lengths), 0, "nothing but filling");
        let logits = Tensor::new(&[3, 2], vec![0f32, f32::INFINITY, f32::NAN, 0.0, f32::NAN, f32::NAN]);
        assert_eq!(overflows(&vec![("logits".to_owned(), logits)], &lengths), 2);
        let scores = Tensor::new(&[3], vec![f32::NAN, 1.0, f32::NAN]);
        assert_eq!(overflows(&vec![("score".to_owned(), scores)], &lengths), 1);
    }

    #[test]
    fn relative_error_is_that_of_a_constant_at_one() {
        let target = ndarray::arr2(&[[1f32, 10.0], [3.0, 14.0]]);
        let mut constant = RelativeError::default();
        constant.add(ndarray::arr2(&[[2f32, 12.0], [2.0, 12.0]]).view(), target.view());
        approx::assert_abs_diff_eq!(constant.value(), 1.0, epsilon = 1e-12);
        let mut equal = RelativeError::default();
        equal.add(target.view(), target.view());
        assert_eq!(equal.value(), 0.0);
    }

    #[test]
    fn padding_does_not_count_and_nan_is_far() {
        let tolerance = Tolerance { elements: Some((1e-3, 0.0)), cosine: None };
        let a = vec![("h".to_owned(), Tensor::new(&[1, 2, 2], vec![1f32, 0.0, 5.0, 4.0]))];
        let b = vec![("h".to_owned(), Tensor::new(&[1, 2, 2], vec![1f32, 0.0, -5.0, 7.0]))];
        let mut distances = Distances::new(tolerance);
        distances.add(&a, &b, Some(&[1])).unwrap();
        let found = &distances.outputs()[0];
        assert!(found.holds(&tolerance) && found.max_abs == 0.0 && found.elements == 2);
        distances.add(&a, &b, None).unwrap();
        let found = &distances.outputs()[0];
        assert!(!found.holds(&tolerance) && found.max_abs == 10.0);
        assert_eq!(found.agreement, Some(2.0 / 3.0));
        let nan = vec![("h".to_owned(), Tensor::new(&[1, 2, 2], vec![f32::NAN; 4]))];
        let mut distances = Distances::new(tolerance);
        distances.add(&a, &nan, None).unwrap();
        assert!(!distances.outputs()[0].holds(&tolerance));
    }
}

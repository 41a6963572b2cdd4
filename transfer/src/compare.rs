//! How far values are from those of another model.

use mabert_runtime::{Named, Tensor};
use ndarray::{Array1, ArrayView2, Axis};
use serde::Serialize;

use crate::data::Batch;
use crate::heads::HeadKind;
use crate::pooling::{Features, Form, Pooling, has_reals};
pub use crate::vectors::VectorDistance;
use crate::vectors::{VectorSums, cosine};

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
    /// For rows of at least two logits: the share whose largest element is the same.
    pub agreement: Option<f64>,
    /// Of a feature model: how far the vectors of texts are that are made of this output.
    pub vectors: Option<VectorDistance>,
}

/// What is allowed between two outputs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Tolerance {
    /// Absolute, and relative to the first model's element: `|a - b| <= atol + rtol |a|`, where asked for.
    pub elements: Option<(f64, f64)>,
    /// The smallest cosine of a row, or of a text's vectors where there are such; where asked for.
    pub cosine: Option<f64>,
}

impl OutputDistance {
    /// The smallest cosine and the mean: of texts' vectors where there are such, else of rows.
    pub fn cosines(&self) -> Option<(f64, f64)> {
        let of_vectors = self.vectors.as_ref().map(|vectors| (vectors.least_cosine, vectors.mean_cosine));
        of_vectors.or_else(|| self.cosine.zip(self.mean_cosine))
    }

    /// Whether the tolerance holds.
    pub fn holds(&self, tolerance: &Tolerance) -> bool {
        let cosine = tolerance.cosine.zip(self.cosines()).is_none_or(|(least, (smallest, _))| smallest >= least);
        let elements = tolerance.elements.is_none() || self.exceeds <= 1.0;
        cosine && elements && self.max_abs.is_finite()
    }
}

/// Adds up distances of one output over several runs.
#[derive(Clone, Debug)]
struct Sums {
    elements: usize,
    max_abs: f64,
    total: f64,
    exceeds: f64,
    least: f64,
    cosines: f64,
    /// Rows of more than one element.
    wide_rows: usize,
    same: usize,
}

/// One output over several runs.
#[derive(Clone, Debug)]
struct Output {
    name: String,
    /// Its shapes, each after its batch's length.
    shapes: Vec<(usize, Vec<usize>)>,
    /// Whether its elements are no integers.
    real: bool,
    /// Rows whole, as those of classes are.
    whole: Sums,
    /// Rows without their padding, as those over the tokens of a text are: which of the two it is, several runs tell.
    without_padding: Sums,
    /// Of texts' vectors, where it has any.
    vectors: Option<VectorSums>,
}

/// Distances of all outputs that two models share, over several runs.
#[derive(Clone, Debug)]
pub struct Distances {
    tolerance: Tolerance,
    features: Features,
    /// Values that are no outputs.
    inner: Vec<String>,
    outputs: Vec<Output>,
}

impl Distances {
    /// Nothing compared yet.
    pub fn new(tolerance: Tolerance) -> Self {
        Self { tolerance, features: Features::new(Some(Pooling::None)), inner: Vec::new(), outputs: Vec::new() }
    }

    /// Compares vectors of texts too, where the models give such.
    #[must_use]
    pub fn features(mut self, features: Features) -> Self {
        self.features = features;
        self
    }

    /// Says which values are inner ones, neither answers nor vectors of texts.
    #[must_use]
    pub fn inner(mut self, values: &[String]) -> Self {
        self.inner = values.to_vec();
        self
    }

    /// Adds what both models gave for the same inputs. Of a batch only real sequences count, and of values `[batch, n]`
    /// and `[batch, n, ...]` only real tokens.
    ///
    /// # Errors
    /// An output of both has two shapes, or none is such as vectors of texts are to be made of.
    pub fn add(&mut self, first: &Named, second: &Named, batch: Option<&Batch>) -> crate::Result<()> {
        let of_both = |name: &str| second.iter().find(|(n, _)| n == name);
        if let Some(batch) = batch.filter(|_| self.outputs.is_empty()) {
            let is_shared = |name: &String| of_both(name).is_some() && !self.inner.contains(name);
            let shared: Vec<&(String, Tensor)> = first.iter().filter(|(name, _)| is_shared(name)).collect();
            self.outputs = self.outputs_with_vectors(&shared, batch)?;
        }
        for (name, a) in first {
            let Some((_, b)) = of_both(name) else { continue };
            if a.shape() != b.shape() {
                let reason =
                    format!("output `{name}` is {:?} in one model and {:?} in the other", a.shape(), b.shape());
                return Err(crate::Error::Compare(reason));
            }
            let at = match self.outputs.iter().position(|output| output.name == *name) {
                Some(at) => at,
                None => {
                    self.outputs.push(Output::new(name, None));
                    self.outputs.len() - 1
                }
            };
            self.outputs[at].add(a, b, batch, &self.tolerance);
        }
        Ok(())
    }

    /// Outputs of which nothing was added yet, told by the values of one batch.
    fn outputs_with_vectors(&self, values: &[&(String, Tensor)], batch: &Batch) -> crate::Result<Vec<Output>> {
        let form = |(name, value): &(String, Tensor)| {
            Form::new(&self.features, name, value, &[(batch.length, value.shape().to_vec())])
        };
        let forms: Vec<Form> = values.iter().map(|output| form(output)).collect();
        let vectors = self.features.vectors(&forms)?;
        let output = |((name, _), pooling): (&(String, Tensor), &Option<Pooling>)| Output::new(name, *pooling);
        Ok(values.iter().copied().zip(&vectors.poolings).map(output).collect())
    }

    /// The distances so far.
    pub fn outputs(&self) -> Vec<OutputDistance> {
        let distance = |output: &Output| {
            let distance = output.distance(&self.features);
            let is_inner = self.inner.contains(&output.name);
            OutputDistance { agreement: distance.agreement.filter(|_| !is_inner), ..distance }
        };
        self.outputs.iter().map(distance).collect()
    }
}

impl Output {
    fn new(name: &str, pooling: Option<Pooling>) -> Self {
        let (whole, without_padding) = (Sums::default(), Sums::default());
        let vectors = pooling.map(VectorSums::new);
        Self { name: name.to_owned(), shapes: Vec::new(), real: true, whole, without_padding, vectors }
    }

    fn add(&mut self, a: &Tensor, b: &Tensor, batch: Option<&Batch>, tolerance: &Tolerance) {
        let shape = a.shape().to_vec();
        let width = row_width(&shape);
        self.real = has_reals(a);
        if let Some((vectors, batch)) = self.vectors.as_mut().zip(batch) {
            vectors.add(a, b, batch);
        }
        let (a, b) = (a.to_f32(), b.to_f32());
        let (a, b) = (a.iter().copied().collect::<Vec<f32>>(), b.iter().copied().collect::<Vec<f32>>());
        let lengths = batch.map(|batch| batch.lengths.as_slice());
        for (row, (x, y)) in a.chunks_exact(width).zip(b.chunks_exact(width)).enumerate() {
            if lengths.is_some_and(|lengths| !is_real(&shape, row, lengths)) {
                continue;
            }
            self.whole.row(x, y, tolerance);
            let tokens = lengths.and_then(|lengths| lengths.get(row)).map_or(width, |tokens| width.min(*tokens));
            self.without_padding.row(&x[..tokens], &y[..tokens], tolerance);
        }
        // Without a batch, what has a row for each of some tokens is told by its rank alone.
        let length = batch.map_or(if shape.len() == 3 { shape[1] } else { usize::MAX }, |batch| batch.length);
        self.shapes.push((length, shape));
    }

    fn distance(&self, features: &Features) -> OutputDistance {
        let has_classes = self.real && !self.shapes.is_empty() && features.kind(&self.name, &self.shapes).has_logits();
        let over_tokens = !self.shapes.is_empty() && is_over_tokens(&self.name, &self.shapes);
        let sums = if over_tokens { &self.without_padding } else { &self.whole };
        let mean = |sum: f64| (sums.wide_rows > 0).then(|| sum / sums.wide_rows as f64);
        OutputDistance {
            output: self.name.clone(),
            elements: sums.elements,
            max_abs: sums.max_abs,
            mean_abs: sums.total / sums.elements.max(1) as f64,
            exceeds: sums.exceeds,
            cosine: mean(0.0).map(|_| sums.least),
            mean_cosine: mean(sums.cosines),
            agreement: mean(sums.same as f64).filter(|_| has_classes),
            vectors: self.vectors.as_ref().filter(|_| !has_classes).and_then(VectorSums::distance),
        }
    }
}

/// Whether an output is a row a text, over the text's tokens.
fn is_over_tokens(name: &str, shapes: &[(usize, Vec<usize>)]) -> bool {
    shapes.iter().all(|(_, shape)| shape.len() == 2) && HeadKind::from_shapes(name, shapes, 0) == HeadKind::Positions
}

/// The elements of a row: along the last axis, where there are two.
fn row_width(shape: &[usize]) -> usize {
    if shape.len() < 2 { 1 } else { shape[shape.len() - 1].max(1) }
}

impl Default for Sums {
    fn default() -> Self {
        Self { elements: 0, max_abs: 0.0, total: 0.0, exceeds: 0.0, least: 1.0, cosines: 0.0, wide_rows: 0, same: 0 }
    }
}

impl Sums {
    fn row(&mut self, x: &[f32], y: &[f32], tolerance: &Tolerance) {
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
        }
        self.elements += x.len();
        if x.len() > 1 {
            self.wide_rows += 1;
            let cosine = cosine(x.into(), y.into());
            self.least = self.least.min(cosine);
            self.cosines += cosine;
            // A NaN has no largest element to agree with.
            let has_nan = x.iter().chain(y).any(|v| v.is_nan());
            self.same += usize::from(!has_nan && argmax(x) == argmax(y));
        }
    }
}

/// The position of the largest element, the first of equal ones.
pub fn argmax(row: &[f32]) -> usize {
    (1..row.len()).fold(0, |best, at| if row[at] > row[best] { at } else { best })
}

/// How many sequences have a value that is not finite in what a model gave for `batches`. Padding does not count.
pub fn overflows(batches: &[Batch], outputs: &[Named]) -> usize {
    let names = outputs.first().into_iter().flatten().map(|(name, _)| name.as_str());
    let over_tokens: Vec<bool> = names
        .enumerate()
        .map(|(at, name)| {
            let shape = |(batch, outputs): (&Batch, &Named)| (batch.length, outputs[at].1.shape().to_vec());
            is_over_tokens(name, &batches.iter().zip(outputs).map(shape).collect::<Vec<_>>())
        })
        .collect();
    batches.iter().zip(outputs).map(|(batch, outputs)| overflows_of_batch(batch, outputs, &over_tokens)).sum()
}

fn overflows_of_batch(batch: &Batch, outputs: &Named, over_tokens: &[bool]) -> usize {
    let lengths = &batch.lengths;
    let mut bad = vec![false; lengths.len()];
    for ((_, value), over_tokens) in outputs.iter().zip(over_tokens) {
        let shape = value.shape();
        if shape.first() != Some(&lengths.len()) {
            continue;
        }
        let elements: Vec<f32> = value.to_f32().iter().copied().collect();
        let width = row_width(shape);
        let rows_each = (elements.len() / width / lengths.len().max(1)).max(1);
        for (row, x) in elements.chunks_exact(width).enumerate() {
            let counted = if *over_tokens { width.min(lengths[row]) } else { width };
            bad[row / rows_each] |= is_real(shape, row, lengths) && x[..counted].iter().any(|v| !v.is_finite());
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
    use crate::data::{BatchShape, Sequence, batches};

    /// A batch of texts of so many tokens; 0 is a row that only fills it up.
    fn batch(lengths: &[usize]) -> Batch {
        let texts: Vec<Sequence> = lengths.iter().filter(|n| **n > 0).map(|n| Sequence::with_length(*n)).collect();
        let shape = BatchShape { batch: Some(lengths.len()), ..BatchShape::default() };
        let batch = batches(&texts, 1000, 100, &shape).remove(0);
        assert_eq!(batch.lengths, lengths);
        batch
    }

    #[test]
    fn sequences_that_overflow_are_counted_without_their_padding() {
        // Two sequences of one and two tokens, and a row that only fills up the batch.
        let lengths = [1, 2, 0];
        let count = |outputs: Named| overflows(&[batch(&lengths)], &[outputs]);
        let hidden = |row: usize, token: usize| {
            let mut value = ndarray::Array3::<f32>::zeros((3, 2, 4));
            value[[row, token, 3]] = f32::NAN;
            vec![("hidden".to_owned(), Tensor::from(value.into_dyn()))]
        };
        assert_eq!(count(hidden(0, 1)), 0, "the first sequence has one token");
        assert_eq!(count(hidden(0, 0)), 1);
        assert_eq!(count(hidden(2, 0)), 0, "nothing but filling");
        let infinite = || Tensor::new(&[3, 2], vec![0f32, f32::NEG_INFINITY, 0.0, 0.0, f32::NAN, f32::NAN]);
        assert_eq!(count(vec![("logits".to_owned(), infinite())]), 1);
        assert_eq!(count(vec![("start_logits".to_owned(), infinite())]), 0, "a start is no padding");
        let scores = Tensor::new(&[3], vec![f32::NAN, 1.0, f32::NAN]);
        assert_eq!(count(vec![("score".to_owned(), scores)]), 1);
    }

    /// Where an answer starts is told by a row over the text's tokens, of texts of one token too.
    #[test]
    fn rows_over_tokens_are_compared_without_their_padding() {
        let tolerance = Tolerance { elements: Some((1e-3, 0.0)), cosine: None };
        let output = |rows: &[&[f32]]| {
            let shape = [rows.len(), rows[0].len()];
            vec![("output_0".to_owned(), Tensor::new(&shape, rows.concat()))]
        };
        let mut distances = Distances::new(tolerance);
        let (a, b) = (output(&[&[1.0, 7.0, 9.0], &[1.0, 2.0, 3.0]]), output(&[&[1.0, -7.0, 2.0], &[1.0, 2.0, 3.0]]));
        distances.add(&a, &b, Some(&batch(&[1, 3]))).unwrap();
        let text = output(&[&[4.0, 2.0]]);
        distances.add(&text, &text, Some(&batch(&[2]))).unwrap();
        let found = &distances.outputs()[0];
        assert_eq!((found.elements, found.max_abs), (1 + 3 + 2, 0.0));
        assert_eq!((found.cosine, found.mean_cosine, found.agreement), (Some(1.0), Some(1.0), Some(1.0)));
        // Texts of one token alone have rows of one element.
        let mut distances = Distances::new(tolerance);
        distances.add(&output(&[&[1.0]]), &output(&[&[1.0]]), Some(&batch(&[1]))).unwrap();
        assert_eq!(distances.outputs()[0].mean_cosine, None);
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
        let a = vec![("h".to_owned(), Tensor::new(&[2, 1, 2], vec![1f32, 0.0, 5.0, 4.0]))];
        let b = vec![("h".to_owned(), Tensor::new(&[2, 1, 2], vec![1f32, 0.0, -5.0, 7.0]))];
        let mut distances = Distances::new(tolerance);
        distances.add(&a, &b, Some(&batch(&[1, 0]))).unwrap();
        let found = &distances.outputs()[0];
        assert!(found.holds(&tolerance) && found.max_abs == 0.0 && found.elements == 2);
        distances.add(&a, &b, None).unwrap();
        let found = &distances.outputs()[0];
        assert!(!found.holds(&tolerance) && found.max_abs == 10.0);
        assert_eq!(found.agreement, Some(2.0 / 3.0));
        let nan = vec![("h".to_owned(), Tensor::new(&[2, 1, 2], vec![f32::NAN; 4]))];
        let mut distances = Distances::new(tolerance);
        distances.add(&a, &nan, None).unwrap();
        assert!(!distances.outputs()[0].holds(&tolerance));
    }

    #[test]
    fn answers_are_compared_by_class_and_features_by_vectors() {
        let tolerance = Tolerance { elements: None, cosine: Some(0.9) };
        let distance = |features: Features, name: &str, shape: &[usize], values: [[f32; 12]; 2]| {
            let [a, b] = values.map(|v| vec![(name.to_owned(), Tensor::new(shape, v.to_vec()))]);
            let mut distances = Distances::new(tolerance).features(features);
            distances.add(&a, &b, Some(&batch(&[1, 2, 2]))).unwrap();
            distances.outputs().remove(0)
        };
        let a: [f32; 12] = [1., 0., 5., 5., 1., 1., 1., 1., 0., 1., 0., 3.];
        // The first text's padding differs, of the second the tokens but not their mean.
        let b: [f32; 12] = [1., 0., -5., 5., 2., 0., 0., 2., 0., 1., 0., 3.];
        let channels = || Features::default().channels(Some(2));
        let hidden = distance(channels(), "hidden", &[3, 2, 2], [a, b]);
        let vectors = hidden.vectors.as_ref().unwrap();
        assert_eq!((vectors.pooling, vectors.texts, hidden.agreement), (Pooling::Mean, 3, None));
        approx::assert_abs_diff_eq!(vectors.least_cosine, 1.0, epsilon = 1e-9);
        assert!(hidden.cosine.unwrap() < 0.8 && hidden.holds(&tolerance), "{hidden:?}");
        let rows = distance(Features::new(Some(Pooling::None)).channels(Some(2)), "hidden", &[3, 2, 2], [a, b]);
        assert!(rows.vectors.is_none() && rows.agreement.is_none() && !rows.holds(&tolerance), "{rows:?}");
        let classes = distance(channels(), "logits", &[3, 4], [a, b]);
        assert!(classes.vectors.is_none() && classes.agreement.is_some(), "{classes:?}");
        let named = distance(channels(), "sentence_embedding", &[3, 4], [a, b]);
        assert_eq!((named.vectors.unwrap().pooling, named.agreement), (Pooling::Output, None));
    }

    #[test]
    fn integers_are_no_answers() {
        let ids = vec![("ids".to_owned(), Tensor::new(&[1, 3], vec![4i64, 7, 2]))];
        let mut distances = Distances::new(Tolerance { elements: None, cosine: None });
        distances.add(&ids, &ids, Some(&batch(&[3]))).unwrap();
        assert_eq!(distances.outputs()[0].agreement, None);
    }
}

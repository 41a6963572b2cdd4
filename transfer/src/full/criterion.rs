//! What the stage brings down: the student's distance from its teacher on one piece of a step.

use candle_core::{D, Tensor as Real};

use super::labels::{Labelled, Labels, Target, set_divergence};
use super::losses::{Losses, Totals, Weights};
use crate::data::{Batch, Sequence};
use crate::gradient::{bounded, device, squared_distance, to_candle};
use crate::heads::{HeadKind, RowUnit};
use crate::pooling::Pooling;
use crate::{Error, Result, Setting};

/// Beyond it a row's distance counts by its logarithm ([`bounded`]): four variances of the teacher, as many nats, or, of
/// probabilities, a sum of squares of four.
pub(super) const FAR: f64 = 4.0;

/// An output of both models.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub(super) name: String,
    pub(super) kind: HeadKind,
    /// Elements of a row; of tokens where the output has a row a token.
    pub(super) columns: usize,
    /// The teacher's variance.
    pub(super) variance: f64,
}

/// The vectors of texts that users of a feature model compare.
#[derive(Clone, Copy, Debug)]
pub(super) struct TextVectors {
    pub(super) source: Source,
    pub(super) pooling: Pooling,
    /// 1 minus the mean cosine of two of the teacher's.
    pub(super) spread: f64,
}

/// What vectors are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// A norm's value, by its place among the norms.
    Norm(usize),
    /// An output, by its place among the [`Head`]s.
    Output(usize),
}

/// One piece of a step as both models see it.
pub(super) struct Compared<'c> {
    pub(super) batch: &'c Batch,
    /// The label of each row that has one.
    pub(super) labels: &'c [Option<Target>],
    /// A value a norm, student and teacher, `[batch, n, channels]`.
    pub(super) hidden: Vec<(Real, Real)>,
    /// Probabilities of each layer, `[batch, heads, n, n]`.
    pub(super) attention: Vec<(Real, Real)>,
    /// As [`Head`]s.
    pub(super) outputs: Vec<(Real, Real)>,
}

/// What the loss knows of the models.
pub(super) struct Criterion {
    pub(super) heads: Vec<Head>,
    /// Of each norm, the teacher's variance.
    pub(super) variances: Vec<f64>,
    /// Of a feature model.
    pub(super) vectors: Option<TextVectors>,
    pub(super) weights: Weights,
    /// The head that labels are for, where they count.
    pub(super) labelled: Option<Labelled>,
}

impl Criterion {
    /// Nothing known of the models yet.
    pub(super) fn new(weights: Weights) -> Self {
        Self { heads: Vec::new(), variances: Vec::new(), vectors: None, weights, labelled: None }
    }

    /// Finds the head that labels are for.
    ///
    /// # Errors
    /// Labels count, but there are none, or no head for them; or nothing counts at all.
    pub(super) fn choose_labelled(&mut self, labels: Option<&Labels>) -> Result<()> {
        if self.weights.alpha < 1.0 {
            let missing = || Error::setting("labels count in the loss, but there are none", &[Setting::NoLabels]);
            self.labelled = Some(Labelled::new(labels.ok_or_else(missing)?, &self.heads)?);
        }
        let Weights { hidden, attention, vectors, .. } = self.weights;
        let compares_vectors = vectors > 0.0 && self.vectors.is_some();
        if self.heads.is_empty() && hidden == 0.0 && attention == 0.0 && !compares_vectors {
            let reason = "nothing is left to compare: the model has no head, and hidden states count nothing";
            return Err(Error::setting(reason, &[Setting::HiddenWeight]));
        }
        Ok(())
    }

    /// The label of a sequence, where labels count and it has one.
    ///
    /// # Errors
    /// The head does not know it.
    pub(super) fn label(&self, sequence: &Sequence) -> Result<Option<Target>> {
        self.labelled.as_ref().map_or(Ok(None), |labelled| labelled.target(&self.heads, sequence))
    }

    /// The loss of a piece, and its parts; sums over the pieces of a step are the step's.
    pub(super) fn loss(&self, compared: &Compared<'_>, totals: &Totals) -> Result<(Real, Losses)> {
        let weights = &self.weights;
        let mut losses = Losses::default();
        let mut sum = Real::zeros((), candle_core::DType::F32, device())?;
        let mut take = |part: Real, share: f64, weight: f64| -> Result<f64> {
            let part = (part * share)?;
            let value = f64::from(part.to_scalar::<f32>()?);
            if weight != 0.0 {
                sum = (&sum + (part * weight)?)?;
            }
            Ok(value)
        };
        let tokens = row_weights(compared.batch, RowUnit::Token)?;
        for ((student, teacher), variance) in compared.hidden.iter().zip(&self.variances) {
            let norms = self.variances.len() as f64;
            let share = 1.0 / (totals.tokens as f64 * variance * norms);
            let distance = squared_distance(student, teacher, &tokens, FAR * variance)?;
            let part = take(distance, share, weights.hidden)?;
            losses.hidden += part;
            losses.norms.push(part * norms);
        }
        for (student, teacher) in &compared.attention {
            let heads = student.dim(1)?;
            let share = 1.0 / ((totals.pairs * heads * compared.attention.len()).max(1) as f64);
            losses.attention += take(pair_squares(student, teacher, compared.batch)?, share, weights.attention)?;
        }
        let sets = self.labelled.as_ref().and_then(Labelled::sets);
        for (at, ((student, teacher), head)) in compared.outputs.iter().zip(&self.heads).enumerate() {
            let unit = head.kind.row_unit();
            let share = 1.0 / (totals.rows(unit).max(1) * self.heads.len()) as f64;
            let counting = row_weights(compared.batch, unit)?;
            let part = if sets == Some(at) {
                set_divergence(student, teacher, weights.temperature, &counting)?
            } else if head.kind.has_logits() {
                Divergence { kind: head.kind, temperature: weights.temperature }.between(
                    student,
                    teacher,
                    compared.batch,
                    &counting,
                )?
            } else {
                (squared_distance(student, teacher, &counting, FAR * head.variance)? / head.variance)?
            };
            losses.outputs += take(part, share, weights.alpha)?;
        }
        if let Some(labelled) = &self.labelled {
            let part = labelled.loss((&self.heads, &compared.outputs), compared.labels, compared.batch)?;
            losses.labels += take(part, 1.0 / totals.labels.max(1) as f64, 1.0 - weights.alpha)?;
        }
        if let Some(vectors) = &self.vectors {
            let (student, teacher) = match vectors.source {
                Source::Norm(at) => &compared.hidden[at],
                Source::Output(at) => &compared.outputs[at],
            };
            let part = angles(student, teacher, compared.batch, vectors.pooling)?;
            let share = 1.0 / (totals.texts.max(1) as f64 * vectors.spread);
            losses.vectors += take(part, share, weights.vectors)?;
        }
        Ok((sum, losses))
    }
}

/// 1 minus the cosine of both vectors of a text, a sum over texts.
fn angles(student: &Real, teacher: &Real, batch: &Batch, pooling: Pooling) -> Result<Real> {
    let texts = row_weights(batch, RowUnit::Text)?;
    let tokens = row_weights(batch, RowUnit::Token)?.reshape((batch.size(), batch.length, 1))?;
    let direction = |value: &Real| -> Result<Real> {
        let vectors = match pooling {
            // A sum has the direction of the mean.
            Pooling::Mean => only(value, &tokens)?.sum(1)?,
            Pooling::First => only(&value.narrow(1, 0, 1)?.squeeze(1)?, &texts)?,
            _ => only(value, &texts)?,
        };
        // Squares of what is large would be no numbers.
        let size = vectors.abs()?.max_keepdim(1)?.maximum(1e-20)?.detach();
        let vectors = vectors.broadcast_div(&size)?;
        let norm = (vectors.sqr()?.sum_keepdim(1)? + 1e-12)?.sqrt()?;
        Ok(vectors.broadcast_div(&norm)?)
    };
    let cosines = (direction(student)? * direction(teacher)?.detach())?.sum_keepdim(1)?;
    Ok(((1.0 - cosines)? * texts)?.sum_all()?)
}

/// A value with zeros in the rows of no weight, whatever stands there.
fn only(value: &Real, weights: &Real) -> Result<Real> {
    let counts = weights.ne(0f32)?.broadcast_as(value.shape())?.contiguous()?;
    Ok(counts.where_cond(&value.contiguous()?, &value.zeros_like()?)?)
}

/// 1 for rows that count, `[rows, 1]`.
fn row_weights(batch: &Batch, unit: RowUnit) -> Result<Real> {
    let weights: Vec<f32> = match unit {
        RowUnit::Token => batch.mask().to_f32().iter().copied().collect(),
        RowUnit::Text => batch.lengths.iter().map(|&l| if l > 0 { 1f32 } else { 0.0 }).collect(),
    };
    let rows = weights.len();
    Ok(Real::from_vec(weights, (rows, 1), device())?)
}

/// A value as rows, `[rows, width]`.
pub(super) fn rows(value: &Real, count: usize) -> Result<Real> {
    Ok(value.reshape((count, value.elem_count() / count.max(1)))?)
}

/// The squared error of probabilities `[batch, heads, n, n]`, a sum over real queries: keys that are padding are 0 in both models.
fn pair_squares(student: &Real, teacher: &Real, batch: &Batch) -> Result<Real> {
    let queries = row_weights(batch, RowUnit::Token)?.reshape((batch.size(), 1, batch.length, 1))?;
    let rows = (student - teacher)?.broadcast_mul(&queries)?.sqr()?.sum_keepdim(D::Minus1)?;
    Ok(bounded(&rows, FAR)?.sum_all()?)
}

/// `T^2 KL(softmax(t / T) || softmax(s / T))` of logits (Hinton et al. 2015), bounded.
struct Divergence {
    kind: HeadKind,
    temperature: f64,
}

impl Divergence {
    /// The sum over the rows that count.
    fn between(&self, student: &Real, teacher: &Real, batch: &Batch, counting: &Real) -> Result<Real> {
        let count = counting.dim(0)?;
        let logarithms = |logits: &Real| -> Result<Real> {
            let mut logits = (rows(logits, count)? / self.temperature)?;
            if self.kind == HeadKind::Positions {
                logits = over_text(&logits, batch)?;
            }
            log_softmax(&logits)
        };
        let (student, teacher) = (logarithms(student)?, logarithms(teacher)?.detach());
        let rows = ((teacher.exp()? * (&teacher - student)?)?.sum_keepdim(1)? * (self.temperature * self.temperature))?;
        Ok((bounded(&rows, FAR)? * counting)?.sum_all()?)
    }
}

/// Logits over the tokens of a text, `[batch, n]`, with none for padding.
pub(super) fn over_text(logits: &Real, batch: &Batch) -> Result<Real> {
    let mask = to_candle(&batch.mask())?;
    let beyond = ((&mask - 1.0)? * 1e4)?;
    Ok(((logits * mask)? + beyond)?)
}

pub(super) fn log_softmax(value: &Real) -> Result<Real> {
    // The largest element is a constant here: the gradient does not depend on it.
    let value = value.broadcast_sub(&value.max_keepdim(D::Minus1)?.detach())?;
    Ok(value.broadcast_sub(&value.exp()?.sum_keepdim(D::Minus1)?.log()?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{BatchShape, batches};

    fn batch(lengths: &[usize]) -> Batch {
        let all: Vec<Sequence> = lengths.iter().map(|&length| Sequence::with_length(length)).collect();
        batches(&all, 1000, 100, &BatchShape::default()).remove(0)
    }

    fn real(shape: &[usize], values: &[f32]) -> Real {
        Real::from_slice(values, shape, device()).unwrap()
    }

    fn loss(kind: HeadKind, student: &Real, teacher: &Real, weights: Weights) -> Losses {
        let batch = batch(&[2, 3]);
        let criterion = Criterion {
            heads: vec![Head { name: "out".to_owned(), kind, columns: *student.dims().last().unwrap(), variance: 2.0 }],
            variances: Vec::new(),
            vectors: None,
            weights,
            labelled: None,
        };
        let mut totals = Totals::default();
        totals.add(&batch);
        let outputs = vec![(student.clone(), teacher.clone())];
        let compared = Compared { batch: &batch, labels: &[], hidden: Vec::new(), attention: Vec::new(), outputs };
        let (sum, losses) = criterion.loss(&compared, &totals).unwrap();
        approx::assert_abs_diff_eq!(f64::from(sum.to_scalar::<f32>().unwrap()), losses.total(&weights), epsilon = 1e-5);
        losses
    }

    const PLAIN: Weights = Weights { alpha: 1.0, hidden: 1.0, attention: 0.0, vectors: 1.0, temperature: 1.0 };

    fn divergence_of(t: &[f64], s: &[f64]) -> f64 {
        let log_softmax = |v: &[f64]| {
            let sum = v.iter().map(|x| x.exp()).sum::<f64>().ln();
            v.iter().map(|x| x - sum).collect::<Vec<f64>>()
        };
        log_softmax(t).iter().zip(log_softmax(s)).map(|(t, s)| t.exp() * (t - s)).sum()
    }

    #[test]
    fn logits_are_compared_by_divergence() {
        let (t, s) = ([1f32, -1.0, 0.5, 2.0], [0f32, 0.5, 0.5, 2.0]);
        let (teacher, student) = (real(&[2, 2], &t), real(&[2, 2], &s));
        let found = loss(HeadKind::Classes, &student, &teacher, PLAIN).outputs;
        approx::assert_abs_diff_eq!(found, divergence_of(&[1.0, -1.0], &[0.0, 0.5]) / 2.0, epsilon = 1e-5);
        let warm = Weights { temperature: 4.0, ..PLAIN };
        let found = loss(HeadKind::Classes, &student, &teacher, warm).outputs;
        approx::assert_abs_diff_eq!(found, 16.0 * divergence_of(&[0.25, -0.25], &[0.0, 0.125]) / 2.0, epsilon = 1e-5);
        approx::assert_abs_diff_eq!(loss(HeadKind::Classes, &teacher, &teacher, warm).outputs, 0.0, epsilon = 1e-6);
    }

    #[test]
    fn padding_never_counts() {
        // The first sequence has two tokens of three.
        let of = |kind: HeadKind, shape: &[usize], padding: f32| {
            let columns = shape.get(2).copied().unwrap_or(1);
            let mut teacher: Vec<f32> = (0..6 * columns).map(|at| at as f32 / 4.0).collect();
            teacher[2 * columns..3 * columns].fill(padding);
            let student: Vec<f32> = (0..6 * columns).map(|at| (at * 5 % 7) as f32 / 4.0).collect();
            loss(kind, &real(shape, &student), &real(shape, &teacher), PLAIN).outputs
        };
        for (kind, shape) in [
            (HeadKind::TokenClasses, &[2, 3, 4][..]),
            (HeadKind::TokenValues, &[2, 3, 2]),
            (HeadKind::Positions, &[2, 3]),
        ] {
            assert!(of(kind, shape, 0.0) > 1e-3, "{kind:?}");
            approx::assert_abs_diff_eq!(of(kind, shape, 0.0), of(kind, shape, 50.0), epsilon = 1e-5);
        }
    }

    #[test]
    fn a_row_that_is_far_off_counts_by_its_logarithm() {
        let of = |kind: HeadKind, shape: &[usize], far: f32| {
            let zeros = real(shape, &vec![0.0; shape.iter().product()]);
            let mut student = vec![0f32; shape.iter().product()];
            student[0] = far;
            loss(kind, &real(shape, &student), &zeros, PLAIN).outputs
        };
        // Of one row in two, relative to a variance of 2: 4 (1 + ln(distance / 4)).
        let found = of(HeadKind::Values, &[2, 1], 1e10);
        approx::assert_relative_eq!(found, 2.0 * (1.0 + (1e20f64 / 8.0).ln()), max_relative = 1e-5);
        // Even odds against certainty: half of the logit, less ln 2.
        let found = of(HeadKind::Classes, &[2, 2], 1e6);
        approx::assert_relative_eq!(found, 2.0 * (1.0 + (5e5f64 / 4.0).ln()), max_relative = 1e-5);
        assert!(of(HeadKind::Values, &[2, 1], 1e30).is_finite());
    }

    /// The teacher's vectors are `[1, 0]` and `[0, 2]`; angles of the student's do not depend on what is padding.
    #[test]
    fn vectors_are_compared_by_their_angle() {
        let batch = batch(&[2, 3]);
        let teacher: [f32; 12] = [2., 0., 0., 0., 9., 9., 0., 1., 0., 2., 0., 3.];
        let student: [f32; 12] = [1., 1., 0., 0., f32::NAN, f32::INFINITY, 0., 5., 1., 1., -1., 1e30];
        let part = |pooling| {
            let [student, teacher] = [student, teacher].map(|values| real(&[2, 3, 2], &values));
            f64::from(angles(&student, &teacher, &batch, pooling).unwrap().to_scalar::<f32>().unwrap())
        };
        let apart = 1.0 - 0.5f64.sqrt();
        approx::assert_abs_diff_eq!(part(Pooling::Mean), apart, epsilon = 1e-5);
        approx::assert_abs_diff_eq!(part(Pooling::First), apart, epsilon = 1e-5);
        let texts = |values: [f32; 4]| real(&[2, 2], &values);
        let (student, teacher) = (texts([1.0, 1.0, -2.0, 0.0]), texts([3.0, 0.0, 4.0, 0.0]));
        let found = angles(&student, &teacher, &batch, Pooling::Output).unwrap();
        approx::assert_abs_diff_eq!(f64::from(found.to_scalar::<f32>().unwrap()), apart + 2.0, epsilon = 1e-5);
    }

    #[test]
    fn angles_of_vectors_are_relative_to_the_teachers_own() {
        let batch = batch(&[2, 3]);
        let mut criterion = Criterion::new(Weights { vectors: 3.0, ..PLAIN });
        criterion.heads = vec![Head { name: "out".to_owned(), kind: HeadKind::Values, columns: 2, variance: 1e9 }];
        criterion.vectors = Some(TextVectors { source: Source::Output(0), pooling: Pooling::Output, spread: 0.5 });
        let mut totals = Totals::default();
        totals.add(&batch);
        let outputs = vec![(real(&[2, 2], &[1.0, 0.0, 0.0, 0.0]), real(&[2, 2], &[0.0, 1.0, 1.0, 0.0]))];
        let compared = Compared { batch: &batch, labels: &[], hidden: Vec::new(), attention: Vec::new(), outputs };
        let (sum, losses) = criterion.loss(&compared, &totals).unwrap();
        // A right angle, and what has no direction: as far as two texts are whose cosine is 0.
        approx::assert_abs_diff_eq!(losses.vectors, 2.0, epsilon = 1e-5);
        approx::assert_abs_diff_eq!(f64::from(sum.to_scalar::<f32>().unwrap()), 6.0, epsilon = 1e-5);
    }
}

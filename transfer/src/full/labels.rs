//! Labels in the loss: what they are, which output they are for, and how far a student is from them.

use std::path::{Path, PathBuf};

use candle_core::Tensor as Real;

use super::criterion::{FAR, Head, log_softmax, over_text, rows};
use crate::data::{Batch, Label, Sequence};
use crate::gradient::{bounded, device, squared_distance};
use crate::heads::HeadKind;
use crate::{Error, Result, Setting, evaluate};

/// The labels of sequences that a student is trained on.
#[derive(Clone, Debug)]
pub struct Labels {
    file: PathBuf,
    kind: Kind,
}

/// What labels are.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// One class or value a text.
    Numbers,
    /// Any number of classes a text; the length of all lists, where these are all of zeros and ones.
    Sets { marks: Option<usize> },
    /// A tag a word.
    Tags,
    /// Where the answer to a question stands.
    Spans,
}

impl Labels {
    /// Of some sequences of `file`; those without a label are passed over.
    ///
    /// # Errors
    /// None has a label, labels are of several kinds, or one is no number.
    pub fn new<'s>(file: &Path, sequences: impl Iterator<Item = &'s Sequence>) -> Result<Self> {
        let labelled: Vec<&Sequence> = sequences.filter(|sequence| sequence.label.is_some()).collect();
        let labels = || labelled.iter().filter_map(|sequence| sequence.label.as_ref());
        let kind = match labels().find(|label| !matches!(label, Label::One(_))).or_else(|| labels().next()) {
            Some(Label::Several(_) | Label::Marks(_)) => Kind::Sets { marks: evaluate::marks_width(labels()) },
            Some(Label::TokenTags(_)) => Kind::Tags,
            Some(Label::Span(..)) => Kind::Spans,
            Some(_) => Kind::Numbers,
            None => {
                let reason = "none of its texts has a label that could be trained on";
                return Err(Error::data(file, reason).helped_by(&[Setting::LabelColumn]));
            }
        };
        for sequence in &labelled {
            let fits = match (kind, &sequence.label) {
                (Kind::Numbers, _) => evaluate::number(file, sequence).map(|_| true)?,
                (Kind::Sets { .. }, Some(Label::One(_) | Label::Several(_) | Label::Marks(_)))
                | (Kind::Tags, Some(Label::TokenTags(_)))
                | (Kind::Spans, Some(Label::Span(..))) => true,
                _ => false,
            };
            if !fits {
                let noun = sequence.label.as_ref().map_or("nothing", Label::noun);
                let reason = format!("its label is {noun}, other texts have {}", kind.noun());
                return Err(Error::line(file, sequence.line, reason));
            }
        }
        Ok(Self { file: file.to_owned(), kind })
    }
}

impl Kind {
    fn noun(self) -> &'static str {
        match self {
            Self::Numbers => "one class or value",
            Self::Sets { .. } => "several classes",
            Self::Tags => "a tag a word",
            Self::Spans => "answers",
        }
    }

    /// The output that such labels are for.
    fn outputs(self) -> &'static str {
        match self {
            Self::Numbers => "of classes or one value a text",
            Self::Sets { .. } => "of classes a text",
            Self::Tags => "of classes a token",
            Self::Spans => "where an answer starts, and another where it ends",
        }
    }
}

/// A label as the loss reads it.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Target {
    Class(usize),
    Value(f64),
    /// Of each class, whether it is the text's.
    Set(Vec<bool>),
    /// Places of tokens, and their classes.
    Tags(Vec<(usize, usize)>),
    /// The places of the first and the last token of an answer.
    Span([usize; 2]),
}

impl Target {
    /// What a mean over labels counts: texts, or tokens.
    pub(super) fn count(&self) -> usize {
        match self {
            Self::Tags(tags) => tags.len(),
            _ => 1,
        }
    }
}

/// The output that labels are for, by its place among the [`Head`]s, and how they are read.
#[derive(Clone, Debug)]
pub(super) struct Labelled {
    file: PathBuf,
    purpose: Purpose,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Purpose {
    Class(usize),
    Value(usize),
    Set {
        at: usize,
        are_marks: bool,
    },
    Tags(usize),
    /// Starts and ends.
    Spans([usize; 2]),
    /// Both as two columns of one output.
    JoinedSpans(usize),
}

impl Labelled {
    /// Finds the output that labels are for.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn new(labels: &Labels, heads: &[Head]) -> Result<Self> {
        let Labels { file, kind } = labels;
        let at = |wanted: HeadKind| heads.iter().position(|head| head.kind == wanted);
        let purpose = match *kind {
            Kind::Numbers => heads.iter().enumerate().find_map(|(at, head)| match (head.kind, head.columns) {
                (HeadKind::Classes, _) => Some(Purpose::Class(at)),
                (HeadKind::Values, 1) => Some(Purpose::Value(at)),
                _ => None,
            }),
            Kind::Sets { marks } => {
                at(HeadKind::Classes).map(|at| Purpose::Set { at, are_marks: marks == Some(heads[at].columns) })
            }
            Kind::Tags => at(HeadKind::TokenClasses).map(Purpose::Tags),
            Kind::Spans => spans(heads),
        };
        let missing = || {
            let reason =
                format!("the labels are {}, but no output is {}: labels cannot be used", kind.noun(), kind.outputs());
            Error::setting(reason, &[Setting::NoLabels])
        };
        Ok(Self { file: file.clone(), purpose: purpose.ok_or_else(missing)? })
    }

    /// The output whose classes are told each by itself, if labels say that there is one.
    pub(super) fn sets(&self) -> Option<usize> {
        match self.purpose {
            Purpose::Set { at, .. } => Some(at),
            _ => None,
        }
    }

    /// The label of a sequence, where it has one.
    ///
    /// # Errors
    /// The output does not know it.
    pub(super) fn target(&self, heads: &[Head], sequence: &Sequence) -> Result<Option<Target>> {
        let Some(label) = &sequence.label else { return Ok(None) };
        let fault = |reason: String| Error::line(&self.file, sequence.line, reason);
        let class = |text: &str, head: &Head| {
            let class = text.parse::<f64>().ok();
            let class = class.filter(|class| *class >= 0.0 && class.fract() == 0.0 && *class < head.columns as f64);
            class.map(|class| class as usize).ok_or_else(|| {
                let Head { name, columns, .. } = head;
                fault(format!("label {text} is none of the {columns} classes of output `{name}`, which start at 0"))
            })
        };
        Ok(Some(match (self.purpose, label) {
            (Purpose::Class(at), Label::One(text)) => Target::Class(class(text, &heads[at])?),
            (Purpose::Value(_), Label::One(_)) => Target::Value(evaluate::number(&self.file, sequence)?),
            (Purpose::Set { at, are_marks }, label) => {
                Target::Set(evaluate::set_of_classes(label, heads[at].columns, are_marks).map_err(fault)?)
            }
            (Purpose::Tags(at), Label::TokenTags(tags)) => {
                let tag = |(place, tag): &(usize, String)| Ok((*place, class(tag, &heads[at])?));
                Target::Tags(tags.iter().map(tag).collect::<Result<_>>()?)
            }
            (_, Label::Span(start, end)) => Target::Span([*start, *end]),
            (_, other) => return Err(fault(format!("its label is {}, as no other text's is", other.noun()))),
        }))
    }

    /// How far a student's outputs are from the labels of the rows that have one, a sum: cross entropy, of starts and ends
    /// its mean; of several classes the mean of theirs; of values the squared error.
    pub(super) fn loss(
        &self,
        (heads, outputs): (&[Head], &[(Real, Real)]),
        targets: &[Option<Target>],
        batch: &Batch,
    ) -> Result<Real> {
        let output = |at: usize| &outputs[at].0;
        let labelled = || targets.iter().enumerate().filter_map(|(row, target)| Some((row, target.as_ref()?)));
        match self.purpose {
            Purpose::Class(at) => {
                let classes = labelled().filter_map(|(row, target)| match target {
                    Target::Class(class) => Some((row, *class)),
                    _ => None,
                });
                cross_entropy(&rows(output(at), batch.size())?, classes)
            }
            Purpose::Tags(at) => {
                let tags = labelled().flat_map(|(row, target)| {
                    let tags = if let Target::Tags(tags) = target { tags.as_slice() } else { &[] };
                    tags.iter().map(move |(place, class)| (row * batch.length + place, *class))
                });
                cross_entropy(&rows(output(at), batch.size() * batch.length)?, tags)
            }
            Purpose::Value(at) => values(output(at), &heads[at], targets, batch),
            Purpose::Set { at, .. } => sets(output(at), targets, batch),
            Purpose::Spans([start, end]) => span_entropy([output(start).clone(), output(end).clone()], targets, batch),
            Purpose::JoinedSpans(at) => {
                let column = |column: usize| output(at).narrow(2, column, 1)?.squeeze(2);
                span_entropy([column(0)?, column(1)?], targets, batch)
            }
        }
    }
}

/// The outputs of starts and ends: told by their names or, of two, their order; or one of two columns.
fn spans(heads: &[Head]) -> Option<Purpose> {
    let positions = || heads.iter().enumerate().filter(|(_, head)| head.kind == HeadKind::Positions);
    let named = |part: &str| positions().find(|(_, head)| head.name.to_lowercase().contains(part)).map(|(at, _)| at);
    let all: Vec<usize> = positions().map(|(at, _)| at).collect();
    match (named("start"), named("end"), all.as_slice()) {
        (Some(start), Some(end), _) if start != end => Some(Purpose::Spans([start, end])),
        (_, _, [start, end]) => Some(Purpose::Spans([*start, *end])),
        _ => {
            let is_joined = |head: &Head| head.kind == HeadKind::TokenClasses && head.columns == 2;
            heads.iter().position(is_joined).map(Purpose::JoinedSpans)
        }
    }
}

/// The sum over rows and their classes; of rows `[rows, classes]`.
fn cross_entropy(logits: &Real, classes: impl Iterator<Item = (usize, usize)>) -> Result<Real> {
    let (count, columns) = logits.dims2()?;
    let mut wanted = vec![0f32; count * columns];
    classes.for_each(|(row, class)| wanted[row * columns + class] = -1.0);
    let wanted = Real::from_vec(wanted, (count, columns), device())?;
    Ok(bounded(&(log_softmax(logits)? * wanted)?.sum_keepdim(1)?, FAR)?.sum_all()?)
}

/// The mean of both cross entropies, of logits over the tokens of a text.
fn span_entropy(logits: [Real; 2], targets: &[Option<Target>], batch: &Batch) -> Result<Real> {
    let mut sum = Real::zeros((), candle_core::DType::F32, device())?;
    for (at, logits) in logits.into_iter().enumerate() {
        let places = targets.iter().enumerate().filter_map(|(row, target)| match target {
            Some(Target::Span(places)) => Some((row, places[at])),
            _ => None,
        });
        let logits = over_text(&rows(&logits, batch.size())?, batch)?;
        sum = (sum + (cross_entropy(&logits, places)? * 0.5)?)?;
    }
    Ok(sum)
}

/// `ln(1 + exp(x))`.
fn softplus(x: &Real) -> candle_core::Result<Real> {
    x.relu()? + (x.abs()?.neg()?.exp()? + 1.0)?.log()?
}

/// `T^2 KL(sigmoid(t / T) || sigmoid(s / T))` of each class by itself, `p (t - s) + ln(1 + exp(s)) - ln(1 + exp(t))` with the
/// teacher's `p`; a mean over classes and a sum over the rows `[rows, 1]` that count.
pub(super) fn set_divergence(student: &Real, teacher: &Real, temperature: f64, counting: &Real) -> Result<Real> {
    let count = counting.dim(0)?;
    let logits = |value: &Real| -> Result<Real> { Ok((rows(value, count)? / temperature)?) };
    let (student, teacher) = (logits(student)?, logits(teacher)?.detach());
    let likely = ((&teacher - softplus(&teacher)?)?).exp()?;
    let each = (((likely * (&teacher - &student)?)? + softplus(&student)?)? - softplus(&teacher)?)?;
    let each = (each.mean_keepdim(1)? * (temperature * temperature))?;
    Ok((bounded(&each, FAR)? * counting)?.sum_all()?)
}

/// The mean over classes of the cross entropy of each class's sigmoid, `ln(1 + exp(x)) - x y`.
fn sets(logits: &Real, targets: &[Option<Target>], batch: &Batch) -> Result<Real> {
    let logits = rows(logits, batch.size())?;
    let columns = logits.dim(1)?;
    let (mut wanted, mut counting) = (vec![0f32; batch.size() * columns], vec![0f32; batch.size()]);
    for (row, target) in targets.iter().enumerate() {
        let Some(Target::Set(set)) = target else { continue };
        counting[row] = 1.0;
        set.iter().enumerate().for_each(|(class, is_there)| wanted[row * columns + class] = f32::from(*is_there));
    }
    let wanted = Real::from_vec(wanted, (batch.size(), columns), device())?;
    let counting = Real::from_vec(counting, (batch.size(), 1), device())?;
    let each = (softplus(&logits)? - (&logits * wanted)?)?;
    Ok((bounded(&each.mean_keepdim(1)?, FAR)? * counting)?.sum_all()?)
}

/// The squared error relative to the teacher's variance.
fn values(output: &Real, head: &Head, targets: &[Option<Target>], batch: &Batch) -> Result<Real> {
    let value = |row: usize| match targets.get(row) {
        Some(Some(Target::Value(value))) => Some(*value as f32),
        _ => None,
    };
    let column = |values: Vec<f32>| Real::from_vec(values, (batch.size(), 1), device());
    let wanted = column((0..batch.size()).map(|row| value(row).unwrap_or_default()).collect())?;
    let counting = column((0..batch.size()).map(|row| f32::from(value(row).is_some())).collect())?;
    let output = rows(output, batch.size())?;
    Ok((squared_distance(&output, &wanted, &counting, FAR * head.variance)? / head.variance)?)
}

#[cfg(test)]
mod tests {
    use candle_core::Var;

    use super::*;
    use crate::data::{BatchShape, batches};

    fn head(name: &str, kind: HeadKind, columns: usize) -> Head {
        Head { name: name.to_owned(), kind, columns, variance: 2.0 }
    }

    fn text(length: usize, label: impl Into<Option<Label>>) -> Sequence {
        Sequence { label: label.into(), line: length, ..Sequence::with_length(length) }
    }

    fn one(label: &str) -> Label {
        Label::One(label.to_owned())
    }

    fn several(classes: &[&str]) -> Label {
        Label::Several(classes.iter().map(|class| (*class).to_owned()).collect())
    }

    fn tags(tags: &[(usize, &str)]) -> Label {
        Label::TokenTags(tags.iter().map(|(place, tag)| (*place, (*tag).to_owned())).collect())
    }

    fn labelled(heads: &[Head], texts: &[Sequence]) -> Result<(Labelled, Vec<Option<Target>>)> {
        let labelled = Labelled::new(&Labels::new(Path::new("a.tsv"), texts.iter())?, heads)?;
        let targets = texts.iter().map(|text| labelled.target(heads, text)).collect::<Result<_>>()?;
        Ok((labelled, targets))
    }

    /// The loss of texts of two and three tokens, and its gradient with respect to each output.
    fn loss(heads: &[Head], texts: &[Sequence], outputs: &[(&[usize], &[f32])]) -> (f64, Vec<Vec<f32>>) {
        let (labelled, targets) = labelled(heads, texts).unwrap();
        let batch = batches(texts, 1000, 100, &BatchShape::default()).remove(0);
        let targets: Vec<Option<Target>> = batch.rows.iter().map(|row| targets[*row].clone()).collect();
        assert_eq!(batch.rows, [0, 1]);
        let variables: Vec<Var> =
            outputs.iter().map(|(shape, values)| Var::from_slice(values, *shape, device()).unwrap()).collect();
        let outputs: Vec<(Real, Real)> =
            variables.iter().map(|v| (v.as_tensor().clone(), v.as_tensor().zeros_like().unwrap())).collect();
        let loss = labelled.loss((heads, &outputs), &targets, &batch).unwrap();
        let gradients = loss.backward().unwrap();
        let gradient = |variable: &Var| match gradients.get(variable) {
            Some(gradient) => gradient.flatten_all().unwrap().to_vec1().unwrap(),
            None => Vec::new(),
        };
        (f64::from(loss.to_scalar::<f32>().unwrap()), variables.iter().map(gradient).collect())
    }

    /// The cross entropy of one row.
    fn entropy(logits: &[f64], class: usize) -> f64 {
        logits.iter().map(|x| x.exp()).sum::<f64>().ln() - logits[class]
    }

    #[test]
    fn classes_and_values_are_those_of_texts_that_have_one() {
        let heads = [head("out", HeadKind::Classes, 2)];
        let (found, gradient) = loss(&heads, &[text(2, one("1")), text(3, None)], &[(&[2, 2], &[0.0, 0.5, 9.0, -9.0])]);
        approx::assert_abs_diff_eq!(found, entropy(&[0.0, 0.5], 1), epsilon = 1e-5);
        assert!(gradient[0][..2] != [0.0, 0.0] && gradient[0][2..] == [0.0, 0.0]);
        let heads = [head("out", HeadKind::Values, 1)];
        let (found, _) = loss(&heads, &[text(2, None), text(3, one("1.5"))], &[(&[2, 1], &[1.0, 2.5])]);
        approx::assert_abs_diff_eq!(found, 1.0 / 2.0, epsilon = 1e-5);
    }

    #[test]
    fn tags_are_those_of_tokens_that_have_one() {
        let heads = [head("other", HeadKind::Classes, 2), head("tags", HeadKind::TokenClasses, 2)];
        let texts = [text(2, tags(&[(1, "1")])), text(3, tags(&[(0, "0"), (2, "1")]))];
        // The third token of the first text is padding.
        let values: Vec<f32> = (0..12).map(|at| at as f32 * at as f32 / 40.0).collect();
        let (found, gradient) = loss(&heads, &texts, &[(&[2, 2], &[0.0; 4]), (&[2, 3, 2], &values)]);
        let row = |at: usize| [f64::from(values[2 * at]), f64::from(values[2 * at + 1])];
        let expected = entropy(&row(1), 1) + entropy(&row(3), 0) + entropy(&row(5), 1);
        approx::assert_abs_diff_eq!(found, expected, epsilon = 1e-5);
        let moves: Vec<bool> = gradient[1].chunks(2).map(|row| row != [0.0, 0.0]).collect();
        assert_eq!(moves, [false, true, false, true, false, true]);
        let targets = labelled(&heads, &texts).unwrap().1;
        assert_eq!(targets.iter().flatten().map(Target::count).collect::<Vec<_>>(), [1, 2]);
    }

    /// Starts and ends, in whichever order the outputs stand, or as two columns of one output.
    #[test]
    fn answers_are_where_they_start_and_end() {
        let (starts, ends): (Vec<f32>, Vec<f32>) =
            ((0..6).map(|at| at as f32 / 3.0).collect(), (0..6).map(|at| (at * 5 % 7) as f32 / 4.0).collect());
        let texts = [text(2, Label::Span(0, 1)), text(3, Label::Span(1, 2))];
        // Padding has no part in it.
        let logits = |values: &[f32], range: std::ops::Range<usize>| {
            values[range].iter().copied().map(f64::from).collect::<Vec<_>>()
        };
        let expected = 0.5
            * (entropy(&logits(&starts, 0..2), 0)
                + entropy(&logits(&starts, 3..6), 1)
                + entropy(&logits(&ends, 0..2), 1)
                + entropy(&logits(&ends, 3..6), 2));
        let rows = |name: &str| head(name, HeadKind::Positions, 3);
        let both = [(&[2, 3][..], starts.as_slice()), (&[2, 3], ends.as_slice())];
        let turned = [both[1], both[0]];
        let joined: Vec<f32> = starts.iter().zip(&ends).flat_map(|(s, e)| [*s, *e]).collect();
        for (heads, outputs) in [
            (vec![rows("start_logits"), rows("end_logits")], &both[..]),
            (vec![rows("end_logits"), rows("start_logits")], &turned),
            (vec![rows("a"), rows("b")], &both),
            (vec![head("logits", HeadKind::TokenClasses, 2)], &[(&[2, 3, 2], joined.as_slice())]),
        ] {
            let (found, gradient) = loss(&heads, &texts, outputs);
            approx::assert_abs_diff_eq!(found, expected, epsilon = 1e-5);
            assert!(gradient.iter().flatten().all(|v| v.is_finite()) && gradient.iter().all(|g| !g.is_empty()));
        }
    }

    #[test]
    fn several_classes_are_each_there_or_not() {
        let heads = [head("out", HeadKind::Classes, 3)];
        let values = [0.5, -1.0, 2.0, 0.0, 3.0, -2.0];
        let term = |x: f64, is_there: bool| (1.0 + (if is_there { -x } else { x }).exp()).ln();
        let first = (term(0.5, true) + term(-1.0, false) + term(2.0, true)) / 3.0;
        let second = (term(0.0, false) + term(3.0, true) + term(-2.0, false)) / 3.0;
        for labels in [
            [several(&["0", "2"]), several(&["1"])],
            [several(&["1", "0", "1"]), several(&["0", "1", "0"])],
            [Label::Marks(vec![true, false, true]), Label::Marks(vec![false, true, false])],
            [several(&["0", "2"]), one("1")],
        ] {
            let [a, b] = labels;
            let (found, _) = loss(&heads, &[text(2, a.clone()), text(3, b)], &[(&[2, 3], &values)]);
            approx::assert_abs_diff_eq!(found, first + second, epsilon = 1e-5);
            let (alone, gradient) = loss(&heads, &[text(2, a), text(3, None)], &[(&[2, 3], &values)]);
            approx::assert_abs_diff_eq!(alone, first, epsilon = 1e-5);
            assert_eq!(gradient[0][3..], [0.0; 3]);
        }
    }

    /// A softmax would not see what is added to all logits of a text.
    #[test]
    fn several_classes_of_the_teacher_are_each_compared() {
        let heads = [head("out", HeadKind::Classes, 3)];
        let sets = |labels: [Label; 2]| {
            let [a, b] = labels;
            labelled(&heads, &[text(2, a), text(3, b)]).unwrap().0.sets()
        };
        assert_eq!(sets([several(&["0", "2"]), several(&["1"])]), Some(0));
        assert_eq!(sets([one("0"), one("1")]), None);
        let (t, s) = ([0.5, -1.0, 2.0, 0.0, 3.0, -2.0], [1.5, 0.0, 3.0, 0.0, 3.0, -2.0]);
        let real = |values: &[f32]| Real::from_slice(values, (2, 3), device()).unwrap();
        let counting = Real::from_slice(&[1f32, 1.0], (2, 1), device()).unwrap();
        let temperature = 2.0;
        let divergence = |t: f64, s: f64| {
            let [p, q] = [t, s].map(|logit| 1.0 / (1.0 + (-logit / temperature).exp()));
            p * (p / q).ln() + (1.0 - p) * ((1.0 - p) / (1.0 - q)).ln()
        };
        let each = t.iter().zip(&s).map(|(t, s)| divergence(f64::from(*t), f64::from(*s)));
        let expected = temperature * temperature * each.sum::<f64>() / 3.0;
        let found = set_divergence(&real(&s), &real(&t), temperature, &counting).unwrap();
        approx::assert_abs_diff_eq!(f64::from(found.to_scalar::<f32>().unwrap()), expected, epsilon = 1e-5);
        assert!(expected > 0.1);
    }

    #[test]
    fn what_is_far_off_has_a_finite_gradient() {
        let far = [1e30, -1e30, 0.0, -1e30, 1e30, 0.0];
        for (kind, labels) in
            [(HeadKind::Classes, [one("1"), one("0")]), (HeadKind::Classes, [several(&["1"]), several(&["0"])])]
        {
            let [a, b] = labels;
            let (found, gradient) = loss(&[head("out", kind, 3)], &[text(2, a), text(3, b)], &[(&[2, 3], &far)]);
            assert!(found.is_finite() && gradient[0].iter().all(|v| v.is_finite()), "{found} {gradient:?}");
        }
    }

    #[test]
    fn labels_that_the_output_does_not_know_are_refused_with_their_line() {
        let refused = |heads: &[Head], labels: [Label; 2], parts: &[&str]| {
            let [a, b] = labels;
            let reason = labelled(heads, &[text(2, a), text(3, b)]).unwrap_err().to_string();
            assert!(parts.iter().all(|part| reason.contains(part)), "{reason}");
        };
        let classes = [head("out", HeadKind::Classes, 2)];
        let tokens = [head("out", HeadKind::TokenClasses, 4)];
        refused(&classes, [one("1"), one("2")], &["a.tsv", "line 3", "label 2", "2 classes of output `out`"]);
        refused(&classes, [one("-1"), one("1")], &["a.tsv", "line 2", "label -1"]);
        refused(&classes, [one("0.5"), one("1")], &["line 2", "label 0.5"]);
        refused(&classes, [one("1"), one("good")], &["a.tsv", "line 3", "`good` is not a number"]);
        refused(&classes, [several(&["0"]), several(&["2"])], &["a.tsv", "line 3", "label 2", "2 classes"]);
        refused(&tokens, [tags(&[(0, "3")]), tags(&[(0, "4")])], &["a.tsv", "line 3", "label 4", "4 classes"]);
        // Of another kind than the others.
        refused(&tokens, [tags(&[(0, "3")]), one("1")], &["line 3", "one class or value", "a tag a word"]);
        refused(&classes, [one("1"), several(&["0", "1", "2"])], &["line 3", "label 2", "2 classes"]);
        // Of another kind than the model's outputs.
        refused(&classes, [tags(&[(0, "1")]), tags(&[(0, "1")])], &["a tag a word", "no output is of classes a token"]);
        refused(&tokens, [one("1"), one("1")], &["no output is of classes or one value a text"]);
        refused(&tokens, [Label::Span(1, 1), Label::Span(0, 0)], &["answers", "where an answer starts"]);
        let none = Labels::new(Path::new("a.tsv"), [text(2, None)].iter()).unwrap_err().to_string();
        assert!(none.contains("a.tsv") && none.contains("none of its texts has a label"), "{none}");
    }
}

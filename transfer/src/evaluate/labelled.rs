//! Labelled examples of any task: what the labels are tells which.

use std::path::{Path, PathBuf};

use ndarray::Array2;

use super::outputs::{Outputs, TaskRun};
use super::several::{self, ClassSets};
use super::spans::{self, Questions, Replies};
use super::sts;
use super::tokens::{self, TaggedWords, Tags};
use super::{Metric, chance_note, check_labels, label_notes, labels, predictions_with_overflow};
use crate::data::{
    Columns, DataFile, Example, Label, Reader, Sequence, Skipped, TextEncoder, Unknown, check_ids, no_examples,
    sameness_note,
};
use crate::{Error, Result, Setting};

/// Labelled examples, ready for models.
#[derive(Clone, Debug)]
pub struct Labelled {
    file: PathBuf,
    sequences: Vec<Sequence>,
    truth: Truth,
    /// What makes it doubtful that they mean anything, or is not expected of them.
    notes: Vec<String>,
}

/// What the labels are.
#[derive(Clone, Debug)]
enum Truth {
    /// A class or a value a text.
    Numbers(Vec<f64>),
    /// A value a pair of texts, each of which is a sequence of its own.
    Pairs(Vec<f64>),
    /// Several classes a text.
    Several(ClassSets),
    /// A tag a word.
    Tags(TaggedWords),
    /// Answers to questions.
    Answers(Questions),
}

/// What a model answers to labelled examples.
#[derive(Clone, Debug)]
pub struct Answered {
    /// The metric that is asked for, or that fits the model's outputs.
    pub metric: Metric,
    /// Examples to which an output is not finite: they count as wrong.
    pub unusable: usize,
    /// Sequences on which any value that the engine gives is not finite, inner ones too.
    pub overflow: usize,
    /// What makes the answers doubtful.
    pub notes: Vec<String>,
    answers: Answers,
}

#[derive(Clone, Debug)]
enum Answers {
    Numbers { values: Vec<f64>, columns: usize },
    Several(Array2<bool>),
    Tags(Tags),
    Replies(Replies),
}

impl Labelled {
    /// Reads all of a file, whose columns name the label's unless it is of a task that has a usual one; of models whose table
    /// of words has so many `rows`.
    ///
    /// # Errors
    /// The file, an example or a label cannot be used.
    pub fn read(file: DataFile, encoder: &TextEncoder, rows: Option<usize>) -> Result<Self> {
        let file = with_label(file)?;
        let path = file.path().to_owned();
        let mut reader = Reader::new(&file)?;
        let mut examples = reader.by_ref().peekable();
        let first = match examples.peek() {
            Some(Ok(example)) => example.label.clone(),
            _ => None,
        };
        let mut sequences = Vec::new();
        let encode = |example: Example| encoder.encode(&path, example);
        let truth = match first {
            Some(Label::Tags(_)) => {
                let mut tags = TaggedWords::new(&file, encoder);
                examples.try_for_each(|e| tags.add(&path, e?, encoder).map(|s| sequences.push(s)))?;
                tags.check(&path)?;
                Truth::Tags(tags)
            }
            Some(Label::Answers(_)) => {
                let mut questions = Questions::new(&path);
                examples.try_for_each(|e| questions.add(e?, encoder).map(|s| sequences.extend(s)))?;
                Truth::Answers(questions)
            }
            Some(Label::Several(_) | Label::Marks(_)) => {
                let mut sets = ClassSets::new(&path);
                for example in examples {
                    let sequence = encode(example?)?;
                    sets.add(sequence.label.clone(), sequence.line)?;
                    sequences.push(sequence);
                }
                Truth::Several(sets)
            }
            _ => {
                sequences = examples.map(|e| encode(e?)).collect::<Result<_>>()?;
                Truth::Numbers(labels(&path, &sequences)?)
            }
        };
        Self::checked(&file, reader.skipped(), (sequences, truth), encoder, rows)
    }

    /// Reads pairs of texts with a score each, of which models read each text alone, for [`Metric::Sts`].
    ///
    /// # Errors
    /// As those of [`read`](Self::read); or a row is no pair of texts, or its label no number.
    pub fn read_pairs(file: DataFile, encoder: &TextEncoder, rows: Option<usize>) -> Result<Self> {
        let file = with_label(file)?;
        let mut reader = Reader::new(&file)?;
        let sequences = sts::read(file.path(), reader.by_ref(), encoder)?;
        let scores = labels(file.path(), &sequences)?.into_iter().step_by(2).collect();
        Self::checked(&file, reader.skipped(), (sequences, Truth::Pairs(scores)), encoder, rows)
    }

    /// Refuses what models cannot read, and notes what makes examples doubtful.
    fn checked(
        file: &DataFile,
        skipped: Skipped,
        (sequences, truth): (Vec<Sequence>, Truth),
        encoder: &TextEncoder,
        rows: Option<usize>,
    ) -> Result<Self> {
        let path = file.path().to_owned();
        if sequences.is_empty() {
            return Err(no_examples(file, skipped));
        }
        rows.map_or(Ok(()), |rows| check_ids(&path, rows, &sequences))?;
        let mut notes = file.notes();
        notes.extend(skipped.note(&path));
        notes.extend(sameness_note(&path, &sequences));
        notes.extend(Unknown::count(&sequences, encoder)?.note(&path));
        notes.extend(truth.notes().into_iter().map(|note| format!("{}: {note}", path.display())));
        Ok(Self { file: path, sequences, truth, notes })
    }

    /// The file.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// What models read.
    pub fn sequences(&self) -> &[Sequence] {
        &self.sequences
    }

    /// How many examples there are: texts, sentences or questions.
    pub fn examples(&self) -> usize {
        match &self.truth {
            Truth::Answers(questions) => questions.count(),
            Truth::Pairs(scores) => scores.len(),
            _ => self.sequences.len(),
        }
    }

    /// What a user should know of them.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// What a model answers. Without a metric the one is taken that fits labels and outputs best.
    ///
    /// # Errors
    /// The engine fails, or labels, outputs and metric do not fit each other.
    pub fn answers(&self, run: &TaskRun<'_>, metric: Option<Metric>) -> Result<Answered> {
        if let Some(metric) = metric {
            self.truth.check_metric(metric)?;
        }
        if let Truth::Pairs(scores) = &self.truth {
            return self.cosines(run, scores);
        }
        let outputs = run.outputs(&self.sequences)?;
        let (answers, unusable) = match &self.truth {
            Truth::Numbers(labels) | Truth::Pairs(labels) => return self.numbers(&outputs, labels, metric),
            Truth::Tags(words) => {
                let (tags, unusable) = words.answers(&outputs)?;
                (Answers::Tags(tags), unusable)
            }
            Truth::Answers(questions) => {
                let (replies, unusable) = questions.answers(&outputs)?;
                (Answers::Replies(replies), unusable)
            }
            Truth::Several(sets) => {
                let (answers, unusable) = sets.answers(&outputs.logits()?)?;
                (Answers::Several(answers), unusable)
            }
        };
        let metric = metric.unwrap_or(self.truth.metrics()[0]);
        Ok(Answered { metric, unusable, overflow: outputs.overflow, notes: Vec::new(), answers })
    }

    /// Of one class or value a text.
    fn numbers(&self, outputs: &Outputs, labels: &[f64], metric: Option<Metric>) -> Result<Answered> {
        let logits = outputs.logits()?;
        let columns = logits.ncols();
        let metric = metric.unwrap_or(if columns > 1 { Metric::Accuracy } else { Metric::Spearman });
        check_labels(metric, columns, &self.file, &self.sequences, labels)?;
        let mut notes = label_notes(metric, columns, &self.file, labels);
        let (values, unusable) = predictions_with_overflow(metric, &logits)?;
        if unusable == 0 {
            notes.extend(chance_note(metric, &values, labels));
        }
        let answers = Answers::Numbers { values, columns };
        Ok(Answered { metric, unusable, overflow: outputs.overflow, notes, answers })
    }

    /// Of pairs.
    fn cosines(&self, run: &TaskRun<'_>, scores: &[f64]) -> Result<Answered> {
        let metric = Metric::Sts;
        let values = sts::cosines(run, &self.sequences)?;
        let unusable = values.iter().filter(|value| value.is_nan()).count();
        let mut notes = label_notes(metric, 1, &self.file, scores);
        if unusable == 0 {
            notes.extend(chance_note(metric, &values, scores));
        }
        let answers = Answers::Numbers { values, columns: 1 };
        Ok(Answered { metric, unusable, overflow: unusable, notes, answers })
    }

    /// The metrics that are told of a model's answers: its own, then the task's others.
    pub fn metrics(&self, answered: &Answered) -> Vec<Metric> {
        let all = match (&self.truth, &answered.answers) {
            (Truth::Numbers(_), Answers::Numbers { columns, .. }) => number_metrics(*columns),
            (Truth::Tags(words), _) => words.metrics(),
            _ => self.truth.metrics(),
        };
        let others = all.iter().copied().filter(|metric| *metric != answered.metric);
        std::iter::once(answered.metric).chain(others).collect()
    }

    /// A metric of a model's answers.
    ///
    /// # Errors
    /// The classes have no names, which the metric needs; or the answers are to other labels.
    pub fn score(&self, metric: Metric, answered: &Answered) -> Result<f64> {
        match (&self.truth, &answered.answers) {
            (Truth::Numbers(labels) | Truth::Pairs(labels), Answers::Numbers { values, .. }) => {
                Ok(metric.score(values, labels))
            }
            (Truth::Several(sets), Answers::Several(answers)) => sets.score(metric, answers),
            (Truth::Tags(words), Answers::Tags(tags)) => words.score(metric, tags),
            (Truth::Answers(questions), Answers::Replies(replies)) => Ok(questions.score(metric, replies)),
            _ => Err(Error::Compare("the answers are to labels of another kind".to_owned())),
        }
    }
}

/// The label's column, or the one that a task usually has.
///
/// # Errors
/// None is named, and the file is of no task that has a usual one.
pub(crate) fn with_label(file: DataFile) -> Result<DataFile> {
    if file.columns().label.is_some() {
        return Ok(file);
    }
    let Some(label) = file.usual_label()? else {
        let reason = "which column holds the label?";
        return Err(Error::data(file.path(), reason).helped_by(&[Setting::LabelColumn]));
    };
    let columns = Columns { label: Some(label.to_owned()), ..file.columns().clone() };
    Ok(file.with_columns(columns))
}

fn number_metrics(columns: usize) -> &'static [Metric] {
    match columns {
        0 | 1 => &[Metric::Spearman, Metric::Pearson],
        2 => &[Metric::Accuracy, Metric::F1, Metric::MacroF1, Metric::Mcc],
        _ => &[Metric::Accuracy, Metric::MacroF1, Metric::MicroF1, Metric::Mcc],
    }
}

impl Truth {
    /// The metrics of labels of this kind, the usual one first.
    fn metrics(&self) -> &'static [Metric] {
        match self {
            Self::Numbers(_) => &[
                Metric::Accuracy,
                Metric::F1,
                Metric::MacroF1,
                Metric::MicroF1,
                Metric::Mcc,
                Metric::Pearson,
                Metric::Spearman,
            ],
            Self::Pairs(_) => &[Metric::Sts],
            Self::Several(_) => &[Metric::MicroF1, Metric::MacroF1, Metric::Accuracy],
            Self::Tags(_) => tokens::METRICS,
            Self::Answers(_) => &[Metric::AnswerF1, Metric::ExactMatch],
        }
    }

    fn noun(&self) -> &'static str {
        match self {
            Self::Numbers(_) => "one class or value a text",
            Self::Pairs(_) => "scores of pairs",
            Self::Several(_) => "several classes a text",
            Self::Tags(_) => "a tag a word",
            Self::Answers(_) => "answers to questions",
        }
    }

    fn check_metric(&self, metric: Metric) -> Result<()> {
        if self.metrics().contains(&metric) {
            return Ok(());
        }
        let names: Vec<&str> = self.metrics().iter().map(|metric| metric.name()).collect();
        let reason = format!("{} is no metric of {}: take {}", metric.name(), self.noun(), names.join(", "));
        Err(Error::Compare(reason))
    }

    fn notes(&self) -> Vec<String> {
        match self {
            Self::Tags(words) => words.note().into_iter().collect(),
            Self::Answers(questions) => questions.notes(),
            Self::Numbers(_) | Self::Pairs(_) | Self::Several(_) => Vec::new(),
        }
    }
}

impl Answered {
    /// How alike two models' answers are: the share of equal ones, or the correlation of values.
    pub fn agreement(&self, other: &Self) -> f64 {
        match (&self.answers, &other.answers) {
            (Answers::Numbers { values, .. }, Answers::Numbers { values: others, .. }) => {
                self.metric.likeness().score(values, others)
            }
            (Answers::Several(answers), Answers::Several(others)) => several::agreement(answers, others),
            (Answers::Tags(tags), Answers::Tags(others)) => tokens::agreement(tags, others),
            (Answers::Replies(replies), Answers::Replies(others)) => spans::agreement(replies, others),
            _ => f64::NAN,
        }
    }
}

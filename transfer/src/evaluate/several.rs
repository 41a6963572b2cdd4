//! Texts that may have several classes at once: each class is there where its logit says so.

use std::path::{Path, PathBuf};

use ndarray::Array2;

use super::Metric;
use crate::data::Label;
use crate::{Error, Result};

/// The classes of texts.
#[derive(Clone, Debug, Default)]
pub(super) struct ClassSets {
    file: PathBuf,
    /// The label of each text and its line.
    labels: Vec<(Label, usize)>,
}

impl ClassSets {
    pub(super) fn new(file: &Path) -> Self {
        Self { file: file.to_owned(), labels: Vec::new() }
    }

    /// Takes a text's label.
    pub(super) fn add(&mut self, label: Option<Label>, line: usize) -> Result<()> {
        let label = match label {
            Some(Label::One(class)) => Label::Several(vec![class]),
            Some(label @ (Label::Several(_) | Label::Marks(_))) => label,
            _ => return Err(Error::line(&self.file, line, "it has no classes, as the lines before it have")),
        };
        self.labels.push((label, line));
        Ok(())
    }

    /// What each text has of so many classes, `[texts, classes]`.
    fn sets(&self, classes: usize) -> Result<Array2<bool>> {
        let marks = marks_width(self.labels.iter().map(|(label, _)| label));
        let mut sets = Array2::from_elem((self.labels.len(), classes), false);
        for (row, (label, line)) in self.labels.iter().enumerate() {
            let set = set_of_classes(label, classes, marks == Some(classes));
            let set = set.map_err(|reason| Error::line(&self.file, *line, reason))?;
            set.into_iter().enumerate().for_each(|(class, is_there)| sets[[row, class]] = is_there);
        }
        Ok(sets)
    }

    /// The classes that the model gives each text: those whose probability is above a half. Logits that are all from 0 to 1
    /// are probabilities already.
    pub(super) fn answers(&self, logits: &Array2<f32>) -> Result<(Array2<bool>, usize)> {
        self.sets(logits.ncols())?;
        let are_probabilities = logits.iter().all(|v| (0.0..=1.0).contains(v));
        let least = if are_probabilities { 0.5 } else { 0.0 };
        let unusable = logits.rows().into_iter().filter(|row| row.iter().any(|v| !v.is_finite())).count();
        Ok((logits.mapv(|v| v.is_finite() && v > least), unusable))
    }

    /// A metric of these classes.
    pub(super) fn score(&self, metric: Metric, answers: &Array2<bool>) -> Result<f64> {
        let sets = self.sets(answers.ncols())?;
        if metric == Metric::Accuracy {
            let same = sets.rows().into_iter().zip(answers.rows()).filter(|(a, b)| a == b).count();
            return Ok(same as f64 / sets.nrows() as f64);
        }
        // Right, and predicted or real, of each class.
        let counts: Vec<(f64, f64)> = (0..sets.ncols())
            .map(|class| {
                let (real, predicted) = (sets.column(class), answers.column(class));
                let both = real.iter().zip(predicted).filter(|(a, b)| **a && **b).count();
                let either = real.iter().chain(predicted).filter(|v| **v).count();
                (both as f64, either as f64)
            })
            .collect();
        let f1 = |(both, either): (f64, f64)| if either > 0.0 { 2.0 * both / either } else { 0.0 };
        Ok(match metric {
            Metric::MacroF1 => counts.iter().copied().map(f1).sum::<f64>() / counts.len() as f64,
            _ => f1(counts.iter().fold((0.0, 0.0), |sum, count| (sum.0 + count.0, sum.1 + count.1))),
        })
    }
}

/// The length of all lists, where each is of zeros and ones and as long as the others: a list of zeros and ones may be
/// marks, or the first two classes, and where all lists are as long as there are classes they are marks.
pub(crate) fn marks_width<'l>(labels: impl Iterator<Item = &'l Label>) -> Option<usize> {
    let mut width = None;
    for label in labels {
        let length = match label {
            Label::Several(list) if list.iter().all(|v| mark(v).is_some()) => list.len(),
            Label::Marks(marks) => marks.len(),
            _ => return None,
        };
        if *width.get_or_insert(length) != length {
            return None;
        }
    }
    width
}

/// Which of so many classes a text has.
///
/// # Errors
/// Why the label says that of no classes, or of others.
pub(crate) fn set_of_classes(label: &Label, classes: usize, are_marks: bool) -> std::result::Result<Vec<bool>, String> {
    let set = match label {
        Label::Marks(marks) => marks.clone(),
        Label::Several(list) if are_marks => list.iter().map(|v| mark(v) == Some(true)).collect(),
        Label::Several(list) => listed(list, classes)?,
        Label::One(class) => listed(std::slice::from_ref(class), classes)?,
        other => return Err(format!("its label is {}, classes are needed", other.noun())),
    };
    match set.len() == classes {
        true => Ok(set),
        false => Err(format!("{} columns of labels, but the model has {classes} classes", set.len())),
    }
}

fn listed(list: &[String], classes: usize) -> std::result::Result<Vec<bool>, String> {
    let mut set = vec![false; classes];
    for text in list {
        let class = text.parse::<usize>().ok().and_then(|class| set.get_mut(class));
        *class.ok_or_else(|| format!("label {text} is none of the model's {classes} classes, which start at 0"))? =
            true;
    }
    Ok(set)
}

fn mark(text: &str) -> Option<bool> {
    match text {
        "0" | "0.0" => Some(false),
        "1" | "1.0" => Some(true),
        _ => None,
    }
}

/// The share of texts to which both give the same classes.
pub(super) fn agreement(answers: &Array2<bool>, others: &Array2<bool>) -> f64 {
    let same = answers.rows().into_iter().zip(others.rows()).filter(|(a, b)| a == b).count();
    same as f64 / answers.nrows() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sets(labels: &[Label]) -> ClassSets {
        let mut sets = ClassSets::new(Path::new("a.jsonl"));
        labels.iter().enumerate().for_each(|(at, label)| sets.add(Some(label.clone()), at + 1).unwrap());
        sets
    }

    fn list(classes: &[&str]) -> Label {
        Label::Several(classes.iter().map(|c| (*c).to_owned()).collect())
    }

    /// Against what scikit-learn's `f1_score` and `accuracy_score` give for the same.
    #[test]
    fn metrics_are_those_of_scikit_learn() {
        let truth = sets(&[list(&["0", "2"]), list(&["1"]), list(&[]), list(&["2"])]);
        let answers = ndarray::arr2(&[
            [true, false, true, false],
            [true, true, false, false],
            [false, false, false, false],
            [false, false, false, false],
        ]);
        let score = |metric| truth.score(metric, &answers).unwrap();
        // Right 1, 1, 1 and 0 times; predicted 2, 1, 1 and 0; real 1, 1, 2 and 0.
        approx::assert_abs_diff_eq!(score(Metric::MicroF1), 0.75, epsilon = 1e-12);
        let each = [2.0 / 3.0, 1.0, 2.0 / 3.0, 0.0];
        approx::assert_abs_diff_eq!(score(Metric::MacroF1), each.iter().sum::<f64>() / 4.0, epsilon = 1e-12);
        assert_eq!(score(Metric::Accuracy), 0.5);
    }

    #[test]
    fn lists_columns_and_marks_are_the_same_classes() {
        let expected = ndarray::arr2(&[[true, false, true], [false, true, false]]);
        let marks = |marks: &[bool]| Label::Marks(marks.to_vec());
        for labels in [
            [list(&["0", "2"]), list(&["1"])],
            [list(&["1", "0", "1"]), list(&["0", "1", "0"])],
            [list(&["1.0", "0.0", "1.0"]), list(&["0.0", "1.0", "0.0"])],
            [marks(&[true, false, true]), marks(&[false, true, false])],
            [list(&["0", "2"]), Label::One("1".to_owned())],
        ] {
            assert_eq!(sets(&labels).sets(3).unwrap(), expected, "{labels:?}");
        }
        let beyond = sets(&[list(&["0"]), list(&["3"])]).sets(3).unwrap_err().to_string();
        assert!(beyond.contains("line 2") && beyond.contains("3 classes"), "{beyond}");
        let narrow = sets(&[marks(&[true, false])]).sets(3).unwrap_err().to_string();
        assert!(narrow.contains("2 columns of labels"), "{narrow}");
    }
}

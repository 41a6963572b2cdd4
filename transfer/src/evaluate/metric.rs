//! The metrics of tasks, and those of them that compare numbers: a class or a value a text.

use serde::Serialize;

/// A metric of predictions against labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Metric {
    /// The share of right classes: of texts, or of words; where texts may have several, of texts that have all and no
    /// others.
    Accuracy,
    /// The harmonic mean of precision and recall of class 1 of two, as GLUE reports for pairs.
    F1,
    /// The mean of that of every class that is predicted or true; of every class, where texts may have several.
    MacroF1,
    /// F1 of all classes counted together: accuracy, unless texts may have several.
    MicroF1,
    /// Matthews' correlation coefficient, for any number of classes.
    Mcc,
    /// Pearson's correlation of values.
    Pearson,
    /// Spearman's correlation of ranks.
    Spearman,
    /// The same of the cosines of both texts' vectors, each text read alone (semantic textual similarity).
    Sts,
    /// F1 of the entities in the tags of words, as seqeval counts them.
    EntityF1,
    /// Of the entities that are predicted, the share that is right.
    EntityPrecision,
    /// Of the real entities, the share that is found.
    EntityRecall,
    /// F1 of the words of answers to questions, as SQuAD has it.
    AnswerF1,
    /// The share of answers that are right to the letter, but for case, punctuation and articles.
    ExactMatch,
}

impl Metric {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::Accuracy,
        Self::F1,
        Self::MacroF1,
        Self::MicroF1,
        Self::Mcc,
        Self::Pearson,
        Self::Spearman,
        Self::Sts,
        Self::EntityF1,
        Self::EntityPrecision,
        Self::EntityRecall,
        Self::AnswerF1,
        Self::ExactMatch,
    ];

    /// Whether predictions are classes (the largest logit) rather than values.
    pub fn compares_classes(self) -> bool {
        matches!(self, Self::Accuracy | Self::F1 | Self::MacroF1 | Self::MicroF1 | Self::Mcc)
    }

    /// Its name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Accuracy => "accuracy",
            Self::F1 => "f1",
            Self::MacroF1 => "macro-f1",
            Self::MicroF1 => "micro-f1",
            Self::Mcc => "mcc",
            Self::Pearson => "pearson",
            Self::Spearman => "spearman",
            Self::Sts => "sts",
            Self::EntityF1 => "entity-f1",
            Self::EntityPrecision => "entity-precision",
            Self::EntityRecall => "entity-recall",
            Self::AnswerF1 => "answer-f1",
            Self::ExactMatch => "exact-match",
        }
    }

    /// What tells how alike two models' predictions are: the share of equal classes, or the correlation of values.
    pub fn likeness(self) -> Self {
        match self {
            Self::Pearson | Self::Spearman | Self::Sts => Self::Pearson,
            _ => Self::Accuracy,
        }
    }

    /// The metric of as many predictions as labels, a class or a value a text; not a number where it is undefined (no
    /// variance, say), as those of other labels are.
    pub fn score(self, predictions: &[f64], labels: &[f64]) -> f64 {
        let pairs = || predictions.iter().copied().zip(labels.iter().copied());
        let count = predictions.len() as f64;
        match self {
            Self::Accuracy | Self::MicroF1 => pairs().filter(|(p, l)| p == l).count() as f64 / count,
            Self::F1 => f1(predictions, labels, 1.0),
            Self::MacroF1 => {
                let classes = classes(predictions, labels);
                classes.iter().map(|&class| f1(predictions, labels, class)).sum::<f64>() / classes.len() as f64
            }
            Self::Mcc => matthews(predictions, labels),
            Self::Pearson => pearson(predictions, labels),
            Self::Spearman | Self::Sts => pearson(&ranks(predictions), &ranks(labels)),
            Self::EntityF1 | Self::EntityPrecision | Self::EntityRecall | Self::AnswerF1 | Self::ExactMatch => f64::NAN,
        }
    }
}

/// The harmonic mean of precision and recall of one class.
fn f1(predictions: &[f64], labels: &[f64], class: f64) -> f64 {
    let is_class = |values: &[f64]| values.iter().filter(|v| **v == class).count() as f64;
    let both = predictions.iter().zip(labels).filter(|(p, l)| **p == class && **l == class).count() as f64;
    2.0 * both / (is_class(predictions) + is_class(labels))
}

/// Every class that is predicted or true.
pub(super) fn classes(predictions: &[f64], labels: &[f64]) -> Vec<f64> {
    let mut classes: Vec<f64> = predictions.iter().chain(labels).copied().filter(|v| !v.is_nan()).collect();
    classes.sort_by(f64::total_cmp);
    classes.dedup();
    classes
}

/// `(c s - sum p_k t_k) / sqrt((s^2 - sum p_k^2) (s^2 - sum t_k^2))` (Gorodkin 2004): `c` right of `s`, class `k`
/// predicted `p_k` and true `t_k` times.
fn matthews(predictions: &[f64], labels: &[f64]) -> f64 {
    let classes = classes(predictions, labels);
    let times = |values: &[f64], k: f64| values.iter().filter(|v| **v == k).count() as f64;
    let sum = |a: &[f64], b: &[f64]| classes.iter().map(|&k| times(a, k) * times(b, k)).sum::<f64>();
    let samples = labels.len() as f64;
    let right = predictions.iter().zip(labels).filter(|(p, l)| p == l).count() as f64;
    let spread = |values: &[f64]| samples * samples - sum(values, values);
    (right * samples - sum(predictions, labels)) / (spread(predictions) * spread(labels)).sqrt()
}

fn pearson(a: &[f64], b: &[f64]) -> f64 {
    let mean = |v: &[f64]| v.iter().sum::<f64>() / v.len() as f64;
    let (ma, mb) = (mean(a), mean(b));
    let product =
        |x: &[f64], mx: f64, y: &[f64], my: f64| x.iter().zip(y).map(|(x, y)| (x - mx) * (y - my)).sum::<f64>();
    product(a, ma, b, mb) / (product(a, ma, a, ma) * product(b, mb, b, mb)).sqrt()
}

/// Ranks from 1; equal values share the mean of theirs.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut ranks = vec![0.0; values.len()];
    let mut start = 0;
    while start < order.len() {
        let same = order[start..].iter().take_while(|&&at| values[at] == values[order[start]]).count();
        let rank = start as f64 + (same + 1) as f64 / 2.0;
        order[start..start + same].iter().for_each(|&at| ranks[at] = rank);
        start += same;
    }
    ranks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_those_of_the_field() {
        let (p, l) = ([1.0, 0.0, 1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0, 1.0, 1.0]);
        let near = |score: f64, expected: f64| approx::assert_abs_diff_eq!(score, expected, epsilon = 1e-9);
        near(Metric::Accuracy.score(&p, &l), 4.0 / 6.0);
        near(Metric::F1.score(&p, &l), 0.75);
        near(Metric::Mcc.score(&p, &l), 0.25);
        // Classes 0, 1 and 2: 2/3, 2/3 and 0, as scikit-learn has it.
        near(Metric::MacroF1.score(&[0.0, 0.0, 1.0, 2.0], &[0.0, 1.0, 1.0, 0.0]), (0.5 + 2.0 / 3.0) / 3.0);
        let (a, b) = ([1.0, 2.0, 2.0, 5.0], [0.5, 1.0, 3.0, 4.0]);
        near(Metric::Pearson.score(&a, &b), 7.25 / (9.0f64 * 8.1875).sqrt());
        near(Metric::Spearman.score(&a, &b), 4.5 / (4.5f64 * 5.0).sqrt());
        // Ranks 1, 3, 3, 3, 5 against 5, 3.5, 1, 3.5, 2: deviations multiply to -4 + 0 + 0 + 0 - 2.
        let (cosines, scores) = ([0.1, 0.7, 0.7, 0.7, 0.9], [5.0, 3.0, 0.0, 3.0, 1.0]);
        near(Metric::Sts.score(&cosines, &scores), -6.0 / (8.0f64 * 9.5).sqrt());
        near(Metric::Mcc.score(&[0.0, 1.0, 2.0, 2.0], &[0.0, 1.0, 2.0, 1.0]), 0.7);
        assert!(Metric::Pearson.score(&[1.0, 1.0], &[0.0, 1.0]).is_nan());
    }
}

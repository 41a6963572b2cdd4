//! Question answering: the span of a context that answers best, over all of its windows.

use std::path::{Path, PathBuf};

use super::outputs::Outputs;
use super::{Metric, squad};
use crate::data::{Answers, Content, Example, Label, Sequence, TextEncoder, Window};
use crate::{Error, Result};

/// Of each window, so many starts are tried with as many ends.
const BEST: usize = 20;
/// Tokens of an answer, at most.
const LONGEST_ANSWER: usize = 30;

/// Questions, their contexts, and the windows of these.
#[derive(Clone, Debug, Default)]
pub(super) struct Questions {
    file: PathBuf,
    questions: Vec<Question>,
    windows: Vec<Part>,
    /// Questions that were cut.
    cut: usize,
}

#[derive(Clone, Debug)]
struct Question {
    context: String,
    answers: Answers,
}

/// A window of a question's context.
#[derive(Clone, Debug)]
struct Part {
    question: usize,
    /// The bytes of the context that its tokens stand for.
    places: Vec<Option<(usize, usize)>>,
}

/// A span of a context, in bytes, and the sum of its logits.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Span {
    start: usize,
    end: usize,
    score: f32,
}

/// What a model answers to a question; `None` where it gives no number.
pub(super) type Replies = Vec<Option<String>>;

impl Questions {
    pub(super) fn new(file: &Path) -> Self {
        Self { file: file.to_owned(), ..Self::default() }
    }

    /// Takes a question; gives its windows.
    pub(super) fn add(&mut self, example: Example, encoder: &TextEncoder) -> Result<Vec<Sequence>> {
        let Example { content, label, line } = example;
        let (Content::Text { text, pair: Some(context) }, Some(Label::Answers(answers))) = (content, label) else {
            return Err(Error::line(&self.file, line, "it is no question with a context and answers"));
        };
        let windows = encoder.windows(&self.file, text.trim_start(), &context, line)?;
        let question = self.questions.len();
        self.cut += usize::from(windows.iter().any(|window| window.sequence.truncated));
        self.questions.push(Question { context, answers });
        let mut sequences = Vec::new();
        for Window { sequence, places } in windows {
            self.windows.push(Part { question, places });
            sequences.push(sequence);
        }
        Ok(sequences)
    }

    /// How many questions there are.
    pub(super) fn count(&self) -> usize {
        self.questions.len()
    }

    /// What is said of contexts and questions that are too long.
    pub(super) fn notes(&self) -> Vec<String> {
        let (windows, questions) = (self.windows.len(), self.questions.len());
        let several = (windows > questions)
            .then(|| format!("long contexts are read in overlapping windows: {windows} for {questions} questions"));
        let cut = (self.cut > 0).then(|| format!("{} questions fill more than half of a window and are cut", self.cut));
        several.into_iter().chain(cut).collect()
    }

    /// The model's answers.
    pub(super) fn answers(&self, outputs: &Outputs) -> Result<(Replies, usize)> {
        let (starts, ends) = start_and_end(outputs, self.windows.len())?;
        // No question without an answer: then there is always one.
        let may_be_none = self.questions.iter().any(|question| question.answers.is_impossible);
        let mut best: Vec<Option<Span>> = vec![None; self.questions.len()];
        let mut none = vec![f32::INFINITY; self.questions.len()];
        let mut is_usable = vec![true; self.questions.len()];
        for (part, (starts, ends)) in self.windows.iter().zip(starts.iter().zip(&ends)) {
            let tokens = part.places.len();
            let (starts, ends) = (&starts[..tokens], &ends[..tokens]);
            let at = part.question;
            if starts.iter().chain(ends).any(|v| !v.is_finite()) {
                is_usable[at] = false;
                continue;
            }
            none[at] = none[at].min(starts[0] + ends[0]);
            let span = best_span(starts, ends, &part.places);
            best[at] = match (best[at], span) {
                (Some(before), Some(span)) if span.score <= before.score => Some(before),
                (before, span) => span.or(before),
            };
        }
        let text = |at: usize| {
            let span = best[at].filter(|span| !may_be_none || span.score >= none[at]);
            let text = span.and_then(|span| self.questions[at].context.get(span.start..span.end));
            is_usable[at].then(|| text.unwrap_or_default().to_owned())
        };
        let unusable = is_usable.iter().filter(|is_usable| !**is_usable).count();
        Ok(((0..self.questions.len()).map(text).collect(), unusable))
    }

    /// A metric of these answers.
    pub(super) fn score(&self, metric: Metric, replies: &Replies) -> f64 {
        let scores = self.questions.iter().zip(replies).map(|(question, reply)| match reply {
            Some(reply) => squad::scores(reply, &question.answers),
            None => (0.0, 0.0),
        });
        let of = |(exact, f1): (f64, f64)| if metric == Metric::ExactMatch { exact } else { f1 };
        scores.map(of).sum::<f64>() / self.questions.len() as f64
    }
}

/// The share of questions that both answer alike.
pub(super) fn agreement(replies: &Replies, others: &Replies) -> f64 {
    let same = replies.iter().zip(others).filter(|(a, b)| a.is_some() && a == b).count();
    same as f64 / replies.len() as f64
}

/// A row of logits a window.
type Rows = Vec<Vec<f32>>;

/// The logits of starts and of ends: two outputs `[batch, n]`, told by their names or their order, or one `[batch, n, 2]`.
fn start_and_end(outputs: &Outputs, windows: usize) -> Result<(Rows, Rows)> {
    let all = outputs.all();
    let rows: Vec<_> = all.iter().filter(|output| output.rank == 2 && output.is_over_tokens).collect();
    let named = |part: &str| rows.iter().find(|output| output.name.to_lowercase().contains(part));
    let both = match (named("start"), named("end"), rows.as_slice()) {
        (Some(start), Some(end), _) if start.at != end.at => Some((start.at, end.at)),
        (_, _, [start, end]) => Some((start.at, end.at)),
        _ => None,
    };
    let (mut starts, mut ends) = (vec![Vec::new(); windows], vec![Vec::new(); windows]);
    if let Some((start, end)) = both {
        outputs.each_row(start, |window, value| starts[window] = value.iter().copied().collect());
        outputs.each_row(end, |window, value| ends[window] = value.iter().copied().collect());
        return Ok((starts, ends));
    }
    let joined = all.iter().find(|output| output.rank == 3 && output.is_over_tokens && output.width == 2);
    let joined = joined.ok_or_else(|| outputs.fault("no two outputs say where an answer starts and ends"))?;
    outputs.each_row(joined.at, |window, value| {
        let column = |at: usize| value.index_axis(ndarray::Axis(1), at).iter().copied().collect();
        (starts[window], ends[window]) = (column(0), column(1));
    });
    Ok((starts, ends))
}

/// The span of the largest sum among the best starts and ends of a window, within the context and not too long.
fn best_span(starts: &[f32], ends: &[f32], places: &[Option<(usize, usize)>]) -> Option<Span> {
    let mut best: Option<Span> = None;
    let ends_best = largest(ends);
    for start in largest(starts) {
        for &end in &ends_best {
            let (Some((first, _)), Some((_, last))) = (places[start], places[end]) else { continue };
            if end < start || end - start + 1 > LONGEST_ANSWER {
                continue;
            }
            let score = starts[start] + ends[end];
            if best.is_none_or(|best| score > best.score) {
                best = Some(Span { start: first, end: last, score });
            }
        }
    }
    best
}

/// The places of the largest values, the largest first.
fn largest(values: &[f32]) -> Vec<usize> {
    let mut places: Vec<usize> = (0..values.len()).collect();
    places.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
    places.truncate(BEST);
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens of five bytes, the first two no context.
    fn places(tokens: usize) -> Vec<Option<(usize, usize)>> {
        (0..tokens).map(|at| (at >= 2).then(|| (5 * (at - 2), 5 * (at - 2) + 4))).collect()
    }

    fn peaks(tokens: usize, peaks: &[(usize, f32)]) -> Vec<f32> {
        let mut values = vec![0.0; tokens];
        peaks.iter().for_each(|(at, value)| values[*at] = *value);
        values
    }

    #[test]
    fn a_span_lies_in_the_context_forward_and_is_not_too_long() {
        let span = |starts: &[(usize, f32)], ends: &[(usize, f32)]| {
            best_span(&peaks(60, starts), &peaks(60, ends), &places(60)).unwrap()
        };
        assert_eq!(span(&[(4, 3.0)], &[(6, 2.0)]), Span { start: 10, end: 24, score: 5.0 });
        // The best start is no context, the best end is before the best start.
        assert_eq!(span(&[(0, 9.0), (4, 3.0)], &[(1, 9.0), (6, 2.0)]), Span { start: 10, end: 24, score: 5.0 });
        assert_eq!(span(&[(9, 9.0), (4, 3.0)], &[(6, 8.0)]).score, 11.0);
        // 31 tokens are too many, 30 are not.
        assert_eq!(span(&[(4, 3.0)], &[(34, 2.0), (20, 1.0)]).score, 4.0);
        assert_eq!(span(&[(4, 3.0)], &[(33, 2.0), (20, 1.0)]).score, 5.0);
        assert_eq!(best_span(&[1.0, 2.0], &[1.0, 2.0], &[None, None]), None);
    }
}

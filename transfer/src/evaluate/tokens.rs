//! Token classification: a tag a word, told by the word's first token.

use std::path::Path;

use super::Metric;
use super::entities::Counts;
use super::outputs::{Output, Outputs};
use super::tag_classes::TagClasses;
use crate::compare::argmax;
use crate::data::{Content, DataFile, Example, Label, Sequence, TextEncoder};
use crate::heads::HeadKind;
use crate::{Error, Result, Setting};

/// The metrics of tags, the usual one first.
pub(super) const METRICS: &[Metric] =
    &[Metric::EntityF1, Metric::EntityPrecision, Metric::EntityRecall, Metric::Accuracy];

/// The tags of sentences, and where their words are.
#[derive(Clone, Debug, Default)]
pub(super) struct TaggedWords {
    /// Of each sentence, the words that are scored: the place of the first token, and the tag as a class.
    sentences: Vec<Vec<(usize, usize)>>,
    classes: TagClasses,
    /// Words that were cut off.
    pub(super) cut: usize,
    /// The line of each sentence.
    lines: Vec<usize>,
}

/// What a model says of each word that is scored; `None` where it gives no number.
pub(super) type Tags = Vec<Vec<Option<usize>>>;

impl TaggedWords {
    /// Knows the names of the classes.
    pub(super) fn new(file: &DataFile, encoder: &TextEncoder) -> Self {
        Self { classes: TagClasses::new(file, encoder), ..Self::default() }
    }

    /// Takes a sentence.
    pub(super) fn add(&mut self, path: &Path, example: Example, encoder: &TextEncoder) -> Result<Sequence> {
        let Example { content, label, line } = example;
        let (Content::Words(words), Some(Label::Tags(tags))) = (content, label) else {
            return Err(Error::line(path, line, "it is no list of words with a tag each, as the lines before it are"));
        };
        if words.len() != tags.len() {
            return Err(Error::line(path, line, format!("{} words, but {} tags", words.len(), tags.len())));
        }
        let (sequence, places) = encoder.encode_words(path, &words, None, line)?;
        let mut scored = Vec::new();
        for (tag, place) in tags.iter().zip(places) {
            let class = self.classes.class(path, line, tag)?;
            match (class, place) {
                (Some(class), Some(place)) => scored.push((place, class)),
                (Some(_), None) if sequence.truncated => self.cut += 1,
                _ => {}
            }
        }
        self.sentences.push(scored);
        self.lines.push(line);
        Ok(sequence)
    }

    /// Refuses sentences of which no word is scored.
    pub(super) fn check(&self, path: &Path) -> Result<()> {
        match self.sentences.iter().all(Vec::is_empty) {
            true => Err(Error::data(path, "it has no word that a model's tag could be compared with")),
            false => Ok(()),
        }
    }

    /// The metrics that can be told: those of entities need the names of the classes.
    pub(super) fn metrics(&self) -> &'static [Metric] {
        match self.classes.are_named() {
            true => METRICS,
            false => &[Metric::Accuracy],
        }
    }

    /// What is said of words that were cut off.
    pub(super) fn note(&self) -> Option<String> {
        let words = self.cut;
        (words > 0).then(|| format!("{words} words are beyond what the model takes: they are not scored"))
    }

    /// The model's tags.
    pub(super) fn answers(&self, outputs: &Outputs) -> Result<(Tags, usize)> {
        let output = outputs.find(|output| self.fits(output));
        let missing = || outputs.fault("no output has a row of classes a token, as tags of words need");
        let output = output.ok_or_else(missing)?;
        self.check_width(output.width)?;
        let mut tags: Tags = vec![Vec::new(); self.sentences.len()];
        outputs.each_row(output.at, |sequence, value| {
            let tag = |(place, _): &(usize, usize)| {
                let logits: Vec<f32> = value.index_axis(ndarray::Axis(0), *place).iter().copied().collect();
                logits.iter().all(|v| v.is_finite()).then(|| argmax(&logits))
            };
            tags[sequence] = self.sentences[sequence].iter().map(tag).collect();
        });
        let unusable = tags.iter().filter(|tags| tags.iter().any(Option::is_none)).count();
        Ok((tags, unusable))
    }

    fn fits(&self, output: &Output<'_>) -> bool {
        let is_over_tokens = output.rank == 3 && output.is_over_tokens;
        let has_classes = self.classes.are_named() && output.width == self.classes.names.len();
        is_over_tokens && (has_classes || output.kind == HeadKind::TokenClasses)
    }

    fn check_width(&self, width: usize) -> Result<()> {
        if self.classes.are_named() && width != self.classes.names.len() {
            let count = self.classes.names.len();
            return Err(Error::Compare(format!(
                "the model gives {width} classes a token, but {count} are named: name all of them, in the model's order"
            )));
        }
        let beyond = self.sentences.iter().position(|words| words.iter().any(|(_, class)| *class >= width));
        match beyond {
            Some(at) => Err(Error::Compare(format!(
                "line {}: a tag is none of the model's {width} classes, which start at 0",
                self.lines[at]
            ))),
            None => Ok(()),
        }
    }

    /// A metric of these tags.
    pub(super) fn score(&self, metric: Metric, tags: &Tags) -> Result<f64> {
        if metric == Metric::Accuracy {
            let both = self.sentences.iter().zip(tags).flat_map(|(words, tags)| words.iter().zip(tags));
            let words = self.sentences.iter().map(Vec::len).sum::<usize>();
            return Ok(both.filter(|((_, class), tag)| **tag == Some(*class)).count() as f64 / words as f64);
        }
        if !self.classes.are_named() {
            let reason = "entities need the names of the classes, in the model's order: name them, or put the model's \
                          config.json beside the tokenizer; accuracy needs none";
            return Err(Error::setting(reason, &[Setting::Classes]));
        }
        let mut counts = Counts::default();
        for (words, tags) in self.sentences.iter().zip(tags) {
            // What is no number names no entity.
            let name = |class: Option<usize>| class.map_or("O", |class| self.classes.names[class].as_str());
            let real: Vec<&str> = words.iter().map(|(_, class)| name(Some(*class))).collect();
            let predicted: Vec<&str> = tags.iter().map(|tag| name(*tag)).collect();
            counts.add(&predicted, &real);
        }
        Ok(match metric {
            Metric::EntityPrecision => counts.precision(),
            Metric::EntityRecall => counts.recall(),
            _ => counts.f1(),
        })
    }
}

/// The share of words that both tag alike.
pub(super) fn agreement(tags: &Tags, others: &Tags) -> f64 {
    let both = || tags.iter().flatten().zip(others.iter().flatten());
    both().filter(|(a, b)| a.is_some() && a == b).count() as f64 / both().count() as f64
}

//! Which sequences of a file are used.

use std::collections::HashSet;
use std::path::Path;

use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use serde::Serialize;

use super::augment::{Amount, Augmentation};
use super::made_up::any_length;
use super::reader::{Content, Example, Reader, Skipped};
use super::source::DataFile;
use super::tokens::{Sequence, TextEncoder};
use crate::{Error, Result};

/// How much is drawn from a file.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted {
    /// Tokens for statistics.
    pub tokens: usize,
    /// Sequences to train on; all that the file holds, where it holds fewer.
    pub training: usize,
    /// No more are taken once they have so many tokens.
    pub training_tokens: usize,
    /// Sequences for measuring; a tenth of the file at most.
    pub held_out: usize,
    /// What becomes of texts that stand alone.
    pub lone_texts: LoneTexts,
}

/// What becomes of a text that has no second one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoneTexts {
    /// It stays alone.
    #[default]
    Whole,
    /// It is cut in two at one of its words, for a model that reads pairs.
    CutInTwo,
}

/// Sequences drawn from a file.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    /// For statistics.
    pub calibration: Vec<Sequence>,
    /// To train on; some of them are among those for statistics.
    pub training: Vec<Sequence>,
    /// To judge training by: none of them is among those to train on.
    pub judges: Vec<Sequence>,
    /// For measuring; none of them is among the others.
    pub held_out: Vec<Sequence>,
    /// Examples that the file holds.
    pub examples: usize,
    /// Its rows without a text.
    pub skipped: Skipped,
    /// Different ones among all that were drawn.
    pub different: usize,
    /// Of those for measuring, how many are word for word among those for statistics too.
    pub repeated: usize,
    /// Of those for statistics and for measuring, sequences that were cut to the longest length.
    pub truncated: usize,
    /// Whether they are pairs of texts.
    pub pairs: bool,
    /// Sequences that were made of others, where the text was little.
    pub augmented: Augmented,
}

/// How many sequences were made of others, see [`Augmentation`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Augmented {
    /// Of those for statistics.
    pub calibration: usize,
    /// Of those to train on.
    pub training: usize,
}

/// Of all tokens, this share goes into sequences of every length up to the longest, made by joining and cutting
/// neighbours: what the text lacks in lengths, the student would otherwise never have seen.
const EVERY_LENGTH: f64 = 0.125;
const TRAINING_SEED: u64 = 0x7ea1_7ea1;
const AUGMENTATION_SEED: u64 = 0xa06;
/// One text in so many, up to a number, judges training and is not trained on.
const JUDGES: usize = 20;
const MOST_JUDGES: usize = 256;

/// Reads every example of a file, in order; and says how many rows have no text.
///
/// # Errors
/// The file or an example cannot be used, or there is none.
pub fn read_sequences(file: &DataFile, encoder: &TextEncoder) -> Result<(Vec<Sequence>, Skipped)> {
    let mut reader = Reader::new(file)?;
    let sequences: Vec<Sequence> = reader.by_ref().map(|e| encoder.encode(file.path(), e?)).collect::<Result<_>>()?;
    match sequences.is_empty() {
        true => Err(no_examples(file, reader.skipped())),
        false => Ok((sequences, reader.skipped())),
    }
}

/// Says that a file holds nothing to work on.
pub(crate) fn no_examples(file: &DataFile, skipped: Skipped) -> Error {
    match skipped.rows {
        0 => Error::data(file.path(), "it holds no examples"),
        rows => Error::data(file.path(), format!("it holds no examples: none of its {rows} rows has a text")),
    }
}

/// Draws sequences of a file, which is read once; only the examples drawn are kept. Where it holds fewer tokens than are
/// wanted, more is made of it by the `augmentation`, if there is one: never of what is kept apart.
///
/// # Errors
/// The file or an example cannot be used, or there is none.
pub fn draw_sample(
    file: &DataFile,
    encoder: &TextEncoder,
    wanted: &Wanted,
    augmentation: Option<&Augmentation<'_>>,
    seed: u64,
) -> Result<Sample> {
    // What is trained on is drawn apart, with random numbers of its own: it must not change what is calibrated and
    // measured on.
    let mut rng = StdRng::seed_from_u64(seed);
    let mut training_rng = StdRng::seed_from_u64(seed ^ TRAINING_SEED);
    let Drawn { mut for_statistics, mut for_training, examples, skipped } = Drawn::read(file, wanted, seed)?;
    for_statistics.shuffle(&mut rng);
    let held_out_count = wanted.held_out.min(examples / 10).min(for_statistics.len() - 1);
    let calibrated = for_statistics.split_off(held_out_count);
    let held_out = for_statistics;
    let held_out_lines: HashSet<usize> = held_out.iter().map(|e| e.line).collect();
    for_training.retain(|e| !held_out_lines.contains(&e.line));
    for_training.shuffle(&mut training_rng);
    for_training.truncate(wanted.training);
    let calibrated_contents: HashSet<&Content> = calibrated.iter().map(|e| &e.content).collect();
    let repeated = held_out.iter().filter(|e| calibrated_contents.contains(&e.content)).count();
    let different = calibrated_contents.len() + different_beside(&held_out, &calibrated_contents);
    drop(calibrated_contents);
    let pairs = calibrated.iter().any(|e| matches!(e.content, Content::Text { pair: Some(_), .. }));

    let encoding = Encoding { path: file.path(), encoder, lone_texts: wanted.lone_texts, augmentation };
    let held_out: Vec<Sequence> =
        held_out.into_iter().map(|e| encoding.sequence(e, &mut rng)).collect::<Result<_>>()?;
    let natural = Amount { sequences: usize::MAX, tokens: (wanted.tokens as f64 * (1.0 - EVERY_LENGTH)) as usize };
    let mut calibration = encoding.sequences(&calibrated, natural, &mut rng)?;
    let truncated = calibration.iter().chain(&held_out).filter(|s| s.truncated).count();
    let mut augmented = Augmented::default();
    let lacking = Amount::counted(&calibration).to_make(natural);
    augmented.calibration = encoding.augment(&mut calibration, &calibrated, lacking, seed)?;
    let calibration = encoding.with_every_length(calibration, &mut rng);

    let trained = Amount { sequences: wanted.training, tokens: wanted.training_tokens };
    let mut judges = encoding.sequences(&for_training, trained, &mut training_rng)?;
    // Judges are kept apart of text that is enough, too: that makes it no less.
    let lacking = Amount::counted(&judges).to_make(trained);
    let mut training = judges.split_off((judges.len() / JUDGES).min(MOST_JUDGES));
    let sources = &for_training[judges.len()..][..training.len()];
    augmented.training = encoding.augment(&mut training, sources, lacking, seed ^ TRAINING_SEED)?;
    let training = encoding.with_every_length(training, &mut training_rng);
    Ok(Sample {
        calibration,
        training,
        judges,
        held_out,
        examples,
        skipped,
        different,
        repeated,
        truncated,
        pairs,
        augmented,
    })
}

/// Different contents of examples that are not among others.
fn different_beside(examples: &[Example], others: &HashSet<&Content>) -> usize {
    let contents: HashSet<&Content> = examples.iter().map(|e| &e.content).collect();
    contents.difference(others).count()
}

/// Examples of a file, as many as may be needed.
struct Drawn {
    /// For statistics and for measuring.
    for_statistics: Vec<Example>,
    /// Some of them are among those for statistics and for measuring.
    for_training: Vec<Example>,
    /// How many the file holds.
    examples: usize,
    skipped: Skipped,
}

impl Drawn {
    fn read(file: &DataFile, wanted: &Wanted, seed: u64) -> Result<Self> {
        // No example has fewer than three tokens worth having: enough are drawn whatever their length.
        let mut for_statistics = Reservoir::new(wanted.tokens / 3 + wanted.held_out + 1, seed);
        let enough = if wanted.training > 0 { wanted.training + wanted.held_out } else { 0 };
        let mut for_training = Reservoir::new(enough, seed ^ TRAINING_SEED);
        let mut reader = Reader::new(file)?;
        for example in reader.by_ref() {
            let example = example?;
            for_training.offer(&example);
            for_statistics.offer(&example);
        }
        let (examples, skipped) = (for_statistics.seen, reader.skipped());
        if examples == 0 {
            return Err(no_examples(file, skipped));
        }
        Ok(Self { for_statistics: for_statistics.drawn, for_training: for_training.drawn, examples, skipped })
    }
}

/// How examples become sequences.
struct Encoding<'e> {
    path: &'e Path,
    encoder: &'e TextEncoder,
    lone_texts: LoneTexts,
    augmentation: Option<&'e Augmentation<'e>>,
}

impl Encoding<'_> {
    fn sequence(&self, mut example: Example, rng: &mut StdRng) -> Result<Sequence> {
        if self.lone_texts == LoneTexts::CutInTwo {
            cut_in_two(&mut example.content, rng);
        }
        self.encoder.encode(self.path, example)
    }

    /// A sequence an example, in their order, until there are enough.
    fn sequences(&self, examples: &[Example], wanted: Amount, rng: &mut StdRng) -> Result<Vec<Sequence>> {
        let mut sequences: Vec<Sequence> = Vec::new();
        let mut count = 0;
        for example in examples.iter().take(wanted.sequences) {
            if count >= wanted.tokens {
                break;
            }
            let sequence = self.sequence(example.clone(), rng)?;
            count += sequence.ids.len();
            sequences.push(sequence);
        }
        Ok(sequences)
    }

    /// Adds so much that is made of the `sources`, unless it is to be done without; says how many sequences.
    fn augment(&self, sequences: &mut Vec<Sequence>, sources: &[Example], amount: Amount, seed: u64) -> Result<usize> {
        let Some(augmentation) = self.augmentation else { return Ok(0) };
        // Random numbers of its own: what is drawn of the file stays the same.
        let mut rng = StdRng::seed_from_u64(seed ^ AUGMENTATION_SEED);
        let made = augmentation.make(self.path, sources, self.encoder, amount, &mut rng)?;
        let count = made.len();
        sequences.extend(made);
        Ok(count)
    }

    /// Adds sequences of every length, until they have their share of all tokens.
    fn with_every_length(&self, mut sequences: Vec<Sequence>, rng: &mut StdRng) -> Vec<Sequence> {
        let tokens: usize = sequences.iter().map(|s| s.ids.len()).sum();
        let more = (tokens as f64 * EVERY_LENGTH / (1.0 - EVERY_LENGTH)) as usize;
        sequences.extend(every_length(&sequences, self.encoder.longest(), more, rng));
        sequences
    }
}

/// Cuts a text in two, between any two of its words.
fn cut_in_two(content: &mut Content, rng: &mut StdRng) {
    if let Content::Text { text, pair: pair @ None } = content {
        let gaps: Vec<usize> = text.match_indices(' ').map(|(at, _)| at).collect();
        if !gaps.is_empty() {
            let at = gaps[rng.random_range(0..gaps.len())];
            *pair = Some(text[at + 1..].to_owned());
            text.truncate(at);
        }
    }
}

/// Reservoir sampling: every example of a file is as likely to be drawn.
struct Reservoir {
    most: usize,
    drawn: Vec<Example>,
    seen: usize,
    rng: StdRng,
}

impl Reservoir {
    fn new(most: usize, seed: u64) -> Self {
        Self { most, drawn: Vec::new(), seen: 0, rng: StdRng::seed_from_u64(seed) }
    }

    fn offer(&mut self, example: &Example) {
        self.seen += 1;
        if self.drawn.len() < self.most {
            self.drawn.push(example.clone());
        } else if self.most > 0 {
            let slot = self.rng.random_range(0..self.seen);
            if slot < self.most {
                self.drawn[slot] = example.clone();
            }
        }
    }
}

/// Sequences of every length, `tokens` in all: neighbours are joined until they are long enough, then cut.
fn every_length(sequences: &[Sequence], longest: usize, tokens: usize, rng: &mut StdRng) -> Vec<Sequence> {
    let mut made = Vec::new();
    let mut left = tokens;
    while left > 0 && !sequences.is_empty() {
        let length = any_length(longest, rng).min(left);
        let start = rng.random_range(0..sequences.len());
        let round = sequences.iter().cycle().skip(start).take(sequences.len().min(longest));
        let tokens: Vec<(i64, i64)> =
            round.flat_map(|s| s.ids.iter().copied().zip(s.types.iter().copied())).take(length).collect();
        left -= tokens.len().min(left);
        let (ids, types) = tokens.into_iter().unzip();
        let line = sequences[start].line;
        made.push(Sequence { ids, types, label: None, line, truncated: false, made_up: false });
    }
    made
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Data, Overlong};

    #[test]
    fn a_sample_is_seeded_holds_some_out_and_covers_every_length() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ids.jsonl");
        let line = |i: usize| format!("{{\"input_ids\": [1, {i}, {}, 2]}}\n", i + 1);
        std::fs::write(&path, (0..400).map(line).collect::<String>()).unwrap();
        let encoder = TextEncoder::new(None, 16, Overlong::Truncate).unwrap();
        let wanted =
            Wanted { tokens: 800, training: 300, training_tokens: usize::MAX, held_out: 20, ..Wanted::default() };
        let file = DataFile::open(&Data::new(&path)).unwrap();
        let draw = |wanted: &Wanted, seed| draw_sample(&file, &encoder, wanted, None, seed).unwrap();
        let sample = |seed| draw(&wanted, seed);
        let first = sample(1);
        let fewer = draw(&Wanted { training_tokens: 400, ..wanted }, 1);
        assert_eq!(fewer.judges.len(), 5);
        for other in [&fewer, &draw(&Wanted { training: 0, ..wanted }, 1)] {
            assert_eq!(other.calibration, first.calibration);
            assert_eq!(other.held_out, first.held_out);
        }
        // 95 sequences of four tokens, and an eighth of all that is joined and cut.
        let tokens: usize = fewer.training.iter().map(|s| s.ids.len()).sum();
        assert!((430..=440).contains(&tokens), "{tokens}");
        let held: Vec<usize> = first.held_out.iter().map(|s| s.line).collect();
        assert_eq!((first.examples, first.held_out.len(), first.truncated), (400, 20, 0));
        let tokens: usize = first.calibration.iter().map(|s| s.ids.len()).sum();
        assert!((790..=820).contains(&tokens), "{tokens}");
        assert!(first.calibration.iter().any(|s| s.ids.len() > 12));
        assert!(first.calibration.iter().filter(|s| s.ids.len() == 4).all(|s| !held.contains(&s.line)));
        // Behind the file's own texts stand joined ones, of which some may be as long.
        let trained: Vec<usize> = first.training.iter().take_while(|s| s.ids.len() == 4).map(|s| s.line).collect();
        let judging: Vec<usize> = first.judges.iter().map(|s| s.line).collect();
        assert_eq!((trained.len(), judging.len()), (285, 15));
        assert!(judging.iter().all(|line| !held.contains(line)));
        assert!(first.training.iter().all(|s| !held.contains(&s.line) || s.ids.len() != 4));
        assert_eq!(sample(1).calibration, first.calibration);
        assert_ne!(sample(2).calibration, first.calibration);
    }

    /// What is made comes of the texts that are calibrated or trained on, and nothing else changes.
    #[test]
    fn little_text_is_added_to_but_not_from_what_is_kept_apart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ids.jsonl");
        let line = |i: usize| format!("{{\"input_ids\": [1, {}, {}, 2]}}\n", 10 + i, 300 + i);
        std::fs::write(&path, (0..200).map(line).collect::<String>()).unwrap();
        let encoder = TextEncoder::new(None, 16, Overlong::Truncate).unwrap();
        let file = DataFile::open(&Data::new(&path)).unwrap();
        // Every id has its neighbours far from all ids of the file: what was replaced shows.
        let table = ndarray::Array2::from_shape_fn((2000, 2), |(row, column)| {
            let angle = (row % 500) as f32 * 1e-3;
            if column == 0 { angle.cos() } else { angle.sin() }
        });
        let augmentation = Augmentation::new(move || Ok(Some(table.clone())));
        let draw = |wanted: &Wanted, augmentation| draw_sample(&file, &encoder, wanted, augmentation, 1).unwrap();
        let wanted = Wanted { tokens: 2000, training: 2000, training_tokens: 1500, held_out: 20, ..Wanted::default() };
        let (alone, with) = (draw(&wanted, None), draw(&wanted, Some(&augmentation)));
        assert_eq!(alone.augmented, Augmented::default());
        assert_eq!((&alone.held_out, &alone.judges), (&with.held_out, &with.judges));
        let natural = |sequences: &[Sequence]| sequences.iter().filter(|s| s.ids.len() == 4).count();
        assert!(natural(&with.calibration) > 300 && natural(&alone.calibration) < 200);
        // 180 texts have 720 tokens, of the 1750 that are calibrated on and the 1500 that are trained on.
        assert_eq!(with.augmented, Augmented { calibration: 258, training: 195 });
        assert_eq!(with.calibration[..180], alone.calibration[..180]);
        assert_eq!(with.training[..171], alone.training[..171]);
        let lines = |sequences: &[Sequence]| sequences.iter().map(|s| s.line).collect::<HashSet<usize>>();
        let (made, trained) = (&with.calibration[180..][..258], &with.training[171..][..195]);
        assert!(lines(made).is_disjoint(&lines(&with.held_out)));
        assert!(lines(trained).is_disjoint(&lines(&with.held_out)));
        assert!(lines(trained).is_disjoint(&lines(&with.judges)));
        let enough = draw(&Wanted { tokens: 400, training: 100, ..wanted }, Some(&augmentation));
        assert_eq!(enough.augmented, Augmented::default());
    }

    #[test]
    fn lone_texts_are_cut_into_pairs_between_words() {
        let mut rng = StdRng::seed_from_u64(1);
        for text in ["a bc d", "é ü"] {
            let mut content = Content::Text { text: text.to_owned(), pair: None };
            cut_in_two(&mut content, &mut rng);
            let Content::Text { text: first, pair: Some(second) } = content else { panic!("a pair") };
            assert_eq!(format!("{first} {second}"), text);
        }
        let mut word = Content::Text { text: "word".to_owned(), pair: None };
        cut_in_two(&mut word, &mut rng);
        assert_eq!(word, Content::Text { text: "word".to_owned(), pair: None });
    }
}

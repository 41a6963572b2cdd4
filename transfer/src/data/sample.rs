//! Which sequences of a file are used.

use std::collections::HashSet;
use std::path::Path;

use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::made_up::any_length;
use super::reader::{Columns, Content, Example, Reader};
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
    /// Of those for statistics and for measuring, sequences that were cut to the longest length.
    pub truncated: usize,
    /// Whether they are pairs of texts.
    pub pairs: bool,
}

/// Of all tokens, this share goes into sequences of every length up to the longest, made by joining and cutting
/// neighbours: what the text lacks in lengths, the student would otherwise never have seen.
const EVERY_LENGTH: f64 = 0.125;
const TRAINING_SEED: u64 = 0x7ea1_7ea1;
/// One text in so many, up to a number, judges training and is not trained on.
const JUDGES: usize = 20;
const MOST_JUDGES: usize = 256;

/// Reads every example of a file, in order.
///
/// # Errors
/// The file or an example cannot be used, or there is none.
pub fn read_sequences(path: &Path, columns: &Columns, encoder: &TextEncoder) -> Result<Vec<Sequence>> {
    let sequences: Vec<Sequence> =
        Reader::open(path, columns)?.map(|e| encoder.encode(path, e?)).collect::<Result<_>>()?;
    if sequences.is_empty() {
        return Err(Error::data(path, "it holds no examples"));
    }
    Ok(sequences)
}

/// Draws sequences of a file, which is read once; only the examples drawn are kept.
///
/// # Errors
/// The file or an example cannot be used, or there is none.
pub fn draw_sample(
    path: &Path,
    columns: &Columns,
    encoder: &TextEncoder,
    wanted: &Wanted,
    seed: u64,
) -> Result<Sample> {
    // What is trained on is drawn apart, with random numbers of its own: it must not change what is calibrated and
    // measured on.
    let mut rng = StdRng::seed_from_u64(seed);
    let mut training_rng = StdRng::seed_from_u64(seed ^ TRAINING_SEED);
    // No example has fewer than three tokens worth having: enough are drawn whatever their length.
    let mut few = Reservoir::new(wanted.tokens / 3 + wanted.held_out + 1, seed);
    let enough = if wanted.training > 0 { wanted.training + wanted.held_out } else { 0 };
    let mut many = Reservoir::new(enough, seed ^ TRAINING_SEED);
    for example in Reader::open(path, columns)? {
        let example = example?;
        many.offer(&example);
        few.offer(&example);
    }
    let examples = few.seen;
    let mut drawn = few.drawn;
    if drawn.is_empty() {
        return Err(Error::data(path, "it holds no examples"));
    }
    drawn.shuffle(&mut rng);
    let held = wanted.held_out.min(examples / 10).min(drawn.len() - 1);
    let rest = drawn.split_off(held);
    let apart: HashSet<usize> = drawn.iter().map(|e| e.line).collect();
    many.drawn.retain(|e| !apart.contains(&e.line));
    many.drawn.shuffle(&mut training_rng);
    many.drawn.truncate(wanted.training);
    let pairs = rest.iter().any(|e| matches!(e.content, Content::Text { pair: Some(_), .. }));
    let encode = |mut example: Example, rng: &mut StdRng| {
        if wanted.lone_texts == LoneTexts::CutInTwo {
            cut_in_two(&mut example.content, rng);
        }
        encoder.encode(path, example)
    };
    let held_out: Vec<Sequence> = drawn.into_iter().map(|e| encode(e, &mut rng)).collect::<Result<_>>()?;
    let mut calibration: Vec<Sequence> = Vec::new();
    let mut count = 0;
    let natural = (wanted.tokens as f64 * (1.0 - EVERY_LENGTH)) as usize;
    for example in rest {
        if count >= natural {
            break;
        }
        let sequence = encode(example, &mut rng)?;
        count += sequence.ids.len();
        calibration.push(sequence);
    }
    let truncated = calibration.iter().chain(&held_out).filter(|s| s.truncated).count();
    let longest = encoder.longest();
    let with_every_length = |mut of: Vec<Sequence>, rng: &mut StdRng| {
        let tokens: usize = of.iter().map(|s| s.ids.len()).sum();
        let more = (tokens as f64 * EVERY_LENGTH / (1.0 - EVERY_LENGTH)) as usize;
        of.extend(every_length(&of, longest, more, rng));
        of
    };
    let calibration = with_every_length(calibration, &mut rng);
    let mut judges: Vec<Sequence> = Vec::new();
    let mut count = 0;
    for example in many.drawn {
        if count >= wanted.training_tokens {
            break;
        }
        let sequence = encode(example, &mut training_rng)?;
        count += sequence.ids.len();
        judges.push(sequence);
    }
    let training = judges.split_off((judges.len() / JUDGES).min(MOST_JUDGES));
    let training = with_every_length(training, &mut training_rng);
    Ok(Sample { calibration, training, judges, held_out, examples, truncated, pairs })
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
    use crate::data::Overlong;

    #[test]
    fn a_sample_is_seeded_holds_some_out_and_covers_every_length() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ids.jsonl");
        let line = |i: usize| format!("{{\"input_ids\": [1, {i}, {}, 2]}}\n", i + 1);
        std::fs::write(&path, (0..400).map(line).collect::<String>()).unwrap();
        let encoder = TextEncoder::new(None, 16, Overlong::Truncate).unwrap();
        let wanted =
            Wanted { tokens: 800, training: 300, training_tokens: usize::MAX, held_out: 20, ..Wanted::default() };
        let draw = |wanted: &Wanted, seed| draw_sample(&path, &Columns::default(), &encoder, wanted, seed).unwrap();
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

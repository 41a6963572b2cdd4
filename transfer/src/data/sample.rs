//! Which sequences of a file are used.

use std::path::Path;

use rand::seq::SliceRandom as _;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::made_up::any_length;
use super::reader::{Columns, Example, Reader};
use super::tokens::{Sequence, TextEncoder};
use crate::{Error, Result};

/// Sequences drawn from a file.
#[derive(Clone, Debug)]
pub struct Sample {
    /// For statistics.
    pub calibration: Vec<Sequence>,
    /// For measuring; none of them is among the others.
    pub held_out: Vec<Sequence>,
    /// Examples that the file holds.
    pub examples: usize,
    /// Sequences that were cut to the longest length.
    pub truncated: usize,
}

/// Of all tokens, this share goes into sequences of every length up to the longest, made by joining and cutting
/// neighbours: what the text lacks in lengths, the student would otherwise never have seen.
const EVERY_LENGTH: f64 = 0.125;

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

/// Draws sequences with about `tokens` tokens for calibration, and up to `held_out` more (a tenth of the file at most).
/// The file is read once; only the examples drawn are kept.
///
/// # Errors
/// The file or an example cannot be used, or there is none.
pub fn calibration_sample(
    path: &Path,
    columns: &Columns,
    encoder: &TextEncoder,
    tokens: usize,
    held_out: usize,
    seed: u64,
) -> Result<Sample> {
    let mut rng = StdRng::seed_from_u64(seed);
    // No example has fewer than three tokens worth having: enough are drawn whatever their length.
    let (mut drawn, examples) = draw(Reader::open(path, columns)?, tokens / 3 + held_out + 1, &mut rng)?;
    if drawn.is_empty() {
        return Err(Error::data(path, "it holds no examples"));
    }
    drawn.shuffle(&mut rng);
    let held = held_out.min(examples / 10).min(drawn.len() - 1);
    let rest = drawn.split_off(held);
    let held_out: Vec<Sequence> = drawn.into_iter().map(|e| encoder.encode(path, e)).collect::<Result<_>>()?;
    let mut calibration: Vec<Sequence> = Vec::new();
    let mut count = 0;
    let natural = (tokens as f64 * (1.0 - EVERY_LENGTH)) as usize;
    for example in rest {
        if count >= natural {
            break;
        }
        let sequence = encoder.encode(path, example)?;
        count += sequence.ids.len();
        calibration.push(sequence);
    }
    let truncated = calibration.iter().chain(&held_out).filter(|s| s.truncated).count();
    let more = (count as f64 * EVERY_LENGTH / (1.0 - EVERY_LENGTH)) as usize;
    calibration.extend(every_length(&calibration, encoder.longest(), more, &mut rng));
    Ok(Sample { calibration, held_out, examples, truncated })
}

/// Reservoir sampling: every example of the file is as likely to be drawn.
fn draw(reader: Reader, most: usize, rng: &mut StdRng) -> Result<(Vec<Example>, usize)> {
    let mut drawn: Vec<Example> = Vec::new();
    let mut seen = 0;
    for example in reader {
        let example = example?;
        seen += 1;
        if drawn.len() < most {
            drawn.push(example);
        } else {
            let slot = rng.random_range(0..seen);
            if slot < most {
                drawn[slot] = example;
            }
        }
    }
    Ok((drawn, seen))
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
        let sample = |seed| calibration_sample(&path, &Columns::default(), &encoder, 800, 20, seed).unwrap();
        let first = sample(1);
        assert_eq!((first.examples, first.held_out.len(), first.truncated), (400, 20, 0));
        let tokens: usize = first.calibration.iter().map(|s| s.ids.len()).sum();
        assert!((790..=820).contains(&tokens), "{tokens}");
        assert!(first.calibration.iter().any(|s| s.ids.len() > 12));
        let held: Vec<usize> = first.held_out.iter().map(|s| s.line).collect();
        assert!(first.calibration.iter().filter(|s| s.ids.len() == 4).all(|s| !held.contains(&s.line)));
        assert_eq!(sample(1).calibration, first.calibration);
        assert_ne!(sample(2).calibration, first.calibration);
    }
}

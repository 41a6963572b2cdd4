//! How a student fares on texts that are longer than it is fitted to: hinges are bound to no length.

use std::collections::HashSet;

use serde::Serialize;

use super::Job;
use super::measure::{Reference, outputs};
use crate::Result;
use crate::compare::OutputDistance;
use crate::data::{DataFile, Overlong, Reader, Sequence, TextEncoder};

/// Texts that are tried, and tokens of them, at most.
const MOST: usize = 64;
const MOST_TOKENS: usize = 24_576;

/// The student against its teacher on texts beyond the longest sequence that it is fitted to: some of those that were kept
/// apart and cut, as far as the model takes them.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct BeyondReport {
    /// Texts.
    pub sequences: usize,
    /// Tokens of the shortest.
    pub shortest: usize,
    /// And of the longest.
    pub longest: usize,
    /// How far the outputs are.
    pub outputs: Vec<OutputDistance>,
}

impl BeyondReport {
    pub(super) fn new(reference: &Reference, student: &mabert_runtime::Model) -> Result<Self> {
        let lengths = || reference.batches.iter().flat_map(|batch| batch.lengths.iter().copied());
        Ok(Self {
            sequences: reference.count(),
            shortest: lengths().min().unwrap_or(0),
            longest: lengths().max().unwrap_or(0),
            outputs: reference.distances(&outputs(student, &reference.batches)?)?,
        })
    }
}

/// Those of `held_out` that were cut, up to `longest` tokens: they are read once more.
///
/// # Errors
/// As of reading the job's data.
pub(super) fn longer_texts(job: &Job, held_out: &[Sequence], longest: usize) -> Result<Vec<Sequence>> {
    let cut: HashSet<usize> = held_out.iter().filter(|s| s.truncated).map(|s| s.line).take(MOST).collect();
    let Some(data) = job.data.as_ref().filter(|_| !cut.is_empty()) else { return Ok(Vec::new()) };
    let file = DataFile::open(data)?;
    let encoder = TextEncoder::new(job.tokenizer.as_deref(), longest, Overlong::Truncate)?;
    let mut texts = Vec::new();
    let mut tokens = 0;
    for example in Reader::new(&file)? {
        let example = example?;
        if texts.len() == cut.len() || tokens >= MOST_TOKENS {
            break;
        }
        if cut.contains(&example.line) {
            let text = encoder.encode(file.path(), example)?;
            tokens += text.ids.len();
            texts.push(text);
        }
    }
    Ok(texts)
}

//! Which sequences a student is calibrated, trained and measured on.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{Data, Job};
use crate::data::{
    Columns, LoneTexts, Reader, Sample, Sequence, TextEncoder, Vocabulary, Wanted, draw_sample, made_up_sequences,
    odd_sequences,
};
use crate::{Error, Result, Setting, evaluate};

/// Tokens that go through the student where no number is asked for: of text, and made up.
pub const DEFAULT_TOKENS: (usize, usize) = (40_000, 12_000);
/// Sequences kept apart to measure the outputs on.
const HELD_OUT: usize = 256;
/// Where sequences are made up, those kept apart are drawn with another seed.
pub(super) const HELD_OUT_SEED: u64 = 0x5eed;
const TRAINING_SEED: u64 = 0x7ea1;
/// Tokens that are made up to train on, at most.
const MOST_MADE_UP: usize = 1 << 22;
/// One in so many sequences of the full stage is no text: what text has next to nothing of must stay finite.
const ODD: usize = 20;

/// Where calibration came from.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Source {
    /// The data file; `None` for made-up tokens.
    pub file: Option<PathBuf>,
    /// Examples that it holds.
    pub examples: usize,
    /// Sequences that went through the student.
    pub sequences: usize,
    /// Sequences that the full stage drew from.
    pub training: usize,
    /// Sequences kept apart to measure on.
    pub held_out: usize,
    /// Texts that were cut to the longest length.
    pub truncated: usize,
}

/// What a job runs on.
pub(super) struct Sequences {
    pub(super) source: Source,
    /// For the closed form and blockwise.
    pub(super) calibration: Vec<Sequence>,
    /// For the full stage, and to judge it; empty where there is none.
    pub(super) training: Vec<Sequence>,
    pub(super) judges: Vec<Sequence>,
    /// For measuring.
    pub(super) held_out: Vec<Sequence>,
}

/// How many sequences the full stage draws, and the positions that they have at most; none without that stage.
struct TrainingSize {
    sequences: usize,
    positions: usize,
}

impl Sequences {
    pub(super) fn new(job: &Job, encoder: &TextEncoder, vocabulary: &Vocabulary) -> Result<Self> {
        let (sequences, positions) = job.transfer.full().map_or((0, 0), |stage| stage.options.worth_drawing());
        let size = TrainingSize { sequences, positions };
        match &job.data {
            None => Ok(Self::made_up(job, encoder.longest(), vocabulary, &size)),
            Some(data) => Self::of_text(job, data, encoder, vocabulary, &size),
        }
    }

    /// Random tokens, of every length.
    fn made_up(job: &Job, max_seq: usize, vocabulary: &Vocabulary, size: &TrainingSize) -> Self {
        let draw = |tokens, seed| made_up_sequences(vocabulary, max_seq, tokens, seed);
        let mut calibration = draw(job.calibration_tokens.unwrap_or(DEFAULT_TOKENS.1), job.seed);
        // Half of the longest length on average; each is seen again where there are fewer than wanted.
        let training_tokens = (size.sequences * max_seq / 2).min(size.positions).min(MOST_MADE_UP);
        let mut judges = draw(training_tokens, job.seed ^ TRAINING_SEED);
        let training = judges.split_off(judges.len() / 20);
        calibration.extend(odd_sequences(vocabulary, max_seq, job.seed));
        let held_out = draw(32 * max_seq, job.seed ^ HELD_OUT_SEED);
        let source = Source {
            file: None,
            examples: 0,
            sequences: calibration.len(),
            training: training.len(),
            held_out: held_out.len(),
            truncated: 0,
        };
        Self { source, calibration, training, judges, held_out }
    }

    /// Texts of the job's files, with some of what text has next to nothing of.
    fn of_text(
        job: &Job,
        data: &Data,
        encoder: &TextEncoder,
        vocabulary: &Vocabulary,
        size: &TrainingSize,
    ) -> Result<Self> {
        let tokens = job.calibration_tokens.unwrap_or(DEFAULT_TOKENS.0);
        let wanted = Wanted {
            tokens,
            training: size.sequences,
            training_tokens: size.positions,
            held_out: HELD_OUT,
            lone_texts: LoneTexts::Whole,
        };
        let mut sample = draw_sample(&data.path, &data.columns, encoder, &wanted, job.seed)?;
        check_labels(&data.path, &sample)?;
        check_ids(&data.path, vocabulary, [&sample.calibration, &sample.training, &sample.judges, &sample.held_out])?;
        let share = |count: usize| count.div_ceil(job.extra_data.len().max(1));
        // As much again as there is of the task's own.
        let wanted_more = Wanted {
            tokens: share(tokens),
            training: share(sample.training.len()),
            training_tokens: share(size.positions),
            held_out: 0,
            lone_texts: if sample.pairs { LoneTexts::CutInTwo } else { LoneTexts::Whole },
        };
        for (at, file) in job.extra_data.iter().enumerate() {
            let seed = job.seed ^ (at as u64 + 1);
            let more = draw_sample(file, &extra_columns(file, data), encoder, &wanted_more, seed)?;
            check_ids(file, vocabulary, [&more.calibration, &more.training])?;
            sample.calibration.extend(more.calibration);
            sample.training.extend(more.training);
        }
        let odd = odd_sequences(vocabulary, encoder.longest(), job.seed);
        Ok(Self::with_odd(sample, odd, data))
    }

    fn with_odd(sample: Sample, odd: Vec<Sequence>, data: &Data) -> Self {
        let Sample { mut calibration, mut training, judges, held_out, examples, truncated, .. } = sample;
        // A file of a few texts leaves none to keep apart: then it is measured on what it was calibrated on.
        let held_out = if held_out.is_empty() { calibration.clone() } else { held_out };
        let odd_count = training.len().div_ceil(ODD);
        training.extend(odd.iter().cycle().take(odd_count).cloned());
        calibration.extend(odd);
        let source = Source {
            file: Some(data.path.clone()),
            examples,
            sequences: calibration.len(),
            training: training.len(),
            held_out: held_out.len(),
            truncated,
        };
        Self { source, calibration, training, judges, held_out }
    }
}

/// Refuses labels that are no numbers. What was joined and cut of several texts has none.
fn check_labels(file: &Path, sample: &Sample) -> Result<()> {
    let trained = sample.training.iter().chain(&sample.judges);
    let labelled: Vec<Sequence> = trained.filter(|s| s.label.is_some()).cloned().collect();
    evaluate::labels(file, &labelled).map(drop)
}

/// The task's columns where a file of the same kind has them too; the usual ones elsewhere.
fn extra_columns(file: &Path, data: &Data) -> Columns {
    let columns = Columns { label: None, classes: Vec::new(), ..data.columns.clone() };
    let alike = file.extension() == data.path.extension();
    let first = || Reader::open(file, &columns).ok().and_then(|mut reader| reader.next());
    if alike && matches!(first(), Some(Ok(_))) { columns } else { Columns::default() }
}

fn check_ids<'s>(file: &Path, vocabulary: &Vocabulary, all: impl IntoIterator<Item = &'s Vec<Sequence>>) -> Result<()> {
    for sequence in all.into_iter().flatten() {
        if let Some(id) = sequence.ids.iter().find(|id| !vocabulary.holds(**id)) {
            let size = vocabulary.size;
            let reason =
                format!("token id {id} is outside the model's vocabulary of {size}: is the tokenizer this model's?");
            return Err(Error::line(file, sequence.line, reason));
        }
    }
    Ok(())
}

/// As many token ids as the table of word embeddings has rows; and the tokenizer's special tokens.
pub(super) fn vocabulary(size: usize, encoder: &TextEncoder) -> Result<Vocabulary> {
    let vocabulary = Vocabulary { size, frame: encoder.frame()? };
    let (before, after) = &vocabulary.frame;
    match before.iter().chain(after).find(|id| !vocabulary.holds(**id)) {
        Some(id) => {
            let reason = format!(
                "the tokenizer's special token {id} is outside the model's vocabulary of {size}: is it this model's?"
            );
            Err(Error::setting(reason, &[Setting::Tokenizer]))
        }
        None => Ok(vocabulary),
    }
}

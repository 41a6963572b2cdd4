//! Which sequences a student is calibrated, trained and measured on.

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::Job;
use crate::data::{
    Augmentation, Augmented, Columns, Data, DataFile, DataFormat, LoneTexts, Reader, Sample, Sequence, TextEncoder,
    Unknown, Vocabulary, Wanted, check_ids, draw_sample, made_up_sequences, odd_sequences,
};
use crate::full::Labels;
use crate::pooling::Pooling;
use crate::{Error, Result, Setting, evaluate};

/// Tokens that go through the student where no number is asked for: of text, and made up.
pub const DEFAULT_TOKENS: (usize, usize) = (40_000, 12_000);
/// The same of text for a feature model: a text's vector is one, however many tokens it has, and few are learnt by heart.
pub const VECTOR_TOKENS: usize = 160_000;
/// Sequences kept apart to measure the outputs on: fewer where they are long, so that measuring takes no longer than
/// calibrating, but never fewer than the least.
const HELD_OUT: usize = 256;
const LEAST_HELD_OUT: usize = 64;
const HELD_OUT_TOKENS: usize = 32_768;
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
    /// Sequences that are measured on.
    pub held_out: usize,
    /// Whether these were kept apart; a file of a few texts leaves none to keep.
    pub kept_apart: bool,
    /// Rows of the file that were left out, as they have no text.
    pub skipped: usize,
    /// Texts that were cut to the longest length.
    pub truncated: usize,
    /// Of the sequences and of those to train on, how many were made of others, as the text is little.
    pub augmented: Augmented,
}

/// What a job runs on.
pub(super) struct Sequences {
    pub(super) source: Source,
    /// For the closed form and blockwise.
    pub(super) calibration: Vec<Sequence>,
    /// For the full stage, and to judge it; empty where there is none.
    pub(super) training: Vec<Sequence>,
    pub(super) judges: Vec<Sequence>,
    /// What the labels of these are, where they count.
    pub(super) labels: Option<Labels>,
    /// For measuring.
    pub(super) held_out: Vec<Sequence>,
    /// What makes it doubtful that they mean anything.
    pub(super) notes: Vec<String>,
}

/// How much text is drawn.
struct Size {
    /// Tokens to calibrate on.
    calibration: usize,
    /// How many sequences the full stage draws, and the positions that they have at most; none without that stage.
    sequences: usize,
    positions: usize,
}

impl Sequences {
    /// More is made of little text with the `augmentation`, unless the job does without. `pooling` makes
    /// vectors of texts of what a feature model gives.
    pub(super) fn new(
        job: &Job,
        encoder: &TextEncoder,
        vocabulary: &Vocabulary,
        augmentation: &Augmentation<'_>,
        pooling: Option<Pooling>,
    ) -> Result<Self> {
        let (sequences, positions) = job.transfer.full().map_or((0, 0), |stage| stage.options.worth_drawing());
        let tokens = if pooling.is_some() { VECTOR_TOKENS } else { DEFAULT_TOKENS.0 };
        let calibration = job.calibration_tokens.unwrap_or(tokens);
        let size = Size { calibration, sequences, positions };
        match &job.data {
            None => Ok(Self::made_up(job, encoder.longest(), vocabulary, &size)),
            Some(data) => {
                let augmentation = job.augmentation.then_some(augmentation);
                Self::of_text(job, data, encoder, vocabulary, (&size, augmentation))
            }
        }
    }

    /// Random tokens, of every length.
    fn made_up(job: &Job, max_seq: usize, vocabulary: &Vocabulary, size: &Size) -> Self {
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
            kept_apart: true,
            skipped: 0,
            truncated: 0,
            augmented: Augmented::default(),
        };
        Self { source, calibration, training, judges, labels: None, held_out, notes: Vec::new() }
    }

    /// Texts of the job's files, with some of what text has next to nothing of.
    fn of_text(
        job: &Job,
        data: &Data,
        encoder: &TextEncoder,
        vocabulary: &Vocabulary,
        (size, augmentation): (&Size, Option<&Augmentation<'_>>),
    ) -> Result<Self> {
        let tokens = size.calibration;
        let wanted = Wanted {
            tokens,
            training: size.sequences,
            training_tokens: size.positions,
            held_out: HELD_OUT,
            lone_texts: LoneTexts::Whole,
        };
        let opened = DataFile::open(data)?;
        let trains_on_labels = job.full_options().is_some_and(|options| options.alpha < 1.0);
        let opened = if trains_on_labels { evaluate::with_label(opened)? } else { opened };
        let mut sample = draw_sample(&opened, encoder, &wanted, augmentation, job.seed)?;
        let labels = trains_on_labels.then(|| labels(&opened, encoder, &mut sample)).transpose()?;
        let drawn = [&sample.calibration, &sample.training, &sample.judges, &sample.held_out];
        check_ids(&data.path, vocabulary.size, drawn.into_iter().flatten())?;
        let mut notes = opened.notes();
        notes.extend(doubts(&data.path, &sample, encoder)?);
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
            let opened = open_extra(file, data, opened.format())?;
            let more = draw_sample(&opened, encoder, &wanted_more, None, seed)?;
            check_ids(file, vocabulary.size, more.calibration.iter().chain(&more.training))?;
            notes.extend(opened.notes());
            notes.extend(more.skipped.note(file));
            notes.extend(Unknown::count(&more.calibration, encoder)?.note(file));
            sample.calibration.extend(more.calibration);
            sample.training.extend(more.training);
        }
        let odd = odd_sequences(vocabulary, encoder.longest(), job.seed);
        Ok(Self { labels, ..Self::with_odd(sample, odd, data, notes) })
    }

    fn with_odd(sample: Sample, odd: Vec<Sequence>, data: &Data, notes: Vec<String>) -> Self {
        let Sample { mut calibration, mut training, judges, held_out, examples, skipped, truncated, augmented, .. } =
            sample;
        // A file of a few texts leaves none to keep apart: then it is measured on what it was calibrated on.
        let kept_apart = !held_out.is_empty();
        let mut held_out = if kept_apart { held_out } else { calibration.clone() };
        let ends = held_out.iter().scan(0, |tokens, sequence| {
            *tokens += sequence.ids.len();
            Some(*tokens)
        });
        let within = ends.take_while(|tokens| *tokens <= HELD_OUT_TOKENS).count();
        held_out.truncate(within.max(LEAST_HELD_OUT));
        let odd_count = training.len().div_ceil(ODD);
        training.extend(odd.iter().cycle().take(odd_count).cloned());
        calibration.extend(odd);
        let source = Source {
            file: Some(data.path.clone()),
            examples,
            sequences: calibration.len(),
            training: training.len(),
            held_out: held_out.len(),
            kept_apart,
            skipped: skipped.rows,
            truncated,
            augmented,
        };
        Self { source, calibration, training, judges, labels: None, held_out, notes }
    }
}

/// The labels to train on, tags as numbers. What was joined and cut of several texts has none.
fn labels(file: &DataFile, encoder: &TextEncoder, sample: &mut Sample) -> Result<Labels> {
    evaluate::number_tags(file, encoder, sample.training.iter_mut().chain(&mut sample.judges))?;
    Labels::new(file.path(), sample.training.iter().chain(&sample.judges))
}

/// Refuses a sample of which nothing can be learnt, and says what makes it doubtful that something can.
fn doubts(file: &Path, sample: &Sample, encoder: &TextEncoder) -> Result<Vec<String>> {
    const FEW: usize = 10;
    let Sample { examples, different, repeated, .. } = sample;
    let (examples, different, repeated, measured) = (*examples, *different, *repeated, sample.held_out.len());
    match (examples, different) {
        (1, _) => return Err(Error::data(file, "it holds one text: nothing can be learnt of it, nor measured on it")),
        (_, 1) => {
            let reason = format!("its {examples} texts are all the same: nothing can be learnt of one text");
            return Err(Error::data(file, reason));
        }
        _ => {}
    }
    let unknown = Unknown::count(sample.calibration.iter().chain(&sample.held_out), encoder)?;
    unknown.refuse_too_many(file)?;
    let few = (different < FEW).then(|| format!("only {different} of its {examples} texts are different"));
    let none_apart = (measured == 0).then(|| {
        format!("of its {examples} texts none is kept apart: the student is measured on what it is calibrated on")
    });
    let seen = (repeated > 0 && repeated * 10 >= measured).then(|| {
        format!("{repeated} of the {measured} texts that are kept apart are among those that it is calibrated on too")
    });
    let said = [few, none_apart, seen].into_iter().flatten().map(|note| format!("{}: {note}", file.display()));
    Ok(said.chain(sample.skipped.note(file)).chain(unknown.note(file)).collect())
}

/// A file of more text: of the task's columns where it is of the same kind and has them too, of the usual ones elsewhere.
fn open_extra(file: &Path, data: &Data, format: DataFormat) -> Result<DataFile> {
    // What the task's file was said to be is said of a file without an ending, too.
    let said = data.format.filter(|_| DataFormat::from_name(file).is_none());
    let opened = DataFile::open(&Data::new(file).format(said))?;
    let columns = Columns { label: None, classes: Vec::new(), ..data.columns.clone() };
    let opened = opened.with_columns(columns);
    let has_columns =
        opened.format() == format && matches!(Reader::new(&opened).map(|mut r| r.next()), Ok(Some(Ok(_))));
    Ok(if has_columns { opened } else { opened.with_columns(Columns::default()) })
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

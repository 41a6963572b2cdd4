//! What comes before the student: the teacher, recognised and measured, and the text.

use std::collections::BTreeMap;
use std::time::Instant;

use mabert_graph::Model;
use mabert_passes::inputs::EncoderInputs;
use mabert_passes::lower::refuse_unusable_weights;
use mabert_passes::lower::{ApproximatorOptions, Form, HingeSizes};
use mabert_passes::pipeline::{Pass, PassOptions, Rewriting};
use mabert_passes::recognise::PROBED;
use mabert_passes::recording::{check_sizes, longest_sequence};
use mabert_runtime::{LoadOptions, Model as Runnable};

use super::beyond::longer_texts;
use super::measure::{DevSet, Reference, pooling};
use super::origin::{StartStudent, checkpoint};
use super::quantised::{Dequantised, in_single_precision};
use super::sequences::{HELD_OUT_SEED, Sequences, Source, vocabulary};
use super::softmax::first_form;
use super::stages::{Record, Transferring};
use super::{DEFAULT_HIDDEN, DEFAULT_MAX_SEQ, EXACT, Job, Transfer};
use crate::data::{Augmentation, Batch, BatchShape, Overlong, Sequence, TextEncoder, batches, odd_sequences};
use crate::full::{self, Checkpoint};
use crate::pooling::{Pooling, table_columns};
use crate::progress::Progress;
use crate::{Error, Result, Setting};

/// Positions of one batch, and rows at most.
const BATCH_TOKENS: usize = 1024;
const BATCH_ROWS: usize = 64;
/// Several times what a head has a use for; much more would fill any machine's memory.
const MOST_HIDDEN: usize = 4096;
/// Longer sequences than any encoder of the family was trained for, by far.
const MOST_SEQ: usize = 1 << 16;
/// Students of hinges take what their teachers take; it is tried up to so many tokens, or to what is asked for.
const MOST_POSITIONS: usize = 1024;
/// Batches on which the model in canonical form is compared with itself.
const CANONICAL_BATCHES: usize = 4;

/// A job before there is a student.
pub(super) struct Prepared<'j> {
    pub(super) context: Context<'j>,
    pub(super) rewriting: Rewriting,
    pub(super) start: Option<StartStudent>,
    pub(super) checkpoint: Option<Checkpoint>,
}

/// What a job holds from its beginning to its report.
pub(super) struct Context<'j> {
    pub(super) job: &'j Job,
    pub(super) progress: &'j dyn Progress,
    pub(super) begun: Instant,
    /// The model's file, for messages.
    pub(super) origin: String,
    pub(super) operators_before: BTreeMap<String, usize>,
    /// Where it is quantised.
    pub(super) dequantised: Option<Dequantised>,
    /// How far the model in canonical form is from itself, relative to outputs above 1.
    pub(super) canonical_change: f64,
    pub(super) texts: Texts,
    pub(super) reference: Reference,
    /// The same on texts that are longer than the student is fitted to, where it takes them and there are any.
    pub(super) beyond: Option<Reference>,
    /// How users of a feature model make vectors of texts.
    pub(super) pooling: Option<Pooling>,
    /// What a user should know of the data and the tokenizer.
    pub(super) notes: Vec<String>,
}

/// What the student is made from and tried on.
pub(super) struct Texts {
    pub(super) source: Source,
    /// For the closed form and blockwise.
    pub(super) calibration: Vec<Batch>,
    /// For the full stage, and to judge it; empty where there is none.
    training: Vec<Sequence>,
    judges: Vec<Sequence>,
    labels: Option<full::Labels>,
    /// Unlike text, and not calibrated on.
    pub(super) odd: Vec<Batch>,
    /// What the model's inputs ask of batches.
    shape: BatchShape,
}

impl Texts {
    /// What the full stage works on.
    pub(super) fn training_data(&self) -> full::TrainingData<'_> {
        let Self { training: sequences, judges, labels, shape, .. } = self;
        full::TrainingData { sequences, judges, labels: labels.as_ref(), shape: shape.clone() }
    }
}

impl<'j> Prepared<'j> {
    /// Checks that the job can be done with the model, draws the text and measures the teacher.
    pub(super) fn new(model: Model, job: &'j Job, progress: &'j dyn Progress) -> Result<Self> {
        let begun = Instant::now();
        progress.begin("prepare", 3);
        let operators_before = model.operators();
        let (model, original) = in_single_precision(model)?;
        let runnable = LoadOptions::default().prepare(&model)?;
        let inputs = EncoderInputs::new(&model, &job.input_roles)?;
        check_sizes(&model, &inputs, &runnable, PROBED)?;
        let start = job.start().map(StartStudent::load).transpose()?;
        let options = match &start {
            Some(start) => PassOptions { bounds: start.options.bounds && job.bounds, ..start.options.clone() },
            None => pass_options(job, lengths(&inputs, &runnable, job)?)?,
        };
        progress.step("loaded");
        let encoder = TextEncoder::new(job.tokenizer.as_deref(), options.approximator.max_seq, Overlong::Truncate)?;
        let Some(words) = inputs.vocabulary() else {
            // What the recogniser says of such a model comes first.
            drop(runnable);
            Rewriting::new(model, options)?;
            return Err(no_word_table(&inputs));
        };
        let vocabulary = vocabulary(words, &encoder)?;
        let checkpoint = checkpoint(&model, job)?;
        let rows = vocabulary.size;
        let features = job.features(model.origin()).channels(table_columns(&model, rows));
        let pooling = pooling(&runnable, &inputs, &features, encoder.longest())?;
        let Sequences { source, calibration, training, judges, labels, held_out, notes: of_texts } =
            Sequences::new(job, &encoder, &vocabulary, &Augmentation::new(|| Ok(inputs.word_table(&model)?)), pooling)?;
        let odd = odd_sequences(&vocabulary, encoder.longest(), job.seed ^ HELD_OUT_SEED);
        let beyond = match options.approximator.longest() {
            longest if longest > encoder.longest() => longer_texts(job, &held_out, longest)?,
            _ => Vec::new(),
        };
        let pad = Some(encoder.pad()).filter(|id| vocabulary.holds(*id));
        let shape = BatchShape { pad: pad.unwrap_or(0), ..BatchShape::new(&inputs) };
        let [calibration, held_out, odd, beyond] =
            [calibration, held_out, odd, beyond].map(|s| batches(&s, BATCH_TOKENS, BATCH_ROWS, &shape));
        let origin = model.origin().to_owned();
        // Where the outputs are not finite, a weight that is not says why.
        let named = |fault: Error| refuse_unusable_weights(&model).map_or_else(Error::from, |()| fault);
        let mut reference = Reference::new(&origin, &runnable, held_out, features.clone()).map_err(named)?;
        let beyond = Some(beyond).filter(|texts| !texts.is_empty());
        let mut beyond = beyond.map(|texts| Reference::new(&origin, &runnable, texts, features.clone())).transpose()?;
        let dev_set = |dev| DevSet::new(dev, &encoder, rows, &runnable, &shape, &features);
        reference.dev = job.dev.as_ref().map(dev_set).transpose()?;
        let mut notes: Vec<String> =
            inputs.disagreement().map(|told| format!("{origin}: {told}")).into_iter().collect();
        notes.extend(encoder.notes(rows)?);
        notes.extend(of_texts);
        notes.extend(reference.dev.iter().flat_map(|dev| dev.notes.clone()));
        notes.iter().for_each(|note| progress.summary(&format!("note: {note}")));
        // Large models are held as few times as possible: nothing prepared is kept longer than it runs.
        drop(runnable);
        progress.step("teacher measured");
        let dequantised = original.map(|original| original.measure(&reference)).transpose()?;
        let rewriting = Rewriting::new(model, options)?;
        let canonical_change = canonical_change(&reference, &rewriting)?;
        let features = features.channels(Some(rewriting.encoder.channels));
        if let Some(beyond) = &mut beyond {
            beyond.features = features.clone();
        }
        reference.features = features;
        let texts = Texts { source, calibration, training, judges, labels, odd, shape };
        let context = Context {
            job,
            progress,
            begun,
            origin,
            operators_before,
            dequantised,
            canonical_change,
            texts,
            reference,
            beyond,
            pooling,
            notes,
        };
        Ok(Self { context, rewriting, start, checkpoint })
    }

    /// Makes the student, its parameters not yet found.
    pub(super) fn approximate(self) -> Result<Transferring<'j>> {
        let Self { context, rewriting, start, checkpoint } = self;
        let student = rewriting.approximate()?;
        context.progress.step("recognised");
        context.progress.end();
        let calibrates = context.job.transfer != Transfer::None && student.ran(Pass::Canonical);
        Ok(Transferring { context, rewriting, student, start, checkpoint, record: Record::new(calibrates) })
    }
}

/// The passes that make the teacher canonical are exact: a few batches show where one is not.
fn canonical_change(reference: &Reference, rewriting: &Rewriting) -> Result<f64> {
    let change = reference.teacher_change(&rewriting.teacher, CANONICAL_BATCHES)?;
    match change > EXACT {
        false => Ok(change),
        true => {
            let reason = format!("the model in canonical form differs from itself by {change:.1e} of its size");
            Err(Error::check(reason))
        }
    }
}

/// Without the table of words it is not known which token ids there are, and nothing can be calibrated.
fn no_word_table(inputs: &EncoderInputs) -> Error {
    let reason = "the table of word embeddings, which its token ids index, was not found".to_owned();
    mabert_passes::Error::NotBert { origin: inputs.origin().to_owned(), reason }.into()
}

/// How the passes are told to work.
fn pass_options(job: &Job, Lengths { max_seq, positions }: Lengths) -> Result<PassOptions> {
    let hidden = job.hidden.unwrap_or(max_seq.min(DEFAULT_HIDDEN));
    if !(1..=MOST_HIDDEN).contains(&hidden) {
        let reason = format!("the hidden size of the approximators must be from 1 to {MOST_HIDDEN}, not {hidden}");
        return Err(Error::setting(reason, &[Setting::Hidden]));
    }
    let approximator = ApproximatorOptions {
        max_seq,
        positions,
        form: first_form(job)?,
        hinges: HingeSizes::default(),
        hidden,
        sharing: job.sharing,
        length_tables: job.length_tables,
    };
    Ok(PassOptions {
        approximator,
        forms: Vec::new(),
        order: job.order,
        keep: job.keep,
        fold: job.fold,
        bounds: job.bounds,
        until: job.until,
        partial: job.partial,
    })
}

/// How long sequences may be.
struct Lengths {
    /// The longest that the student is fitted to.
    max_seq: usize,
    /// The longest that the teacher takes, as far as it is tried.
    positions: usize,
}

/// What the student is fitted to, and what hinges will take beyond.
fn lengths(inputs: &EncoderInputs, runnable: &Runnable, job: &Job) -> Result<Lengths> {
    let max_seq = max_seq(inputs, runnable, job.max_seq)?;
    let is_bound = first_form(job)? == Form::Network || BatchShape::new(inputs).length.is_some();
    let positions = match is_bound {
        true => max_seq,
        false => longest_sequence(inputs, runnable, MOST_POSITIONS.max(max_seq))?.0,
    };
    Ok(Lengths { max_seq, positions })
}

/// The longest sequence that the student will be fitted to: what was asked for, if the model can do it.
fn max_seq(inputs: &EncoderInputs, runnable: &Runnable, wanted: Option<usize>) -> Result<usize> {
    let fault = |reason: String| Error::setting(reason, &[Setting::MaxSeq]);
    // One position leaves no room for text between [CLS] and [SEP], and nothing to attend to.
    if let Some(n) = wanted.filter(|n| !(2..=MOST_SEQ).contains(n)) {
        return Err(fault(format!("the longest sequence must be of 2 to {MOST_SEQ} tokens, not {n}")));
    }
    if let Some(fixed) = BatchShape::new(inputs).length {
        return match wanted {
            Some(n) if n != fixed => {
                Err(fault(format!("a longest sequence of {n}: the model's inputs have a fixed length of {fixed}")))
            }
            _ => Ok(fixed),
        };
    }
    match (longest_sequence(inputs, runnable, wanted.unwrap_or(DEFAULT_MAX_SEQ))?, wanted) {
        ((limit, Some(limited_by)), Some(n)) => {
            Err(fault(format!("a longest sequence of {n} is beyond the model's limit of {limit} ({limited_by})")))
        }
        ((longest, _), _) => Ok(longest),
    }
}

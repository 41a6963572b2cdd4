//! The full stage: gradient steps on all parameters of the encoder and the head at once, from tokens to outputs.
//!
//! The loss is the distance of the outputs from the teacher's, with the hidden states at every norm to guide the layers
//! (Neo et al. 2023), and labels where they are wanted. Nothing normalises the student's activations, so
//! the rates are small, gradients are clipped, and steps that are not finite are left out.

mod checkpoint;
mod course;
mod criterion;
mod labels;
mod losses;
mod options;
mod pair;
mod parameters;
mod plan;
mod report;
mod text_vectors;
mod variance;

use std::time::{Duration, Instant};

use mabert_passes::pipeline::{Rewriting, Student};

pub use checkpoint::{CHECKPOINT_FILES, Checkpoint};
pub use course::Judgement;
pub use labels::Labels;
pub use losses::Losses;
pub use options::{DEFAULT_CHANNELS, DEFAULT_POSITIONS, DEFAULT_RATE, FullOptions};
pub use parameters::adopt;
pub use report::{Ended, FullReport, SiteChange};

use crate::data::{BatchShape, Sequence};
use crate::gradient::{AdamW, Buffers, device_name};
use crate::pooling::Features;
use crate::progress::Progress;
use crate::{Error, Result, Setting};
use course::{Course, JUDGEMENTS};
use pair::{PIECE, Pair, Piece};

/// More sequences are not needed to judge what was gained.
const MOST_JUDGES: usize = 256;
/// Steps that tell how long one takes.
const TRIED: usize = 4;

/// What the student is trained on.
#[derive(Clone)]
pub struct TrainingData<'d> {
    /// The sequences.
    pub sequences: &'d [Sequence],
    /// Others that tell whether anything was gained. Where there are none, the sequences tell themselves.
    pub judges: &'d [Sequence],
    /// What their labels are, where [`FullOptions::alpha`] is below 1.
    pub labels: Option<&'d Labels>,
    /// The sizes that the teacher's inputs fix.
    pub shape: BatchShape,
}

/// The stage, ready to be gone through.
pub struct Training<'t> {
    /// The teacher, in canonical form.
    pub rewriting: &'t Rewriting,
    /// The texts.
    pub data: TrainingData<'t>,
    /// How it works.
    pub options: &'t FullOptions,
    /// What makes vectors of texts of the outputs, where the teacher is a feature model.
    pub features: &'t Features,
}

impl Training<'_> {
    /// Whether [`train`](Self::train) can do its work, told by running it on a few sequences: asked before the long stages
    /// that come first.
    ///
    /// # Errors
    /// As [`train`](Self::train).
    pub fn rehearse(&self, student: &Student) -> Result<()> {
        self.usable()?;
        let few = &self.data.sequences[..self.data.sequences.len().min(4)];
        let pair =
            Pair::new(&Training { data: TrainingData { sequences: few, ..self.data.clone() }, ..*self }, student)?;
        self.data.sequences.iter().chain(self.data.judges).try_for_each(|s| pair.criterion.label(s).map(drop))?;
        // Not calibrated yet, it may overflow: only that everything can be computed and differentiated counts.
        let pieces = pair.pieces(few, PIECE, few.len())?;
        let buffers = Buffers::default();
        pair.gradient(&buffers, &pieces[..1], &pair.totals(&pieces[..1])).map(drop)
    }

    /// Trains `student`, whose parameters were found before and which is not yet finished.
    ///
    /// # Errors
    /// A part of teacher or student cannot be run or differentiated, more than a twentieth of the steps is not finite, or
    /// a checkpoint cannot be read or written.
    pub fn train(
        &self,
        student: &mut Student,
        checkpoint: Option<&Checkpoint>,
        progress: &dyn Progress,
    ) -> Result<FullReport> {
        let start = Instant::now();
        let usable = self.usable()?;
        let pair = Pair::new(self, student)?;
        let judges = self.judges(&pair)?;
        let before = pair.losses(&judges)?;
        let total = |losses: &Losses| losses.total(&pair.criterion.weights);
        let state = checkpoint.map(Checkpoint::state).transpose()?.flatten();
        let planned = match (&state, self.options.time) {
            // Another build may plan other steps where no number was asked for.
            (Some(state), None) if state.planned != self.options.steps => return Err(state.broken()),
            (Some(state), _) => state.planned,
            (None, None) => self.options.steps,
            // What steps cost is told by steps, which change nothing.
            (None, Some(time)) => self.steps_in(time, &usable, &pair, &judges)?,
        };
        let plan = plan::plan(&usable, self.data.sequences, self.options, planned);
        let drawn: usize = plan.iter().map(Vec::len).sum();
        let rate = self.options.rate_for(drawn as f32 / usable.len() as f32, self.rewriting.encoder.channels);
        let mut adam = pair.optimizer(student, rate, self.options.weight_decay)?;
        let mut course = Course::new(&adam, total(&before), self.options.time);
        if let Some(state) = &state {
            state.restore(&mut adam, &mut course)?;
        }
        let resumed_at = state.map_or(0, |state| state.step);
        let steps = Steps { training: self, pair: &pair, judges: &judges, plan: &plan, checkpoint, progress };
        let taken = steps.take(&mut adam, &mut course, resumed_at)?;
        let kept = course.result().is_some();
        let weights = course.result().unwrap_or(course.mean());
        let after = adam.with_values(weights, || {
            if kept {
                pair.store(student)?;
            }
            pair.losses(&judges)
        })?;
        Ok(FullReport {
            options: *self.options,
            sites: report::changes(&self.rewriting.encoder, &before, &after),
            device: device_name(),
            rate,
            sequences: usable.len(),
            sequences_a_step: drawn as f64 / plan.len().max(1) as f64,
            trained: pair.graph.variables().map(|(_, v)| v.elem_count()).sum(),
            tokens: taken.tokens,
            planned,
            taken: taken.steps,
            ended: taken.ended,
            judgements: course.judgements,
            before,
            after,
            kept,
            skipped: adam.skipped,
            resumed_at,
            tokens_per_second: taken.tokens_per_second,
            seconds: start.elapsed().as_secs_f64(),
        })
    }

    /// How many steps fit into a time, by the seconds that some take.
    fn steps_in(&self, time: Duration, usable: &[usize], pair: &Pair, judges: &[Piece]) -> Result<usize> {
        let begin = Instant::now();
        pair.losses(judges)?;
        let judging = JUDGEMENTS as f64 * begin.elapsed().as_secs_f64();
        let buffers = Buffers::default();
        let mut seconds = Vec::new();
        for places in plan::plan(usable, self.data.sequences, self.options, TRIED) {
            let begin = Instant::now();
            let pieces = pair.even_pieces(&self.sequences(&places), rayon::current_num_threads())?;
            let (gradient, _) = pair.gradient(&buffers, &pieces, &pair.totals(&pieces))?;
            buffers.keep(gradient);
            seconds.push(begin.elapsed().as_secs_f64());
        }
        // The first makes memory for all.
        let a_step = seconds.iter().skip(1).sum::<f64>() / (TRIED - 1) as f64;
        Ok((((time.as_secs_f64() - judging) / a_step) as usize).max(1))
    }

    fn sequences(&self, places: &[usize]) -> Vec<Sequence> {
        places.iter().map(|&at| self.data.sequences[at].clone()).collect()
    }

    /// The places of the sequences that there is something to learn from: one token alone attends to itself.
    fn usable(&self) -> Result<Vec<usize>> {
        let sequences = self.data.sequences.iter().enumerate();
        let usable: Vec<usize> = sequences.filter(|(_, s)| s.ids.len() > 1).map(|(at, _)| at).collect();
        match usable.is_empty() {
            false => Ok(usable),
            true => Err(Error::Gradient("there are no texts of two tokens or more to train on".to_owned())),
        }
    }

    /// What tells whether anything was gained.
    fn judges(&self, pair: &Pair) -> Result<Vec<Piece>> {
        let judges = if self.data.judges.is_empty() { self.data.sequences } else { self.data.judges };
        pair.pieces(&judges[..judges.len().min(MOST_JUDGES)], PIECE, usize::MAX)
    }
}

/// The steps of one training.
struct Steps<'s> {
    training: &'s Training<'s>,
    pair: &'s Pair,
    judges: &'s [Piece],
    /// The places of the sequences of each step.
    plan: &'s [Vec<usize>],
    checkpoint: Option<&'s Checkpoint>,
    progress: &'s dyn Progress,
}

/// What went through the student.
struct Taken {
    steps: usize,
    ended: Ended,
    tokens: usize,
    tokens_per_second: f64,
}

impl Steps<'_> {
    /// Takes the steps from the one numbered `first`.
    fn take(&self, adam: &mut AdamW, course: &mut Course, first: usize) -> Result<Taken> {
        let Self { pair, plan, progress, .. } = *self;
        let threads = rayon::current_num_threads();
        let buffers = Buffers::default();
        let (mut steps, mut tokens, mut ended) = (first, 0, Ended::StepsTaken);
        progress.begin("full", plan.len() - first);
        let begin = Instant::now();
        let before = course.seconds;
        let speed = |tokens: usize| tokens as f64 / begin.elapsed().as_secs_f64();
        for places in &plan[first..] {
            let way = course.way(steps, plan.len());
            if way >= 1.0 || course.is_over() {
                ended = if way >= 1.0 { Ended::TimeUp } else { Ended::NothingGained };
                break;
            }
            let sequences = self.training.sequences(places);
            let pieces = pair.even_pieces(&sequences, threads)?;
            let totals = pair.totals(&pieces);
            let (gradient, losses) = pair.gradient(&buffers, &pieces, &totals)?;
            let taken = adam.step(&gradient, plan::rate(way))?;
            buffers.keep(gradient);
            course.add(adam, steps);
            let loss = losses.total(&pair.criterion.weights);
            let odd = sequences.iter().filter(|s| s.made_up).count();
            let longest = sequences.iter().map(|s| s.ids.len()).max();
            tracing::debug!(step = steps, taken, loss, sequences = sequences.len(), odd, longest);
            adam.refuse_skipping(plan.len(), "end to end", ("use a lower learning rate", &[Setting::Rate]))?;
            steps += 1;
            tokens += totals.tokens;
            if Course::is_due(steps, plan.len()) {
                self.judge(adam, course, steps)?;
            }
            course.seconds = before + begin.elapsed().as_secs_f64();
            progress.step(&format!("loss {loss:.4}, {:.0} tokens/s", speed(tokens)));
            if let Some(checkpoint) = self.checkpoint {
                checkpoint.save_sometimes(adam, course, steps, plan.len())?;
            }
        }
        // Where time ran out between two judgements.
        if course.judgements.last().is_none_or(|judgement| judgement.step < steps) {
            self.judge(adam, course, steps)?;
        }
        progress.end();
        Ok(Taken { steps, ended, tokens, tokens_per_second: speed(tokens) })
    }

    /// Judges the running mean of the weights.
    fn judge(&self, adam: &AdamW, course: &mut Course, step: usize) -> Result<()> {
        let losses = adam.with_values(course.mean(), || self.pair.losses(self.judges))?;
        let loss = losses.total(&self.pair.criterion.weights);
        tracing::debug!(step, judged = loss, outputs = losses.outputs, hidden = losses.hidden);
        course.judge(step, loss);
        Ok(())
    }
}

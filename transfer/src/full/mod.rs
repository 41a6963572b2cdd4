//! The full stage: gradient steps on all parameters of the encoder and the head at once, from tokens to outputs.
//!
//! The loss is the distance of the outputs from the teacher's, with the hidden states at every norm to guide the layers
//! (Neo et al. 2023), and labels where they are wanted. Nothing normalises the student's activations, so
//! the rates are small, gradients are clipped, and steps that are not finite are left out.

mod checkpoint;
mod loss;
mod parameters;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use mabert_graph::{Boundary, ElementType};
use mabert_passes::lower::MASK;
use mabert_passes::pipeline::{Rewriting, Student};
use mabert_passes::sites::{Encoder, NormSite, SiteId};
use mabert_runtime::TensorType;
use rand::seq::SliceRandom as _;
use rand::{SeedableRng as _, rngs::StdRng};
use rayon::prelude::*;
use serde::Serialize;

pub use checkpoint::Checkpoint;
pub use loss::Losses;
use loss::{Compared, Criterion, Head, Totals, Variance, Weights};
pub use parameters::adopt;

use crate::data::{Batch, BatchShape, Sequence, batches};
use crate::gradient::{Adam, Buffers, Gradient, Graph, Trained, Value, device_name, from_candle, to_candle, to_value};
use crate::heads::HeadKind;
use crate::part::Prefix;
use crate::progress::Progress;
use crate::{Error, Result};

/// How the stage works.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct FullOptions {
    /// Gradient steps.
    pub steps: usize,
    /// Sequences a step. Without a number, as many as have [`DEFAULT_POSITIONS`]: a step takes as long for any text, and
    /// a token counts as much in a short text as in a long one.
    pub batch: Option<usize>,
    /// Learning rate once warm; it rises over the first tenth of the steps and falls to nothing over the others. Without a
    /// number, [`DEFAULT_RATE`] divided by how often each sequence is seen: few texts are learnt by heart at the rate that
    /// many need.
    pub rate: Option<f32>,
    /// What the weights of linear maps lose a step, times the rate.
    pub weight_decay: f32,
    /// Logits are divided by it before they are compared.
    pub temperature: f64,
    /// The share of the teacher's outputs in the loss; labels have the rest.
    pub alpha: f64,
    /// What the hidden states at the norms count.
    pub hidden_weight: f64,
    /// What attention's probabilities count.
    pub attention_weight: f64,
    /// Seed of the order of the sequences.
    pub seed: u64,
}

impl Default for FullOptions {
    fn default() -> Self {
        Self {
            steps: 900,
            batch: None,
            rate: None,
            weight_decay: 0.01,
            temperature: 2.0,
            alpha: 1.0,
            hidden_weight: 1.0,
            attention_weight: 0.0,
            seed: 0,
        }
    }
}

/// Learning rate for texts that are seen once.
pub const DEFAULT_RATE: f32 = 4e-5;
/// Positions a step where no number of sequences is asked for, padding counted, unless one sequence has more.
pub const DEFAULT_POSITIONS: usize = 840;

impl FullOptions {
    /// Sequences worth drawing, and tokens: what goes through all steps. Where texts are so short that more sequences
    /// would, each is seen again.
    pub(crate) fn worth_drawing(&self) -> (usize, usize) {
        let tokens = self.steps * DEFAULT_POSITIONS;
        self.batch.map_or((tokens / SHORT, tokens), |batch| (self.steps * batch, usize::MAX))
    }

    /// The paper's distillation (Neo et al. 2023): temperature 15, 0.9 of the loss of the outputs from the
    /// teacher and the rest from labels, hidden states once, attention a hundred times.
    pub fn paper() -> Self {
        Self { temperature: 15.0, alpha: 0.9, attention_weight: 100.0, ..Self::default() }
    }
}

/// What the stage did.
#[derive(Clone, Debug, Serialize)]
pub struct FullReport {
    /// How.
    pub options: FullOptions,
    /// Where gradients were computed: `CPU` or `GPU`.
    pub device: &'static str,
    /// Learning rate once warm.
    pub rate: f32,
    /// Sequences to draw from.
    pub sequences: usize,
    /// Sequences a step, on average.
    pub sequences_a_step: f64,
    /// Parameters that were trained, in elements.
    pub trained: usize,
    /// Real tokens that went through the student.
    pub tokens: usize,
    /// Every norm, in order, on sequences kept apart.
    pub sites: Vec<SiteChange>,
    /// Losses before, on sequences kept apart.
    pub before: Losses,
    /// And after.
    pub after: Losses,
    /// Whether the result was kept: it is put back where sequences kept apart show a greater loss.
    pub kept: bool,
    /// Steps whose gradient was not finite.
    pub skipped: usize,
    /// Steps that a checkpoint had taken before.
    pub resumed_at: usize,
    /// Real tokens a second, of the steps alone.
    pub tokens_per_second: f64,
    /// Seconds in all.
    pub seconds: f64,
}

/// What the stage did to one norm. Errors are roots of the mean squared difference over the teacher's variance on the texts
/// that are trained on; tokens that are far off count by the logarithm of their distance.
#[derive(Clone, Debug, Serialize)]
pub struct SiteChange {
    /// The norm.
    pub site: SiteId,
    /// Relative error before.
    pub before: f64,
    /// And after the last step, whether or not the result was kept.
    pub after: f64,
}

/// Positions of one piece of a step, about: more would only take memory.
const PIECE: usize = 512;
/// Sequences are sorted by length within so many: those of a step are of like lengths, and the steps of all.
const WINDOW: usize = 1024;
/// Tokens of a short text.
const SHORT: usize = 12;
/// Of what the teacher gives: before it come the student's inputs.
const FIRST_COMPARED: usize = 2;
/// More sequences are not needed to judge what was gained.
const MOST_JUDGES: usize = 256;
/// Sequences that tell the shapes and variances of the teacher's values.
const TOLD_BY: usize = 256;
/// Gradients are scaled down to this norm.
const CLIP: f32 = 1.0;
/// The share of the steps over which the rate rises.
const WARM_UP: f32 = 0.1;

/// What the student is trained on. Labels are read where [`FullOptions::alpha`] is below 1.
pub struct Data<'d> {
    /// The sequences.
    pub sequences: &'d [Sequence],
    /// Others that tell whether anything was gained. Where there are none, the sequences tell themselves.
    pub judges: &'d [Sequence],
    /// The sizes that the teacher's inputs fix.
    pub shape: BatchShape,
}

/// Whether [`train`] can do its work, told by running it on a few sequences: asked before the long stages that come first.
///
/// # Errors
/// As [`train`].
pub fn rehearse(rewriting: &Rewriting, student: &Student, data: &Data<'_>, options: &FullOptions) -> Result<()> {
    refuse_nothing(data)?;
    let few = &data.sequences[..data.sequences.len().min(4)];
    let pair = Pair::new(rewriting, student, &Data { sequences: few, ..*data }, options)?;
    data.sequences.iter().chain(data.judges).try_for_each(|s| pair.criterion.check_label(s))?;
    // Not calibrated yet, it may overflow: only that everything can be computed and differentiated counts.
    let pieces = pair.pieces(few, PIECE, few.len());
    let buffers = Buffers::default();
    pair.gradient(&buffers, &pieces[..1], &pair.totals(&pieces[..1])).map(drop)
}

fn refuse_nothing(data: &Data<'_>) -> Result<()> {
    // One token alone attends to itself, with nothing to learn.
    match data.sequences.iter().any(|s| s.ids.len() > 1) {
        true => Ok(()),
        false => Err(Error::Gradient("there are no texts of two tokens or more to train on".to_owned())),
    }
}

/// Trains `student`, whose parameters were found before and which is not yet finished.
///
/// # Errors
/// A part of teacher or student cannot be run or differentiated, more than a twentieth of the steps is not finite, or a
/// checkpoint cannot be read or written.
pub fn train(
    rewriting: &Rewriting,
    student: &mut Student,
    data: &Data<'_>,
    options: &FullOptions,
    checkpoint: Option<&Checkpoint>,
    progress: &dyn Progress,
) -> Result<FullReport> {
    let start = Instant::now();
    let training: Vec<usize> = (0..data.sequences.len()).filter(|&at| data.sequences[at].ids.len() > 1).collect();
    refuse_nothing(data)?;
    let pair = Pair::new(rewriting, student, data, options)?;
    let plan = plan(&training, data.sequences, options);
    let base = options.rate.unwrap_or_else(|| {
        let seen: usize = plan.iter().map(Vec::len).sum();
        DEFAULT_RATE / (seen as f32 / training.len() as f32).max(1.0)
    });
    let mut adam = pair.optimizer(student, base, options.weight_decay)?;
    let judges = if data.judges.is_empty() { data.sequences } else { data.judges };
    let judges = pair.pieces(&judges[..judges.len().min(MOST_JUDGES)], PIECE, usize::MAX);
    let before = pair.losses(&judges)?;
    let first = match checkpoint {
        Some(checkpoint) => checkpoint.restore(&mut adam, plan.len())?,
        None => 0,
    };
    let threads = rayon::current_num_threads();
    let buffers = Buffers::default();
    let mut tokens = 0;
    progress.begin("full", plan.len() - first);
    let begin = Instant::now();
    let speed = |tokens: usize| tokens as f64 / begin.elapsed().as_secs_f64();
    for (step, sequences) in plan.iter().enumerate().skip(first) {
        let chosen: Vec<Sequence> = sequences.iter().map(|&at| data.sequences[at].clone()).collect();
        let pieces = pair.even_pieces(&chosen, threads);
        let totals = pair.totals(&pieces);
        let (gradient, losses) = pair.gradient(&buffers, &pieces, &totals)?;
        let taken = adam.step(&gradient, rate(step, plan.len()))?;
        buffers.keep(gradient);
        let loss = losses.total(&pair.criterion.weights);
        let odd = chosen.iter().filter(|s| s.made_up).count();
        let longest = chosen.iter().map(|s| s.ids.len()).max();
        tracing::debug!(step, taken, loss, sequences = chosen.len(), odd, longest);
        adam.refuse_skipping(plan.len(), "end to end", "use a lower --lr")?;
        tokens += totals.tokens;
        progress.step(&format!("loss {loss:.4}, {:.0} tokens/s", speed(tokens)));
        if let Some(checkpoint) = checkpoint {
            checkpoint.save_sometimes(&adam, step + 1, plan.len())?;
        }
    }
    progress.end();
    let tokens_per_second = speed(tokens);
    let after = pair.losses(&judges)?;
    let total = |losses: &Losses| losses.total(&pair.criterion.weights);
    // A start that overflows is no better than anything.
    let (from, to) = (total(&before), total(&after));
    let kept = to.is_finite() && (from.is_nan() || to < from);
    if kept {
        for (name, variable) in pair.graph.variables() {
            student.model.set_constant(name, &from_candle(variable)?);
        }
    }
    Ok(FullReport {
        options: *options,
        sites: changes(&rewriting.encoder, &before, &after),
        device: device_name(),
        rate: base,
        sequences: training.len(),
        sequences_a_step: plan.iter().map(Vec::len).sum::<usize>() as f64 / plan.len().max(1) as f64,
        trained: pair.graph.variables().map(|(_, v)| v.elem_count()).sum(),
        tokens,
        before,
        after,
        kept,
        skipped: adam.skipped,
        resumed_at: first,
        tokens_per_second,
        seconds: start.elapsed().as_secs_f64(),
    })
}

/// The sequences of every step: each as often as any other, those of a step of like lengths.
fn plan(training: &[usize], sequences: &[Sequence], options: &FullOptions) -> Vec<Vec<usize>> {
    let length = |at: usize| sequences[at].ids.len();
    let (most, positions) = options.batch.map_or((usize::MAX, DEFAULT_POSITIONS), |batch| (batch, usize::MAX));
    let mut steps: Vec<Vec<usize>> = Vec::new();
    let mut rng = StdRng::seed_from_u64(options.seed);
    while steps.len() < options.steps {
        let mut round = training.to_vec();
        round.shuffle(&mut rng);
        for window in round.chunks_mut(WINDOW) {
            window.sort_by_key(|&at| length(at));
            let mut of_window: Vec<Vec<usize>> = Vec::new();
            for &at in &*window {
                match of_window.last_mut() {
                    Some(step) if step.len() < most && (step.len() + 1).saturating_mul(length(at)) <= positions => {
                        step.push(at);
                    }
                    _ => of_window.push(vec![at]),
                }
            }
            of_window.shuffle(&mut rng);
            steps.append(&mut of_window);
        }
    }
    steps.truncate(options.steps);
    steps
}

/// The share of the rate at a step: it rises, then falls, both evenly.
fn rate(step: usize, steps: usize) -> f32 {
    let warm = (steps as f32 * WARM_UP).ceil();
    let at = step as f32;
    if at < warm { (at + 1.0) / warm } else { (steps as f32 - at) / (steps as f32 - warm) }
}

/// Some sequences side by side, with their labels.
struct Piece {
    batch: Batch,
    labels: Vec<Option<f64>>,
}

/// Teacher and student, from tokens to all that is compared.
struct Pair {
    shape: BatchShape,
    /// Where the student starts: the sum of the embeddings, which is the teacher's too and is not trained.
    entry: String,
    teacher: Prefix,
    graph: Graph,
    /// Of the student, in the order of the graph.
    inputs: Vec<TensorType>,
    /// Layers whose attention is compared.
    attentions: usize,
    criterion: Criterion,
}

impl Pair {
    fn new(rewriting: &Rewriting, student: &Student, data: &Data<'_>, options: &FullOptions) -> Result<Self> {
        let encoder = &rewriting.encoder;
        let entry = encoder.embedding_norm.input.clone();
        let norms: Vec<&str> = encoder.norms().into_iter().map(|(_, site)| site.output.as_str()).collect();
        let attentions: Vec<&str> = match options.attention_weight > 0.0 {
            true => encoder.layers.iter().map(|l| l.attention.probabilities.as_str()).collect(),
            false => Vec::new(),
        };
        let outputs = student.model.outputs();
        // An output that is a norm's value is compared there.
        let of_floats = outputs
            .iter()
            .filter(|o| !matches!(o.element, Some(ElementType::I64 | ElementType::I32 | ElementType::Bool)));
        let outputs: Vec<&str> = of_floats.map(|o| o.name.as_str()).filter(|o| !norms.contains(o)).collect();
        let compared: Vec<&str> = norms.iter().chain(&attentions).chain(&outputs).copied().collect();
        // A model without a mask attends to padding too: its mask is what it makes of its inputs, whatever that is.
        let wanted: Vec<&str> = [entry.as_str(), MASK].into_iter().chain(compared.iter().copied()).collect();
        let teacher = Prefix::new(&rewriting.teacher, &wanted)?;

        let boundary = |name: &str, dims: &[&str]| Boundary::symbolic(name, ElementType::F32, dims);
        let channels = encoder.embedding_norm.gamma.len();
        let cuts = [boundary(&entry, &["batch", "n", &channels.to_string()]), boundary(MASK, &["batch", "n"])];
        let part = student.model.extract_from_inputs(&cuts, &compared)?;
        let inputs = part.inputs();
        let names: Vec<&str> = inputs.iter().map(|i| i.name.as_str()).collect();
        let mut there = parameters::parameters(&rewriting.teacher, student)?;
        there.retain(|name| part.initializer(name).is_some());
        let graph = Graph::new(&part, &names, &compared, &there)?;

        let mut pair = Self {
            shape: data.shape,
            entry,
            teacher,
            graph,
            inputs,
            attentions: attentions.len(),
            criterion: Criterion {
                heads: Vec::new(),
                variances: Vec::new(),
                labelled: None,
                weights: Weights {
                    alpha: options.alpha,
                    hidden: options.hidden_weight,
                    attention: options.attention_weight,
                    temperature: options.temperature,
                },
            },
        };
        pair.look_at_teacher(data.sequences, &norms, &outputs, encoder.channels)?;
        pair.criterion.choose_labelled()?;
        Ok(pair)
    }

    /// The kinds of the outputs, and the variances by which errors are measured.
    fn look_at_teacher(
        &mut self,
        sequences: &[Sequence],
        norms: &[&str],
        outputs: &[&str],
        channels: usize,
    ) -> Result<()> {
        let first = FIRST_COMPARED + norms.len() + self.attentions;
        let mut shapes: Vec<Vec<(usize, Vec<usize>)>> = vec![Vec::new(); outputs.len()];
        // Of texts and of tokens: which of them an output has is not known yet.
        let mut variances = vec![[Variance::default(), Variance::default()]; norms.len() + outputs.len()];
        // One piece after the other: all values of a few are much, those of many too much.
        for piece in self.pieces(&sequences[..sequences.len().min(TOLD_BY)], PIECE, usize::MAX) {
            let values = self.teacher.run(&piece.batch)?;
            let (of_norms, of_outputs) = (&values[FIRST_COMPARED..][..norms.len()], &values[first..]);
            for (variance, value) in variances.iter_mut().zip(of_norms.iter().chain(of_outputs)) {
                variance[0].add(value, &piece.batch, false);
                variance[1].add(value, &piece.batch, true);
            }
            for (shapes, value) in shapes.iter_mut().zip(of_outputs) {
                shapes.push((piece.batch.length, value.shape().to_vec()));
            }
        }
        let of_outputs = variances.split_off(norms.len());
        self.criterion.variances = variances.iter().map(|[_, of_tokens]| of_tokens.value()).collect();
        let head = |((name, shapes), [of_texts, of_tokens]): ((&&str, &Vec<_>), &[Variance; 2])| {
            let kind = HeadKind::from_shapes(name, shapes, channels);
            let variance = if kind.by_token() { of_tokens } else { of_texts };
            let columns = shapes[0].1.get(1..).map_or(1, |dims| dims.iter().product());
            Head { name: (*name).to_owned(), kind, columns, variance: variance.value() }
        };
        self.criterion.heads = outputs.iter().zip(&shapes).zip(&of_outputs).map(head).collect();
        Ok(())
    }

    fn optimizer(&self, student: &Student, rate: f32, weight_decay: f32) -> Result<Adam> {
        let encoder = &student.encoder;
        let maps = encoder.layers.iter().flat_map(|l| {
            [&l.query, &l.key, &l.value, &l.attention_output, &l.intermediate, &l.output].map(|m| m.weight.as_str())
        });
        let decaying: Vec<&str> = maps.chain(encoder.embedding_projection.iter().map(|m| m.weight.as_str())).collect();
        let trained = self.graph.variables().map(|(name, variable)| Trained {
            variable: variable.clone(),
            rate,
            decay: if decaying.contains(&name) { weight_decay } else { 0.0 },
        });
        Adam::new(trained, CLIP)
    }

    /// Sequences cut into pieces of at most so many positions or rows.
    fn pieces(&self, sequences: &[Sequence], positions: usize, rows: usize) -> Vec<Piece> {
        let label = |row: &usize| self.criterion.label(&sequences[*row]);
        let piece = |batch: Batch| Piece { labels: batch.rows.iter().map(label).collect(), batch };
        batches(sequences, positions, rows, self.shape).into_iter().map(piece).collect()
    }

    /// Sequences of like lengths cut into pieces of as many rows, about as many pieces a thread.
    fn even_pieces(&self, sequences: &[Sequence], threads: usize) -> Vec<Piece> {
        let longest = sequences.iter().map(|s| s.ids.len()).max().unwrap_or(1);
        let longest = self.shape.length.unwrap_or(longest);
        let count = (sequences.len() * longest).div_ceil(PIECE).next_multiple_of(threads);
        self.pieces(sequences, usize::MAX, sequences.len().div_ceil(count))
    }

    fn totals(&self, pieces: &[Piece]) -> Totals {
        let mut totals = Totals::default();
        for piece in pieces {
            totals.add(&piece.batch);
            totals.labels += piece.labels.iter().flatten().count();
        }
        totals
    }

    /// The loss of one piece.
    fn loss(
        &self,
        piece: &Piece,
        totals: &Totals,
        gradient: Option<&Arc<Gradient>>,
    ) -> Result<(candle_core::Tensor, Losses)> {
        let batch = &piece.batch;
        let mut of_teacher = self.teacher.run(batch)?.into_iter();
        let [stream, mask] = [of_teacher.next(), of_teacher.next()].map(|value| value.expect("they come first"));
        let input = |input: &TensorType| match input.name.as_str() {
            MASK => Ok(Value::Real(to_candle(&mask)?)),
            name if name == self.entry => Ok(Value::Real(to_candle(&stream)?)),
            _ => to_value(&batch.inputs(std::slice::from_ref(input))?.remove(0).1),
        };
        let given: Vec<Value> = self.inputs.iter().map(input).collect::<Result<_>>()?;
        let of_student = self.graph.run(&given, gradient)?;
        let both = of_student.into_iter().zip(of_teacher).map(|(s, t)| Ok((s, to_candle(&t)?)));
        let mut hidden = both.collect::<Result<Vec<_>>>()?;
        let mut attention = hidden.split_off(self.criterion.variances.len());
        let outputs = attention.split_off(self.attentions);
        let compared = Compared { batch, labels: &piece.labels, hidden, attention, outputs };
        self.criterion.of(&compared, totals)
    }

    fn gradient(&self, buffers: &Buffers, pieces: &[Piece], totals: &Totals) -> Result<(Vec<Vec<f32>>, Losses)> {
        let losses = Mutex::new(vec![Losses::default(); pieces.len()]);
        let numbered: Vec<(usize, &Piece)> = pieces.iter().enumerate().collect();
        let gradient = buffers.gradients(&self.graph, &numbered, |(at, piece), gradient| {
            let (loss, parts) = self.loss(piece, totals, Some(gradient))?;
            losses.lock().unwrap_or_else(PoisonError::into_inner)[*at] = parts;
            Ok(loss)
        })?;
        let parts = losses.into_inner().unwrap_or_else(PoisonError::into_inner);
        Ok((gradient, summed(&parts)))
    }

    /// The losses over pieces, without a step.
    fn losses(&self, pieces: &[Piece]) -> Result<Losses> {
        let totals = self.totals(pieces);
        let parts: Vec<Losses> =
            pieces.par_iter().map(|p| Ok(self.loss(p, &totals, None)?.1)).collect::<Result<_>>()?;
        Ok(summed(&parts))
    }
}

/// The relative error of each norm.
fn changes(encoder: &Encoder, before: &Losses, after: &Losses) -> Vec<SiteChange> {
    let errors = before.norms.iter().zip(&after.norms);
    let change = |((site, _), (before, after)): ((SiteId, &NormSite), (&f64, &f64))| SiteChange {
        site,
        before: before.sqrt(),
        after: after.sqrt(),
    };
    encoder.norms().into_iter().zip(errors).map(change).collect()
}

fn summed(parts: &[Losses]) -> Losses {
    let mut sum = Losses::default();
    parts.iter().for_each(|part| sum.add(part));
    sum
}

#[cfg(test)]
mod tests;

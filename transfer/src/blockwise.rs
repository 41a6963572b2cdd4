//! The blockwise stage: gradient steps on one half of a layer at a time, from the student's stream to what the teacher's
//! half makes of its own.
//!
//! The closed form fits an approximator to attention, without knowing what of it matters, and keeps the maps before a ReLU
//! that was a GELU. Here approximator, query, key, value and output map move together to give the half's output, and then
//! both maps of the feed-forward half. A half is shallow, so nothing diverges; the closed form goes on from there.

use std::sync::Arc;

use candle_core::Tensor as Real;
use mabert_graph::{Boundary, ElementType, Model, Tensor};
use mabert_passes::lower::MASK;
use ndarray::{ArrayD, Axis, Slice};
use rand::seq::SliceRandom as _;
use rand::{SeedableRng as _, rngs::StdRng};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::data::Batch;
use crate::gradient::{
    AdamW, Buffers, Gradient, Graph, HingeSite, Trained, Value, from_candle, squared_distance, to_candle,
};
use crate::schedule::{Rounds, cosine};
use crate::stored::Stored;
use crate::{Result, Setting};

/// How the stage works.
#[derive(Clone, Copy, Debug, Serialize)]
#[non_exhaustive]
pub struct BlockwiseOptions {
    /// Steps of the attention half of a layer, at most; fewer where there is so little data that it would be learnt by
    /// heart.
    pub steps: usize,
    /// The same of the feed-forward half, which has less to gain.
    pub feed_forward_steps: usize,
    /// Seed of the order of the batches.
    pub seed: u64,
    /// Learning rate of the approximator at the first step; it falls to nothing as a cosine.
    pub approximator_rate: f32,
    /// That of all others.
    pub rate: f32,
}

impl Default for BlockwiseOptions {
    fn default() -> Self {
        Self { steps: 400, feed_forward_steps: 200, seed: 0, approximator_rate: 1e-3, rate: 1e-4 }
    }
}

/// What became of one block.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Fitted {
    /// Mean squared error before, on sequences kept apart.
    pub before: f64,
    /// And after.
    pub after: f64,
    /// Steps whose gradient was not finite.
    pub skipped: usize,
}

/// Positions of one piece of a step, padding counted, and pieces a step: of any lengths, side by side.
const PIECE: usize = 256;
const PIECES_A_STEP: usize = 4;
/// Every piece is seen this often at most.
const ROUNDS: usize = 10;
/// One piece in so many, up to a number, is kept apart, to measure what was gained.
const APART: usize = 10;
const MOST_APART: usize = 128;
/// Gradients are scaled down to this norm.
const CLIP: f32 = 1.0;

/// A half of a layer: what it is given and must give, by batch.
pub(crate) struct Block<'b> {
    /// For messages.
    pub(crate) name: &'b str,
    /// The value that it starts from.
    pub(crate) input: (&'b str, usize),
    /// The value that must come near the targets.
    pub(crate) output: &'b str,
    /// Initializers of the approximator.
    pub(crate) approximator: Vec<String>,
    /// Where it is one of hinges.
    pub(crate) hinges: Option<HingeSite>,
    /// All others that are trained.
    pub(crate) others: Vec<String>,
    /// The batches.
    pub(crate) batches: &'b [Batch],
    /// `[batch, n, channels]`.
    pub(crate) streams: &'b Stored,
    /// `[batch, n]` each.
    pub(crate) masks: &'b [Tensor],
    /// What each token counts, `[batch, n, 1]` each; 0 for padding.
    pub(crate) weights: &'b [Tensor],
    /// `[batch, n, channels]`.
    pub(crate) targets: &'b Stored,
}

/// Some rows of one batch.
#[derive(Clone)]
struct Piece {
    batch: usize,
    start: usize,
    rows: usize,
}

impl Piece {
    /// Batches cut into rows of about [`PIECE`] positions.
    fn cut(batches: &[Batch]) -> Vec<Self> {
        let mut pieces = Vec::new();
        for (at, batch) in batches.iter().enumerate() {
            let rows = (PIECE / batch.length.max(1)).max(1);
            let starts = (0..batch.size()).step_by(rows);
            pieces.extend(starts.map(|start| Self { batch: at, start, rows: rows.min(batch.size() - start) }));
        }
        pieces
    }

    /// Its rows of a batch's values.
    fn rows(&self, values: &[Tensor]) -> ArrayD<f32> {
        let values = values[self.batch].as_f32().expect("masks and weights are f32");
        values.slice_axis(Axis(0), Slice::from(self.start..self.start + self.rows)).to_owned()
    }

    fn candle_rows(&self, values: &[Tensor]) -> Result<Real> {
        to_candle(&Tensor::from(self.rows(values)))
    }

    fn stored_rows(&self, values: &Stored) -> Result<Real> {
        to_candle(&values.rows(self.batch, self.start..self.start + self.rows)?)
    }
}

/// A block with the part of the student that computes it.
struct Differentiable<'d> {
    block: &'d Block<'d>,
    graph: Graph,
}

impl<'d> Differentiable<'d> {
    fn new(student: &Model, block: &'d Block<'d>) -> Result<Self> {
        let (input, channels) = block.input;
        let boundary = |name: &str, dims: &[&str]| Boundary::symbolic(name, ElementType::F32, dims);
        let inputs = [boundary(input, &["batch", "n", &channels.to_string()]), boundary(MASK, &["batch", "n"])];
        let part = student.extract(&inputs, &[block.output])?;
        let trained: Vec<String> = block.approximator.iter().chain(&block.others).cloned().collect();
        Ok(Self {
            block,
            graph: Graph::new(&part, &[input, MASK], &[block.output], &trained, block.hinges.as_slice())?,
        })
    }

    fn optimizer(&self, options: &BlockwiseOptions) -> Result<AdamW> {
        let trained = self.graph.variables().map(|(name, variable)| {
            let own = self.block.approximator.iter().any(|n| n == name);
            let rate = if own { options.approximator_rate } else { options.rate };
            Trained { variable: variable.clone(), rate, decay: 0.0 }
        });
        AdamW::new(trained, CLIP)
    }

    /// What the tokens of a piece count together.
    fn weight(&self, piece: &Piece) -> f64 {
        piece.rows(self.block.weights).iter().map(|&w| f64::from(w)).sum()
    }

    /// The weighted sum of squared errors, over channels' mean.
    fn error(&self, piece: &Piece, gradient: Option<&Arc<Gradient>>) -> Result<Real> {
        let (stream, mask) = (piece.stored_rows(self.block.streams)?, piece.candle_rows(self.block.masks)?);
        let output = self.graph.run(&[Value::Real(stream), Value::Real(mask)], gradient)?.remove(0);
        let (target, weights) = (piece.stored_rows(self.block.targets)?, piece.candle_rows(self.block.weights)?);
        Ok(squared_distance(&output, &target, &weights, f64::INFINITY)?)
    }

    /// The mean squared error over pieces.
    fn mean_error(&self, pieces: &[Piece]) -> Result<f64> {
        let everything: f64 = pieces.iter().map(|piece| self.weight(piece)).sum();
        let sum = |piece: &Piece| Ok(f64::from(self.error(piece, None)?.to_scalar::<f32>()?));
        let sums: Vec<f64> = pieces.par_iter().map(sum).collect::<Result<_>>()?;
        Ok(sums.into_iter().sum::<f64>() / everything)
    }
}

/// Trains the block's initializers in `student`; where nothing is gained they stay what they were.
pub(crate) fn fit(student: &mut Model, block: &Block<'_>, options: &BlockwiseOptions) -> Result<Fitted> {
    let differentiable = Differentiable::new(student, block)?;
    let mut adam = differentiable.optimizer(options)?;
    let mut pieces = Piece::cut(block.batches);
    let mut rng = StdRng::seed_from_u64(options.seed);
    pieces.shuffle(&mut rng);
    // Too few to keep some apart: then the gain is measured where it was made.
    let apart = (pieces.len() / APART).min(MOST_APART);
    let judges: Vec<Piece> = if apart == 0 { pieces.clone() } else { pieces.split_off(pieces.len() - apart) };

    let before = differentiable.mean_error(&judges)?;
    let buffers = Buffers::default();
    let mut rounds = Rounds::new(pieces.len(), rng);
    let steps = options.steps.min(ROUNDS * pieces.len() / PIECES_A_STEP).max(1);
    for step in 0..steps {
        let chosen: Vec<&Piece> = rounds.draw(PIECES_A_STEP).into_iter().map(|at| &pieces[at]).collect();
        let weight: f64 = chosen.iter().map(|piece| differentiable.weight(piece)).sum();
        if weight == 0.0 {
            continue;
        }
        let loss =
            |piece: &&Piece, gradient: &Arc<Gradient>| Ok((differentiable.error(piece, Some(gradient))? / weight)?);
        let gradient = buffers.gradients(&differentiable.graph, &chosen, loss)?;
        adam.step(&gradient, cosine(step, steps))?;
        buffers.keep(gradient);
        adam.refuse_skipping(steps, block.name, ("take the closed form alone", &[Setting::ClosedForm]))?;
    }
    let after = differentiable.mean_error(&judges)?;
    if after < before {
        for (name, variable) in differentiable.graph.variables() {
            student.set_constant(name, &from_candle(variable)?);
        }
    }
    Ok(Fitted { before, after: after.min(before), skipped: adam.skipped })
}

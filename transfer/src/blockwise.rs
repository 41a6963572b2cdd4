//! The blockwise stage: gradient steps on one attention block at a time, from the student's stream to what the teacher's
//! block makes of its own.
//!
//! The closed form fits an approximator to probabilities, without knowing which of them matter. Here approximator, query,
//! key, value and output map move together to give the block's output. A block is shallow, so nothing diverges; the
//! closed form goes on from there.

use std::sync::Arc;

use candle_core::Tensor as Real;
use mabert_graph::{Boundary, ElementType, Model, Tensor};
use mabert_passes::lower::MASK;
use ndarray::{Axis, Slice};
use rand::seq::SliceRandom as _;
use rand::{SeedableRng as _, rngs::StdRng};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::Result;
use crate::data::Batch;
use crate::gradient::{Adam, Buffers, Gradient, Graph, Trained, Value, from_candle, squared_distance, to_candle};
use crate::schedule::{Rounds, cosine};
use crate::stored::Stored;

/// How the stage works.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct BlockwiseOptions {
    /// Steps a block, at most; fewer where there is so little data that it would be learnt by heart.
    pub steps: usize,
    /// Seed of the order of the batches.
    pub seed: u64,
    /// Learning rate of the approximator at the first step; it falls to nothing as a cosine.
    pub approximator_rate: f32,
    /// That of all others.
    pub rate: f32,
}

impl Default for BlockwiseOptions {
    fn default() -> Self {
        Self { steps: 400, seed: 0, approximator_rate: 1e-3, rate: 1e-4 }
    }
}

/// What became of one block.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
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

/// An attention block: what it is given and must give, by batch.
pub(crate) struct Block<'b> {
    /// For messages.
    pub(crate) name: &'b str,
    /// The value that it starts from.
    pub(crate) input: (&'b str, usize),
    /// The value that must come near the targets.
    pub(crate) output: &'b str,
    /// Initializers of the approximator.
    pub(crate) approximator: Vec<String>,
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

/// Trains the block's initializers in `student`; where nothing is gained they stay what they were.
pub(crate) fn fit(student: &mut Model, block: &Block<'_>, options: &BlockwiseOptions) -> Result<Fitted> {
    let (input, channels) = block.input;
    let boundary = |name: &str, dims: &[&str]| Boundary::symbolic(name, ElementType::F32, dims);
    let inputs = [boundary(input, &["batch", "n", &channels.to_string()]), boundary(MASK, &["batch", "n"])];
    let part = student.extract(&inputs, &[block.output])?;
    let trained: Vec<String> = block.approximator.iter().chain(&block.others).cloned().collect();
    let graph = Graph::new(&part, &[input, MASK], &[block.output], &trained)?;
    let rated = graph.variables().map(|(name, variable)| {
        let own = block.approximator.iter().any(|n| n == name);
        let rate = if own { options.approximator_rate } else { options.rate };
        Trained { variable: variable.clone(), rate, decay: 0.0 }
    });
    let mut adam = Adam::new(rated, CLIP)?;

    let mut pieces: Vec<Piece> = Vec::new();
    for (batch, of) in block.batches.iter().enumerate() {
        let rows = (PIECE / of.length.max(1)).max(1);
        let starts = (0..of.size()).step_by(rows);
        pieces.extend(starts.map(|start| Piece { batch, start, rows: rows.min(of.size() - start) }));
    }
    let rows = |values: &Tensor, piece: &Piece| {
        let values = values.as_f32().expect("masks and weights are f32");
        values.slice_axis(Axis(0), Slice::from(piece.start..piece.start + piece.rows)).to_owned()
    };
    let cut = |values: &Tensor, piece: &Piece| to_candle(&Tensor::from(rows(values, piece)));
    let read = |values: &Stored, p: &Piece| to_candle(&values.rows(p.batch, p.start..p.start + p.rows)?);
    let total = |piece: &Piece| -> f64 { rows(&block.weights[piece.batch], piece).iter().map(|&w| f64::from(w)).sum() };
    // The weighted sum of squared errors, over channels' mean.
    let missed = |piece: &Piece, gradient: Option<&Arc<Gradient>>| -> Result<Real> {
        let (stream, mask) = (read(block.streams, piece)?, cut(&block.masks[piece.batch], piece)?);
        let found = graph.run(&[Value::Real(stream), Value::Real(mask)], gradient)?.remove(0);
        Ok(squared_distance(
            &found,
            &read(block.targets, piece)?,
            &cut(&block.weights[piece.batch], piece)?,
            f64::INFINITY,
        )?)
    };
    let mut rng = StdRng::seed_from_u64(options.seed);
    pieces.shuffle(&mut rng);
    // Too few to keep some apart: then the gain is measured where it was made.
    let apart = (pieces.len() / APART).min(MOST_APART);
    let judges: Vec<Piece> = if apart == 0 { pieces.clone() } else { pieces.split_off(pieces.len() - apart) };
    let everything: f64 = judges.iter().map(&total).sum();
    let measure = || -> Result<f64> {
        let sums: Vec<f64> =
            judges.par_iter().map(|p| Ok(f64::from(missed(p, None)?.to_scalar::<f32>()?))).collect::<Result<_>>()?;
        Ok(sums.into_iter().sum::<f64>() / everything)
    };

    let before = measure()?;
    let buffers = Buffers::default();
    let mut rounds = Rounds::new(pieces.len(), rng);
    let steps = options.steps.min(ROUNDS * pieces.len() / PIECES_A_STEP).max(1);
    for step in 0..steps {
        let chosen: Vec<&Piece> = rounds.draw(PIECES_A_STEP).into_iter().map(|at| &pieces[at]).collect();
        let weight: f64 = chosen.iter().map(|p| total(p)).sum();
        if weight == 0.0 {
            continue;
        }
        let gradient =
            buffers.gradients(&graph, &chosen, |piece, gradient| Ok((missed(piece, Some(gradient))? / weight)?))?;
        adam.step(&gradient, cosine(step, steps))?;
        buffers.keep(gradient);
        adam.refuse_skipping(steps, block.name, "use --transfer closed-form")?;
    }
    let after = measure()?;
    if after < before {
        for (name, variable) in graph.variables() {
            student.set_constant(name, &from_candle(variable)?);
        }
    }
    Ok(Fitted { before, after: after.min(before), skipped: adam.skipped })
}

//! The operator: attention of hinges, from panels to panels.
#![allow(unsafe_code)]

use tract_core::internal::*;

use super::super::heads::{Heads, each_head};
use super::super::kernel::Epilogue;
use super::super::panels::{self, Panels};
use super::rows::{self, Keys};

/// Panels of queries whose scores are computed at a time: they stay in cache.
const BLOCK: usize = 2;

/// Takes panels of queries, of keys and of values, each from row `part * heads * d` on. Then of each sequence: the mask `[batch, n]`, `m / len` `[batch, n]`, the two ends
/// `[batch, 2, n]`, and of each head `b1`, `b2`, weights and what all keys share, as they apply to the sequence's length.
/// Gives contexts of the queries, `[panels, heads * d + 1, width]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct HingeAttention {
    pub(super) batch: TDim,
    /// Keys and values of each sequence.
    pub(super) length: TDim,
    /// Queries of each sequence.
    pub(super) queries: TDim,
    /// Of queries, keys and values.
    pub(super) parts: [usize; 3],
    pub(super) heads: usize,
    /// Channels of a head, `d`.
    pub(super) channels: usize,
    /// Thresholds of the statistics, `[heads, 1, 1]` each.
    pub(super) statistics: Vec<Arc<Tensor>>,
    /// `[heads, R + 2, hidden]`.
    pub(super) w1: Arc<Tensor>,
    /// `[heads, hidden + R + 2, G + 2]`.
    pub(super) w2: Arc<Tensor>,
}

impl Op for HingeAttention {
    fn name(&self) -> StaticName {
        "HingeAttention".into()
    }

    fn info(&self) -> TractResult<Vec<String>> {
        Ok(vec![format!("{} heads of {}", self.heads, self.channels)])
    }

    op_as_typed_op!();
}

impl EvalOp for HingeAttention {
    op_out_of_plan!();

    fn eval(&self, context: &EvalContext<'_>, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let kernel = super::super::kernel()?;
        let size = |dim: &TDim| dim.eval_to_i64(context.symbols).map(|d| d as usize);
        let (batch, length, queries) = (size(&self.batch)?, size(&self.length)?, size(&self.queries)?);
        let heads = Heads { kernel, batch, length, queries, heads: self.heads, channels: self.channels };
        let output = heads.output(inputs[0].shape()[0])?;
        if heads.is_empty() {
            return Ok(tvec![output.into_tvalue()]);
        }
        let of_sequences = |at: usize, size: usize| -> TractResult<&[f32]> {
            let values = panels::values(&inputs[at])?;
            ensure!(values.len() == batch * size, "{} values for {batch} sequences with {size}", values.len());
            Ok(values)
        };
        let statistics: Vec<&[f32]> = self.statistics.iter().map(|t| panels::values(t)).collect::<TractResult<_>>()?;
        let (w1, w2) = (panels::values(&self.w1)?, panels::values(&self.w2)?);
        let sizes = self.sizes()?;
        let work = Work {
            op: self,
            heads,
            sizes,
            query: kernel.panels(&inputs[0])?,
            keys: kernel.panels(&inputs[1])?,
            values: kernel.panels(&inputs[2])?,
            mask: of_sequences(3, length)?,
            mean: of_sequences(4, length)?,
            ends: of_sequences(5, 2 * length)?,
            b1: of_sequences(6, self.heads * sizes.hidden)?,
            b2: of_sequences(7, self.heads * sizes.thresholds)?,
            weights: of_sequences(8, self.heads * (sizes.thresholds - 2))?,
            even: of_sequences(9, self.heads)?,
            statistics: (0..self.heads).map(|head| statistics.iter().map(|of| of[head]).collect()).collect(),
            w1,
            w2,
            contexts: kernel.panels(&output)?,
        };
        each_head(batch * self.heads, &|| work.room(), &|room: &mut Room, task| {
            work.head(room, task / self.heads, task % self.heads)
        })?;
        Ok(tvec![output.into_tvalue()])
    }
}

impl TypedOp for HingeAttention {
    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        let mut shape = inputs[0].shape.clone();
        shape.set(1, (self.heads * self.channels + 1).to_dim());
        Ok(tvec![f32::fact(shape)])
    }

    fn cost(&self, _: &[&TypedFact]) -> TractResult<TVec<(Cost, TDim)>> {
        let scores = self.batch.clone() * &self.length * &self.queries * self.heads;
        Ok(tvec![(Cost::FMA(f32::datum_type()), scores * (2 * self.channels))])
    }

    as_op!();
}

/// Of a head's parameters.
#[derive(Clone, Copy)]
struct Sizes {
    features: usize,
    hidden: usize,
    thresholds: usize,
}

impl HingeAttention {
    fn sizes(&self) -> TractResult<Sizes> {
        let (w1, w2) = (self.w1.shape(), self.w2.shape());
        let (&[heads, features, hidden], &[_, inner, thresholds]) = (w1, w2) else { bail!("weights {w1:?}, {w2:?}") };
        let r = self.statistics.len();
        let fits = heads == self.heads && features == r + 2 && inner == hidden + features && thresholds > 2;
        let few = r <= rows::MOST && thresholds - 2 <= rows::MOST;
        let all = w2[0] == heads && self.statistics.iter().all(|of| of.len() == heads);
        ensure!(fits && few && all, "weights {w1:?} and {w2:?} for {r} statistics of {} heads", self.heads);
        Ok(Sizes { features, hidden, thresholds })
    }
}

/// One evaluation.
struct Work<'r> {
    op: &'r HingeAttention,
    heads: Heads<'r>,
    sizes: Sizes,
    query: Panels<'r>,
    keys: Panels<'r>,
    values: Panels<'r>,
    mask: &'r [f32],
    mean: &'r [f32],
    ends: &'r [f32],
    b1: &'r [f32],
    b2: &'r [f32],
    weights: &'r [f32],
    even: &'r [f32],
    /// Of each head.
    statistics: Vec<Vec<f32>>,
    w1: &'r [f32],
    w2: &'r [f32],
    contexts: Panels<'r>,
}

/// What a head computes on the way. Heads of one evaluation use it one after the other.
struct Room {
    /// `[d / width, length]`: values, tokens as rows.
    values: Tensor,
    /// `[BLOCK, keys]`: scores, then probabilities.
    scores: Tensor,
    /// `[queries / width, d]`, for sequences that share a panel with others.
    contexts: Tensor,
}

impl Work<'_> {
    fn room(&self) -> TractResult<Room> {
        let Heads { kernel, length, queries, channels, .. } = self.heads;
        let width = kernel.width();
        // SAFETY: in `head` every value is computed, or transposed, before the next product reads it.
        let room = |panels, rows| unsafe { kernel.room(panels, rows) };
        Ok(Room {
            values: room(channels / width, length)?,
            scores: room(BLOCK, self.heads.most_panels(length) * width)?,
            contexts: room(self.heads.most_panels(queries), channels)?,
        })
    }

    /// The contexts of one head of one sequence.
    fn head(&self, room: &mut Room, sequence: usize, head: usize) -> TractResult<()> {
        let Self { op, heads: Heads { kernel, length, channels: d, .. }, .. } = *self;
        let width = kernel.width();
        let tokens = sequence * length..(sequence + 1) * length;
        let operands = [self.query, self.keys, self.values];
        let rows = |at: usize| operands[at].rows((op.parts[at] * op.heads + head) * d, d);
        let [query, keys, values] = [rows(0)?, rows(1)?, rows(2)?];
        // Panels of keys may hold other sequences' too: their scores are computed, and not looked at.
        let panels = tokens.start / width..tokens.end.div_ceil(width);
        let keys = keys.panels(panels.start, panels.len())?;
        let mask = &self.mask[tokens.clone()];
        let values = values.transposed(tokens.start, length, Some(mask), &mut room.values)?;
        let ends = &self.ends[2 * tokens.start..2 * tokens.end];
        let of_keys = Keys { mean: &self.mean[tokens.clone()], ends: [&ends[..length], &ends[length..]] };
        let of_head = self.of_head(sequence, head);
        let asking = self.heads.asking(sequence);
        let own = kernel.panels(&room.contexts)?;
        let contexts = self.contexts.rows(head * d, d)?.panels(asking.panels.start, asking.panels.len())?;
        for first in asking.panels.clone().step_by(BLOCK) {
            let count = BLOCK.min(asking.panels.end - first);
            let scores = kernel.panels(&room.scores)?.panels(0, count)?.rows(0, panels.len() * width)?;
            let none = Epilogue::default();
            // SAFETY: the room is this thread's own.
            unsafe { kernel.product(query.panels(first, count)?, keys, &none, scores)? };
            let scores = scores.rows(tokens.start - panels.start * width, length)?;
            for panel in 0..count {
                // SAFETY: as above.
                rows::probabilities(width, unsafe { scores.panel_mut(panel) }, of_keys, &of_head);
            }
            let into = if asking.is_alone { contexts } else { own };
            let into = into.panels(first - asking.panels.start, count)?;
            // SAFETY: no other head has these rows, and no other sequence these panels, of what is this thread's own or alone.
            unsafe { kernel.product(scores, values, &none, into)? };
        }
        match asking.is_alone {
            true => Ok(()),
            // SAFETY: no other head has these rows, no other sequence these lanes.
            false => unsafe {
                contexts.copy_lanes(own.panels(0, asking.panels.len())?, asking.lane, self.heads.queries)
            },
        }
    }

    fn of_head(&self, sequence: usize, head: usize) -> rows::Head<'_> {
        let Sizes { features, hidden, thresholds } = self.sizes;
        let at = sequence * self.op.heads + head;
        rows::Head {
            statistics: &self.statistics[head],
            w1: nth(self.w1, head, features * hidden),
            b1: nth(self.b1, at, hidden),
            w2: nth(self.w2, head, (hidden + features) * thresholds),
            b2: nth(self.b2, at, thresholds),
            weights: nth(self.weights, at, thresholds - 2),
            even: self.even[at],
        }
    }
}

/// The part numbered `at` of values that are so many each.
fn nth(values: &[f32], at: usize, size: usize) -> &[f32] {
    &values[at * size..(at + 1) * size]
}

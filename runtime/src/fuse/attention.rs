//! Attention of all heads in its linear order,
//! `ctx = relu(Q ((m K)^T W1) + b1) (scale (W2 (m V))) + b2 (m V)`, or in the paper's,
//! `ctx = ((scale relu((Q K^T m) W1 + b1) W2 + b2) m) (m V)`, whichever is cheaper at the sequence's length.
#![allow(unsafe_code)]

use tract_core::internal::*;

use super::heads::{Asking, Heads, each_head};
use super::kernel::{Epilogue, Kernel};
use super::panels::{self, Panels, PerLane};

/// Takes panels whose first `heads * d` rows are queries, and panels where rows `key_part * heads * d` and those after them
/// are keys and then values: the same panels, where one product computed all three. Then `b1` and `b2`; then the mask
/// `[batch, length, ..]` where `masked`, and the scale where `scaled`. Gives contexts of the queries,
/// `[panels, heads * d + 1, width]`.
///
/// `b1` and the scale have `groups * hidden` values and `b2` has `groups * length`, for each sequence or once for all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LinearAttention {
    pub(super) batch: TDim,
    /// Keys and values of each sequence.
    pub(super) length: TDim,
    /// Queries of each sequence.
    pub(super) queries: TDim,
    pub(super) key_part: usize,
    pub(super) heads: usize,
    /// Channels of a head, `d`.
    pub(super) channels: usize,
    /// `h`.
    pub(super) hidden: usize,
    /// `[n, h]` of each group, in panels over `h`.
    pub(super) w1: Vec<Arc<Tensor>>,
    /// `[h, n]` of each group, in panels over `h`.
    pub(super) w2: Vec<Arc<Tensor>>,
    /// The first columns of the same, as many as the paper's order may be cheaper for, in panels over them.
    pub(super) w2_by_key: Vec<Arc<Tensor>>,
    pub(super) masked: bool,
    pub(super) scaled: bool,
}

impl Op for LinearAttention {
    fn name(&self) -> StaticName {
        "LinearAttention".into()
    }

    fn info(&self) -> TractResult<Vec<String>> {
        Ok(vec![format!("{} heads of {}, h = {}", self.heads, self.channels, self.hidden)])
    }

    op_as_typed_op!();
}

impl EvalOp for LinearAttention {
    op_out_of_plan!();

    fn eval(&self, context: &EvalContext<'_>, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let kernel = super::kernel()?;
        let size = |dim: &TDim| dim.eval_to_i64(context.symbols).map(|d| d as usize);
        let (batch, length, queries) = (size(&self.batch)?, size(&self.length)?, size(&self.queries)?);
        let heads = Heads { kernel, batch, length, queries, heads: self.heads, channels: self.channels };
        let output = heads.output(inputs[0].shape()[0])?;
        if heads.is_empty() {
            return Ok(tvec![output.into_tvalue()]);
        }
        let groups = self.w1.len();
        let mut work = Work {
            op: self,
            heads,
            query: kernel.panels(&inputs[0])?,
            keys_values: kernel.panels(&inputs[1])?,
            b1: padded(kernel, &inputs[2], batch, groups, self.hidden)?,
            b2: PerSequence::new(&inputs[3], batch, groups, length)?,
            b2_by_key: None,
            mask: self.masked.then(|| panels::values(&inputs[4])).transpose()?,
            scale: match inputs.last() {
                Some(scale) if self.scaled => Some(padded(kernel, scale, batch, groups, self.hidden)?),
                _ => None,
            },
            contexts: kernel.panels(&output)?,
        };
        if work.in_papers_order() {
            work.b2_by_key = Some(padded(kernel, &inputs[3], batch, groups, length)?);
        }
        ensure!(work.mask.is_none_or(|mask| mask.len() == batch * length), "a mask of another shape");
        each_head(batch * self.heads, &|| work.room(), &|room: &mut Room, task| {
            work.head(room, task / self.heads, task % self.heads)
        })?;
        Ok(tvec![output.into_tvalue()])
    }
}

impl TypedOp for LinearAttention {
    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        let mut shape = inputs[0].shape.clone();
        shape.set(1, (self.heads * self.channels + 1).to_dim());
        Ok(tvec![f32::fact(shape)])
    }

    fn cost(&self, _: &[&TypedFact]) -> TractResult<TVec<(Cost, TDim)>> {
        let tokens = self.batch.clone() * (self.length.clone() + self.queries.clone());
        Ok(tvec![(Cost::FMA(f32::datum_type()), tokens * (2 * self.heads * self.channels * self.hidden))])
    }

    as_op!();
}

/// Values for each group, of each sequence or the same for all.
#[derive(Debug)]
struct PerSequence {
    values: TValue,
    /// Values of a group.
    size: usize,
    /// Values from one sequence to the next.
    step: usize,
}

impl PerSequence {
    fn new(values: &TValue, batch: usize, groups: usize, size: usize) -> TractResult<Self> {
        let each = groups * size;
        ensure!(values.datum_type() == f32::datum_type(), "values of {:?}", values.datum_type());
        let step = match values.len() {
            all if all == batch * each => each,
            once if once == each => 0,
            other => bail!("{other} values for {batch} sequences with {groups} x {size}"),
        };
        Ok(Self { values: values.clone(), size, step })
    }

    fn at(&self, sequence: usize, group: usize) -> PerLane<'_> {
        PerLane { tensor: &self.values, offset: sequence * self.step + group * self.size }
    }
}

/// The same with zeros up to whole panels.
fn padded(kernel: &Kernel, values: &TValue, batch: usize, groups: usize, size: usize) -> TractResult<PerSequence> {
    let given = PerSequence::new(values, batch, groups, size)?;
    let whole = size.next_multiple_of(kernel.width());
    if whole == size {
        return Ok(given);
    }
    let rows = panels::values(values)?;
    let mut padded = Tensor::zero::<f32>(&[values.len() / size, whole])?;
    let mut view = padded.try_as_plain_ram_mut()?;
    for (into, row) in view.as_slice_mut::<f32>()?.chunks_exact_mut(whole).zip(rows.chunks(size)) {
        into[..size].copy_from_slice(row);
    }
    let step = given.step / size * whole;
    Ok(PerSequence { values: padded.into_tvalue(), size: whole, step })
}

/// One evaluation.
struct Work<'r> {
    op: &'r LinearAttention,
    heads: Heads<'r>,
    query: Panels<'r>,
    keys_values: Panels<'r>,
    b1: PerSequence,
    b2: PerSequence,
    /// The same with zeros up to whole panels, where the paper's order needs it.
    b2_by_key: Option<PerSequence>,
    /// `[batch, length]`.
    mask: Option<&'r [f32]>,
    scale: Option<PerSequence>,
    contexts: Panels<'r>,
}

/// What a head computes on the way. Heads of one evaluation use it one after the other.
struct Room {
    /// `[d / width, length]`: keys and values, tokens as rows.
    keys: Tensor,
    values: Tensor,
    /// In the linear order `[h / width, d]`; in the paper's, scores `[queries / width, keys]`.
    first: Tensor,
    /// `[queries / width, h]`.
    activations: Tensor,
    /// In the linear order `[d / width, h]`; in the paper's, probabilities `[queries / width, keys]`.
    second: Tensor,
    /// `[queries / width, d]`, for sequences that share a panel with others.
    contexts: Tensor,
}

/// Columns of `W2` that the paper's order may need: up to where both orders cost the same, `2 h d / (d + h)` keys where all
/// tokens ask; where one alone does, it is always the cheaper one.
pub(super) fn most_keys(channels: usize, hidden: usize, longest: usize, all_ask: bool) -> usize {
    if all_ask { (2 * hidden * channels / (channels + hidden)).min(longest) } else { longest }
}

impl Work<'_> {
    fn hidden(&self) -> usize {
        self.op.hidden.next_multiple_of(self.heads.kernel.width())
    }

    /// Whether the paper's order is cheaper: multiplications, whole panels counted.
    fn in_papers_order(&self) -> bool {
        let Heads { kernel, length, channels: d, .. } = self.heads;
        let (width, h) = (kernel.width(), self.hidden());
        let (queries, keys) = (self.heads.queries.next_multiple_of(width), length.next_multiple_of(width));
        let paper = queries * (keys * d + length * h + h * keys + length * d);
        let linear = 2 * h * d * (length + queries);
        let columns = self.op.w2_by_key.first().map_or(0, |w2| w2.shape()[0] * width);
        paper < linear && length <= columns
    }

    fn room(&self) -> TractResult<Room> {
        let Heads { kernel, length, channels: d, .. } = self.heads;
        let (width, h) = (kernel.width(), self.hidden());
        let (queries, keys) = (self.heads.most_panels(self.heads.queries), self.heads.most_panels(length) * width);
        let paper = self.in_papers_order();
        // SAFETY: in `head` every value is computed, or transposed, before the next product reads it.
        let room = |panels, rows| unsafe { kernel.room(panels, rows) };
        let either = |linear: [usize; 2], paper_s: [usize; 2]| {
            let [panels, rows] = if paper { paper_s } else { linear };
            room(panels, rows)
        };
        Ok(Room {
            keys: either([d / width, length], [0, 0])?,
            values: room(d / width, length)?,
            first: either([h / width, d], [queries, keys])?,
            activations: room(queries, h)?,
            second: either([d / width, h], [queries, keys])?,
            contexts: room(queries, d)?,
        })
    }

    /// The contexts of one head of one sequence.
    fn head(&self, room: &mut Room, sequence: usize, head: usize) -> TractResult<()> {
        let Self { op, heads: Heads { kernel, length, queries, channels: d, .. }, .. } = *self;
        let tokens = sequence * length..(sequence + 1) * length;
        let [keys, values] =
            [op.key_part, op.key_part + 1].map(|part| self.keys_values.rows((part * op.heads + head) * d, d));
        let Asking { panels, lane, is_alone } = self.heads.asking(sequence);
        let (first, count) = (panels.start, panels.len());
        let mask = self.mask.map(|mask| &mask[tokens.clone()]);
        let values = values?.transposed(tokens.start, length, mask, &mut room.values)?;
        let query = self.query.rows(head * d, d)?.panels(first, count)?;
        let group = if op.w1.len() == 1 { 0 } else { head };
        let one = Head { sequence, group, tokens, mask, query, keys: keys?, values };
        let own = kernel.panels(&room.contexts)?.panels(0, count)?;
        let rooms = [&room.first, &room.activations, &room.second];
        // What the last product takes, and adds.
        let (probabilities, values, even) = match self.in_papers_order() {
            true => (self.probabilities(&one, rooms)?, values, None),
            false => {
                let (activations, w2_values) = self.activations_and_values(&one, &mut room.keys, rooms)?;
                (activations, w2_values, Some(values.weighted_sum(self.b2.at(sequence, group))?))
            }
        };
        let bias = even.as_ref().map(|even| PerLane { tensor: even, offset: 0 });
        let last = Epilogue { bias, ..Epilogue::default() };
        let contexts = self.contexts.rows(head * d, d)?.panels(first, count)?;
        if is_alone {
            // SAFETY: no other head has these rows, no other sequence these panels.
            unsafe { kernel.product(probabilities, values, &last, contexts) }
        } else {
            self.product(probabilities, values, last, own)?;
            // SAFETY: no other head has these rows, no other sequence these lanes.
            unsafe { contexts.copy_lanes(own, lane, queries) }
        }
    }

    /// `(scale relu((Q K^T m) W1 + b1)) W2 + b2`, the paper's order: a row a key.
    fn probabilities<'r>(
        &self,
        head: &Head<'_>,
        [scores, activations, probabilities]: [&'r Tensor; 3],
    ) -> TractResult<Panels<'r>> {
        let Self { op, heads: Heads { kernel, length, .. }, .. } = *self;
        let (width, count, tokens) = (kernel.width(), head.query.count, &head.tokens);
        // Panels of keys may hold other sequences' too: their scores are computed, and not looked at.
        let panels = tokens.start / width..tokens.end.div_ceil(width);
        let keys = head.keys.panels(panels.start, panels.len())?;
        let scores = kernel.panels(scores)?.panels(0, count)?.rows(0, panels.len() * width)?;
        self.product(head.query, keys, Epilogue::default(), scores)?;
        let scores = scores.rows(tokens.start - panels.start * width, length)?;
        if let Some(mask) = head.mask {
            // SAFETY: the room is this thread's own.
            unsafe { scores.scale_rows(mask)? };
        }
        let w1 = kernel.panels(&op.w1[head.group])?.rows(0, length)?;
        let activations = kernel.panels(activations)?.panels(0, count)?;
        let (b1, factor) = (Some(self.b1.at(head.sequence, head.group)), self.scale_at(head));
        self.product(scores, w1, Epilogue { bias: b1, relu: true, factor, ..Epilogue::default() }, activations)?;
        let keys = length.div_ceil(width);
        let w2 = kernel.panels(&op.w2_by_key[head.group])?.panels(0, keys)?;
        let probabilities = kernel.panels(probabilities)?.panels(0, count)?.rows(0, keys * width)?;
        let b2 = self.b2_by_key.as_ref().context("b2 for whole panels")?.at(head.sequence, head.group);
        // Values are masked, so that probabilities need not be.
        self.product(activations, w2, Epilogue { bias: Some(b2), ..Epilogue::default() }, probabilities)?;
        probabilities.rows(0, length)
    }

    /// `relu(Q ((m K)^T W1) + b1)` and `scale (W2 (m V))`, the linear order: a row a hidden value.
    fn activations_and_values<'r>(
        &self,
        head: &Head<'_>,
        keys: &mut Tensor,
        [keys_w1, activations, w2_values]: [&'r Tensor; 3],
    ) -> TractResult<(Panels<'r>, Panels<'r>)> {
        let Self { op, heads: Heads { kernel, length, .. }, .. } = *self;
        let keys = head.keys.transposed(head.tokens.start, length, head.mask, keys)?;
        let [w1, w2] = [&op.w1, &op.w2].map(|weights| kernel.panels(&weights[head.group])?.rows(0, length));
        let keys_w1 = kernel.panels(keys_w1)?;
        self.product(w1?, keys, Epilogue::default(), keys_w1)?;
        let activations = kernel.panels(activations)?.panels(0, head.query.count)?;
        let b1 = Some(self.b1.at(head.sequence, head.group));
        self.product(head.query, keys_w1, Epilogue { bias: b1, relu: true, ..Epilogue::default() }, activations)?;
        let w2_values = kernel.panels(w2_values)?;
        self.product(head.values, w2?, Epilogue { scale: self.scale_at(head), ..Epilogue::default() }, w2_values)?;
        Ok((activations, w2_values))
    }

    fn scale_at(&self, head: &Head<'_>) -> Option<PerLane<'_>> {
        self.scale.as_ref().map(|scale| scale.at(head.sequence, head.group))
    }

    /// A product into a room that is this thread's own.
    fn product(&self, a: Panels<'_>, b: Panels<'_>, epilogue: Epilogue<'_>, into: Panels<'_>) -> TractResult<()> {
        // SAFETY: nobody else has the room.
        unsafe { self.heads.kernel.product(a, b, &epilogue, into) }
    }
}

/// What one head of one sequence works on.
struct Head<'h> {
    sequence: usize,
    /// Of the approximator's weights.
    group: usize,
    /// Keys and values, among all tokens.
    tokens: std::ops::Range<usize>,
    /// `[length]`.
    mask: Option<&'h [f32]>,
    /// `[d, queries]`, in whole panels.
    query: Panels<'h>,
    /// `[d, all tokens]`.
    keys: Panels<'h>,
    /// `[length, d]`, masked.
    values: Panels<'h>,
}

#[cfg(test)]
mod tests {
    use tract_linalg::multithread::{Executor, multithread_tract_scope};

    use super::*;
    use crate::fuse::repack::{FromPanels, ToPanels, weights};

    /// `[batch, length, heads, d]` by the formula, a sentence, head and token at a time.
    #[allow(clippy::too_many_arguments)]
    fn by_the_formula(
        op: &LinearAttention,
        [batch, length, longest]: [usize; 3],
        qkv: &[f32],
        mask: &[f32],
        [w1, w2, b1, b2, scale]: [&dyn Fn(usize, usize, usize) -> f32; 5],
    ) -> Vec<f32> {
        let (heads, d, h) = (op.heads, op.channels, op.hidden);
        let at = |b: usize, t: usize, part: usize, head: usize, c: usize| {
            qkv[(b * length + t) * 3 * heads * d + (part * heads + head) * d + c]
        };
        let mut contexts = Vec::new();
        assert!(length <= longest);
        for b in 0..batch {
            for t in 0..length {
                for head in 0..heads {
                    let score = |s: usize| {
                        let product: f32 = (0..d).map(|c| at(b, t, 0, head, c) * at(b, s, 1, head, c)).sum();
                        product * mask[b * length + s]
                    };
                    let scores: Vec<f32> = (0..length).map(score).collect();
                    let unit = |j: usize| {
                        let sum: f32 = (0..length).map(|s| scores[s] * w1(head, s, j)).sum();
                        (sum + b1(b, head, j)).max(0.0) * scale(b, head, j)
                    };
                    let units: Vec<f32> = (0..h).map(unit).collect();
                    let probability = |s: usize| {
                        let sum: f32 = (0..h).map(|j| units[j] * w2(head, j, s)).sum();
                        (sum + b2(b, head, s)) * mask[b * length + s]
                    };
                    let probabilities: Vec<f32> = (0..length).map(probability).collect();
                    contexts.extend(
                        (0..d).map(|c| -> f32 { (0..length).map(|s| probabilities[s] * at(b, s, 2, head, c)).sum() }),
                    );
                }
            }
        }
        contexts
    }

    fn wave(seed: usize) -> impl Fn(usize, usize, usize) -> f32 {
        move |a, b, c| ((seed * 97 + a * 31 + b * 17 + c * 7) as f32 * 0.37).sin() * 0.5
    }

    #[test]
    fn it_computes_the_formula_for_sequences_that_share_panels() {
        let kernel = Kernel::get().unwrap();
        let d = kernel.width();
        let longest = 40;
        let cases = [(1, 1, 2, d), (1, 40, 2, d + 3), (3, 13, 2, 2 * d), (4, 5, 1, 7), (2, d, 1, d)];
        let ways = [(false, 0), (true, 0), (false, 40), (true, 40)];
        for ((batch, length, groups, h), (first_only, columns)) in
            cases.into_iter().flat_map(|case| ways.map(|way| (case, way)))
        {
            let heads = 2;
            let queries = if first_only { 1 } else { length };
            let group = |head: usize| if groups == 1 { 0 } else { head };
            let w1 = move |head: usize, t: usize, j: usize| wave(1)(group(head), t, j);
            let w2 = move |head: usize, j: usize, t: usize| wave(2)(group(head), j, t);
            let b1 = move |b: usize, head: usize, j: usize| wave(3)(b, group(head), j);
            let b2 = move |b: usize, head: usize, t: usize| wave(4)(b, group(head), t);
            let scale = move |b: usize, head: usize, j: usize| wave(5)(b, group(head), j) + 1.0;
            let op = LinearAttention {
                batch: batch.to_dim(),
                length: length.to_dim(),
                queries: queries.to_dim(),
                key_part: 1,
                heads,
                channels: d,
                hidden: h,
                w1: (0..groups).map(|g| weights(kernel, longest, h, |t, j| w1(g, t, j)).unwrap()).collect(),
                w2: (0..groups).map(|g| weights(kernel, longest, h, |t, j| w2(g, j, t)).unwrap()).collect(),
                w2_by_key: (0..groups)
                    .map(|g| {
                        weights(kernel, h.next_multiple_of(d), columns, |j, t| if j < h { w2(g, j, t) } else { 0.0 })
                            .unwrap()
                    })
                    .collect(),
                masked: true,
                scaled: true,
            };
            let width = 3 * heads * d;
            let qkv: Vec<f32> = (0..batch * length * width).map(|i| wave(6)(i, 0, 0)).collect();
            let mask: Vec<f32> = (0..batch * length).map(|i| if i % 5 == 3 { 0.0 } else { 1.0 }).collect();
            let input = Tensor::from_shape(&[batch, length, width], &qkv).unwrap();
            let context = EvalContext::out_of_plan();
            let asking: Vec<f32> = qkv.chunks(width).step_by(length / queries).flatten().copied().collect();
            let asking = Tensor::from_shape(&[batch, queries, width], &asking).unwrap();
            let into = ToPanels { channels: width };
            let in_panels = |of: Tensor| into.eval(&context, tvec![of.into_tvalue()]).unwrap().remove(0);
            let each = |size: usize, of: &dyn Fn(usize, usize, usize) -> f32| {
                let values: Vec<f32> = (0..batch)
                    .flat_map(|b| (0..groups).flat_map(move |g| (0..size).map(move |i| of(b, g, i))))
                    .collect();
                Tensor::from_shape(&[batch, groups, size], &values).unwrap().into_tvalue()
            };
            let inputs = tvec![
                in_panels(asking),
                in_panels(input),
                each(h, &b1),
                each(length, &b2),
                Tensor::from_shape(&[batch, length], &mask).unwrap().into_tvalue(),
                each(h, &scale),
            ];
            let wanted = by_the_formula(&op, [batch, length, longest], &qkv, &mask, [&w1, &w2, &b1, &b2, &scale]);
            let of_token = heads * d;
            let wanted: Vec<f32> = wanted.chunks(of_token).step_by(length / queries).flatten().copied().collect();
            for executor in [Executor::SingleThread, Executor::multithread(2)] {
                let found = multithread_tract_scope(executor, || op.eval(&context, inputs.clone())).unwrap();
                let shape = [batch, queries, heads, d].map(|d| d.to_dim());
                let out = FromPanels { shape: shape.iter().collect(), channels: heads * d };
                let found = out.eval(&context, found).unwrap();
                let found = panels::values(&found[0]).unwrap();
                assert_eq!(found.len(), wanted.len());
                for (found, wanted) in found.iter().zip(&wanted) {
                    assert!((found - wanted).abs() < 1e-4 * wanted.abs().max(1.0), "{found} for {wanted}");
                }
            }
        }
    }
}

//! Finds linear layers and linear attention in a decluttered tract model.

use tract_core::internal::*;
use tract_core::ops::array::Slice;
use tract_core::ops::binary::TypedBinOp;
use tract_core::ops::einsum::EinSum;
use tract_core::ops::konst::Const;
use tract_core::ops::math::{Add, Max, Min, Mul};

use super::kernel::Kernel;

/// `x W`, and what follows it.
pub(super) struct FoundLinear {
    pub(super) input: OutletId,
    /// `[k, n]`.
    pub(super) weights: Arc<Tensor>,
    pub(super) k: usize,
    pub(super) n: usize,
    /// `[n]`.
    pub(super) bias: Option<Arc<Tensor>>,
    pub(super) relu: bool,
    pub(super) residual: Option<OutletId>,
    /// What the result is not below, and not above.
    pub(super) limits: [Option<f32>; 2],
    /// Whose value it computes.
    pub(super) output: OutletId,
}

/// Einstein sums of rewritten encoders: batch `a`, heads `b`, query tokens `t`, tokens `s`, channels `d` of a head, hidden
/// units `h`; other weights from `k` to `n`. Weights of heads come last.
const LINEAR: [&str; 2] = ["atk,kn->atn", "atbd,bdn->atn"];
/// Where one approximator serves all heads, its parts have no axis of heads.
const KEYS_W1: [&str; 2] = ["asbd,bsh->abdh", "asbd,sh->abdh"];
const QUERY_KEYS_W1: [&str; 1] = ["atbd,abdh->abth"];
const W2_VALUES: [&str; 2] = ["bhs,asbd->abhd", "hs,asbd->abhd"];
const CONTEXTS: [&str; 1] = ["abth,abhd->atbd"];
const B2_VALUES: [&str; 2] = ["abs,asbd->abd", "bs,asbd->abd"];
const SHARED_B2_VALUES: [&str; 2] = ["as,asbd->abd", "s,asbd->abd"];
/// Fewer rows are not worth a panel.
const FEW_ROWS: usize = 5;
/// Axes that tract leaves out where their size is 1.
const LEFT_OUT: [&[char]; 4] = [&[], &['a'], &['t'], &['a', 't']];

/// A linear layer over the tokens of sequences. Those over a row for each sequence are left to tract: most often there is
/// one sequence, and it would fill one lane of a panel.
pub(super) fn linear(kernel: &Kernel, model: &TypedModel, node: &TypedNode) -> Option<FoundLinear> {
    let [input, weights] = einsum(model, node.id.into(), &LINEAR)?;
    let weights = matrix(model, weights)?;
    let fact = model.outlet_fact(input).ok()?;
    let n = *weights.shape().last()?;
    let k = weights.len().checked_div(n)?;
    let fits = fact.datum_type == f32::datum_type() && fact.konst.is_none() && k > 0 && over_tokens(model, fact, k);
    (fits && n.is_multiple_of(kernel.width())).then_some(())?;
    let output = node.id.into();
    let mut found =
        FoundLinear { input, weights, k, n, bias: None, relu: false, residual: None, limits: [None; 2], output };
    while let Some(next) = found.takes_in(model) {
        found.output = next;
    }
    Some(found)
}

impl FoundLinear {
    /// Takes in what follows, in the order in which it is computed, as far as nothing else reads what came before; gives
    /// whose value it then computes.
    fn takes_in(&mut self, model: &TypedModel) -> Option<OutletId> {
        let next = only_reader(model, self.output)?;
        let other = other_input(next, self.output)?;
        let limited = self.limits.iter().any(Option::is_some);
        let done = self.relu || self.residual.is_some() || limited;
        match constant(model, other) {
            Some(values) if is::<Add>(next) && !done && self.bias.is_none() => {
                self.bias = Some(per_channel(&values, self.n)?);
            }
            Some(values) if is::<Max>(next) && !done && is_zero(&values) => self.relu = true,
            Some(values) if is::<Max>(next) && !limited => self.limits[0] = Some(number(&values)?),
            Some(values) if is::<Min>(next) && self.limits[1].is_none() => self.limits[1] = Some(number(&values)?),
            None if is::<Add>(next) && !done && same_fact(model, other, self.output) => self.residual = Some(other),
            _ => return None,
        }
        Some(next.id.into())
    }
}

/// Whether `[.., k]` has an axis of tokens besides that of sequences: as long as what the model takes is, or long at least.
fn over_tokens(model: &TypedModel, fact: &TypedFact, k: usize) -> bool {
    let rows = fact.shape.volume() / k;
    if let Ok(rows) = rows.to_usize() {
        return rows >= FEW_ROWS;
    }
    let inputs = model.input_outlets().unwrap_or_default().iter().filter_map(|input| model.outlet_fact(*input).ok());
    let lengths: Vec<&TDim> = inputs.filter_map(|input| input.shape.get(1)).collect();
    fact.shape.iter().any(|size| size.to_usize().is_err() && lengths.contains(&size))
}

fn same_fact(model: &TypedModel, one: OutletId, other: OutletId) -> bool {
    let [Ok(one), Ok(other)] = [one, other].map(|outlet| model.outlet_fact(outlet)) else { return false };
    one.datum_type == other.datum_type && one.shape == other.shape
}

/// Linear attention of all heads.
pub(super) struct FoundAttention {
    /// What has queries as its first part of `heads * d` channels, and how many parts there are.
    pub(super) query: (OutletId, usize),
    /// What has keys as the given part and values as the next, and how many parts there are.
    pub(super) keys_values: (OutletId, usize, usize),
    pub(super) b1: OutletId,
    pub(super) b2: OutletId,
    pub(super) mask: Option<OutletId>,
    pub(super) scale: Option<OutletId>,
    /// `[groups, n, h]`.
    pub(super) w1: Arc<Tensor>,
    /// `[groups, h, n]`.
    pub(super) w2: Arc<Tensor>,
    pub(super) batch: TDim,
    pub(super) length: TDim,
    /// Queries of each sequence.
    pub(super) queries: TDim,
    pub(super) heads: usize,
    /// Channels of a head.
    pub(super) channels: usize,
    pub(super) hidden: usize,
    /// `n`: rows of `w1`.
    pub(super) longest: usize,
    /// Contexts, `[batch, queries, heads, d]`, axes of size 1 perhaps left out.
    pub(super) output: OutletId,
}

/// Recognised by the ReLU between its two layers, `relu`.
pub(super) fn attention(kernel: &Kernel, model: &TypedModel, relu: &TypedNode) -> Option<FoundAttention> {
    is::<Max>(relu).then_some(())?;
    let (biased, zero) = one_constant(model, relu)?;
    (is_zero(&zero) && is::<Add>(model.node(biased.node))).then_some(())?;
    let [left, right] = *model.node(biased.node).inputs else { return None };
    let scores = |outlet| einsum(model, outlet, &QUERY_KEYS_W1);
    let ([query, keys_w1], b1) = scores(left).map(|found| (found, right)).or_else(|| Some((scores(right)?, left)))?;
    let [keys, w1] = einsum(model, keys_w1, &KEYS_W1)?;
    let (keys, mask) = masked(model, keys);
    let w1 = whole(model, w1, 1)?;

    let out = only_reader(model, relu.id.into())?;
    let [activations, values_w2] = einsum(model, out.id.into(), &CONTEXTS)?;
    (activations.node == relu.id).then_some(())?;
    let ([w2, values], scale) = scaled(model, values_w2)?;
    let w2 = whole(model, w2, 0)?;
    let sum = only_reader(model, out.id.into()).filter(|sum| is::<Add>(sum))?;
    let [longest, hidden] = w1.shape()[w1.rank() - 2..] else { return None };
    let groups = w1.len().checked_div(longest * hidden)?;
    (w2.len() == w1.len() && w2.shape()[w2.rank() - 2..] == [hidden, longest]).then_some(())?;
    let b2_values = if groups == 1 { &SHARED_B2_VALUES } else { &B2_VALUES };
    let [b2, values_of_b2] = einsum(model, other_input(sum, out.id.into())?, b2_values)?;
    (values_of_b2 == values).then_some(())?;
    let (values, mask_of_values) = masked(model, values);
    (mask == mask_of_values).then_some(())?;

    let (of_keys, heads, key_part, parts) = part_of_heads(model, keys)?;
    let of_values = part_of_heads(model, values)?;
    (of_values == (of_keys, heads, key_part + 1, parts)).then_some(())?;
    let query_of = match part_of_heads(model, query) {
        Some((of_query, of_as_many, 0, parts)) if of_as_many == heads => (of_query, parts),
        Some(_) => return None,
        None => split_heads(model, query).filter(|split| split.1 == heads).map(|(of_query, _)| (of_query, 1))?,
    };
    let shape_of = |outlet| model.outlet_fact(outlet).ok().map(|fact| fact.shape.to_tvec());
    let (shape, asking) = (shape_of(keys)?, shape_of(query)?);
    let [batch, length, _, channels] = &*shape else { return None };
    let asking: TDim = asking[..asking.len() - 2].iter().product();
    // All tokens ask, or one of each sequence.
    let all = batch.clone() * length;
    let queries = if asking == all { length.clone() } else { (asking == *batch).then(|| 1.to_dim())? };
    let channels = channels.to_usize().ok()?;
    let each = |outlet: OutletId| for_each_group(&shape_of(outlet)?, batch, [heads, groups, hidden]).then_some(());
    each(b1)?;
    scale.map_or(Some(()), each)?;
    let fits = [1, heads].contains(&groups) && channels.is_multiple_of(kernel.width());
    fits.then(|| FoundAttention {
        query: query_of,
        keys_values: (of_keys, key_part, parts),
        queries,
        b1,
        b2,
        mask,
        scale,
        w1,
        w2,
        batch: batch.clone(),
        length: length.clone(),
        heads,
        channels,
        hidden,
        longest,
        output: sum.id.into(),
    })
}

/// Whether values are `hidden` for each group, the same for all sequences or for each; axes of size 1 do not count.
fn for_each_group(shape: &[TDim], batch: &TDim, [heads, groups, hidden]: [usize; 3]) -> bool {
    let one = TDim::from(1);
    let long = |dims: &[TDim]| -> Vec<TDim> { dims.iter().filter(|dim| **dim != one).cloned().collect() };
    let (groups_dim, hidden) = (groups.to_dim(), hidden.to_dim());
    let found = long(shape);
    let of_all = found == long(&[groups_dim.clone(), hidden.clone()]);
    let of_each = found == long(&[batch.clone(), groups_dim, hidden]);
    // As many sequences as heads: an axis of that size could be either.
    let told_apart = *batch != heads.to_dim() || found.len() == 3;
    (of_all || of_each) && told_apart
}

/// `scale (W2 V)` or `W2 V`: the two of the product, and the scale.
fn scaled(model: &TypedModel, outlet: OutletId) -> Option<([OutletId; 2], Option<OutletId>)> {
    if let Some(found) = einsum(model, outlet, &W2_VALUES) {
        return Some((found, None));
    }
    let node = model.node(outlet.node);
    let [left, right] = *node.inputs else { return None };
    is::<Mul>(node).then_some(())?;
    let found = |product, scale| Some((einsum(model, product, &W2_VALUES)?, Some(scale)));
    found(left, right).or_else(|| found(right, left))
}

/// Values `[batch, length, heads, d]` times a mask `[batch, length, 1, 1]`, or values alone.
fn masked(model: &TypedModel, outlet: OutletId) -> (OutletId, Option<OutletId>) {
    let parts = || {
        let node = model.node(outlet.node);
        let [left, right] = *node.inputs else { return None };
        is::<Mul>(node).then_some(())?;
        let shape = &model.outlet_fact(outlet).ok()?.shape;
        let is_mask = |mask: OutletId| {
            let mask = &model.outlet_fact(mask).ok()?.shape;
            let one = TDim::from(1);
            (mask.rank() == 4 && shape.rank() == 4 && mask[..2] == shape[..2] && mask[2] == one && mask[3] == one)
                .then_some(())
        };
        is_mask(right).map(|()| (left, right)).or_else(|| is_mask(left).map(|()| (right, left)))
    };
    parts().map_or((outlet, None), |(values, mask)| (values, Some(mask)))
}

/// Queries, keys or values of all heads, `[.., heads, d]`, cut out of `[.., parts * heads, d]`: what that was split from, how
/// many heads, which part they are, and how many parts there are.
fn part_of_heads(model: &TypedModel, outlet: OutletId) -> Option<(OutletId, usize, usize, usize)> {
    let node = model.node(outlet.node);
    let slice = node.op_as::<Slice>()?;
    let (start, end) = (slice.start.to_usize().ok()?, slice.end.to_usize().ok()?);
    let heads = end - start;
    let (source, all) = split_heads(model, node.inputs[0])?;
    let of_heads = slice.axis + 2 == model.outlet_fact(outlet).ok()?.rank();
    let fits = of_heads && all.is_multiple_of(heads) && start.is_multiple_of(heads);
    fits.then(|| (source, heads, start / heads, all / heads))
}

/// `[.., heads * d]` seen as `[.., heads, d]`: the former, and how many heads.
fn split_heads(model: &TypedModel, outlet: OutletId) -> Option<(OutletId, usize)> {
    let node = model.node(outlet.node);
    let Some(AxisOp::Reshape(at, from, to)) = node.op_as::<AxisOp>() else { return None };
    let last = from.len() == 1 && to.len() == 2 && at + 2 == model.outlet_fact(outlet).ok()?.rank();
    last.then(|| to[0].to_usize().ok().map(|heads| (node.inputs[0], heads)))?
}

/// A constant cut to the length of the batch along one of its last two axes, whole.
fn whole(model: &TypedModel, outlet: OutletId, axis_from_end: usize) -> Option<Arc<Tensor>> {
    let node = model.node(outlet.node);
    let Some(slice) = node.op_as::<Slice>() else { return matrix(model, outlet) };
    let constant = matrix(model, node.inputs[0])?;
    (slice.start == TDim::from(0) && slice.axis + 1 + axis_from_end == constant.rank()).then_some(constant)
}

/// A constant of two axes or more, of `f32`.
fn matrix(model: &TypedModel, outlet: OutletId) -> Option<Arc<Tensor>> {
    constant(model, outlet).filter(|c| c.rank() >= 2 && c.datum_type() == f32::datum_type())
}

fn constant(model: &TypedModel, outlet: OutletId) -> Option<Arc<Tensor>> {
    model.node(outlet.node).op_as::<Const>().map(|constant| constant.val().clone())
}

/// The inputs of an Einstein sum that is one of these, in their order.
fn einsum(model: &TypedModel, outlet: OutletId, wanted: &[&str]) -> Option<[OutletId; 2]> {
    let node = model.node(outlet.node);
    let op = node.op_as::<EinSum>().filter(|op| op.q_params.is_none())?;
    let [left, right] = *node.inputs else { return None };
    let facts = [model.outlet_fact(left).ok()?, model.outlet_fact(right).ok()?];
    let sums_over_one = |axis: &&Axis| {
        let sizes = axis.inputs.iter().zip(facts).flat_map(|(at, fact)| at.iter().map(|at| &fact.shape[*at]));
        sizes.clone().all(|size| *size == 1.to_dim())
    };
    let of_one: Vec<char> = op.axes.iter_all_axes().filter(sums_over_one).map(|axis| axis.repr).collect();
    let (inputs, outputs) = op.axes.to_strs();
    let is_wanted = |order: [usize; 2]| {
        let found = canonical(&[&inputs[order[0]], &inputs[order[1]], &outputs[0]], &of_one);
        let is = |wanted: &str| {
            let parts: Vec<&str> = wanted.split([',', '-', '>']).filter(|part| !part.is_empty()).collect();
            LEFT_OUT.iter().any(|left_out| found == canonical(&parts, left_out))
        };
        wanted.iter().any(|wanted| is(wanted))
    };
    let straight = is_wanted([0, 1]).then_some([left, right]);
    straight.or_else(|| is_wanted([1, 0]).then_some([right, left]))
}

/// The same sum without some axes, the others numbered as they appear.
fn canonical(parts: &[&str], left_out: &[char]) -> Vec<Vec<usize>> {
    let mut names: Vec<char> = Vec::new();
    let mut number = |name: char| {
        names.iter().position(|n| *n == name).unwrap_or_else(|| {
            names.push(name);
            names.len() - 1
        })
    };
    parts.iter().map(|part| part.chars().filter(|c| !left_out.contains(c)).map(&mut number).collect()).collect()
}

fn is<Op: tract_core::ops::binary::BinMiniOp>(node: &TypedNode) -> bool {
    node.op_as::<TypedBinOp>().is_some_and(|op| op.0.is::<Op>())
}

/// The node that alone reads a value, where it is no output of the model.
fn only_reader(model: &TypedModel, outlet: OutletId) -> Option<&TypedNode> {
    let [reader] = *model.outlet_successors(outlet) else { return None };
    (!model.output_outlets().ok()?.contains(&outlet)).then(|| model.node(reader.node))
}

/// The other input of an operator of two.
fn other_input(node: &TypedNode, one: OutletId) -> Option<OutletId> {
    match *node.inputs {
        [a, b] if a == one => Some(b),
        [a, b] if b == one => Some(a),
        _ => None,
    }
}

/// The variable and the constant that an operator of two works on.
fn one_constant(model: &TypedModel, node: &TypedNode) -> Option<(OutletId, Arc<Tensor>)> {
    let [a, b] = *node.inputs else { return None };
    constant(model, b).map(|c| (a, c)).or_else(|| constant(model, a).map(|c| (b, c)))
}

fn is_zero(constant: &Tensor) -> bool {
    number(constant) == Some(0.0)
}

/// A constant of one element.
fn number(constant: &Tensor) -> Option<f32> {
    let scalar = (constant.len() == 1).then(|| constant.cast_to_scalar::<f32>());
    scalar?.ok()
}

/// A constant that has a value for each of `n` channels, the last axis, and is the same along all others.
fn per_channel(constant: &Tensor, n: usize) -> Option<Arc<Tensor>> {
    let fits = constant.datum_type() == f32::datum_type() && constant.len() == n && constant.shape().last() == Some(&n);
    fits.then(|| constant.clone().into_shape(&[n]).ok().map(Tensor::into_arc_tensor))?
}

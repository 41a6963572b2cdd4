//! From sites to layers, and from layers to an encoder; what belongs to none is missed.

use std::collections::HashSet;

use mabert_graph::{NodeExt as _, Tensor, largest_difference};
use ndarray::ArrayD;

use super::Recognition;
use super::attention;
use super::context::Context;
use super::explanation::Miss;
use super::linear::Layout;
use super::maps::{linear_after, linear_before, with_flattened};
use super::probe::Probe;
use super::region::Region;
use crate::sites::{ActivationSite, AttentionSite, Encoder, Layer, LinearSite, MaskSite, NormSite, SiteKind};

/// What the sites of a model make up.
#[derive(Default)]
pub(super) struct Assembly {
    pub(super) encoder: Option<Encoder>,
    pub(super) misses: Vec<Miss>,
}

/// Puts the sites together into an encoder.
pub(super) fn assemble(cx: &Context<'_>, sites: &Recognition) -> Assembly {
    let mut layers: Vec<Layer> = Vec::new();
    let mut lost: Vec<Miss> = Vec::new();
    for (index, attention) in sites.attentions.iter().enumerate() {
        match layer(cx, sites, index, attention) {
            Ok(layer) => layers.push(layer),
            Err(miss) => lost.push(miss.in_layer(index)),
        }
    }
    let place = Place::new(cx, &layers);
    let mut misses: Vec<Miss> = missed_attentions(cx, sites, &place).collect();
    misses.extend(lost);
    let Some(first) = layers.first() else {
        if sites.attentions.is_empty() && misses.is_empty() {
            misses.push(no_attention(sites));
        }
        return Assembly { encoder: None, misses };
    };
    misses.extend(layers.windows(2).filter_map(break_between));
    if let Some(miss) = flattened_alone(cx, &layers) {
        misses.push(miss);
        return Assembly { encoder: None, misses };
    }
    let encoder = match embedding(cx, sites, &first.input) {
        Ok((embedding_norm, embedding_projection)) => {
            misses.extend(unclaimed(cx, sites, &layers, &embedding_norm, &place));
            let channels = first.query.inputs;
            let mask = first.attention.mask.clone().map(|input| MaskSite { input });
            Some(Encoder { channels, embedding_norm, embedding_projection, mask, layers })
        }
        Err(miss) => {
            misses.push(miss);
            None
        }
    };
    Assembly { encoder, misses }
}

/// Where nodes lie, seen from the value that the last layer ends in.
struct Place {
    /// What leads to it.
    before: HashSet<usize>,
    /// What is computed from it, the task's head.
    after: HashSet<usize>,
}

impl Place {
    fn new(cx: &Context<'_>, layers: &[Layer]) -> Self {
        let index = &cx.index;
        let end = layers.last().map(|layer| layer.output_norm.output.as_str());
        let first = end.and_then(|end| index.producer_at(end));
        let producers = |at: usize| -> Vec<usize> {
            index.data_inputs(&index.graph().node[at]).into_iter().filter_map(|v| index.producer_at(v)).collect()
        };
        Self {
            before: reached(first, producers),
            after: reached(end.into_iter().flat_map(|end| index.readers_at(end)), |at| readers(cx, at)),
        }
    }
}

/// The nodes that use what the node at `at` computes.
fn readers(cx: &Context<'_>, at: usize) -> Vec<usize> {
    cx.index.graph().node[at].output.iter().flat_map(|value| cx.index.readers_at(value)).collect()
}

/// The nodes from which `next` leads to each other, these included.
fn reached(from: impl IntoIterator<Item = usize>, next: impl Fn(usize) -> Vec<usize>) -> HashSet<usize> {
    let mut open: Vec<usize> = from.into_iter().collect();
    let mut seen: HashSet<usize> = open.iter().copied().collect();
    while let Some(at) = open.pop() {
        open.extend(next(at).into_iter().filter(|&at| seen.insert(at)));
    }
    seen
}

/// Attention that was not recognised: a softmax that leads to the last layer, or looks like attention beside or after it. Any
/// other is the head's.
fn missed_attentions<'s>(
    cx: &'s Context<'_>,
    sites: &'s Recognition,
    place: &'s Place,
) -> impl Iterator<Item = Miss> + 's {
    sites.explanations.iter().filter_map(move |explanation| {
        let reason = explanation.reason.as_ref().filter(|_| explanation.kind == SiteKind::Attention)?;
        let missed = place.before.contains(&explanation.at) || attention::looks_like_attention(cx, explanation.at);
        let miss =
            || Miss { tried: explanation.tried.clone(), ..Miss::new(SiteKind::Attention, &explanation.node, reason) };
        missed.then(miss)
    })
}

/// Why a model holds no attention: what is said of its first softmax, where it has one.
fn no_attention(sites: &Recognition) -> Miss {
    let none = "no softmax of scaled scores was found";
    let softmax = sites.explanations.iter().find(|e| e.kind == SiteKind::Attention);
    match softmax.and_then(|e| Some((e, e.reason.as_ref()?))) {
        Some((e, reason)) => {
            let miss = Miss::new(SiteKind::Attention, &e.node, format!("{none}; of this one, {reason}"));
            Miss { tried: e.tried.clone(), ..miss }
        }
        None => Miss::new(SiteKind::Attention, "graph", none),
    }
}

/// A layer that does not start where the one before it ends.
fn break_between(pair: &[Layer]) -> Option<Miss> {
    let [before, after] = pair else { return None };
    (after.input != before.output_norm.output).then(|| {
        let reason = format!("the layer does not start from the norm that ends layer {}", before.index);
        Miss::new(SiteKind::Linear, &after.input, reason).in_layer(after.index)
    })
}

/// Where tokens are flattened from layer to layer, each needs the one before it to be brought back from that.
fn flattened_alone(cx: &Context<'_>, layers: &[Layer]) -> Option<Miss> {
    let flat = |value: &str| cx.recording.shape(value).len() == 2;
    let alone =
        |at: &usize| flat(&layers[*at].input) && (*at == 0 || layers[at - 1].output_norm.output != layers[*at].input);
    let layer = &layers[(0..layers.len()).find(alone)?];
    let reason = "its tokens are flattened, and no layer was recognised before it";
    Some(Miss::new(SiteKind::Linear, &layer.input, reason).in_layer(layer.index))
}

fn layer(cx: &Context<'_>, sites: &Recognition, index: usize, attention: &AttentionSite) -> Result<Layer, Miss> {
    let [query, key, value] = projections(cx, index, attention)?;
    let input = query.input.clone();
    let mut attention_output = linear_after(cx, &attention.context, Layout::Heads(attention.heads))?;
    let attention_norm = norm_of_sum(cx, sites, &input, &mut attention_output)?;
    let stream = &attention_norm.output;
    let activation = activation_from(cx, sites, stream)?.clone();
    let intermediate = linear_before(cx, &activation.input, Layout::Rows)?;
    let mut output = linear_after(cx, &activation.output, Layout::Rows)?;
    let output_norm = norm_of_sum(cx, sites, stream, &mut output)?;
    let layer = Layer {
        index,
        input,
        attention: attention.clone(),
        query,
        key,
        value,
        attention_output,
        attention_norm,
        intermediate,
        activation,
        output,
        output_norm,
    };
    match used_flattened(cx, &layer) {
        Some(miss) => Err(miss),
        None => Ok(layer),
    }
}

/// The maps to queries, keys and values, which start from one value.
fn projections(cx: &Context<'_>, index: usize, attention: &AttentionSite) -> Result<[LinearSite; 3], Miss> {
    let heads = Layout::Heads(attention.heads);
    let query = linear_before(cx, &attention.query, heads)?;
    let key = linear_before(cx, &attention.key, Layout::HeadsTransposed(attention.heads))?;
    let value = linear_before(cx, &attention.value, heads)?;
    if query.input != key.input || query.input != value.input {
        let reason =
            format!("queries, keys and values come from `{}`, `{}` and `{}`", query.input, key.input, value.input);
        return Err(Miss::new(SiteKind::Linear, &attention.node, reason));
    }
    // Where tokens are flattened from layer to layer, the first still starts from embeddings that are not.
    let shape = cx.recording.shape(&query.input);
    if shape.len() != 3 && (index == 0 || shape.len() != 2) {
        let reason = format!("its input has shape {shape:?}; [batch, n, channels] is supported");
        return Err(Miss::new(SiteKind::Linear, &query.input, reason));
    }
    Ok([query, key, value])
}

/// The activation to which a linear map leads from `stream`.
fn activation_from<'s>(cx: &Context<'_>, sites: &'s Recognition, stream: &str) -> Result<&'s ActivationSite, Miss> {
    let starts_here =
        |site: &&ActivationSite| linear_before(cx, &site.input, Layout::Rows).is_ok_and(|l| l.input == *stream);
    sites.activations.iter().find(starts_here).ok_or_else(|| {
        let failed = sites.explanations.iter().find(|e| e.kind == SiteKind::Activation && e.reason.is_some());
        let hint =
            failed.map_or_else(String::new, |e| format!(" (`{}`: {})", e.node, e.reason.clone().unwrap_or_default()));
        let reason = format!("no linear map from here leads to a GELU or ReLU{hint}");
        Miss::new(SiteKind::Activation, stream, reason)
    })
}

/// A value of flattened tokens that is used outside its layer: such values get their own shape back inside the encoder, so
/// nobody else may know them by the old one.
fn used_flattened(cx: &Context<'_>, layer: &Layer) -> Option<Miss> {
    let seen = |value: &String, most_consumers: usize| {
        let mut consumers = cx.index.consumers(value);
        cx.index.is_output(value)
            || consumers.any(|n| n.is("Shape"))
            || cx.index.consumers_at(value).len() > most_consumers
    };
    let (attention, output) = (&layer.attention_norm, &layer.output_norm);
    let inner = [
        (attention, &layer.attention_output.output, 1),
        (attention, &attention.input, usize::MAX),
        (output, &layer.intermediate.output, usize::MAX),
        (output, &layer.output.output, 1),
        (output, &output.input, usize::MAX),
    ];
    let (_, value, _) = inner.into_iter().find(|(norm, value, most)| norm.flattened && seen(value, *most))?;
    Some(Miss::new(SiteKind::Linear, value, "its tokens are flattened, and it is used outside its layer"))
}

/// The norm whose input is `stream + branch`, or that plus a vector, which then belongs to the branch's bias: optimisers
/// add it last.
fn norm_of_sum(cx: &Context<'_>, sites: &Recognition, stream: &str, branch: &mut LinearSite) -> Result<NormSite, Miss> {
    let end = branch.output.clone();
    let entries = with_flattened(cx, stream).into_iter().map(|form| [form, end.as_str()]);
    let mut following = entries.filter_map(|entries| {
        let region = |norm: &NormSite| Region::between(&cx.index, &entries, &norm.input);
        sites.norms.iter().find_map(|norm| Some((norm, region(norm)?)))
    });
    let Some((norm, region)) = following.next() else {
        let after = reached(cx.index.readers_at(&end), |at| readers(cx, at));
        let is_after = |norm: &NormSite| cx.index.producer_at(&norm.output).is_some_and(|at| after.contains(&at));
        let why = match sites.norms.iter().any(is_after) {
            true => "only post-LN encoders are supported",
            false => "the model ends without one",
        };
        let reason = format!("no layer normalisation of `{stream}` + `{end}` follows it; {why}");
        return Err(Miss::new(SiteKind::Norm, &end, reason));
    };
    let vector = vector_beside_sum(cx, &region).map_err(|reason| {
        let reason = match reason {
            NotASum::Differs(by) => {
                format!("the norm's input is not `{stream}` + `{end}`: they differ by {by:.1e}")
            }
            NotASum::Cannot(reason) => reason,
        };
        Miss::new(SiteKind::Norm, &norm.node, reason)
    })?;
    branch.bias.iter_mut().zip(vector).for_each(|(bias, more)| *bias += more);
    Ok(norm.clone())
}

/// Why a region is not the sum of its two entries and a vector.
enum NotASum {
    Cannot(String),
    Differs(f32),
}

impl From<String> for NotASum {
    fn from(reason: String) -> Self {
        Self::Cannot(reason)
    }
}

/// The vector, `[channels]`, that a region adds to the sum of its two entries.
fn vector_beside_sum(cx: &Context<'_>, region: &Region) -> Result<Vec<f32>, NotASum> {
    let probe = Probe::new(cx.model, &cx.index, &cx.recording, region)?;
    let beside_sum = |a: Vec<f32>, b: Vec<f32>| {
        let [a, b] = [(0, a), (1, b)].map(|(at, values)| Tensor::new(probe.shape(at), values));
        let sum = probe.run(&[a.clone(), b.clone()])?.to_f32();
        let expected = a.to_f32() + b.to_f32();
        match sum.shape() == expected.shape() {
            true => Ok(sum - expected),
            false => Err(format!("the norm's input {:?} has not the shape of the stream", sum.shape())),
        }
    };
    let count = probe.shape(0).iter().product();
    let at_zero = beside_sum(vec![0.0; count], vec![0.0; count])?;
    let at_noise = beside_sum(probe.noise(0, 41), probe.noise(1, 42))?;
    let first = at_zero.rows().into_iter().next().ok_or_else(|| "no rows".to_owned())?.to_vec();
    let furthest =
        |rows: &ArrayD<f32>| rows.rows().into_iter().map(|row| largest_difference(row, &first)).fold(0f32, f32::max);
    let distance = furthest(&at_zero).max(furthest(&at_noise));
    if distance > 1e-5 * first.iter().fold(1f32, |m, v| m.max(v.abs())) {
        return Err(NotASum::Differs(distance));
    }
    Ok(first)
}

/// The norm after the embeddings, and the linear map between it and the first layer where there is one.
fn embedding(cx: &Context<'_>, sites: &Recognition, input: &str) -> Result<(NormSite, Option<LinearSite>), Miss> {
    if let Some(norm) = sites.norms.iter().find(|n| n.output == input) {
        return Ok((norm.clone(), None));
    }
    if let Ok(linear) = linear_before(cx, input, Layout::Rows)
        && cx.recording.shape(&linear.input).len() == 3
        && let Some(norm) = sites.norms.iter().find(|n| n.output == linear.input)
    {
        return Ok((norm.clone(), Some(linear)));
    }
    let reason = "the first layer does not start from a layer normalisation of the embeddings";
    Err(Miss::new(SiteKind::Norm, input, reason))
}

/// Norms and activations that lead to the encoder's end but belong to no layer, and layers that the head seems to hold: their
/// attention was not recognised.
fn unclaimed(
    cx: &Context<'_>,
    sites: &Recognition,
    layers: &[Layer],
    embedding_norm: &NormSite,
    place: &Place,
) -> Vec<Miss> {
    let inside = |at: usize| place.before.contains(&at);
    let lost = sites.explanations.iter().filter(|e| e.kind != SiteKind::Attention && inside(e.at));
    let mut misses: Vec<Miss> = lost
        .filter_map(|e| Some(Miss { tried: e.tried.clone(), ..Miss::new(e.kind, &e.node, e.reason.as_ref()?) }))
        .collect();
    let claimed: HashSet<&str> = layers
        .iter()
        .flat_map(|l| [&l.attention_norm.output, &l.output_norm.output, &l.activation.output])
        .chain([&embedding_norm.output])
        .map(String::as_str)
        .collect();
    let norms = sites.norms.iter().map(|site| (SiteKind::Norm, &site.node, &site.output, &site.input));
    let activations =
        sites.activations.iter().map(|site| (SiteKind::Activation, &site.node, &site.output, &site.input));
    for (kind, node, output, input) in norms.chain(activations) {
        if claimed.contains(output.as_str()) {
            continue;
        }
        if cx.index.producer_at(output).is_some_and(inside) {
            let reason = "it belongs to no layer: the attention of its layer was not recognised";
            misses.push(Miss::new(kind, node, reason));
        } else if kind == SiteKind::Norm && is_sum(cx, input) && mixes_tokens(cx, place, input) {
            let reason =
                "it normalises a sum, as layers do, but comes after the last layer whose attention was recognised";
            misses.push(Miss::new(kind, node, reason));
        }
    }
    misses
}

/// Whether a value is the sum of two that both depend on data.
fn is_sum(cx: &Context<'_>, value: &str) -> bool {
    cx.index.producer(value).is_some_and(|node| node.is("Add") && cx.index.data_inputs(node).len() == 2)
}

/// Whether a product of two values of the text lies between the encoder's end and `value`, as attention has it.
fn mixes_tokens(cx: &Context<'_>, place: &Place, value: &str) -> bool {
    let index = &cx.index;
    let in_head = |value: &str| index.producer_at(value).filter(|at| place.after.contains(at));
    let producers = |at: usize| -> Vec<usize> {
        index.data_inputs(&index.graph().node[at]).into_iter().filter_map(in_head).collect()
    };
    reached(in_head(value), producers).into_iter().any(|at| attention::is_product(cx, &index.graph().node[at]))
}

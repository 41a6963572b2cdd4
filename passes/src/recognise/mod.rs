//! From a graph to typed sites.

mod activation;
mod attention;
mod explanation;
mod linear;
mod norm;
mod probe;
mod region;

use std::collections::HashSet;

use mabert_graph::proto::NodeProto;
use mabert_graph::{Dependence, Index, Model, NodeExt as _, largest_difference};

use crate::recording::Recording;
use crate::sites::{ActivationSite, AttentionSite, Encoder, Layer, LinearSite, MaskSite, NormSite, SiteKind};
use crate::{Error, Result};
pub use explanation::{Explanation, Miss, Tried};
use linear::Layout;
use region::{Region, chain};

/// How many sentences, and of how many tokens, models are run on to be recognised.
pub const PROBED: (usize, usize) = (2, 7);

/// What was found in a model.
#[derive(Clone, Debug, Default)]
pub struct Recognition {
    /// Every attention, in graph order.
    pub attentions: Vec<AttentionSite>,
    /// Every activation, ReLU included.
    pub activations: Vec<ActivationSite>,
    /// Every norm.
    pub norms: Vec<NormSite>,
    /// The encoder, if the sites form one.
    pub encoder: Option<Encoder>,
    /// What was expected and not found.
    pub misses: Vec<Miss>,
    /// Every anchor.
    pub explanations: Vec<Explanation>,
}

impl Recognition {
    /// The encoder, complete.
    ///
    /// # Errors
    /// There is none, or sites are missing.
    pub fn complete(self, origin: &str) -> Result<Encoder> {
        if !self.misses.is_empty() && (self.encoder.is_some() || !self.attentions.is_empty()) {
            return Err(Error::Incomplete { origin: origin.to_owned(), misses: self.misses });
        }
        self.encoder.ok_or_else(|| {
            let reason = self.misses.first().map_or_else(|| "it holds no attention".to_owned(), Miss::to_string);
            Error::NotBert { origin: origin.to_owned(), reason }
        })
    }
}

/// The outcome for one anchor.
enum Verdict<T> {
    Site(T, Region),
    /// Why, and the region that was probed last, if any was.
    NotASite(String, Option<Region>),
}

impl<T> Verdict<T> {
    fn is_site(&self) -> bool {
        matches!(self, Self::Site(..))
    }
}

/// What every recogniser needs.
struct Context<'m> {
    model: &'m Model,
    index: Index<'m>,
    recording: Recording,
}

impl Context<'_> {
    fn tried(&self, region: &Region) -> Box<Tried> {
        let name = |&at: &usize| {
            let node = &self.index.graph().node[at];
            format!("{} `{}`", node.op_type, node.label())
        };
        let Region { entries, exit, nodes } = region;
        Box::new(Tried { entries: entries.clone(), exit: exit.clone(), nodes: nodes.iter().map(name).collect() })
    }
}

/// Finds the sites of `model`, which must be free of fused operators and of unfolded constants
/// ([`lower::simplify`](crate::lower::simplify)).
///
/// # Errors
/// The model cannot be run at all. What is not recognised is no error but a [`Miss`].
pub fn recognise(model: &Model) -> Result<Recognition> {
    let (batch, length) = PROBED;
    let cx = Context { model, index: Index::new(model)?, recording: Recording::of_any_size(model, batch, length)? };
    let mut found = Recognition::default();
    let mut claimed = HashSet::new();
    for (at, node) in cx.index.graph().node.iter().enumerate() {
        if claimed.contains(&at) || node.output.first().is_none_or(|o| cx.index.dependence(o) != Dependence::Data) {
            continue;
        }
        let mut note = |kind: SiteKind, region: Option<&Region>, reason: Option<String>| {
            let words = |r: &Region| format!("{} -> {} ({} nodes)", r.entries.join(", "), r.exit, r.nodes.len());
            let (region, tried) = match reason {
                None => (region.map(words), None),
                Some(_) => (None, region.map(|r| cx.tried(r))),
            };
            let (node, operator) = (node.label().to_owned(), node.op_type.clone());
            found.explanations.push(Explanation { node, at, operator, kind, region, reason, tried });
        };
        if node.is("Softmax") {
            match attention::recognise(&cx, at) {
                Verdict::Site(site, region) => {
                    note(SiteKind::Attention, Some(&region), None);
                    found.attentions.push(site);
                }
                Verdict::NotASite(reason, tried) => note(SiteKind::Attention, tried.as_ref(), Some(reason)),
            }
        } else if activation::is_anchor(node) {
            match activation::recognise(&cx, at) {
                Verdict::Site(site, region) => {
                    note(SiteKind::Activation, Some(&region), None);
                    claimed.extend(region.nodes);
                    found.activations.push(site);
                }
                Verdict::NotASite(reason, tried) => note(SiteKind::Activation, tried.as_ref(), Some(reason)),
            }
        } else if norm::is_anchor(node) {
            match norm::recognise(&cx, at) {
                Verdict::Site(site, region) => {
                    note(SiteKind::Norm, Some(&region), None);
                    claimed.extend(region.nodes);
                    found.norms.push(site);
                }
                // Squares and roots are everywhere; only the operator that can be nothing else is worth a word.
                Verdict::NotASite(reason, tried) if !node.is("Pow") => {
                    note(SiteKind::Norm, tried.as_ref(), Some(reason))
                }
                Verdict::NotASite(..) => {}
            }
        }
    }
    assemble(&cx, &mut found);
    Ok(found)
}

/// Puts the sites together into an encoder.
fn assemble(cx: &Context<'_>, found: &mut Recognition) {
    for explanation in &found.explanations {
        if explanation.kind == SiteKind::Attention
            && let Some(reason) = &explanation.reason
        {
            let tried = explanation.tried.clone();
            found.misses.push(Miss { tried, ..miss(SiteKind::Attention, &explanation.node, reason) });
        }
    }
    let mut layers: Vec<Layer> = Vec::new();
    for (index, attention) in found.attentions.iter().enumerate() {
        match layer(cx, found, index, attention) {
            Ok(layer) => layers.push(layer),
            Err(mut miss) => {
                miss.layer = Some(index);
                found.misses.push(miss);
            }
        }
    }
    let Some(first) = layers.first() else {
        if found.attentions.is_empty() && found.misses.is_empty() {
            found.misses.push(miss(SiteKind::Attention, "graph", "no softmax of scaled scores was found"));
        }
        return;
    };
    for pair in layers.windows(2) {
        if pair[1].input != pair[0].output_norm.output {
            let reason = format!("the layer does not start from the norm that ends layer {}", pair[0].index);
            found.misses.push(Miss { layer: Some(pair[1].index), ..miss(SiteKind::Linear, &pair[1].input, reason) });
        }
    }
    // Where tokens are flattened from layer to layer, each needs the one before it to be brought back from that.
    let flat = |value: &str| cx.recording.shape(value).len() == 2;
    let alone =
        |at: usize| flat(&layers[at].input) && (at == 0 || layers[at - 1].output_norm.output != layers[at].input);
    if let Some(at) = (0..layers.len()).find(|&at| alone(at)) {
        let reason = "its tokens are flattened, and no layer was recognised before it";
        let (layer, input) = (Some(layers[at].index), layers[at].input.clone());
        found.misses.push(Miss { layer, ..miss(SiteKind::Linear, &input, reason) });
        return;
    }
    let channels = first.query.inputs;
    match embedding(cx, found, &first.input) {
        Ok((embedding_norm, embedding_projection)) => {
            let mask = first.attention.mask.clone().map(|input| MaskSite { input });
            unclaimed(cx, found, &layers, &embedding_norm);
            found.encoder = Some(Encoder { channels, embedding_norm, embedding_projection, mask, layers });
        }
        Err(miss) => found.misses.push(miss),
    }
}

fn miss(expected: SiteKind, node: &str, reason: impl Into<String>) -> Miss {
    Miss { layer: None, expected, node: node.to_owned(), reason: reason.into(), tried: None }
}

type Found<T> = std::result::Result<T, Miss>;

fn layer(cx: &Context<'_>, found: &Recognition, index: usize, attention: &AttentionSite) -> Found<Layer> {
    let heads = Layout::Heads(attention.heads);
    let query = linear_before(cx, &attention.query, heads)?;
    let key = linear_before(cx, &attention.key, Layout::HeadsTransposed(attention.heads))?;
    let value = linear_before(cx, &attention.value, heads)?;
    if query.input != key.input || query.input != value.input {
        let reason =
            format!("queries, keys and values come from `{}`, `{}` and `{}`", query.input, key.input, value.input);
        return Err(miss(SiteKind::Linear, &attention.node, reason));
    }
    let input = query.input.clone();
    // Where tokens are flattened from layer to layer, the first still starts from embeddings that are not.
    let shape = cx.recording.shape(&input);
    if shape.len() != 3 && (index == 0 || shape.len() != 2) {
        let reason = format!("its input has shape {shape:?}; [batch, n, channels] is supported");
        return Err(miss(SiteKind::Linear, &input, reason));
    }
    let mut attention_output = linear_after(cx, &attention.context, heads)?;
    let attention_norm = norm_of_sum(cx, found, &input, &mut attention_output)?;
    let stream = &attention_norm.output;
    let starts_here =
        |site: &&ActivationSite| linear_before(cx, &site.input, Layout::Rows).is_ok_and(|l| l.input == *stream);
    let Some(activation) = found.activations.iter().find(starts_here) else {
        let failed = found.explanations.iter().find(|e| e.kind == SiteKind::Activation && e.reason.is_some());
        let hint =
            failed.map_or_else(String::new, |e| format!(" (`{}`: {})", e.node, e.reason.clone().unwrap_or_default()));
        return Err(miss(
            SiteKind::Activation,
            stream,
            format!("no linear map from here leads to a GELU or ReLU{hint}"),
        ));
    };
    let intermediate = linear_before(cx, &activation.input, Layout::Rows)?;
    let mut output = linear_after(cx, &activation.output, Layout::Rows)?;
    let output_norm = norm_of_sum(cx, found, stream, &mut output)?;
    // Flattened values get their own shape back inside the encoder: nobody else may know them by the old one.
    let seen = |value: &String, by: usize| {
        let mut consumers = cx.index.consumers(value);
        cx.index.is_output(value) || consumers.any(|n| n.is("Shape")) || cx.index.consumers_at(value).len() > by
    };
    let inner = [
        (&attention_norm, &attention_output.output, 1),
        (&attention_norm, &attention_norm.input, usize::MAX),
        (&output_norm, &intermediate.output, usize::MAX),
        (&output_norm, &output.output, 1),
        (&output_norm, &output_norm.input, usize::MAX),
    ];
    if let Some((_, value, _)) = inner.into_iter().find(|(norm, value, by)| norm.flattened && seen(value, *by)) {
        return Err(miss(SiteKind::Linear, value, "its tokens are flattened, and it is used outside its layer"));
    }
    Ok(Layer {
        index,
        input,
        attention: attention.clone(),
        query,
        key,
        value,
        attention_output,
        attention_norm,
        intermediate,
        activation: activation.clone(),
        output,
        output_norm,
    })
}

/// Operators that leave the elements, and their order, as they are.
const LAYOUT_ONLY: [&str; 6] = ["Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Cast"];

/// The value `[batch, n, channels]` behind flattened tokens `[batch * n, channels]`, which several maps may share.
fn unflattened(cx: &Context<'_>, value: &str) -> String {
    let mut from = value;
    while let (2, Some(node)) = (cx.recording.shape(from).len(), cx.index.producer(from)) {
        // A cast to integers and back would lose what lies between them.
        let element = |value: &str| cx.recording.value(value).map(mabert_graph::Tensor::element_type);
        let moves = LAYOUT_ONLY.contains(&node.op_type.as_str())
            && node.input.first().is_some_and(|input| element(input) == element(from));
        match node.input.first() {
            Some(input) if moves && cx.index.dependence(input) == Dependence::Data => from = input,
            _ => break,
        }
    }
    match (cx.recording.shape(from), cx.recording.shape(value)) {
        (&[batch, n, channels], &[rows, same]) if batch * n == rows && channels == same => from.to_owned(),
        _ => value.to_owned(),
    }
}

/// The linear map that ends in `value`. Where it works on flattened or transposed tokens, it starts before they become so.
fn linear_before(cx: &Context<'_>, value: &str, layout: Layout) -> Found<LinearSite> {
    let mut found = Err(miss(SiteKind::Linear, value, "no product with a constant weight leads to it"));
    let mut known: &[usize] = &[];
    let has_weight = |regions: &[Region]| regions.iter().flat_map(|r| &r.nodes).any(|&at| linear::has_weight(cx, at));
    let mut regions = Region::ending_in(&cx.index, value, false);
    if !has_weight(&regions) {
        // One product may make queries, keys and values.
        regions = Region::ending_in(&cx.index, value, true);
    }
    let moves_only = |at: &usize| {
        let node = &cx.index.graph().node[*at];
        LAYOUT_ONLY.contains(&node.op_type.as_str()) || node.is("Transpose")
    };
    for region in regions.iter().skip_while(|r| !r.nodes.iter().any(|&at| linear::has_weight(cx, at))) {
        if !known.is_empty() && !region.nodes.iter().filter(|at| !known.contains(at)).all(moves_only) {
            break;
        }
        match linear::read_off(cx, region, Layout::Rows, layout) {
            Ok(site) => found = Ok(site),
            Err(_) if found.is_ok() => break,
            Err(reason) if known.is_empty() => {
                found = Err(Miss { tried: Some(cx.tried(region)), ..miss(SiteKind::Linear, value, reason) });
            }
            Err(_) => {}
        }
        known = &region.nodes;
    }
    found.map(|site| LinearSite { input: unflattened(cx, &site.input), ..site })
}

/// The linear map that starts at `value`.
fn linear_after(cx: &Context<'_>, value: &str, layout: Layout) -> Found<LinearSite> {
    let mut best = Err(miss(SiteKind::Linear, value, "no product with a constant weight follows it"));
    for exit in chain(&cx.index, value).into_iter().skip(1).take(16) {
        let Some(region) = Region::between(&cx.index, &[value], exit) else { break };
        if region.nodes.iter().any(|&at| linear::has_weight(cx, at)) {
            match linear::read_off(cx, &region, layout, Layout::Rows) {
                Ok(site) => best = Ok(site),
                Err(reason) if best.is_err() => {
                    best = Err(Miss { tried: Some(cx.tried(&region)), ..miss(SiteKind::Linear, value, reason) });
                }
                Err(_) => break,
            }
        }
    }
    best
}

/// A value `[batch, n, channels]`, and what else it is called with its tokens flattened.
fn with_flattened<'m>(cx: &Context<'m>, value: &'m str) -> Vec<&'m str> {
    let mut forms = vec![value];
    let flattened = |node: &'m NodeProto| {
        let output = node.output.first().filter(|_| LAYOUT_ONLY.contains(&node.op_type.as_str()))?;
        (unflattened(cx, output) == value && output != value).then_some(output.as_str())
    };
    forms.extend(cx.index.consumers(value).filter_map(flattened));
    forms
}

/// The norm whose input is `stream + branch`, or that plus a vector, which then belongs to the branch's bias: optimisers
/// add it last.
fn norm_of_sum(cx: &Context<'_>, found: &Recognition, stream: &str, branch: &mut LinearSite) -> Found<NormSite> {
    let end = branch.output.clone();
    let forms = with_flattened(cx, stream);
    let entries = forms.iter().map(|form| [*form, end.as_str()]);
    let following = entries.filter_map(|entries| {
        let follows = |norm: &&NormSite| Region::between(&cx.index, &entries, &norm.input).is_some();
        Some((entries, found.norms.iter().find(follows)?))
    });
    let Some((entries, norm)) = following.into_iter().next() else {
        let reason =
            format!("no layer normalisation of `{stream}` + `{end}` follows it; only post-LN encoders are supported");
        return Err(miss(SiteKind::Norm, &end, reason));
    };
    let added = || -> std::result::Result<Vec<f32>, String> {
        let region = Region::between(&cx.index, &entries, &norm.input).ok_or("no region")?;
        let probe = probe::Probe::new(cx.model, &cx.index, &cx.recording, &region)?;
        let run = |a: Vec<f32>, b: Vec<f32>| {
            let [a, b] = [(0, a), (1, b)].map(|(at, values)| mabert_graph::Tensor::new(probe.shape(at), values));
            let sum = probe.run(&[a.clone(), b.clone()])?.to_f32();
            let expected = a.to_f32() + b.to_f32();
            match sum.shape() == expected.shape() {
                true => Ok::<_, String>(sum - expected),
                false => Err(format!("the norm's input {:?} has not the shape of the stream", sum.shape())),
            }
        };
        let count = probe.shape(0).iter().product();
        let nothing = run(vec![0.0; count], vec![0.0; count])?;
        let more = run(probe.noise(0, 41), probe.noise(1, 42))?;
        let first = nothing.rows().into_iter().next().ok_or("no rows")?.to_vec();
        let far = |rows: &ndarray::ArrayD<f32>| {
            rows.rows().into_iter().map(|row| largest_difference(row, &first)).fold(0f32, f32::max)
        };
        let far = far(&nothing).max(far(&more));
        if far > 1e-5 * first.iter().fold(1f32, |m, v| m.max(v.abs())) {
            return Err(format!("the norm's input is not `{stream}` + `{end}`: they differ by {far:.1e}"));
        }
        Ok(first)
    };
    let added = added().map_err(|reason| miss(SiteKind::Norm, &norm.node, reason))?;
    branch.bias.iter_mut().zip(added).for_each(|(bias, more)| *bias += more);
    Ok(norm.clone())
}

/// The norm after the embeddings, and the linear map between it and the first layer where there is one.
fn embedding(cx: &Context<'_>, found: &Recognition, input: &str) -> Found<(NormSite, Option<LinearSite>)> {
    if let Some(norm) = found.norms.iter().find(|n| n.output == input) {
        return Ok((norm.clone(), None));
    }
    if let Ok(linear) = linear_before(cx, input, Layout::Rows)
        && cx.recording.shape(&linear.input).len() == 3
        && let Some(norm) = found.norms.iter().find(|n| n.output == linear.input)
    {
        return Ok((norm.clone(), Some(linear)));
    }
    Err(miss(SiteKind::Norm, input, "the first layer does not start from a layer normalisation of the embeddings"))
}

/// Norms and activations that lie inside the encoder but belong to no layer, and layers that the head seems to hold: their
/// attention was not recognised.
fn unclaimed(cx: &Context<'_>, found: &mut Recognition, layers: &[Layer], embedding_norm: &NormSite) {
    let end = layers.last().and_then(|l| cx.index.producer_at(&l.output_norm.output));
    let inside = |at: usize| end.is_some_and(|end| at < end);
    let lost =
        found.explanations.iter().filter(|e| e.reason.is_some() && e.kind != SiteKind::Attention && inside(e.at));
    let mut misses: Vec<Miss> = lost
        .map(|e| Miss { tried: e.tried.clone(), ..miss(e.kind, &e.node, e.reason.clone().unwrap_or_default()) })
        .collect();
    let of_layers: HashSet<&str> = layers
        .iter()
        .flat_map(|l| [&l.attention_norm.output, &l.output_norm.output, &l.activation.output])
        .chain([&embedding_norm.output])
        .map(String::as_str)
        .collect();
    let norms = found.norms.iter().map(|site| (SiteKind::Norm, &site.node, &site.output, &site.input));
    let activations =
        found.activations.iter().map(|site| (SiteKind::Activation, &site.node, &site.output, &site.input));
    for (kind, node, output, input) in norms.chain(activations) {
        if of_layers.contains(output.as_str()) {
            continue;
        }
        if cx.index.producer_at(output).is_some_and(inside) {
            misses.push(miss(kind, node, "it belongs to no layer: the attention of its layer was not recognised"));
        } else if kind == SiteKind::Norm && is_sum(cx, input) {
            let reason =
                "it normalises a sum, as layers do, but comes after the last layer whose attention was recognised";
            misses.push(miss(kind, node, reason));
        }
    }
    found.misses.extend(misses);
}

/// Whether a value is the sum of two that both depend on data.
fn is_sum(cx: &Context<'_>, value: &str) -> bool {
    cx.index.producer(value).is_some_and(|node| node.is("Add") && cx.index.data_inputs(node).len() == 2)
}

#[cfg(test)]
mod tests {
    use mabert_graph::{Builder, ElementType, Expr, Tensor};

    use super::*;
    use crate::pipeline::Rewriting;
    use crate::testing::{GELUS, LINEARS, MASKS, NORMS, Spelling, encoder_with, furthest, options};

    fn recognised(model: &Model) -> Recognition {
        let mut model = model.clone();
        crate::lower::simplify(&mut model).unwrap();
        recognise(&model).unwrap()
    }

    #[test]
    fn every_spelling_is_recognised_and_brought_into_the_same_form() {
        let plain = Spelling::default();
        let norms = (0..NORMS).map(|norm| Spelling { norm, ..plain });
        let gelus = (0..GELUS).map(|gelu| Spelling { gelu, ..plain });
        let masks = (0..MASKS).map(|mask| Spelling { mask, ..plain });
        let linears = (0..LINEARS).map(|linear| Spelling { linear, ..plain });
        let mixed = (0..NORMS).map(|i| Spelling { norm: i, gelu: i % GELUS, mask: i % MASKS, linear: i % LINEARS });
        for spelling in norms.chain(gelus).chain(masks).chain(linears).chain(mixed) {
            let model = encoder_with(spelling, |scores, _| scores);
            let found = recognised(&model);
            assert!(found.misses.is_empty(), "{spelling:?}: {:#?}", found.misses);
            assert_eq!((found.attentions.len(), found.activations.len(), found.norms.len()), (1, 1, 3), "{spelling:?}");
            let site = &found.attentions[0];
            assert!((site.scale * found.encoder.unwrap().layers[0].query.scale - 0.5).abs() < 1e-4, "{spelling:?}");
            let rewriting = Rewriting::new(model.clone(), options(None)).unwrap();
            let far = furthest(&model, &rewriting.teacher);
            assert!(far < 1e-4, "{spelling:?}: {far}");
        }
    }

    /// What is done to the scores is no scaled dot-product attention with a padding mask: refused, with the reason.
    #[test]
    fn other_masks_and_biases_are_refused_with_the_reason() {
        fn causal<'b>(scores: Expr<'b>, b: &'b Builder) -> Expr<'b> {
            let n = 16;
            let later = (0..n * n).map(|at| if at % n > at / n { f32::NEG_INFINITY } else { 0.0 }).collect();
            let table = b.parameter("later", &Tensor::new(&[n, n], later));
            let length = scores.shape().slice(0, 2, 3);
            scores + table.slice(0, 0, length).slice(1, 0, length)
        }
        fn biased<'b>(scores: Expr<'b>, b: &'b Builder) -> Expr<'b> {
            let table = b.parameter("bias", &Tensor::new(&[16, 16], (0..256).map(|i| (i % 7) as f32).collect()));
            let length = scores.shape().slice(0, 2, 3);
            scores + table.slice(0, 0, length).slice(1, 0, length)
        }
        fn capped<'b>(scores: Expr<'b>, _: &'b Builder) -> Expr<'b> {
            scores.tanh() * 3.0
        }
        type Change = for<'b> fn(Expr<'b>, &'b Builder) -> Expr<'b>;
        let changes: [(Change, &str); 3] = [(causal, "causal"), (biased, "added"), (capped, "softmax")];
        for (change, reason) in changes {
            let model = encoder_with(Spelling::default(), change);
            let tried = recognised(&model).misses.remove(0).tried.unwrap();
            assert!(tried.nodes.iter().any(|n| n.starts_with("Softmax")), "{tried}");
            let message = Rewriting::new(model, options(None)).unwrap_err().to_string();
            assert!(message.contains(reason), "{reason}: {message}");
        }
    }

    /// Tools name nodes by their operators, or all alike.
    #[test]
    fn names_of_nodes_say_nothing() {
        let rename = |to: fn(&str) -> String| {
            let mut model = encoder_with(Spelling::default(), |scores, _| scores);
            model.graph_mut().node.iter_mut().for_each(|node| node.name = to(&node.op_type));
            recognised(&model)
        };
        for to in [|op: &str| op.to_owned(), |_: &str| "node".to_owned()] {
            let found = rename(to);
            assert!(found.misses.is_empty() && found.encoder.is_some(), "{:#?}", found.misses);
        }
        // What is lost is seen even so: a norm that is none, and the layer around it.
        let mut model = encoder_with(Spelling::default(), |scores, _| scores.tanh() * 3.0);
        model.graph_mut().node.iter_mut().for_each(|node| node.name = "node".to_owned());
        assert!(!recognised(&model).misses.is_empty());
    }

    #[test]
    fn a_map_with_other_rows_than_tokens_before_an_activation_is_no_fault() {
        let b = Builder::new(17, "test");
        let ids = b.input("input_ids", ElementType::I64, &["batch", "n"]);
        let words = b.constant("words", &Tensor::new(&[9, 4], (0..36).map(|i| (i % 5) as f32 - 2.0).collect()));
        let weight = b.constant("w", &Tensor::new(&[4, 16], (0..64).map(|i| (i % 7) as f32 - 3.0).collect()));
        let model = b.model(&[words.gather(ids).matmul(weight).reshape(&[0, -1, 4]).relu().named("y")]);
        assert!(recognised(&model).encoder.is_none());
    }

    #[test]
    fn a_model_without_attention_is_no_encoder() {
        let b = Builder::new(17, "test");
        let ids = b.input("input_ids", ElementType::I64, &["batch", "n"]);
        let words = b.constant("words", &Tensor::new(&[9, 2], vec![0.5f32; 18]));
        let model = b.model(&[words.gather(ids).relu().named("y")]);
        let message = Rewriting::new(model, options(None)).unwrap_err().to_string();
        assert!(message.contains("not a BERT-family encoder"), "{message}");
    }
}

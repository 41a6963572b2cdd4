//! Exact: where the head takes first tokens alone, the last layer computes nothing else.
//!
//! A pooler takes the first token's hidden state. Keys and values of the last layer are still those of all tokens; its
//! queries, contexts, residuals and feed-forward network are not.
//!
//! What is asked here is whether nodes *take* the first token, which the graph tells: only then may the others be gone. A
//! head may *depend* on the first token alone without that, as one does that works on all and takes the first of its
//! results; to weigh tokens that is enough, and the transfer asks it by trying.

use std::collections::HashSet;

use mabert_graph::proto::NodeProto;
use mabert_graph::{Builder, Index, Model, NodeExt as _};

use crate::Result;
use crate::sites::{Encoder, Layer};

/// Cuts the last layer to the first token of each sequence, if nothing else of it is used; `encoder` then describes it.
///
/// # Errors
/// The graph's wiring is broken.
pub(crate) fn keep_first_token(model: &mut Model, encoder: &mut Encoder) -> Result<usize> {
    let Some(layer) = encoder.layers.last_mut() else { return Ok(0) };
    let Some(cut) = cut(model, layer)? else { return Ok(0) };
    let builder = Builder::new(model.opset(), "first-token");
    builder.scope(&format!("layer.{}/first_token", layer.index));
    let first = builder.value(&layer.input).slice(1, 0, 1).name();
    let graph = model.graph_mut();
    for at in cut.readers {
        graph.node[at].input.iter_mut().filter(|v| **v == layer.input).for_each(|v| v.clone_from(&first));
    }
    // They are no longer what the teacher has by these names.
    let rename = |value: &mut String| {
        if cut.values.contains(value) {
            value.push_str("/first_token");
        }
    };
    graph.node.iter_mut().flat_map(|node| node.input.iter_mut().chain(&mut node.output)).for_each(rename);
    let (attention, activation) = (&mut layer.attention, &mut layer.activation);
    let values = [&mut attention.query, &mut attention.products, &mut attention.probabilities, &mut attention.context];
    values.into_iter().for_each(rename);
    [&mut activation.input, &mut activation.output].into_iter().for_each(rename);
    for map in [&mut layer.query, &mut layer.attention_output, &mut layer.intermediate, &mut layer.output] {
        [&mut map.input, &mut map.output].into_iter().for_each(rename);
    }
    for norm in [&mut layer.attention_norm, &mut layer.output_norm] {
        [&mut norm.input, &mut norm.output].into_iter().for_each(rename);
    }
    layer.query.input = first;
    builder.patch().apply(model)?;
    Ok(1)
}

/// What is cut down to the first token.
struct Cut {
    /// The nodes that are to read the first token of the layer's input alone: the queries' product and the residual.
    readers: Vec<usize>,
    /// All values of the layer that then have one token.
    values: HashSet<String>,
}

/// `None` where more of the layer is used than the first token of what it ends in.
fn cut(model: &Model, layer: &Layer) -> Result<Option<Cut>> {
    let hidden = layer.output_norm.output.as_str();
    let index = Index::new(model)?;
    let nodes = &index.graph().node;
    let reads = |node: &NodeProto, value: &str| node.input.iter().any(|v| v == value);
    if index.is_output(hidden) || !index.consumers(hidden).all(|node| takes_first(model, node, hidden)) {
        return Ok(None);
    }
    let mut readers = Vec::new();
    for &at in index.consumers_at(&layer.input) {
        let node = &nodes[at];
        if reads(node, &layer.query.weight) || node.is("Add") {
            readers.push(at);
        } else if ![&layer.key, &layer.value].iter().any(|map| reads(node, &map.weight)) {
            return Ok(None);
        }
    }
    if readers.len() != 2 {
        return Ok(None);
    }
    Ok(computed_from(&index, &readers, hidden).map(|values| Cut { readers, values }))
}

/// All that is computed from what `readers` read, up to `hidden`; `None` where some of it is used otherwise.
fn computed_from(index: &Index<'_>, readers: &[usize], hidden: &str) -> Option<HashSet<String>> {
    let nodes = &index.graph().node;
    let mut values = HashSet::from([hidden.to_owned()]);
    let mut open = readers.to_vec();
    let mut seen: HashSet<usize> = open.iter().copied().collect();
    while let Some(at) = open.pop() {
        if nodes[at].is("Shape") {
            return None;
        }
        for value in nodes[at].output.iter().filter(|value| *value != hidden) {
            if index.is_output(value) {
                return None;
            }
            values.insert(value.clone());
            open.extend(index.consumers_at(value).iter().filter(|&&next| seen.insert(next)));
        }
    }
    Some(values)
}

/// Whether a node takes the first of axis 1 of `value`.
fn takes_first(model: &Model, node: &NodeProto, value: &str) -> bool {
    let is = |at: usize, wanted: f32| {
        let values = node.input.get(at).and_then(|name| model.constant(name).ok());
        values.is_some_and(|values| values.to_f32().iter().eq([wanted].iter()))
    };
    let slice = node.is("Slice") && is(1, 0.0) && is(2, 1.0) && is(3, 1.0) && (node.input.len() < 5 || is(4, 1.0));
    let gather = node.is("Gather") && node.int("axis", 0) == 1 && is(1, 0.0);
    node.input[0] == value && (slice || gather)
}

#[cfg(test)]
mod tests {
    use mabert_graph::proto::ValueInfoProto;

    use super::*;
    use crate::pipeline::Pass;
    use crate::testing::{inputs, layer_text, student, values};
    use mabert_runtime::borrowed;

    /// The student with a head behind its hidden states.
    fn with_head(pass: Pass, head: impl Fn(mabert_graph::Expr<'_>) -> String) -> (Model, Encoder) {
        let student = student(pass);
        let mut model = student.model;
        let builder = Builder::new(model.opset(), "head");
        let name = head(builder.value("last_hidden_state"));
        model.graph_mut().output = vec![ValueInfoProto { name, ..ValueInfoProto::default() }];
        builder.patch().apply(&mut model).unwrap();
        (model, student.encoder)
    }

    fn outputs(model: &Model, lengths: &[usize]) -> Vec<f32> {
        let inputs = inputs(lengths);
        let runnable = mabert_runtime::LoadOptions::default().prepare(model).unwrap();
        runnable.run(&borrowed(&inputs)).unwrap()[0].1.to_f32().iter().copied().collect()
    }

    #[test]
    fn a_head_that_takes_first_tokens_gets_the_same() {
        let sliced = |x: mabert_graph::Expr<'_>| (x.slice(1, 0, 1) * 2.0).named("head").name();
        let (before, mut encoder) = with_head(Pass::Fold, sliced);
        let mut after = before.clone();
        assert_eq!(keep_first_token(&mut after, &mut encoder).unwrap(), 1);
        for lengths in [&[1][..], &[4], &[6, 3, 1], &[2, 5]] {
            let (x, y) = (outputs(&before, lengths), outputs(&after, lengths));
            assert_eq!(x.len(), y.len());
            assert!(x.iter().zip(&y).all(|(x, y)| (x - y).abs() < 1e-4), "{x:?} {y:?}");
        }
        insta::assert_snapshot!(layer_text(&after));
        // What is still called as before is as before.
        let computed = |model: &Model| -> HashSet<String> {
            model.graph().node.iter().flat_map(|node| node.output.iter().cloned()).collect()
        };
        let both: Vec<String> = computed(&before).intersection(&computed(&after)).cloned().collect();
        let floats = both.iter().filter(|name| name.contains("layer.") && !name.contains("head"));
        let names: Vec<&str> = floats.map(String::as_str).collect();
        assert!(names.len() > 5, "{both:?}");
        for (x, y) in values(&before, &names, &[6, 3]).iter().zip(&values(&after, &names, &[6, 3])) {
            assert_eq!(x.shape(), y.shape());
        }
        // Queries no longer read what keys and values do, so two products are left.
        let merged = crate::lower::merge_query_key_value(&mut after, &encoder).unwrap();
        assert_eq!(merged, 1);
        let (x, y) = (outputs(&before, &[6, 3]), outputs(&after, &[6, 3]));
        assert!(x.iter().zip(&y).all(|(x, y)| (x - y).abs() < 1e-4), "{x:?} {y:?}");
    }

    fn keep((mut model, mut encoder): (Model, Encoder)) -> usize {
        keep_first_token(&mut model, &mut encoder).unwrap()
    }

    #[test]
    fn layers_that_are_used_whole_stay_whole() {
        // All tokens, another token, two tokens, and hidden states that are an output too.
        assert_eq!(keep(with_head(Pass::Fold, |x| x.transpose(&[1, 0, 2]).name())), 0);
        assert_eq!(keep(with_head(Pass::Fold, |x| x.slice(1, 1, 2).name())), 0);
        assert_eq!(keep(with_head(Pass::Fold, |x| x.slice(1, 0, 2).name())), 0);
        let (mut model, encoder) = with_head(Pass::Fold, |x| x.slice(1, 0, 1).name());
        let hidden = ValueInfoProto { name: "last_hidden_state".to_owned(), ..ValueInfoProto::default() };
        model.graph_mut().output.push(hidden);
        assert_eq!(keep((model, encoder)), 0);
    }
}

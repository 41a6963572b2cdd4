//! The linear maps before and after a site: which region is one, `linear` tells.

use mabert_graph::proto::NodeProto;
use mabert_graph::{Dependence, NodeExt as _, Tensor};

use super::context::Context;
use super::explanation::Miss;
use super::linear::{self, Layout};
use super::region::{Region, Users, chain, is_layout_only};
use crate::sites::{LinearSite, SiteKind};

/// Values after a site at which its linear map may end.
const MOST_EXITS: usize = 16;

/// The value `[batch, n, channels]` behind flattened tokens `[batch * n, channels]`, which several maps may share.
fn unflattened(cx: &Context<'_>, value: &str) -> String {
    let mut source = value;
    while let (2, Some(node)) = (cx.recording.shape(source).len(), cx.index.producer(source)) {
        // A cast to integers and back would lose what lies between them.
        let element = |value: &str| cx.recording.value(value).map(Tensor::element_type);
        let moves = is_layout_only(node) && node.input.first().is_some_and(|input| element(input) == element(source));
        match node.input.first() {
            Some(input) if moves && cx.index.dependence(input) == Dependence::Data => source = input,
            _ => break,
        }
    }
    match (cx.recording.shape(source), cx.recording.shape(value)) {
        (&[batch, n, channels], &[rows, same]) if batch * n == rows && channels == same => source.to_owned(),
        _ => value.to_owned(),
    }
}

/// A value `[batch, n, channels]`, and what else it is called with its tokens flattened.
pub(super) fn with_flattened<'m>(cx: &Context<'m>, value: &'m str) -> Vec<&'m str> {
    let mut forms = vec![value];
    let flattened = |node: &'m NodeProto| {
        let output = node.output.first().filter(|_| is_layout_only(node))?;
        (unflattened(cx, output) == value && output != value).then_some(output.as_str())
    };
    forms.extend(cx.index.consumers(value).filter_map(flattened));
    forms
}

/// The linear map that ends in `value`. Where it works on flattened or transposed tokens, it starts before they become so.
pub(super) fn linear_before(cx: &Context<'_>, value: &str, layout: Layout) -> Result<LinearSite, Miss> {
    let mut nearest = Err(Miss::new(SiteKind::Linear, value, "no product with a constant weight leads to it"));
    let mut known: &[usize] = &[];
    let holds_weight = |region: &Region| region.nodes.iter().any(|&at| linear::has_weight(cx, at));
    let regions = Region::ending_in(&cx.index, value, Users::Anyone);
    let has_own_product = |region: &Region| holds_weight(region) && region.has_single_exit(&cx.index);
    // One product may make queries, keys and values; what moves elements before it they may share in any case.
    let shares_product = !regions.iter().any(has_own_product);
    let moves_only = |at: &usize| {
        let node = &cx.index.graph().node[*at];
        is_layout_only(node) || node.is("Transpose")
    };
    let starts = |region: &&Region| if shares_product { holds_weight(region) } else { has_own_product(region) };
    for region in regions.iter().skip_while(|region| !starts(region)) {
        if !known.is_empty() && !region.nodes.iter().filter(|at| !known.contains(at)).all(moves_only) {
            break;
        }
        match linear::read_off(cx, region, Layout::Rows, layout) {
            Ok(site) => nearest = Ok(site),
            Err(_) if nearest.is_ok() => break,
            Err(reason) if known.is_empty() => {
                nearest = Err(Miss::new(SiteKind::Linear, value, reason).with_tried(cx.tried(region)));
            }
            Err(_) => {}
        }
        known = &region.nodes;
    }
    nearest.map(|site| LinearSite { input: unflattened(cx, &site.input), ..site })
}

/// The linear map that starts at `value`.
pub(super) fn linear_after(cx: &Context<'_>, value: &str, layout: Layout) -> Result<LinearSite, Miss> {
    let mut furthest = Err(Miss::new(SiteKind::Linear, value, "no product with a constant weight follows it"));
    for exit in chain(&cx.index, value).into_iter().skip(1).take(MOST_EXITS) {
        let Some(region) = Region::between(&cx.index, &[value], exit) else { break };
        if region.nodes.iter().any(|&at| linear::has_weight(cx, at)) {
            match linear::read_off(cx, &region, layout, Layout::Rows) {
                Ok(site) => furthest = Ok(site),
                Err(reason) if furthest.is_err() => {
                    furthest = Err(Miss::new(SiteKind::Linear, value, reason).with_tried(cx.tried(&region)));
                }
                Err(_) => break,
            }
        }
    }
    furthest
}

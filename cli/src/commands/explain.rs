//! `explain`: what was tried, and why something was not recognised.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use mabert_graph::{Model, NodeExt as _};
use mabert_passes::pipeline::simplify;
use mabert_passes::recognise::{Explanation, Miss, Tried, recognise};
use serde::Serialize;

use crate::arguments::Global;
use crate::failure::Usage;
use crate::print::{self, Page};

#[derive(Debug, Args)]
pub(crate) struct ExplainArguments {
    /// The model
    model: PathBuf,
    /// Only what concerns this node
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
}

#[derive(Serialize)]
struct Explained {
    anchors: Vec<Explanation>,
    misses: Vec<Miss>,
}

pub(super) fn explain(arguments: &ExplainArguments, global: &Global) -> Result<()> {
    let mut model = Model::load(&arguments.model)?;
    simplify(&mut model)?;
    let recognised = recognise(&model)?;
    let mut explained = Explained { anchors: recognised.explanations, misses: recognised.misses };
    if let Some(name) = &arguments.node {
        explained.anchors.retain(|e| e.node == *name);
        explained.misses.retain(|m| m.node == *name);
        if explained.anchors.is_empty() && explained.misses.is_empty() {
            return Err(Usage(nothing_to_explain(&model, name)).into());
        }
    }
    if global.json {
        return print::json(&explained);
    }
    let mut page = Page::default();
    explained.anchors.iter().for_each(|anchor| add_anchor(&mut page, anchor));
    match explained.misses.as_slice() {
        [] if arguments.node.is_none() => page.line("nothing was missed"),
        misses => misses.iter().for_each(|miss| {
            page.line(format!("missed: {miss}"));
            add_tried(&mut page, miss.tried.as_deref());
        }),
    }
    page.print()
}

fn add_anchor(page: &mut Page, anchor: &Explanation) {
    let Explanation { operator, node, kind, .. } = anchor;
    page.line(match &anchor.reason {
        None => format!("{operator} `{node}`: {kind}, {}", anchor.region.as_deref().unwrap_or("")),
        Some(reason) => format!("{operator} `{node}`: no {kind}: {reason}"),
    });
    add_tried(page, anchor.tried.as_deref());
}

/// What was probed in vain: a person can look at these nodes.
fn add_tried(page: &mut Page, tried: Option<&Tried>) {
    if let Some(tried) = tried {
        page.line(format!("  tried {tried}"));
    }
}

/// Why there is nothing to say about a node.
fn nothing_to_explain(model: &Model, name: &str) -> String {
    let nodes = &model.graph().node;
    match nodes.iter().find(|n| n.label() == name) {
        Some(node) => format!(
            "node `{name}` ({}) is no anchor; anchors are Softmax (or its Exp), the roots and powers of norms, and activations: run \
             `explain` without --node to see them",
            node.op_type
        ),
        None => format!("there is no node `{name}`; `inspect --graph` or `explain` without --node list what there is"),
    }
}

//! `explain`: what was tried, and why something was not recognised.

use anyhow::Result;
use mabert_graph::{Model, NodeExt as _};
use mabert_passes::pipeline::simplify;
use mabert_passes::recognise::{Explanation, Miss, Tried, recognise};
use serde::Serialize;

use crate::arguments::{Explain, Global};
use crate::failure::Usage;
use crate::print;

#[derive(Serialize)]
struct Explained {
    anchors: Vec<Explanation>,
    misses: Vec<Miss>,
}

pub(super) fn explain(arguments: &Explain, global: &Global) -> Result<()> {
    let mut model = Model::load(&arguments.model)?;
    simplify(&mut model)?;
    let found = recognise(&model)?;
    let mut explained = Explained { anchors: found.explanations, misses: found.misses };
    if let Some(name) = &arguments.node {
        explained.anchors.retain(|e| e.node == *name);
        explained.misses.retain(|m| m.node == *name);
        if explained.anchors.is_empty() && explained.misses.is_empty() {
            return Err(Usage(nothing_there(&model, name)).into());
        }
    }
    if global.json {
        return print::json(&explained);
    }
    for anchor in &explained.anchors {
        match (&anchor.reason, &anchor.region) {
            (None, region) => {
                let region = region.as_deref().unwrap_or("");
                println!("{} `{}`: {}, {region}", anchor.operator, anchor.node, anchor.kind);
            }
            (Some(reason), _) => println!("{} `{}`: no {}: {reason}", anchor.operator, anchor.node, anchor.kind),
        }
        print_tried(anchor.tried.as_deref());
    }
    match explained.misses.as_slice() {
        [] if arguments.node.is_none() => println!("nothing was missed"),
        misses => misses.iter().for_each(|miss| {
            println!("missed: {miss}");
            print_tried(miss.tried.as_deref());
        }),
    }
    Ok(())
}

/// What was probed in vain: a person can look at these nodes.
fn print_tried(tried: Option<&Tried>) {
    if let Some(tried) = tried {
        println!("  tried {tried}");
    }
}

/// Why there is nothing to say about a node.
fn nothing_there(model: &Model, name: &str) -> String {
    let nodes = &model.graph().node;
    match nodes.iter().find(|n| n.label() == name) {
        Some(node) => format!(
            "node `{name}` ({}) is no anchor; anchors are Softmax, the roots and powers of norms, and activations: run \
             `explain` without --node to see them",
            node.op_type
        ),
        None => format!("there is no node `{name}`; `inspect --graph` or `explain` without --node list what there is"),
    }
}

//! Regions: the nodes between a few entry values and one exit value.

use std::collections::{BTreeSet, HashSet};

use mabert_graph::proto::NodeProto;
use mabert_graph::{Dependence, Index};

/// The nodes that lead from `entries` to `exit`, in graph order. Nothing inside is used outside, but where it is said.
#[derive(Clone, Debug)]
pub(crate) struct Region {
    pub(crate) entries: Vec<String>,
    pub(crate) exit: String,
    pub(crate) nodes: Vec<usize>,
}

/// Regions larger than this are not what a site looks like.
const LARGEST: usize = 48;

/// Who may use the values inside a region.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Users {
    /// Nodes of the region.
    InsideOnly,
    /// Others too.
    Anyone,
}

impl Region {
    /// The region from `entries` to `exit`, if the exit depends on no other data and the inside has no other exit.
    pub(crate) fn between(index: &Index<'_>, entries: &[&str], exit: &str) -> Option<Self> {
        Self::spanning(index, entries, exit).filter(|r| r.has_single_exit(index))
    }

    /// The region from `entries` to `exit`, whose inside others may use too: layers share the mask's preparation.
    pub(crate) fn spanning(index: &Index<'_>, entries: &[&str], exit: &str) -> Option<Self> {
        let mut nodes = HashSet::new();
        let mut open = vec![exit];
        while let Some(value) = open.pop() {
            if entries.contains(&value) || index.dependence(value) != Dependence::Data {
                continue;
            }
            let at = index.producer_at(value)?;
            if nodes.insert(at) {
                if nodes.len() > LARGEST {
                    return None;
                }
                open.extend(index.data_inputs(&index.graph().node[at]));
            }
        }
        let mut nodes: Vec<usize> = nodes.into_iter().collect();
        nodes.sort_unstable();
        Some(Self { entries: entries.iter().map(|e| (*e).to_owned()).collect(), exit: exit.to_owned(), nodes })
    }

    /// Whether nothing inside is used outside.
    pub(crate) fn has_single_exit(&self, index: &Index<'_>) -> bool {
        let inside = |at: &usize| self.nodes.binary_search(at).is_ok();
        self.nodes
            .iter()
            .flat_map(|&at| &index.graph().node[at].output)
            .filter(|o| **o != self.exit)
            .all(|value| !index.is_output(value) && index.readers_at(value).all(|at| inside(&at)))
    }

    /// The nodes that depend on the first entry.
    pub(crate) fn behind_first_entry(&self, index: &Index<'_>) -> Vec<usize> {
        let mut values: HashSet<&str> = self.entries.first().map(String::as_str).into_iter().collect();
        let mut nodes = self.nodes.clone();
        nodes.retain(|&at| {
            let node = &index.graph().node[at];
            let behind = node.input.iter().any(|input| values.contains(input.as_str()));
            values.extend(node.output.iter().map(String::as_str).filter(|_| behind));
            behind
        });
        nodes
    }

    pub(crate) fn contains(&self, node: usize) -> bool {
        self.nodes.binary_search(&node).is_ok()
    }

    /// The single-entry regions that end in `exit`, from the smallest; entries are `exit`'s dominators.
    pub(crate) fn ending_in(index: &Index<'_>, exit: &str, users: Users) -> Vec<Self> {
        let mut regions = Vec::new();
        let mut frontier: Vec<&str> = vec![exit];
        for _ in 0..LARGEST {
            // The latest value cannot lead to the others: expanding it keeps the frontier a cut of the graph.
            let latest = frontier.iter().enumerate().max_by_key(|(_, v)| index.producer_at(v)).map(|(i, _)| i);
            let Some(latest) = latest else { break };
            let Some(node) = index.producer(frontier.swap_remove(latest)) else { break };
            for input in index.data_inputs(node) {
                if !frontier.contains(&input) {
                    frontier.push(input);
                }
            }
            if let [entry] = frontier.as_slice() {
                let region = Self::spanning(index, &[entry], exit);
                regions.extend(region.filter(|r| users == Users::Anyone || r.has_single_exit(index)));
            }
        }
        regions
    }
}

/// `value` and its post-dominators: the values through which everything computed from it passes, in order. They are the
/// candidates for the exit of a site. What only feeds shapes does not count.
pub(crate) fn chain<'g>(index: &Index<'g>, value: &'g str) -> Vec<&'g str> {
    let graph = index.graph();
    let mut chain = vec![value];
    let mut pending: BTreeSet<usize> = index.readers_at(value).collect();
    let mut escapes = index.is_output(value);
    for _ in 0..LARGEST {
        // The earliest node first: when none is left beside it, all paths have met in it.
        let Some(at) = pending.pop_first() else { break };
        if escapes {
            break;
        }
        let outputs = &graph.node[at].output;
        if let (true, [output]) = (pending.is_empty(), outputs.as_slice()) {
            chain.push(output);
        }
        for output in outputs {
            pending.extend(index.readers_at(output));
            escapes |= index.is_output(output);
        }
    }
    chain
}

/// Operators that leave the elements, and their order, as they are.
const LAYOUT_ONLY: [&str; 6] = ["Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Cast"];

/// Whether a node leaves the elements, and their order, as they are.
pub(crate) fn is_layout_only(node: &NodeProto) -> bool {
    LAYOUT_ONLY.contains(&node.op_type.as_str())
}

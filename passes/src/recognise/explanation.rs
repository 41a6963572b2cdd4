//! What is said of anchors: what they are, or what was tried, and why it is not enough.

use serde::Serialize;

use crate::sites::SiteKind;

/// A site that was expected and not recognised.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Miss {
    /// The layer, where it is known.
    pub layer: Option<usize>,
    /// What was expected.
    pub expected: SiteKind,
    /// The anchor's node, or the value at which the search ended.
    pub node: String,
    /// The probe that failed and by how much, or what was not found.
    pub reason: String,
    /// What was probed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tried: Option<Box<Tried>>,
}

impl Miss {
    pub(super) fn new(expected: SiteKind, node: &str, reason: impl Into<String>) -> Self {
        Self { layer: None, expected, node: node.to_owned(), reason: reason.into(), tried: None }
    }

    pub(super) fn in_layer(self, index: usize) -> Self {
        Self { layer: Some(index), ..self }
    }

    pub(super) fn with_tried(self, tried: Box<Tried>) -> Self {
        Self { tried: Some(tried), ..self }
    }
}

/// A region that was probed and is no site.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Tried {
    /// The values that it starts from; the probe gives numbers of its own there.
    pub entries: Vec<String>,
    /// The value that it ends in.
    pub exit: String,
    /// The nodes between, as "Operator `name`".
    pub nodes: Vec<String>,
}

impl std::fmt::Display for Tried {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "from `{}` to `{}`: {}", self.entries.join("`, `"), self.exit, self.nodes.join(", "))
    }
}

impl std::fmt::Display for Miss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let layer = self.layer.map_or_else(String::new, |l| format!("layer {l}, "));
        write!(f, "{layer}{} at `{}`: {}", self.expected, self.node, self.reason)
    }
}

/// One anchor and what became of it.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Explanation {
    /// The anchor's node.
    pub node: String,
    /// Its place among the graph's nodes: names may repeat.
    #[serde(skip)]
    pub(super) at: usize,
    /// Its operator.
    pub operator: String,
    /// What it is, or what it was tried as.
    pub kind: SiteKind,
    /// Entries and exit of the region, and how many nodes it has, for what was recognised.
    pub region: Option<String>,
    /// Why it was not recognised.
    pub reason: Option<String>,
    /// And what was probed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tried: Option<Box<Tried>>,
}

//! What every recogniser is given, and what it answers.

use mabert_graph::{Index, Model, NodeExt as _};

use super::explanation::{Explanation, Tried};
use super::region::Region;
use crate::recording::Recording;
use crate::sites::SiteKind;

/// The model, who uses what in it, and its values in one small run.
pub(super) struct Context<'m> {
    pub(super) model: &'m Model,
    pub(super) index: Index<'m>,
    pub(super) recording: Recording,
}

impl Context<'_> {
    /// A region, in words for people.
    pub(super) fn tried(&self, region: &Region) -> Box<Tried> {
        let name = |&at: &usize| {
            let node = &self.index.graph().node[at];
            format!("{} `{}`", node.op_type, node.label())
        };
        let Region { entries, exit, nodes } = region;
        Box::new(Tried { entries: entries.clone(), exit: exit.clone(), nodes: nodes.iter().map(name).collect() })
    }

    /// What is said of the anchor at `at`.
    pub(super) fn explanation<T>(&self, at: usize, kind: SiteKind, verdict: &Verdict<T>) -> Explanation {
        let node = &self.index.graph().node[at];
        let words = |r: &Region| format!("{} -> {} ({} nodes)", r.entries.join(", "), r.exit, r.nodes.len());
        let (region, reason, tried) = match verdict {
            Verdict::Site(_, region) => (Some(words(region)), None, None),
            Verdict::NotASite(reason, tried) => {
                (None, Some(reason.clone()), tried.as_ref().map(|region| self.tried(region)))
            }
        };
        let (node, operator) = (node.label().to_owned(), node.op_type.clone());
        Explanation { node, at, operator, kind, region, reason, tried }
    }
}

/// The outcome for one anchor.
pub(super) enum Verdict<T> {
    /// The site, and the nodes that compute it.
    Site(T, Region),
    /// Why it is none, and the region that was probed last, if any was.
    NotASite(String, Option<Region>),
}

impl<T> Verdict<T> {
    pub(super) fn is_site(&self) -> bool {
        matches!(self, Self::Site(..))
    }

    /// Why it is no site.
    pub(super) fn reason(&self) -> Option<&str> {
        match self {
            Self::Site(..) => None,
            Self::NotASite(reason, _) => Some(reason),
        }
    }

    pub(super) fn map<U>(self, wrap: impl FnOnce(T) -> U) -> Verdict<U> {
        match self {
            Self::Site(site, region) => Verdict::Site(wrap(site), region),
            Self::NotASite(reason, tried) => Verdict::NotASite(reason, tried),
        }
    }
}

//! From a graph to typed sites.
//!
//! Every node that may be the heart of a site is an anchor; [`recognise()`] tries each (`attention`, `activation`,
//! `norm`) by probing the regions around it. `assemble` then makes layers of the sites, with the linear maps that `maps`
//! finds between them.

mod activation;
mod assemble;
mod attention;
mod context;
mod explanation;
mod linear;
mod maps;
mod norm;
mod probe;
mod region;

use std::collections::HashSet;

use mabert_graph::proto::NodeProto;
use mabert_graph::{Dependence, Index, Model, NodeExt as _};

use crate::recording::Recording;
use crate::sites::{ActivationSite, AttentionSite, Encoder, NormSite, SiteKind};
use crate::{Error, Result};
use context::{Context, Verdict};
pub use explanation::{Explanation, Miss, Tried};

/// How many sentences, and of how many tokens, models are run on to be recognised.
pub const PROBED: (usize, usize) = (2, 7);

/// What was found in a model.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
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

    fn add(&mut self, site: Site) {
        match site {
            Site::Attention(site) => self.attentions.push(site),
            Site::Activation(site) => self.activations.push(site),
            Site::Norm(site) => self.norms.push(site),
        }
    }
}

enum Site {
    Attention(AttentionSite),
    Activation(ActivationSite),
    Norm(NormSite),
}

/// What a node may be the heart of.
struct Anchor {
    kind: SiteKind,
    is_anchor: fn(&NodeProto) -> bool,
    recognise: fn(&Context<'_>, usize) -> Verdict<Site>,
    /// Whether nodes of a site's region are anchors no more.
    claims_region: bool,
    /// Whether it is worth a word that a node is no site, for this reason.
    explains_failure: fn(&NodeProto, &str) -> bool,
}

/// A node is tried as what the first row that takes it says.
const ANCHORS: [Anchor; 3] = [
    Anchor {
        kind: SiteKind::Attention,
        is_anchor: attention::is_anchor,
        recognise: |cx, at| attention::recognise(cx, at).map(Site::Attention),
        // The mask's preparation is in the regions of all layers.
        claims_region: false,
        explains_failure: attention::explains_failure,
    },
    Anchor {
        kind: SiteKind::Activation,
        is_anchor: activation::is_anchor,
        recognise: |cx, at| activation::recognise(cx, at).map(Site::Activation),
        claims_region: true,
        explains_failure: |_, _| true,
    },
    Anchor {
        kind: SiteKind::Norm,
        is_anchor: norm::is_anchor,
        recognise: |cx, at| norm::recognise(cx, at).map(Site::Norm),
        claims_region: true,
        // Powers are everywhere.
        explains_failure: |node, _| !node.is("Pow"),
    },
];

/// Finds the sites of `model`, which must be free of fused operators and of unfolded constants
/// ([`simplify`](crate::pipeline::simplify)).
///
/// # Errors
/// The model cannot be run at all. What is not recognised is no error but a [`Miss`].
pub fn recognise(model: &Model) -> Result<Recognition> {
    let (batch, length) = PROBED;
    let cx = Context { model, index: Index::new(model)?, recording: Recording::at_any_size(model, batch, length)? };
    let mut recognition = Recognition::default();
    let mut claimed = HashSet::new();
    for (at, node) in cx.index.graph().node.iter().enumerate() {
        if claimed.contains(&at) || node.output.first().is_none_or(|o| cx.index.dependence(o) != Dependence::Data) {
            continue;
        }
        let Some(anchor) = ANCHORS.iter().find(|anchor| (anchor.is_anchor)(node)) else { continue };
        let verdict = (anchor.recognise)(&cx, at);
        if verdict.reason().is_none_or(|reason| (anchor.explains_failure)(node, reason)) {
            recognition.explanations.push(cx.explanation(at, anchor.kind, &verdict));
        }
        if let Verdict::Site(site, region) = verdict {
            recognition.add(site);
            claimed.extend(region.nodes.into_iter().filter(|_| anchor.claims_region));
        }
    }
    let assembly = assemble::assemble(&cx, &recognition);
    Ok(Recognition { encoder: assembly.encoder, misses: assembly.misses, ..recognition })
}

#[cfg(test)]
mod tests {
    use mabert_graph::{Builder, ElementType, Expr, Tensor};

    use super::*;
    use crate::pipeline::Rewriting;
    use crate::testing::{GELUS, LINEARS, MASKS, NORMS, Spelling, encoder_with, largest_output_difference, options};

    fn recognised(model: &Model) -> Recognition {
        let mut model = model.clone();
        crate::pipeline::simplify(&mut model).unwrap();
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
            let recognition = recognised(&model);
            assert!(recognition.misses.is_empty(), "{spelling:?}: {:#?}", recognition.misses);
            assert_eq!(
                (recognition.attentions.len(), recognition.activations.len(), recognition.norms.len()),
                (1, 1, 3),
                "{spelling:?}"
            );
            let site = &recognition.attentions[0];
            assert!(
                (site.scale * recognition.encoder.unwrap().layers[0].query.scale - 0.5).abs() < 1e-4,
                "{spelling:?}"
            );
            let rewriting = Rewriting::new(model.clone(), options(None)).unwrap();
            let difference = largest_output_difference(&model, &rewriting.teacher);
            assert!(difference < 1e-4, "{spelling:?}: {difference}");
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
            let recognition = rename(to);
            assert!(recognition.misses.is_empty() && recognition.encoder.is_some(), "{:#?}", recognition.misses);
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

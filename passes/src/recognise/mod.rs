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
use region::Region;

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
    /// Which nodes of a site's region are anchors no more.
    claims: fn(&Context<'_>, &Region) -> Vec<usize>,
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
        claims: |cx, region| region.behind_first_entry(&cx.index),
        explains_failure: attention::explains_failure,
    },
    Anchor {
        kind: SiteKind::Activation,
        is_anchor: activation::is_anchor,
        recognise: |cx, at| activation::recognise(cx, at).map(Site::Activation),
        claims: |_, region| region.nodes.clone(),
        explains_failure: |_, _| true,
    },
    Anchor {
        kind: SiteKind::Norm,
        is_anchor: norm::is_anchor,
        recognise: |cx, at| norm::recognise(cx, at).map(Site::Norm),
        claims: |_, region| region.nodes.clone(),
        // Powers are everywhere.
        explains_failure: |node, _| !node.is("Pow"),
    },
];

/// Whether a node may be the heart of a site.
fn is_anchor(node: &NodeProto) -> bool {
    ANCHORS.iter().any(|anchor| (anchor.is_anchor)(node))
}

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
        let data = node.output.first().is_some_and(|o| cx.index.dependence(o) == Dependence::Data);
        if claimed.contains(&at) || !data || !cx.index.is_used(at) {
            continue;
        }
        let Some(anchor) = ANCHORS.iter().find(|anchor| (anchor.is_anchor)(node)) else { continue };
        let verdict = (anchor.recognise)(&cx, at);
        if verdict.reason().is_none_or(|reason| (anchor.explains_failure)(node, reason)) {
            recognition.explanations.push(cx.explanation(at, anchor.kind, &verdict));
        }
        if let Verdict::Site(site, region) = verdict {
            recognition.add(site);
            claimed.extend((anchor.claims)(&cx, &region));
        }
    }
    let assembly = assemble::assemble(&cx, &recognition);
    Ok(Recognition { encoder: assembly.encoder, misses: assembly.misses, ..recognition })
}

#[cfg(test)]
mod tests {
    use mabert_graph::{Builder, ElementType, Expr, Tensor, largest_difference};

    use super::*;
    use crate::pipeline::Rewriting;
    use crate::testing::{
        GELUS, LAYOUTS, LINEARS, MASKS, NORMS, Spelling, Values, encoder, encoder_with, largest_output_difference,
        options,
    };

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
        let mixed =
            (0..NORMS).map(|i| Spelling { norm: i, gelu: i % GELUS, mask: i % MASKS, linear: i % LINEARS, ..plain });
        let layouts = (0..LAYOUTS * 2).map(|i| Spelling {
            layout: i / 2,
            linear: i % 2,
            norm: i % NORMS,
            gelu: i % GELUS,
            mask: i % MASKS,
            ..plain
        });
        for spelling in norms.chain(gelus).chain(masks).chain(linears).chain(mixed).chain(layouts) {
            let model = encoder_with(spelling, |scores, _| scores);
            let encoder = has_each_site_once(&model, &format!("{spelling:?}"));
            let layer = &encoder.layers[0];
            assert!((layer.attention.scale * layer.query.scale - 0.5).abs() < 1e-4, "{spelling:?}");
        }
    }

    /// One layer, recognised whole, and brought into canonical form.
    fn has_each_site_once(model: &Model, what: &str) -> Encoder {
        let recognition = recognised(model);
        let Recognition { misses, explanations, .. } = &recognition;
        assert!(misses.is_empty(), "{what}: {misses:#?} {explanations:#?}");
        let sites = (recognition.attentions.len(), recognition.activations.len(), recognition.norms.len());
        assert_eq!(sites, (1, 1, 3), "{what}");
        let rewriting = Rewriting::new(model.clone(), options(None)).unwrap();
        let difference = largest_output_difference(model, &rewriting.teacher);
        assert!(difference < 1e-4, "{what}: {difference}");
        recognition.encoder.unwrap()
    }

    /// A norm of two channels leaves nothing but signs, and maps of ones a constant, which the next norm takes away: what
    /// follows such a site seems to belong to it.
    #[test]
    fn a_site_ends_where_another_begins() {
        for (channels, values) in
            [(2, Values::Random), (2, Values::Ones), (2, Values::Identity), (8, Values::Ones), (8, Values::Identity)]
        {
            for norm in 0..NORMS {
                // With a mask, without one, and with flattened tokens.
                for (mask, linear) in [(0, 0), (4, 1), (4, 2)] {
                    let plain = Spelling::default();
                    let spelling = Spelling { norm, gelu: norm % GELUS, mask, linear, channels, values, ..plain };
                    let what = format!("{spelling:?}");
                    let encoder = has_each_site_once(&encoder_with(spelling, |scores, _| scores), &what);
                    let layer = &encoder.layers[0];
                    assert_eq!((encoder.channels, layer.intermediate.outputs), (channels, 2 * channels), "{what}");
                    assert_eq!(encoder.norms().last().unwrap().1.output, "last_hidden_state", "{what}");
                    assert_eq!(encoder.embedding_norm.output, "embedded", "{what}");
                }
            }
        }
    }

    /// Every value of the encoder, its shape asked for in one of several ways, and the shapes put to use.
    fn with_shapes_asked(model: &Model) -> Model {
        let b = Builder::new(model.opset(), "asked");
        b.scope("asked");
        let index = Index::new(model).unwrap();
        let recording = Recording::new(model, 3, 5).unwrap();
        let mut batch = b.value("input_ids").shape().slice(0, 0, 1);
        let of_text = |value: &&String| index.dependence(value) == Dependence::Data && !index.is_output(value);
        let values = index.graph().node.iter().map(|node| &node.output[0]).filter(of_text);
        for (at, name) in values.filter(|v| recording.shape(v).first() == Some(&3)).enumerate() {
            let value = b.value(name);
            let rank = recording.shape(name).len() as i64;
            let shape = match at % 6 {
                0 => b.op("Flatten", &[value], vec![]).shape(),
                1 => value.transpose(&[&[0], &(1..rank).rev().collect::<Vec<_>>()[..]].concat()).shape(),
                2 => value.cast(ElementType::F32).relu().softmax().shape(),
                3 => {
                    let reshaped = value.reshape(&[0, -1]);
                    b.op("ConstantOfShape", &[reshaped.cast(ElementType::F16).shape()], vec![]).shape()
                }
                4 => b.op("Expand", &[b.parameter("one", &Tensor::scalar(1f32)), value.shape()], vec![]).shape(),
                _ => {
                    let size = b.op("Size", &[value.reshape(&[0, -1]).slice(1, 0, 1)], vec![]);
                    size.reshape(&[1])
                }
            };
            batch = b.op("Min", &[batch, shape.slice(0, 0, 1)], vec![]);
        }
        let dims = b.concat(&[batch, b.ints(&[-1, 8])], 0);
        let output = b.value("last_hidden_state").reshape_to(dims).named("reshaped");
        let mut asked = model.clone();
        asked.graph_mut().output[0].name = output.name();
        b.patch().apply(&mut asked).unwrap();
        asked
    }

    #[test]
    fn what_only_feeds_shapes_is_no_path_of_data() {
        for norm in 0..NORMS {
            let spelling =
                Spelling { norm, gelu: norm % GELUS, mask: norm % MASKS, linear: norm % 2, ..Spelling::default() };
            let model = encoder_with(spelling, |scores, _| scores);
            let asked = with_shapes_asked(&model);
            assert!(asked.graph().node.len() > model.graph().node.len() + 60);
            let recognition = recognised(&asked);
            assert!(recognition.misses.is_empty(), "{spelling:?}: {:#?}", recognition.misses);
            let rewriting = Rewriting::new(asked, options(None)).unwrap();
            let given = crate::testing::inputs(&[6, 3, 1]);
            let run = |model: &Model| {
                let runnable = mabert_runtime::LoadOptions::default().prepare(model).unwrap();
                runnable.run(&mabert_runtime::borrowed(&given)).unwrap().remove(0).1.to_f32()
            };
            assert!(largest_difference(&run(&model), &run(&rewriting.teacher)) < 1e-4, "{spelling:?}");
        }
    }

    /// A head of any kind behind the encoder's last hidden state.
    fn with_head(head: impl for<'b> Fn(Expr<'b>, &'b Builder) -> Expr<'b>) -> Model {
        let mut model = encoder();
        let b = Builder::new(model.opset(), "head");
        b.scope("head");
        let output = head(b.value("last_hidden_state"), &b).named("given");
        model.graph_mut().output[0].name = output.name();
        b.patch().apply(&mut model).unwrap();
        model
    }

    fn weight<'b>(b: &'b Builder, shape: [usize; 2]) -> Expr<'b> {
        let values = (0..shape[0] * shape[1]).map(|at| (at * 7 % 11) as f32 / 5.0 - 1.0).collect();
        b.parameter("weight", &Tensor::new(&shape, values))
    }

    #[test]
    fn what_a_head_makes_of_hidden_states_is_no_site() {
        type Head = for<'b> fn(Expr<'b>, &'b Builder) -> Expr<'b>;
        let heads: [(&str, Head); 9] = [
            ("class probabilities", |x, b| x.slice(1, 0, 1).matmul(weight(b, [8, 3])).softmax()),
            ("of each token", |x, b| x.matmul(weight(b, [8, 3])).softmax()),
            ("their largest", |x, b| {
                let p = x.matmul(weight(b, [8, 3])).softmax();
                b.op("ReduceMax", &[p], vec![mabert_graph::attribute::ints("axes", &[-1])])
            }),
            ("log probabilities", |x, b| b.op("Log", &[x.matmul(weight(b, [8, 3])).softmax()], vec![])),
            ("starts of spans, masked", |x, b| {
                let logits = x.matmul(weight(b, [8, 1])).reshape(&[0, -1]);
                let mask = b.value("attention_mask").cast(ElementType::F32);
                (logits + (mask - 1.0) * 1e4).softmax()
            }),
            ("tokens weighed by a learned query", |x, b| {
                let weights = x.matmul(weight(b, [8, 1])).transpose(&[0, 2, 1]).softmax();
                weights.matmul(x)
            }),
            ("tokens weighed by the first", |x, _| {
                x.slice(1, 0, 1).matmul(x.transpose(&[0, 2, 1])).softmax().matmul(x)
            }),
            ("a residual block of its own, normalised", |x, b| {
                let hidden = x.slice(1, 0, 1);
                let more = hidden.matmul(weight(b, [8, 8])).tanh();
                let gamma = b.parameter("gamma", &Tensor::new(&[8], vec![0.9f32; 8]));
                (hidden + more).layer_norm(gamma, None, 1e-5).matmul(weight(b, [8, 2])).softmax()
            }),
            ("a gate", |x, b| {
                let gate = b.op("Sigmoid", &[x.matmul(weight(b, [8, 8]))], vec![]);
                (x * gate).tanh().matmul(weight(b, [8, 2]))
            }),
        ];
        for (what, head) in heads {
            let model = with_head(head);
            let recognition = recognised(&model);
            let Recognition { misses, explanations, .. } = &recognition;
            assert!(misses.is_empty(), "{what}: {misses:#?} {explanations:#?}");
            let mut student = Rewriting::new(model, options(None)).unwrap().approximate().unwrap();
            student.finish().unwrap();
            let end = student.encoder.layers[0].output_norm.output.clone();
            let left = crate::contract::non_linear_nodes(&student.model, Some("attention_mask"), Some(&end)).unwrap();
            assert!(!left.is_empty() && left.iter().all(|node| node.in_head), "{what}: {left:?}");
        }
    }

    /// A last layer whose attention is not understood is no head.
    #[test]
    fn a_last_layer_that_is_lost_is_missed() {
        type Head = for<'b> fn(Expr<'b>, &'b Builder) -> Expr<'b>;
        fn layer<'b>(x: Expr<'b>, b: &'b Builder, change: impl Fn(Expr<'b>) -> Expr<'b>) -> Expr<'b> {
            let [q, k, v] = [0, 1, 2].map(|_| x.matmul(weight(b, [8, 8])));
            let context = change(q.matmul(k.transpose(&[0, 2, 1]))).matmul(v);
            let gamma = b.parameter("gamma", &Tensor::new(&[8], vec![0.9f32; 8]));
            (context.matmul(weight(b, [8, 8])) + x).layer_norm(gamma, None, 1e-5)
        }
        let lost: [(&str, Head); 3] = [
            ("not a softmax of scaled scores alone", |x, b| layer(x, b, |scores| (scores.tanh() * 3.0).softmax())),
            ("comes after the last layer", |x, b| layer(x, b, |scores| scores.relu())),
            ("no linear map from here leads to a GELU", |x, b| layer(x, b, |scores| scores.softmax())),
        ];
        for (reason, head) in lost {
            let message = Rewriting::new(with_head(head), options(None)).unwrap_err().to_string();
            assert!(message.contains(reason), "{reason}: {message}");
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

    /// What is said of models that are no encoders is what is missing in them.
    #[test]
    fn fragments_are_refused_with_the_reason() {
        let product = || {
            let b = Builder::new(17, "test");
            let [x, y] =
                [("x", ["M", "K"]), ("y", ["K", "N"])].map(|(name, dims)| b.input(name, ElementType::F32, &dims));
            b.model(&[x.matmul(y).named("z")])
        };
        let softmax = || {
            let b = Builder::new(17, "test");
            let ids = b.input("input_ids", ElementType::I64, &["batch", "n"]);
            let words = b.constant("words", &Tensor::new(&[9, 2], vec![0.5f32; 18]));
            b.model(&[words.gather(ids).softmax().named("y")])
        };
        // Attention alone, and with the residual sum.
        let cut_off = |sums: usize| {
            let mut model = encoder();
            let graph = model.graph_mut();
            let reads =
                |value: &str| graph.node.iter().find(|node| node.input.iter().any(|input| input == value)).unwrap();
            let mut end = reads("attention.output.bias").output[0].clone();
            (0..sums).for_each(|_| end = reads(&end).output[0].clone());
            graph.output[0].name = end;
            model.remove_dead();
            model
        };
        for (model, reason) in [
            (product(), "its inputs are not all [batch, length]"),
            (softmax(), "no softmax of scaled scores was found; of this one, its result does not go into a product"),
            (cut_off(0), "follows it; the model ends without one"),
            (cut_off(1), "follows it; the model ends without one"),
        ] {
            let message = Rewriting::new(model, options(None)).unwrap_err().to_string();
            assert!(message.contains(reason), "{reason}: {message}");
        }
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

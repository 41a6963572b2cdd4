//! What the recogniser finds: typed sites, by layer.

use serde::Serialize;

/// A value's name in the graph.
pub type ValueName = String;

/// A linear map `y = scale * (x W) + bias` on the last axis.
#[derive(Clone, Debug, Serialize)]
pub struct LinearSite {
    /// The value that goes in.
    pub input: ValueName,
    /// The value that comes out.
    pub output: ValueName,
    /// The weight's initializer.
    pub weight: String,
    /// Whether the initializer is `[out, in]` rather than `[in, out]`.
    pub transposed: bool,
    /// Where the initializer holds several maps side by side, as one of queries, keys and values may: the columns of this
    /// one, `[out]`.
    #[serde(skip)]
    pub columns: Option<Vec<usize>>,
    /// What the product is multiplied by.
    pub scale: f32,
    /// The bias, `[out]`, as probed.
    #[serde(skip)]
    pub bias: Vec<f32>,
    /// The bias's initializer, once the canonical pass has made it one.
    pub bias_name: Option<String>,
    /// Size of the last axis of `input`.
    pub inputs: usize,
    /// Size of the last axis of `output`.
    pub outputs: usize,
}

/// A layer normalisation over the last axis: `gamma * (x - mean) / sqrt(variance + epsilon) + beta`.
#[derive(Clone, Debug, Serialize)]
pub struct NormSite {
    /// The value that goes in, `[batch, n, channels]`.
    pub input: ValueName,
    /// The value that comes out.
    pub output: ValueName,
    /// Whether the exporter has both as `[batch * n, channels]`; no longer so in canonical form.
    pub flattened: bool,
    /// The anchor's node.
    pub node: String,
    /// How it is spelled: the operator of its anchor.
    pub spelling: String,
    /// Gamma `[channels]`, as probed.
    #[serde(skip)]
    pub gamma: Vec<f32>,
    /// Beta `[channels]`, as probed.
    #[serde(skip)]
    pub beta: Vec<f32>,
    /// Epsilon, as probed.
    pub epsilon: f32,
}

/// Which activation a region computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Activation {
    /// `x / 2 (1 + erf(x / sqrt 2))`.
    GeluErf,
    /// `x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`.
    GeluTanh,
    /// `x sigmoid(1.702 x)`, the quick GELU.
    GeluSigmoid,
    /// `max(x, 0)`, which needs no rewriting.
    Relu,
}

/// An activation.
#[derive(Clone, Debug, Serialize)]
pub struct ActivationSite {
    /// The value that goes in.
    pub input: ValueName,
    /// The value that comes out.
    pub output: ValueName,
    /// The anchor's node.
    pub node: String,
    /// What it computes.
    pub function: Activation,
}

/// Scaled dot-product attention of all heads, from queries, keys and values to context.
#[derive(Clone, Debug, Serialize)]
pub struct AttentionSite {
    /// The softmax's node.
    pub node: String,
    /// `[batch, heads, n, d]`.
    pub query: ValueName,
    /// Keys, transposed: `[batch, heads, d, n]`.
    pub key: ValueName,
    /// `[batch, heads, n, d]`.
    pub value: ValueName,
    /// `Q K^T`, before scale and mask, `[batch, heads, n, n]`.
    pub products: ValueName,
    /// What goes into the product with the values, `[batch, heads, n, n]`.
    pub probabilities: ValueName,
    /// `P V`, `[batch, heads, n, d]`.
    pub context: ValueName,
    /// What `products` is multiplied by, as probed.
    pub scale: f32,
    /// Heads.
    pub heads: usize,
    /// A head's size, `d`.
    pub head_size: usize,
    /// The graph input that holds the padding mask.
    pub mask: Option<ValueName>,
    /// What is added to the scaled scores and depends on positions alone, as MPNet has it.
    pub bias: Option<PositionBias>,
}

/// A term of the scores that depends on the positions of query and key alone.
#[derive(Clone, Debug, Serialize)]
pub struct PositionBias {
    /// The value in the exporter's graph, `[1 or batch, heads, n, n]`.
    pub value: ValueName,
    /// What it is multiplied by before it is added.
    pub factor: f32,
}

/// The padding mask: 1 keeps a token, 0 removes it, the same for every query.
#[derive(Clone, Debug, Serialize)]
pub struct MaskSite {
    /// The graph input, `[batch, n]`.
    pub input: ValueName,
}

/// One encoder layer, post-LN: `y = LN(x + Wo ctx); x' = LN(y + W2 act(W1 y))`.
#[derive(Clone, Debug, Serialize)]
pub struct Layer {
    /// Its number, from 0.
    pub index: usize,
    /// The value that goes in, `x` `[batch, n, channels]`.
    pub input: ValueName,
    /// Attention.
    pub attention: AttentionSite,
    /// To queries.
    pub query: LinearSite,
    /// To keys.
    pub key: LinearSite,
    /// To values.
    pub value: LinearSite,
    /// From context to the stream.
    pub attention_output: LinearSite,
    /// After attention.
    pub attention_norm: NormSite,
    /// Up.
    pub intermediate: LinearSite,
    /// The activation between.
    pub activation: ActivationSite,
    /// Down.
    pub output: LinearSite,
    /// After the feed-forward part.
    pub output_norm: NormSite,
}

/// A whole encoder.
#[derive(Clone, Debug, Serialize)]
pub struct Encoder {
    /// Channels of the stream.
    pub channels: usize,
    /// The norm after the embeddings.
    pub embedding_norm: NormSite,
    /// A linear map from the embedding norm to the first layer, as ELECTRA has it.
    pub embedding_projection: Option<LinearSite>,
    /// The mask, for models that take one.
    pub mask: Option<MaskSite>,
    /// The layers in order.
    pub layers: Vec<Layer>,
}

impl Encoder {
    /// Heads of each layer.
    pub fn heads(&self) -> usize {
        self.layers[0].attention.heads
    }

    /// A head's size.
    pub fn head_size(&self) -> usize {
        self.layers[0].attention.head_size
    }

    /// Whether something that depends on positions is added to the scores.
    pub fn has_position_bias(&self) -> bool {
        self.layers.iter().any(|layer| layer.attention.bias.is_some())
    }

    /// Every norm with a name for reports: the embedding norm, then two a layer.
    pub fn norms(&self) -> Vec<(String, &NormSite)> {
        let mut norms = vec![("embeddings/norm".to_owned(), &self.embedding_norm)];
        for layer in &self.layers {
            norms.push((format!("layer.{}/attention/norm", layer.index), &layer.attention_norm));
            norms.push((format!("layer.{}/output/norm", layer.index), &layer.output_norm));
        }
        norms
    }

    /// Attentions + activations that are not ReLU already + norms: what a full rewrite changes.
    pub fn site_count(&self) -> usize {
        2 * self.layers.len() + self.norms().len()
    }
}

//! What the recogniser finds: typed sites, by layer, and what they are called.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A value's name in the graph.
pub type ValueName = String;

/// What a site is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SiteKind {
    /// Scaled dot-product attention.
    Attention,
    /// GELU or ReLU.
    Activation,
    /// Layer normalisation.
    Norm,
    /// A linear map between the others.
    Linear,
}

impl fmt::Display for SiteKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Attention => "attention",
            Self::Activation => "activation",
            Self::Norm => "norm",
            Self::Linear => "linear",
        })
    }
}

/// A site of a layer, in the order in which values pass through them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LayerSite {
    /// From queries, keys and values to context.
    Attention,
    /// The norm after attention.
    AttentionNorm,
    /// The activation of the feed-forward part.
    Activation,
    /// The norm after the feed-forward part.
    OutputNorm,
}

impl LayerSite {
    const ALL: [Self; 4] = [Self::Attention, Self::AttentionNorm, Self::Activation, Self::OutputNorm];

    fn path(self) -> &'static str {
        match self {
            Self::Attention => "attention",
            Self::AttentionNorm => "attention/norm",
            Self::Activation => "activation",
            Self::OutputNorm => "output/norm",
        }
    }
}

/// Which site of an encoder: what reports call it, and what its parameters' names begin with. Written and read as
/// `embeddings/norm`, `encoder/approximator` or `layer.3/attention/norm`; in order, sites are as values pass through them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum SiteId {
    /// The norm after the embeddings.
    EmbeddingNorm,
    /// The network that all layers share in place of their softmax.
    SharedNetwork,
    /// A site of the layer with this number.
    Layer(usize, LayerSite),
}

impl SiteId {
    /// What it is.
    pub fn kind(self) -> SiteKind {
        match self {
            Self::EmbeddingNorm | Self::Layer(_, LayerSite::AttentionNorm | LayerSite::OutputNorm) => SiteKind::Norm,
            Self::SharedNetwork | Self::Layer(_, LayerSite::Attention) => SiteKind::Attention,
            Self::Layer(_, LayerSite::Activation) => SiteKind::Activation,
        }
    }

    /// The part of the model that it lies in: `embeddings`, `encoder`, or a layer, as in `layer.3`.
    pub fn module(self) -> String {
        match self {
            Self::EmbeddingNorm => "embeddings".to_owned(),
            Self::SharedNetwork => "encoder".to_owned(),
            Self::Layer(layer, _) => format!("layer.{layer}"),
        }
    }

    fn path(self) -> &'static str {
        match self {
            Self::EmbeddingNorm => "norm",
            Self::SharedNetwork => "approximator",
            Self::Layer(_, site) => site.path(),
        }
    }
}

impl fmt::Display for SiteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.module(), self.path())
    }
}

/// A text that names no site.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` names no site of an encoder; `layer.0/attention/norm` is one")]
pub struct UnknownSite(String);

impl FromStr for SiteId {
    type Err = UnknownSite;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = |module: &str| module.strip_prefix("layer.")?.parse().ok();
        let layer_site = |(module, path): (&str, &str)| {
            let site = LayerSite::ALL.into_iter().find(|site| site.path() == path)?;
            Some(Self::Layer(number(module)?, site))
        };
        let candidates = [Self::EmbeddingNorm, Self::SharedNetwork].into_iter();
        let mut candidates = candidates.chain(text.split_once('/').and_then(layer_site));
        candidates.find(|site| site.to_string() == text).ok_or_else(|| UnknownSite(text.to_owned()))
    }
}

impl TryFrom<String> for SiteId {
    type Error = UnknownSite;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<SiteId> for String {
    fn from(site: SiteId) -> Self {
        site.to_string()
    }
}

/// What a model's floats are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// Of 32 bits.
    Single,
    /// Of 16 bits.
    Half,
}

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
    /// What that is multiplied by; 1 in canonical form.
    pub factor: f32,
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
    /// The rank of the probabilities, where others than the product with the values use them too: models may give out how
    /// much each token attends to each.
    pub probabilities_shown: Option<usize>,
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

impl Layer {
    /// What one of its sites is called.
    pub fn site(&self, site: LayerSite) -> SiteId {
        SiteId::Layer(self.index, site)
    }
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

    /// Whether others than the products with the values use the probabilities of some layer.
    pub fn shows_probabilities(&self) -> bool {
        self.layers.iter().any(|layer| layer.attention.probabilities_shown.is_some())
    }

    /// Every norm with what it is called: the embedding norm, then two a layer.
    pub fn norms(&self) -> Vec<(SiteId, &NormSite)> {
        let mut norms = vec![(SiteId::EmbeddingNorm, &self.embedding_norm)];
        for layer in &self.layers {
            norms.push((layer.site(LayerSite::AttentionNorm), &layer.attention_norm));
            norms.push((layer.site(LayerSite::OutputNorm), &layer.output_norm));
        }
        norms
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sites_are_read_as_they_are_written_and_ordered_as_values_pass_them() {
        let layers = [0, 12].into_iter().flat_map(|layer| LayerSite::ALL.map(|site| SiteId::Layer(layer, site)));
        let sites: Vec<SiteId> = [SiteId::EmbeddingNorm, SiteId::SharedNetwork].into_iter().chain(layers).collect();
        assert!(sites.is_sorted());
        for site in &sites {
            assert_eq!(site.to_string().parse(), Ok(*site));
            assert_eq!(serde_json::to_string(site).unwrap(), format!("\"{site}\""));
        }
        assert_eq!(sites[7].to_string(), "layer.12/attention/norm");
        assert_eq!(sites.iter().filter(|site| site.kind() == SiteKind::Norm).count(), 5);
        for text in ["", "norm", "layer.0", "layer.x/attention", "layer.00/attention", "layer.0/output", "encoder/norm"]
        {
            assert!(text.parse::<SiteId>().is_err(), "{text}");
        }
        assert_eq!(serde_json::to_string(&SiteKind::Norm).unwrap(), "\"norm\"");
    }
}

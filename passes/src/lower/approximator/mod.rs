//! What stands in the place of softmax: the paper's *network* on each row of scores, or *hinges*, one a key, whose
//! thresholds depend on the row.

mod hinges;
mod lengths;
mod network;

use mabert_graph::{Builder, Expr};
use serde::{Deserialize, Serialize};

use crate::sites::{AttentionSite, Encoder};
use hinges::HingeBatch;
pub use hinges::{HingeParameters, HingeSizes};
pub use lengths::LengthFeatures;
use network::NetworkBatch;
pub use network::NetworkParameters;

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Form {
    /// A hinge a key; see [`HingeParameters`].
    Hinges,
    /// The paper's network; see [`NetworkParameters`].
    Network,
}

impl Form {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Hinges, Self::Network];

    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hinges => "hinges",
            Self::Network => "network",
        }
    }
}

/// Which heads share a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sharing {
    /// One for each head.
    PerHead,
    /// One for each layer.
    PerLayer,
    /// One for the whole encoder.
    Shared,
}

impl Sharing {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::PerHead, Self::PerLayer, Self::Shared];

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::PerHead => "per-head",
            Self::PerLayer => "per-layer",
            Self::Shared => "shared",
        }
    }
}

/// What the approximators look like.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct ApproximatorOptions {
    /// The longest sequence that the student is fitted to, `n`.
    pub max_seq: usize,
    /// The longest sequence that the teacher takes. Hinges are bound to no length: they take it too.
    pub positions: usize,
    /// Hinges or networks.
    pub form: Form,
    /// The sizes of hinges.
    pub hinges: HingeSizes,
    /// A network's hidden size, `h`.
    pub hidden: usize,
    /// Which heads share a network.
    pub sharing: Sharing,
    /// Whether a network's bias and scale depend on the number of real tokens; hinges' always do.
    pub length_tables: bool,
}

impl ApproximatorOptions {
    /// Hinges, fitted to up to `max_seq` tokens and taking up to `positions`.
    pub fn hinges(max_seq: usize, positions: usize) -> Self {
        Self { form: Form::Hinges, positions, ..Self::network(max_seq, max_seq) }
    }

    /// A network for each head, which depends on the length.
    pub fn network(max_seq: usize, hidden: usize) -> Self {
        Self {
            max_seq,
            positions: max_seq,
            form: Form::Network,
            hinges: HingeSizes::default(),
            hidden,
            sharing: Sharing::PerHead,
            length_tables: true,
        }
    }

    /// The longest sequence that the student takes.
    pub fn longest(&self) -> usize {
        match self.form {
            Form::Hinges => self.positions.max(self.max_seq),
            Form::Network => self.max_seq,
        }
    }

    /// The lengths at which parameters are given.
    pub fn length_features(&self) -> LengthFeatures {
        match self.form {
            Form::Network if !self.length_tables => LengthFeatures::single(self.max_seq),
            _ => LengthFeatures::new(self.max_seq, self.longest()),
        }
    }

    /// Whether one token alone attends to itself exactly, whatever is fitted.
    pub fn one_token_is_exact(&self) -> bool {
        self.form == Form::Hinges || self.length_tables
    }
}

/// The parameters of one layer's approximator, by the names of their initializers.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Approximator {
    /// Hinges of all heads.
    Hinges(HingeParameters),
    /// A network a head, or one for all; several layers may have the same.
    Network(NetworkParameters),
}

impl Approximator {
    /// Which of the two it is.
    pub fn form(&self) -> Form {
        match self {
            Self::Hinges(_) => Form::Hinges,
            Self::Network(_) => Form::Network,
        }
    }

    /// The initializers that may be trained. Networks without length tables have no `scale`.
    pub fn parameters(&self) -> Vec<&String> {
        match self {
            Self::Hinges(hinges) => hinges.names(),
            Self::Network(network) => network.names(),
        }
    }
}

/// What all layers of a form know of a batch; nothing where no layer has it.
pub(super) struct BatchValues<'b> {
    hinges: Option<HingeBatch<'b>>,
    network: Option<NetworkBatch<'b>>,
}

impl<'b> BatchValues<'b> {
    /// Where the model takes no mask every token is real, and all rows have the batch's length.
    pub(super) fn new(
        b: &'b Builder,
        options: &ApproximatorOptions,
        encoder: &Encoder,
        scope: &str,
        approximators: &[Approximator],
    ) -> Self {
        b.scope(scope);
        let options = |form| ApproximatorOptions { form, ..*options };
        let some = |form| approximators.iter().any(|approximator| approximator.form() == form);
        Self {
            hinges: some(Form::Hinges).then(|| HingeBatch::new(b, &options(Form::Hinges))),
            network: some(Form::Network).then(|| NetworkBatch::new(b, &options(Form::Network), encoder)),
        }
    }

    fn of_hinges(&self) -> &HingeBatch<'b> {
        self.hinges.as_ref().expect("made where a layer has hinges")
    }

    fn of_network(&self) -> &NetworkBatch<'b> {
        self.network.as_ref().expect("made where a layer has a network")
    }
}

impl Approximator {
    /// Declares the parameters, which calibration will set.
    pub(super) fn declare(&self, b: &Builder, options: &ApproximatorOptions) {
        match self {
            Self::Hinges(hinges) => hinges.declare(b, options),
            Self::Network(network) => network.declare(b, options),
        }
    }

    /// The probabilities that come of a site's scores, `[batch, heads, n, n]`.
    pub(super) fn probabilities<'b>(&self, b: &'b Builder, batch: &BatchValues<'b>, site: &AttentionSite) -> Expr<'b> {
        let scores = b.value(&site.products);
        match self {
            Self::Hinges(hinges) => hinges.probabilities(b, batch.of_hinges(), scores),
            Self::Network(network) => network.probabilities(b, batch.of_network(), scores),
        }
    }

    /// The contexts of a site's queries, keys and values without its probabilities, `[batch, heads, n, d]`.
    pub(super) fn context<'b>(&self, b: &'b Builder, batch: &BatchValues<'b>, site: &AttentionSite) -> Expr<'b> {
        match self {
            Self::Hinges(hinges) => hinges.context(b, batch.of_hinges(), site),
            Self::Network(network) => network.context(b, batch.of_network(), site),
        }
    }
}

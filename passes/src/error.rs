//! Why a model cannot be rewritten.

use crate::pipeline::Pass;
use crate::recognise::Miss;

/// A result whose error says which node or option is at fault.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a model cannot be rewritten.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model's file or graph is broken.
    #[error(transparent)]
    Graph(#[from] mabert_graph::Error),
    /// A pass met a broken graph, or left one.
    #[error("pass `{}`: {source}", pass.name())]
    Pass {
        /// The pass.
        pass: Pass,
        /// What is broken.
        source: mabert_graph::Error,
    },
    /// The model cannot be run.
    #[error(transparent)]
    Runtime(#[from] mabert_runtime::Error),
    /// The model fails on inputs that it declares to take.
    #[error("{origin}: fails on {} of {}{but} ({source})", counted(*batch, "sentence"), counted(*length, "token"))]
    Fails {
        /// The model's file.
        origin: String,
        /// How many sentences.
        batch: usize,
        /// How many tokens each.
        length: usize,
        /// What it runs on, and what to do.
        but: String,
        /// What the engine said.
        source: Box<mabert_runtime::Error>,
    },
    /// No encoder was found in the model.
    #[error("{origin}: not a BERT-family encoder that can be rewritten: {reason}")]
    NotBert {
        /// The model's file.
        origin: String,
        /// The first thing that is missing.
        reason: String,
    },
    /// A role was given to an input that the model does not have.
    #[error("{origin}: no input `{name}`; its inputs are {inputs}")]
    NoInput {
        /// The model's file.
        origin: String,
        /// What the input was called.
        name: String,
        /// Those that there are.
        inputs: String,
    },
    /// Some sites of the encoder were not recognised.
    #[error("{origin}: {} of the expected sites cannot be rewritten (see `explain`):{}", misses.len(), list(misses))]
    Incomplete {
        /// The model's file.
        origin: String,
        /// What was missed, and why.
        misses: Vec<Miss>,
    },
    /// The model is the result of an earlier rewrite.
    #[error("{0}: already rewritten by onnx-mabert; start from the original model")]
    AlreadyRewritten(String),
    /// A bias of the scores is not a table of positions.
    #[error("value `{value}` is added to the scores and {reason}; only biases by position are supported")]
    NotATable {
        /// The value.
        value: String,
        /// What was found.
        reason: String,
    },
    /// Attention in linear order, of a model whose scores have a bias by position.
    #[error(
        "{0}: its attention adds a bias by relative position to the scores, an n x n matrix that the linear order cannot \
         keep apart from them; leave the order open, which takes the paper's, or keep softmax"
    )]
    PositionBias(String),
    /// Hinges in linear order.
    #[error(
        "hinges see every score of a row, so that they have no order whose cost is linear in the length; networks have one"
    )]
    NoLinearOrder,
    /// What is wrong with a model, and its file.
    #[error("{origin}: {source}")]
    InModel {
        /// The file.
        origin: String,
        /// What is wrong.
        source: Box<Error>,
    },
    /// A weight is not a number.
    #[error("initializer `{name}` holds {value} at element {at}; a model with such weights cannot be rewritten")]
    NotFinite {
        /// The initializer.
        name: String,
        /// NaN or an infinity.
        value: f32,
        /// Its position in row-major order.
        at: usize,
    },
}

fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

impl Error {
    /// The same, naming the model's file where it does not name one yet; models that were made in memory have none.
    pub fn in_model(self, origin: &str) -> Self {
        match self {
            Self::Graph(e) => e.in_model(origin).into(),
            Self::Pass { pass, source } => Self::Pass { pass, source: source.in_model(origin) },
            Self::Runtime(e) => e.in_model(origin).into(),
            Self::NotATable { .. } | Self::NotFinite { .. } if !origin.starts_with('<') => {
                Self::InModel { origin: origin.to_owned(), source: Box::new(self) }
            }
            named => named,
        }
    }
}

fn list(misses: &[Miss]) -> String {
    misses.iter().map(|m| format!("\n  {m}")).collect()
}

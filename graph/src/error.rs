//! What can be wrong with a model file.

use std::path::PathBuf;

/// A result whose error says which file, initializer or node is at fault.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a model cannot be read, changed or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file cannot be read.
    #[error("{}: cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file cannot be written.
    #[error("{}: cannot be written: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The bytes are not an ONNX model.
    #[error("{origin}: not an ONNX model, or a truncated one ({reason}); export or copy it again")]
    NotOnnx {
        /// The file, or `<bytes>`.
        origin: String,
        /// What was found.
        reason: String,
    },
    /// What was given as a model is something else.
    #[error("{origin}: no ONNX model but {what}")]
    Foreign {
        /// The file or folder, or `<bytes>`.
        origin: String,
        /// What it is, and what to do.
        what: String,
    },
    /// External data is missing or does not fit.
    #[error("initializer `{tensor}`: external data `{location}`: {reason}")]
    ExternalData {
        /// The initializer.
        tensor: String,
        /// The file that its entry names.
        location: String,
        /// What is wrong.
        reason: String,
    },
    /// A constant's data does not fit its type and shape.
    #[error("tensor `{name}`: {reason}")]
    Tensor {
        /// The initializer or attribute.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// The graph's wiring is broken.
    #[error("graph: {0}")]
    Graph(String),
    /// What is wrong with a model, and its file.
    #[error("{origin}: {source}")]
    InModel {
        /// The file.
        origin: String,
        /// What is wrong.
        source: Box<Error>,
    },
}

impl Error {
    /// The same, naming the model's file where no file is named yet; models that were made in memory have none.
    pub fn in_model(self, origin: &str) -> Self {
        match self {
            Self::ExternalData { .. } | Self::Tensor { .. } | Self::Graph(_) if !origin.starts_with('<') => {
                Self::InModel { origin: origin.to_owned(), source: Box::new(self) }
            }
            named => named,
        }
    }

    pub(crate) fn tensor(name: &str, reason: impl Into<String>) -> Self {
        Self::Tensor { name: name.to_owned(), reason: reason.into() }
    }
}

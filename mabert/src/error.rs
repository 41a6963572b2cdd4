//! What can go wrong.

/// A result whose error says which file, input, node or line is at fault.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a model cannot be read, run or rewritten. Its text is one sentence for people.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A model's file cannot be read or written, or is not ONNX.
    #[error(transparent)]
    Model(#[from] mabert_graph::Error),
    /// A model cannot be run, or not on these inputs.
    #[error(transparent)]
    Run(#[from] mabert_runtime::Error),
    /// A model cannot be rewritten, or the data cannot be used, or a check of the student does not hold.
    #[error(transparent)]
    Rewrite(#[from] mabert_transfer::Error),
}

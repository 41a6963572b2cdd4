//! What can go wrong between a model, its inputs and an engine.

use mabert_graph::ElementType;

/// A result whose error says which input, value or file is at fault.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a model cannot be loaded or run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model itself cannot be read.
    #[error(transparent)]
    Graph(#[from] mabert_graph::Error),
    /// An input that the model needs was not given.
    #[error("input `{name}` is missing; the model takes {expected}")]
    MissingInput {
        /// The input.
        name: String,
        /// The inputs that the model takes.
        expected: String,
    },
    /// An input that the model does not have was given.
    #[error("there is no input `{name}`; the model takes {expected}")]
    UnknownInput {
        /// The name given.
        name: String,
        /// The inputs that the model takes.
        expected: String,
    },
    /// An input has the wrong element type.
    #[error("input `{name}` holds {found}, the model takes {expected}")]
    ElementType {
        /// The input.
        name: String,
        /// The element type given.
        found: ElementType,
        /// The element type declared.
        expected: ElementType,
    },
    /// An input's shape does not fit.
    #[error("input `{name}` has shape {found:?}: {reason}")]
    Shape {
        /// The input.
        name: String,
        /// The shape given.
        found: Vec<usize>,
        /// What it should be.
        reason: String,
    },
    /// A token id, token type or position is outside the table that it indexes.
    #[error("{what} {index} is outside the table `{table}`, which has {rows} rows")]
    Index {
        /// The input, or the computed positions.
        what: String,
        /// The offending index.
        index: i64,
        /// The table's initializer.
        table: String,
        /// Its rows.
        rows: usize,
    },
    /// The sequence is longer than the model can take.
    #[error("sequence length {length} is beyond the model's limit of {limit} ({limited_by}); truncate the text")]
    TooLong {
        /// The length given.
        length: usize,
        /// The longest that works.
        limit: usize,
        /// What sets the limit.
        limited_by: String,
    },
    /// The engine refused the model or failed in a run.
    #[error("{}{engine}: {reason}", prefix(model))]
    Engine {
        /// The model's file; empty where it has none.
        model: String,
        /// tract or onnxruntime.
        engine: &'static str,
        /// What the engine said.
        reason: String,
    },
    /// The model has an operator that cannot be run.
    #[error("{}operator {operator} (node `{node}`) is not supported{}", prefix(model), before_fusing(operator))]
    Operator {
        /// The model's file; empty where it has none.
        model: String,
        /// With its domain, where that is not ONNX's own.
        operator: String,
        /// The node.
        node: String,
    },
    /// The onnxruntime library cannot be loaded.
    #[error(
        "onnxruntime cannot be loaded ({0}); install it with `pip install onnxruntime` and set ORT_DYLIB_PATH to the \
         libonnxruntime.so inside the package's capi folder"
    )]
    NoOnnxruntime(String),
    /// A file of arrays cannot be read or written.
    #[error("{path}: {reason}")]
    Npz {
        /// The file.
        path: String,
        /// What is wrong.
        reason: String,
    },
}

impl Error {
    pub(crate) fn tract(error: impl std::fmt::Debug) -> Self {
        Self::engine("tract", first_lines(&format!("{error:?}")))
    }

    pub(crate) fn engine(engine: &'static str, reason: String) -> Self {
        Self::Engine { model: String::new(), engine, reason }
    }

    /// What an engine said, without the model's file: for messages that name it.
    pub fn without_model(self) -> Self {
        match self {
            Self::Engine { engine, reason, .. } => Self::engine(engine, reason),
            other => other,
        }
    }

    /// The same, naming the model's file where it does not name one yet; models that were made in memory have none.
    pub fn in_model(self, origin: &str) -> Self {
        match self {
            Self::Graph(e) => e.in_model(origin).into(),
            Self::Engine { model, engine, reason } if model.is_empty() && !origin.starts_with('<') => {
                Self::Engine { model: origin.to_owned(), engine, reason }
            }
            Self::Operator { model, operator, node } if model.is_empty() && !origin.starts_with('<') => {
                Self::Operator { model: origin.to_owned(), operator, node }
            }
            named => named,
        }
    }
}

/// What to do about a fused operator.
fn before_fusing(operator: &str) -> &'static str {
    match operator.starts_with("com.microsoft.") {
        true => " as it is used here; take the model from before onnxruntime's optimiser or builder fused it",
        false => "",
    }
}

/// What a message begins with that names a file.
fn prefix(file: &str) -> String {
    if file.is_empty() { String::new() } else { format!("{file}: ") }
}

/// tract's reports can run over hundreds of lines (whole constants are printed, and backtraces where the environment asks for
/// them): keep what names the node.
fn first_lines(report: &str) -> String {
    const LINES: usize = 12;
    const WIDTH: usize = 300;
    let causes = report.lines().take_while(|l| l.trim() != "Stack backtrace:");
    let lines = causes.filter(|l| !l.trim().is_empty()).take(LINES);
    lines.map(|l| l.trim().chars().take(WIDTH).collect::<String>()).collect::<Vec<_>>().join("; ")
}

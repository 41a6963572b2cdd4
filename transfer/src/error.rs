//! What can go wrong between data and a calibrated student.

use std::path::{Path, PathBuf};

use crate::Setting;

/// A result whose error says which file, line or site is at fault.
pub type Result<T> = std::result::Result<T, Error>;

/// Why data cannot be used, or a student not be made from it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model's file or graph is broken.
    #[error(transparent)]
    Graph(#[from] mabert_graph::Error),
    /// A model cannot be run.
    #[error(transparent)]
    Runtime(#[from] mabert_runtime::Error),
    /// A pass failed.
    #[error(transparent)]
    Passes(#[from] mabert_passes::Error),
    /// A data file, or a line of it, cannot be used.
    #[error("{}{}: {reason}", path.display(), line.map_or_else(String::new, |l| format!(", line {l}")))]
    Data {
        /// The file.
        path: PathBuf,
        /// The line, from 1, where one is at fault.
        line: Option<usize>,
        /// What is wrong, and what to do.
        reason: String,
        /// What would help.
        settings: &'static [Setting],
    },
    /// The tokenizer cannot be read or used.
    #[error("{}: {reason}", path.display())]
    Tokenizer {
        /// Its file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// An input of the model is none of those that texts can fill.
    #[error(
        "what input `{0}` holds (token ids, mask, token types or positions) is clear neither from what the model does \
         with it nor from its name: say so, or give ready arrays"
    )]
    Role(String),
    /// Statistics came out that no student can be made of.
    #[error("{site}: {reason}")]
    Calibration {
        /// The site.
        site: String,
        /// What was found.
        reason: String,
    },
    /// A model cannot be the teacher.
    #[error("{model}: {reason}")]
    Teacher {
        /// Its file.
        model: String,
        /// What was found.
        reason: String,
    },
    /// A model cannot be gone on from: it is no student of this teacher, or one that was folded.
    #[error("{model}: {reason}")]
    Student {
        /// Its file.
        model: String,
        /// What was found.
        reason: String,
        /// How to make one that can.
        settings: &'static [Setting],
    },
    /// The state of an interrupted run cannot be read or written.
    #[error("{}: {reason}", path.display())]
    Checkpoint {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// What is set does not fit the model, or what else is set.
    #[error("{reason}")]
    Setting {
        /// What does not fit, and what to do.
        reason: String,
        /// What is set so, or would help.
        settings: &'static [Setting],
    },
    /// Too many gradient steps were not finite.
    #[error("{site}: {skipped} of {steps} gradient steps were not finite: the activations overflow; {advice}")]
    Diverged {
        /// What was trained.
        site: String,
        /// Steps that were left out.
        skipped: usize,
        /// Steps so far.
        steps: usize,
        /// What would help, in words.
        advice: &'static str,
        /// The same.
        settings: &'static [Setting],
    },
    /// A part of the student cannot be differentiated, or not trained.
    #[error("{0}")]
    Gradient(String),
    /// What the layers give is kept in temporary files while a student is calibrated.
    #[error("a temporary file cannot be used: {0}; set TMPDIR to a folder that has room")]
    Temporary(#[source] std::io::Error),
    /// A check of the result does not hold.
    #[error("{reason}; the model was not written")]
    Check {
        /// What does not hold, and what to do.
        reason: String,
        /// What would help.
        settings: &'static [Setting],
    },
    /// Two models cannot be compared.
    #[error("{0}")]
    Compare(String),
}

impl Error {
    /// The same, naming the model's file where it is about a model and does not name one yet.
    pub(crate) fn in_model(self, origin: &str) -> Self {
        match self {
            Self::Graph(e) => e.in_model(origin).into(),
            Self::Runtime(e) => e.in_model(origin).into(),
            Self::Passes(e) => e.in_model(origin).into(),
            other => other,
        }
    }

    pub(crate) fn data(path: &Path, reason: impl Into<String>) -> Self {
        Self::Data { path: path.to_owned(), line: None, reason: reason.into(), settings: &[] }
    }

    pub(crate) fn checkpoint(path: &Path, reason: impl Into<String>) -> Self {
        Self::Checkpoint { path: path.to_owned(), reason: reason.into() }
    }

    pub(crate) fn check(reason: impl Into<String>) -> Self {
        Self::Check { reason: reason.into(), settings: &[] }
    }

    pub(crate) fn setting(reason: impl Into<String>, settings: &'static [Setting]) -> Self {
        Self::Setting { reason: reason.into(), settings }
    }

    pub(crate) fn line(path: &Path, line: usize, reason: impl Into<String>) -> Self {
        Self::Data { path: path.to_owned(), line: Some(line), reason: reason.into(), settings: &[] }
    }

    /// Names what would help, where the error has room for it.
    pub(crate) fn helped_by(mut self, helpful: &'static [Setting]) -> Self {
        if let Self::Data { settings, .. } | Self::Student { settings, .. } | Self::Check { settings, .. } = &mut self {
            *settings = helpful;
        }
        self
    }

    /// What does not fit as it is set, or would help if it were set so; often nothing.
    pub fn settings(&self) -> &'static [Setting] {
        match self {
            Self::Data { settings, .. }
            | Self::Student { settings, .. }
            | Self::Setting { settings, .. }
            | Self::Diverged { settings, .. }
            | Self::Check { settings, .. } => settings,
            Self::Role(_) => &[Setting::InputRole, Setting::Arrays],
            Self::Passes(mabert_passes::Error::NoLinearOrder) => &[Setting::Network],
            Self::Passes(mabert_passes::Error::PositionBias(_)) => &[Setting::PaperOrder, Setting::KeepSoftmax],
            _ => &[],
        }
    }
}

//! What became of a pass.

use std::fmt;

use serde::{Serialize, Serializer};

use super::table::{Pass, PassKind};

/// What a pass did.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Outcome {
    /// The pass.
    pub pass: Pass,
    /// Whether it is exact.
    pub kind: PassKind,
    /// How many sites, nodes or constants it changed.
    pub changed: usize,
    /// Why it did not run.
    pub skipped: Option<Skipped>,
}

impl Outcome {
    pub(super) fn ran(pass: Pass, changed: usize) -> Self {
        Self { pass, kind: pass.kind(), changed, skipped: None }
    }

    pub(super) fn skipped(pass: Pass, reason: Skipped) -> Self {
        Self { pass, kind: pass.kind(), changed: 0, skipped: Some(reason) }
    }
}

/// Why a pass did not run. Reports have it in words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Skipped {
    /// This pass was to be the last.
    Until(Pass),
    /// Softmax is kept.
    SoftmaxKept,
    /// Activations are kept.
    ActivationKept,
    /// Norms are kept.
    NormKept,
    /// Bounds were not asked for.
    BoundsOff,
    /// Nothing is known of the values that would be bounded.
    NotCalibrated,
    /// Attention's products are in the paper's order.
    PaperOrder,
    /// So they are, because something that depends on positions is added to the scores.
    PositionBias,
    /// So they are, because the model gives out its attention's probabilities.
    ProbabilitiesShown,
    /// The student is one to be trained on: its parameters stay where they are found by name.
    Unfolded,
    /// Sites were missed: the stream is not affine throughout.
    Partial,
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Until(last) => return write!(f, "{} was to be the last", last.name()),
            Self::SoftmaxKept => "softmax is kept",
            Self::ActivationKept => "activations are kept",
            Self::NormKept => "norms are kept",
            Self::BoundsOff => "bounds are off",
            Self::NotCalibrated => "the student is not calibrated",
            Self::PaperOrder => "attention is in the paper's order",
            Self::PositionBias => "attention is in the paper's order: a bias by position is added to its scores",
            Self::ProbabilitiesShown => "attention is in the paper's order: the model gives out its probabilities",
            Self::Unfolded => "the student is not folded",
            Self::Partial => "sites were missed: the stream is not affine throughout",
        })
    }
}

impl Serialize for Skipped {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

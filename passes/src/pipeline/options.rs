//! How to rewrite.

use serde::{Deserialize, Serialize};

use super::Pass;
use crate::lower::ApproximatorOptions;

/// The order of attention's products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Networks in the linear order, or in the paper's where a model needs its scores or probabilities as matrices; hinges
    /// without probabilities, where the model does not need them.
    Auto,
    /// Cost linear in length, of networks alone.
    Linear,
    /// As the paper has it: probabilities are a value of the graph.
    Paper,
}

impl Order {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Auto, Self::Linear, Self::Paper];

    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Linear => "linear",
            Self::Paper => "paper",
        }
    }
}

/// Sites that are left as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keep {
    /// Keep softmax.
    pub softmax: bool,
    /// Keep GELU.
    pub activation: bool,
    /// Keep layer normalisation.
    pub norm: bool,
}

/// How to rewrite.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PassOptions {
    /// What the approximators look like.
    pub approximator: ApproximatorOptions,
    /// The order of attention's products; once sites are recognised, the one that the model gets.
    pub order: Order,
    /// What is left as it is.
    pub keep: Keep,
    /// Whether norms are folded; otherwise parameters keep their names and places, for more training.
    pub fold: bool,
    /// Whether the stream saturates beyond what calibration saw, so that no input makes a student overflow.
    pub bounds: bool,
    /// The last pass to run.
    pub until: Option<Pass>,
    /// Whether missed sites are accepted.
    pub partial: bool,
}

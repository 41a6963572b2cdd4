//! How to rewrite.

use serde::{Deserialize, Serialize};

use super::Pass;
use crate::lower::ApproximatorOptions;

/// The order of attention's products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Order {
    /// Cost linear in length.
    Linear,
    /// As the paper has it: probabilities are a value of the graph.
    Paper,
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
    /// The order of attention's products.
    pub order: Order,
    /// What is left as it is.
    pub keep: Keep,
    /// Whether norms are folded; otherwise parameters keep their names and places, for more training.
    pub fold: bool,
    /// The last pass to run.
    pub until: Option<Pass>,
    /// Whether missed sites are accepted.
    pub partial: bool,
}

//! How to rewrite.

use serde::{Deserialize, Serialize};

use super::Pass;
use crate::lower::{ApproximatorOptions, Form};

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
    /// The form of each layer's approximator, in order; empty where all have the [approximator](Self::approximator)'s.
    #[serde(default)]
    pub forms: Vec<Form>,
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

impl PassOptions {
    /// Everything is done, with these approximators.
    pub fn new(approximator: ApproximatorOptions) -> Self {
        Self {
            approximator,
            forms: Vec::new(),
            order: Order::Auto,
            keep: Keep::default(),
            fold: true,
            bounds: true,
            until: None,
            partial: false,
        }
    }

    /// What the approximator of a layer looks like.
    pub fn approximator_of(&self, layer: usize) -> ApproximatorOptions {
        ApproximatorOptions {
            form: self.forms.get(layer).copied().unwrap_or(self.approximator.form),
            ..self.approximator
        }
    }

    /// These options with `forms` layer by layer. A single network binds the student to the longest sequence that it is
    /// fitted to.
    #[must_use]
    pub fn with_forms(mut self, forms: &[Form]) -> Self {
        if forms.contains(&Form::Network) {
            self.approximator.positions = self.approximator.max_seq;
        }
        // What is the same for all is said once, so that students made alike say the same of themselves.
        let is_uniform = forms.windows(2).all(|pair| pair[0] == pair[1]);
        self.approximator.form = forms.first().copied().filter(|_| is_uniform).unwrap_or(Form::Hinges);
        self.forms = if is_uniform { Vec::new() } else { forms.to_vec() };
        self
    }
}

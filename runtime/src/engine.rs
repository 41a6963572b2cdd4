//! What runs a model, and what goes in and out.

use mabert_graph::{Tensor, TensorType};

use crate::Result;

/// Values by name, in the order of the model's outputs (and taps).
pub type Named = Vec<(String, Tensor)>;

/// Named values as [`Engine::run`] takes them.
pub fn borrowed<S: AsRef<str>>(values: &[(S, Tensor)]) -> Vec<(&str, &Tensor)> {
    values.iter().map(|(name, value)| (name.as_ref(), value)).collect()
}

/// A model ready to run, on whichever engine.
pub trait Engine: Send + Sync {
    /// The inputs that a run needs.
    fn inputs(&self) -> &[TensorType];

    /// Runs the model once. Inputs may come in any order.
    ///
    /// # Errors
    /// The inputs do not fit the model, or the engine fails.
    fn run(&self, inputs: &[(&str, &Tensor)]) -> Result<Named>;
}

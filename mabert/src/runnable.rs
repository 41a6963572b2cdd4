//! A model ready to run.

use std::path::Path;

use mabert_graph::{Tensor, TensorType};
use mabert_runtime::{LoadOptions, Taps};

use crate::{Model, Outputs, Result};

/// How a model is run.
///
/// ```
/// # fn main() -> Result<(), mabert::Error> {
/// # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/bert-mini-sst2/model.onnx");
/// let model = mabert::RunOptions::default().threads(2).load(path)?;
/// # assert_eq!(model.output_names(), ["logits"]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct RunOptions(LoadOptions);

impl RunOptions {
    /// Threads in the matrix products of one run; one by default, which is best where several runs go on at once.
    #[must_use]
    pub fn threads(self, threads: usize) -> Self {
        Self(self.0.threads(threads))
    }

    /// Inner values that a run returns after the outputs.
    #[must_use]
    pub fn values<S: Into<String>>(self, names: impl IntoIterator<Item = S>) -> Self {
        Self(self.0.taps(Taps::Values(names.into_iter().map(Into::into).collect())))
    }

    /// Reads and prepares a model.
    ///
    /// # Errors
    /// The file is no model, tract cannot handle it, or a value is asked for that it does not have.
    pub fn load(self, path: impl AsRef<Path>) -> Result<Runnable> {
        Ok(Runnable(self.0.load(path)?))
    }

    /// Prepares a model that is in memory.
    ///
    /// # Errors
    /// tract cannot handle the model, or a value is asked for that it does not have.
    pub fn prepare(self, model: &Model) -> Result<Runnable> {
        Ok(Runnable(self.0.prepare(&model.0)?))
    }
}

/// A model on tract, ready to run at any batch size and length that it takes. Threads may share it.
#[derive(Debug)]
pub struct Runnable(mabert_runtime::Model);

impl Runnable {
    /// Reads and prepares a model for one thread a run; see [`RunOptions`] for more.
    ///
    /// # Errors
    /// The file is no model, or tract cannot handle it.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        RunOptions::default().load(path)
    }

    /// Runs the model once. Inputs come in any order, each named once.
    ///
    /// # Errors
    /// An input of a wrong name, element type, rank or size; an index outside its table; a sequence that is too long; or a
    /// failure of tract.
    pub fn run(&self, inputs: &[(&str, &Tensor)]) -> Result<Outputs> {
        Ok(Outputs(self.0.run(inputs)?))
    }

    /// The inputs that [`run`](Self::run) needs.
    pub fn inputs(&self) -> &[TensorType] {
        self.0.inputs()
    }

    /// The names of what [`run`](Self::run) returns, in order.
    pub fn output_names(&self) -> &[String] {
        self.0.outputs()
    }
}

//! An ONNX model in memory.

use std::collections::BTreeMap;
use std::path::Path;

use mabert_graph::TensorType;

use crate::Result;

/// An ONNX model, its constants in memory. What is loaded and saved unchanged is the same model.
#[derive(Clone, Debug)]
pub struct Model(pub(crate) mabert_graph::Model);

impl Model {
    /// Reads a model and the external data that it names.
    ///
    /// # Errors
    /// The file or its external data is missing, truncated, or not ONNX.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        Ok(Self(mabert_graph::Model::load(path)?))
    }

    /// Reads a model from the bytes of its file; it must have no external data.
    ///
    /// # Errors
    /// The bytes are not ONNX, or refer to external data.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        Ok(Self(mabert_graph::Model::from_bytes(bytes)?))
    }

    /// The bytes of the model's file, everything inside.
    ///
    /// # Errors
    /// The model is larger than protobuf's 2 GiB.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        Ok(self.0.to_bytes()?)
    }

    /// Writes the model under a temporary name and renames it: `path` is the old file or the new one, whole. A model that
    /// came with external data, or is larger than protobuf's 2 GiB, keeps its large constants in a file beside it.
    ///
    /// # Errors
    /// The folder or the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        Ok(self.0.save(path)?)
    }

    /// The inputs that a caller must give.
    pub fn inputs(&self) -> Vec<TensorType> {
        self.0.inputs()
    }

    /// The outputs.
    pub fn outputs(&self) -> Vec<TensorType> {
        self.0.outputs()
    }

    /// How often each operator occurs; those outside the standard domain carry their domain's name.
    pub fn operators(&self) -> BTreeMap<String, usize> {
        self.0.operators()
    }
}

//! Runs any ONNX model on tract.
//!
//! A [`Model`] checks what it is given before tract sees it, so that bad input is an [`Error`] that names the input,
//! never a panic. Symbolic dimensions are bound by the inputs of each run. Inner values can be tapped.
//!
//! ```
//! use mabert_runtime::{Model, Tensor};
//!
//! # fn main() -> Result<(), mabert_runtime::Error> {
//! # let model_path = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/bert-mini-sst2/model.onnx");
//! let model = Model::load(model_path)?;
//! for input in model.inputs() {
//!     println!("takes {input}"); // input_ids i64[batch_size,sequence_length]
//! }
//!
//! let ids = Tensor::new(&[1, 4], vec![2i64, 100, 101, 3]); // [batch, length]
//! let outputs = model.run(&[
//!     ("input_ids", &ids),
//!     ("attention_mask", &Tensor::new(&[1, 4], vec![1i64; 4])),
//!     ("token_type_ids", &Tensor::new(&[1, 4], vec![0i64; 4])),
//! ])?;
//! assert_eq!(outputs[0].0, "logits");
//! assert_eq!(outputs[0].1.shape(), [1, 2]);
//! # Ok(())
//! # }
//! ```
//!
//! The crate is also a tract backend: [`MabertRuntime`] registers itself under the name `mabert`, and programs that
//! embed tract find it with `tract_core::runtime::runtime_for_name("mabert")`.
//!
//! With the feature `onnxruntime`, `OrtModel` runs the same models on onnxruntime for cross-checks.

mod adapt;
mod backend;
mod bounded;
mod check;
mod engine;
mod error;
mod fuse;
mod integer_square;
mod limits;
mod memory;
mod model;
mod not_a_number;
pub mod npz;
#[cfg(feature = "onnxruntime")]
mod onnxruntime;
mod operators;
mod plan;
mod supported;
mod tract_values;

pub use backend::{MabertRuntime, TRACT_RUNTIME};
pub use check::MAX_SEQ_KEY;
pub use engine::{Engine, Named, borrowed};
pub use error::{Error, Result};
pub use mabert_graph::{ElementType, Tensor, TensorType};
pub use model::{LoadOptions, Model, Taps, Timed};
#[cfg(feature = "onnxruntime")]
pub use onnxruntime::{OrtModel, load_onnxruntime};

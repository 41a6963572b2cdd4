//! Rewrites BERT-family ONNX models into [MA-BERT](https://openreview.net/forum?id=HtAfbHa7LAL) models, and runs ONNX
//! models on [tract](https://github.com/sonos/tract).
//!
//! # Rewrite
//!
//! [`rewrite`] turns a [`Model`], the *teacher*, into a [`Student`]: softmax becomes hinges or a small network, GELU becomes
//! ReLU, layer normalisation melts into the weights beside it. The student's parameters are fitted on text, so that it
//! answers like its teacher, and the [`Report`] says how far it does, on texts that were kept apart.
//!
//! ```
//! use mabert::{Data, Job, Model, Silent};
//!
//! # fn main() -> Result<(), mabert::Error> {
//! # let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures");
//! # let folder = tempfile::tempdir().expect("a temporary folder");
//! # let student_path = folder.path().join("ma.onnx");
//! # let (model_path, data_path) = (format!("{fixtures}/bert-mini-sst2/model.onnx"), format!("{fixtures}/reviews/reviews.tsv"));
//! # let tokenizer_path = format!("{fixtures}/bert-mini-sst2/tokenizer.json");
//! let teacher = Model::load(&model_path)?;
//! let job = Job::default().data(Data::new(data_path)).tokenizer(tokenizer_path).max_seq(32);
//! # let job = job.calibration_tokens(2_000);
//! let (student, report) = mabert::rewrite(teacher, &job, &Silent)?;
//! for output in &report.outputs {
//!     println!("{}: mean difference {:.3}, same argmax {:?}", output.output, output.mean_abs, output.agreement);
//! }
//! student.save(&student_path)?;
//! # assert!(!student.model().operators().contains_key("Softmax"));
//! # assert_eq!(student.longest_sequence(), 64);
//! # Ok(())
//! # }
//! ```
//!
//! # Run
//!
//! A [`Runnable`] is a model ready to run on tract, a student or any other. It takes references, and many threads may
//! share one.
//!
//! ```
//! use mabert::{Runnable, Tensor};
//!
//! # fn main() -> Result<(), mabert::Error> {
//! # let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/bert-mini-sst2/model.onnx");
//! let model = Runnable::load(path)?;
//! let ids = Tensor::new(&[1, 4], vec![2i64, 100, 101, 3]); // [batch, n]
//! let mask = Tensor::new(&[1, 4], vec![1i64; 4]);
//! let types = Tensor::new(&[1, 4], vec![0i64; 4]);
//! let outputs = model.run(&[("input_ids", &ids), ("attention_mask", &mask), ("token_type_ids", &types)])?;
//! assert_eq!(outputs["logits"].shape(), [1, 2]);
//! # Ok(())
//! # }
//! ```
//!
//! Programs that embed tract find its operators under the name `mabert`, see [`TRACT_RUNTIME`].
//!
//! # Stability
//!
//! This crate is the project's public interface. The crates below it (`mabert-graph`, `mabert-runtime`, `mabert-passes`,
//! `mabert-transfer`) change as the work needs.

mod error;
mod model;
mod outputs;
mod runnable;
mod student;

pub use error::{Error, Result};
pub use mabert_graph::{Dim, ElementType, Tensor, TensorType};
pub use mabert_passes::inputs::Role;
pub use mabert_passes::lower::{Form, Sharing};
pub use mabert_passes::pipeline::{Keep, Order, Pass};
pub use mabert_transfer::compare::{OutputDistance, VectorDistance};
pub use mabert_transfer::data::{Columns, DataFormat};
pub use mabert_transfer::evaluate::Metric;
pub use mabert_transfer::full::FullOptions;
pub use mabert_transfer::job::{
    BeyondReport, BoundsReport, ByForm, CheckpointFolder, Data, Dev, DevReport, DevScore, FormChoice, FullStage, Job,
    OddInputs, Reason, Report, SiteReport, Source, StageReport, Target, Transfer,
};
pub use mabert_transfer::pooling::Pooling;
pub use mabert_transfer::progress::{Progress, Silent};
pub use model::Model;
pub use outputs::Outputs;
pub use runnable::{RunOptions, Runnable};
pub use student::{Student, rewrite};

/// The README's examples compile.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;

/// The name under which tract finds the backend with this project's operators:
/// `tract_core::runtime::runtime_for_name(mabert::TRACT_RUNTIME)`. Naming this constant links it in.
pub const TRACT_RUNTIME: &str = mabert_runtime::TRACT_RUNTIME;

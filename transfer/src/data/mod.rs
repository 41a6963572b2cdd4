//! Texts out of files, as batches of token ids.
//!
//! A [`DataFile`] is opened and its kind told; a [`Reader`] streams [`Example`]s out of it; a [`TextEncoder`] makes
//! [`Sequence`]s of token ids of them; [`batches`] puts sequences of similar length together and [`Batch::inputs`] names
//! them as a model's inputs.

mod align;
mod arrays;
mod augment;
mod batch;
mod columns;
mod conll;
mod doubts;
mod json;
mod label;
mod lines;
mod made_up;
mod neighbours;
mod objects;
mod quotes;
mod reader;
mod sample;
mod source;
mod table;
mod tokens;
mod windows;

pub use augment::Augmentation;
pub use batch::{Batch, BatchShape, Roles, batches};
pub use columns::{Columns, USUAL_PAIRS, USUAL_TEXTS};
pub use doubts::{Unknown, check_ids, sameness_note};
pub use label::{Answers, Label};
pub use made_up::{Vocabulary, made_up_sequences, odd_sequences};
pub use reader::{Content, Example, Reader, Skipped};
pub(crate) use sample::no_examples;
pub use sample::{Augmented, LoneTexts, Sample, Wanted, draw_sample, read_sequences};
pub use source::{Data, DataFile, DataFormat};
pub use tokens::{Overlong, Sequence, TextEncoder};
pub use windows::Window;

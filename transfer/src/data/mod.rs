//! Texts out of files, as batches of token ids.
//!
//! A [`Reader`] streams [`Example`]s out of a file; a [`TextEncoder`] makes [`Sequence`]s of token ids of them; [`batches`]
//! puts sequences of similar length together and [`Batch::inputs`] names them as a model's inputs.

mod arrays;
mod batch;
mod columns;
mod json;
mod lines;
mod made_up;
mod reader;
mod sample;
mod table;
mod tokens;

pub use batch::{Batch, BatchShape, Role, batches, input_roles};
pub use columns::{Columns, USUAL_PAIRS, USUAL_TEXTS};
pub use made_up::{Vocabulary, made_up_sequences, odd_sequences};
pub use reader::{Content, Example, Reader};
pub use sample::{LoneTexts, Sample, Wanted, draw_sample, read_sequences};
pub use tokens::{Overlong, Sequence, TextEncoder};

//! Texts out of files, as batches of token ids.
//!
//! A [`DataFile`] is opened and its kind told; a [`Reader`] streams [`Example`]s out of it; a [`TextEncoder`] makes
//! [`Sequence`]s of token ids of them; [`batches`] puts sequences of similar length together and [`Batch::inputs`] names
//! them as a model's inputs.

mod arrays;
mod batch;
mod columns;
mod doubts;
mod json;
mod lines;
mod made_up;
mod objects;
mod quotes;
mod reader;
mod sample;
mod source;
mod table;
mod tokens;

pub use batch::{Batch, BatchShape, Roles, batches};
pub use columns::{Columns, USUAL_PAIRS, USUAL_TEXTS};
pub use doubts::{Unknown, check_ids, sameness_note};
pub use made_up::{Vocabulary, made_up_sequences, odd_sequences};
pub use reader::{Content, Example, Reader, Skipped};
pub use sample::{LoneTexts, Sample, Wanted, draw_sample, read_pairs, read_sequences};
pub use source::{Data, DataFile, DataFormat};
pub use tokens::{Overlong, Sequence, TextEncoder};

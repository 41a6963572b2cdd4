//! From a teacher to a student that answers like it.
//!
//! * [`job`]: the main job, from a model to a measured student;
//! * [`data`]: texts out of files, token ids, batches by length, made-up tokens where there is no text;
//! * [`layerwise`]: the student's parameters, layer by layer, through the student's own activations;
//! * [`blockwise`]: gradient steps on one attention block at a time, between two solves of the closed form;
//! * [`bounds`]: which texts get to where a student saturates;
//! * [`full`]: gradient steps on everything at once, from tokens to outputs;
//! * [`evaluate`]: task metrics of a model;
//! * [`compare`]: how far a model's outputs are from another's;
//! * [`pooling`]: how vectors of texts are made of a feature model's outputs;
//! * [`progress`]: what a caller is told on the way.

mod adam_step;
pub mod blockwise;
pub mod bounds;
pub mod compare;
pub mod data;
mod error;
pub mod evaluate;
pub mod full;
mod gradient;
mod heads;
mod hinges;
pub mod job;
pub mod layerwise;
mod part;
pub mod pooling;
pub mod progress;
mod schedule;
mod setting;
mod stored;
mod vectors;

pub use error::{Error, Result};
pub use setting::Setting;

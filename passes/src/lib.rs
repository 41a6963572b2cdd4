//! Recognises the sites of a BERT encoder and rewrites them into MA-BERT form.
//!
//! *Recognise, then lower.* [`recognise`] starts from anchors (a `Softmax`, an `Erf`, a `Sqrt`...), finds the smallest
//! region around each, and probes it: the region is run on chosen inputs and compared with the reference function, so
//! it does not matter how an exporter spelled it. What is found are typed [`sites`]. The passes in [`lower`] lower
//! sites without knowing who spelled them; [`pipeline`] lists them in order.

pub mod contract;
mod error;
mod fixed_sizes;
pub mod inputs;
pub mod lower;
pub mod magnitude;
pub mod pipeline;
pub mod recognise;
pub mod recording;
pub mod sites;
#[cfg(test)]
mod testing;

pub use error::{Error, Result};

//! Attention of hinges for all heads in one operator: nothing of size `n x n` is written to memory.
//!
//! [`nodes`] finds it in the ONNX graph, as this project's own rewriting leaves it, and puts one node in its place;
//! [`wiring`] turns that into tract's terms; [`attention`] computes it, block by block of queries, and [`rows`] what hinges
//! make of the scores of a block.

mod attention;
mod nodes;
mod rows;
mod wiring;

pub(crate) use nodes::gather;
pub(crate) use wiring::{DOMAIN, OPERATOR, hinge_attention};

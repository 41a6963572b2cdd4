//! Tests that span the crates.

mod bounds;
mod coverage;
mod engines;
mod files;
mod full;
mod fuse;
mod hostile;
mod labels;
mod main_job;
mod numbers;
mod operators;
mod quantised;
mod sites;
mod spellings;
mod structure;
mod tasks;
mod twins;
mod vectors;

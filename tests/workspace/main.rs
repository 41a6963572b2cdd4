//! Tests that span the crates.

mod engines;
mod files;
mod full;
mod fused;
mod main_job;
mod sites;
mod structure;
mod twins;

//! Tests that span the crates.

mod engines;
mod files;
mod main_job;
mod sites;
mod structure;
mod twins;

//! Tests that span the crates.

mod engines;
mod sites;
mod twins;

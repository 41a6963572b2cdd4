//! Tests that span the crates.

mod engines;

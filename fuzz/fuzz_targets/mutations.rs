//! Any exports with attributes and operands that make no sense: loaded, run, and looked into.
#![no_main]

#[allow(dead_code, reason = "each target is one of a few")]
#[path = "../targets.rs"]
mod targets;

use libfuzzer_sys::fuzz_target;

// Panics of tract that are caught end nothing; those that are not still do.
fuzz_target!(init: std::panic::set_hook(Box::new(|_| ())), |bytes: &[u8]| targets::mutations(bytes));

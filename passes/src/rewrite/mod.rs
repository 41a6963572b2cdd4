//! The passes: exact ones, whose outputs are equal within rounding, and approximating ones.

mod constants;

pub use constants::{fold_constants, refuse_unusable_weights};

use mabert_graph::Model;

use crate::Result;

/// Brings a model into the form that the recogniser reads: fused operators spelled out, constants folded.
///
/// # Errors
/// The graph's wiring is broken, a constant cannot be computed, or a weight is not finite.
pub fn prepare(model: &mut Model) -> Result<()> {
    refuse_unusable_weights(model)?;
    mabert_graph::decompose_fused(model)?;
    fold_constants(model)?;
    Ok(())
}

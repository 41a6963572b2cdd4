//! The passes. *Exact* ones leave the outputs equal within rounding; *approximating* ones replace a function by one that
//! only matrix arithmetic and ReLU compute, and need calibration.

mod activation;
mod approximator;
mod canonical;
mod cleanup;
mod constants;
mod first_token;
mod fold;
mod idle;
mod merge_qkv;
mod norm;
mod position_bias;
mod reassociate;
mod softmax;

pub use activation::approximate_activations;
pub use approximator::{Approximator, ApproximatorOptions, LengthFeatures, Sharing};
pub use canonical::{MASK, canonicalise};
pub use cleanup::share_equal_constants;
pub use constants::{fold_constants, refuse_unusable_weights};
pub use first_token::keep_first_token;
pub use fold::{FoldReport, fold_norms};
pub use idle::remove_idle;
pub use merge_qkv::merge_query_key_value;
pub use norm::{approximate_norms, norm_parameters};
pub use reassociate::reassociate_attention;
pub use softmax::approximate_softmax;

use mabert_graph::Model;

use crate::Result;

/// Brings a model into the form that the recogniser reads: functions and fused operators spelled out, single precision,
/// constants folded, what does nothing taken out.
///
/// # Errors
/// The graph's wiring is broken, a constant cannot be computed, or a weight is not finite.
pub fn simplify(model: &mut Model) -> Result<()> {
    mabert_graph::inline_functions(model)?;
    mabert_graph::widen_half(model)?;
    refuse_unusable_weights(model)?;
    mabert_graph::decompose_fused(model)?;
    fold_constants(model)?;
    remove_idle(model)?;
    Ok(())
}

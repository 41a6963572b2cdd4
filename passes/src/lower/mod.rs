//! The passes. *Exact* ones leave the outputs equal within rounding; *approximating* ones replace a function by one that
//! only matrix arithmetic and ReLU compute, and need calibration. The *bounding* one leaves them equal for all inputs
//! whose values stay within the bounds.

mod activation;
mod approximator;
mod basis;
mod bound;
mod canonical;
mod cleanup;
mod constants;
mod first_token;
mod fold;
mod idle;
mod mask;
mod merge_qkv;
mod norm;
mod position_bias;
mod reassociate;
mod sentences_first;
mod softmax;
mod spell_out;
mod weights;

pub(crate) use activation::approximate_activations;
pub use approximator::{
    Approximator, ApproximatorOptions, Form, HingeParameters, HingeSizes, LengthFeatures, NetworkParameters, Sharing,
};
pub use bound::{BOUND_MARGIN, ChannelRanges, NormRanges, Saturation, saturations};
pub(crate) use bound::{Bounds, bound_norms};
pub(crate) use canonical::canonicalise;
pub(crate) use cleanup::share_equal_constants;
pub(crate) use constants::fold_constants;
pub use constants::refuse_unusable_weights;
pub(crate) use first_token::keep_first_token;
pub use fold::FoldReport;
pub(crate) use fold::fold_norms;
pub(crate) use idle::remove_idle;
pub use mask::MASK;
pub(crate) use merge_qkv::merge_query_key_value;
pub(crate) use norm::approximate_norms;
pub use norm::norm_parameters;
pub(crate) use reassociate::reassociate_attention;
pub(crate) use sentences_first::put_sentences_first;
pub(crate) use softmax::approximate_softmax;
pub(crate) use spell_out::{dequantise, spell_out};

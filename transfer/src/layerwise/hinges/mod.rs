//! Fits hinges to a teacher's attention, head by head: what they compute is in
//! [`HingeParameters`](mabert_passes::lower::HingeParameters).

mod fit;
mod samples;
mod values;

pub(super) use fit::{FittedHinges, context_error, fit, store};
pub(super) use samples::{Draw, Sample, Scores};

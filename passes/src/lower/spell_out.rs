//! Exact: the model's own functions, and fused operators, spelled out in operators that every pass knows.

use mabert_graph::Model;

use super::constants::refuse_unusable_weights;
use crate::Result;
use crate::sites::Precision;

/// Spells functions and fused operators out, in single precision; `precision` is then what the model came in. Returns how
/// many nodes were spelled out.
///
/// # Errors
/// The graph's wiring is broken, a constant cannot be read, or a weight is not finite.
pub(crate) fn spell_out(model: &mut Model, precision: &mut Precision) -> Result<usize> {
    let functions = mabert_graph::inline_functions(model)?;
    *precision = if mabert_graph::widen_half(model)? { Precision::Half } else { Precision::Single };
    refuse_unusable_weights(model)?;
    Ok(functions + mabert_graph::decompose_fused(model)?)
}

//! What is quantised, the model's own functions, and fused operators, spelled out in operators that every pass knows. All but
//! the first, which leaves roundings out, are exact.

use mabert_graph::{Model, Rounding};

use super::constants::refuse_unusable_weights;
use crate::Result;
use crate::sites::Precision;

/// Spells what is quantised in single precision, without the roundings of what is computed, and what is of half precision
/// beside it; returns how many nodes worked on quantised numbers.
///
/// # Errors
/// The graph's wiring is broken, or a constant cannot be read.
pub(crate) fn dequantise(model: &mut Model) -> Result<usize> {
    mabert_graph::inline_functions(model)?;
    mabert_graph::widen_half(model)?;
    Ok(mabert_graph::dequantise(model, Rounding::Dropped)?)
}

/// Spells functions and fused operators out, in single precision; `precision` is then what the model came in. Returns how
/// many nodes were spelled out.
///
/// # Errors
/// The graph's wiring is broken, a constant cannot be read, or a weight is not finite.
pub(crate) fn spell_out(model: &mut Model, precision: &mut Precision) -> Result<usize> {
    let functions = mabert_graph::inline_functions(model)?;
    if mabert_graph::widen_half(model)? {
        *precision = Precision::Half;
    }
    refuse_unusable_weights(model)?;
    Ok(functions + mabert_graph::decompose_fused(model)?)
}

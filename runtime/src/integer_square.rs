//! Squares of integers. tract makes a square of a product of a value with itself, and has none of 64 bits; those of others go
//! through floats of 24.

use tract_core::internal::*;
use tract_core::ops::element_wise::ElementWiseOp;
use tract_core::ops::math::Square;

element_wise!(integer_square, IntegerSquare,
    [i8, i16, i32, i64, u8, u16, u32, u64] => |_, values| {
        values.iter_mut().for_each(|value| *value = value.wrapping_mul(*value));
        Ok(())
    },
    [TDim] => |_, values| {
        values.iter_mut().for_each(|value| *value = value.clone() * value.clone());
        Ok(())
    }
);

/// Puts these in the place of tract's.
pub(crate) fn square_integers(model: &mut TypedModel) {
    for node in &mut model.nodes {
        let integers =
            node.outputs.iter().all(|output| output.fact.datum_type.is_integer() || output.fact.datum_type.is_tdim());
        if integers && node.op_as::<ElementWiseOp>().is_some_and(|op| op.0.is::<Square>()) {
            node.op = Box::new(integer_square());
        }
    }
}

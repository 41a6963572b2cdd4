//! The mask as floats, once for all layers.

use mabert_graph::{Builder, ElementType, Expr, Tensor};

use crate::sites::Encoder;

/// The value that holds the mask as floats, `[batch, n]`.
pub const MASK: &str = "mask/float";

/// The mask as floats `[batch, n]`; ones for models that take none.
pub(super) fn float_mask<'b>(b: &'b Builder, encoder: &Encoder) -> Expr<'b> {
    b.scope("mask");
    let mask = match &encoder.mask {
        Some(mask) => b.value(&mask.input).cast(ElementType::F32),
        None => {
            let shape = b.value(&encoder.layers[0].input).shape().slice(0, 0, 2);
            b.op("Expand", &[b.parameter("one", &Tensor::new(&[1, 1], vec![1f32])), shape], vec![])
        }
    };
    mask.named(MASK)
}

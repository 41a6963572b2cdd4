//! Operators of ONNX that tract computes wrongly, or not where sizes are symbols, in tract's terms.

mod equal;
mod range;
mod slice;
mod squeeze;

use std::sync::LazyLock;

use tract_onnx::model::OnnxOpRegister;
use tract_onnx::tract_hir::internal::{Expansion, InferenceModel};

use crate::fuse;

/// tract's own operators.
static TRACTS: LazyLock<OnnxOpRegister> = LazyLock::new(|| tract_onnx::onnx().op_register);

/// Those, with ours in the places of some.
pub(crate) static OPERATORS: LazyLock<OnnxOpRegister> = LazyLock::new(|| {
    let mut operators = TRACTS.clone();
    operators.insert("Equal", equal::equal);
    operators.insert(fuse::OPERATOR, fuse::hinge_attention);
    operators.insert("Range", range::range);
    operators.insert("Slice", slice::slice);
    operators.insert("Squeeze", squeeze::squeeze);
    operators
});

/// Whether slices end where their axis does, whatever a symbol may stand for, or are taken to lie within it. A size that is the
/// smaller of two unifies with neither.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Bounds {
    Clamped,
    Trusted,
}

/// Has the slices of a model treat bounds so.
pub(crate) fn bound_slices(model: &mut InferenceModel, bounds: Bounds) {
    for node in model.nodes_mut() {
        let expansion = node.op.as_op_mut().downcast_mut::<Box<dyn Expansion>>();
        if let Some(slice) = expansion.and_then(|op| op.as_any_mut().downcast_mut::<slice::Slice>()) {
            slice.bounds = bounds;
        }
    }
}

pub(crate) fn has_slices(model: &InferenceModel) -> bool {
    let expansions = model.nodes().iter().filter_map(|node| node.op.as_op().downcast_ref::<Box<dyn Expansion>>());
    expansions.into_iter().any(|op| op.as_any().is::<slice::Slice>())
}

//! `Squeeze` that names no axes: all of size 1. tract takes that for none.

use tract_onnx::model::ParsingContext;
use tract_onnx::pb::NodeProto;
use tract_onnx::tract_hir::internal::*;

pub(super) fn squeeze(
    context: &ParsingContext<'_>,
    node: &NodeProto,
) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
    let named =
        node.attribute.iter().any(|a| a.name == "axes") || node.input.get(1).is_some_and(|name| !name.is_empty());
    if named {
        return super::TRACTS.0["Squeeze"](context, node);
    }
    Ok((expand(SqueezeAll), vec![]))
}

#[derive(Clone, Debug)]
struct SqueezeAll;

impl Expansion for SqueezeAll {
    fn name(&self) -> StaticName {
        "SqueezeAll".into()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        s: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        check_output_arity(outputs, 1)?;
        s.equals(&inputs[0].datum_type, &outputs[0].datum_type)?;
        s.given(&inputs[0].shape, move |s, shape| {
            // What a symbol stands for may be 1.
            if let Some(size) = shape.iter().find(|size| size.as_i64().is_none()) {
                bail!("which axes are squeezed depends on {size}");
            }
            s.equals(&outputs[0].shape, shape.iter().filter(|size| !size.is_one()).cloned().collect::<TVec<_>>())
        })
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        let shape = model.outlet_fact(inputs[0])?.shape.to_tvec();
        let mut wire = inputs[0];
        for axis in (0..shape.len()).rev().filter(|&axis| shape[axis].is_one()) {
            wire = model.wire_node(format!("{prefix}.axis-{axis}"), AxisOp::Rm(axis), &[wire])?[0];
        }
        Ok(tvec!(wire))
    }
}

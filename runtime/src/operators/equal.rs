//! `Equal` of sizes. tract takes a symbol to equal nothing but itself, while it may stand for what it is compared with.

use tract_core::ops::binary::TypedBinOp;
use tract_core::ops::cast::wire_cast;
use tract_core::ops::change_axes::wire_rank_broadcast;
use tract_core::ops::logic::comp_eq;
use tract_onnx::model::ParsingContext;
use tract_onnx::pb::NodeProto;
use tract_onnx::tract_hir::infer::helpers::infer_shape_broadcasting;
use tract_onnx::tract_hir::internal::*;

pub(super) fn equal(_: &ParsingContext<'_>, _: &NodeProto) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
    Ok((expand(Equal), vec![]))
}

#[derive(Clone, Debug)]
struct Equal;

/// Whether two sizes are equal, where that is so for all that their symbols may stand for.
fn decided(a: &TDim, b: &TDim) -> Option<bool> {
    let difference = (a.clone() - b).simplify();
    if let Some(number) = difference.as_i64() {
        return Some(number == 0);
    }
    let differ = difference.prove_strict_positive() || difference.prove_strict_negative();
    differ.then_some(false)
}

/// The result for constants of sizes, if it is decided everywhere.
fn constant(a: &Tensor, b: &Tensor) -> TractResult<Option<Tensor>> {
    let [a, b] = [a.cast_to::<TDim>()?, b.cast_to::<TDim>()?];
    let [a, b] = [a.to_plain_array_view::<TDim>()?, b.to_plain_array_view::<TDim>()?];
    rule_if_some!(shape = tract_core::broadcast::multi_broadcast(&[a.shape(), b.shape()]).ok());
    let [Some(a), Some(b)] = [a.broadcast(&*shape), b.broadcast(&*shape)] else { return Ok(None) };
    let results: Option<Vec<bool>> = a.iter().zip(b.iter()).map(|(a, b)| decided(a, b)).collect();
    rule_if_some!(results = results);
    Ok(Some(tract_ndarray::ArrayD::from_shape_vec(&*shape, results)?.into_tensor()))
}

impl Expansion for Equal {
    fn name(&self) -> StaticName {
        "Equal".into()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        s: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        check_input_arity(inputs, 2)?;
        check_output_arity(outputs, 1)?;
        s.equals(&outputs[0].datum_type, bool::datum_type())?;
        s.with(&inputs[0].shape, move |s, a| {
            s.with(&inputs[1].shape, move |s, b| match infer_shape_broadcasting(&[&a, &b])? {
                Some(shape) => s.equals(&outputs[0].shape, shape),
                None => Ok(()),
            })
        })
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        let facts =
            inputs.iter().map(|input| model.outlet_fact(*input).cloned()).collect::<TractResult<TVec<TypedFact>>>()?;
        let common = DatumType::super_type_for(facts.iter().map(|fact| fact.datum_type))
            .context("operands of types that have none in common")?;
        if common.is_tdim()
            && let [Some(a), Some(b)] = [&facts[0].konst, &facts[1].konst]
            && let Some(result) = constant(a, b)?
        {
            return Ok(tvec!(model.add_const(prefix, result)?));
        }
        // Symbols are numbers when this is run.
        let common = if common.is_tdim() { i64::datum_type() } else { common };
        let inputs = wire_cast(prefix, model, inputs, common)?;
        let inputs = wire_rank_broadcast(prefix, model, &inputs)?;
        model.wire_node(prefix, TypedBinOp(comp_eq(), None), &inputs)
    }
}

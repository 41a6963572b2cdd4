//! `Range`: backwards, in steps of fractions, and of nothing. tract counts the first as if forwards, divides by the second, and
//! has elements of the third.

use tract_core::ops::array::Range as TractRange;
use tract_core::ops::cast::wire_cast;
use tract_core::ops::math;
use tract_onnx::model::ParsingContext;
use tract_onnx::pb::NodeProto;
use tract_onnx::tract_hir::internal::*;
use tract_onnx::tract_hir::ops::array;

pub(super) fn range(_: &ParsingContext<'_>, _: &NodeProto) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
    Ok((expand(Range), vec![]))
}

#[derive(Clone, Debug)]
struct Range;

/// How many numbers there are; `None` where that is not known.
fn length(start: &Tensor, end: &Tensor, step: &Tensor) -> TractResult<Option<TDim>> {
    let floating = [start, end, step].iter().any(|bound| bound.datum_type().is_float());
    if floating {
        let number = |bound: &Tensor| bound.cast_to_scalar::<f64>();
        // A symbol is no number yet.
        let (Ok(start), Ok(end), step) = (number(start), number(end), number(step)?) else { return Ok(None) };
        ensure!(step != 0.0, "a step of 0");
        return Ok(Some((((end - start) / step).ceil().max(0.0) as i64).to_dim()));
    }
    let size = |bound: &Tensor| -> TractResult<TDim> {
        Ok(bound.cast_to::<TDim>()?.try_as_plain_ram()?.to_scalar::<TDim>()?.clone())
    };
    let (start, end) = (size(start)?, size(end)?);
    let Ok(step) = step.cast_to_scalar::<i64>() else { return Ok(None) };
    ensure!(step != 0, "a step of 0");
    let span = if step > 0 { end - start } else { start - end };
    let length = span.divceil(usize::try_from(step.unsigned_abs())?);
    Ok(Some(match length.as_i64() {
        Some(length) => length.max(0).to_dim(),
        None if length.prove_positive_or_zero() => length,
        None => TDim::Max(vec![length, 0.to_dim()]).simplify(),
    }))
}

impl Expansion for Range {
    fn name(&self) -> StaticName {
        "Range".into()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        s: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        check_input_arity(inputs, 3)?;
        check_output_arity(outputs, 1)?;
        let [start, end, step] = [&inputs[0], &inputs[1], &inputs[2]];
        s.given_3(&start.datum_type, &end.datum_type, &step.datum_type, move |s, a, b, c| {
            let common = DatumType::super_type_for([a, b, c]).context("bounds of types that have none in common")?;
            s.equals(&outputs[0].datum_type, if common.is_tdim() { i64::datum_type() } else { common })
        })?;
        for input in inputs {
            s.equals(&input.rank, 0)?;
        }
        s.equals(&outputs[0].rank, 1)?;
        s.given_3(&start.value, &end.value, &step.value, move |s, start, end, step| {
            match length(&start, &end, &step)? {
                Some(length) => s.equals(&outputs[0].shape[0], length),
                None => Ok(()),
            }
        })
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        let facts =
            inputs.iter().map(|input| model.outlet_fact(*input).cloned()).collect::<TractResult<TVec<TypedFact>>>()?;
        let types = facts.iter().map(|fact| fact.datum_type);
        let common = DatumType::super_type_for(types).context("bounds of types that have none in common")?;
        let constants: Option<Vec<_>> = facts.iter().map(|fact| fact.konst.clone()).collect();
        let symbolic = facts.iter().any(|fact| fact.uniform_tdim.is_some());
        let known = match &constants {
            Some(constants) => length(&constants[0], &constants[1], &constants[2])?,
            None => None,
        };
        let Some(length) = known else {
            // Sizes that are computed are numbers when they are used.
            let numbers = if common.is_tdim() && !symbolic { i64::datum_type() } else { common };
            let inputs = wire_cast(prefix, model, inputs, numbers)?;
            return array::Range.wire(prefix, model, &inputs);
        };
        let inputs = wire_cast(prefix, model, inputs, common)?;
        if !common.is_tdim() || length.prove_positive_or_zero() && !matches!(length, TDim::Max(_)) {
            return model.wire_node(prefix, TractRange::new(length), &inputs);
        }
        // As many as there are, or none: counted from 0, then moved.
        let number = |value: i64| tensor0(value.to_dim());
        let zero = model.add_const(format!("{prefix}.zero"), number(0))?;
        let one = model.add_const(format!("{prefix}.one"), number(1))?;
        let end = model.add_const(format!("{prefix}.length"), tensor0(length.clone()))?;
        let counted = model.wire_node(format!("{prefix}.counted"), TractRange::new(length), &[zero, end, one])?;
        let bounds = wire_cast(format!("{prefix}.bounds"), model, &inputs, i64::datum_type())?;
        let bounds: TVec<OutletId> = [bounds[0], bounds[2]]
            .iter()
            .enumerate()
            .map(|(at, wire)| Ok(model.wire_node(format!("{prefix}.bound-{at}"), AxisOp::Add(0), &[*wire])?[0]))
            .collect::<TractResult<_>>()?;
        let stepped = model.wire_node(format!("{prefix}.stepped"), math::mul(), &[counted[0], bounds[1]])?;
        model.wire_node(prefix, math::add(), &[stepped[0], bounds[0]])
    }
}

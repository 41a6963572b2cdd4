//! `Slice`: its bounds end where the axis does, as ONNX has it. tract clamps them only where all is a number.

use tract_core::ops::array::Slice as TractSlice;
use tract_core::ops::downsample::Downsample;
use tract_onnx::model::ParsingContext;
use tract_onnx::pb::NodeProto;
use tract_onnx::tract_hir::internal::*;

use super::Bounds;

pub(super) fn slice(
    context: &ParsingContext<'_>,
    node: &NodeProto,
) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
    let given = if context.onnx_operator_set_version < 10 && node.input.len() == 1 {
        let [starts, ends] = ["starts", "ends"].map(|name| node.get_attr_vec::<i64>(name));
        let (starts, ends) = (starts?, ends?);
        ensure!(starts.len() == ends.len(), "{} starts, but {} ends", starts.len(), ends.len());
        let axes = match node.get_attr_opt_vec::<i64>("axes")? {
            Some(axes) => axes,
            None => (0..starts.len() as i64).collect(),
        };
        ensure!(starts.len() == axes.len(), "{} starts, but {} axes", starts.len(), axes.len());
        Given::Attributes { starts, ends, axes }
    } else {
        let mut optional = tract_onnx::model::optional_inputs(node).skip(3);
        Given::Operands { axes: optional.next().flatten(), steps: optional.next().flatten() }
    };
    Ok((expand(Slice { given, bounds: Bounds::Clamped }), vec![]))
}

/// ONNX's operator.
#[derive(Clone, Debug)]
pub(super) struct Slice {
    given: Given,
    pub(super) bounds: Bounds,
}

/// Where its numbers are.
#[derive(Clone, Debug)]
enum Given {
    Attributes {
        starts: Vec<i64>,
        ends: Vec<i64>,
        axes: Vec<i64>,
    },
    /// Inputs 1 and 2, and these.
    Operands {
        axes: Option<usize>,
        steps: Option<usize>,
    },
}

/// What is cut of one axis.
struct Cut {
    axis: usize,
    step: i64,
    /// The elements from the first one in memory to the last, of which every `step`th is taken.
    start: TDim,
    end: TDim,
}

impl Cut {
    fn length(&self) -> TDim {
        (self.end.clone() - &self.start).divceil(self.step.unsigned_abs() as usize)
    }
}

/// Integers and sizes. The largest integer is no size: tract would make another number of it.
fn sizes(values: &Tensor) -> TractResult<Vec<TDim>> {
    if values.datum_type() == i64::datum_type() {
        return Ok(values.try_as_plain_ram()?.as_slice::<i64>()?.iter().map(|value| value.to_dim()).collect());
    }
    Ok(values.cast_to::<TDim>()?.try_as_plain_ram()?.as_slice::<TDim>()?.to_vec())
}

fn integers(values: &Tensor) -> TractResult<Vec<i64>> {
    Ok(values.cast_to::<i64>()?.try_as_plain_ram()?.as_slice::<i64>()?.to_vec())
}

impl Slice {
    /// The axes of a value of `rank`, and their steps; `None` where they are not known.
    fn axes(
        &self,
        rank: usize,
        value: &dyn Fn(usize) -> Option<Arc<Tensor>>,
    ) -> TractResult<Option<Vec<(usize, i64)>>> {
        let (axes, steps) = match &self.given {
            Given::Attributes { axes, .. } => (Some(axes.clone()), None),
            Given::Operands { axes, steps } => {
                rule_if!(axes.is_none_or(|at| value(at).is_some()) && steps.is_none_or(|at| value(at).is_some()));
                let read = |at: &Option<usize>| at.and_then(value).map(|values| integers(&values)).transpose();
                (read(axes)?, read(steps)?)
            }
        };
        let axes = axes.unwrap_or_else(|| (0..rank as i64).collect());
        let step = |at: usize| steps.as_ref().map_or(Some(1), |steps| steps.get(at).copied());
        let named = axes.iter().enumerate().map(|(at, &axis)| {
            let axis = usize::try_from(if axis < 0 { axis + rank as i64 } else { axis })?;
            let step = step(at).filter(|&step| step != 0).context("a step that is none")?;
            ensure!(axis < rank, "axis {axis} of {rank}");
            Ok((axis, step.clamp(-i64::from(i32::MAX), i64::from(i32::MAX))))
        });
        named.collect::<TractResult<Vec<_>>>().map(Some)
    }

    /// What is cut of a value of `shape`; `None` where that is not known.
    fn cuts(&self, shape: &[TDim], value: &dyn Fn(usize) -> Option<Arc<Tensor>>) -> TractResult<Option<Vec<Cut>>> {
        rule_if_some!(axes = self.axes(shape.len(), value)?);
        let (starts, ends) = match &self.given {
            Given::Attributes { starts, ends, .. } => {
                let sizes = |values: &[i64]| values.iter().map(|v| v.to_dim()).collect::<Vec<_>>();
                (sizes(starts), sizes(ends))
            }
            Given::Operands { .. } => {
                rule_if_some!(starts = value(1));
                rule_if_some!(ends = value(2));
                (sizes(&starts)?, sizes(&ends)?)
            }
        };
        ensure!(starts.len() == ends.len(), "{} starts, but {} ends", starts.len(), ends.len());
        // Where no axes are named, there may be fewer bounds than axes.
        let cuts = axes.iter().zip(starts.iter().zip(&ends));
        Ok(Some(cuts.map(|(&(axis, step), (start, end))| self.cut(axis, step, &shape[axis], start, end)).collect()))
    }

    fn cut(&self, axis: usize, step: i64, size: &TDim, start: &TDim, end: &TDim) -> Cut {
        // Counted backwards, an axis has a place before its first element, and none after its last.
        let (least, most) = if step > 0 { (0.to_dim(), size.clone()) } else { (-1.to_dim(), size.clone() - 1) };
        let start = self.clamped(from_the_front(start, size), &least, &most);
        let end = self.clamped(from_the_front(end, size), &least, &most);
        let (start, end) = if step > 0 { (start, end) } else { (end + 1, start + 1) };
        // Bounds in the wrong order cut nothing.
        let end = match as_number(&end, &start) {
            Some(length) if length < 0 => start.clone(),
            None if self.bounds == Bounds::Clamped && !provably(&start, &end) => {
                TDim::Max(vec![start.clone(), end]).simplify()
            }
            _ => end,
        };
        Cut { axis, step, start, end }
    }

    /// `bound` where it is between the two, or the nearer of them.
    fn clamped(&self, bound: TDim, least: &TDim, most: &TDim) -> TDim {
        let far = |bound: &TDim| bound.as_i64().is_some_and(|bound| bound.unsigned_abs() > FAR as u64);
        if far(&bound) {
            return if bound.as_i64() < Some(0) { least.clone() } else { most.clone() };
        }
        let trusted = self.bounds == Bounds::Trusted;
        let bound = match as_number(&bound, least) {
            Some(above) if above < 0 => least.clone(),
            None if !trusted && !provably(least, &bound) => TDim::Max(vec![least.clone(), bound]).simplify(),
            _ => bound,
        };
        match as_number(most, &bound) {
            Some(below) if below < 0 => most.clone(),
            None if !trusted && !provably(&bound, most) => TDim::Min(vec![bound, most.clone()]).simplify(),
            _ => bound,
        }
    }

    fn wire_cuts(
        prefix: &str,
        model: &mut TypedModel,
        mut wire: OutletId,
        cuts: Vec<Cut>,
    ) -> TractResult<TVec<OutletId>> {
        for Cut { axis, step, start, end } in cuts {
            let name = model.unique_name(format!("{prefix}.slice-axis-{axis}"));
            wire = model.wire_node(name, TractSlice::new(axis, start, end), &[wire])?[0];
            if step != 1 {
                let name = model.unique_name(format!("{prefix}.stride-axis-{axis}"));
                wire = model.wire_node(name, Downsample::new(axis, step as isize, 0), &[wire])?[0];
            }
        }
        Ok(tvec!(wire))
    }
}

/// No axis is so long: "to the end" is written as some largest number.
const FAR: i64 = 1 << 30;

/// A bound that may be counted from the end.
fn from_the_front(bound: &TDim, size: &TDim) -> TDim {
    let negative = match bound.as_i64() {
        Some(bound) => bound < 0 && bound > -FAR,
        None if bound.prove_positive_or_zero() => false,
        None if bound.prove_negative_or_zero() => true,
        // Sizes are large, what is taken off them is small.
        None => {
            let large = bound.symbols().iter().fold(SymbolValues::default(), |values, symbol| values.with(symbol, FAR));
            bound.eval(&large).as_i64().is_some_and(|bound| bound < 0)
        }
    };
    if negative { bound.clone() + size } else { bound.clone() }
}

/// The difference of two sizes, where it is a number.
fn as_number(larger: &TDim, smaller: &TDim) -> Option<i64> {
    (larger.clone() - smaller).as_i64()
}

fn provably(smaller: &TDim, larger: &TDim) -> bool {
    (larger.clone() - smaller).simplify().prove_positive_or_zero()
}

impl Expansion for Slice {
    fn name(&self) -> StaticName {
        "Slice".into()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        s: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        check_output_arity(outputs, 1)?;
        s.equals(&inputs[0].datum_type, &outputs[0].datum_type)?;
        s.equals(&inputs[0].rank, &outputs[0].rank)?;
        let known: Vec<usize> = match &self.given {
            Given::Attributes { .. } => vec![],
            Given::Operands { axes, steps } => axes.iter().chain(steps).copied().collect(),
        };
        // The axes that nothing is cut of are as they were, whatever the bounds.
        s.given(&inputs[0].rank, move |s, rank| {
            let named = known.clone();
            s.given_all(known.iter().map(|&at| &inputs[at].value), move |s, values| {
                let value = |at: usize| named.iter().position(|&known| known == at).map(|place| values[place].clone());
                let Some(cut) = self.axes(rank as usize, &value)? else { return Ok(()) };
                let others = (0..rank as usize).filter(|axis| cut.iter().all(|(cut, _)| cut != axis));
                for axis in others.collect::<Vec<_>>() {
                    s.equals(&inputs[0].shape[axis], &outputs[0].shape[axis])?;
                }
                Ok(())
            })
        })?;
        s.given(&inputs[0].shape, move |s, shape| {
            s.given_all(inputs[1..].iter().map(|input| &input.value), move |s, values| {
                let value = |at: usize| values.get(at.wrapping_sub(1)).cloned();
                let mut shape = shape.clone();
                for cut in self.cuts(&shape.clone(), &value)?.unwrap_or_default() {
                    shape[cut.axis] = cut.length();
                }
                s.equals(&outputs[0].shape, shape)
            })
        })
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        let constants =
            inputs.iter().map(|input| Ok(model.outlet_fact(*input)?.konst.clone())).collect::<TractResult<Vec<_>>>()?;
        let value = |at: usize| constants.get(at).cloned().flatten();
        let shape: TVec<TDim> = model.outlet_fact(inputs[0])?.shape.to_tvec();
        if let Some(cuts) = self.cuts(&shape, &value)? {
            let wires = Self::wire_cuts(prefix, model, inputs[0], cuts)?;
            if wires[0] != inputs[0] {
                model.rename_node(wires[0].node, prefix)?;
            }
            return Ok(wires);
        }
        let axes = self.axes(shape.len(), &value)?.context("its axes and steps are computed")?;
        let lengths = axes.iter().map(|_| model.symbols.new_with_prefix("slice").to_dim()).collect();
        model.wire_node(prefix, ComputedSlice { axes, lengths }, &inputs[..3])
    }
}

/// A slice whose bounds are computed: a value, its starts and its ends.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct ComputedSlice {
    /// With their steps.
    axes: Vec<(usize, i64)>,
    /// What becomes of the axes.
    lengths: Vec<TDim>,
}

impl Op for ComputedSlice {
    fn name(&self) -> StaticName {
        "ComputedSlice".into()
    }

    fn mints_runtime_symbols(&self) -> bool {
        true
    }

    op_as_typed_op!();
}

impl EvalOp for ComputedSlice {
    op_out_of_plan!();

    fn eval(&self, context: &EvalContext<'_>, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        let (value, starts, ends) = args_3!(inputs);
        let numbers = |bounds: &Tensor| -> TractResult<Vec<TDim>> {
            sizes(bounds)?.iter().map(|bound| Ok(bound.eval(context.symbols).to_i64()?.to_dim())).collect()
        };
        let (starts, ends) = (numbers(&starts)?, numbers(&ends)?);
        ensure!(starts.len() == ends.len(), "{} starts, but {} ends", starts.len(), ends.len());
        let slice = Slice { given: Given::Operands { axes: None, steps: None }, bounds: Bounds::Clamped };
        let mut value = value.into_tensor();
        for (&(axis, step), (start, end)) in self.axes.iter().zip(starts.iter().zip(&ends)) {
            let cut = slice.cut(axis, step, &value.shape()[axis].to_dim(), start, end);
            value = value.slice(axis, cut.start.to_usize()?, cut.end.to_usize()?)?;
            if step != 1 {
                let strided = Downsample::new(axis, step as isize, 0).eval(context, tvec!(value.into_tvalue()))?;
                value = strided.into_iter().next().context("one output")?.into_tensor();
            }
        }
        Ok(tvec!(value.into_tvalue()))
    }
}

impl TypedOp for ComputedSlice {
    fn output_facts(&self, inputs: &[&TypedFact]) -> TractResult<TVec<TypedFact>> {
        ensure!(inputs.len() == 3, "a value, its starts and its ends");
        let mut fact = inputs[0].without_value();
        for (&(axis, _), length) in self.axes.iter().zip(&self.lengths) {
            fact.shape.set(axis, length.clone());
        }
        Ok(tvec!(fact))
    }

    as_op!();
}

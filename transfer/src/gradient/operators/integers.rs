//! Integers in, integers out: shapes, indices and truth values, which never need a gradient.

use ndarray::{ArrayD, Axis, IxDyn, Slice, Zip};

use super::operands::Operands;
use super::shape::{gathered, reshaped, sliced, squeezed, unsqueezed};
use crate::Result;

/// What a node whose first input is `x` makes of integers.
pub(super) fn run(o: &Operands<'_>, x: &ArrayD<i64>) -> Result<ArrayD<i64>> {
    match o.node.op_type.as_str() {
        "Identity" => Ok(x.clone()),
        "Add" => binary(o, x, |a, b| a + b),
        "Sub" => binary(o, x, |a, b| a - b),
        "Mul" => binary(o, x, |a, b| a * b),
        "Div" => binary(o, x, |a, b| if b == 0 { 0 } else { a / b }),
        "Max" => fold(o, x, i64::max),
        "Min" => fold(o, x, i64::min),
        "Equal" => binary(o, x, |a, b| i64::from(a == b)),
        "Greater" => binary(o, x, |a, b| i64::from(a > b)),
        "GreaterOrEqual" => binary(o, x, |a, b| i64::from(a >= b)),
        "Less" => binary(o, x, |a, b| i64::from(a < b)),
        "LessOrEqual" => binary(o, x, |a, b| i64::from(a <= b)),
        "And" => binary(o, x, |a, b| i64::from(a != 0 && b != 0)),
        "Or" => binary(o, x, |a, b| i64::from(a != 0 || b != 0)),
        "Not" => Ok(x.mapv(|v| i64::from(v == 0))),
        "Neg" => Ok(x.mapv(|v| -v)),
        "Abs" => Ok(x.mapv(i64::abs)),
        "Where" => choose(o, x),
        "Reshape" => with_shape(o, x, &reshaped(o, x.shape())?),
        "Expand" => expand(o, x),
        "Unsqueeze" => with_shape(o, x, &unsqueezed(o, x.shape())?),
        "Squeeze" => with_shape(o, x, &squeezed(o, x.shape())?),
        "Slice" => slice(o, x),
        "Gather" => gather(o, x),
        "Concat" => concat(o, x),
        _ => Err(o.refused("of integers it is none of the operators that a student is made of")),
    }
}

/// The shape that arrays have together.
fn together(arrays: &[&ArrayD<i64>]) -> Result<IxDyn> {
    let mut shape = candle_core::Shape::from(arrays[0].shape());
    for other in &arrays[1..] {
        shape = shape.broadcast_shape_binary_op(&other.shape().into(), "broadcast")?;
    }
    Ok(IxDyn(shape.dims()))
}

fn binary(o: &Operands<'_>, x: &ArrayD<i64>, f: fn(i64, i64) -> i64) -> Result<ArrayD<i64>> {
    combine(o, x, o.whole(1)?, f)
}

fn combine(o: &Operands<'_>, x: &ArrayD<i64>, y: &ArrayD<i64>, f: fn(i64, i64) -> i64) -> Result<ArrayD<i64>> {
    let shape = together(&[x, y])?;
    match (x.broadcast(shape.clone()), y.broadcast(shape)) {
        (Some(x), Some(y)) => Ok(Zip::from(x).and(y).map_collect(|&a, &b| f(a, b))),
        _ => Err(o.refused("its shapes do not fit")),
    }
}

/// `Max` or `Min` of any number of inputs.
fn fold(o: &Operands<'_>, x: &ArrayD<i64>, f: fn(i64, i64) -> i64) -> Result<ArrayD<i64>> {
    (1..o.values.len()).try_fold(x.clone(), |x, at| combine(o, &x, o.whole(at)?, f))
}

fn choose(o: &Operands<'_>, condition: &ArrayD<i64>) -> Result<ArrayD<i64>> {
    let (yes, no) = (o.whole(1)?, o.whole(2)?);
    let shape = together(&[condition, yes, no])?;
    match (condition.broadcast(shape.clone()), yes.broadcast(shape.clone()), no.broadcast(shape)) {
        (Some(condition), Some(yes), Some(no)) => {
            Ok(Zip::from(condition).and(yes).and(no).map_collect(|&c, &a, &b| if c != 0 { a } else { b }))
        }
        _ => Err(o.refused("its shapes do not fit")),
    }
}

fn with_shape(o: &Operands<'_>, x: &ArrayD<i64>, shape: &[usize]) -> Result<ArrayD<i64>> {
    let elements: Vec<i64> = x.iter().copied().collect();
    ArrayD::from_shape_vec(IxDyn(shape), elements).map_err(|e| o.refused(&e.to_string()))
}

fn expand(o: &Operands<'_>, x: &ArrayD<i64>) -> Result<ArrayD<i64>> {
    let wanted: Vec<usize> = o.whole(1)?.iter().map(|&d| d as usize).collect();
    let shape = candle_core::Shape::from(x.shape()).broadcast_shape_binary_op(&wanted.into(), "expand")?;
    let wide = x.broadcast(IxDyn(shape.dims())).ok_or_else(|| o.refused("its shapes do not fit"))?;
    Ok(wide.to_owned())
}

fn slice(o: &Operands<'_>, x: &ArrayD<i64>) -> Result<ArrayD<i64>> {
    let mut view = x.view();
    for (at, start, len) in sliced(o, x.shape())? {
        view.slice_axis_inplace(Axis(at), Slice::from(start..start + len));
    }
    Ok(view.to_owned())
}

fn gather(o: &Operands<'_>, x: &ArrayD<i64>) -> Result<ArrayD<i64>> {
    let at = o.axis(0, x.ndim());
    let (rows, shape) = gathered(o, x.shape(), at)?;
    with_shape(o, &x.select(Axis(at), &rows), &shape)
}

fn concat(o: &Operands<'_>, x: &ArrayD<i64>) -> Result<ArrayD<i64>> {
    let parts: Vec<_> = (0..o.values.len()).map(|at| Ok(o.whole(at)?.view())).collect::<Result<_>>()?;
    ndarray::concatenate(Axis(o.axis(0, x.ndim())), &parts).map_err(|e| o.refused(&e.to_string()))
}

#[cfg(test)]
mod tests {
    use mabert_graph::proto::NodeProto;

    use super::super::super::value::Value;
    use super::*;

    #[test]
    fn the_largest_and_the_smallest_are_of_all_inputs() {
        let values = [[1i64, 9], [4, 2], [3, 7]].map(|row| Value::Whole(ndarray::arr1(&row).into_dyn()));
        let values: Vec<Option<&Value>> = values.iter().map(Some).collect();
        for (operator, expected) in [("Max", [4, 9]), ("Min", [1, 2])] {
            let node = NodeProto { op_type: operator.to_owned(), ..NodeProto::default() };
            let operands = Operands { node: &node, values: &values };
            let found = run(&operands, operands.whole(0).unwrap()).unwrap();
            assert_eq!(found.as_slice().unwrap(), expected);
        }
    }
}

//! What moves elements, and what tells of shapes and types.

use candle_core::Tensor as Real;
use mabert_graph::{NodeExt as _, Tensor, attribute};
use ndarray::{ArrayD, IxDyn};

use super::super::value::Value;
use super::operands::{Operands, axis};
use crate::Result;

/// ONNX's number for truth values.
const BOOL: i64 = 9;

pub(super) fn transpose(o: &Operands<'_>) -> Result<Real> {
    let x = o.real(0)?;
    let order: Vec<usize> = match o.node.ints("perm") {
        Some(order) => order.iter().map(|&a| a as usize).collect(),
        None => (0..x.rank()).rev().collect(),
    };
    Ok(x.permute(order)?.contiguous()?)
}

pub(super) fn reshape(o: &Operands<'_>) -> Result<Real> {
    let x = o.real(0)?;
    Ok(x.reshape(reshaped(o, x.dims())?)?)
}

pub(super) fn flatten(o: &Operands<'_>) -> Result<Real> {
    let x = o.real(0)?;
    let at = o.axis(1, x.rank() + 1);
    let rows: usize = x.dims()[..at].iter().product();
    Ok(x.reshape((rows, x.elem_count() / rows.max(1)))?)
}

pub(super) fn squeeze(o: &Operands<'_>) -> Result<Real> {
    let x = o.real(0)?;
    Ok(x.reshape(squeezed(o, x.dims())?)?)
}

pub(super) fn unsqueeze(o: &Operands<'_>) -> Result<Real> {
    let x = o.real(0)?;
    Ok(x.reshape(unsqueezed(o, x.dims())?)?)
}

pub(super) fn expand(o: &Operands<'_>) -> Result<Real> {
    let wanted: Vec<usize> = o.whole(1)?.iter().map(|&d| d as usize).collect();
    let x = o.real(0)?;
    let shape = x.shape().broadcast_shape_binary_op(&wanted.into(), "expand")?;
    Ok(x.broadcast_as(shape)?.contiguous()?)
}

pub(super) fn slice(o: &Operands<'_>) -> Result<Real> {
    let mut x = o.real(0)?;
    for (at, start, len) in sliced(o, x.dims())? {
        x = x.narrow(at, start, len)?;
    }
    Ok(x.contiguous()?)
}

pub(super) fn split(o: &Operands<'_>) -> Result<Vec<Value>> {
    let x = o.real(0)?;
    let at = o.axis(0, x.rank());
    let parts = o.node.output.len();
    let sizes = match o.list(1, "split")? {
        Some(sizes) => sizes.into_iter().map(|s| s as usize).collect(),
        None => vec![x.dims()[at] / parts; parts],
    };
    let mut start = 0;
    let part = |size: usize| {
        start += size;
        Ok(Value::Real(x.narrow(at, start - size, size)?.contiguous()?))
    };
    sizes.into_iter().map(part).collect()
}

pub(super) fn concat(o: &Operands<'_>) -> Result<Real> {
    let parts: Vec<Real> = (0..o.values.len()).map(|at| o.real(at)).collect::<Result<_>>()?;
    Ok(Real::cat(&parts, o.axis(0, parts[0].rank()))?)
}

pub(super) fn gather(o: &Operands<'_>) -> Result<Real> {
    let x = o.real(0)?;
    let at = o.axis(0, x.rank());
    let (rows, shape) = gathered(o, x.dims(), at)?;
    let (rows, count) = (rows.iter().map(|&row| row as u32).collect::<Vec<_>>(), rows.len());
    Ok(x.index_select(&Real::from_vec(rows, count, x.device())?, at)?.reshape(shape)?)
}

pub(super) fn constant_of_shape(o: &Operands<'_>) -> Result<Value> {
    let shape: Vec<usize> = o.whole(0)?.iter().map(|&d| d as usize).collect();
    let value = attribute::constant(o.node)?;
    Ok(match value.as_ref().and_then(Tensor::to_i64) {
        Some(whole) => Value::Whole(ArrayD::from_elem(IxDyn(&shape), whole.first().copied().unwrap_or(0))),
        None => {
            let fill = value.and_then(|value| value.to_f32().first().copied()).unwrap_or(0.0);
            Value::Real(Real::full(fill, shape, super::super::device::device())?)
        }
    })
}

pub(super) fn shape(o: &Operands<'_>) -> Result<Value> {
    let dims: Vec<i64> = match o.value(0)? {
        Value::Real(x) => x.dims().iter().map(|&d| d as i64).collect(),
        Value::Whole(x) => x.shape().iter().map(|&d| d as i64).collect(),
    };
    let rank = dims.len() as i64;
    let bound = |value: i64| (if value < 0 { value + rank } else { value }).clamp(0, rank) as usize;
    let (start, end) = (bound(o.node.int("start", 0)), bound(o.node.int("end", rank)));
    Ok(Value::Whole(ndarray::Array1::from(dims[start..end.max(start)].to_vec()).into_dyn()))
}

pub(super) fn cast(o: &Operands<'_>) -> Result<Value> {
    let to = o.node.int("to", 1);
    let to_real = matches!(to, 1 | 10 | 11 | 16);
    let truth = |v: i64| if to == BOOL { i64::from(v != 0) } else { v };
    Ok(match (o.value(0)?, to_real) {
        (Value::Real(x), true) => Value::Real(x.clone()),
        (Value::Whole(x), false) => Value::Whole(x.mapv(truth)),
        (Value::Real(x), false) => {
            let whole = |v: f32| if to == BOOL { i64::from(v != 0.0) } else { v as i64 };
            let whole = x.flatten_all()?.to_vec1::<f32>()?.into_iter().map(whole).collect();
            Value::Whole(ArrayD::from_shape_vec(IxDyn(x.dims()), whole).expect("as many elements"))
        }
        (Value::Whole(x), true) => {
            let floats: Vec<f32> = x.iter().map(|&v| v as f32).collect();
            Value::Real(Real::from_vec(floats, x.shape(), super::super::device::device())?)
        }
    })
}

/// The shape after `Reshape`.
pub(super) fn reshaped(o: &Operands<'_>, dims: &[usize]) -> Result<Vec<usize>> {
    let wanted = o.whole(1)?;
    let keep = o.node.int("allowzero", 0) == 0;
    let mut shape: Vec<usize> = Vec::new();
    for (at, &d) in wanted.iter().enumerate() {
        shape.push(match d {
            -1 => 1,
            0 if keep => *dims.get(at).ok_or_else(|| o.refused("it keeps an axis that is not there"))?,
            d => d as usize,
        });
    }
    if let Some(free) = wanted.iter().position(|&d| d == -1) {
        let total: usize = dims.iter().product();
        shape[free] = total / shape.iter().product::<usize>().max(1);
    }
    Ok(shape)
}

/// The shape after `Squeeze`.
pub(super) fn squeezed(o: &Operands<'_>, dims: &[usize]) -> Result<Vec<usize>> {
    let dropped: Vec<usize> = match o.list(1, "axes")? {
        Some(axes) => axes.into_iter().map(|a| axis(a, dims.len())).collect(),
        None => (0..dims.len()).filter(|&at| dims[at] == 1).collect(),
    };
    Ok((0..dims.len()).filter(|at| !dropped.contains(at)).map(|at| dims[at]).collect())
}

/// The shape after `Unsqueeze`.
pub(super) fn unsqueezed(o: &Operands<'_>, dims: &[usize]) -> Result<Vec<usize>> {
    let axes = o.list(1, "axes")?.ok_or_else(|| o.refused("it has no axes"))?;
    let rank = dims.len() + axes.len();
    let new: Vec<usize> = axes.into_iter().map(|a| axis(a, rank)).collect();
    let mut old = dims.iter();
    Ok((0..rank).map(|at| if new.contains(&at) { 1 } else { *old.next().unwrap_or(&1) }).collect())
}

/// What `Slice` keeps: axes, and of each the start and the length.
pub(super) fn sliced(o: &Operands<'_>, dims: &[usize]) -> Result<Vec<(usize, usize, usize)>> {
    let missing = || o.refused("its bounds are missing");
    let starts = o.list(1, "starts")?.ok_or_else(missing)?;
    let ends = o.list(2, "ends")?.ok_or_else(missing)?;
    let axes = o.list(3, "axes")?.unwrap_or_else(|| (0..starts.len() as i64).collect());
    if o.list(4, "steps")?.is_some_and(|steps| steps.iter().any(|s| *s != 1)) {
        return Err(o.refused("it takes steps other than 1"));
    }
    let bounds = starts.into_iter().zip(ends).zip(axes);
    Ok(bounds
        .map(|((start, end), a)| {
            let at = axis(a, dims.len());
            let size = dims[at] as i64;
            let bound = |value: i64| (if value < 0 { value + size } else { value }).clamp(0, size) as usize;
            let (start, end) = (bound(start), bound(end));
            (at, start, end.saturating_sub(start))
        })
        .collect())
}

/// What `Gather` takes along the axis `at`, counted from the front, and the shape of the result.
pub(super) fn gathered(o: &Operands<'_>, dims: &[usize], at: usize) -> Result<(Vec<usize>, Vec<usize>)> {
    let indices = o.whole(1)?;
    let size = dims[at] as i64;
    let rows = indices.iter().map(|&i| if i < 0 { i + size } else { i } as usize).collect();
    let mut shape = dims.to_vec();
    shape.splice(at..=at, indices.shape().iter().copied());
    Ok((rows, shape))
}

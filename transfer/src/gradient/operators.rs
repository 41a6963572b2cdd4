//! What each ONNX operator does to candle's tensors, or to integers.

use candle_core::{D, Tensor as Real};
use mabert_graph::proto::NodeProto;
use mabert_graph::{NodeExt as _, Tensor, attribute};
use ndarray::{ArrayD, Axis, IxDyn, Slice};

use super::fused_operators::relu;
use super::graph::Value;
use crate::{Error, Result};

pub(super) fn refused(node: &NodeProto, why: &str) -> Error {
    Error::Gradient(format!("{} `{}` cannot be differentiated: {why}", node.op_type, node.label()))
}

/// The inputs of one node.
struct Given<'g> {
    node: &'g NodeProto,
    values: &'g [Option<&'g Value>],
}

impl Given<'_> {
    fn value(&self, at: usize) -> Result<&Value> {
        self.optional(at).ok_or_else(|| refused(self.node, "an input is missing"))
    }

    fn optional(&self, at: usize) -> Option<&Value> {
        self.values.get(at).copied().flatten()
    }

    fn real(&self, at: usize) -> Result<Real> {
        match self.value(at)? {
            Value::Real(value) => Ok(value.clone()),
            Value::Whole(_) => Err(refused(self.node, "floats were expected")),
        }
    }

    fn whole(&self, at: usize) -> Result<&ArrayD<i64>> {
        match self.value(at)? {
            Value::Whole(value) => Ok(value),
            Value::Real(_) => Err(refused(self.node, "integers were expected")),
        }
    }

    /// A list of integers: an input, or in earlier opsets an attribute.
    fn list(&self, at: usize, name: &str) -> Result<Option<Vec<i64>>> {
        match self.optional(at) {
            Some(_) => Ok(Some(self.whole(at)?.iter().copied().collect())),
            None => Ok(self.node.ints(name).map(<[i64]>::to_vec)),
        }
    }
}

/// What one node makes of its inputs.
pub(super) fn run_node(node: &NodeProto, values: &[Option<&Value>]) -> Result<Vec<Value>> {
    let given = Given { node, values };
    if !node.is(&node.op_type) {
        return Err(refused(node, "it is of a domain of its own"));
    }
    let chooses_reals = node.op_type == "Where" && matches!(given.optional(1), Some(Value::Real(_)));
    if let Some(Value::Whole(first)) = given.optional(0)
        && !matches!(node.op_type.as_str(), "Cast" | "Shape" | "ConstantOfShape")
        && !chooses_reals
    {
        return Ok(vec![Value::Whole(whole_node(&given, first)?)]);
    }
    let real = |value: Real| Ok(vec![Value::Real(value)]);
    let unary = |f: fn(&Real) -> candle_core::Result<Real>| real(f(&given.real(0)?)?);
    let binary = |f: fn(&Real, &Real) -> candle_core::Result<Real>| real(f(&given.real(0)?, &given.real(1)?)?);
    match node.op_type.as_str() {
        "Add" => binary(Real::broadcast_add),
        "Sub" => binary(Real::broadcast_sub),
        "Mul" => binary(Real::broadcast_mul),
        "Div" => binary(Real::broadcast_div),
        "Relu" => unary(relu),
        "Tanh" => unary(Real::tanh),
        "Erf" => unary(Real::erf),
        "Sqrt" => unary(Real::sqrt),
        "Exp" => unary(Real::exp),
        "Neg" => unary(Real::neg),
        "Abs" => unary(Real::abs),
        "Log" => unary(Real::log),
        "Max" | "Min" => {
            let f = if node.op_type == "Max" { Real::broadcast_maximum } else { Real::broadcast_minimum };
            let mut x = given.real(0)?;
            for at in 1..values.len() {
                x = f(&x, &given.real(at)?)?;
            }
            real(x)
        }
        "Where" => {
            let chosen = given.whole(0)?;
            let (x, y) = (given.real(1)?, given.real(2)?);
            let flags: Vec<u8> = chosen.iter().map(|&c| u8::from(c != 0)).collect();
            let flags = Real::from_vec(flags, chosen.shape(), x.device())?;
            let shape = flags.shape().broadcast_shape_binary_op(x.shape(), "where")?;
            let shape = shape.broadcast_shape_binary_op(y.shape(), "where")?;
            let wide = |t: &Real| t.broadcast_as(&shape)?.contiguous();
            real(wide(&flags)?.where_cond(&wide(&x)?, &wide(&y)?)?)
        }
        "Equal" | "Greater" | "GreaterOrEqual" | "Less" | "LessOrEqual" => {
            let (x, y) = (given.real(0)?, given.real(1)?);
            let found = match node.op_type.as_str() {
                "Equal" => x.broadcast_eq(&y),
                "Greater" => x.broadcast_gt(&y),
                "GreaterOrEqual" => x.broadcast_ge(&y),
                "Less" => x.broadcast_lt(&y),
                _ => x.broadcast_le(&y),
            }?;
            let flags = found.flatten_all()?.to_vec1::<u8>()?.into_iter().map(i64::from).collect();
            Ok(vec![Value::Whole(ArrayD::from_shape_vec(IxDyn(found.dims()), flags).expect("as many elements"))])
        }
        "Reciprocal" => unary(Real::recip),
        // exp(-x) may be infinite: then 1 / (1 + exp(-x)) is 0, as it should be.
        "Sigmoid" => real((given.real(0)?.neg()?.exp()? + 1.0)?.recip()?),
        "Clip" => {
            let mut x = given.real(0)?;
            let bound = |at: usize, name: &str| -> Result<Option<f32>> {
                match given.optional(at) {
                    Some(_) => Ok(given.real(at)?.flatten_all()?.to_vec1::<f32>()?.first().copied()),
                    None => Ok(node.attribute.iter().any(|a| a.name == name).then(|| node.float(name, 0.0))),
                }
            };
            if let Some(least) = bound(1, "min")? {
                x = x.maximum(least)?;
            }
            if let Some(most) = bound(2, "max")? {
                x = x.minimum(most)?;
            }
            real(x)
        }
        "Identity" | "Dropout" => real(given.real(0)?),
        "Gelu" if node.text("approximate").as_deref() == Some("tanh") => unary(Real::gelu),
        "Gelu" => unary(Real::gelu_erf),
        "Pow" => {
            let exponent = given.real(1)?.flatten_all()?.to_vec1::<f32>()?;
            match exponent.as_slice() {
                [2.0] => unary(Real::sqr),
                [exponent] => real(given.real(0)?.powf(f64::from(*exponent))?),
                _ => Err(refused(node, "its exponent is not one number")),
            }
        }
        "Softmax" => {
            let x = given.real(0)?;
            if axis(node.int("axis", -1), x.rank()) + 1 != x.rank() {
                return Err(refused(node, "its axis is not the last"));
            }
            // The largest element is a constant here: the gradient does not depend on it.
            let exp = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?.exp()?;
            real(exp.broadcast_div(&exp.sum_keepdim(D::Minus1)?)?)
        }
        "ReduceMean" | "ReduceSum" | "ReduceL2" => {
            let mut x = given.real(0)?;
            if node.op_type == "ReduceL2" {
                x = x.sqr()?;
            }
            let axes = given.list(1, "axes")?.unwrap_or_else(|| (0..x.rank() as i64).collect());
            let mut axes: Vec<usize> = axes.into_iter().map(|a| axis(a, x.rank())).collect();
            axes.sort_unstable();
            for &at in &axes {
                x = if node.op_type == "ReduceMean" { x.mean_keepdim(at)? } else { x.sum_keepdim(at)? };
            }
            if node.op_type == "ReduceL2" {
                x = x.sqrt()?;
            }
            if node.int("keepdims", 1) == 0 {
                for &at in axes.iter().rev() {
                    x = x.squeeze(at)?;
                }
            }
            real(x)
        }
        "LayerNormalization" => {
            let x = given.real(0)?;
            if axis(node.int("axis", -1), x.rank()) + 1 != x.rank() {
                return Err(refused(node, "it normalises more than the last axis"));
            }
            let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
            let variance = (centred.sqr()?.mean_keepdim(D::Minus1)? + f64::from(node.float("epsilon", 1e-5)))?;
            let mut y = centred.broadcast_div(&variance.sqrt()?)?.broadcast_mul(&given.real(1)?)?;
            if given.optional(2).is_some() {
                y = y.broadcast_add(&given.real(2)?)?;
            }
            real(y)
        }
        "MatMul" => real(matmul(&given.real(0)?, &given.real(1)?)?),
        "Gemm" => {
            let turned = |x: Real, flag: &str| if node.int(flag, 0) == 1 { x.t() } else { Ok(x) };
            let (a, b) = (turned(given.real(0)?, "transA")?, turned(given.real(1)?, "transB")?);
            let mut y = (a.contiguous()?.matmul(&b.contiguous()?)? * f64::from(node.float("alpha", 1.0)))?;
            if given.optional(2).is_some() {
                y = y.broadcast_add(&(given.real(2)? * f64::from(node.float("beta", 1.0)))?)?;
            }
            real(y)
        }
        "Transpose" => {
            let x = given.real(0)?;
            let order: Vec<usize> = match node.ints("perm") {
                Some(order) => order.iter().map(|&a| a as usize).collect(),
                None => (0..x.rank()).rev().collect(),
            };
            real(x.permute(order)?.contiguous()?)
        }
        "Reshape" => {
            let x = given.real(0)?;
            let wanted: Vec<i64> = given.whole(1)?.iter().copied().collect();
            real(x.reshape(reshaped(node, x.dims(), &wanted)?)?)
        }
        "Flatten" => {
            let x = given.real(0)?;
            let at = axis(node.int("axis", 1), x.rank() + 1);
            let rows: usize = x.dims()[..at].iter().product();
            real(x.reshape((rows, x.elem_count() / rows.max(1)))?)
        }
        "Unsqueeze" | "Squeeze" => {
            let mut x = given.real(0)?;
            let shape = resized(&given, x.dims())?;
            x = x.reshape(shape)?;
            real(x)
        }
        "Expand" => {
            let wanted: Vec<usize> = given.whole(1)?.iter().map(|&d| d as usize).collect();
            let x = given.real(0)?;
            let shape = x.shape().broadcast_shape_binary_op(&wanted.into(), "expand")?;
            real(x.broadcast_as(shape)?.contiguous()?)
        }
        "Slice" => {
            let mut x = given.real(0)?;
            for (at, start, len) in sliced(&given, x.dims())? {
                x = x.narrow(at, start, len)?;
            }
            real(x.contiguous()?)
        }
        "Split" => {
            let x = given.real(0)?;
            let at = axis(node.int("axis", 0), x.rank());
            let parts = node.output.len();
            let sizes = match given.list(1, "split")? {
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
        "Concat" => {
            let parts: Vec<Real> = (0..values.len()).map(|at| given.real(at)).collect::<Result<_>>()?;
            real(Real::cat(&parts, axis(node.int("axis", 0), parts[0].rank()))?)
        }
        "Gather" => {
            let x = given.real(0)?;
            let at = axis(node.int("axis", 0), x.rank());
            let indices = given.whole(1)?;
            let size = x.dims()[at] as i64;
            let flat: Vec<u32> = indices.iter().map(|&i| if i < 0 { i + size } else { i } as u32).collect();
            let count = flat.len();
            let mut shape = x.dims().to_vec();
            shape.splice(at..=at, indices.shape().iter().copied());
            real(x.index_select(&Real::from_vec(flat, count, x.device())?, at)?.reshape(shape)?)
        }
        "ConstantOfShape" => {
            let shape: Vec<usize> = given.whole(0)?.iter().map(|&d| d as usize).collect();
            let value = attribute::constant(node)?;
            Ok(vec![match value.as_ref().and_then(Tensor::to_i64) {
                Some(whole) => Value::Whole(ArrayD::from_elem(IxDyn(&shape), whole.first().copied().unwrap_or(0))),
                None => {
                    let fill = value.and_then(|value| value.to_f32().first().copied()).unwrap_or(0.0);
                    Value::Real(Real::full(fill, shape, super::device())?)
                }
            }])
        }
        "Shape" => {
            let dims: Vec<i64> = match given.value(0)? {
                Value::Real(x) => x.dims().iter().map(|&d| d as i64).collect(),
                Value::Whole(x) => x.shape().iter().map(|&d| d as i64).collect(),
            };
            let rank = dims.len() as i64;
            let bound = |value: i64| (if value < 0 { value + rank } else { value }).clamp(0, rank) as usize;
            let (start, end) = (bound(node.int("start", 0)), bound(node.int("end", rank)));
            Ok(vec![Value::Whole(ndarray::Array1::from(dims[start..end.max(start)].to_vec()).into_dyn())])
        }
        "Cast" => {
            let to = node.int("to", 1);
            let to_real = matches!(to, 1 | 10 | 11 | 16);
            let truth = |v: i64| if to == BOOL { i64::from(v != 0) } else { v };
            Ok(vec![match (given.value(0)?, to_real) {
                (Value::Real(x), true) => Value::Real(x.clone()),
                (Value::Whole(x), false) => Value::Whole(x.mapv(truth)),
                (Value::Real(x), false) => {
                    let whole = |v: f32| if to == BOOL { i64::from(v != 0.0) } else { v as i64 };
                    let whole = x.flatten_all()?.to_vec1::<f32>()?.into_iter().map(whole).collect();
                    Value::Whole(ArrayD::from_shape_vec(IxDyn(x.dims()), whole).expect("as many elements"))
                }
                (Value::Whole(x), true) => {
                    let floats: Vec<f32> = x.iter().map(|&v| v as f32).collect();
                    Value::Real(Real::from_vec(floats, x.shape(), super::device())?)
                }
            }])
        }
        _ => Err(refused(node, "it is none of the operators that a student is made of")),
    }
}

/// ONNX's number for truth values.
const BOOL: i64 = 9;

/// The shape that arrays have together.
fn together(arrays: &[&ArrayD<i64>]) -> Result<IxDyn> {
    let mut shape = candle_core::Shape::from(arrays[0].shape());
    for other in &arrays[1..] {
        shape = shape.broadcast_shape_binary_op(&other.shape().into(), "broadcast")?;
    }
    Ok(IxDyn(shape.dims()))
}

/// Integers in, integers out.
fn whole_node(given: &Given<'_>, x: &ArrayD<i64>) -> Result<ArrayD<i64>> {
    let node = given.node;
    let shaped = |shape: &[usize]| {
        let elements: Vec<i64> = x.iter().copied().collect();
        ArrayD::from_shape_vec(IxDyn(shape), elements).map_err(|e| refused(node, &e.to_string()))
    };
    let binary = |f: fn(i64, i64) -> i64| {
        let y = given.whole(1)?;
        let shape = together(&[x, y])?;
        match (x.broadcast(shape.clone()), y.broadcast(shape)) {
            (Some(x), Some(y)) => Ok(ndarray::Zip::from(x).and(y).map_collect(|&a, &b| f(a, b))),
            _ => Err(refused(node, "its shapes do not fit")),
        }
    };
    match node.op_type.as_str() {
        "Identity" => Ok(x.clone()),
        "Add" => binary(|a, b| a + b),
        "Sub" => binary(|a, b| a - b),
        "Mul" => binary(|a, b| a * b),
        "Div" => binary(|a, b| if b == 0 { 0 } else { a / b }),
        "Max" => binary(i64::max),
        "Min" => binary(i64::min),
        "Equal" => binary(|a, b| i64::from(a == b)),
        "Greater" => binary(|a, b| i64::from(a > b)),
        "GreaterOrEqual" => binary(|a, b| i64::from(a >= b)),
        "Less" => binary(|a, b| i64::from(a < b)),
        "LessOrEqual" => binary(|a, b| i64::from(a <= b)),
        "And" => binary(|a, b| i64::from(a != 0 && b != 0)),
        "Or" => binary(|a, b| i64::from(a != 0 || b != 0)),
        "Not" => Ok(x.mapv(|v| i64::from(v == 0))),
        "Neg" => Ok(x.mapv(|v| -v)),
        "Abs" => Ok(x.mapv(i64::abs)),
        "Where" => {
            let (yes, no) = (given.whole(1)?, given.whole(2)?);
            let shape = together(&[x, yes, no])?;
            match (x.broadcast(shape.clone()), yes.broadcast(shape.clone()), no.broadcast(shape)) {
                (Some(x), Some(yes), Some(no)) => {
                    Ok(ndarray::Zip::from(x).and(yes).and(no).map_collect(|&c, &a, &b| if c != 0 { a } else { b }))
                }
                _ => Err(refused(node, "its shapes do not fit")),
            }
        }
        "Reshape" => {
            let wanted: Vec<i64> = given.whole(1)?.iter().copied().collect();
            shaped(&reshaped(node, x.shape(), &wanted)?)
        }
        "Expand" => {
            let wanted: Vec<usize> = given.whole(1)?.iter().map(|&d| d as usize).collect();
            let from = candle_core::Shape::from(x.shape());
            let shape = from.broadcast_shape_binary_op(&wanted.into(), "expand")?;
            let wide = x.broadcast(IxDyn(shape.dims())).ok_or_else(|| refused(node, "its shapes do not fit"))?;
            Ok(wide.to_owned())
        }
        "Unsqueeze" | "Squeeze" => shaped(&resized(given, x.shape())?),
        "Slice" => {
            let mut view = x.view();
            for (at, start, len) in sliced(given, x.shape())? {
                view.slice_axis_inplace(Axis(at), Slice::from(start..start + len));
            }
            Ok(view.to_owned())
        }
        "Gather" => {
            let at = axis(node.int("axis", 0), x.ndim());
            let size = x.shape()[at] as i64;
            let indices = given.whole(1)?;
            let flat: Vec<usize> = indices.iter().map(|&i| if i < 0 { i + size } else { i } as usize).collect();
            let mut shape = x.shape().to_vec();
            shape.splice(at..=at, indices.shape().iter().copied());
            let picked: Vec<i64> = x.select(Axis(at), &flat).iter().copied().collect();
            ArrayD::from_shape_vec(IxDyn(&shape), picked).map_err(|e| refused(node, &e.to_string()))
        }
        "Concat" => {
            let parts: Vec<_> = (0..given.values.len()).map(|i| Ok(given.whole(i)?.view())).collect::<Result<_>>()?;
            ndarray::concatenate(Axis(axis(node.int("axis", 0), x.ndim())), &parts)
                .map_err(|e| refused(node, &e.to_string()))
        }
        _ => Err(refused(node, "of integers it is none of the operators that a student is made of")),
    }
}

/// A product whose right side may lack the left side's leading axes: then they are rows like any other, and one large
/// product takes the place of many small ones, in the gradient too.
fn matmul(a: &Real, b: &Real) -> Result<Real> {
    let (left, right) = (a.dims().to_vec(), b.dims().to_vec());
    let y = match (left.len(), right.len()) {
        (rank, 2) if rank > 2 => {
            let rows: usize = left[..rank - 1].iter().product();
            let mut shape = left.clone();
            shape[rank - 1] = right[1];
            a.reshape((rows, left[rank - 1]))?.matmul(&b.contiguous()?)?.reshape(shape)?
        }
        (4, 3) => {
            let [batch, groups, rows, inner] = left[..] else { unreachable!("four axes") };
            if right[0] != groups {
                return Ok(a.broadcast_matmul(b)?);
            }
            let joined = a.permute((1, 0, 2, 3))?.contiguous()?.reshape((groups, batch * rows, inner))?;
            let y = joined.matmul(&b.contiguous()?)?.reshape((groups, batch, rows, right[2]))?;
            y.permute((1, 0, 2, 3))?.contiguous()?
        }
        _ => a.broadcast_matmul(&b.contiguous()?)?,
    };
    Ok(y)
}

fn axis(value: i64, rank: usize) -> usize {
    if value < 0 { (value + rank as i64).max(0) as usize } else { value as usize }
}

fn reshaped(node: &NodeProto, dims: &[usize], wanted: &[i64]) -> Result<Vec<usize>> {
    let keep = node.int("allowzero", 0) == 0;
    let mut shape: Vec<usize> = Vec::new();
    for (at, &d) in wanted.iter().enumerate() {
        shape.push(match d {
            -1 => 1,
            0 if keep => *dims.get(at).ok_or_else(|| refused(node, "it keeps an axis that is not there"))?,
            d => d as usize,
        });
    }
    if let Some(free) = wanted.iter().position(|&d| d == -1) {
        let total: usize = dims.iter().product();
        shape[free] = total / shape.iter().product::<usize>().max(1);
    }
    Ok(shape)
}

/// The shape after `Squeeze` or `Unsqueeze`.
fn resized(given: &Given<'_>, dims: &[usize]) -> Result<Vec<usize>> {
    let node = given.node;
    let axes = given.list(1, "axes")?;
    if node.op_type == "Squeeze" {
        let drop: Vec<usize> = match axes {
            Some(axes) => axes.into_iter().map(|a| axis(a, dims.len())).collect(),
            None => (0..dims.len()).filter(|&at| dims[at] == 1).collect(),
        };
        return Ok((0..dims.len()).filter(|at| !drop.contains(at)).map(|at| dims[at]).collect());
    }
    let axes = axes.ok_or_else(|| refused(node, "it has no axes"))?;
    let rank = dims.len() + axes.len();
    let new: Vec<usize> = axes.into_iter().map(|a| axis(a, rank)).collect();
    let mut old = dims.iter();
    Ok((0..rank).map(|at| if new.contains(&at) { 1 } else { *old.next().unwrap_or(&1) }).collect())
}

/// What `Slice` keeps of each axis: its start and length.
fn sliced(given: &Given<'_>, dims: &[usize]) -> Result<Vec<(usize, usize, usize)>> {
    let node = given.node;
    let missing = || refused(node, "its bounds are missing");
    let starts = given.list(1, "starts")?.ok_or_else(missing)?;
    let ends = given.list(2, "ends")?.ok_or_else(missing)?;
    let axes = given.list(3, "axes")?.unwrap_or_else(|| (0..starts.len() as i64).collect());
    if given.list(4, "steps")?.is_some_and(|steps| steps.iter().any(|s| *s != 1)) {
        return Err(refused(node, "it takes steps other than 1"));
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

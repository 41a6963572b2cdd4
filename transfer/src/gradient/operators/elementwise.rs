//! Element by element.

use candle_core::Tensor as Real;
use mabert_graph::NodeExt as _;
use ndarray::{ArrayD, IxDyn};

use super::super::value::Value;
use super::operands::Operands;
use crate::Result;

/// `Max` or `Min` of any number of inputs.
pub(super) fn fold(o: &Operands<'_>, f: fn(&Real, &Real) -> candle_core::Result<Real>) -> Result<Real> {
    let mut x = o.real(0)?;
    for at in 1..o.values.len() {
        x = f(&x, &o.real(at)?)?;
    }
    Ok(x)
}

pub(super) fn choose(o: &Operands<'_>) -> Result<Real> {
    let condition = o.whole(0)?;
    let (x, y) = (o.real(1)?, o.real(2)?);
    let flags: Vec<u8> = condition.iter().map(|&c| u8::from(c != 0)).collect();
    let flags = Real::from_vec(flags, condition.shape(), x.device())?;
    let shape = flags.shape().broadcast_shape_binary_op(x.shape(), "where")?;
    let shape = shape.broadcast_shape_binary_op(y.shape(), "where")?;
    let wide = |t: &Real| t.broadcast_as(&shape)?.contiguous();
    Ok(wide(&flags)?.where_cond(&wide(&x)?, &wide(&y)?)?)
}

/// Truth values of floats compared.
pub(super) fn compare(o: &Operands<'_>, f: fn(&Real, &Real) -> candle_core::Result<Real>) -> Result<Value> {
    let truths = o.binary(f)?;
    let flags = truths.flatten_all()?.to_vec1::<u8>()?.into_iter().map(i64::from).collect();
    Ok(Value::Whole(ArrayD::from_shape_vec(IxDyn(truths.dims()), flags).expect("as many elements")))
}

pub(super) fn sigmoid(o: &Operands<'_>) -> Result<Real> {
    // exp(-x) may be infinite: then 1 / (1 + exp(-x)) is 0, as it should be.
    Ok((o.real(0)?.neg()?.exp()? + 1.0)?.recip()?)
}

pub(super) fn clip(o: &Operands<'_>) -> Result<Real> {
    let bound = |at: usize, name: &str| -> Result<Option<f32>> {
        match o.optional(at) {
            Some(_) => Ok(o.real(at)?.flatten_all()?.to_vec1::<f32>()?.first().copied()),
            None => Ok(o.node.attribute.iter().any(|a| a.name == name).then(|| o.node.float(name, 0.0))),
        }
    };
    let mut x = o.real(0)?;
    if let Some(least) = bound(1, "min")? {
        x = x.maximum(least)?;
    }
    if let Some(most) = bound(2, "max")? {
        x = x.minimum(most)?;
    }
    Ok(x)
}

pub(super) fn gelu(o: &Operands<'_>) -> Result<Real> {
    match o.node.text("approximate").as_deref() {
        Some("tanh") => o.unary(Real::gelu),
        _ => o.unary(Real::gelu_erf),
    }
}

pub(super) fn pow(o: &Operands<'_>) -> Result<Real> {
    let exponent = o.real(1)?.flatten_all()?.to_vec1::<f32>()?;
    match exponent.as_slice() {
        [2.0] => o.unary(Real::sqr),
        [exponent] => Ok(o.real(0)?.powf(f64::from(*exponent))?),
        _ => Err(o.refused("its exponent is not one number")),
    }
}

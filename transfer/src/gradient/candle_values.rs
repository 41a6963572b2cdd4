//! Between the project's tensors and candle's.

use candle_core::Tensor as Real;
use mabert_graph::Tensor;

use super::value::Value;
use crate::{Error, Result};

/// Floats as candle has them, on the device of the gradients.
pub(crate) fn to_candle(value: &Tensor) -> Result<Real> {
    let array = value.to_f32();
    let shape = array.shape().to_vec();
    let elements: Vec<f32> = array.iter().copied().collect();
    Ok(Real::from_vec(elements, shape, super::device::device())?)
}

/// Floats or integers.
pub(crate) fn to_value(value: &Tensor) -> Result<Value> {
    match value.to_i64() {
        Some(whole) => Ok(Value::Whole(whole)),
        None => Ok(Value::Real(to_candle(value)?)),
    }
}

/// Back from candle.
pub(crate) fn from_candle(value: &Real) -> Result<Tensor> {
    let elements = value.flatten_all()?.to_vec1::<f32>()?;
    Ok(Tensor::new(value.dims(), elements))
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Error::Gradient(error.to_string())
    }
}

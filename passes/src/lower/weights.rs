//! Constants read as what canonical maps have.

use mabert_graph::{Model, Tensor};
use ndarray::{Array1, Array2};

use crate::Result;

/// A constant `[channels]`.
pub(super) fn vector(model: &Model, name: &str) -> Result<Array1<f64>> {
    Ok(model.constant(name)?.to_f32().iter().map(|&v| f64::from(v)).collect())
}

/// A weight `[in, out]`.
pub(super) fn matrix(model: &Model, name: &str) -> Result<Array2<f64>> {
    let array = model.constant(name)?.to_f32().mapv(f64::from);
    Ok(array.into_dimensionality().expect("canonical weights are matrices"))
}

/// A vector as a constant of single precision.
pub(super) fn single(values: &Array1<f64>) -> Tensor {
    Tensor::new(&[values.len()], values.iter().map(|&v| v as f32).collect())
}

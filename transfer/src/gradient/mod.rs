//! What the stages that use gradients share: a differentiable executor of ONNX graphs, and their optimizer.
//!
//! Work is spread over threads by pieces of a step, not inside operators: programs that embed this crate should set
//! `CANDLE_NUM_THREADS=1`, as the command line does.

mod adam;
mod convert;
mod graph;

use candle_core::Tensor as Real;
use rayon::prelude::*;

pub(crate) use adam::Adam;
pub(crate) use convert::{from_candle, to_candle};
pub(crate) use graph::{Graph, Value, number};

use crate::Result;

/// The summed loss of several independent pieces of a step, and its gradient for every variable of `adam`: pieces run
/// in parallel, and are added up in their order.
pub(crate) fn gradients<P: Sync>(
    adam: &Adam,
    pieces: &[P],
    loss: impl Fn(&P) -> Result<Real> + Sync,
) -> Result<(f32, Vec<Vec<f32>>)> {
    let parts: Vec<(f32, Vec<Vec<f32>>)> = pieces
        .par_iter()
        .map(|piece| {
            let loss = loss(piece)?;
            let store = loss.backward()?;
            let gradient = |variable: &candle_core::Var| -> Result<Vec<f32>> {
                match store.get(variable) {
                    Some(g) => Ok(g.flatten_all()?.to_vec1::<f32>()?),
                    None => Ok(vec![0.0; variable.elem_count()]),
                }
            };
            Ok((number(&loss)?, adam.variables().map(gradient).collect::<Result<_>>()?))
        })
        .collect::<Result<_>>()?;
    let mut parts = parts.into_iter();
    let Some((mut total, mut sums)) = parts.next() else { return Ok((0.0, Vec::new())) };
    for (loss, gradient) in parts {
        total += loss;
        sums.par_iter_mut().zip(gradient).for_each(|(sum, g)| sum.iter_mut().zip(g).for_each(|(a, b)| *a += b));
    }
    Ok((total, sums))
}

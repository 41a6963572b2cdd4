//! What the stages that use gradients share: a differentiable executor of ONNX graphs, and their optimizer.
//!
//! Work is spread over threads by pieces of a step, not inside operators: programs that embed this crate should set
//! `CANDLE_NUM_THREADS=1`, as the command line does.

mod adam;
mod convert;
mod graph;
mod operators;

use candle_core::Tensor as Real;
use rayon::prelude::*;

pub(crate) use adam::{Adam, Moments, Trained};
pub(crate) use convert::{from_candle, to_candle, to_value};
pub(crate) use graph::{Graph, Value};

use crate::Result;

/// The gradient of a loss that is summed over independent pieces, for every variable of `adam`: pieces run in parallel,
/// and are added up in their order.
pub(crate) fn gradients<P: Sync>(
    adam: &Adam,
    pieces: &[P],
    loss: impl Fn(&P) -> Result<Real> + Sync,
) -> Result<Vec<Vec<f32>>> {
    let of_piece = |piece: &P| -> Result<Vec<Vec<f32>>> {
        let store = loss(piece)?.backward()?;
        let gradient = |variable: &candle_core::Var| match store.get(variable) {
            Some(g) => Ok(g.flatten_all()?.to_vec1::<f32>()?),
            None => Ok(vec![0.0; variable.elem_count()]),
        };
        adam.variables().map(gradient).collect()
    };
    let mut sums: Vec<Vec<f32>> = Vec::new();
    // As many at once as there are threads: gradients are as large as the model.
    for some in pieces.chunks(rayon::current_num_threads()) {
        for gradient in some.par_iter().map(of_piece).collect::<Result<Vec<_>>>()? {
            if sums.is_empty() {
                sums = gradient;
                continue;
            }
            sums.par_iter_mut().zip(gradient).for_each(|(sum, g)| sum.iter_mut().zip(g).for_each(|(a, b)| *a += b));
        }
    }
    Ok(sums)
}

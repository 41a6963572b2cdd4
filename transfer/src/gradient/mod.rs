//! What the stages that use gradients share: a differentiable executor of ONNX graphs, and their optimizer.
//!
//! Work is spread over threads by pieces of a step, not inside operators: programs that embed this crate should set
//! `CANDLE_NUM_THREADS=1`, as the command line does.

mod accumulating;
mod adam;
mod convert;
mod graph;
mod operators;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::Tensor as Real;
use rayon::prelude::*;

pub(crate) use accumulating::Gradient;
pub(crate) use adam::{Adam, Moments, Trained};
pub(crate) use convert::{from_candle, to_candle, to_value};
pub(crate) use graph::{Graph, Value};

use crate::Result;

/// Memory for gradients, kept from step to step.
#[derive(Default)]
pub(crate) struct Buffers {
    free: Mutex<Vec<Vec<Vec<f32>>>>,
}

impl Buffers {
    /// The gradient of a loss that is summed over independent pieces, for every variable of `graph` in its order: pieces
    /// run in parallel, and are added up in their order.
    pub(crate) fn gradients<P: Sync>(
        &self,
        graph: &Graph,
        pieces: &[P],
        loss: impl Fn(&P, &Arc<Gradient>) -> Result<Real> + Sync,
    ) -> Result<Vec<Vec<f32>>> {
        let of_piece = |piece: &P| -> Result<Vec<Vec<f32>>> {
            let buffers = self.lock().pop().unwrap_or_default();
            let gradient = Arc::new(Gradient::new(graph.variables().map(|(_, v)| v.elem_count()), buffers));
            let store = loss(piece, &gradient)?.backward()?;
            for (at, (_, variable)) in graph.variables().enumerate() {
                if let Some(found) = store.get(variable) {
                    gradient.add(at, &found.flatten_all()?.to_vec1::<f32>()?);
                }
            }
            Ok(gradient.take())
        };
        let mut sums: Vec<Vec<f32>> = Vec::new();
        // As many at once as there are threads: gradients are as large as the model.
        for some in pieces.chunks(rayon::current_num_threads()) {
            for gradient in some.par_iter().map(of_piece).collect::<Result<Vec<_>>>()? {
                if sums.is_empty() {
                    sums = gradient;
                    continue;
                }
                let pairs = sums.par_iter_mut().zip(&gradient);
                pairs.for_each(|(sum, g)| sum.iter_mut().zip(g).for_each(|(a, b)| *a += b));
                self.keep(gradient);
            }
        }
        Ok(sums)
    }

    /// Keeps a gradient's memory for the next.
    pub(crate) fn keep(&self, gradient: Vec<Vec<f32>>) {
        self.lock().push(gradient);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Vec<Vec<f32>>>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

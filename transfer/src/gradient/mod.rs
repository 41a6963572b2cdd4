//! What the stages that use gradients share: a differentiable executor of ONNX graphs, and their optimizer.
//!
//! Work is spread over threads by pieces of a step, not inside operators: programs that embed this crate should set
//! `CANDLE_NUM_THREADS=1`, as the command line does.

mod accumulating;
mod adam;
mod candle_values;
mod device;
mod fused_operators;
mod graph;
mod hinge_probabilities;
mod operators;
mod value;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::Tensor as Real;
use rayon::prelude::*;

pub(crate) use accumulating::Gradient;
pub(crate) use adam::{AdamW, Trained};
pub(crate) use candle_values::{from_candle, to_candle, to_value};
pub(crate) use device::{device, device_name};
pub(crate) use fused_operators::{bounded, squared_distance};
pub(crate) use graph::Graph;
pub(crate) use hinge_probabilities::HingeSite;
pub(crate) use value::Value;

use crate::Result;

/// Memory for gradients, kept from step to step.
#[derive(Default)]
pub(crate) struct Buffers {
    free: Mutex<Vec<Vec<Vec<f32>>>>,
}

impl Buffers {
    /// The gradient of a loss that is summed over independent pieces, for every variable of `graph` in its order. Each
    /// thread takes every so many-th piece: those of a step should be of like sizes. The order of all sums depends on the
    /// number of threads alone.
    pub(crate) fn gradients<P: Sync>(
        &self,
        graph: &Graph,
        pieces: &[P],
        loss: impl Fn(&P, &Arc<Gradient>) -> Result<Real> + Sync,
    ) -> Result<Vec<Vec<f32>>> {
        let threads = rayon::current_num_threads().min(pieces.len()).max(1);
        let of_thread = |thread: usize| -> Result<Vec<Vec<f32>>> {
            let buffers = self.lock().pop().unwrap_or_default();
            let gradient = Arc::new(Gradient::new(graph.variables().map(|(_, v)| v.elem_count()), buffers));
            for piece in pieces.iter().skip(thread).step_by(threads) {
                let store = loss(piece, &gradient)?.backward()?;
                for (at, (_, variable)) in graph.variables().enumerate() {
                    if let Some(found) = store.get(variable) {
                        gradient.add(at, &found.flatten_all()?.to_vec1::<f32>()?);
                    }
                }
            }
            Ok(gradient.take())
        };
        let mut of_threads = (0..threads).into_par_iter().map(of_thread).collect::<Result<Vec<_>>>()?.into_iter();
        let mut sums = of_threads.next().unwrap_or_default();
        for gradient in of_threads {
            let pairs = sums.par_iter_mut().zip(&gradient);
            pairs.for_each(|(sum, g)| sum.iter_mut().zip(g).for_each(|(a, b)| *a += b));
            self.keep(gradient);
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

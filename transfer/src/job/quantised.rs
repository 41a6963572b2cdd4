//! Teachers that are quantised: what their numbers mean in single precision is the teacher from then on.

use mabert_graph::Model;
use mabert_passes::pipeline::dequantise;
use mabert_runtime::{Named, Tensor};
use serde::Serialize;

use super::measure::Reference;
use crate::compare::OutputDistance;
use crate::{Error, Result};

/// A mean difference of so much of the outputs' mean size is no rounding: quantising has changed what the model computes.
const FAR: f64 = 0.5;

/// How a quantised model was read.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Dequantised {
    /// Operators that work on quantised numbers.
    pub operators: usize,
    /// The model as it came against the one in single precision, on sequences that were kept apart.
    pub outputs: Vec<OutputDistance>,
}

/// A quantised model as it came.
pub(super) struct Original {
    model: Model,
    operators: usize,
}

/// A model in single precision, and as it came where it is quantised.
///
/// # Errors
/// A constant cannot be read.
pub(super) fn in_single_precision(mut model: Model) -> Result<(Model, Option<Original>)> {
    if !mabert_graph::is_quantised(&model) {
        return Ok((model, None));
    }
    let original = model.clone();
    let operators = dequantise(&mut model)?;
    Ok((model, Some(Original { model: original, operators })))
}

impl Original {
    /// The model as it came against the reference, which is the same in single precision.
    ///
    /// # Errors
    /// The two are far from each other, or the model cannot be run.
    pub(super) fn measure(self, reference: &Reference) -> Result<Dequantised> {
        let Self { model, operators } = self;
        let outputs = reference.distances(&reference.run(&model)?.outputs)?;
        for (output, size) in outputs.iter().zip(reference.sizes()?) {
            // What is not a number is far too.
            let near = output.mean_abs <= FAR * size || output.mean_abs == 0.0;
            if !near {
                let OutputDistance { output, mean_abs, .. } = output;
                let reason = format!(
                    "it is quantised, and the rounding of its inner values changes `{output}` by {mean_abs:.2} on \
                     average, where values are of size {size:.2}: what it was made from can be rewritten, this cannot"
                );
                return Err(Error::Teacher { model: model.origin().to_owned(), reason });
            }
        }
        Ok(Dequantised { operators, outputs })
    }
}

/// Zeros of the shapes of some outputs.
pub(super) fn zeros(outputs: &Named) -> Named {
    let zero = |value: &Tensor| Tensor::new(value.shape(), vec![0f32; value.len()]);
    outputs.iter().map(|(name, value)| (name.clone(), zero(value))).collect()
}

//! How far rounding alone moves the outputs of a student that is not calibrated: nothing holds its values, and what the exact
//! passes change must be told from what any other order of the same sums would.

use mabert_graph::{ElementType, Model, Tensor};
use mabert_runtime::{LoadOptions, Named};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::{furthest, outputs};
use crate::Result;
use crate::data::Batch;

/// The furthest that outputs move, relative to their size, when every weight moves by `by` of its own, up or down.
///
/// # Errors
/// The model cannot be run.
pub(super) fn sensitivity(model: &Model, by: f32, batches: &[Batch], of_model: &[Named]) -> Result<f64> {
    let mut moved = model.clone();
    let mut rng = StdRng::seed_from_u64(71);
    let weights = moved.graph().initializer.iter().filter(|t| t.data_type == ElementType::F32.onnx());
    let names: Vec<String> = weights.map(|t| t.name.clone()).collect();
    for name in names {
        let mut values = moved.constant(&name)?.to_f32();
        values.mapv_inplace(|v| if rng.random() { v * (1.0 + by) } else { v * (1.0 - by) });
        moved.set_constant(&name, &Tensor::F32(values));
    }
    let found = outputs(&LoadOptions::default().prepare(&moved)?, batches)?;
    furthest(batches, of_model, &found)
}

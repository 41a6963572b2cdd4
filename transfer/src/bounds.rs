//! Where the stream of a student saturates: what it is bounded by, and which texts get there.

use mabert_graph::Model;
use mabert_passes::lower::{Saturation, saturations};
use mabert_passes::sites::SiteId;
use mabert_runtime::{LoadOptions, Named, Taps, Tensor, borrowed};
use ndarray::Axis;
use rayon::prelude::*;

use crate::Result;
use crate::data::{Batch, BatchShape, Sequence, batches};

/// Positions of one batch, and rows at most.
const BATCH_TOKENS: usize = 2048;
const BATCH_ROWS: usize = 64;

/// A student with the values that its bounds hold.
pub struct BoundedStudent {
    model: mabert_runtime::Model,
    saturations: Vec<Saturation>,
}

impl std::fmt::Debug for BoundedStudent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BoundedStudent").field("saturations", &self.saturations).finish_non_exhaustive()
    }
}

impl BoundedStudent {
    /// Prepares a student, with its threads inside matrix products; `None` where nothing holds its stream.
    ///
    /// # Errors
    /// tract cannot handle it.
    pub fn new(model: &Model, threads: usize) -> Result<Option<Self>> {
        let saturations = saturations(model);
        if saturations.is_empty() {
            return Ok(None);
        }
        let values = saturations.iter().map(|saturation| saturation.value.clone()).collect();
        let model = LoadOptions::default().threads(threads).taps(Taps::Values(values)).prepare(model)?;
        Ok(Some(Self { model, saturations }))
    }

    /// The first norm, if any, behind which each sequence leaves the bounds; in the order of the sequences.
    ///
    /// # Errors
    /// The student cannot be run.
    pub fn leaves(&self, shape: &BatchShape, sequences: &[Sequence]) -> Result<Vec<Option<SiteId>>> {
        let mut found = vec![None; sequences.len()];
        for batch in batches(sequences, BATCH_TOKENS, BATCH_ROWS, shape) {
            for (row, site) in batch.rows.iter().zip(self.of_batch(&batch)?) {
                found[*row] = site;
            }
        }
        Ok(found)
    }

    /// How many sequences of the batches leave the bounds anywhere.
    pub(crate) fn count(&self, batches: &[Batch]) -> Result<usize> {
        let counts = batches.par_iter().map(|batch| Ok(self.of_batch(batch)?.iter().flatten().count()));
        counts.collect::<Result<Vec<usize>>>().map(|counts| counts.iter().sum())
    }

    fn of_batch(&self, batch: &Batch) -> Result<Vec<Option<SiteId>>> {
        let inputs = batch.inputs(self.model.inputs())?;
        self.of_inputs(&inputs, |row, token| token < batch.lengths[row])
    }

    /// The same of each row of ready `inputs`; `is_real` tells tokens from padding.
    ///
    /// # Errors
    /// The student does not take them.
    pub fn of_inputs(&self, inputs: &Named, is_real: impl Fn(usize, usize) -> bool) -> Result<Vec<Option<SiteId>>> {
        let outputs = self.model.run(&borrowed(inputs))?;
        let mut found: Vec<Option<SiteId>> = Vec::new();
        for Saturation { site, value, limit } in &self.saturations {
            let Some((_, value)) = outputs.iter().find(|(name, _)| name == value) else { continue };
            let rows = rows_at_limit(value, *limit, &is_real);
            found.resize(rows.len().max(found.len()), None);
            for (found, at_limit) in found.iter_mut().zip(rows) {
                if at_limit && found.is_none() {
                    *found = Some(*site);
                }
            }
        }
        Ok(found)
    }
}

/// Whether a value `[batch, n, channels]` is at its limit in a real token, row by row.
fn rows_at_limit(value: &Tensor, limit: f32, is_real: impl Fn(usize, usize) -> bool) -> Vec<bool> {
    let value = value.to_f32();
    let is_held = |row: usize, tokens: ndarray::ArrayViewD<'_, f32>| {
        let mut tokens = tokens.axis_iter(Axis(0)).enumerate();
        tokens.any(|(token, channels)| is_real(row, token) && channels.iter().any(|v| v.abs() >= limit))
    };
    value.axis_iter(Axis(0)).enumerate().map(|(row, tokens)| is_held(row, tokens)).collect()
}

#[cfg(test)]
mod tests {
    use mabert_graph::{Builder, ElementType};

    use super::*;

    /// A model that looks up two channels a token and holds them, twice.
    fn model() -> Model {
        let b = Builder::new(17, "test");
        let ids = b.input("input_ids", ElementType::I64, &["B", "N"]);
        let table = b.constant("table", &Tensor::new(&[4, 2], vec![0f32, 0.5, 3.0, 0.0, 0.0, -1.5, 1.0, 1.0]));
        b.scope("layer.0/attention/norm/bound");
        let first = table.gather(ids).clip(-2.0, 2.0);
        b.scope("layer.0/output/norm/bound");
        b.model(&[first.clip(-1.5, 1.5).named("y")])
    }

    #[test]
    fn texts_that_leave_the_bounds_are_told_with_the_first_place() {
        let student = BoundedStudent::new(&model(), 1).unwrap().unwrap();
        let ids = Tensor::new(&[4, 2], vec![0i64, 3, 1, 0, 0, 2, 0, 1]);
        // The last row's second token is padding.
        let found = student.of_inputs(&vec![("input_ids".to_owned(), ids)], |row, token| row < 3 || token < 1).unwrap();
        let found: Vec<Option<String>> = found.into_iter().map(|site| site.map(|site| site.to_string())).collect();
        let place = |name: &str| Some(name.to_owned());
        assert_eq!(found, [None, place("layer.0/attention/norm"), place("layer.0/output/norm"), None]);
    }

    #[test]
    fn a_model_without_bounds_has_none_to_leave() {
        let mut free = model();
        free.graph_mut().node.iter_mut().for_each(|node| node.name.clear());
        assert!(BoundedStudent::new(&free, 1).unwrap().is_none());
    }
}

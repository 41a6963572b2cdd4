//! Solves for a half's linear map and the affine map in place of its norm.

use mabert_graph::Tensor;
use mabert_passes::lower::norm_parameters;
use mabert_passes::pipeline::Pass;
use mabert_passes::sites::{Layer, SiteId};
use ndarray::{Array2, ArrayD, Axis};
use rayon::prelude::*;

use super::regression::{Regression, Solution, Unknowns};
use super::token_weights::real_rows;
use super::walk::{Half, Walk, not_finite};
use crate::Result;
use crate::part::Part;
use crate::stored::Stored;

/// Batches that are run before their statistics are added up: enough for every thread, few enough to hold.
const AT_ONCE: usize = 8;

impl Walk<'_> {
    /// Least squares of the teacher's values on the student's: what lies between the input of a half's map and the half's
    /// norm.
    pub(super) fn solve(&mut self, layer: &Layer, half: Half, contexts: &Stored, target: &Stored) -> Result<()> {
        let affine = self.student.ran(Pass::Norm);
        let unknowns = if affine { Unknowns::WeightAndAffine } else { Unknowns::WeightAndOffset };
        let sums = self.half_statistics(layer, half, contexts, target)?;
        let solution = sums.solve(unknowns).ok_or_else(|| not_finite(half.norm_id(layer)))?;
        let map = half.map(layer);
        self.add_to(&map.weight, &solution.weight.mapv(|v| v as f32).into_dyn())?;
        if affine {
            self.set_norm(half.norm_id(layer), &solution);
        } else {
            let bias = map.bias_name.as_deref().expect("canonical maps have a bias");
            self.add_to(bias, &solution.offset.mapv(|v| v as f32).into_dyn())?;
        }
        Ok(())
    }

    /// The sums over all text of the features that go into the map, the norm's input, and the target.
    fn half_statistics(&self, layer: &Layer, half: Half, contexts: &Stored, target: &Stored) -> Result<Regression> {
        let map = half.map(layer);
        let norm_input = half.norm(layer).input.as_str();
        // The context is there already; the feed-forward half's own features are computed.
        let values: &[&str] = match half {
            Half::Attention => &[norm_input],
            Half::FeedForward => &[norm_input, &map.input],
        };
        let part = self.residual_part(layer, values)?;
        let weights = self.first_token_weights(layer);
        let mut sums = Regression::new(map.inputs, map.outputs);
        let all: Vec<usize> = (0..self.batches.len()).collect();
        for some in all.chunks(AT_ONCE) {
            let rows: Vec<[Array2<f32>; 3]> =
                some.par_iter().map(|&i| self.rows(&part, i, contexts, target)).collect::<Result<_>>()?;
            let [z, r, y] = [0, 1, 2].map(|which| {
                let views: Vec<_> = rows.iter().map(|rows| rows[which].view()).collect();
                ndarray::concatenate(Axis(0), &views).expect("as many columns")
            });
            let weights: Option<Vec<f64>> = weights.map(|weights| {
                let batches = some.iter().map(|&i| &self.batches[i]);
                batches.flat_map(|b| real_rows(b, &weights.of_tokens(b, 1)).into_iter()).map(f64::from).collect()
            });
            sums.add(z.view(), r.view(), y.view(), weights.as_deref());
        }
        Ok(sums)
    }

    /// Features, norm input and target of a batch's tokens, `[tokens, channels]` each.
    fn rows(&self, part: &Part, i: usize, contexts: &Stored, target: &Stored) -> Result<[Array2<f32>; 3]> {
        let context = contexts.get(i)?;
        let values = part.run(&[&self.student_stream.get(i)?, &context])?;
        let features = values.get(1).unwrap_or(&context);
        Ok([features, &values[0], &target.get(i)?].map(|value| real_rows(&self.batches[i], value)))
    }

    fn add_to(&mut self, constant: &str, change: &ArrayD<f32>) -> Result<()> {
        let value = self.student.model.constant(constant)?.to_f32() + change;
        self.student.model.set_constant(constant, &Tensor::from(value));
        Ok(())
    }

    /// Sets the affine map in place of a norm.
    pub(super) fn set_norm(&mut self, norm: SiteId, solution: &Solution) {
        let [scale, offset] = norm_parameters(norm);
        for (name, values) in [(scale, &solution.scale), (offset, &solution.offset)] {
            let narrow = values.iter().map(|&v| v as f32).collect();
            self.student.model.set_constant(&name, &Tensor::new(&[values.len()], narrow));
        }
    }
}

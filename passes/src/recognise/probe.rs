//! Probes: a region run on chosen inputs.

use mabert_graph::{Boundary, Dependence, ElementType, Index, Model, Tensor};
use mabert_runtime::LoadOptions;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use super::region::Region;
use crate::recording::Recording;

/// A region made runnable, at the shapes of a recording.
pub(crate) struct Probe {
    model: mabert_runtime::Model,
    shapes: Vec<(String, Vec<usize>)>,
    elements: Vec<ElementType>,
    exit: String,
}

impl Probe {
    /// Cuts the region out. Values that depend on shapes alone are frozen as the recording has them.
    pub(crate) fn new(
        model: &Model,
        index: &Index<'_>,
        recording: &Recording,
        region: &Region,
    ) -> std::result::Result<Self, String> {
        let mut boundaries = Vec::new();
        let mut shapes = Vec::new();
        let mut elements = Vec::new();
        for entry in &region.entries {
            let value = recording.value(entry).ok_or_else(|| format!("value `{entry}` was not recorded"))?;
            boundaries.push(Boundary::fixed(entry, value.element_type(), value.shape()));
            elements.push(value.element_type());
            shapes.push((entry.clone(), value.shape().to_vec()));
        }
        let mut frozen: Vec<&str> = Vec::new();
        for &at in &region.nodes {
            for value in &index.graph().node[at].input {
                if index.dependence(value) == Dependence::Shape && !frozen.contains(&value.as_str()) {
                    frozen.push(value);
                }
            }
        }
        let recorded = |name: &str| recording.value(name).ok_or_else(|| format!("value `{name}` was not recorded"));
        for name in &frozen {
            let value = recorded(name)?;
            boundaries.push(Boundary::fixed(name, value.element_type(), value.shape()));
        }
        let mut part = model.extract(&boundaries, &[&region.exit]).map_err(|e| e.to_string())?;
        part.graph_mut().input.retain(|i| !frozen.contains(&i.name.as_str()));
        for name in &frozen {
            part.set_constant(name, recorded(name)?);
        }
        let model = LoadOptions::default().prepare(&part).map_err(|e| e.to_string())?;
        Ok(Self { model, shapes, elements, exit: region.exit.clone() })
    }

    /// The shape of the entry at `at`.
    pub(crate) fn shape(&self, at: usize) -> &[usize] {
        &self.shapes[at].1
    }

    /// The element type of the entry at `at`.
    pub(crate) fn element(&self, at: usize) -> ElementType {
        self.elements[at]
    }

    /// Runs the region on one tensor an entry.
    pub(crate) fn run(&self, inputs: &[Tensor]) -> std::result::Result<Tensor, String> {
        let named: Vec<(&str, &Tensor)> =
            self.shapes.iter().zip(inputs).map(|((name, _), t)| (name.as_str(), t)).collect();
        let outputs = self.model.run(&named).map_err(|e| e.to_string())?;
        let exit = outputs.into_iter().find(|(name, _)| *name == self.exit);
        Ok(exit.expect("the exit is the part's only output").1)
    }

    /// Runs a region of one entry on `f32` data.
    pub(crate) fn run_f32(&self, data: Vec<f32>) -> std::result::Result<Tensor, String> {
        self.run(&[Tensor::new(self.shape(0), data)])
    }

    /// Seeded values around zero with standard deviation about 1, as many as the entry at `at` holds.
    pub(crate) fn noise(&self, at: usize, seed: u64) -> Vec<f32> {
        let mut rng = StdRng::seed_from_u64(seed);
        let count = self.shape(at).iter().product();
        // The sum of three uniforms is close enough to normal, and bounded.
        (0..count).map(|_| (0..3).map(|_| rng.random_range(-1.0f32..1.0)).sum()).collect()
    }
}

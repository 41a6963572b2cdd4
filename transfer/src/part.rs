//! Parts of a model, run on their own.

use mabert_graph::{Boundary, ElementType, Model, TensorType};
use mabert_runtime::{LoadOptions, Tensor, borrowed};

use crate::Result;
use crate::data::Batch;

/// The nodes between a few `f32` values of a model, made runnable at any batch size and length.
pub(crate) struct Part {
    model: mabert_runtime::Model,
    inputs: Vec<String>,
}

impl Part {
    /// Cuts out what computes `outputs` from `inputs`: each `[batch, n, channels]`, or `[batch, n]` where no channels
    /// are given.
    pub(crate) fn new(model: &Model, inputs: &[(&str, Option<usize>)], outputs: &[&str]) -> Result<Self> {
        let boundary = |(name, channels): &(&str, Option<usize>)| {
            let mut dims = vec!["batch".to_owned(), "n".to_owned()];
            dims.extend(channels.map(|c| c.to_string()));
            Boundary { name: (*name).to_owned(), element: ElementType::F32, dims }
        };
        let part = model.extract(&inputs.iter().map(boundary).collect::<Vec<_>>(), outputs)?;
        let inputs = inputs.iter().map(|(name, _)| (*name).to_owned()).collect();
        Ok(Self { model: LoadOptions::default().prepare(&part)?, inputs })
    }

    /// Runs the part on one tensor an input; returns one an output.
    pub(crate) fn run(&self, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
        let named: Vec<(&str, &Tensor)> = self.inputs.iter().zip(inputs).map(|(name, t)| (name.as_str(), *t)).collect();
        Ok(self.model.run(&named)?.into_iter().map(|(_, value)| value).collect())
    }
}

/// What computes some values of a model from the model's own inputs.
pub(crate) struct Prefix {
    model: mabert_runtime::Model,
    inputs: Vec<TensorType>,
}

impl Prefix {
    /// Cuts out what computes `values`.
    pub(crate) fn new(model: &Model, values: &[&str]) -> Result<Self> {
        let part = model.extract_from_inputs(&[], values)?;
        let inputs = part.inputs();
        Ok(Self { model: LoadOptions::default().prepare(&part)?, inputs })
    }

    /// Returns the values in the order in which they were asked for.
    pub(crate) fn run(&self, batch: &Batch) -> Result<Vec<Tensor>> {
        let named = batch.inputs(&self.inputs)?;
        Ok(self.model.run(&borrowed(&named))?.into_iter().map(|(_, value)| value).collect())
    }

    /// The first value.
    pub(crate) fn run_first(&self, batch: &Batch) -> Result<Tensor> {
        Ok(self.run(batch)?.remove(0))
    }
}

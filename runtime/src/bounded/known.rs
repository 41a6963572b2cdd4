//! What is known of a node before it is run.

use tract_onnx::pb::{AttributeProto, NodeProto};
use tract_onnx::tract_hir::internal::{Factoid as _, InferenceFact};

/// A node, and what tract knows of its operands so far.
pub(super) struct Known<'k> {
    pub(super) node: &'k NodeProto,
    pub(super) inputs: &'k [&'k InferenceFact],
    pub(super) outputs: &'k [&'k InferenceFact],
}

impl Known<'_> {
    fn attribute(&self, name: &str) -> Option<&AttributeProto> {
        self.node.attribute.iter().find(|a| a.name == name)
    }

    pub(super) fn int(&self, name: &str) -> Option<i64> {
        self.attribute(name).map(|a| a.i)
    }

    pub(super) fn ints(&self, name: &str) -> Option<&[i64]> {
        self.attribute(name).map(|a| a.ints.as_slice())
    }

    /// An operand by its place in ONNX; tract leaves those out that are not given.
    fn operand(&self, at: usize) -> Option<&InferenceFact> {
        let names = &self.node.input;
        names.get(at).filter(|name| !name.is_empty())?;
        let place = names[..at].iter().filter(|name| !name.is_empty()).count();
        self.inputs.get(place).copied()
    }

    pub(super) fn rank(&self, at: usize) -> Option<i64> {
        self.operand(at)?.shape.rank().concretize()
    }

    /// The rank of the first output, which tract may know first.
    pub(super) fn output_rank(&self) -> Option<i64> {
        self.outputs.first()?.shape.rank().concretize()
    }

    /// The sizes of an operand's axes; those that are not known count as 1.
    pub(super) fn sizes(&self, at: usize) -> Option<Vec<f64>> {
        let fact = self.operand(at)?;
        fact.shape.rank().concretize()?;
        let size =
            |dim: Option<_>| dim.and_then(|d: tract_onnx::prelude::TDim| d.to_i64().ok()).map_or(1.0, |d| d as f64);
        Some(fact.shape.dims().map(|dim| size(dim.concretize())).collect())
    }

    /// The elements of an operand; sizes that are not known count as 1.
    pub(super) fn count(&self, at: usize) -> f64 {
        self.sizes(at).map_or(1.0, |sizes| sizes.iter().product())
    }

    /// The values of an operand that is constant, up to some hundred.
    pub(super) fn numbers(&self, at: usize) -> Option<Vec<f64>> {
        const MOST: usize = 256;
        let value = self.operand(at)?.value.concretize()?;
        if value.len() > MOST {
            return None;
        }
        if let Ok(numbers) = value.cast_to::<f64>() {
            return Some(numbers.to_plain_array_view::<f64>().ok()?.iter().copied().collect());
        }
        // Sizes become numbers by way of integers.
        Some(self.integers(at)?.into_iter().map(|v| v as f64).collect())
    }

    pub(super) fn integers(&self, at: usize) -> Option<Vec<i64>> {
        let value = self.operand(at)?.value.concretize()?;
        let integers = value.cast_to::<i64>().ok()?;
        Some(integers.to_plain_array_view::<i64>().ok()?.iter().copied().collect())
    }
}

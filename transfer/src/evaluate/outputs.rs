//! What a model gives for sequences, and which of its outputs a task is about.

use mabert_runtime::{Engine, Named};
use ndarray::{Array2, ArrayViewD, Axis};

use super::{Spread, class_logits, run_batches};
use crate::compare::overflows;
use crate::data::{Batch, BatchShape, Sequence};
use crate::heads::HeadKind;
use crate::pooling::Features;
use crate::{Error, Result};

/// How a model is run on a task.
#[derive(Clone, Copy)]
pub struct TaskRun<'e> {
    /// The model on its engine.
    pub engine: &'e dyn Engine,
    /// What its inputs ask of batches.
    pub shape: &'e BatchShape,
    /// Channels of its stream, where they are known: what is as wide is no row of classes.
    pub channels: Option<usize>,
    /// What makes vectors of texts of a feature model's outputs, beside these.
    pub features: Option<&'e Features>,
    /// Where work is spread over threads.
    pub spread: Spread,
}

impl std::fmt::Debug for TaskRun<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TaskRun").field("spread", &self.spread).finish_non_exhaustive()
    }
}

/// All outputs of a model for some sequences.
pub(super) struct Outputs {
    parts: Vec<(Batch, Named)>,
    channels: Option<usize>,
    sequences: usize,
    /// On how many sequences any value is not finite.
    pub(super) overflow: usize,
}

/// One output.
pub(super) struct Output<'o> {
    /// Where it stands among the outputs.
    pub(super) at: usize,
    pub(super) name: &'o str,
    /// How many axes it has.
    pub(super) rank: usize,
    /// The last of them.
    pub(super) width: usize,
    /// Whether the second is that of tokens.
    pub(super) is_over_tokens: bool,
    /// What it is, where nothing but its name and shapes tells.
    pub(super) kind: HeadKind,
}

impl TaskRun<'_> {
    pub(super) fn outputs(&self, sequences: &[Sequence]) -> Result<Outputs> {
        let parts = run_batches(self.engine, self.shape, sequences, self.spread)?;
        let (batches, outputs): (Vec<Batch>, Vec<Named>) = parts.into_iter().unzip();
        let overflow = overflows(&batches, &outputs);
        let parts = batches.into_iter().zip(outputs).collect();
        Ok(Outputs { parts, channels: self.channels, sequences: sequences.len(), overflow })
    }
}

impl Outputs {
    /// As [`logits`](super::logits).
    pub(super) fn logits(&self) -> Result<Array2<f32>> {
        class_logits(&self.parts, self.sequences, self.channels)
    }

    fn first(&self) -> &[(String, mabert_runtime::Tensor)] {
        self.parts.first().map_or(&[], |(_, outputs)| outputs.as_slice())
    }

    /// One by one, in the model's order.
    pub(super) fn all(&self) -> Vec<Output<'_>> {
        let mut all = Vec::new();
        for (at, (name, value)) in self.first().iter().enumerate() {
            let shapes: Vec<_> = self.parts.iter().map(|(b, o)| (b.length, o[at].1.shape().to_vec())).collect();
            let is_over_tokens = shapes.iter().all(|(length, shape)| shape.get(1) == Some(length));
            let (rank, width) = (value.shape().len(), value.shape().last().copied().unwrap_or(1));
            let kind = HeadKind::from_shapes(name, &shapes, self.channels.unwrap_or(0));
            all.push(Output { at, name, rank, width, is_over_tokens, kind });
        }
        all
    }

    /// The first that fits.
    pub(super) fn find(&self, fits: impl Fn(&Output<'_>) -> bool) -> Option<Output<'_>> {
        self.all().into_iter().find(|output| fits(output))
    }

    /// Hands over every sequence's row of an output; one over tokens may be padded.
    pub(super) fn each_row(&self, at: usize, mut take: impl FnMut(usize, ArrayViewD<'_, f32>)) {
        for (batch, outputs) in &self.parts {
            let value = outputs[at].1.to_f32();
            for (row, &sequence) in batch.rows.iter().enumerate() {
                take(sequence, value.index_axis(Axis(0), row));
            }
        }
    }

    /// Says that no output is such as the task needs.
    pub(super) fn fault(&self, reason: &str) -> Error {
        let names: Vec<String> = self.first().iter().map(|(name, v)| format!("{name} {:?}", v.shape())).collect();
        Error::Compare(format!("{reason}; the model gives {}", names.join(", ")))
    }
}

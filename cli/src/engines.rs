//! Engines by name, and models on them.

use std::path::Path;

use anyhow::Result;
use mabert_graph::Model;
use mabert_passes::inputs::{EncoderInputs, GivenRoles};
use mabert_passes::recording::longest_sequence;
use mabert_runtime::{Engine, LoadOptions, Model as TractModel, Named, OrtModel, Tensor, borrowed, load_onnxruntime};
use mabert_transfer::data::BatchShape;

use crate::arguments::{Choice, Global};

/// No sequence is longer than this, whatever a model would take.
pub(crate) const LONGEST: usize = 8192;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum EngineName {
    /// tract with this project's fused operators.
    Tract,
    /// tract as it is.
    PlainTract,
    Onnxruntime,
}

impl EngineName {
    pub(crate) const ALL: [Self; 3] = [Self::Tract, Self::PlainTract, Self::Onnxruntime];

    /// Loads a model on this engine.
    pub(crate) fn load(self, path: &Path, global: &Global) -> Result<Box<dyn Engine>> {
        Ok(match self {
            Self::Tract => Box::new(load_tract(path, global)?),
            Self::PlainTract => Box::new(tract_options(global).plain().load(path)?),
            Self::Onnxruntime => {
                load_onnxruntime(global.ort_lib.as_deref())?;
                Box::new(OrtModel::load(path, global.threads())?)
            }
        })
    }
}

impl Choice for EngineName {
    fn name(self) -> &'static str {
        match self {
            Self::Tract => "tract",
            Self::PlainTract => "plain-tract",
            Self::Onnxruntime => "onnxruntime",
        }
    }

    fn help(self) -> Option<&'static str> {
        match self {
            Self::Tract => Some("tract with this project's fused operators"),
            Self::PlainTract => Some("tract as it is, for comparison"),
            Self::Onnxruntime => None,
        }
    }
}

pub(crate) fn tract_options(global: &Global) -> LoadOptions {
    LoadOptions::default().threads(global.threads())
}

pub(crate) fn load_tract(path: &Path, global: &Global) -> Result<TractModel> {
    Ok(tract_options(global).load(path)?)
}

/// What a model reads.
pub(crate) struct Reads {
    pub(crate) inputs: EncoderInputs,
    /// The longest sequence that it takes, or what was asked for.
    pub(crate) max_seq: usize,
}

impl Reads {
    /// What `model` reads, of at most `limit` tokens; names that say something else than the graph are told of.
    pub(crate) fn new(model: &Model, limit: usize, given: &GivenRoles) -> Result<Self> {
        let inputs = EncoderInputs::new(model, given)?;
        if let Some(disagreement) = inputs.disagreement() {
            tracing::warn!("{}: {disagreement}", model.origin());
        }
        let runnable = LoadOptions::default().prepare(model)?;
        let max_seq = longest_sequence(&inputs, &runnable, limit)?.0;
        Ok(Self { inputs, max_seq })
    }

    /// What its batches are like.
    pub(crate) fn shape(&self) -> BatchShape {
        BatchShape::new(&self.inputs)
    }
}

/// Runs a model on those of the named values that it has inputs for.
pub(crate) fn run_on(engine: &dyn Engine, values: &Named) -> Result<Named> {
    let is_input = |name: &str| engine.inputs().iter().any(|input| input.name == name);
    let inputs: Vec<(&str, &Tensor)> = borrowed(values).into_iter().filter(|(name, _)| is_input(name)).collect();
    Ok(engine.run(&inputs)?)
}

//! Engines by name, and models on them.

use std::path::Path;

use anyhow::Result;
use mabert_graph::Model;
use mabert_passes::inputs::{EncoderInputs, GivenRoles};
use mabert_passes::pipeline::ENCODER_END_KEY;
use mabert_passes::recording::longest_sequence;
use mabert_runtime::{
    Engine, LoadOptions, Model as TractModel, Named, OrtModel, Taps, Tensor, borrowed, load_onnxruntime,
};
use mabert_transfer::data::{BatchShape, TextEncoder};
use mabert_transfer::pooling::table_columns;

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

    /// Loads a model on this engine; on tract the inner `values` are outputs too.
    pub(crate) fn load_tapped(self, path: &Path, values: &[String], global: &Global) -> Result<Box<dyn Engine>> {
        match self {
            Self::Tract if !values.is_empty() => {
                Ok(Box::new(tract_options(global).taps(Taps::Values(values.to_vec())).load(path)?))
            }
            _ => self.load(path, global),
        }
    }

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
    inputs: EncoderInputs,
    /// The longest sequence that it takes, or what was asked for.
    pub(crate) max_seq: usize,
    channels: Option<usize>,
    encoder_end: Option<String>,
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
        let channels = inputs.vocabulary().and_then(|rows| table_columns(model, rows));
        let known = model.value_names();
        let encoder_end = model.metadata(ENCODER_END_KEY).filter(|value| known.contains(*value)).map(str::to_owned);
        Ok(Self { inputs, max_seq, channels, encoder_end })
    }

    /// Token ids are below it; `None` where no table was found that they index.
    pub(crate) fn vocabulary(&self) -> Option<usize> {
        self.inputs.vocabulary()
    }

    /// How wide its embeddings are, where that is known.
    pub(crate) fn channels(&self) -> Option<usize> {
        self.channels
    }

    /// The value that a student's encoder ends in, where it is known.
    pub(crate) fn encoder_end(&self) -> &[String] {
        self.encoder_end.as_slice()
    }

    /// What its batches are like, filled up as the encoder's tokenizer does.
    pub(crate) fn shape(&self, encoder: &TextEncoder) -> BatchShape {
        let pad = encoder.pad();
        let is_known = self.vocabulary().is_none_or(|rows| usize::try_from(pad).is_ok_and(|pad| pad < rows));
        BatchShape { pad: if is_known { pad } else { 0 }, ..BatchShape::new(&self.inputs) }
    }
}

/// Refuses negative ids: ONNX counts them from the end of a table, but no tokenizer means that.
pub(crate) fn refuse_negative_ids(model: &Model, arrays: &Named, given: &GivenRoles) -> Result<()> {
    let inputs = EncoderInputs::new(model, given)?;
    for (name, values) in arrays {
        let Some(rows) = inputs.get(name).and_then(|input| input.rows) else { continue };
        let negative = values.to_i64().and_then(|ids| ids.iter().copied().find(|id| *id < 0));
        if let Some(id) = negative {
            let reason = format!("input `{name}` holds {id}: what it indexes has rows 0 to {}", rows.saturating_sub(1));
            return Err(mabert_transfer::Error::Compare(reason).into());
        }
    }
    Ok(())
}

/// Runs a model on those of the named values that it has inputs for.
pub(crate) fn run_on(engine: &dyn Engine, values: &Named) -> Result<Named> {
    let is_input = |name: &str| engine.inputs().iter().any(|input| input.name == name);
    let inputs: Vec<(&str, &Tensor)> = borrowed(values).into_iter().filter(|(name, _)| is_input(name)).collect();
    Ok(engine.run(&inputs)?)
}

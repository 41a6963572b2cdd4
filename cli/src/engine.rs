//! Models on the engine that was asked for.

use std::path::Path;

use anyhow::Result;
use mabert_runtime::{Engine, LoadOptions, Model, OrtModel, load_onnxruntime};

use crate::arguments::{EngineName, Global};

impl EngineName {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tract => "tract",
            Self::PlainTract => "plain-tract",
            Self::Onnxruntime => "onnxruntime",
        }
    }

    /// Loads a model on this engine.
    pub(crate) fn load(self, path: &Path, global: &Global) -> Result<Box<dyn Engine>> {
        Ok(match self {
            Self::Tract => Box::new(tract(path, global)?),
            Self::PlainTract => Box::new(LoadOptions::default().threads(global.threads()).plain().load(path)?),
            Self::Onnxruntime => {
                load_onnxruntime(global.ort_lib.as_deref())?;
                Box::new(OrtModel::load(path, global.threads())?)
            }
        })
    }
}

pub(crate) fn tract(path: &Path, global: &Global) -> Result<Model> {
    Ok(LoadOptions::default().threads(global.threads()).load(path)?)
}

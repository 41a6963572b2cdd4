//! How a feature model's vectors of texts are made.

use std::path::Path;

use clap::Args;
use mabert_transfer::pooling::{Features, Pooling};

use super::one_of;

/// How a feature model's vectors of texts are made.
#[derive(Debug, Args)]
pub(crate) struct VectorArguments {
    /// How a feature model's vectors of texts are made [default: as its outputs tell, or 1_Pooling/config.json beside the
    /// model or the tokenizer; else mean]
    #[arg(long, value_name = "HOW", value_parser = one_of(Pooling::ALL))]
    pub(crate) pooling: Option<Pooling>,
}

impl VectorArguments {
    /// What makes vectors of the outputs of a model in `file` of so many channels.
    pub(crate) fn features(&self, file: &Path, tokenizer: Option<&Path>, channels: Option<usize>) -> Features {
        Features::new(self.pooling).beside([file].into_iter().chain(tokenizer)).channels(channels)
    }
}

//! Where texts, or ready token ids, come from.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use mabert_passes::inputs::Role;
use mabert_transfer::data::{Columns, Overlong, Sequence, TextEncoder, read_sequences};

use crate::failure::Usage;

/// Texts, or ready token ids.
#[derive(Debug, Args)]
pub(crate) struct DataArguments {
    /// Data: .txt (one text a line), .tsv or .csv with a header, .jsonl, or .npz of token ids
    #[arg(long, value_name = "FILE")]
    pub(crate) data: Option<PathBuf>,
    /// The model's tokenizer.json; needed where the data is text
    #[arg(long, value_name = "FILE")]
    pub(crate) tokenizer: Option<PathBuf>,
    /// The column of the text [default: text or sentence, or the first of a pair as the usual data sets call it]
    #[arg(long, value_name = "NAME", requires = "data")]
    text_column: Option<String>,
    /// The column of the second text of a pair [default: sentence2 beside sentence1, hypothesis beside premise...]
    #[arg(long, value_name = "NAME", requires = "data")]
    pair_column: Option<String>,
    /// What an input holds (ids, mask, types, positions), where neither the model nor the name tells: ids=input.1
    #[arg(long = "input", value_name = "ROLE=NAME", value_parser = input_role)]
    pub(crate) input_roles: Vec<(Role, String)>,
    /// Labels that are words, in the order of the model's classes, as in `entailment,not_entailment`
    #[arg(long, value_name = "WORDS", value_delimiter = ',', requires = "data")]
    classes: Vec<String>,
}

fn input_role(text: &str) -> Result<(Role, String), String> {
    let names = || Role::ALL.map(Role::name).join(", ");
    let (role, input) = text.split_once('=').ok_or("it is a role and the name of an input, as in ids=input.1")?;
    let role = Role::ALL.into_iter().find(|r| r.name() == role).ok_or_else(|| format!("the roles are {}", names()))?;
    Ok((role, input.to_owned()))
}

/// What a data file holds, for models that take so many tokens.
pub(crate) struct Texts<'a> {
    pub(crate) file: &'a Path,
    pub(crate) sequences: Vec<Sequence>,
    /// The longest sequence.
    pub(crate) max_seq: usize,
}

impl Texts<'_> {
    /// How many were too long.
    pub(crate) fn truncated(&self) -> usize {
        self.sequences.iter().filter(|s| s.truncated).count()
    }
}

impl DataArguments {
    pub(crate) fn columns(&self, label: Option<&str>) -> Columns {
        Columns {
            text: self.text_column.clone(),
            pair: self.pair_column.clone(),
            label: label.map(str::to_owned),
            classes: self.classes.clone(),
        }
    }

    /// The files that are read.
    pub(crate) fn files(&self) -> impl Iterator<Item = &PathBuf> {
        self.data.iter().chain(&self.tokenizer)
    }

    /// The data file, which must be given.
    pub(crate) fn file(&self) -> Result<&Path> {
        self.data.as_deref().ok_or_else(|| Usage("--data is needed".to_owned()).into())
    }

    /// What makes sequences of at most `max_seq` tokens out of texts.
    pub(crate) fn encoder(&self, max_seq: usize, overlong: Overlong) -> Result<TextEncoder> {
        Ok(TextEncoder::new(self.tokenizer.as_deref(), max_seq, overlong)?)
    }

    /// All of the data file, which must be given.
    pub(crate) fn texts(&self, max_seq: usize, overlong: Overlong, label: Option<&str>) -> Result<Texts<'_>> {
        let file = self.file()?;
        let sequences = read_sequences(file, &self.columns(label), &self.encoder(max_seq, overlong)?)?;
        Ok(Texts { file, sequences, max_seq })
    }
}

//! Where texts, or ready token ids, come from.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use mabert_passes::inputs::Role;
use mabert_transfer::data::{
    Columns, Content, Data, DataFile, DataFormat, Example, Overlong, Sequence, Skipped, TextEncoder, Unknown,
    check_ids, read_pairs, read_sequences,
};

use super::one_of;
use crate::failure::Usage;

/// Texts, or ready token ids.
#[derive(Debug, Args)]
pub(crate) struct DataArguments {
    /// Data: .txt (one text a line), .tsv or .csv with a header, .jsonl or .json, or .npz of token ids; a pipe too
    #[arg(long, value_name = "FILE")]
    pub(crate) data: Option<PathBuf>,
    /// How the data holds its texts [default: the ending of its name, or what is in it, says]
    #[arg(long, value_name = "FORMAT", value_parser = one_of(DataFormat::ALL), requires = "data")]
    data_format: Option<DataFormat>,
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
    #[arg(long, value_name = "WORDS", value_delimiter = ',', requires = "data", value_parser = class)]
    classes: Vec<String>,
}

fn input_role(text: &str) -> Result<(Role, String), String> {
    let names = || Role::ALL.map(Role::name).join(", ");
    let (role, input) = text.split_once('=').ok_or("it is a role and the name of an input, as in ids=input.1")?;
    let role = Role::ALL.into_iter().find(|r| r.name() == role).ok_or_else(|| format!("the roles are {}", names()))?;
    Ok((role, input.to_owned()))
}

/// A word without the blanks around it.
fn class(text: &str) -> Result<String, String> {
    match text.trim() {
        "" => Err("a class has no name".to_owned()),
        name => Ok(name.to_owned()),
    }
}

/// What a data file holds, for models that take so many tokens.
pub(crate) struct Texts {
    pub(crate) file: PathBuf,
    pub(crate) sequences: Vec<Sequence>,
    /// The longest sequence.
    pub(crate) max_seq: usize,
    /// What makes it doubtful that the texts, or the tokenizer, are the model's.
    pub(crate) notes: Vec<String>,
}

impl Texts {
    fn new(source: &Path, sequences: Vec<Sequence>, encoder: &TextEncoder, rows: Option<usize>) -> Result<Self> {
        let mut notes = Vec::new();
        if let Some(rows) = rows {
            check_ids(source, rows, &sequences)?;
            notes.extend(encoder.notes(rows)?);
        }
        notes.extend(Unknown::count(&sequences, encoder)?.note(source));
        Ok(Self { file: source.to_owned(), sequences, max_seq: encoder.longest(), notes })
    }

    /// How many were too long.
    pub(crate) fn truncated(&self) -> usize {
        self.sequences.iter().filter(|s| s.truncated).count()
    }
}

impl DataArguments {
    fn columns(&self, label: Option<&str>) -> Columns {
        Columns {
            text: self.text_column.clone(),
            pair: self.pair_column.clone(),
            label: label.map(str::to_owned),
            classes: self.classes.clone(),
        }
    }

    /// A file with these columns. What is said of the format is said of the data, and of what has no ending that says it.
    pub(crate) fn file_at(&self, path: &Path, label: Option<&str>) -> Data {
        let is_data = self.data.as_deref() == Some(path);
        let format = self.data_format.filter(|_| is_data || DataFormat::from_name(path).is_none());
        Data::new(path).columns(self.columns(label)).format(format)
    }

    /// Refuses a class that is named twice, and options that say something of data where there is none; `instead` says what
    /// takes their place.
    pub(crate) fn check(&self, instead: &str) -> Result<()> {
        let is_twice = |(at, class): &(usize, &String)| self.classes[..*at].contains(class);
        if let Some((_, class)) = self.classes.iter().enumerate().find(is_twice) {
            return Err(Usage(format!("--classes names `{class}` twice")).into());
        }
        let options = [
            ("data-format", self.data_format.is_some()),
            ("text-column", self.text_column.is_some()),
            ("pair-column", self.pair_column.is_some()),
            ("classes", !self.classes.is_empty()),
        ];
        match options.into_iter().find(|(_, is_given)| *is_given) {
            Some((name, _)) if self.data.is_none() => {
                Err(Usage(format!("--{name} says something of --data, which is not given{instead}")).into())
            }
            _ => Ok(()),
        }
    }

    /// Refuses a tokenizer where no text is read.
    pub(crate) fn refuse_tokenizer(&self, without: &str) -> Result<()> {
        match self.tokenizer {
            Some(_) => Err(Usage(format!("--tokenizer has nothing to do {without}")).into()),
            None => Ok(()),
        }
    }

    /// The files that are read.
    pub(crate) fn files(&self) -> impl Iterator<Item = &PathBuf> {
        self.data.iter().chain(&self.tokenizer)
    }

    /// The data file, which must be given.
    pub(crate) fn open(&self, label: Option<&str>) -> Result<DataFile> {
        let path = self.data.as_deref().ok_or_else(|| Usage("--data is needed".to_owned()))?;
        Ok(DataFile::open(&self.file_at(path, label))?)
    }

    /// What makes sequences of at most `max_seq` tokens out of texts.
    pub(crate) fn encoder(&self, max_seq: usize, overlong: Overlong) -> Result<TextEncoder> {
        Ok(TextEncoder::new(self.tokenizer.as_deref(), max_seq, overlong)?)
    }
}

/// All of a file's texts, for models whose tables of words have so many rows.
pub(crate) fn read_texts(file: &DataFile, encoder: &TextEncoder, rows: Option<usize>) -> Result<Texts> {
    all_texts(file, read_sequences(file, encoder)?, encoder, rows)
}

/// The same of pairs of which each text is read alone: two sequences a pair.
pub(crate) fn read_pair_texts(file: &DataFile, encoder: &TextEncoder, rows: Option<usize>) -> Result<Texts> {
    all_texts(file, read_pairs(file, encoder)?, encoder, rows)
}

fn all_texts(
    file: &DataFile,
    (sequences, skipped): (Vec<Sequence>, Skipped),
    encoder: &TextEncoder,
    rows: Option<usize>,
) -> Result<Texts> {
    let mut texts = Texts::new(file.path(), sequences, encoder, rows)?;
    texts.notes.extend(file.notes());
    texts.notes.extend(skipped.note(file.path()));
    Ok(texts)
}

/// The text of an option, likewise.
pub(crate) fn one_text(content: Content, encoder: &TextEncoder, rows: Option<usize>) -> Result<Texts> {
    let source = Path::new("--text");
    let sequence = encoder.encode(source, Example { content, label: None, line: 1 })?;
    Texts::new(source, vec![sequence], encoder, rows)
}

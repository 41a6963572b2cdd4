//! Texts to token ids.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use tokenizers::utils::truncation::truncate_encodings;
use tokenizers::{Encoding, PostProcessor as _, Tokenizer, TruncationParams};

use super::reader::{Content, Example};
use crate::{Error, Result, Setting};

/// Bytes of a tokenizer's file: those of the largest vocabularies have some tens of megabytes.
const LARGEST: u64 = 256 << 20;

/// What a model reads of one example, without padding.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    /// Token ids.
    pub ids: Vec<i64>,
    /// Token types, as many.
    pub types: Vec<i64>,
    /// The example's label, as written.
    pub label: Option<String>,
    /// The example's line in its file.
    pub line: usize,
    /// Whether the text was cut.
    pub truncated: bool,
    /// Whether it is no text at all, but random tokens.
    pub made_up: bool,
}

#[cfg(test)]
impl Sequence {
    /// For tests: a text of so many tokens, all the same.
    pub(crate) fn with_length(length: usize) -> Self {
        Self { ids: vec![1; length], types: vec![0; length], label: None, line: 1, truncated: false, made_up: false }
    }
}

/// What happens to a text with more tokens than the model takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overlong {
    /// It is cut.
    Truncate,
    /// It is an error.
    Refuse,
}

/// A tokenizer, and how many tokens a sequence may have. The padding and truncation of the tokenizer's own file are
/// not used.
#[derive(Debug)]
pub struct TextEncoder {
    tokenizer: Option<Tokenizer>,
    path: PathBuf,
    longest: usize,
    overlong: Overlong,
}

impl TextEncoder {
    /// Reads a `tokenizer.json`. Without one only ready token ids can be encoded.
    ///
    /// # Errors
    /// The file is no tokenizer, or `longest` leaves no room beside its special tokens.
    pub fn new(path: Option<&Path>, longest: usize, overlong: Overlong) -> Result<Self> {
        let Some(path) = path else {
            return Ok(Self { tokenizer: None, path: PathBuf::new(), longest, overlong });
        };
        let fault = |reason: String| Error::Tokenizer { path: path.to_owned(), reason };
        let mut bytes = Vec::new();
        let read = File::open(path).and_then(|file| file.take(LARGEST + 1).read_to_end(&mut bytes));
        read.map_err(|e| fault(format!("cannot be read: {e}")))?;
        if bytes.len() as u64 > LARGEST {
            return Err(fault(format!("larger than {} MiB, which no tokenizer.json is", LARGEST >> 20)));
        }
        let mut tokenizer = Tokenizer::from_bytes(&bytes)
            .map_err(|e| fault(format!("not a tokenizer.json of the tokenizers library: {e}")))?;
        tokenizer.with_padding(None);
        // Checked here: the library subtracts without looking.
        let special = tokenizer.get_post_processor().map_or(0, |p| p.added_tokens(true));
        if longest <= special {
            let reason = format!("{longest} tokens leave no room for text beside its {special} special tokens");
            return Err(fault(reason));
        }
        tokenizer.with_truncation(None).map_err(|e| fault(e.to_string()))?;
        Ok(Self { tokenizer: Some(tokenizer), path: path.to_owned(), longest, overlong })
    }

    /// The longest sequence it makes.
    pub fn longest(&self) -> usize {
        self.longest
    }

    /// The special tokens that it puts before a text and after it.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn frame(&self) -> Result<(Vec<i64>, Vec<i64>)> {
        let Some(tokenizer) = &self.tokenizer else { return Ok(Default::default()) };
        let encoding = tokenizer
            .encode_fast("a", true)
            .map_err(|e| Error::Tokenizer { path: self.path.clone(), reason: e.to_string() })?;
        let special = encoding.get_special_tokens_mask();
        let is_text = |mask: &u32| *mask == 0;
        let first = special.iter().position(is_text).unwrap_or(special.len());
        let last = special.iter().rposition(is_text).map_or(first, |at| at + 1);
        let widen = |ids: &[u32]| ids.iter().map(|&id| i64::from(id)).collect();
        Ok((widen(&encoding.get_ids()[..first]), widen(&encoding.get_ids()[last..])))
    }

    /// The longer text of a pair is cut first. What is cut off is dropped at once: the library would join every window
    /// that is left of the one text with every window of the other.
    fn encode_text(
        &self,
        tokenizer: &Tokenizer,
        text: String,
        pair: Option<String>,
    ) -> tokenizers::Result<(Encoding, bool)> {
        let mut first = tokenizer.encode_fast(text, false)?;
        let mut second = pair.map(|pair| tokenizer.encode_fast(pair, false)).transpose()?;
        if let Some(second) = &mut second {
            second.set_type_ids(vec![1; second.len()]);
        }
        let special = tokenizer.get_post_processor().map_or(0, |p| p.added_tokens(second.is_some()));
        let room = self.longest.saturating_sub(special);
        let tokens = first.len() + second.as_ref().map_or(0, Encoding::len);
        let truncated = self.overlong == Overlong::Truncate && tokens > room;
        if truncated {
            let params = TruncationParams { max_length: room, ..TruncationParams::default() };
            (first, second) = truncate_encodings(first, second, &params)?;
            first.set_overflowing(Vec::new());
            if let Some(second) = &mut second {
                second.set_overflowing(Vec::new());
            }
        }
        Ok((tokenizer.post_process(first, second, true)?, truncated))
    }

    /// Makes token ids of an example of `file`.
    ///
    /// # Errors
    /// There is text but no tokenizer, the tokenizer fails, or the text is too long and must not be cut.
    pub fn encode(&self, file: &Path, example: Example) -> Result<Sequence> {
        let Example { content, label, line } = example;
        let (ids, types, truncated) = match content {
            Content::Ids { mut ids, mut types } => {
                let long = ids.len() > self.longest;
                if long && self.overlong == Overlong::Truncate {
                    ids.truncate(self.longest);
                    types.truncate(self.longest);
                }
                (ids, types, long)
            }
            Content::Text { text, pair } => {
                let Some(tokenizer) = &self.tokenizer else {
                    let reason = "it holds text: give the model's tokenizer.json";
                    return Err(Error::data(file, reason).helped_by(&[Setting::Tokenizer]));
                };
                let (encoding, truncated) = self
                    .encode_text(tokenizer, text, pair)
                    .map_err(|e| Error::Tokenizer { path: self.path.clone(), reason: e.to_string() })?;
                let widen = |values: &[u32]| values.iter().map(|&v| i64::from(v)).collect::<Vec<i64>>();
                (widen(encoding.get_ids()), widen(encoding.get_type_ids()), truncated)
            }
        };
        if ids.is_empty() {
            return Err(Error::line(file, line, "no tokens are left of it"));
        }
        if ids.len() > self.longest {
            let reason =
                format!("{} tokens, the model takes {}; shorten the text or have it cut", ids.len(), self.longest);
            return Err(Error::line(file, line, reason).helped_by(&[Setting::Truncate]));
        }
        Ok(Sequence { ids, types, label, line, truncated, made_up: false })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/bert-mini-sst2/tokenizer.json")
    }

    /// Cut or not, ids and types are those of the library's own way.
    #[test]
    fn texts_are_cut_as_the_library_cuts_them() {
        let long = "a film that is as good as it is long ".repeat(4);
        let texts = [("a good film", None), (&long, None), ("short", Some(&long)), (&long, Some(&long)), (&long, None)];
        for longest in [8, 17, 64, 500] {
            let encoder = TextEncoder::new(Some(&tokenizer()), longest, Overlong::Truncate).unwrap();
            let mut library = Tokenizer::from_file(tokenizer()).unwrap();
            library.with_padding(None);
            let params = TruncationParams { max_length: longest, ..TruncationParams::default() };
            library.with_truncation(Some(params)).unwrap();
            for (text, pair) in &texts {
                let content = Content::Text { text: (*text).to_owned(), pair: pair.map(|p| (*p).to_owned()) };
                let found = encoder.encode(Path::new("x"), Example { content, label: None, line: 1 }).unwrap();
                let expected = match pair {
                    Some(pair) => library.encode((*text, pair.as_str()), true).unwrap(),
                    None => library.encode(*text, true).unwrap(),
                };
                let widen = |values: &[u32]| values.iter().map(|&v| i64::from(v)).collect::<Vec<_>>();
                assert_eq!((found.ids, found.types), (widen(expected.get_ids()), widen(expected.get_type_ids())));
                assert_eq!(found.truncated, !expected.get_overflowing().is_empty());
            }
        }
    }
}

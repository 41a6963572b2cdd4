//! Texts to token ids.

use std::collections::HashSet;
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use tokenizers::utils::truncation::truncate_encodings;
use tokenizers::{Encoding, InputSequence, PostProcessor as _, Tokenizer, TruncationParams};

use super::label::Label;
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
    /// The example's label, where labels are read.
    pub label: Option<Label>,
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
    pad: i64,
}

/// What padding is called, where a tokenizer's file does not say.
const PADDING: [&str; 2] = ["[PAD]", "<pad>"];
/// What stands for what a tokenizer does not know.
const UNKNOWN: [&str; 2] = ["[UNK]", "<unk>"];
/// What the family puts before a text and after it.
const FRAMES: [[&str; 2]; 2] = [["[CLS]", "[SEP]"], ["<s>", "</s>"]];

impl TextEncoder {
    /// Reads a `tokenizer.json`. Without one only ready token ids can be encoded.
    ///
    /// # Errors
    /// The file is no tokenizer, or `longest` leaves no room beside its special tokens.
    pub fn new(path: Option<&Path>, longest: usize, overlong: Overlong) -> Result<Self> {
        let Some(path) = path else {
            return Ok(Self { tokenizer: None, path: PathBuf::new(), longest, overlong, pad: 0 });
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
        let pad = tokenizer.get_padding().map(|padding| padding.pad_id).or_else(|| first_id(&tokenizer, &PADDING));
        tokenizer.with_padding(None);
        // Checked here: the library subtracts without looking.
        let special = tokenizer.get_post_processor().map_or(0, |p| p.added_tokens(true));
        if longest <= special {
            let reason = format!("{longest} tokens leave no room for text beside its {special} special tokens");
            return Err(fault(reason));
        }
        tokenizer.with_truncation(None).map_err(|e| fault(e.to_string()))?;
        let pad = i64::from(pad.unwrap_or(0));
        Ok(Self { tokenizer: Some(tokenizer), path: path.to_owned(), longest, overlong, pad })
    }

    /// The id that fills sequences up; 0 where no tokenizer tells.
    pub fn pad(&self) -> i64 {
        self.pad
    }

    /// Its special tokens, as those that stand around texts and for padding.
    pub(super) fn special(&self) -> HashSet<i64> {
        let added = self.tokenizer.iter().flat_map(|tokenizer| tokenizer.get_added_tokens_decoder());
        added.filter(|(_, token)| token.special).map(|(id, _)| i64::from(id)).collect()
    }

    /// The id of what the tokenizer does not know, if it has one.
    pub(super) fn unknown(&self) -> Option<i64> {
        first_id(self.tokenizer.as_ref()?, &UNKNOWN).map(i64::from)
    }

    /// What makes it doubtful that the tokenizer is that of a model whose table of words has so many rows.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn notes(&self, rows: usize) -> Result<Vec<String>> {
        let Some(tokenizer) = &self.tokenizer else { return Ok(Vec::new()) };
        let mut notes = Vec::new();
        let size = tokenizer.get_vocab_size(true);
        // Tables are often larger by a few, to be of a round size.
        if size > rows || rows - size > ROUNDING.max(size / 32) {
            notes.push(format!("it has {size} tokens, the model's table of words {rows} rows: is it this model's?"));
        }
        notes.extend(self.missing_frame(tokenizer)?);
        Ok(notes.into_iter().map(|note| format!("{}: {note}", self.path.display())).collect())
    }

    /// Says where it knows special tokens that it does not put around a text: the models of the family were trained with
    /// them.
    fn missing_frame(&self, tokenizer: &Tokenizer) -> Result<Option<String>> {
        let (before, after) = self.frame()?;
        let known = FRAMES.into_iter().filter_map(|[first, last]| {
            let id = |token: &str| tokenizer.token_to_id(token).map(i64::from);
            Some(([first, last], id(first)?, id(last)?))
        });
        let known: Vec<_> = known.collect();
        let is_used = |(_, first, last): &([&str; 2], i64, i64)| before.contains(first) && after.contains(last);
        Ok(match known.first() {
            Some(([first, last], ..)) if !known.iter().any(is_used) => Some(format!(
                "it does not put `{first}` before a text and `{last}` after it, though it knows them: a model that was \
                 trained with them reads other texts than it will be given. Save it again from the model's own, by \
                 `AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)`, or give it a `post_processor`"
            )),
            _ => None,
        })
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
        let encoding = tokenizer.encode_fast("a", true).map_err(|e| self.fault(e))?;
        let special = encoding.get_special_tokens_mask();
        let is_text = |mask: &u32| *mask == 0;
        let first = special.iter().position(is_text).unwrap_or(special.len());
        let last = special.iter().rposition(is_text).map_or(first, |at| at + 1);
        let widen = |ids: &[u32]| ids.iter().map(|&id| i64::from(id)).collect();
        Ok((widen(&encoding.get_ids()[..first]), widen(&encoding.get_ids()[last..])))
    }

    /// The longer text of a pair is cut first. What is cut off is dropped at once: the library would join every window
    /// that is left of the one text with every window of the other.
    pub(super) fn encode_text(
        &self,
        tokenizer: &Tokenizer,
        text: InputSequence<'_>,
        mut second: Option<Encoding>,
    ) -> tokenizers::Result<(Encoding, bool)> {
        // The fast way does not tell which word a token is of.
        let mut first = match text {
            InputSequence::Raw(_) => tokenizer.encode_fast(text, false)?,
            words => tokenizer.encode(words, false)?,
        };
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

    /// The tokenizer, which text of `file` needs.
    pub(super) fn tokenizer(&self, file: &Path) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| {
            let reason = "it holds text: give the model's tokenizer.json";
            Error::data(file, reason).helped_by(&[Setting::Tokenizer])
        })
    }

    pub(super) fn fault(&self, reason: impl ToString) -> Error {
        Error::Tokenizer { path: self.path.clone(), reason: reason.to_string() }
    }

    /// Makes token ids of an example of `file`. Labels of words, and of what stands in a context, become such of tokens.
    ///
    /// # Errors
    /// There is text but no tokenizer, the tokenizer fails, the text is too long and must not be cut, or there are more or
    /// fewer tags than words, or an answer that is not in its context.
    pub fn encode(&self, file: &Path, example: Example) -> Result<Sequence> {
        let Example { content, label, line } = example;
        let sequence = match content {
            Content::Ids { mut ids, mut types } => {
                let truncated = ids.len() > self.longest && self.overlong == Overlong::Truncate;
                if truncated {
                    ids.truncate(self.longest);
                    types.truncate(self.longest);
                }
                Sequence { ids, types, label, line, truncated, made_up: false }
            }
            Content::Text { text, pair } => match (label, pair) {
                (Some(Label::Answers(answers)), Some(context)) => {
                    self.answered(file, &text, &context, (&answers, line))?
                }
                (label, pair) => {
                    let tokenizer = self.tokenizer(file)?;
                    let pair = pair.map(|pair| tokenizer.encode_fast(pair, false)).transpose();
                    let encoded = pair.and_then(|pair| self.encode_text(tokenizer, text.into(), pair));
                    Self::sequence(encoded.map_err(|e| self.fault(e))?, label, line)
                }
            },
            Content::Words(words) => {
                if let Some(Label::Tags(tags)) = label {
                    return self.tagged(file, &words, tags, line);
                }
                let encoded = self.encode_text(self.tokenizer(file)?, words.into(), None);
                Self::sequence(encoded.map_err(|e| self.fault(e))?, label, line)
            }
        };
        self.checked(file, sequence)
    }

    pub(super) fn sequence((encoding, truncated): (Encoding, bool), label: Option<Label>, line: usize) -> Sequence {
        let widen = |values: &[u32]| values.iter().map(|&v| i64::from(v)).collect::<Vec<i64>>();
        let (ids, types) = (widen(encoding.get_ids()), widen(encoding.get_type_ids()));
        Sequence { ids, types, label, line, truncated, made_up: false }
    }

    pub(super) fn checked(&self, file: &Path, sequence: Sequence) -> Result<Sequence> {
        let tokens = sequence.ids.len();
        if tokens == 0 {
            return Err(Error::line(file, sequence.line, "no tokens are left of it"));
        }
        if tokens > self.longest {
            let reason = format!("{tokens} tokens, the model takes {}; shorten the text or have it cut", self.longest);
            return Err(Error::line(file, sequence.line, reason).helped_by(&[Setting::Truncate]));
        }
        Ok(sequence)
    }

    /// Makes token ids of a text in words, and says where each word begins; `None` where it was cut off, or has no token.
    ///
    /// # Errors
    /// As those of [`Self::encode`].
    pub fn encode_words(
        &self,
        file: &Path,
        words: &[String],
        label: Option<Label>,
        line: usize,
    ) -> Result<(Sequence, Vec<Option<usize>>)> {
        let encoded = self.encode_text(self.tokenizer(file)?, words.into(), None);
        let encoded = encoded.map_err(|e| self.fault(e))?;
        let mut places = vec![None; words.len()];
        for (token, word) in encoded.0.get_word_ids().iter().enumerate().rev() {
            if let Some(place) = word.and_then(|word| places.get_mut(word as usize)) {
                *place = Some(token);
            }
        }
        Ok((self.checked(file, Self::sequence(encoded, label, line))?, places))
    }

    /// The names of a model's classes, in their order, as the `config.json` beside the tokenizer has them.
    pub(crate) fn class_names(&self) -> Option<Vec<String>> {
        let mut text = String::new();
        let file = File::open(self.path.parent()?.join("config.json")).ok()?;
        file.take(LARGEST).read_to_string(&mut text).ok()?;
        let config: serde_json::Value = serde_json::from_str(&text).ok()?;
        let names = config.get("id2label")?.as_object()?;
        (0..names.len()).map(|at| names.get(&at.to_string())?.as_str().map(str::to_owned)).collect()
    }
}

/// Rows that a table may have for no token.
const ROUNDING: usize = 128;

/// The id of the first of these tokens that is known.
fn first_id(tokenizer: &Tokenizer, tokens: &[&str]) -> Option<u32> {
    tokens.iter().find_map(|token| tokenizer.token_to_id(token))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The tokenizer of the tests, changed.
    fn changed(change: impl Fn(&mut serde_json::Value)) -> TextEncoder {
        let mut json = serde_json::from_slice(&std::fs::read(tokenizer()).unwrap()).unwrap();
        change(&mut json);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tokenizer.json");
        std::fs::write(&path, json.to_string()).unwrap();
        TextEncoder::new(Some(&path), 16, Overlong::Truncate).unwrap()
    }

    #[test]
    fn a_tokenizer_that_leaves_out_the_special_tokens_is_doubted() {
        const ROWS: usize = 4096;
        let notes = |change: &dyn Fn(&mut serde_json::Value)| changed(change).notes(ROWS).unwrap();
        assert_eq!(notes(&|_| {}), [""; 0]);
        let without = |json: &mut serde_json::Value| json["post_processor"] = serde_json::Value::Null;
        // A template that puts nothing around a text, as plain as none.
        let plain = |json: &mut serde_json::Value| {
            let text = |id: &str, kind: u8| serde_json::json!({ "Sequence": { "id": id, "type_id": kind } });
            json["post_processor"] = serde_json::json!({
                "type": "TemplateProcessing", "single": [text("A", 0)], "pair": [text("A", 0), text("B", 1)],
                "special_tokens": {},
            });
        };
        for change in [&without as &dyn Fn(&mut serde_json::Value), &plain] {
            let notes = notes(change);
            assert!(notes.len() == 1 && notes[0].contains("`[CLS]` before a text"), "{notes:?}");
        }
        let wrong = changed(|_| {});
        assert!(wrong.notes(ROWS - 1).unwrap()[0].contains("4096 tokens, the model's table of words 4095 rows"));
        assert_eq!(wrong.notes(ROWS + 100).unwrap(), [""; 0]);
        assert_eq!(wrong.notes(ROWS + 2000).unwrap().len(), 1);
    }

    #[test]
    fn padding_is_the_tokenizers() {
        let [named, section] = [7, 9];
        let rename = |json: &mut serde_json::Value, from: &str, to: &str| {
            let vocabulary = json["model"]["vocab"].as_object_mut().unwrap();
            let id = vocabulary.remove(from).unwrap();
            vocabulary.insert(to.to_owned(), id);
        };
        let moved = changed(|json| {
            let tokens = json["model"]["vocab"].as_object_mut().unwrap();
            let other = tokens.iter().find(|(_, id)| **id == named).unwrap().0.clone();
            let pad = tokens["[PAD]"].clone();
            tokens.insert(other, pad);
            tokens.insert("[PAD]".to_owned(), named.into());
            json["added_tokens"] = serde_json::json!([]);
            json["padding"] = serde_json::Value::Null;
        });
        assert_eq!(moved.pad(), named);
        let none = changed(|json| {
            json["added_tokens"] = serde_json::json!([]);
            json["padding"] = serde_json::Value::Null;
            rename(json, "[PAD]", "nothing");
        });
        assert_eq!(none.pad(), 0);
        let padding = serde_json::json!({
            "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": null, "pad_id": section,
            "pad_type_id": 0, "pad_token": "[PAD]",
        });
        assert_eq!(changed(|json| json["padding"] = padding.clone()).pad(), section);
        assert_eq!(TextEncoder::new(None, 16, Overlong::Truncate).unwrap().pad(), 0);
    }

    fn tokenizer() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/bert-mini-sst2/tokenizer.json")
    }

    #[test]
    fn words_are_found_by_their_first_token() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let encode = |longest: usize, text: &str| {
            let encoder = TextEncoder::new(Some(&tokenizer()), longest, Overlong::Truncate).unwrap();
            encoder.encode_words(Path::new("x"), &words(text), None, 1).unwrap()
        };
        let (plain, _) = encode(64, "unflinchingly bleak");
        assert!(plain.ids.len() > 4, "the first word has several tokens");
        let (sequence, places) = encode(64, "unflinchingly bleak and desperate");
        assert_eq!(places[0], Some(1));
        assert_eq!(places[1], Some(encode(64, "unflinchingly").0.ids.len() - 1));
        assert!(places.windows(2).all(|pair| pair[0] < pair[1]) && !sequence.truncated);
        let (cut, places) = encode(plain.ids.len(), "unflinchingly bleak and desperate");
        assert!(cut.truncated && places[..2].iter().all(Option::is_some));
        assert_eq!(places[2..], [None, None]);
        // What is no character of a text has no token.
        assert_eq!(encode(64, "a \u{200b} b").1, [Some(1), None, Some(2)]);
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

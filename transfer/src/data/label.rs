//! What examples are labelled with.

use std::path::Path;

use serde_json::Value;

use super::columns::Columns;
use crate::{Error, Result, Setting};

/// What an example is labelled with.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Label {
    /// A number, as written: a class, or a value.
    One(String),
    /// Any number of classes, each as written; or as many zeros and ones as there are classes.
    Several(Vec<String>),
    /// Of each class, in their order, whether it is one of the text's.
    Marks(Vec<bool>),
    /// A tag a word, as written.
    Tags(Vec<String>),
    /// The same where words have become tokens: the place of a word's first token, and the word's tag.
    TokenTags(Vec<(usize, String)>),
    /// What a question's answer may be.
    Answers(Answers),
    /// The same where the context has become tokens: the places of the first and the last of the answer, both 0 where
    /// there is none.
    Span(usize, usize),
}

/// The answers to a question about a text.
#[derive(Clone, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Answers {
    /// Any of these is right.
    pub texts: Vec<String>,
    /// Where they begin in the context, in characters, as far as that is told.
    pub starts: Vec<usize>,
    /// Whether the text is said to hold no answer.
    pub is_impossible: bool,
}

impl Label {
    /// The number, where it is one.
    pub fn one(&self) -> Option<&str> {
        match self {
            Self::One(label) => Some(label),
            _ => None,
        }
    }

    /// What it is, for messages.
    pub(crate) fn noun(&self) -> &'static str {
        match self {
            Self::One(_) => "one class or value",
            Self::Several(_) | Self::Marks(_) => "several classes",
            Self::Tags(_) | Self::TokenTags(_) => "a tag a word",
            Self::Answers(_) | Self::Span(..) => "answers",
        }
    }

    /// Out of the cell of a table: a list where it is written as one.
    pub(super) fn of_cell(columns: &Columns, path: &Path, line: usize, cell: &str) -> Result<Self> {
        let cell = cell.trim();
        if !cell.starts_with('[') {
            return Ok(Self::One(columns.label(path, line, cell)?));
        }
        // Python writes its lists with other marks than JSON.
        let list =
            serde_json::from_str::<Vec<Value>>(cell).or_else(|_| serde_json::from_str(&cell.replace('\'', "\"")));
        let list =
            list.map_err(|_| Error::line(path, line, format!("label `{cell}` begins like a list, and is none")))?;
        Self::of_list(columns, path, line, &list)
    }

    /// Several classes out of a list of numbers, words or truth values.
    pub(super) fn of_list(columns: &Columns, path: &Path, line: usize, list: &[Value]) -> Result<Self> {
        let class = |value: &Value| {
            let text = scalar(value);
            let text = text.ok_or_else(|| Error::line(path, line, format!("a list of labels holds {value}")));
            // Zeros and ones may stand for as many classes.
            match value {
                Value::String(_) => columns.label(path, line, &text?),
                _ => text,
            }
        };
        Ok(Self::Several(list.iter().map(class).collect::<Result<_>>()?))
    }

    /// Out of columns of zeros and ones.
    pub(super) fn of_marks<'c>(path: &Path, line: usize, cells: impl Iterator<Item = &'c str>) -> Result<Self> {
        let mark = |cell: &str| match cell.trim().to_ascii_lowercase().as_str() {
            "0" | "0.0" | "false" => Ok(false),
            "1" | "1.0" | "true" => Ok(true),
            other => {
                Err(Error::line(path, line, format!("`{other}` is neither 0 nor 1, as columns of several labels are"))
                    .helped_by(&[Setting::LabelColumn]))
            }
        };
        Ok(Self::Marks(cells.map(mark).collect::<Result<_>>()?))
    }
}

/// A number, word or truth value as text.
pub(super) fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(value) => Some(u8::from(*value).to_string()),
        _ => None,
    }
}

/// Answers as `datasets` keeps them, `{"text": [...], "answer_start": [...]}`, or as SQuAD's file does, a list of
/// `{"text": ..., "answer_start": ...}`; `None` for anything else.
pub(super) fn answers(value: &Value, is_impossible: bool) -> Option<Answers> {
    let number = |value: &Value| value.as_u64().and_then(|number| usize::try_from(number).ok());
    let text = |value: &Value| value.as_str().map(str::to_owned);
    // What is no number says nothing: the text is looked for.
    let numbers = |list: &[Value]| list.iter().map(number).collect::<Option<Vec<usize>>>().unwrap_or_default();
    let (texts, starts) = match value {
        Value::Object(keys) => {
            let texts = match keys.get("text")? {
                Value::Array(texts) => texts.iter().map(text).collect::<Option<_>>()?,
                Value::String(text) => vec![text.clone()],
                _ => return None,
            };
            let starts = match keys.get("answer_start") {
                Some(Value::Array(starts)) => numbers(starts),
                Some(start) => numbers(std::slice::from_ref(start)),
                None => Vec::new(),
            };
            (texts, starts)
        }
        Value::Array(list) => {
            let texts = list.iter().map(|answer| text(answer.get("text")?)).collect::<Option<Vec<_>>>()?;
            let starts = list.iter().map(|answer| number(answer.get("answer_start")?)).collect::<Option<_>>();
            (texts, starts.unwrap_or_default())
        }
        Value::Null => (Vec::new(), Vec::new()),
        _ => return None,
    };
    let (texts, starts) = if is_impossible { (Vec::new(), Vec::new()) } else { (texts, starts) };
    Some(Answers { is_impossible: texts.is_empty(), texts, starts })
}

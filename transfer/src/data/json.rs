//! Examples out of JSON: an object a line, objects in an array, or one object that holds them all.

use std::path::Path;

use serde_json::{Map, Value};

use super::columns::{Columns, USUAL_WORDS};
use super::label::{self, Label};
use super::lines::NumberedLines;
use super::objects::Objects;
use super::reader::{Content, Example, Row, unreadable};
use super::source::DataFile;
use crate::{Error, Result, Setting};

/// A file as it is read.
pub(super) enum Json {
    /// An object a line: a fault in one line is no other's.
    Lines(NumberedLines),
    /// Objects in an array, or one after another.
    Objects(Objects),
    /// What was in a single object; rows are counted in place of lines.
    Rows(std::iter::Enumerate<std::vec::IntoIter<Keys>>),
}

type Keys = Map<String, Value>;

impl Json {
    pub(super) fn open(file: &DataFile) -> Result<Self> {
        let lines = || Ok(Self::Lines(NumberedLines::new(file.text()?)));
        let mut objects = Objects::new(file.text()?);
        let first = match objects.next() {
            _ if objects.is_array() => return Ok(Self::Objects(Objects::new(file.text()?))),
            Some((line, Ok(text))) if text.starts_with('{') => (line, text),
            _ => return lines(),
        };
        let is_one_line = objects.line() == first.0;
        match (objects.next(), is_one_line) {
            (Some(_), true) => lines(),
            (Some(_), false) => Ok(Self::Objects(Objects::new(file.text()?))),
            (None, _) => {
                let rows = rows(file, keys(file.path(), first.0, &first.1)?)?;
                Ok(Self::Rows(rows.into_iter().enumerate()))
            }
        }
    }

    pub(super) fn next(&mut self, path: &Path, columns: &Columns) -> Option<Result<Row>> {
        let (line, text) = match self {
            Self::Lines(lines) => lines.next()?,
            Self::Objects(objects) => objects.next()?,
            Self::Rows(rows) => {
                let (at, keys) = rows.next()?;
                return Some(Object { path, line: at + 1, keys }.row(columns));
            }
        };
        let text = match text {
            Ok(text) => text,
            Err(e) => return Some(Err(unreadable(path, line, &e))),
        };
        Some(keys(path, line, &text).and_then(|keys| Object { path, line, keys }.row(columns)))
    }
}

/// The key that holds the tags of words, or answers, told by the first object.
pub(super) fn usual_label(file: &DataFile) -> Result<Option<&'static str>> {
    let first = match Json::open(file)? {
        Json::Lines(mut lines) => lines.next().and_then(|(_, text)| text.ok()),
        Json::Objects(mut objects) => objects.next().and_then(|(_, text)| text.ok()),
        Json::Rows(mut rows) => return Ok(rows.next().and_then(|(_, keys)| usual_label_among(&keys))),
    };
    // What is wrong with it is said where it is read.
    Ok(first.and_then(|text| usual_label_among(&serde_json::from_str::<Keys>(&text).ok()?)))
}

fn usual_label_among(keys: &Keys) -> Option<&'static str> {
    if ["question", "context", "answers"].iter().all(|name| keys.contains_key(*name)) {
        return Some("answers");
    }
    let has_words = keys.get(USUAL_WORDS).is_some_and(is_words);
    USUAL_TAGS.into_iter().find(|name| has_words && keys.get(*name).is_some_and(Value::is_array))
}

/// Keys of tags, as the usual sets call them.
const USUAL_TAGS: [&str; 4] = ["ner_tags", "tags", "labels", "pos_tags"];

fn is_words(value: &Value) -> bool {
    value.as_array().is_some_and(|words| words.iter().all(Value::is_string))
}

fn keys(path: &Path, line: usize, text: &str) -> Result<Keys> {
    match serde_json::from_str(text) {
        Ok(Value::Object(keys)) => Ok(keys),
        Ok(_) => Err(Error::line(path, line, "not a JSON object")),
        Err(e) => Err(Error::line(path, line, format!("not a JSON object: {e}"))),
    }
}

/// The rows that a single object holds: under `data`, or a list for each key, as pandas and `datasets` write them; or it is
/// a row itself.
fn rows(file: &DataFile, keys: Keys) -> Result<Vec<Keys>> {
    if let Some(Value::Array(data)) = keys.get("data") {
        if data.iter().any(|article| article.get("paragraphs").is_some_and(Value::is_array)) {
            return questions(file.path(), data);
        }
        return data.iter().enumerate().map(|(at, row)| row_of_data(file, &keys, at, row)).collect();
    }
    let columns = file.columns();
    let ids = (columns.text.is_none() && keys.contains_key("input_ids")).then(|| "input_ids".to_owned());
    let Some(named) = ids.or_else(|| Some(columns.texts(&|name| keys.contains_key(name))?.0)) else {
        return Ok(vec![keys]);
    };
    let is_column = |value: &Value| match value {
        // Ready ids are a list themselves.
        Value::Array(values) => named != "input_ids" || values.iter().all(Value::is_array),
        Value::Object(_) => true,
        _ => false,
    };
    match keys.get(&named) {
        Some(values) if is_column(values) => rows_of_columns(file.path(), &keys, &named),
        _ => Ok(vec![keys]),
    }
}

/// The questions of SQuAD's file, each with its context.
fn questions(path: &Path, articles: &[Value]) -> Result<Vec<Keys>> {
    let mut rows = Vec::new();
    for (at, article) in articles.iter().enumerate() {
        let fault = |what: &str| Error::data(path, format!("article {} of its `data` has {what}", at + 1));
        let list = |value: &Value, name: &str| {
            value.get(name).and_then(Value::as_array).cloned().ok_or_else(|| fault(&format!("no list `{name}`")))
        };
        for paragraph in list(article, "paragraphs")? {
            let context = paragraph.get("context").cloned().ok_or_else(|| fault("a paragraph without `context`"))?;
            for question in list(&paragraph, "qas")? {
                let Value::Object(mut row) = question else { return Err(fault("a question that is no object")) };
                row.insert("context".to_owned(), context.clone());
                rows.push(row);
            }
        }
    }
    Ok(rows)
}

/// A row of `data`: an object, or values in the order of `columns`.
fn row_of_data(file: &DataFile, keys: &Keys, at: usize, row: &Value) -> Result<Keys> {
    let names = keys.get("columns").and_then(Value::as_array);
    match (row, names) {
        (Value::Object(row), _) => Ok(row.clone()),
        (Value::Array(values), Some(names)) if values.len() == names.len() => {
            let name = |name: &Value| name.as_str().map_or_else(|| name.to_string(), str::to_owned);
            Ok(names.iter().map(name).zip(values.iter().cloned()).collect())
        }
        _ => Err(Error::line(file.path(), at + 1, "what `data` holds there is no JSON object")),
    }
}

/// Rows out of lists, or of pandas' objects from row numbers to values; what is neither belongs to no row.
fn rows_of_columns(path: &Path, keys: &Keys, named: &str) -> Result<Vec<Keys>> {
    let values = |value: &Value| -> Option<Vec<Value>> {
        match value {
            Value::Array(values) => Some(values.clone()),
            Value::Object(values) => Some(values.values().cloned().collect()),
            _ => None,
        }
    };
    let columns: Vec<(&String, Vec<Value>)> =
        keys.iter().filter_map(|(name, value)| Some((name, values(value)?))).collect();
    let count = keys.get(named).and_then(values).map_or(0, |values| values.len());
    if let Some((other, values)) = columns.iter().find(|(_, values)| values.len() != count) {
        let reason = format!("`{named}` holds {count} values, `{other}` {}", values.len());
        return Err(Error::data(path, reason));
    }
    let row = |at: usize| columns.iter().map(|(name, values)| ((*name).clone(), values[at].clone())).collect();
    Ok((0..count).map(row).collect())
}

/// One row of a file.
struct Object<'l> {
    path: &'l Path,
    line: usize,
    keys: Keys,
}

impl Object<'_> {
    /// The example that it holds: a text, or ready `input_ids`.
    fn row(&self, columns: &Columns) -> Result<Row> {
        let ids = if columns.text.is_none() { self.integers("input_ids")? } else { None };
        let content = match (ids, self.words(columns)) {
            (Some(ids), _) => Some(self.ids(ids)?),
            (None, Some(words)) => (!words.is_empty()).then_some(Content::Words(words)),
            (None, None) => self.text(columns)?,
        };
        let Some(content) = content else { return Ok(Row::Without(self.line)) };
        let label = match columns.labels(&|name| self.keys.contains_key(name)).as_slice() {
            [] => None,
            [name] => Some(self.label(name, &content, columns)?),
            several => Some(self.marks(several)?),
        };
        Ok(Row::Example(Example { content, label, line: self.line }))
    }

    fn fault(&self, reason: String) -> Error {
        Error::line(self.path, self.line, reason)
    }

    fn listed(&self) -> String {
        self.keys.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
    }

    fn missing(&self, name: &str) -> Error {
        self.fault(format!("there is no key `{name}`; it has {}", self.listed()))
    }

    /// A text; `None` where there is none in it.
    fn string(&self, name: &str) -> Result<Option<String>> {
        match self.keys.get(name) {
            Some(Value::String(s)) => Ok((!s.trim().is_empty()).then(|| s.clone())),
            Some(Value::Null) => Ok(None),
            Some(other) => Err(self.fault(format!("`{name}` is {other}, a text is needed"))),
            None => Err(self.missing(name)),
        }
    }

    /// A word of the classes, a number, or a truth value; a list of them; a tag a word; or answers.
    fn label(&self, name: &str, content: &Content, columns: &Columns) -> Result<Label> {
        let value = self.keys.get(name).ok_or_else(|| self.missing(name))?;
        let unusable = || self.fault(format!("label `{name}` is {value}: a number, a word or a list is needed"));
        let is_impossible = self.keys.get("is_impossible").and_then(Value::as_bool).unwrap_or(false);
        match value {
            Value::String(s) => Ok(Label::One(columns.label(self.path, self.line, s)?)),
            Value::Array(tags) if matches!(content, Content::Words(_)) => {
                let tags: Option<Vec<String>> = tags.iter().map(label::scalar).collect();
                Ok(Label::Tags(tags.ok_or_else(unusable)?))
            }
            Value::Array(list) if name != "answers" => Label::of_list(columns, self.path, self.line, list),
            Value::Number(_) | Value::Bool(_) => Ok(Label::One(label::scalar(value).ok_or_else(unusable)?)),
            answers => Ok(Label::Answers(label::answers(answers, is_impossible).ok_or_else(unusable)?)),
        }
    }

    /// Zeros and ones, a key a class.
    fn marks(&self, names: &[String]) -> Result<Label> {
        let mark = |name: &String| {
            let value = self.keys.get(name).ok_or_else(|| self.missing(name))?;
            Ok(label::scalar(value).unwrap_or_else(|| value.to_string()))
        };
        let marks = names.iter().map(mark).collect::<Result<Vec<_>>>()?;
        Label::of_marks(self.path, self.line, marks.iter().map(String::as_str))
    }

    /// The words of a text that comes in words.
    fn words(&self, columns: &Columns) -> Option<Vec<String>> {
        let value = self.keys.get(columns.text.as_deref().unwrap_or(USUAL_WORDS))?;
        let words = value.as_array().filter(|_| is_words(value))?;
        Some(words.iter().filter_map(|word| word.as_str().map(str::to_owned)).collect())
    }

    fn integers(&self, name: &str) -> Result<Option<Vec<i64>>> {
        let Some(value) = self.keys.get(name) else { return Ok(None) };
        let list = value.as_array().and_then(|a| a.iter().map(Value::as_i64).collect::<Option<Vec<i64>>>());
        list.map(Some).ok_or_else(|| self.fault(format!("`{name}` is not a list of integers")))
    }

    fn ids(&self, ids: Vec<i64>) -> Result<Content> {
        let beside = |name: &str, default: i64| -> Result<Vec<i64>> {
            let values = self.integers(name)?.unwrap_or_else(|| vec![default; ids.len()]);
            match values.len() == ids.len() {
                true => Ok(values),
                false => Err(self.fault(format!("{} in `input_ids`, but {} in `{name}`", ids.len(), values.len()))),
            }
        };
        let (types, mask) = (beside("token_type_ids", 0)?, beside("attention_mask", 1)?);
        let real = |values: &[i64]| values.iter().zip(&mask).filter(|(_, keep)| **keep != 0).map(|(v, _)| *v).collect();
        Ok(Content::Ids { ids: real(&ids), types: real(&types) })
    }

    /// The text, or the two of a pair; `None` where one of them is missing.
    fn text(&self, columns: &Columns) -> Result<Option<Content>> {
        let (text, pair) = columns.texts(&|name| self.keys.contains_key(name)).ok_or_else(|| {
            let reason = format!("which key holds the text? It has {}, and no `input_ids`", self.listed());
            self.fault(reason).helped_by(&[Setting::TextColumn])
        })?;
        let (text, second) = (self.string(&text)?, pair.as_ref().map(|name| self.string(name)).transpose()?);
        Ok(match (text, second) {
            (Some(text), None) => Some(Content::Text { text, pair: None }),
            (Some(text), Some(Some(second))) => Some(Content::Text { text, pair: Some(second) }),
            _ => None,
        })
    }
}

//! Examples out of JSON: an object a line, objects in an array, or one object that holds them all.

use std::path::Path;

use serde_json::{Map, Value};

use super::columns::Columns;
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
        let content = match ids {
            Some(ids) => Some(self.ids(ids)?),
            None => self.text(columns)?,
        };
        let Some(content) = content else { return Ok(Row::Without(self.line)) };
        let label = columns.label.as_ref().map(|name| self.label(name, columns)).transpose()?;
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

    /// A word of the classes, a number, or a truth value.
    fn label(&self, name: &str, columns: &Columns) -> Result<String> {
        match self.keys.get(name) {
            Some(Value::String(s)) => columns.label(self.path, self.line, s),
            Some(Value::Number(number)) => Ok(number.to_string()),
            Some(Value::Bool(value)) => Ok(u8::from(*value).to_string()),
            Some(other) => Err(self.fault(format!("label `{name}` is {other}, one number or word is needed"))),
            None => Err(self.missing(name)),
        }
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

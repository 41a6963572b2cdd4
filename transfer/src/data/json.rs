//! Examples out of JSON, an object a line.

use std::path::Path;

use serde_json::{Map, Value};

use super::columns::Columns;
use super::reader::{Content, Example};
use crate::{Error, Result};

/// One line of a file.
struct Object<'l> {
    path: &'l Path,
    line: usize,
    keys: Map<String, Value>,
}

/// The example that a line holds: a text, or ready `input_ids`.
pub(super) fn example(path: &Path, line: usize, text: &str, columns: &Columns) -> Result<Example> {
    let fault = |reason: String| Error::line(path, line, reason);
    let value: Value = serde_json::from_str(text).map_err(|e| fault(format!("not a JSON object: {e}")))?;
    let Value::Object(keys) = value else { return Err(fault("not a JSON object".to_owned())) };
    let object = Object { path, line, keys };
    let label = columns.label.as_ref().map(|name| object.label(name, columns)).transpose()?;
    let ids = if columns.text.is_none() { object.integers("input_ids")? } else { None };
    let content = match ids {
        Some(ids) => object.ids(ids)?,
        None => object.text(columns)?,
    };
    Ok(Example { content, label, line })
}

impl Object<'_> {
    fn fault(&self, reason: String) -> Error {
        Error::line(self.path, self.line, reason)
    }

    fn listed(&self) -> String {
        self.keys.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
    }

    fn missing(&self, name: &str) -> Error {
        self.fault(format!("there is no key `{name}`; it has {}", self.listed()))
    }

    fn string(&self, name: &str) -> Result<String> {
        match self.keys.get(name) {
            Some(Value::String(s)) => Ok(s.clone()),
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

    fn text(&self, columns: &Columns) -> Result<Content> {
        let (text, pair) = columns.texts(&|name| self.keys.contains_key(name)).ok_or_else(|| {
            let listed = self.listed();
            self.fault(format!("which key holds the text? Say --text-column, or give `input_ids`; it has {listed}"))
        })?;
        let pair = pair.map(|name| self.string(&name)).transpose()?;
        Ok(Content::Text { text: self.string(&text)?, pair })
    }
}

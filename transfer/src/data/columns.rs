//! What the columns of a data file hold.

use std::path::Path;

use serde::Serialize;

use crate::{Error, Result};

/// Which columns of a table (or keys of a JSON object) hold what.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Columns {
    /// The text. Without it, the first of the [usual pairs](USUAL_PAIRS) that is there, or the first of the
    /// [usual texts](USUAL_TEXTS).
    pub text: Option<String>,
    /// The second text of a pair.
    pub pair: Option<String>,
    /// The label; labels are not read without it. Names between commas are as many columns of zeros and ones, a class each
    /// in the model's order, of texts that may have several.
    pub label: Option<String>,
    /// Labels that are words, in the order of the model's classes: each is read as its place in this list.
    pub classes: Vec<String>,
}

/// Columns of pairs, as the usual data sets call them.
pub const USUAL_PAIRS: [[&str; 2]; 6] = [
    ["sentence1", "sentence2"],
    ["question1", "question2"],
    ["premise", "hypothesis"],
    ["question", "sentence"],
    ["question", "context"],
    ["text", "text_pair"],
];
/// The column of texts that come in words.
pub(super) const USUAL_WORDS: &str = "tokens";
/// Columns of texts that stand alone.
pub const USUAL_TEXTS: [&str; 3] = ["text", "sentence", "sentence1"];

impl Columns {
    /// The columns of the texts, and of the second texts of pairs, of a file that has the columns that `exists` says.
    pub(super) fn texts(&self, exists: &dyn Fn(&str) -> bool) -> Option<(String, Option<String>)> {
        if let Some(text) = &self.text {
            return Some((text.clone(), self.pair.clone()));
        }
        let pair = USUAL_PAIRS.iter().find(|pair| pair.iter().all(|name| exists(name)));
        let text = pair.map(|[text, _]| text).or_else(|| USUAL_TEXTS.iter().find(|name| exists(name)))?;
        let pair = self.pair.clone().or_else(|| pair.map(|[_, second]| (*second).to_owned()));
        Some(((*text).to_owned(), pair))
    }

    /// Whether these are the names of columns: those that were asked for, or usual ones.
    pub(super) fn are_among(&self, names: &[&str]) -> bool {
        let exists = |name: &str| names.contains(&name);
        let mut asked = [&self.text, &self.pair].into_iter().flatten().cloned().chain(self.labels(&exists));
        asked.all(|name| exists(&name)) && (self.are_named() || self.texts(&exists).is_some())
    }

    /// Whether any were asked for.
    pub(super) fn are_named(&self) -> bool {
        self.text.is_some() || self.pair.is_some() || self.label.is_some()
    }

    /// The columns of the label: several only where none has the whole name.
    pub(super) fn labels(&self, exists: &dyn Fn(&str) -> bool) -> Vec<String> {
        match &self.label {
            None => Vec::new(),
            Some(label) if exists(label) || !label.contains(',') => vec![label.clone()],
            Some(labels) => labels.split(',').map(|name| name.trim().to_owned()).collect(),
        }
    }

    /// A label as a number, where it is one of the classes' words, or a truth value.
    pub(super) fn label(&self, path: &Path, line: usize, text: &str) -> Result<String> {
        let text = text.trim();
        if self.classes.is_empty() {
            return Ok(match text.to_ascii_lowercase().as_str() {
                "true" => "1".to_owned(),
                "false" => "0".to_owned(),
                _ => text.to_owned(),
            });
        }
        match self.classes.iter().position(|class| class == text) {
            Some(at) => Ok(at.to_string()),
            None => {
                let listed = self.classes.join(", ");
                Err(Error::line(path, line, format!("label `{text}` is none of the classes {listed}")))
            }
        }
    }
}

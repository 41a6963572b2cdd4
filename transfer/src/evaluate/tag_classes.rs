//! What the tags of words are called, and their places among a model's classes.

use std::path::Path;

use crate::data::{DataFile, Label, Sequence, TextEncoder};
use crate::{Error, Result, Setting};

/// The tag of what is not scored, as Hugging Face's tools write it.
const LEFT_OUT: &str = "-100";

/// The names of a model's classes.
#[derive(Clone, Debug, Default)]
pub(super) struct TagClasses {
    /// In the model's order; none where they have no names.
    pub(super) names: Vec<String>,
}

impl TagClasses {
    /// Those that are named for the file, or that stand beside the tokenizer.
    pub(super) fn new(file: &DataFile, encoder: &TextEncoder) -> Self {
        let named = file.columns().classes.clone();
        Self { names: if named.is_empty() { encoder.class_names().unwrap_or_default() } else { named } }
    }

    pub(super) fn are_named(&self) -> bool {
        !self.names.is_empty()
    }

    /// A tag as a class; `None` for what is not scored.
    pub(super) fn class(&self, path: &Path, line: usize, tag: &str) -> Result<Option<usize>> {
        if tag == LEFT_OUT {
            return Ok(None);
        }
        if let Some(at) = self.names.iter().position(|class| class == tag) {
            return Ok(Some(at));
        }
        let fault = |reason: String| Error::line(path, line, reason).helped_by(&[Setting::Classes]);
        match tag.parse::<usize>() {
            Ok(class) if !self.are_named() || class < self.names.len() => Ok(Some(class)),
            Ok(class) => Err(fault(format!("tag {class} is none of the {} classes, from 0", self.names.len()))),
            Err(_) if self.are_named() => {
                Err(fault(format!("tag `{tag}` is none of the model's classes {}", self.names.join(", "))))
            }
            Err(_) => Err(fault(format!(
                "tag `{tag}`: which of the model's classes is it? Name them in the model's order, or put the model's \
                 config.json beside the tokenizer"
            ))),
        }
    }
}

/// Puts the place among the model's classes in the place of each tag's name, and leaves out tags that are not scored.
///
/// # Errors
/// A tag is none of the classes.
pub(crate) fn number_tags<'s>(
    file: &DataFile,
    encoder: &TextEncoder,
    sequences: impl Iterator<Item = &'s mut Sequence>,
) -> Result<()> {
    let classes = TagClasses::new(file, encoder);
    for sequence in sequences {
        let Some(Label::TokenTags(tags)) = &mut sequence.label else { continue };
        let mut numbered = Vec::with_capacity(tags.len());
        for (place, tag) in tags.iter() {
            if let Some(class) = classes.class(file.path(), sequence.line, tag)? {
                numbered.push((*place, class.to_string()));
            }
        }
        *tags = numbered;
    }
    Ok(())
}

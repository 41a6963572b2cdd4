//! Whether texts mean anything to a model: what makes that doubtful is said, with the number that shows it.

use std::collections::HashSet;
use std::path::Path;

use super::tokens::{Sequence, TextEncoder};
use crate::{Error, Result, Setting};

/// A share of unknown tokens that is said.
const MANY: f64 = 0.1;
/// A share of unknown tokens of which nothing can be learnt.
const TOO_MANY: f64 = 0.5;

/// Refuses ids that no row of a model's table of words stands for.
///
/// # Errors
/// There is one.
pub fn check_ids<'s>(file: &Path, rows: usize, sequences: impl IntoIterator<Item = &'s Sequence>) -> Result<()> {
    for sequence in sequences {
        let is_known = |id: &&i64| usize::try_from(**id).is_ok_and(|id| id < rows);
        if let Some(id) = sequence.ids.iter().find(|id| !is_known(id)) {
            let reason =
                format!("token id {id} is outside the model's vocabulary of {rows}: is the tokenizer this model's?");
            return Err(Error::line(file, sequence.line, reason));
        }
    }
    Ok(())
}

/// How many tokens of texts the tokenizer does not know.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unknown {
    tokens: usize,
    unknown: usize,
}

impl Unknown {
    /// Counts them.
    ///
    /// # Errors
    /// The tokenizer fails.
    pub fn count<'s>(sequences: impl IntoIterator<Item = &'s Sequence>, encoder: &TextEncoder) -> Result<Self> {
        let Some(unknown) = encoder.unknown() else { return Ok(Self::default()) };
        let (before, after) = encoder.frame()?;
        let mut count = Self::default();
        for sequence in sequences {
            count.tokens += sequence.ids.len().saturating_sub(before.len() + after.len());
            count.unknown += sequence.ids.iter().filter(|id| **id == unknown).count();
        }
        Ok(count)
    }

    fn reaches(self, share: f64) -> bool {
        self.unknown > 0 && self.unknown as f64 >= share * self.tokens as f64
    }

    /// What is said where there are many.
    pub fn note(self, file: &Path) -> Option<String> {
        self.reaches(MANY).then(|| format!("{}: {}", file.display(), self.shares()))
    }

    /// Refuses texts of which a model could learn nothing.
    ///
    /// # Errors
    /// Half of the tokens, or more, are unknown.
    pub fn refuse_too_many(self, file: &Path) -> Result<()> {
        match self.reaches(TOO_MANY) {
            true => Err(Error::data(file, self.shares()).helped_by(&[Setting::Tokenizer])),
            false => Ok(()),
        }
    }

    fn shares(self) -> String {
        let Self { tokens, unknown } = self;
        let share = 100.0 * unknown as f64 / tokens.max(1) as f64;
        format!(
            "the tokenizer does not know {unknown} of {tokens} tokens ({share:.0} %): is it the model's, and are the texts \
             in its language?"
        )
    }
}

/// What is said where many texts are one.
pub fn sameness_note(file: &Path, sequences: &[Sequence]) -> Option<String> {
    let different: HashSet<_> = sequences.iter().map(|s| (&s.ids, &s.types)).collect();
    let (count, different) = (sequences.len(), different.len());
    let note = |said: String| Some(format!("{}: {said}", file.display()));
    match (count, different) {
        (1, _) => note("it holds one text: what is measured on it says little".to_owned()),
        (_, 1) => note(format!("its {count} texts are all the same: what is measured is measured on one")),
        _ if different * 2 <= count => note(format!("only {different} of its {count} texts are different")),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tokens::Overlong;
    use super::*;

    #[test]
    fn texts_that_say_little_are_doubted() {
        let path = Path::new("a.tsv");
        let sequences = |lengths: &[usize]| lengths.iter().map(|n| Sequence::with_length(*n)).collect::<Vec<_>>();
        let note = |lengths: &[usize]| sameness_note(path, &sequences(lengths)).unwrap_or_default();
        assert!(note(&[3]).contains("one text"));
        assert!(note(&[3; 500]).contains("500 texts are all the same"));
        assert!(note(&[3, 4, 3, 4]).contains("only 2 of its 4"));
        assert_eq!(note(&[3, 4, 5, 4, 3]), "");
    }

    #[test]
    fn unknown_tokens_are_counted_and_too_many_refused() {
        let tokenizer = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/bert-mini-sst2/tokenizer.json");
        let encoder = TextEncoder::new(Some(&tokenizer), 16, Overlong::Truncate).unwrap();
        let unknown = encoder.unknown().unwrap();
        let path = Path::new("a.tsv");
        let of = |share: usize| {
            let mut sequence = Sequence::with_length(12);
            sequence.ids = (0..12).map(|at| if (1..=share).contains(&at) { unknown } else { unknown + 7 }).collect();
            Unknown::count([&sequence], &encoder).unwrap()
        };
        assert_eq!(of(0).note(path), None);
        assert!(of(2).note(path).unwrap().contains("2 of 10 tokens (20 %)") && of(2).refuse_too_many(path).is_ok());
        assert!(of(6).refuse_too_many(path).unwrap_err().to_string().contains("60 %"));
    }

    #[test]
    fn ids_that_no_row_stands_for_are_refused_with_their_line() {
        for id in [-1, 10, i64::MIN, i64::MAX] {
            let mut sequence = Sequence { line: 7, ..Sequence::with_length(3) };
            sequence.ids[2] = id;
            let reason = check_ids(Path::new("a.jsonl"), 10, [&sequence]).unwrap_err().to_string();
            assert!(reason.contains("a.jsonl, line 7") && reason.contains(&id.to_string()), "{reason}");
        }
        assert!(check_ids(Path::new("a.jsonl"), 2, [&Sequence::with_length(3)]).is_ok());
    }
}

//! Labels of words and of parts of a context, at the tokens that stand for them.

use std::path::Path;

use tokenizers::Encoding;

use super::label::{Answers, Label};
use super::tokens::{Sequence, TextEncoder};
use crate::{Error, Result};

impl TextEncoder {
    /// Words with a tag each: the tag is that of a word's first token. Words that are cut off, or have no token, have none.
    pub(super) fn tagged(&self, file: &Path, words: &[String], tags: Vec<String>, line: usize) -> Result<Sequence> {
        if words.len() != tags.len() {
            return Err(Error::line(file, line, format!("{} words, but {} tags", words.len(), tags.len())));
        }
        let (sequence, places) = self.encode_words(file, words, None, line)?;
        let of_tokens = tags.into_iter().zip(places).filter_map(|(tag, place)| Some((place?, tag))).collect();
        Ok(Sequence { label: Some(Label::TokenTags(of_tokens)), ..sequence })
    }

    /// A question with its context and the first of its answers. An answer that is cut off is no label.
    pub(super) fn answered(
        &self,
        file: &Path,
        question: &str,
        context: &str,
        (answers, line): (&Answers, usize),
    ) -> Result<Sequence> {
        let tokenizer = self.tokenizer(file)?;
        // The fast way does not tell which bytes a token is of.
        let encoded = tokenizer.encode(context, false);
        let encoded =
            encoded.and_then(|encoded| self.encode_text(tokenizer, question.trim_start().into(), Some(encoded)));
        let encoded = encoded.map_err(|e| self.fault(e))?;
        let label = match first_answer(context, answers) {
            Ok(None) => Some(Label::Span(0, 0)),
            Ok(Some(bytes)) => span(&encoded, bytes),
            Err(text) => {
                return Err(Error::line(file, line, format!("the answer `{text}` is not in its context")));
            }
        };
        Ok(Self::sequence(encoded, label, line))
    }
}

/// The bytes of the first answer: where it is said to begin or, where something else stands there, where it stands first;
/// `None` where there is no answer.
///
/// # Errors
/// It stands nowhere; the error is its text.
fn first_answer<'a>(context: &str, answers: &'a Answers) -> Result<Option<(usize, usize)>, &'a str> {
    let Some(text) = answers.texts.first().filter(|text| !text.trim().is_empty()) else { return Ok(None) };
    let said = answers.starts.first().and_then(|start| context.char_indices().nth(*start)).map(|(at, _)| at);
    let first = said.filter(|at| context[*at..].starts_with(text.as_str())).or_else(|| context.find(text.as_str()));
    match first {
        Some(first) => Ok(Some((first, first + text.len()))),
        None => Err(text),
    }
}

/// The first and the last token of some bytes of the second text; `None` where these are cut off.
fn span((encoding, truncated): &(Encoding, bool), (first, last): (usize, usize)) -> Option<Label> {
    let tokens = encoding.get_sequence_ids().iter().zip(encoding.get_offsets()).enumerate();
    let tokens: Vec<(usize, (usize, usize))> =
        tokens.filter(|(_, (text, _))| **text == Some(1)).map(|(at, (_, bytes))| (at, *bytes)).collect();
    if *truncated && tokens.last().is_none_or(|(_, (_, end))| *end < last) {
        return None;
    }
    let start = tokens.iter().find(|(_, (_, end))| *end > first)?.0;
    let end = tokens.iter().rfind(|(_, (begin, _))| *begin < last)?.0;
    (start <= end).then_some(Label::Span(start, end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Content, Example, Overlong};

    fn tokenizer() -> std::path::PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/bert-mini-sst2/tokenizer.json")
    }

    fn encode(content: Content, label: Label, longest: usize) -> Result<Sequence> {
        let encoder = TextEncoder::new(Some(&tokenizer()), longest, Overlong::Truncate).unwrap();
        encoder.encode(Path::new("a.jsonl"), Example { content, label: Some(label), line: 7 })
    }

    fn answered(context: &str, answers: Answers, longest: usize) -> Result<Option<Label>> {
        let content = Content::Text { text: "what is it ?".to_owned(), pair: Some(context.to_owned()) };
        Ok(encode(content, Label::Answers(answers), longest)?.label)
    }

    fn answers(text: &str, start: Option<usize>) -> Answers {
        Answers { texts: vec![text.to_owned()], starts: start.into_iter().collect(), is_impossible: false }
    }

    #[test]
    fn an_answer_is_the_tokens_of_its_bytes() {
        // A letter of two bytes: places in the file are counted in characters.
        let context = "é the film is good and the film is long";
        let span = |start| answered(context, answers("the film", start), 64).unwrap().unwrap();
        let (first, second) = (span(Some(2)), span(Some(23)));
        let (Label::Span(a, b), Label::Span(c, d)) = (&first, &second) else { panic!("spans") };
        assert!(b < c && b - a == d - c && *a > 5, "{first:?} {second:?}");
        // What is not said, or is wrong, is looked for.
        assert_eq!(span(None), first);
        assert_eq!(span(Some(3)), first);
        assert_eq!(span(Some(1000)), first);
        assert_eq!(answered(context, Answers::default(), 64).unwrap(), Some(Label::Span(0, 0)));
        // The second is cut off, the first is not.
        assert_eq!(answered(context, answers("the film", Some(2)), d + 1).unwrap(), Some(first));
        assert_eq!(answered(context, answers("film is long", Some(27)), d + 1).unwrap(), None);
        let refused = answered(context, answers("a book", Some(2)), 64).unwrap_err().to_string();
        assert!(refused.contains("line 7") && refused.contains("`a book` is not in its context"), "{refused}");
    }

    #[test]
    fn a_tag_is_that_of_the_first_token_of_its_word() {
        let words = ["a", "unwatchable", "film"].map(str::to_owned).to_vec();
        let tags = |count: usize| Label::Tags((0..count).map(|at| at.to_string()).collect());
        let label = |longest| encode(Content::Words(words.clone()), tags(3), longest).unwrap().label;
        let Some(Label::TokenTags(all)) = label(64) else { panic!("tags of tokens") };
        let [(first, _), (second, _), (third, tag)] = all.as_slice() else { panic!("three words") };
        assert_eq!((*first, *second, tag.as_str()), (1, 2, "2"));
        assert!(*third > 3, "{third}");
        let Some(Label::TokenTags(cut)) = label(4) else { panic!("tags of tokens") };
        assert_eq!(cut, all[..2]);
        let refused = encode(Content::Words(words.clone()), tags(2), 64).unwrap_err().to_string();
        assert!(refused.contains("line 7: 3 words, but 2 tags"), "{refused}");
    }
}

//! Sentences of words, each with a tag, as CoNLL's files have them: a word a line, a blank line after each sentence.

use std::path::Path;

use super::columns::Columns;
use super::label::Label;
use super::lines::NumberedLines;
use super::reader::{Content, Example, Row, unreadable};
use crate::{Error, Result};

/// More words than any sentence has, and most whole documents.
const MOST_WORDS: usize = 1 << 16;
/// What CoNLL-2003 puts before a document.
const DOCUMENT: &str = "-DOCSTART-";

/// A file as it is read.
pub(super) struct Conll {
    lines: NumberedLines,
}

impl Conll {
    pub(super) fn new(lines: NumberedLines) -> Self {
        Self { lines }
    }

    /// The next sentence.
    pub(super) fn next(&mut self, path: &Path, columns: &Columns) -> Option<Result<Row>> {
        let (mut words, mut tags, mut first) = (Vec::new(), Vec::new(), 0);
        loop {
            let (line, text) = match self.lines.next_or_blank() {
                Some((line, Ok(text))) => (line, text),
                Some((line, Err(e))) => return Some(Err(unreadable(path, line, &e))),
                None if words.is_empty() => return None,
                None => break,
            };
            if text.trim().is_empty() || text.starts_with(DOCUMENT) {
                if words.is_empty() {
                    continue;
                }
                break;
            }
            if is_comment(&text) {
                continue;
            }
            let Some((word, tag)) = word_and_tag(&text) else {
                let reason = format!("`{}` is no word with its tag, as lines between blank ones are", text.trim());
                return Some(Err(Error::line(path, line, reason)));
            };
            if words.is_empty() {
                first = line;
            }
            words.push(word.to_owned());
            tags.push(tag.to_owned());
            if words.len() > MOST_WORDS {
                let reason = format!("more than {MOST_WORDS} words without a blank line, which ends a sentence");
                return Some(Err(Error::line(path, first, reason)));
            }
        }
        let label = columns.label.is_some().then_some(Label::Tags(tags));
        Some(Ok(Row::Example(Example { content: Content::Words(words), label, line: first })))
    }
}

/// The first and the last column: others, as CoNLL-2003 has, stand between them.
fn word_and_tag(line: &str) -> Option<(&str, &str)> {
    let (word, tag) = match line.trim_end().contains('\t') {
        true => (line.split('\t').next()?, line.trim_end().rsplit('\t').next()?),
        false => {
            let mut fields = line.split_whitespace();
            (fields.next()?, fields.next_back()?)
        }
    };
    (!word.trim().is_empty() && !tag.trim().is_empty()).then_some((word.trim(), tag.trim()))
}

/// Some sets say `# id ...` before a sentence.
fn is_comment(line: &str) -> bool {
    line.starts_with("# ") && !line.contains('\t') && line.split_whitespace().count() > 2
}

/// Whether the beginning of a file looks like one of these, whose columns stand between tabs: its first line is a word and
/// a tag, and no header.
pub(super) fn is_told_by(head: &str) -> bool {
    let is_sentence = |line: &&str| !line.trim().is_empty() && !line.starts_with(DOCUMENT) && !is_comment(line);
    let Some(line) = head.lines().find(is_sentence) else { return false };
    let mut fields = line.trim_end().split('\t');
    let (Some(word), Some(tag), None) = (fields.next(), fields.next(), fields.next()) else { return false };
    !word.is_empty() && is_tag(tag)
}

/// `O`, or a letter of a scheme and an entity's name.
fn is_tag(text: &str) -> bool {
    text == "O"
        || text
            .split_once('-')
            .is_some_and(|(prefix, name)| matches!(prefix, "B" | "I" | "E" | "S" | "L" | "U" | "M") && !name.is_empty())
}

#[cfg(test)]
mod tests {
    use super::super::reader::Reader;
    use super::super::source::{Data, DataFile, DataFormat};
    use super::*;

    fn read(name: &str, text: &str) -> Result<(DataFormat, Vec<Example>)> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        let file = DataFile::open(&Data::new(&path))?;
        let label = file.usual_label()?.map(str::to_owned);
        let file = file.with_columns(Columns { label, ..Columns::default() });
        Ok((file.format(), Reader::new(&file)?.collect::<Result<_>>()?))
    }

    fn sentence(words: &[&str], tags: &[&str], line: usize) -> Example {
        let owned = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        Example { content: Content::Words(owned(words)), label: Some(Label::Tags(owned(tags))), line }
    }

    #[test]
    fn sentences_end_with_blank_lines() {
        let expected = [sentence(&["EU", "rejects"], &["B-ORG", "O"], 1), sentence(&["Ann"], &["B-PER"], 4)];
        let tabs = "EU\tB-ORG\nrejects\tO\n\nAnn\tB-PER\n";
        for (name, text) in [("a.tsv", tabs), ("a.conll", tabs), ("a", tabs), ("a.tsv", &tabs.replace('\n', "\r\n"))] {
            assert_eq!(read(name, text).unwrap(), (DataFormat::Conll, expected.to_vec()), "{name}");
        }
        let full =
            "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nrejects VBZ B-VP O\n \n# id 1 domain=en\nAnn NNP B-NP B-PER";
        let (_, found) = read("a.conll", full).unwrap();
        let lines: Vec<usize> = found.iter().map(|e| e.line).collect();
        assert_eq!(lines, [3, 7]);
        assert_eq!(found.into_iter().map(|e| e.label).collect::<Vec<_>>(), expected.map(|e| e.label));
    }

    #[test]
    fn what_is_no_word_with_a_tag_is_refused_with_its_line() {
        let fault = read("a.conll", "EU\tB-ORG\nrejects\n\n").unwrap_err().to_string();
        assert!(fault.contains("line 2") && fault.contains("`rejects`"), "{fault}");
        // A hash is a word too.
        assert_eq!(read("a.conll", "#\tO\n").unwrap().1, [sentence(&["#"], &["O"], 1)]);
        assert_eq!(read("a.conll", "# O\n").unwrap().1, [sentence(&["#"], &["O"], 1)]);
    }

    #[test]
    fn tables_of_two_columns_stay_tables() {
        for head in ["sentence\tlabel\na\t1\n", "text\tO\textra\n", "", "a good film\n"] {
            assert!(!is_told_by(head), "{head}");
        }
        assert!(is_told_by("-DOCSTART-\tO\n\nEU\tB-ORG\n"));
    }
}

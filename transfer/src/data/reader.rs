//! Examples out of data files, one at a time: files may be larger than memory.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use super::arrays::Arrays;
use super::columns::Columns;
use super::conll::Conll;
use super::json::Json;
use super::label::Label;
use super::lines::NumberedLines;
use super::source::{DataFile, DataFormat};
use super::table::Table;
use crate::{Error, Result};

/// What a model is to read.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Content {
    /// A text, or a pair of them.
    Text {
        /// The text.
        text: String,
        /// The second text of a pair.
        pair: Option<String>,
    },
    /// A text that comes in words.
    Words(Vec<String>),
    /// Ready token ids.
    Ids {
        /// Token ids.
        ids: Vec<i64>,
        /// Token types; zeros where the data has none.
        types: Vec<i64>,
    },
}

/// One row of a data file.
#[derive(Clone, Debug, PartialEq)]
pub struct Example {
    /// What a model is to read.
    pub content: Content,
    /// Its label, where labels are read.
    pub label: Option<Label>,
    /// Its line in the file, or its row in an array, from 1.
    pub line: usize,
}

/// A row of a file: an example, or one without a text.
pub(super) enum Row {
    Example(Example),
    Without(usize),
}

/// Rows without a text: `null`, or blank.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Skipped {
    /// How many were left out.
    pub rows: usize,
    /// The line of the first.
    pub first: usize,
}

impl Skipped {
    /// What is said of them, if there are any.
    pub fn note(&self, file: &Path) -> Option<String> {
        let Self { rows, first } = self;
        (*rows > 0)
            .then(|| format!("{}: {rows} rows without a text were left out, the first in line {first}", file.display()))
    }
}

/// The examples of a file, read as they are asked for.
pub struct Reader {
    path: PathBuf,
    columns: Columns,
    rows: Rows,
    skipped: Skipped,
}

/// How a file is read.
enum Rows {
    /// A text a line.
    Text(NumberedLines),
    Table(Box<Table>),
    /// Words with their tags.
    Conll(Conll),
    Json(Json),
    Arrays(Arrays),
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("path", &self.path).field("columns", &self.columns).finish_non_exhaustive()
    }
}

impl Reader {
    /// The examples of a file; one reader of a file at a time.
    ///
    /// # Errors
    /// The file cannot be read, is of another kind, or lacks a column that its columns name.
    pub fn new(file: &DataFile) -> Result<Self> {
        let path = file.path();
        let columns = file.columns();
        if columns.text.is_some() && columns.text == columns.pair {
            return Err(Error::data(path, "the text and the second text of a pair are the same column"));
        }
        if file.format() == DataFormat::Conll && (columns.text.is_some() || columns.pair.is_some()) {
            return Err(Error::data(path, "its columns have no names: the first is the word, the last its tag"));
        }
        if file.format() == DataFormat::Text && columns.are_named() {
            return Err(Error::data(path, "a .txt file has no columns; use .tsv, .csv or .jsonl"));
        }
        let rows = match (file.format(), file.delimiter()) {
            (_, Some(delimiter)) => Rows::Table(Box::new(Table::open(file, delimiter)?)),
            (DataFormat::Conll, _) => Rows::Conll(Conll::new(NumberedLines::new(file.text()?))),
            (DataFormat::Json, _) => Rows::Json(Json::open(file)?),
            (DataFormat::Npz, _) => Rows::Arrays(Arrays::read(path, columns)?),
            _ => Rows::Text(NumberedLines::new(file.text()?)),
        };
        Ok(Self { path: path.to_owned(), columns: columns.clone(), rows, skipped: Skipped::default() })
    }

    /// Rows without a text, so far.
    pub fn skipped(&self) -> Skipped {
        self.skipped
    }
}

impl Iterator for Reader {
    type Item = Result<Example>;

    fn next(&mut self) -> Option<Self::Item> {
        let Self { path, columns, rows, skipped } = self;
        loop {
            let row = match rows {
                Rows::Text(lines) => {
                    let (line, text) = lines.next()?;
                    let text = text.map_err(|e| unreadable(path, line, &e));
                    text.map(|text| {
                        Row::Example(Example { content: Content::Text { text, pair: None }, label: None, line })
                    })
                }
                Rows::Table(table) => table.next(path, columns)?,
                Rows::Conll(sentences) => sentences.next(path, columns)?,
                Rows::Json(json) => json.next(path, columns)?,
                Rows::Arrays(arrays) => arrays.next(path, columns)?,
            };
            match row {
                Ok(Row::Example(example)) => return Some(Ok(example)),
                Ok(Row::Without(line)) => {
                    if skipped.rows == 0 {
                        skipped.first = line;
                    }
                    skipped.rows += 1;
                }
                Err(e) => return Some(Err(e)),
            }
        }
    }
}

pub(super) fn unreadable(path: &Path, line: usize, error: &dyn Display) -> Error {
    Error::line(path, line, format!("cannot be read: {error}"))
}

#[cfg(test)]
mod tests {
    use super::super::columns::USUAL_PAIRS;
    use super::super::source::Data;
    use super::*;

    fn read(name: &str, text: &str, columns: &Columns) -> Result<Vec<Example>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        open(&path, columns)?.collect()
    }

    fn open(path: &Path, columns: &Columns) -> Result<Reader> {
        Reader::new(&DataFile::open(&Data::new(path).columns(columns.clone()))?)
    }

    fn single(text: &str, label: Option<&str>, line: usize) -> Example {
        let content = Content::Text { text: text.to_owned(), pair: None };
        Example { content, label: label.map(|l| Label::One(l.to_owned())), line }
    }

    #[test]
    fn tables_know_their_columns_and_lines() {
        let columns = Columns { label: Some("label".to_owned()), ..Columns::default() };
        let rows = read("a.tsv", "sentence\tlabel\na \"good one\t1\nbad\t0\n", &columns).unwrap();
        assert_eq!(rows, [single("a \"good one", Some("1"), 2), single("bad", Some("0"), 3)]);
        let rows = read("a.csv", "label,text\n1,\"x, y\"\n", &columns).unwrap();
        assert_eq!(rows, [single("x, y", Some("1"), 2)]);
        let pairs = read("a.tsv", "sentence1\tsentence2\na\tb\n", &Columns::default()).unwrap();
        assert_eq!(pairs[0].content, Content::Text { text: "a".to_owned(), pair: Some("b".to_owned()) });
    }

    #[test]
    fn the_usual_pairs_are_known() {
        let pair = |header: &str| {
            let rows = read("a.tsv", &format!("{header}\na\tb\n"), &Columns::default()).unwrap();
            matches!(&rows[0].content, Content::Text { pair: Some(pair), .. } if pair == "b")
        };
        for [first, second] in USUAL_PAIRS {
            assert!(pair(&format!("{first}\t{second}")));
            let json = format!("{{\"{first}\": \"a\", \"{second}\": \"b\"}}\n");
            let rows = read("a.json", &json, &Columns::default()).unwrap();
            assert_eq!(rows[0].content, Content::Text { text: "a".to_owned(), pair: Some("b".to_owned()) });
        }
        assert!(!pair("sentence\tquestion_id"));
        let columns = Columns { text: Some("sentence1".to_owned()), ..Columns::default() };
        let alone = read("a.tsv", "sentence1\tsentence2\na\tb\n", &columns).unwrap();
        assert_eq!(alone[0].content, Content::Text { text: "a".to_owned(), pair: None });
    }

    #[test]
    fn labels_may_be_words_or_truth_values() {
        let classes = ["no", "yes"].map(str::to_owned).to_vec();
        let columns = Columns { label: Some("label".to_owned()), classes, ..Columns::default() };
        let labels = |rows: Vec<Example>| {
            rows.into_iter().map(|e| e.label.unwrap().one().unwrap().to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(labels(read("a.csv", "text,label\na,yes\nb,no\n", &columns).unwrap()), ["1", "0"]);
        let json = "{\"text\":\"a\",\"label\":true}\n{\"text\":\"a\",\"label\":\"no\"}\n";
        assert_eq!(labels(read("a.jsonl", json, &columns).unwrap()), ["1", "0"]);
        let unknown = read("a.csv", "text,label\na,maybe\n", &columns).unwrap_err().to_string();
        assert!(unknown.contains("line 2") && unknown.contains("no, yes"), "{unknown}");
    }

    #[test]
    fn padding_of_ready_ids_is_left_out() {
        let line = "{\"input_ids\":[0,2,7,3,0],\"attention_mask\":[0,1,1,1,0],\"token_type_ids\":[9,0,0,1,9]}\n";
        let rows = read("a.jsonl", line, &Columns::default()).unwrap();
        assert_eq!(rows[0].content, Content::Ids { ids: vec![2, 7, 3], types: vec![0, 0, 1] });
        let short = read("a.jsonl", "{\"input_ids\":[1,2],\"attention_mask\":[1]}\n", &Columns::default());
        assert!(short.unwrap_err().to_string().contains("1 in `attention_mask`"));
    }

    #[test]
    fn lines_are_counted_whatever_ends_them() {
        let columns = Columns { label: Some("label".to_owned()), ..Columns::default() };
        for end in ["\n", "\r\n"] {
            let text = ["text,label", "a\rb,1", "\"two", "lines\",0", "c,1", "short", ""].join(end);
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("a.csv");
            std::fs::write(&path, text).unwrap();
            let rows: Vec<Result<Example>> = open(&path, &columns).unwrap().collect();
            let lines: Vec<usize> = rows.iter().flatten().map(|e| e.line).collect();
            assert_eq!(lines, [2, 3, 5], "{end:?}");
            assert!(rows[3].as_ref().unwrap_err().to_string().contains("line 6"), "{end:?}");
        }
    }

    #[test]
    fn faults_name_file_and_line() {
        let columns = Columns { label: Some("label".to_owned()), ..Columns::default() };
        let short = read("a.tsv", "sentence\tlabel\nfine\t1\nonly\n", &columns).unwrap_err().to_string();
        assert!(short.contains("a.tsv, line 3") && short.contains("1 columns"), "{short}");
        let missing = read("a.tsv", "sentence\tscore\n", &columns).unwrap_err().to_string();
        assert!(missing.contains("no column `label`") && missing.contains("sentence, score"), "{missing}");
        let unnamed = read("a.csv", "a,b\n1,2\n", &Columns::default()).unwrap_err();
        assert_eq!(unnamed.settings(), [crate::Setting::TextColumn], "{unnamed}");
        let json = read("a.jsonl", "{\"text\": \"x\"}\n{\"text\": 3}\n", &Columns::default()).unwrap_err().to_string();
        assert!(json.contains("line 2") && json.contains("`text` is 3"), "{json}");
        let kind = read("a.parquet", "", &Columns::default()).unwrap_err().to_string();
        assert!(kind.contains(".jsonl"), "{kind}");
        let bytes = tempfile::tempdir().unwrap();
        let path = bytes.path().join("a.txt");
        std::fs::write(&path, b"fine\n\xff\xfe\n").unwrap();
        let invalid: Result<Vec<_>> = open(&path, &Columns::default()).unwrap().collect();
        assert!(invalid.unwrap_err().to_string().contains("line 2"));
    }

    #[test]
    fn json_lines_hold_texts_or_ids() {
        let rows = read("a.jsonl", "{\"text\":\"x\"}\n\n{\"input_ids\":[2,7,3]}\n", &Columns::default()).unwrap();
        assert_eq!(rows[0], single("x", None, 1));
        assert_eq!(rows[1].content, Content::Ids { ids: vec![2, 7, 3], types: vec![0; 3] });
        assert_eq!(rows[1].line, 3);
    }
}

//! Examples out of data files, one at a time: files may be larger than memory.

use std::fmt::Display;
use std::fs::File;
use std::io::BufReader;
use std::iter::Enumerate;
use std::path::{Path, PathBuf};

use super::arrays::Arrays;
use super::columns::Columns;
use super::json;
use super::lines::Lines;
use super::table::Table;
use crate::{Error, Result};

/// What a model is to read.
#[derive(Clone, Debug, PartialEq)]
pub enum Content {
    /// A text, or a pair of them.
    Text {
        /// The text.
        text: String,
        /// The second text of a pair.
        pair: Option<String>,
    },
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
    /// Its label, as written.
    pub label: Option<String>,
    /// Its line in the file, or its row in an array, from 1.
    pub line: usize,
}

/// The examples of a file, read as they are asked for.
pub struct Reader {
    path: PathBuf,
    columns: Columns,
    format: Format,
}

/// How a file holds its examples.
enum Format {
    /// A text a line.
    Text(NumberedLines),
    Table(Box<Table>),
    /// An object a line.
    Json(NumberedLines),
    Arrays(Arrays),
}

type NumberedLines = Enumerate<Lines<BufReader<File>>>;

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("path", &self.path).field("columns", &self.columns).finish_non_exhaustive()
    }
}

impl Reader {
    /// Opens a `.txt` (one text a line), `.tsv` or `.csv` (with a header), `.jsonl` (one object a line; `.json` and
    /// `.ndjson` too) or `.npz` file.
    ///
    /// # Errors
    /// The file cannot be read, is of another kind, or lacks a column that `columns` names.
    pub fn open(path: impl AsRef<Path>, columns: &Columns) -> Result<Self> {
        let path = path.as_ref();
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
        let open = || File::open(path).map_err(|e| Error::data(path, format!("cannot be read: {e}")));
        let lines = || open().map(|f| Lines::new(BufReader::new(f)).enumerate());
        let table = |delimiter: u8| Table::open(path, open()?, delimiter, columns).map(Box::new);
        let format = match extension.as_str() {
            "txt" => Format::Text(lines()?),
            "jsonl" | "json" | "ndjson" => Format::Json(lines()?),
            "tsv" => Format::Table(table(b'\t')?),
            "csv" => Format::Table(table(b',')?),
            "npz" => Format::Arrays(Arrays::read(path, columns)?),
            _ => return Err(Error::data(path, "not a kind of data file that is read: .txt, .tsv, .csv, .jsonl, .npz")),
        };
        let Columns { text, pair, label, .. } = columns;
        if extension == "txt" && (text.is_some() || pair.is_some() || label.is_some()) {
            return Err(Error::data(path, "a .txt file has no columns; use .tsv, .csv or .jsonl"));
        }
        Ok(Self { path: path.to_owned(), columns: columns.clone(), format })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Iterator for Reader {
    type Item = Result<Example>;

    fn next(&mut self) -> Option<Self::Item> {
        let Self { path, columns, format } = self;
        match format {
            Format::Text(lines) => Some(next_line(lines, path)?.map(|(line, text)| {
                let content = Content::Text { text, pair: None };
                Example { content, label: None, line }
            })),
            Format::Table(table) => table.next(path, columns),
            Format::Json(lines) => {
                Some(next_line(lines, path)?.and_then(|(line, text)| json::example(path, line, &text, columns)))
            }
            Format::Arrays(arrays) => arrays.next(path, columns),
        }
    }
}

/// The next line that is not blank, with its number from 1.
fn next_line(lines: &mut NumberedLines, path: &Path) -> Option<Result<(usize, String)>> {
    loop {
        let (at, line) = lines.next()?;
        match line {
            Ok(text) if text.trim().is_empty() => {}
            Ok(text) => return Some(Ok((at + 1, text))),
            Err(e) => return Some(Err(unreadable(path, at + 1, &e))),
        }
    }
}

pub(super) fn unreadable(path: &Path, line: usize, error: &dyn Display) -> Error {
    Error::line(path, line, format!("cannot be read: {error}"))
}

#[cfg(test)]
mod tests {
    use super::super::columns::USUAL_PAIRS;
    use super::*;

    fn read(name: &str, text: &str, columns: &Columns) -> Result<Vec<Example>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        Reader::open(path, columns)?.collect()
    }

    fn single(text: &str, label: Option<&str>, line: usize) -> Example {
        let content = Content::Text { text: text.to_owned(), pair: None };
        Example { content, label: label.map(str::to_owned), line }
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
        let labels = |rows: Vec<Example>| rows.into_iter().map(|e| e.label.unwrap()).collect::<Vec<_>>();
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
            let rows: Vec<Result<Example>> = Reader::open(&path, &columns).unwrap().collect();
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
        let invalid: Result<Vec<_>> = Reader::open(&path, &Columns::default()).unwrap().collect();
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

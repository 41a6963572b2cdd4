//! Examples out of data files, one at a time: files may be larger than memory.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use mabert_runtime::{Tensor, npz};
use serde::Serialize;
use serde_json::Value;

use crate::{Error, Result, Setting};

/// Which columns of a table (or keys of a JSON object) hold what.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Columns {
    /// The text. Without it, the first of the [usual pairs](USUAL_PAIRS) that is there, or the first of the
    /// [usual texts](USUAL_TEXTS).
    pub text: Option<String>,
    /// The second text of a pair.
    pub pair: Option<String>,
    /// The label; labels are not read without it.
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
/// Columns of texts that stand alone.
pub const USUAL_TEXTS: [&str; 3] = ["text", "sentence", "sentence1"];

impl Columns {
    /// The columns of the texts among those `there` are.
    fn texts(&self, there: &dyn Fn(&str) -> bool) -> Option<(String, Option<String>)> {
        if let Some(text) = &self.text {
            return Some((text.clone(), self.pair.clone()));
        }
        let pair = USUAL_PAIRS.iter().find(|pair| pair.iter().all(|name| there(name)));
        let text = pair.map(|[text, _]| text).or_else(|| USUAL_TEXTS.iter().find(|name| there(name)))?;
        let pair = self.pair.clone().or_else(|| pair.map(|[_, second]| (*second).to_owned()));
        Some(((*text).to_owned(), pair))
    }

    /// A label as a number, where it is one of the classes' words.
    fn label(&self, path: &Path, line: usize, text: &str) -> Result<String> {
        let text = text.trim();
        if self.classes.is_empty() {
            return Ok(text.to_owned());
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
    rows: Rows,
    columns: Columns,
}

enum Rows {
    Lines(std::iter::Enumerate<std::io::Lines<BufReader<File>>>),
    Table { records: csv::StringRecordsIntoIter<Newlines<BufReader<File>>>, at: At },
    Json(std::iter::Enumerate<std::io::Lines<BufReader<File>>>),
    Arrays { ids: Matrix, types: Option<Matrix>, mask: Option<Matrix>, labels: Option<Vec<String>>, next: usize },
}

type Matrix = ndarray::Array2<i64>;

/// Positions of the columns of a table.
struct At {
    text: usize,
    pair: Option<usize>,
    label: Option<usize>,
    width: usize,
}

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
        let lines = || open().map(|f| BufReader::new(f).lines().enumerate());
        let rows = match extension.as_str() {
            "txt" => Rows::Lines(lines()?),
            "jsonl" | "json" | "ndjson" => Rows::Json(lines()?),
            "tsv" => table(path, open()?, b'\t', columns)?,
            "csv" => table(path, open()?, b',', columns)?,
            "npz" => arrays(path, columns)?,
            _ => return Err(Error::data(path, "not a kind of data file that is read: .txt, .tsv, .csv, .jsonl, .npz")),
        };
        if extension == "txt" && (columns.text.is_some() || columns.pair.is_some() || columns.label.is_some()) {
            return Err(Error::data(path, "a .txt file has no columns; use .tsv, .csv or .jsonl"));
        }
        Ok(Self { path: path.to_owned(), rows, columns: columns.clone() })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Iterator for Reader {
    type Item = Result<Example>;

    fn next(&mut self) -> Option<Self::Item> {
        let path = &self.path;
        let unreadable =
            |line: usize, e: &dyn std::fmt::Display| Error::line(path, line, format!("cannot be read: {e}"));
        match &mut self.rows {
            Rows::Lines(lines) => loop {
                let (at, line) = lines.next()?;
                match line {
                    Ok(text) if text.trim().is_empty() => {}
                    Ok(text) => {
                        let content = Content::Text { text, pair: None };
                        return Some(Ok(Example { content, label: None, line: at + 1 }));
                    }
                    Err(e) => return Some(Err(unreadable(at + 1, &e))),
                }
            },
            Rows::Table { records, at } => {
                let record = records.next()?;
                Some(match record {
                    Ok(record) => table_row(path, &record, at, &self.columns),
                    Err(e) => Err(unreadable(e.position().map_or(0, |p| p.line() as usize), &e)),
                })
            }
            Rows::Json(lines) => loop {
                let (at, line) = lines.next()?;
                match line {
                    Ok(text) if text.trim().is_empty() => {}
                    Ok(text) => return Some(json_row(path, at + 1, &text, &self.columns)),
                    Err(e) => return Some(Err(unreadable(at + 1, &e))),
                }
            },
            Rows::Arrays { ids, types, mask, labels, next } => {
                let row = *next;
                *next += 1;
                (row < ids.nrows()).then(|| {
                    let real = |at: usize| mask.as_ref().is_none_or(|m| m[[row, at]] != 0);
                    let cut = |m: &Matrix| (0..m.ncols()).filter(|&at| real(at)).map(|at| m[[row, at]]).collect();
                    let ids: Vec<i64> = cut(ids);
                    let types = types.as_ref().map_or_else(|| vec![0; ids.len()], cut);
                    let label = labels.as_ref().map(|l| self.columns.label(path, row + 1, &l[row])).transpose()?;
                    Ok(Example { content: Content::Ids { ids, types }, label, line: row + 1 })
                })
            }
        }
    }
}

fn table(path: &Path, file: File, delimiter: u8, columns: &Columns) -> Result<Rows> {
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(delimiter)
        // GLUE's .tsv files hold bare quotation marks.
        .quoting(delimiter == b',')
        .terminator(csv::Terminator::Any(b'\n'))
        .flexible(true)
        .from_reader(Newlines::new(BufReader::new(file)));
    let header = reader.headers().map_err(|e| Error::line(path, 1, format!("cannot be read: {e}")))?.clone();
    let names: Vec<&str> = header.iter().map(|h| h.trim_start_matches('\u{feff}')).collect();
    let listed = names.join(", ");
    if names.iter().all(|n| n.is_empty()) {
        return Err(Error::data(path, "it is empty; a table with a header line is needed"));
    }
    let position = |name: &str| names.iter().position(|n| *n == name);
    let wanted = |name: &String| {
        position(name).ok_or_else(|| Error::line(path, 1, format!("there is no column `{name}`; it has {listed}")))
    };
    let (text, pair) = columns.texts(&|name| position(name).is_some()).ok_or_else(|| {
        let reason = format!("which column holds the text? It has {listed}");
        Error::line(path, 1, reason).helped_by(&[Setting::TextColumn])
    })?;
    let (text, pair) = (wanted(&text)?, pair.as_ref().map(wanted).transpose()?);
    let label = columns.label.as_ref().map(wanted).transpose()?;
    let at = At { text, pair, label, width: names.len() };
    Ok(Rows::Table { records: reader.into_records(), at })
}

fn table_row(path: &Path, record: &csv::StringRecord, at: &At, columns: &Columns) -> Result<Example> {
    let line = record.position().map_or(0, |p| p.line() as usize);
    if record.len() != at.width {
        // A text with a bare separator in it, or a line that was cut: which of its columns is which is not known.
        return Err(Error::line(path, line, format!("it has {} columns, the header {}", record.len(), at.width)));
    }
    let content = Content::Text { text: record[at.text].to_owned(), pair: at.pair.map(|i| record[i].to_owned()) };
    let label = at.label.map(|i| columns.label(path, line, &record[i])).transpose()?;
    Ok(Example { content, label, line })
}

fn json_row(path: &Path, line: usize, text: &str, columns: &Columns) -> Result<Example> {
    let fault = |reason: String| Error::line(path, line, reason);
    let object: Value = serde_json::from_str(text).map_err(|e| fault(format!("not a JSON object: {e}")))?;
    let Value::Object(object) = object else { return Err(fault("not a JSON object".to_owned())) };
    let keys = || object.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
    let string = |name: &str| match object.get(name) {
        Some(Value::String(s)) => Ok(s.clone()),
        Some(other) => Err(fault(format!("`{name}` is {other}, a text is needed"))),
        None => Err(fault(format!("there is no key `{name}`; it has {}", keys()))),
    };
    let label = match &columns.label {
        None => None,
        Some(name) => Some(match object.get(name) {
            Some(Value::String(s)) => columns.label(path, line, s)?,
            Some(Value::Number(number)) => number.to_string(),
            Some(Value::Bool(value)) => u8::from(*value).to_string(),
            Some(other) => return Err(fault(format!("label `{name}` is {other}, one number or word is needed"))),
            None => return Err(fault(format!("there is no key `{name}`; it has {}", keys()))),
        }),
    };
    let integers = |name: &str| -> Result<Option<Vec<i64>>> {
        let Some(value) = object.get(name) else { return Ok(None) };
        let list = value.as_array().and_then(|a| a.iter().map(Value::as_i64).collect::<Option<Vec<i64>>>());
        list.map(Some).ok_or_else(|| fault(format!("`{name}` is not a list of integers")))
    };
    if columns.text.is_none()
        && let Some(ids) = integers("input_ids")?
    {
        let other = |name: &str, default: i64| -> Result<Vec<i64>> {
            let values = integers(name)?.unwrap_or_else(|| vec![default; ids.len()]);
            match values.len() == ids.len() {
                true => Ok(values),
                false => Err(fault(format!("{} in `input_ids`, but {} in `{name}`", ids.len(), values.len()))),
            }
        };
        let (types, mask) = (other("token_type_ids", 0)?, other("attention_mask", 1)?);
        let real = |values: &[i64]| values.iter().zip(&mask).filter(|(_, keep)| **keep != 0).map(|(v, _)| *v).collect();
        return Ok(Example { content: Content::Ids { ids: real(&ids), types: real(&types) }, label, line });
    }
    let (text, pair) = columns.texts(&|name| object.contains_key(name)).ok_or_else(|| {
        let reason = format!("which key holds the text? It has {}, and no `input_ids`", keys());
        fault(reason).helped_by(&[Setting::TextColumn])
    })?;
    let pair = pair.map(|name| string(&name)).transpose()?;
    Ok(Example { content: Content::Text { text: string(&text)?, pair }, label, line })
}

fn arrays(path: &Path, columns: &Columns) -> Result<Rows> {
    let named = npz::read(path)?;
    let matrix = |name: &str| -> Result<Option<Matrix>> {
        let Some((_, tensor)) = named.iter().find(|(n, _)| n == name) else { return Ok(None) };
        let matrix = tensor.to_i64().and_then(|a| a.into_dimensionality().ok());
        matrix.map(Some).ok_or_else(|| Error::data(path, format!("`{name}` is not an integer matrix [rows, length]")))
    };
    let Some(ids) = matrix("input_ids")? else {
        let names = named.iter().map(|(n, _)| n.as_str()).collect::<Vec<_>>().join(", ");
        return Err(Error::data(path, format!("there is no array `input_ids` [rows, length]; it has {names}")));
    };
    let (types, mask) = (matrix("token_type_ids")?, matrix("attention_mask")?);
    for (name, other) in [("token_type_ids", &types), ("attention_mask", &mask)] {
        if let Some(other) = other
            && other.dim() != ids.dim()
        {
            return Err(Error::data(path, format!("`{name}` is {:?}, `input_ids` {:?}", other.dim(), ids.dim())));
        }
    }
    let labels = match &columns.label {
        None => None,
        Some(name) => {
            let tensor = named.iter().find(|(n, _)| n == name).map(|(_, t)| t);
            let tensor = tensor.ok_or_else(|| Error::data(path, format!("there is no array `{name}`")))?;
            if tensor.shape() != [ids.nrows()] {
                return Err(Error::data(path, format!("`{name}` is {:?}, one label a row is needed", tensor.shape())));
            }
            Some(label_texts(tensor))
        }
    };
    Ok(Rows::Arrays { ids, types, mask, labels, next: 0 })
}

/// A reader that ends lines with a lone `\n`: the `csv` crate counts lines by those, one too few where a `\r` comes first.
struct Newlines<R> {
    inner: R,
}

impl<R> Newlines<R> {
    fn new(inner: R) -> Self {
        Self { inner }
    }
}

impl<R: BufRead> Read for Newlines<R> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        if into.is_empty() {
            return Ok(0);
        }
        let available = self.inner.fill_buf()?;
        let until = match available.iter().position(|&b| b == b'\r') {
            Some(0) => {
                self.inner.consume(1);
                // What follows it may not be there yet.
                into[0] = if self.inner.fill_buf()?.first() == Some(&b'\n') { b'\n' } else { b'\r' };
                self.inner.consume(usize::from(into[0] == b'\n'));
                return Ok(1);
            }
            Some(at) => at,
            None => available.len(),
        };
        let count = until.min(into.len());
        into[..count].copy_from_slice(&available[..count]);
        self.inner.consume(count);
        Ok(count)
    }
}

fn label_texts(tensor: &Tensor) -> Vec<String> {
    match tensor.to_i64() {
        Some(integers) => integers.iter().map(i64::to_string).collect(),
        None => tensor.to_f32().iter().map(f32::to_string).collect(),
    }
}

#[cfg(test)]
mod tests {
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
        assert_eq!(unnamed.settings(), [Setting::TextColumn], "{unnamed}");
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

//! Examples out of data files, one at a time: files may be larger than memory.

use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};

use mabert_runtime::{Tensor, npz};
use serde::Serialize;
use serde_json::Value;

use crate::{Error, Result};

/// Which columns of a table (or keys of a JSON object) hold what.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Columns {
    /// The text. Without it, `text`, `sentence` or `sentence1` is taken where there is one.
    pub text: Option<String>,
    /// The second text of a pair. Without it, `sentence2` is taken where the text is `sentence1`.
    pub pair: Option<String>,
    /// The label; labels are not read without it.
    pub label: Option<String>,
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

impl Example {
    /// A pair of texts the other way round, without its label, which may not hold then; `None` for anything else.
    pub(super) fn turned(&self) -> Option<Self> {
        let Content::Text { text, pair: Some(pair) } = &self.content else { return None };
        let content = Content::Text { text: pair.clone(), pair: Some(text.clone()) };
        Some(Self { content, label: None, line: self.line })
    }
}

const TEXT_COLUMNS: [&str; 3] = ["text", "sentence", "sentence1"];

/// The examples of a file, read as they are asked for.
pub struct Reader {
    path: PathBuf,
    rows: Rows,
    columns: Columns,
}

enum Rows {
    Lines(std::iter::Enumerate<std::io::Lines<BufReader<File>>>),
    Table { records: csv::StringRecordsIntoIter<File>, at: At },
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
    /// Opens a `.txt` (one text a line), `.tsv` or `.csv` (with a header), `.jsonl` or `.npz` file.
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
            "jsonl" => Rows::Json(lines()?),
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
                    Ok(record) => table_row(path, &record, at),
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
                    let kept = mask.as_ref().map_or(ids.ncols(), |m| {
                        m.row(row).iter().rposition(|&keep| keep != 0).map_or(0, |last| last + 1)
                    });
                    let cut = |m: &Matrix| m.row(row).iter().copied().take(kept).collect::<Vec<i64>>();
                    let types = types.as_ref().map_or_else(|| vec![0; kept], cut);
                    let label = labels.as_ref().map(|l| l[row].clone());
                    Ok(Example { content: Content::Ids { ids: cut(ids), types }, label, line: row + 1 })
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
        .flexible(true)
        .from_reader(file);
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
    let text = match &columns.text {
        Some(name) => wanted(name)?,
        None => TEXT_COLUMNS.iter().find_map(|n| position(n)).ok_or_else(|| {
            Error::line(path, 1, format!("which column holds the text? Say --text-column; it has {listed}"))
        })?,
    };
    let pair = match &columns.pair {
        Some(name) => Some(wanted(name)?),
        None if columns.text.is_none() && names[text] == "sentence1" => position("sentence2"),
        None => None,
    };
    let label = columns.label.as_ref().map(wanted).transpose()?;
    let at = At { text, pair, label, width: names.len() };
    Ok(Rows::Table { records: reader.into_records(), at })
}

fn table_row(path: &Path, record: &csv::StringRecord, at: &At) -> Result<Example> {
    let line = record.position().map_or(0, |p| p.line() as usize);
    let field = |i: usize| {
        record
            .get(i)
            .map(str::to_owned)
            .ok_or_else(|| Error::line(path, line, format!("it has {} columns, the header {}", record.len(), at.width)))
    };
    let content = Content::Text { text: field(at.text)?, pair: at.pair.map(field).transpose()? };
    Ok(Example { content, label: at.label.map(field).transpose()?.map(|l| l.trim().to_owned()), line })
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
            Some(Value::String(s)) => s.clone(),
            Some(value @ (Value::Number(_) | Value::Bool(_))) => value.to_string(),
            Some(other) => return Err(fault(format!("label `{name}` is {other}"))),
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
        let types = integers("token_type_ids")?.unwrap_or_else(|| vec![0; ids.len()]);
        if types.len() != ids.len() {
            return Err(fault(format!("{} token ids, but {} token types", ids.len(), types.len())));
        }
        return Ok(Example { content: Content::Ids { ids, types }, label, line });
    }
    let name = match &columns.text {
        Some(name) => name.as_str(),
        None => TEXT_COLUMNS.into_iter().find(|n| object.contains_key(*n)).ok_or_else(|| {
            fault(format!("which key holds the text? Say --text-column, or give `input_ids`; it has {}", keys()))
        })?,
    };
    let pair = match &columns.pair {
        Some(pair) => Some(string(pair)?),
        None if columns.text.is_none() && name == "sentence1" && object.contains_key("sentence2") => {
            Some(string("sentence2")?)
        }
        None => None,
    };
    Ok(Example { content: Content::Text { text: string(name)?, pair }, label, line })
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
    fn faults_name_file_and_line() {
        let columns = Columns { label: Some("label".to_owned()), ..Columns::default() };
        let short = read("a.tsv", "sentence\tlabel\nfine\t1\nonly\n", &columns).unwrap_err().to_string();
        assert!(short.contains("a.tsv, line 3") && short.contains("1 columns"), "{short}");
        let missing = read("a.tsv", "sentence\tscore\n", &columns).unwrap_err().to_string();
        assert!(missing.contains("no column `label`") && missing.contains("sentence, score"), "{missing}");
        let unnamed = read("a.csv", "a,b\n1,2\n", &Columns::default()).unwrap_err().to_string();
        assert!(unnamed.contains("--text-column"), "{unnamed}");
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

//! A data file as it lies there: opened, its kind told, and read as often as it takes.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use super::columns::Columns;
use super::conll;
use super::json;
use super::quotes::{Quotes, Quoting};
use crate::{Error, Result, Setting};

/// A file of texts.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Data {
    /// The file.
    pub path: PathBuf,
    /// Its columns.
    pub columns: Columns,
    /// How it holds its examples; without it the ending of its name says, or, where it has none, what is in it.
    pub format: Option<DataFormat>,
}

impl Data {
    /// A file whose columns have [usual names](crate::data::USUAL_TEXTS).
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), columns: Columns::default(), format: None }
    }

    /// Says which columns hold what.
    #[must_use]
    pub fn columns(mut self, columns: Columns) -> Self {
        self.columns = columns;
        self
    }

    /// Says how it holds its examples.
    #[must_use]
    pub fn format(mut self, format: impl Into<Option<DataFormat>>) -> Self {
        self.format = format.into();
        self
    }
}

/// How a file holds its examples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DataFormat {
    /// A text a line.
    Text,
    /// A table with a header, its fields between tabs.
    Tsv,
    /// A table with a header, its fields between commas.
    Csv,
    /// Objects, a line each or in an array, or lists of what each column holds.
    Json,
    /// Arrays of token ids.
    Npz,
    /// A word and its tag a line, a blank line after each sentence.
    Conll,
}

impl DataFormat {
    /// All of them.
    pub const ALL: [Self; 6] = [Self::Text, Self::Tsv, Self::Csv, Self::Json, Self::Npz, Self::Conll];

    /// The usual ending of a file's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Text => "txt",
            Self::Tsv => "tsv",
            Self::Csv => "csv",
            Self::Json => "jsonl",
            Self::Npz => "npz",
            Self::Conll => "conll",
        }
    }

    /// Told by the ending of a file's name.
    pub fn from_name(path: &Path) -> Option<Self> {
        let ending = path.extension()?.to_str()?.to_ascii_lowercase();
        match ending.as_str() {
            "json" | "ndjson" => Some(Self::Json),
            ending => Self::ALL.into_iter().find(|format| format.name() == ending),
        }
    }
}

/// An open data file. A pipe was read to its end, into a temporary file.
#[derive(Debug)]
pub struct DataFile {
    path: PathBuf,
    columns: Columns,
    format: DataFormat,
    file: File,
    /// Where the text begins, behind a mark of its encoding.
    start: u64,
    /// Of a table.
    quotes: Quotes,
    /// Whether neither its name nor a user told the format.
    guessed: bool,
}

/// Bytes that tell what kind of file it is.
const HEAD: u64 = 1 << 16;

impl DataFile {
    /// Opens a file and tells its kind.
    ///
    /// # Errors
    /// It cannot be read, is of another kind, or its kind cannot be told.
    pub fn open(data: &Data) -> Result<Self> {
        let Data { path, columns, format } = data;
        let file = open(path)?;
        let told = format.or_else(|| DataFormat::from_name(path));
        if told.is_none() && path.extension().is_some() {
            let reason = "not a kind of data file that is read: .txt, .tsv, .csv, .json, .jsonl, .npz, .conll";
            return Err(Error::data(path, reason).helped_by(&[Setting::DataFormat]));
        }
        let mut opened = Self {
            path: path.clone(),
            columns: columns.clone(),
            format: told.unwrap_or(DataFormat::Text),
            file,
            start: 0,
            quotes: Quotes::default(),
            guessed: told.is_none(),
        };
        if opened.format == DataFormat::Npz {
            return opened.if_no_pipe();
        }
        let head = opened.head()?;
        opened.start = mark_of_encoding(path, &head)?;
        if told.is_none() {
            opened.format = opened.told_by(&head[opened.start as usize..])?;
        }
        // Tables of words and tags have the same ending as tables with a header.
        let is_table = format.is_none() && opened.format == DataFormat::Tsv && !opened.columns.are_named();
        if is_table && is_conll(&head[opened.start as usize..]) {
            opened.format = DataFormat::Conll;
        }
        if opened.format == DataFormat::Npz {
            return opened.if_no_pipe();
        }
        if let Some(delimiter) = opened.delimiter() {
            opened.quotes = Quotes::scan(opened.text()?, delimiter).map_err(|e| opened.unreadable(&e))?;
            opened.refuse_open_quote(delimiter)?;
        }
        Ok(opened)
    }

    fn if_no_pipe(self) -> Result<Self> {
        match self.path.is_file() {
            true => Ok(self),
            false => {
                Err(Error::data(&self.path, "an .npz file is read from its end, which a pipe cannot: give a file"))
            }
        }
    }

    /// The same file, of which other columns are read.
    #[must_use]
    pub fn with_columns(mut self, columns: Columns) -> Self {
        self.columns = columns;
        self
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its columns.
    pub fn columns(&self) -> &Columns {
        &self.columns
    }

    /// How it holds its examples.
    pub fn format(&self) -> DataFormat {
        self.format
    }

    /// The column that holds the labels of what is no classification of whole texts, by the names of the usual sets: the tags
    /// of words, or the answers to questions.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn usual_label(&self) -> Result<Option<&'static str>> {
        match self.format {
            DataFormat::Conll => Ok(Some("tag")),
            DataFormat::Json => json::usual_label(self),
            _ => Ok(None),
        }
    }

    /// What stands between the fields of a table.
    pub(super) fn delimiter(&self) -> Option<u8> {
        match self.format {
            DataFormat::Tsv => Some(b'\t'),
            DataFormat::Csv => Some(b','),
            _ => None,
        }
    }

    /// How the quotation marks of a table are read.
    pub(super) fn quoting(&self) -> Quoting {
        match self.format {
            DataFormat::Csv => Quoting::Marks,
            _ => self.quotes.quoting(),
        }
    }

    /// The text from its beginning; one reader at a time.
    pub(super) fn text(&self) -> Result<BufReader<File>> {
        let mut file = self.file.try_clone().map_err(|e| self.unreadable(&e))?;
        file.seek(SeekFrom::Start(self.start)).map_err(|e| self.unreadable(&e))?;
        Ok(BufReader::new(file))
    }

    /// What a user may not expect of how it is read.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if self.guessed && self.format == DataFormat::Text {
            notes.push("it is read as lines of text: its name has no ending that says otherwise".to_owned());
        }
        if self.format == DataFormat::Tsv {
            notes.extend(self.quotes.note());
        }
        notes.into_iter().map(|note| format!("{}: {note}", self.path.display())).collect()
    }

    fn unreadable(&self, error: &std::io::Error) -> Error {
        Error::data(&self.path, format!("cannot be read: {error}"))
    }

    fn head(&self) -> Result<Vec<u8>> {
        let mut head = Vec::new();
        self.text()?.take(HEAD).read_to_end(&mut head).map_err(|e| self.unreadable(&e))?;
        Ok(head)
    }

    /// What kind of file begins so.
    fn told_by(&self, head: &[u8]) -> Result<DataFormat> {
        if head.starts_with(b"PK\x03\x04") {
            return Ok(DataFormat::Npz);
        }
        if head.trim_ascii_start().starts_with(b"{") || head.trim_ascii_start().starts_with(b"[") {
            return Ok(DataFormat::Json);
        }
        if !self.columns.are_named() && is_conll(head) {
            return Ok(DataFormat::Conll);
        }
        let first = head.lines().next().and_then(|line| line.ok()).unwrap_or_default();
        for format in [DataFormat::Tsv, DataFormat::Csv] {
            let delimiter = if format == DataFormat::Tsv { '\t' } else { ',' };
            let names: Vec<&str> = first.split(delimiter).map(|name| name.trim_matches(['"', '\r'])).collect();
            if self.columns.are_among(&names) {
                return Ok(format);
            }
        }
        if first.contains('\t') || self.columns.are_named() {
            let reason = "neither its name nor its first line tells what kind of data it is: say which";
            return Err(Error::data(&self.path, reason).helped_by(&[Setting::DataFormat]));
        }
        Ok(DataFormat::Text)
    }

    /// A mark that is never closed would swallow the rest of the file.
    fn refuse_open_quote(&self, delimiter: u8) -> Result<()> {
        match self.quotes.never_closed() {
            Some(line) if delimiter == b',' => {
                let reason = "a quotation mark opens a field here and is never closed: double the marks within fields";
                Err(Error::line(&self.path, line, reason))
            }
            _ => Ok(()),
        }
    }
}

/// Whether a file that begins so holds words and tags.
fn is_conll(head: &[u8]) -> bool {
    conll::is_told_by(&String::from_utf8_lossy(head))
}

/// A file that can be read from its beginning again.
fn open(path: &Path) -> Result<File> {
    let unreadable = |e: std::io::Error| Error::data(path, format!("cannot be read: {e}"));
    let kind = std::fs::metadata(path).map_err(unreadable)?.file_type();
    if kind.is_dir() {
        return Err(Error::data(path, "it is a folder; name a file in it"));
    }
    if is_device(kind) {
        return Err(Error::data(path, "it is a device or a terminal; give a file or a pipe"));
    }
    let mut file = File::open(path).map_err(unreadable)?;
    if kind.is_file() {
        return Ok(file);
    }
    let mut copy = tempfile::tempfile().map_err(Error::Temporary)?;
    let mut buffer = vec![0; HEAD as usize];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(copy),
            Ok(count) => copy.write_all(&buffer[..count]).map_err(Error::Temporary)?,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(unreadable(e)),
        }
    }
}

#[cfg(unix)]
fn is_device(kind: std::fs::FileType) -> bool {
    use std::os::unix::fs::FileTypeExt as _;
    kind.is_char_device() || kind.is_block_device()
}

#[cfg(not(unix))]
fn is_device(_: std::fs::FileType) -> bool {
    false
}

/// Bytes of the mark that says that a text is UTF-8.
fn mark_of_encoding(path: &Path, head: &[u8]) -> Result<u64> {
    match head {
        [0xef, 0xbb, 0xbf, ..] => Ok(3),
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => Err(Error::data(path, "it is UTF-16: save it as UTF-8")),
        _ => Ok(0),
    }
}

#[cfg(test)]
mod tests {
    use super::super::lines::LONGEST;
    use super::super::reader::{Example, Reader};
    use super::*;

    fn written(folder: &Path, name: &str, bytes: &[u8]) -> PathBuf {
        let path = folder.join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    #[test]
    fn kinds_are_told_by_ending_by_content_or_by_the_user() {
        use DataFormat::{Csv, Json, Npz, Text, Tsv};
        let folder = tempfile::tempdir().unwrap();
        let told = |name: &str, bytes: &str| {
            DataFile::open(&Data::new(written(folder.path(), name, bytes.as_bytes()))).map(|file| file.format())
        };
        for (name, bytes, format) in [
            ("a.tsv", "a\tb\n", Tsv),
            ("a.NDJSON", "", Json),
            ("fine", "a film\nanother\n", Text),
            ("table", "sentence\tlabel\na\t1\n", Tsv),
            ("quoted", "\"label\",\"sentence\"\r\n1,a\r\n", Csv),
            ("one column", "sentence\na\n", Tsv),
            ("commas", "a film, as it were\n", Text),
            ("lines", "\u{feff}\n {\"text\": \"a\"}", Json),
            ("array", "[{\"text\": \"a\"}]", Json),
            ("zip", "PK\u{3}\u{4}", Npz),
        ] {
            assert_eq!(told(name, bytes).unwrap(), format, "{name}");
        }
        for (name, bytes) in [("unclear", "a\tb\n"), ("a.parquet", "PAR1")] {
            assert_eq!(told(name, bytes).unwrap_err().settings(), [Setting::DataFormat], "{name}");
        }
        let path = written(folder.path(), "lines.dat", b"a film\n");
        assert_eq!(DataFile::open(&Data::new(path).format(Text)).unwrap().format(), Text);
        let utf16 = DataFile::open(&Data::new(written(folder.path(), "a.txt", b"\xff\xfea\0"))).unwrap_err();
        assert!(utf16.to_string().contains("UTF-16"), "{utf16}");
    }

    #[test]
    fn an_endless_line_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        for (name, head) in [
            ("a.txt", ""),
            ("a.jsonl", "{\"text\": \""),
            ("a.json", "[{\"text\": \""),
            ("a.tsv", "text\tlabel\n"),
            ("a.csv", "text,label\n"),
        ] {
            let path = written(folder.path(), name, head.as_bytes());
            let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            file.set_len(LONGEST as u64 + 100).unwrap();
            let read = || Reader::new(&DataFile::open(&Data::new(&path))?)?.collect::<Result<Vec<Example>>>();
            let reason = read().unwrap_err().to_string();
            assert!(reason.contains(name) && reason.contains("more than 64 MB"), "{reason}");
        }
    }

    #[test]
    fn a_mark_that_is_never_closed_swallows_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = written(folder.path(), "a.csv", b"label,text\n1,fine\n0,\"bad\n1,fine\n");
        let reason = DataFile::open(&Data::new(path)).unwrap_err().to_string();
        assert!(reason.contains("line 3") && reason.contains("never closed"), "{reason}");
    }
}

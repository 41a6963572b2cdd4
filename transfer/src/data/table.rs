//! Examples out of tables: `.tsv` and `.csv` with a header.

use std::cell::Cell;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use super::columns::Columns;
use super::lines::{LONGEST, too_long};
use super::reader::{Content, Example, unreadable};
use crate::{Error, Result, Setting};

/// A table as it is read.
pub(super) struct Table {
    records: csv::StringRecordsIntoIter<Newlines<BufReader<File>>>,
    positions: Positions,
}

/// Positions of the columns of a table.
struct Positions {
    text: usize,
    pair: Option<usize>,
    label: Option<usize>,
    /// How many columns there are.
    width: usize,
}

impl Table {
    /// Reads the header.
    pub(super) fn open(path: &Path, file: File, delimiter: u8, columns: &Columns) -> Result<Self> {
        let mut reader = csv::ReaderBuilder::new()
            .delimiter(delimiter)
            // GLUE's .tsv files hold bare quotation marks.
            .quoting(delimiter == b',')
            .terminator(csv::Terminator::Any(b'\n'))
            .flexible(true)
            .from_reader(Newlines { inner: BufReader::new(file), left: Cell::new(LONGEST) });
        let header = reader.headers().map_err(|e| unreadable(path, 1, &e))?.clone();
        let names: Vec<&str> = header.iter().map(|h| h.trim_start_matches('\u{feff}')).collect();
        if names.iter().all(|n| n.is_empty()) {
            return Err(Error::data(path, "it is empty; a table with a header line is needed"));
        }
        let positions = Positions::find(path, &names, columns)?;
        Ok(Self { records: reader.into_records(), positions })
    }

    pub(super) fn next(&mut self, path: &Path, columns: &Columns) -> Option<Result<Example>> {
        self.records.reader().get_ref().left.set(LONGEST);
        Some(match self.records.next()? {
            Ok(record) => self.positions.example(path, &record, columns),
            Err(e) => Err(unreadable(path, e.position().map_or(0, |p| p.line() as usize), &e)),
        })
    }
}

impl Positions {
    fn find(path: &Path, names: &[&str], columns: &Columns) -> Result<Self> {
        let listed = names.join(", ");
        let position = |name: &str| names.iter().position(|n| *n == name);
        let named = |name: &String| {
            position(name).ok_or_else(|| Error::line(path, 1, format!("there is no column `{name}`; it has {listed}")))
        };
        let (text, pair) = columns.texts(&|name| position(name).is_some()).ok_or_else(|| {
            let reason = format!("which column holds the text? It has {listed}");
            Error::line(path, 1, reason).helped_by(&[Setting::TextColumn])
        })?;
        let (text, pair) = (named(&text)?, pair.as_ref().map(named).transpose()?);
        let label = columns.label.as_ref().map(named).transpose()?;
        Ok(Self { text, pair, label, width: names.len() })
    }

    fn example(&self, path: &Path, record: &csv::StringRecord, columns: &Columns) -> Result<Example> {
        let line = record.position().map_or(0, |p| p.line() as usize);
        if record.len() != self.width {
            // A text with a bare separator in it, or a line that was cut: which of its columns is which is not known.
            return Err(Error::line(path, line, format!("it has {} columns, the header {}", record.len(), self.width)));
        }
        let pair = self.pair.map(|at| record[at].to_owned());
        let content = Content::Text { text: record[self.text].to_owned(), pair };
        let label = self.label.map(|at| columns.label(path, line, &record[at])).transpose()?;
        Ok(Example { content, label, line })
    }
}

/// A reader that ends lines with a lone `\n`: the `csv` crate counts lines by those, one too few where a `\r` comes first.
/// That crate keeps a record in memory however long it is; it gets so much and no more.
struct Newlines<R> {
    inner: R,
    /// Bytes that may still be read for the record that is asked for.
    left: Cell<u64>,
}

impl<R: BufRead> Read for Newlines<R> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let count = self.read_some(into)?;
        let left = self.left.get().checked_sub(count as u64).ok_or_else(|| too_long(LONGEST))?;
        self.left.set(left);
        Ok(count)
    }
}

impl<R: BufRead> Newlines<R> {
    fn read_some(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
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

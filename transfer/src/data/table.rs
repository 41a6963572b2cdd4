//! Examples out of tables: `.tsv` and `.csv` with a header.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

use super::columns::Columns;
use super::label::Label;
use super::lines::{LONGEST, too_long};
use super::quotes::Quoting;
use super::reader::{Content, Example, Row, unreadable};
use super::source::DataFile;
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
    /// One, or as many as there are classes.
    labels: Vec<usize>,
    /// How many columns there are.
    width: usize,
}

impl Table {
    /// Reads the header.
    pub(super) fn open(file: &DataFile, delimiter: u8) -> Result<Self> {
        let path = file.path();
        let mut reader = csv::ReaderBuilder::new()
            .delimiter(delimiter)
            .quoting(file.quoting() == Quoting::Marks)
            .terminator(csv::Terminator::Any(b'\n'))
            .flexible(true)
            .from_reader(Newlines { inner: file.text()?, length: 0 });
        let header = reader.headers().map_err(|e| unreadable(path, 1, &e))?.clone();
        let names: Vec<&str> = header.iter().collect();
        if names.iter().all(|n| n.is_empty()) {
            return Err(Error::data(path, "it is empty; a table with a header line is needed"));
        }
        let positions = Positions::find(path, &names, file.columns())?;
        Ok(Self { records: reader.into_records(), positions })
    }

    pub(super) fn next(&mut self, path: &Path, columns: &Columns) -> Option<Result<Row>> {
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
            let at = position(name)
                .ok_or_else(|| Error::line(path, 1, format!("there is no column `{name}`; it has {listed}")))?;
            match names.iter().filter(|other| *other == name).count() {
                1 => Ok(at),
                count => Err(Error::line(path, 1, format!("{count} columns are called `{name}`: which one is meant?"))),
            }
        };
        let (text, pair) = columns.texts(&|name| position(name).is_some()).ok_or_else(|| {
            let reason = format!("which column holds the text? It has {listed}");
            Error::line(path, 1, reason).helped_by(&[Setting::TextColumn])
        })?;
        let (text, pair) = (named(&text)?, pair.as_ref().map(named).transpose()?);
        let labels = columns.labels(&|name| position(name).is_some());
        let labels = labels.iter().map(named).collect::<Result<_>>()?;
        Ok(Self { text, pair, labels, width: names.len() })
    }

    fn example(&self, path: &Path, record: &csv::StringRecord, columns: &Columns) -> Result<Row> {
        let line = record.position().map_or(0, |p| p.line() as usize);
        if record.len() != self.width {
            // A text with a bare separator in it, or a line that was cut: which of its columns is which is not known.
            return Err(Error::line(path, line, format!("it has {} columns, the header {}", record.len(), self.width)));
        }
        let texts = [Some(self.text), self.pair].into_iter().flatten();
        // pandas writes a text that is missing as an empty one.
        if texts.into_iter().any(|at| record[at].trim().is_empty()) {
            return Ok(Row::Without(line));
        }
        let pair = self.pair.map(|at| record[at].to_owned());
        let content = Content::Text { text: record[self.text].to_owned(), pair };
        let label = match self.labels.as_slice() {
            [] => None,
            [at] => Some(Label::of_cell(columns, path, line, &record[*at])?),
            several => Some(Label::of_marks(path, line, several.iter().map(|at| &record[*at]))?),
        };
        Ok(Row::Example(Example { content, label, line }))
    }
}

/// A reader that ends lines with a lone `\n`: the `csv` crate counts lines by those, one too few where a `\r` comes first.
/// No line may be endless.
struct Newlines<R> {
    inner: R,
    /// Bytes of the line so far.
    length: usize,
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
        match into[..count].iter().rposition(|&b| b == b'\n') {
            Some(end) => self.length = count - end,
            None => self.length += count,
        }
        if self.length > LONGEST { Err(too_long()) } else { Ok(count) }
    }
}

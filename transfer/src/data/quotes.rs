//! Quotation marks in tables: pandas stands fields between them and doubles those within; in GLUE's files they are text.

use std::io::BufRead;

/// How a table's quotation marks are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Quoting {
    /// As part of the text.
    Text,
    /// As what a field stands between.
    Marks,
}

/// What a table's quotation marks are like, read both ways.
#[derive(Debug, Default)]
pub(super) struct Quotes {
    /// Fields that stand between marks.
    quoted: usize,
    /// Those of them that need not.
    needless: usize,
    /// Those of them that hold a separator or a line end.
    spanning: usize,
    /// Whether all names of the header stand between marks.
    header_quoted: bool,
    /// Whether a mark stands where it cannot if marks are what fields stand between.
    stray: bool,
    /// The line of a mark that opens a field and is never closed.
    open: Option<usize>,
    /// Whether all records have as many fields as the first, if marks are what fields stand between.
    even_with_marks: bool,
    /// The same of lines, if marks are text.
    even_as_text: bool,
}

/// Where a field is.
#[derive(Clone, Copy, PartialEq)]
enum At {
    Start,
    Bare,
    Quoted,
    /// Behind a mark within a quoted field: its end, or the first of a doubled one.
    Mark,
}

/// A record, as it is counted.
#[derive(Default)]
struct Width {
    fields: usize,
    blank: bool,
    first: Option<usize>,
    even: bool,
}

impl Width {
    fn new() -> Self {
        Self { fields: 1, blank: true, first: None, even: true }
    }

    fn end(&mut self) {
        if !self.blank {
            self.even &= *self.first.get_or_insert(self.fields) == self.fields;
        }
        (self.fields, self.blank) = (1, true);
    }
}

impl Quotes {
    /// Reads a whole table, as far as it takes to tell.
    pub(super) fn scan(mut text: impl BufRead, delimiter: u8) -> std::io::Result<Self> {
        let mut scan = Scan::new(delimiter);
        loop {
            let bytes = text.fill_buf()?;
            let count = bytes.len();
            if count == 0 || !bytes.iter().all(|&byte| scan.goes_on(byte)) {
                return Ok(scan.end());
            }
            text.consume(count);
        }
    }

    /// How the marks of a tab-separated file are read: as what fields stand between, where every mark fits that and there
    /// is a reason for each, as pandas writes them; else as text.
    pub(super) fn quoting(&self) -> Quoting {
        let fits = self.quoted > 0 && !self.stray && self.open.is_none() && self.even_with_marks;
        // Two marks far apart may as well be text: then all lines are even as they are.
        let needed = self.needless == 0 && !(self.even_as_text && self.spanning > 0);
        if fits && (self.header_quoted || needed) { Quoting::Marks } else { Quoting::Text }
    }

    /// The line of a mark that opens a field and is never closed.
    pub(super) fn never_closed(&self) -> Option<usize> {
        self.open
    }

    /// Which way was taken, where fields stand between marks.
    pub(super) fn note(&self) -> Option<String> {
        match (self.quoting(), self.quoted) {
            (_, 0) => None,
            (Quoting::Marks, count) => {
                Some(format!("quotation marks around {count} fields are taken off, as pandas writes them"))
            }
            (Quoting::Text, _) => Some(
                "quotation marks are text, as in GLUE's files, though some fields stand between them: not all are as \
                 pandas writes them"
                    .to_owned(),
            ),
        }
    }
}

struct Scan {
    delimiter: u8,
    quotes: Quotes,
    at: At,
    line: usize,
    opened: usize,
    /// Whether the field under way holds what it must stand between marks for.
    needs: bool,
    spans: bool,
    with_marks: Width,
    as_text: Width,
}

impl Scan {
    fn new(delimiter: u8) -> Self {
        Self {
            delimiter,
            quotes: Quotes { header_quoted: true, ..Quotes::default() },
            at: At::Start,
            line: 1,
            opened: 0,
            needs: false,
            spans: false,
            with_marks: Width::new(),
            as_text: Width::new(),
        }
    }

    /// Takes a byte; whether more are needed. A tab-separated file with a stray mark is told; of a comma-separated one it is
    /// to be known whether its last field ends.
    fn goes_on(&mut self, byte: u8) -> bool {
        self.count_as_text(byte);
        self.at = match (self.at, byte) {
            (At::Start, b'"') => {
                (self.opened, self.needs, self.spans) = (self.line, false, false);
                self.with_marks.blank = false;
                At::Quoted
            }
            (At::Quoted, b'"') => At::Mark,
            (At::Quoted, _) => {
                if byte == self.delimiter || byte == b'\n' || byte == b'\r' {
                    (self.needs, self.spans) = (true, true);
                }
                At::Quoted
            }
            (At::Mark, b'"') => {
                self.needs = true;
                At::Quoted
            }
            (at, b'\r') => at,
            (at, b'\n') => {
                self.end_field(at);
                self.quotes.header_quoted &= self.with_marks.first.is_some() || at == At::Mark || self.with_marks.blank;
                self.with_marks.end();
                At::Start
            }
            (at, _) if byte == self.delimiter => {
                self.end_field(at);
                self.quotes.header_quoted &= self.with_marks.first.is_some() || at == At::Mark;
                self.with_marks.fields += 1;
                self.with_marks.blank = false;
                At::Start
            }
            (at, _) => {
                self.quotes.stray |= byte == b'"' || at == At::Mark;
                self.with_marks.blank = false;
                At::Bare
            }
        };
        self.line += usize::from(byte == b'\n');
        !(self.quotes.stray && self.delimiter == b'\t')
    }

    fn count_as_text(&mut self, byte: u8) {
        match byte {
            b'\n' => self.as_text.end(),
            b'\r' => {}
            _ => {
                self.as_text.fields += usize::from(byte == self.delimiter);
                self.as_text.blank = false;
            }
        }
    }

    fn end_field(&mut self, at: At) {
        if at == At::Mark {
            self.quotes.quoted += 1;
            self.quotes.needless += usize::from(!self.needs);
            self.quotes.spanning += usize::from(self.spans);
        }
    }

    fn end(mut self) -> Quotes {
        match self.at {
            At::Quoted => self.quotes.open = Some(self.opened),
            at => self.end_field(at),
        }
        self.with_marks.end();
        self.as_text.end();
        Quotes { even_with_marks: self.with_marks.even, even_as_text: self.as_text.even, ..self.quotes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scanned(text: &str) -> Quotes {
        Quotes::scan(text.as_bytes(), b'\t').unwrap()
    }

    #[test]
    fn marks_are_told_as_pandas_and_as_glue_write_them() {
        use Quoting::{Marks, Text};
        for (text, quoting) in [
            // pandas: only where it has to.
            ("sentence\tlabel\n\"he said \"\"no\"\"\"\t1\nfine\t0\n", Marks),
            ("sentence\tlabel\r\n\"he said \"\"no\"\"\"\t1\r\nfine\t0\r\n", Marks),
            ("sentence\tlabel\n\"a\tb\"\t1\nfine\t0\n", Marks),
            ("sentence\tlabel\n\"two\nlines\"\t1\nfine\t0\n", Marks),
            // pandas and R: everything.
            ("\"sentence\"\t\"label\"\n\"plain\"\t\"1\"\n", Marks),
            ("\"sentence\"\t\"label\"\n\"plain\"\t1", Marks),
            // GLUE: text.
            ("sentence\tlabel\n\"quoted\"\t1\nfine\t0\n", Text),
            ("sentence\tlabel\n\"a start\t1\nfine\t0\n", Text),
            ("sentence\tlabel\n\"one\" and \"two\"\t1\n", Text),
            ("sentence\tlabel\n\"a \"\"b\"\"\"\t1\na \"bare\" mark\t0\n", Text),
            // From one line to another, where all lines are whole.
            ("label\tsentence\n1\t\"he said\n0\tfine\"\n", Text),
            ("sentence\tlabel\nno marks\t1\n", Text),
            ("", Text),
        ] {
            assert_eq!(scanned(text).quoting(), quoting, "{text:?}");
        }
    }

    #[test]
    fn which_way_was_taken_is_said_where_it_matters() {
        assert_eq!(scanned("text\tlabel\na \"bare\" mark\t1\n").note(), None);
        assert!(scanned("text\tlabel\n\"a \"\"b\"\"\"\t1\n").note().unwrap().contains("around 1 fields"));
        assert!(scanned("text\tlabel\n\"all of it\"\t1\n").note().unwrap().contains("GLUE"));
        let open = Quotes::scan("text,label\nfine,1\n\"open,1\nfine,0\n".as_bytes(), b',').unwrap();
        assert_eq!(open.never_closed(), Some(3));
    }
}

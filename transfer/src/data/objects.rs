//! The values of a JSON array, or values one after another, cut out one at a time: files may be larger than memory.

use std::fs::File;
use std::io::{BufReader, Bytes, Error, ErrorKind, Read as _, Result};

use super::lines::{LONGEST, text, too_long};

/// Values as texts, each with the line on which it begins.
pub(super) struct Objects {
    bytes: Bytes<BufReader<File>>,
    /// A byte that was read and not taken.
    next: Option<u8>,
    line: usize,
    place: Place,
    is_array: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Place {
    /// Nothing was read yet.
    Start,
    /// Values one after another.
    Plain,
    /// Behind the bracket of an array, or behind a comma.
    Element,
    /// Behind a value of an array.
    Behind,
    /// There is no more, or nothing that could be told apart.
    End,
}

impl Objects {
    pub(super) fn new(text: BufReader<File>) -> Self {
        Self { bytes: text.bytes(), next: None, line: 1, place: Place::Start, is_array: false }
    }

    /// Whether they stand in an array; known once one was asked for.
    pub(super) fn is_array(&self) -> bool {
        self.is_array
    }

    /// The line that was read last.
    pub(super) fn line(&self) -> usize {
        self.line
    }

    /// The next value, with the line on which it begins.
    pub(super) fn next(&mut self) -> Option<(usize, Result<String>)> {
        if self.place == Place::End {
            return None;
        }
        let next = self.find();
        let line = self.line;
        match next {
            Ok(None) => {
                self.place = Place::End;
                None
            }
            Ok(Some(first)) => {
                let value = self.value(first);
                if value.is_err() {
                    self.place = Place::End;
                }
                Some((line, value))
            }
            Err(e) => {
                self.place = Place::End;
                Some((line, Err(e)))
            }
        }
    }

    /// The first byte of the next value.
    fn find(&mut self) -> Result<Option<u8>> {
        let fault = |reason: &str| Err(Error::new(ErrorKind::InvalidData, reason));
        loop {
            let byte = self.past_blanks()?;
            match (self.place, byte) {
                (Place::Start, Some(b'[')) => (self.place, self.is_array) = (Place::Element, true),
                (Place::Start | Place::Plain, byte) => {
                    self.place = Place::Plain;
                    return Ok(byte);
                }
                (Place::Element | Place::Behind, None) => return fault("the array does not end: a truncated file?"),
                (Place::Element | Place::Behind, Some(b']')) => {
                    return match self.past_blanks()? {
                        None => Ok(None),
                        Some(_) => fault("there is more behind the end of the array"),
                    };
                }
                (Place::Behind, Some(b',')) => self.place = Place::Element,
                (Place::Behind, Some(_)) => return fault("a comma is missing"),
                (Place::Element, Some(byte)) => {
                    self.place = Place::Behind;
                    return Ok(Some(byte));
                }
                (Place::End, _) => return Ok(None),
            }
        }
    }

    /// The value that begins with this byte.
    fn value(&mut self, first: u8) -> Result<String> {
        let mut value = vec![first];
        let mut depth = usize::from(matches!(first, b'{' | b'['));
        let (mut in_string, mut escaped) = (first == b'"', false);
        let is_nested = depth > 0 || in_string;
        while !is_nested || depth > 0 || in_string {
            let Some(byte) = self.byte()? else {
                return match is_nested {
                    true => Err(Error::new(ErrorKind::UnexpectedEof, "the object does not end: a truncated file?")),
                    false => text(&value),
                };
            };
            match byte {
                _ if escaped => escaped = false,
                b'\\' if in_string => escaped = true,
                b'"' => in_string = !in_string,
                _ if in_string => {}
                b'{' | b'[' if is_nested => depth += 1,
                b'}' | b']' if is_nested => depth -= 1,
                b',' | b']' if !is_nested => {
                    self.next = Some(byte);
                    return text(&value);
                }
                _ if !is_nested && byte.is_ascii_whitespace() => return text(&value),
                _ => {}
            }
            value.push(byte);
            if value.len() > LONGEST {
                return Err(too_long());
            }
        }
        text(&value)
    }

    fn past_blanks(&mut self) -> Result<Option<u8>> {
        loop {
            match self.byte()? {
                Some(byte) if byte.is_ascii_whitespace() => {}
                byte => return Ok(byte),
            }
        }
    }

    fn byte(&mut self) -> Result<Option<u8>> {
        let byte = match self.next.take() {
            Some(byte) => return Ok(Some(byte)),
            None => self.bytes.next().transpose()?,
        };
        self.line += usize::from(byte == Some(b'\n'));
        Ok(byte)
    }
}

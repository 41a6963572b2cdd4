//! Lines of a text, with their numbers; no line may be endless.

use std::fs::File;
use std::io::{BufRead as _, BufReader, Error, ErrorKind, Read as _, Result};

/// Bytes of a line, or of what else is read as one piece.
pub(super) const LONGEST: usize = 1 << 26;

/// The lines of a text, numbered from 1.
pub(super) struct NumberedLines {
    text: BufReader<File>,
    line: usize,
}

impl NumberedLines {
    pub(super) fn new(text: BufReader<File>) -> Self {
        Self { text, line: 0 }
    }

    /// The next line that is not blank and its number, also where it cannot be read.
    pub(super) fn next(&mut self) -> Option<(usize, Result<String>)> {
        loop {
            match self.next_or_blank()? {
                (_, Ok(text)) if text.trim().is_empty() => {}
                line => return Some(line),
            }
        }
    }

    /// The same, where blank lines mean something.
    pub(super) fn next_or_blank(&mut self) -> Option<(usize, Result<String>)> {
        self.line += 1;
        let mut bytes = Vec::new();
        let line = match self.text.by_ref().take(LONGEST as u64 + 1).read_until(b'\n', &mut bytes) {
            Ok(0) => return None,
            Ok(_) if bytes.len() > LONGEST => Err(too_long()),
            Ok(_) => text(bytes.strip_suffix(b"\n").map_or(&bytes[..], |b| b.strip_suffix(b"\r").unwrap_or(b))),
            Err(e) => Err(e),
        };
        Some((self.line, line))
    }
}

/// Bytes as text.
pub(super) fn text(bytes: &[u8]) -> Result<String> {
    let text = str::from_utf8(bytes).map_err(|_| Error::new(ErrorKind::InvalidData, "it is not UTF-8"))?;
    Ok(text.to_owned())
}

/// Says that something is longer than [`LONGEST`].
pub(super) fn too_long() -> Error {
    let reason = format!("it goes on for more than {} MB: is this a file of texts?", LONGEST >> 20);
    Error::new(ErrorKind::InvalidData, reason)
}

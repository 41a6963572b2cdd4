//! Lines of text, none of them longer than memory: a file may be one endless line.

use std::io::{BufRead, Error, ErrorKind, Read as _, Result};

/// Bytes that a line may have; texts have thousands.
pub(super) const LONGEST: u64 = 16 << 20;

/// The lines of a reader, without what ends them.
pub(super) struct Lines<R> {
    reader: R,
    longest: u64,
    ended: bool,
}

impl<R: BufRead> Lines<R> {
    pub(super) fn new(reader: R) -> Self {
        Self { reader, longest: LONGEST, ended: false }
    }
}

/// What is said of a line of more than `longest` bytes.
pub(super) fn too_long(longest: u64) -> Error {
    let reason = format!("it is longer than {} MiB, which no line of text is", longest >> 20);
    Error::new(ErrorKind::InvalidData, reason)
}

impl<R: BufRead> Iterator for Lines<R> {
    type Item = Result<String>;

    fn next(&mut self) -> Option<Result<String>> {
        if self.ended {
            return None;
        }
        let mut line = String::new();
        // Two bytes more, for what ends it.
        match (&mut self.reader).take(self.longest + 2).read_line(&mut line) {
            Ok(0) => return None,
            Ok(_) => {}
            Err(e) => return Some(Err(e)),
        }
        if line.ends_with('\n') {
            line.pop();
            if line.ends_with('\r') {
                line.pop();
            }
        }
        if line.len() as u64 > self.longest {
            self.ended = true;
            return Some(Err(too_long(self.longest)));
        }
        Some(Ok(line))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &[u8]) -> Vec<Result<String>> {
        Lines { longest: 4, ..Lines::new(text) }.collect()
    }

    #[test]
    fn lines_end_as_those_of_the_standard_library() {
        for text in ["a\nbb\r\n\nab\rd", "", "\n", "abcd\r\nabcd", "a\n\r\n"] {
            let expected: Vec<String> = text.as_bytes().lines().map(Result::unwrap).collect();
            let found: Vec<String> = lines(text.as_bytes()).into_iter().map(Result::unwrap).collect();
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn what_never_ends_is_refused_once() {
        for text in ["abcde", "abcde\n", "abcdefghi\nx"] {
            let found = lines(text.as_bytes());
            assert_eq!(found.len(), 1);
            assert!(found[0].as_ref().unwrap_err().to_string().contains("longer than"));
        }
        let endless = Lines::new(std::io::BufReader::new(std::io::repeat(b'x'))).next();
        assert!(endless.unwrap().unwrap_err().to_string().contains("longer than 16 MiB"));
    }
}

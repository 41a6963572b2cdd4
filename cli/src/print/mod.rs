//! Tables and numbers for people, JSON for programs; names out of files never reach a terminal as they are.

mod likeness;
pub(crate) mod summary;

use std::fmt::{Display, Write as _};
use std::io::Write as _;

use anyhow::{Context as _, Result};
use comfy_table::{Cell, CellAlignment, Table, presets};
use mabert_graph::{is_printable, printable};

use crate::arguments::Global;
pub(crate) use likeness::Likeness;

/// What a command prints on standard output.
#[derive(Default)]
pub(crate) struct Page(String);

impl Page {
    /// A line, whatever the names in it hold.
    pub(crate) fn line(&mut self, line: impl Display) {
        self.0 += &one_line(line);
        self.0.push('\n');
    }

    /// Lines, of which each name was [put on one](one_line).
    pub(crate) fn lines(&mut self, lines: impl Display) {
        let text = lines.to_string();
        text.lines().for_each(|line| self.line(line));
    }

    /// Prints it.
    pub(crate) fn print(self) -> Result<()> {
        on_standard_output(&self.0)
    }
}

/// What is on one line whatever names it holds.
pub(crate) fn one_line(text: impl Display) -> String {
    printable(&text.to_string()).into_owned()
}

/// A line on standard error; where that cannot be written to, there is nobody to tell.
pub(crate) fn on_standard_error(line: impl Display) {
    _ = writeln!(std::io::stderr(), "{}", one_line(line));
}

/// What a user should know of the data, for people.
pub(crate) fn notes(notes: &[String], global: &Global) {
    if !global.quiet {
        notes.iter().for_each(|note| on_standard_error(format!("note: {note}")));
    }
}

fn on_standard_output(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).context("standard output cannot be written")
}

/// A table without vertical lines; columns after the first `left` are aligned to the right.
pub(crate) fn table(header: &[&str], left: usize, rows: impl IntoIterator<Item = Vec<String>>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header.iter().map(|h| Cell::new(*h)));
    for row in rows {
        table.add_row(row.into_iter().map(one_line));
    }
    for (at, column) in table.column_iter_mut().enumerate() {
        if at >= left {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// Four significant digits.
pub(crate) fn number(x: f64) -> String {
    match x.abs() {
        0.0 => "0".to_owned(),
        a if !a.is_finite() => format!("{x}"),
        a if (1e-3..1e5).contains(&a) => {
            let decimals = (3 - a.log10().floor() as i32).clamp(0, 6) as usize;
            format!("{x:.decimals$}")
        }
        _ => format!("{x:.2e}"),
    }
}

pub(crate) fn optional(x: Option<f64>) -> String {
    x.map_or_else(|| "-".to_owned(), number)
}

pub(crate) fn percentage(share: Option<f64>) -> String {
    share.map_or_else(|| "-".to_owned(), |share| format!("{:.1} %", 100.0 * share))
}

pub(crate) fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// A JSON document on standard output.
pub(crate) fn json(value: &impl serde::Serialize) -> Result<()> {
    on_standard_output(&format!("{}\n", json_text(value)?))
}

/// The same, on one line.
pub(crate) fn json_line(value: &serde_json::Value) -> Result<()> {
    on_standard_output(&format!("{}\n", spelled(&value.to_string())))
}

/// A JSON document in which every character is printable.
pub(crate) fn json_text(value: &impl serde::Serialize) -> Result<String> {
    Ok(spelled(&serde_json::to_string_pretty(value)?))
}

/// Strings alone can hold what is not printable, and JSON has a spelling for it.
fn spelled(json: &str) -> String {
    let mut spelled = String::with_capacity(json.len());
    for c in json.chars() {
        if c == '\n' || is_printable(c) {
            spelled.push(c);
        } else {
            c.encode_utf16(&mut [0; 2]).iter().for_each(|unit| _ = write!(spelled, "\\u{unit:04x}"));
        }
    }
    spelled
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_on_their_line_and_in_their_cell() {
        let name = "out\n\u{1b}[2J\u{9b}1m\u{202e}";
        let mut page = Page::default();
        page.line(format!("{name} f32[1]"));
        page.lines(table(&["Output", "Mean"], 1, [vec![name.to_owned(), "1".to_owned()]]));
        assert_eq!(page.0.lines().count(), 3, "{}", page.0);
        assert!(page.0.chars().all(|c| c == '\n' || is_printable(c)), "{}", page.0);
    }

    #[test]
    fn json_is_printable_and_the_same_when_read() {
        let value = serde_json::json!({ "na\u{9b}me": "a\n\u{1b}\u{7f}\u{202e}\u{e0041}é" });
        let text = json_text(&value).unwrap();
        assert!(text.chars().all(|c| c == '\n' || is_printable(c)), "{text}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap(), value);
    }
}

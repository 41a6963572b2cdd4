//! Progress bars on standard error, where it is a terminal.

use std::sync::Mutex;

use indicatif::{ProgressBar, ProgressStyle};
use mabert_transfer::progress::Progress;

use crate::arguments::Global;

/// One bar a stage.
pub(crate) struct Bars {
    shown: bool,
    quiet: bool,
    bar: Mutex<ProgressBar>,
}

impl Bars {
    pub(crate) fn new(global: &Global) -> Self {
        use std::io::IsTerminal as _;
        let shown = !global.quiet && std::io::stderr().is_terminal();
        Self { shown, quiet: global.quiet, bar: Mutex::new(ProgressBar::hidden()) }
    }

    fn bar(&self) -> std::sync::MutexGuard<'_, ProgressBar> {
        self.bar.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Progress for Bars {
    fn begin(&self, stage: &str, steps: usize) {
        if self.shown {
            let style = ProgressStyle::with_template("{prefix:12} [{bar:30}] {pos}/{len} {elapsed} left {eta}  {msg}");
            let bar = ProgressBar::new(steps as u64).with_prefix(stage.to_owned());
            bar.set_style(style.expect("a valid template").progress_chars("=> "));
            bar.enable_steady_tick(std::time::Duration::from_millis(500));
            *self.bar() = bar;
        }
    }

    fn step(&self, note: &str) {
        let bar = self.bar();
        bar.inc(1);
        if !note.is_empty() {
            bar.set_message(note.to_owned());
        }
    }

    fn end(&self) {
        self.bar().finish_and_clear();
    }

    fn summary(&self, line: &str) {
        if !self.quiet {
            eprintln!("{line}");
        }
    }
}

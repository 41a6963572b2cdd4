//! Progress on standard error: bars where it is a terminal, elsewhere a line now and then.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use mabert_transfer::progress::Progress;

use crate::arguments::Global;
use crate::print::{on_standard_error, one_line};

/// One bar a stage, or lines about it.
pub(crate) struct Bars {
    quiet: bool,
    shown: Shown,
}

enum Shown {
    Nothing,
    Bar(Mutex<ProgressBar>),
    Lines(Lines),
}

impl Bars {
    pub(crate) fn new(global: &Global) -> Self {
        use std::io::IsTerminal as _;
        let shown = match (global.quiet, std::io::stderr().is_terminal()) {
            (true, _) => Shown::Nothing,
            (false, true) => Shown::Bar(Mutex::new(ProgressBar::hidden())),
            (false, false) => Shown::Lines(Lines::start(NOW_AND_THEN, on_standard_error)),
        };
        Self { quiet: global.quiet, shown }
    }
}

impl Progress for Bars {
    fn begin(&self, stage: &str, steps: usize) {
        match &self.shown {
            Shown::Nothing => {}
            Shown::Bar(bar) => {
                let style = ProgressStyle::with_template(match steps {
                    0 => "{prefix:12} {elapsed}",
                    _ => "{prefix:12} [{bar:30}] {pos}/{len} {elapsed} left {eta}  {msg}",
                });
                let new = ProgressBar::new(steps as u64).with_prefix(one_line(stage));
                new.set_style(style.expect("a valid template").progress_chars("=> "));
                new.enable_steady_tick(Duration::from_millis(500));
                *lock(bar) = new;
            }
            Shown::Lines(lines) => lines.begin(stage, steps),
        }
    }

    fn step(&self, note: &str) {
        match &self.shown {
            Shown::Nothing => {}
            Shown::Bar(bar) => {
                let bar = lock(bar);
                bar.inc(1);
                if !note.is_empty() {
                    bar.set_message(one_line(note));
                }
            }
            Shown::Lines(lines) => lines.step(note),
        }
    }

    fn end(&self) {
        match &self.shown {
            Shown::Nothing => {}
            Shown::Bar(bar) => lock(bar).finish_and_clear(),
            Shown::Lines(lines) => lines.end(),
        }
    }

    fn summary(&self, line: &str) {
        if !self.quiet {
            match &self.shown {
                Shown::Bar(bar) => lock(bar).suspend(|| on_standard_error(line)),
                _ => on_standard_error(line),
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How often a line is printed, in a log that people look into.
const NOW_AND_THEN: Duration = Duration::from_secs(15);

/// The stage that is under way.
struct Stage {
    name: String,
    steps: usize,
    done: usize,
    note: String,
    begun: Instant,
}

impl Stage {
    fn line(&self) -> String {
        let Self { name, steps, done, note, begun } = self;
        let note = if note.is_empty() { String::new() } else { format!("; {note}") };
        let steps = if *steps > 0 { format!("{done} of {steps}, ") } else { String::new() };
        format!("{name}: {steps}{} s{note}", begun.elapsed().as_secs())
    }
}

/// A line about the stage under way each time some time has passed, however long its steps take.
struct Lines {
    stage: Arc<Mutex<Option<Stage>>>,
    /// Dropped at the end, which ends the thread.
    running: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Lines {
    fn start(every: Duration, print: impl Fn(String) + Send + 'static) -> Self {
        let stage: Arc<Mutex<Option<Stage>>> = Arc::default();
        let (sender, receiver) = channel::<()>();
        let of_thread = Arc::clone(&stage);
        let thread = std::thread::spawn(move || {
            while receiver.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
                let line = lock(&of_thread).as_ref().map(Stage::line);
                line.into_iter().for_each(&print);
            }
        });
        Self { stage, running: Some((sender, thread)) }
    }

    fn begin(&self, name: &str, steps: usize) {
        let (name, note) = (name.to_owned(), String::new());
        *lock(&self.stage) = Some(Stage { name, steps, done: 0, note, begun: Instant::now() });
    }

    fn step(&self, note: &str) {
        if let Some(stage) = lock(&self.stage).as_mut() {
            stage.done += 1;
            if !note.is_empty() {
                note.clone_into(&mut stage.note);
            }
        }
    }

    fn end(&self) {
        *lock(&self.stage) = None;
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        if let Some((sender, thread)) = self.running.take() {
            drop(sender);
            _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_hears_of_long_steps_now_and_then() {
        let printed: Arc<Mutex<Vec<String>>> = Arc::default();
        let into = Arc::clone(&printed);
        let lines = Lines::start(Duration::from_millis(20), move |line| lock(&into).push(line));
        std::thread::sleep(Duration::from_millis(50));
        assert!(lock(&printed).is_empty(), "no stage is under way");
        lines.begin("layers", 3);
        lines.step("norm 0.1");
        std::thread::sleep(Duration::from_millis(300));
        lines.end();
        drop(lines);
        let printed = lock(&printed);
        assert!((2..20).contains(&printed.len()), "{printed:?}");
        assert!(printed.iter().all(|line| line == "layers: 1 of 3, 0 s; norm 0.1"), "{printed:?}");
    }
}

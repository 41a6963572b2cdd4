//! The command line of onnx-mabert: arguments, progress and printing. What is done is done in the libraries.

mod arguments;
mod bars;
mod bounds;
mod commands;
mod engines;
mod failure;
mod files;
mod print;

use std::process::ExitCode;

use clap::Parser as _;
use tracing_subscriber::filter::LevelFilter;

use crate::arguments::{Arguments, Global};

/// The stages that use gradients run several pieces of a step side by side. candle's own pool would have every thread wait
/// for the others after each operator, spinning, which made a step 2.7 times slower; this variable is its only switch.
#[expect(unsafe_code, reason = "no other thread is running yet")]
fn one_candle_thread_a_piece() {
    if std::env::var_os("CANDLE_NUM_THREADS").is_none() {
        // SAFETY: called first of all, while this is the only thread.
        unsafe { std::env::set_var("CANDLE_NUM_THREADS", "1") };
    }
}

/// Activations come and go by the megabyte. glibc gives each back to the system and has its pages cleared again the next
/// time, which took a fifth of a training step: here it keeps them.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(unsafe_code, reason = "the C library's own switch")]
fn keep_freed_memory() {
    // SAFETY: plain numbers, set before any other thread runs.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
        // Only the first arena grows without the limit of 64 MB a piece.
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Who reads what is printed may have read enough, as `head` has: then the program ends, as others do. Rust would go on and
/// fail to print.
#[cfg(unix)]
#[expect(unsafe_code, reason = "the system's own switch")]
fn end_with_the_reader() {
    // SAFETY: the default action, set before any other thread runs.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
    }
}

fn main() -> ExitCode {
    #[cfg(unix)]
    end_with_the_reader();
    one_candle_thread_a_piece();
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    keep_freed_memory();
    let arguments = Arguments::parse();
    start_logging(&arguments.global);
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = failure::exit_code(&error);
            let message = failure::message(&error);
            print::on_standard_error(format!("error: {message}"));
            if arguments.global.json && !failure::is_reported(&error) {
                // Where it cannot be written, the message above and the exit code have said so.
                _ = print::json_line(&serde_json::json!({ "error": message, "exit_code": code }));
            }
            ExitCode::from(code)
        }
    }
}

fn start_logging(global: &Global) {
    let level = match (global.quiet, global.verbose) {
        (true, _) => LevelFilter::OFF,
        (_, 0) => LevelFilter::WARN,
        (_, 1) => LevelFilter::INFO,
        _ => LevelFilter::DEBUG,
    };
    tracing_subscriber::fmt().with_max_level(level).with_writer(|| Log).without_time().init();
}

/// Standard error, a line for each thing that is said, whatever names are in it.
struct Log;

impl std::io::Write for Log {
    fn write(&mut self, said: &[u8]) -> std::io::Result<usize> {
        print::on_standard_error(String::from_utf8_lossy(said).trim_end());
        Ok(said.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Runs the command; a panic becomes an error.
fn run(arguments: &Arguments) -> anyhow::Result<()> {
    // tract's panics are caught and become errors; what they print on the way would only confuse.
    if arguments.global.verbose == 0 {
        std::panic::set_hook(Box::new(|_| {}));
    }
    let result = std::panic::catch_unwind(|| {
        rayon::ThreadPoolBuilder::new().num_threads(arguments.global.threads()).build_global()?;
        commands::run(&arguments.command, &arguments.global)
    });
    result.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
        let text = text.unwrap_or("no message");
        Err(anyhow::anyhow!("internal error: {text}; please report it, with the model if you can (-v shows where)"))
    })
}

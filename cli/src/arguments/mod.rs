//! What can be said on the command line, whatever the command; what only one command takes stands with it.

mod end_to_end;
mod texts;
mod values;
mod vectors;

use std::path::PathBuf;

use clap::{Args, Parser};

use crate::commands::Command;

pub(crate) use end_to_end::{DevArguments, EndToEndArguments};
pub(crate) use texts::{DataArguments, Texts, one_text, read_texts};
pub(crate) use values::{Choice, Softmax, count, on_or_off, one_of, positive};
pub(crate) use vectors::VectorArguments;

/// Rewrite BERT-family ONNX models into MA-BERT: matrix arithmetic and ReLU only.
///
/// Exit codes: 0 done; 1 a check did not hold; 2 usage; 3 the model or the data cannot be used.
#[derive(Debug, Parser)]
#[command(name = "onnx-mabert", version)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Print results as JSON on standard output
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// No progress, no notes, and nothing of what a file or the exit code says
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    /// More notes on standard error; twice for still more
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    /// Threads [default: all cores]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Seed of everything drawn at random
    #[arg(long, global = true, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// onnxruntime's library [default: the one that ORT_DYLIB_PATH names]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) ort_lib: Option<PathBuf>,
}

impl Global {
    pub(crate) fn threads(&self) -> usize {
        let all = || std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.map_or_else(all, usize::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        use clap::CommandFactory as _;
        Arguments::command().debug_assert();
    }
}

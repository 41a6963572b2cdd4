//! One module a command: what it takes, what it does by way of the libraries, and what it prints.

mod bench;
mod eval;
mod explain;
mod inspect;
mod profile;
mod rewrite;
mod run;
mod student;
mod transfer;
mod verify;

use anyhow::Result;
use clap::Subcommand;

use crate::arguments::Global;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Rewrite a model into MA-BERT form
    Rewrite(rewrite::RewriteArguments),
    /// Train a student further, end to end, and fold it
    Transfer(transfer::TransferArguments),
    /// Show inputs, outputs, operators, layers, sites, and what is not matrix arithmetic
    Inspect(inspect::InspectArguments),
    /// Show what was tried around each anchor, and why something was not recognised
    Explain(explain::ExplainArguments),
    /// Run a model on texts or arrays
    Run(run::RunArguments),
    /// Compare two models, or one on two engines, output by output
    Verify(verify::VerifyArguments),
    /// Measure models on a labelled task, and their agreement with the first
    Eval(eval::EvalArguments),
    /// Time models in turn: on made-up tokens, or with --data on a file's texts, 512 at most, in batches of like lengths
    Bench(bench::BenchArguments),
}

pub(crate) fn run(command: &Command, global: &Global) -> Result<()> {
    match command {
        Command::Rewrite(arguments) => rewrite::rewrite(arguments, global),
        Command::Transfer(arguments) => transfer::transfer(arguments, global),
        Command::Inspect(arguments) => inspect::inspect(arguments, global),
        Command::Explain(arguments) => explain::explain(arguments, global),
        Command::Run(arguments) => run::run(arguments, global),
        Command::Verify(arguments) => verify::verify(arguments, global),
        Command::Eval(arguments) => eval::eval(arguments, global),
        Command::Bench(arguments) => bench::bench(arguments, global),
    }
}

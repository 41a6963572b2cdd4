//! One module a command.

mod bench;
mod eval;
mod explain;
mod inspect;
mod profile;
mod rewrite;
mod run;
mod transfer;
mod verify;

use anyhow::Result;
use mabert_graph::Model;
use mabert_runtime::{Engine, Named, Tensor, borrowed};
use mabert_transfer::data::{Columns, Overlong, Sequence, TextEncoder, read_sequences};
use mabert_transfer::evaluate::Metric;

use crate::arguments::{Command, DataArguments, Global, MetricName};
use crate::failure::Usage;

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

impl DataArguments {
    fn columns(&self, label: Option<&str>) -> Columns {
        Columns {
            text: self.text_column.clone(),
            pair: self.pair_column.clone(),
            label: label.map(str::to_owned),
            classes: self.classes.clone(),
        }
    }

    /// Every sequence of the data file, which must be given.
    fn sequences(&self, longest: usize, overlong: Overlong, label: Option<&str>) -> Result<Vec<Sequence>> {
        let Some(data) = &self.data else { return Err(Usage("--data is needed".to_owned()).into()) };
        let encoder = TextEncoder::new(self.tokenizer.as_deref(), longest, overlong)?;
        Ok(read_sequences(data, &self.columns(label), &encoder)?)
    }
}

impl MetricName {
    fn metric(self) -> Metric {
        match self {
            Self::Accuracy => Metric::Accuracy,
            Self::F1 => Metric::F1,
            Self::Mcc => Metric::Mcc,
            Self::Pearson => Metric::Pearson,
            Self::Spearman => Metric::Spearman,
        }
    }
}

/// The longest sequence that a model takes, at most `most`.
fn longest(model: &Model, most: usize) -> Result<usize> {
    let runnable = mabert_runtime::LoadOptions::default().prepare(model)?;
    Ok(mabert_passes::recording::longest_sequence(model, &runnable, most)?.0)
}

/// Runs a model on named values, of which it may need fewer than there are.
fn run_on(engine: &dyn Engine, values: &Named) -> Result<Named> {
    let needed = |name: &str| engine.inputs().iter().any(|i| i.name == name);
    let given: Vec<(&str, &Tensor)> = borrowed(values).into_iter().filter(|(n, _)| needed(n)).collect();
    Ok(engine.run(&given)?)
}

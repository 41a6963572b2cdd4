//! `run`: a model on texts or arrays.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use mabert_graph::Model;
use mabert_runtime::{Named, borrowed, npz};
use mabert_transfer::data::{Content, Example, Overlong, Sequence};
use mabert_transfer::evaluate::{Spread, run_sequences};
use ndarray::ArrayD;
use serde_json::{Value, json};

use crate::arguments::{Choice as _, DataArguments, Global, one_of};
use crate::engines::{EngineName, LONGEST, max_seq};
use crate::failure::Usage;
use crate::print;

/// Values of an output that are printed.
const SHOWN: usize = 16;

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("input").required(true).args(["text", "data", "npz"]))]
pub(crate) struct RunArguments {
    /// The model
    model: PathBuf,
    /// A text
    #[arg(long, value_name = "TEXT", requires = "tokenizer")]
    text: Option<String>,
    #[command(flatten)]
    data: DataArguments,
    /// Arrays named as the model's inputs
    #[arg(long, value_name = "FILE")]
    npz: Option<PathBuf>,
    /// Cut texts that are too long for the model
    #[arg(long)]
    truncate: bool,
    /// Write the outputs to an .npz file
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The engine
    #[arg(long, default_value = EngineName::Tract.name(), value_parser = one_of(EngineName::ALL))]
    engine: EngineName,
}

pub(super) fn run(arguments: &RunArguments, global: &Global) -> Result<()> {
    if let Some(output) = &arguments.output {
        mabert_graph::check_writable(output)?;
    }
    let engine = arguments.engine.load(&arguments.model, global)?;
    let outputs = match &arguments.npz {
        Some(path) => engine.run(&borrowed(&npz::for_inputs(path, engine.inputs())?))?,
        None => run_sequences(engine.as_ref(), &sequences(arguments)?, Spread::Inside)?,
    };
    if let Some(path) = &arguments.output {
        npz::write(path, &outputs)?;
    }
    if global.json {
        return print::json(&json!({ "outputs": arguments.described(&outputs) }));
    }
    arguments.print_outputs(&outputs);
    Ok(())
}

impl RunArguments {
    /// Values are shown where no file takes them.
    fn shows_values(&self) -> bool {
        self.output.is_none()
    }

    fn described(&self, outputs: &Named) -> Vec<Value> {
        let described = outputs.iter().map(|(name, value)| {
            let data = self.shows_values().then(|| value.to_f32().iter().copied().collect::<Vec<f32>>());
            json!({ "name": name, "shape": value.shape(), "data": data })
        });
        described.collect()
    }

    fn print_outputs(&self, outputs: &Named) {
        for (name, value) in outputs {
            println!("{name} {}{:?}", value.element_type(), value.shape());
            if self.shows_values() {
                print_rows(&value.to_f32());
            }
        }
    }
}

fn sequences(arguments: &RunArguments) -> Result<Vec<Sequence>> {
    let overlong = if arguments.truncate { Overlong::Truncate } else { Overlong::Refuse };
    let longest = max_seq(&Model::load(&arguments.model)?, LONGEST)?;
    let Some(text) = &arguments.text else { return Ok(arguments.data.texts(longest, overlong, None)?.sequences) };
    if text.trim().is_empty() {
        return Err(Usage("--text is empty".to_owned()).into());
    }
    let content = Content::Text { text: text.clone(), pair: None };
    let example = Example { content, label: None, line: 1 };
    Ok(vec![arguments.data.encoder(longest, overlong)?.encode(std::path::Path::new("--text"), example)?])
}

fn print_rows(value: &ArrayD<f32>) {
    let width = value.shape().last().copied().unwrap_or(1).max(1);
    let flat: Vec<f32> = value.iter().copied().collect();
    for row in flat.chunks(width).take(SHOWN) {
        let values: Vec<String> = row.iter().take(SHOWN).map(|v| format!("{v:.4}")).collect();
        let more = if row.len() > SHOWN { format!(" ... ({} values)", row.len()) } else { String::new() };
        println!("  {}{more}", values.join("  "));
    }
    if flat.len() / width > SHOWN {
        println!("  ... ({} rows; -o writes them all)", flat.len() / width);
    }
}

//! `run`: a model on texts or arrays.

use anyhow::Result;
use mabert_graph::Model;
use mabert_runtime::{borrowed, npz};
use mabert_transfer::data::{Content, Example, Overlong, Sequence, TextEncoder};
use mabert_transfer::evaluate::{Spread, run_sequences};
use ndarray::ArrayD;
use serde_json::{Value, json};

use super::longest;
use crate::arguments::{Global, Run};
use crate::failure::Usage;
use crate::print;

/// No sequence is longer than this, whatever the model would take.
const LONGEST: usize = 8192;
/// Values of an output that are printed.
const SHOWN: usize = 16;

pub(super) fn run(arguments: &Run, global: &Global) -> Result<()> {
    if let Some(output) = &arguments.output {
        mabert_graph::check_writable(output)?;
    }
    let engine = arguments.engine.load(&arguments.model, global)?;
    let outputs = match &arguments.npz {
        Some(path) => engine.run(&borrowed(&npz::read(path)?))?,
        None => run_sequences(engine.as_ref(), &sequences(arguments)?, Spread::Inside)?,
    };
    if let Some(path) = &arguments.output {
        npz::write(path, &outputs)?;
    }
    if global.json {
        let outputs: Vec<Value> = outputs
            .iter()
            .map(|(name, value)| {
                let data = arguments.output.is_none().then(|| value.to_f32().iter().copied().collect::<Vec<f32>>());
                json!({ "name": name, "shape": value.shape(), "data": data })
            })
            .collect();
        return print::json(&json!({ "outputs": outputs }));
    }
    for (name, value) in &outputs {
        println!("{name} {}{:?}", value.element_type(), value.shape());
        if arguments.output.is_none() {
            show(&value.to_f32());
        }
    }
    Ok(())
}

fn sequences(arguments: &Run) -> Result<Vec<Sequence>> {
    let overlong = if arguments.truncate { Overlong::Truncate } else { Overlong::Refuse };
    let limit = longest(&Model::load(&arguments.model)?, LONGEST)?;
    let Some(text) = &arguments.text else { return arguments.data.sequences(limit, overlong, None) };
    if text.trim().is_empty() {
        return Err(Usage("--text is empty".to_owned()).into());
    }
    let encoder = TextEncoder::new(arguments.data.tokenizer.as_deref(), limit, overlong)?;
    let content = Content::Text { text: text.clone(), pair: None };
    let example = Example { content, label: None, line: 1 };
    Ok(vec![encoder.encode(std::path::Path::new("--text"), example)?])
}

fn show(value: &ArrayD<f32>) {
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

//! `run`: a model on texts or arrays.

use anyhow::Result;
use mabert_graph::{Model, Tensor};
use mabert_runtime::{Engine, Named, npz};
use mabert_transfer::data::{Batch, BatchShape, Content, Example, Overlong, Sequence, TextEncoder, batches};
use ndarray::{ArrayD, Axis, IxDyn, Slice};
use serde_json::{Value, json};

use super::{borrowed, longest};
use crate::arguments::{Global, Run};
use crate::failure::Usage;
use crate::print;

/// Positions of one batch.
const BATCH_TOKENS: usize = 4096;
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
        None => on_sequences(engine.as_ref(), &sequences(arguments)?)?,
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
    let Some(text) = &arguments.text else { return arguments.data.sequences(limit, overlong) };
    if text.trim().is_empty() {
        return Err(Usage("--text is empty".to_owned()).into());
    }
    let encoder = TextEncoder::new(arguments.data.tokenizer.as_deref(), limit, overlong)?;
    let content = Content::Text { text: text.clone(), pair: None };
    let example = Example { content, label: None, line: 1 };
    Ok(vec![encoder.encode(std::path::Path::new("--text"), example)?])
}

/// The outputs for every sequence, in their order; values with an axis of tokens are padded with zeros to the longest.
pub(super) fn on_sequences(engine: &dyn Engine, sequences: &[Sequence]) -> Result<Named> {
    let shape = BatchShape::of(engine.inputs());
    let mut parts: Vec<(Batch, Named)> = Vec::new();
    for batch in batches(sequences, BATCH_TOKENS, 64, shape) {
        let outputs = engine.run(&borrowed(&batch.inputs(engine.inputs())?))?;
        parts.push((batch, outputs));
    }
    let widest = parts.iter().map(|(b, _)| b.length).max().unwrap_or(0);
    let names: Vec<String> = parts[0].1.iter().map(|(n, _)| n.clone()).collect();
    let joined = names.iter().enumerate().map(|(at, name)| {
        let first = &parts[0].1[at].1;
        let over_tokens = parts.iter().all(|(b, o)| o[at].1.shape().get(1) == Some(&b.length));
        let mut full = first.shape().to_vec();
        if full.is_empty() {
            return (name.clone(), first.clone());
        }
        full[0] = sequences.len();
        if over_tokens {
            full[1] = widest;
        }
        let mut all = ArrayD::<f32>::zeros(IxDyn(&full));
        for (batch, outputs) in &parts {
            let value = outputs[at].1.to_f32();
            for (from, &to) in batch.rows.iter().enumerate() {
                let mut row = all.index_axis_mut(Axis(0), to);
                let source = value.index_axis(Axis(0), from);
                if over_tokens {
                    row.slice_axis_mut(Axis(0), Slice::from(0..batch.length)).assign(&source);
                } else {
                    row.assign(&source);
                }
            }
        }
        (name.clone(), Tensor::from(all))
    });
    Ok(joined.collect())
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

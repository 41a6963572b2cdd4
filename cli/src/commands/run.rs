//! `run`: a model on texts or arrays.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Args;
use mabert_graph::Model;
use mabert_runtime::{Named, borrowed, npz};
use mabert_transfer::data::{Content, Overlong};
use mabert_transfer::evaluate::{Spread, run_sequences};
use mabert_transfer::progress::Progress as _;
use ndarray::ArrayD;
use serde_json::{Value, json};

use crate::arguments::{Choice as _, DataArguments, Global, Texts, one_of, one_text, read_texts};
use crate::bars::Bars;
use crate::bounds;
use crate::engines::{EngineName, LONGEST, Reads, refuse_negative_ids};
use crate::failure::Usage;
use crate::files::Files;
use crate::print::{self, Page};

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
    /// The second text of a pair, beside --text
    #[arg(long, value_name = "TEXT", requires = "text")]
    pair: Option<String>,
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
    arguments.refuse_unused()?;
    Files::default()
        .models([&arguments.model])
        .reads(arguments.data.files().chain(&arguments.npz).chain(&global.ort_lib))
        .writes(arguments.output.as_ref())
        .check()?;
    let bars = Bars::new(global);
    bars.begin("run", 0);
    let (outputs, notes) = arguments.outputs(global)?;
    bars.end();
    print::notes(&notes, global);
    if let Some(path) = &arguments.output {
        npz::write(path, &outputs)?;
    }
    if global.json {
        return print::json(&json!({ "outputs": arguments.described(&outputs), "notes": notes }));
    }
    if global.quiet && arguments.output.is_some() {
        return Ok(());
    }
    arguments.print_outputs(&outputs)
}

impl RunArguments {
    /// Refuses what would be passed over in silence.
    fn refuse_unused(&self) -> Result<()> {
        self.data.check(if self.text.is_some() { "; --pair goes with --text" } else { "" })?;
        if self.npz.is_some() {
            self.data.refuse_tokenizer("with --npz, which has token ids")?;
            if self.truncate {
                return Err(Usage("--truncate cuts texts, and --npz has none".to_owned()).into());
            }
        }
        Ok(())
    }

    /// The outputs, and what a user should know of the texts.
    fn outputs(&self, global: &Global) -> Result<(Named, Vec<String>)> {
        let engine = self.engine.load(&self.model, global)?;
        let model = Model::load(&self.model)?;
        if let Some(path) = &self.npz {
            let arrays = npz::for_inputs(path, engine.inputs())?;
            refuse_negative_ids(&model, &arrays, &self.data.input_roles).with_context(|| path.display().to_string())?;
            let outputs = engine.run(&borrowed(&arrays))?;
            let note = bounds::of_arrays(&model, &arrays, &self.data.input_roles, global)?;
            return Ok((outputs, note.into_iter().collect()));
        }
        let reads = Reads::new(&model, LONGEST, &self.data.input_roles)?;
        let overlong = if self.truncate { Overlong::Truncate } else { Overlong::Refuse };
        let encoder = self.data.encoder(reads.max_seq, overlong)?;
        let Texts { sequences, mut notes, .. } = match &self.text {
            None => read_texts(&self.data.open(None)?, &encoder, reads.vocabulary())?,
            Some(text) => one_text(self.content(text)?, &encoder, reads.vocabulary())?,
        };
        let shape = reads.shape(&encoder);
        let outputs = run_sequences(engine.as_ref(), &shape, &sequences, Spread::Inside)?;
        notes.extend(bounds::of_texts(&model, &shape, &sequences, global)?);
        Ok((outputs, notes))
    }

    /// The text that was given, or the two.
    fn content(&self, text: &str) -> Result<Content> {
        for (name, text) in [("text", Some(text)), ("pair", self.pair.as_deref())] {
            if text.is_some_and(|text| text.trim().is_empty()) {
                return Err(Usage(format!("--{name} is empty")).into());
            }
        }
        Ok(Content::Text { text: text.to_owned(), pair: self.pair.clone() })
    }

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

    fn print_outputs(&self, outputs: &Named) -> Result<()> {
        let mut page = Page::default();
        for (name, value) in outputs {
            page.line(format!("{name} {}{:?}", value.element_type(), value.shape()));
            if self.shows_values() {
                add_rows(&mut page, &value.to_f32());
            }
        }
        page.print()
    }
}

fn add_rows(page: &mut Page, value: &ArrayD<f32>) {
    let width = value.shape().last().copied().unwrap_or(1).max(1);
    let flat: Vec<f32> = value.iter().copied().collect();
    for row in flat.chunks(width).take(SHOWN) {
        let values: Vec<String> = row.iter().take(SHOWN).map(|v| format!("{v:.4}")).collect();
        let more = if row.len() > SHOWN { format!(" ... ({} values)", row.len()) } else { String::new() };
        page.line(format!("  {}{more}", values.join("  ")));
    }
    if flat.len() / width > SHOWN {
        page.line(format!("  ... ({} rows; -o writes them all)", flat.len() / width));
    }
}

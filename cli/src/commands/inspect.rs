//! `inspect`: what a model is.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use mabert_graph::{Model, text};
use mabert_passes::contract::{NonLinear, non_linear_nodes};
use mabert_passes::inputs::{EncoderInputs, Role};
use mabert_passes::lower::saturations;
use mabert_passes::pipeline::{VERSION_KEY, simplify};
use mabert_passes::recognise::{Miss, recognise};
use mabert_passes::recording::symbolic_shapes;
use mabert_passes::sites::Activation;
use mabert_runtime::MAX_SEQ_KEY;
use mabert_transfer::job::LARGEST_VALUE_KEY;
use serde::Serialize;

use crate::arguments::Global;
use crate::print::{self, Page};

#[derive(Debug, Args)]
pub(crate) struct InspectArguments {
    /// The model
    model: PathBuf,
    /// Also print the graph, one line a node
    #[arg(long)]
    graph: bool,
}

/// What a model is. Sites are those that `rewrite` would change.
#[derive(Serialize)]
struct Inspection {
    model: String,
    exporter: String,
    ir_version: i64,
    opset: i64,
    inputs: Vec<String>,
    outputs: Vec<String>,
    parameters: usize,
    operators: BTreeMap<String, usize>,
    rewritten: Option<Rewritten>,
    layers: usize,
    channels: Option<usize>,
    heads: Option<usize>,
    mask: Option<String>,
    attentions: usize,
    activations: usize,
    norms: usize,
    misses: Vec<Miss>,
    non_linear: Vec<NonLinear>,
}

#[derive(Serialize)]
struct Rewritten {
    version: String,
    max_seq: Option<usize>,
    /// Norms behind which the stream is held.
    bounds: usize,
    /// What no value of its encoder exceeds, as it says itself.
    largest_value: Option<f64>,
}

pub(super) fn inspect(arguments: &InspectArguments, global: &Global) -> Result<()> {
    let model = Model::load(&arguments.model)?;
    let inspection = Inspection::new(&model)?;
    if global.json {
        return print::json(&inspection);
    }
    let mut page = Page::default();
    inspection.add_to(&mut page);
    if arguments.graph {
        page.line("");
        page.lines(text::render(&model, &symbolic_shapes(&model)?));
    }
    page.print()
}

impl Inspection {
    fn new(model: &Model) -> Result<Self> {
        let mut simplified = model.clone();
        simplify(&mut simplified)?;
        let recognised = recognise(&simplified)?;
        let encoder = recognised.encoder.as_ref();
        let encoder_end = encoder.and_then(|e| e.layers.last()).map(|l| l.output_norm.output.as_str());
        let inputs = EncoderInputs::new(&simplified, &[])?;
        // A rewritten model has no attention that tells its mask.
        let mask_input = inputs.iter().find(|i| i.role == Some(Role::Mask)).map(|i| i.declared.name.clone());
        let mask = encoder.and_then(|e| e.mask.as_ref()).map(|m| m.input.clone());
        let rewritten = model.metadata(VERSION_KEY).map(|version| Rewritten {
            version: version.to_owned(),
            max_seq: model.metadata(MAX_SEQ_KEY).and_then(|v| v.parse().ok()),
            bounds: saturations(model).len(),
            largest_value: model.metadata(LARGEST_VALUE_KEY).and_then(|v| v.parse().ok()),
        });
        let proto = model.proto();
        Ok(Self {
            model: model.origin().to_owned(),
            exporter: format!("{} {}", proto.producer_name, proto.producer_version).trim().to_owned(),
            ir_version: proto.ir_version,
            opset: model.opset(),
            inputs: model.inputs().iter().map(ToString::to_string).collect(),
            outputs: model.outputs().iter().map(ToString::to_string).collect(),
            parameters: model.graph().initializer.iter().map(|t| t.dims.iter().product::<i64>().max(0) as usize).sum(),
            operators: model.operators(),
            layers: encoder.map_or(0, |e| e.layers.len()),
            channels: encoder.map(|e| e.channels),
            heads: encoder.map(mabert_passes::sites::Encoder::heads),
            attentions: recognised.attentions.len(),
            activations: recognised.activations.iter().filter(|a| a.function != Activation::Relu).count(),
            norms: recognised.norms.len(),
            // A rewritten model has no attention to recognise: that is no miss.
            misses: if rewritten.is_some() { Vec::new() } else { recognised.misses.clone() },
            non_linear: non_linear_nodes(&simplified, mask.as_deref().or(mask_input.as_deref()), encoder_end)?,
            mask,
            rewritten,
        })
    }

    fn add_to(&self, page: &mut Page) {
        page.line(format!("{}: {}, opset {}, IR version {}", self.model, self.exporter, self.opset, self.ir_version));
        if let Some(r) = &self.rewritten {
            let n = r.max_seq.map_or_else(String::new, |n| format!(", for up to {n} tokens"));
            page.line(format!("rewritten by onnx-mabert {}{n}", r.version));
            page.line(r.bounds_in_words());
        }
        self.inputs.iter().for_each(|v| page.line(format!("input  {v}")));
        self.outputs.iter().for_each(|v| page.line(format!("output {v}")));
        page.line(format!("{} parameters", self.parameters));
        let operators: Vec<String> = self.operators.iter().map(|(name, n)| format!("{name} {n}")).collect();
        page.line(format!("operators: {}", operators.join(", ")));
        if let (Some(channels), Some(heads)) = (self.channels, self.heads) {
            let mask = self.mask.as_deref().unwrap_or("none");
            page.line(format!("encoder: {} layers, {channels} channels, {heads} heads, mask {mask}", self.layers));
        }
        let Self { attentions, activations, norms, .. } = self;
        page.line(format!("to rewrite: {attentions} attentions, {activations} activations, {norms} norms"));
        self.misses.iter().for_each(|miss| page.line(format!("not recognised: {miss}")));
        let (head, encoder): (Vec<_>, Vec<_>) = self.non_linear.iter().partition(|n| n.in_head);
        let place = if self.layers > 0 { "in the encoder" } else { "in the model" };
        page.line(format!("not matrix arithmetic: {place} {}; after it {}", counted(&encoder), counted(&head)));
    }
}

impl Rewritten {
    fn bounds_in_words(&self) -> String {
        match (self.bounds, self.largest_value) {
            (0, _) => "bounds: none, some input may make it overflow".to_owned(),
            (norms, Some(largest)) => {
                format!("bounds: behind {norms} norms; no value of the encoder exceeds {}", print::number(largest))
            }
            (norms, None) => format!("bounds: behind {norms} norms"),
        }
    }
}

/// How many nodes there are of each operator.
fn counted(nodes: &[&NonLinear]) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    nodes.iter().for_each(|n| *counts.entry(&n.operator).or_default() += 1);
    let listed: Vec<String> = counts.iter().map(|(operator, n)| format!("{operator} {n}")).collect();
    if listed.is_empty() { "nothing".to_owned() } else { listed.join(", ") }
}

//! `verify`: two models, or one on two engines, output by output.

use std::collections::HashSet;
use std::path::Path;

use anyhow::Result;
use mabert_graph::Model;
use mabert_passes::pipeline::simplify;
use mabert_passes::recognise::recognise;
use mabert_passes::recording::token_rows;
use mabert_runtime::{Engine, LoadOptions, Taps, borrowed, npz};
use mabert_transfer::compare::{Distances, OutputDistance, Tolerance};
use mabert_transfer::data::{BatchShape, Overlong, Sequence, TextEncoder, Vocabulary, batches, made_up_sequences};
use serde::Serialize;

use super::{longest, run_on};
use crate::arguments::{EngineName, Global, Verify};
use crate::failure::{CheckFailed, Usage};
use crate::print;

/// Made-up sequences and texts are cut to this, or to what both models take.
const LONGEST: usize = 512;
const ATOL: f64 = 1e-3;
const RTOL: f64 = 1e-3;

#[derive(Serialize)]
struct Verified {
    first: String,
    second: String,
    engines: [&'static str; 2],
    inputs: String,
    tolerance: Tolerance,
    outputs: Vec<OutputDistance>,
    sites: Vec<OutputDistance>,
    holds: bool,
}

pub(super) fn verify(arguments: &Verify, global: &Global) -> Result<()> {
    let (first, second) = (&arguments.first, arguments.second.as_ref().unwrap_or(&arguments.first));
    let engines = engines(arguments)?;
    let tolerance = tolerance(arguments);
    let sites = if arguments.sites { shared_sites(first, second, engines)? } else { Vec::new() };
    let load = |path: &Path, engine: EngineName| -> Result<Box<dyn Engine>> {
        if sites.is_empty() {
            return engine.load(path, global);
        }
        let options = LoadOptions::default().threads(global.threads()).taps(Taps::Values(sites.clone()));
        Ok(Box::new(options.load(path)?))
    };
    let (a, b) = (load(first, engines[0])?, load(second, engines[1])?);
    let mut distances = Distances::new(tolerance);
    let inputs = match &arguments.npz {
        Some(path) => {
            let given = npz::read(path)?;
            distances.add(&run_on(a.as_ref(), &given)?, &run_on(b.as_ref(), &given)?, None)?;
            path.display().to_string()
        }
        None => {
            let (sequences, what) = sequences(arguments, global, first, second)?;
            let shape = BatchShape::from_inputs(a.inputs());
            for batch in batches(&sequences, 2048, 8, shape) {
                let of_a = a.run(&borrowed(&batch.inputs(a.inputs())?))?;
                let of_b = b.run(&borrowed(&batch.inputs(b.inputs())?))?;
                distances.add(&of_a, &of_b, Some(&batch.lengths))?;
            }
            what
        }
    };
    let (at_sites, outputs): (Vec<_>, Vec<_>) =
        distances.outputs().into_iter().partition(|o| sites.contains(&o.output));
    if outputs.is_empty() {
        let reason = format!("{} and {} have no output of the same name", first.display(), second.display());
        return Err(mabert_transfer::Error::Compare(reason).into());
    }
    let holds = outputs.iter().all(|o| o.holds(&tolerance));
    let verified = Verified {
        first: first.display().to_string(),
        second: second.display().to_string(),
        engines: engines.map(EngineName::name),
        inputs,
        tolerance,
        outputs,
        sites: at_sites,
        holds,
    };
    if global.json {
        print::json(&verified)?;
    } else {
        print_verified(&verified);
    }
    if holds { Ok(()) } else { Err(CheckFailed("the outputs differ by more than the tolerance".to_owned()).into()) }
}

fn engines(arguments: &Verify) -> Result<[EngineName; 2]> {
    Ok(match (arguments.engine.as_slice(), &arguments.second) {
        ([], Some(_)) => [EngineName::Tract; 2],
        ([], None) => [EngineName::Tract, EngineName::Onnxruntime],
        // One model on tract and on the engine named.
        ([one], None) if *one == EngineName::Onnxruntime => [EngineName::Tract, *one],
        ([_], None) => {
            return Err(Usage("one model on one engine is no comparison; give a second model".to_owned()).into());
        }
        ([one], Some(_)) => [*one; 2],
        ([a, b, ..], _) => [*a, *b],
    })
}

fn tolerance(arguments: &Verify) -> Tolerance {
    let asked = arguments.atol.is_some() || arguments.rtol.is_some();
    let defaults = if asked { (0.0, 0.0) } else { (ATOL, RTOL) };
    let elements = (asked || arguments.cosine.is_none())
        .then(|| (arguments.atol.unwrap_or(defaults.0), arguments.rtol.unwrap_or(defaults.1)));
    Tolerance { elements, cosine: arguments.cosine }
}

/// Texts, or made-up sequences, that both models take.
fn sequences(arguments: &Verify, global: &Global, first: &Path, second: &Path) -> Result<(Vec<Sequence>, String)> {
    let (a, b) = (Model::load(first)?, Model::load(second)?);
    let limit = longest(&a, LONGEST)?.min(longest(&b, LONGEST)?);
    if let Some(path) = &arguments.data.data {
        let mut sequences = arguments.data.sequences(limit, Overlong::Truncate, None)?;
        sequences.truncate(arguments.sequences.max(1));
        let cut = sequences.iter().filter(|s| s.truncated).count();
        let what = format!("{} sequences of {}, {cut} of them cut to {limit} tokens", sequences.len(), path.display());
        return Ok((sequences, what));
    }
    let rows = |model: &Model| -> Result<usize> {
        let index = mabert_graph::Index::new(model)?;
        let rows = model.inputs().iter().find_map(|i| token_rows(&index, model, &i.name).filter(|&r| r > 2));
        Ok(rows.unwrap_or(2))
    };
    let frame = TextEncoder::new(arguments.data.tokenizer.as_deref(), limit, Overlong::Truncate)?.frame()?;
    let vocabulary = Vocabulary { size: rows(&a)?.min(rows(&b)?), frame };
    let mut sequences = made_up_sequences(&vocabulary, limit, arguments.sequences.max(1) * limit, global.seed);
    sequences.truncate(arguments.sequences.max(1));
    let what = format!("{} sequences of random tokens, up to {limit} each", sequences.len());
    Ok((sequences, what))
}

/// The sites' values that both models have under the same name.
fn shared_sites(first: &Path, second: &Path, engines: [EngineName; 2]) -> Result<Vec<String>> {
    if engines != [EngineName::Tract; 2] {
        return Err(Usage("--sites taps inner values, which only tract does here".to_owned()).into());
    }
    let computed = |model: &Model| -> HashSet<String> {
        model.graph().node.iter().flat_map(|n| n.output.iter().cloned()).collect()
    };
    let original = Model::load(first)?;
    let both: HashSet<String> = computed(&original).intersection(&computed(&Model::load(second)?)).cloned().collect();
    let mut plain = original;
    simplify(&mut plain)?;
    let found = recognise(&plain)?;
    let values = found.attentions.iter().flat_map(|a| [&a.probabilities, &a.context]);
    let values = values.chain(found.activations.iter().map(|a| &a.output)).chain(found.norms.iter().map(|n| &n.output));
    let shared: Vec<String> = values.filter(|v| both.contains(*v)).cloned().collect();
    if shared.is_empty() {
        let reason =
            "no site's value is left under the same name in both; compare with a student of `rewrite --no-fold`";
        return Err(Usage(reason.to_owned()).into());
    }
    Ok(shared)
}

fn print_verified(v: &Verified) {
    println!("{} on {} against {} on {}", v.first, v.engines[0], v.second, v.engines[1]);
    println!("on {}", v.inputs);
    let row = |o: &OutputDistance| {
        vec![
            o.output.clone(),
            print::number(o.max_abs),
            print::number(o.mean_abs),
            print::optional(o.cosine),
            print::optional(o.mean_cosine),
            o.agreement.map_or_else(|| "-".to_owned(), |a| format!("{:.1} %", 100.0 * a)),
            if o.holds(&v.tolerance) { "holds" } else { "FAILS" }.to_owned(),
        ]
    };
    let header = ["Value", "Largest difference", "Mean", "Least cosine", "Mean cosine", "Same argmax", "Tolerance"];
    println!("{}", print::table(&header, 1, v.outputs.iter().chain(&v.sites).map(row)));
    let elements = v.tolerance.elements.map(|(atol, rtol)| format!("|a - b| <= {atol} + {rtol} |a|"));
    let cosine = v.tolerance.cosine.map(|c| format!("cosine >= {c}"));
    println!("tolerance: {}", elements.into_iter().chain(cosine).collect::<Vec<_>>().join(", "));
}

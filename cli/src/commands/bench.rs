//! `bench`: models and engines in turn, in one process.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Instant;

use anyhow::Result;
use mabert_graph::Model;
use mabert_passes::recording::made_up_inputs;
use mabert_runtime::{Engine, Named};
use mabert_transfer::data::{BatchShape, Overlong, batches};
use serde::Serialize;

use super::profile::Profile;
use super::run_on;
use crate::arguments::{Bench, EngineChoice, EngineName, Global};
use crate::failure::Usage;
use crate::print;

#[derive(Serialize)]
struct Benchmark {
    results: Vec<Timing>,
    ratios: Vec<Ratio>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    profiles: Vec<Profile>,
}

/// One model on one engine.
#[derive(Serialize)]
struct Timing {
    model: String,
    engine: &'static str,
    batch: usize,
    seq: usize,
    threads: usize,
    /// Of a run: one batch, or all batches of the data.
    median_ms: f64,
    min_ms: f64,
    runs: usize,
    texts_per_second: f64,
}

/// A model's time over that of the first model on the first engine, round by round.
#[derive(Serialize)]
struct Ratio {
    model: String,
    engine: &'static str,
    against: String,
    against_engine: &'static str,
    batch: usize,
    seq: usize,
    /// Median of the rounds' ratios.
    median: f64,
    /// Their quartiles.
    lower: f64,
    upper: f64,
}

struct Entry<'p> {
    path: &'p Path,
    engine: EngineName,
    inputs: Inputs,
    loaded: Box<dyn Engine>,
}

/// Inputs of one model by length and batch size: a run is over all of them.
#[derive(Clone)]
struct Inputs {
    of: BTreeMap<(usize, usize), Vec<Named>>,
}

/// Texts of the data that a run is over, at most.
const MOST_TEXTS: usize = 512;

impl Inputs {
    /// Made before the model is loaded to run: it is not in memory twice.
    fn new(path: &Path, arguments: &Bench, global: &Global) -> Result<Self> {
        let model = Model::load(path)?;
        let mut of = BTreeMap::new();
        for (seq, batch) in arguments.seq.iter().flat_map(|s| arguments.batch.iter().map(move |b| (*s, *b))) {
            if arguments.data.data.is_some() {
                let cut = super::longest(&model, seq)?;
                let mut texts = arguments.data.sequences(cut, Overlong::Truncate, None)?;
                texts.truncate(MOST_TEXTS);
                let declared = model.inputs();
                let batches = batches(&texts, usize::MAX, batch, BatchShape::from_inputs(&declared));
                let inputs = batches.iter().map(|b| Ok(b.inputs(&declared)?)).collect::<Result<Vec<Named>>>()?;
                of.insert((seq, batch), inputs);
                continue;
            }
            let made = made_up_inputs(&model, batch, seq, global.seed)?;
            // A model may fix its sizes: then nothing else can be timed on it.
            if let Some((name, value)) = made.iter().find(|(_, t)| t.shape() != [batch, seq]) {
                let reason = format!("{}: input `{name}` is fixed at {:?}", path.display(), value.shape());
                return Err(Usage(format!("{reason}; give matching --batch and --seq")).into());
            }
            of.insert((seq, batch), vec![made]);
        }
        Ok(Self { of })
    }
}

pub(super) fn bench(arguments: &Bench, global: &Global) -> Result<()> {
    if arguments.batch.contains(&0) || arguments.seq.contains(&0) {
        return Err(Usage("--batch and --seq must be at least 1".to_owned()).into());
    }
    let engines = arguments.engine.iter().flat_map(|choice| match choice {
        EngineChoice::Tract => vec![EngineName::Tract],
        EngineChoice::PlainTract => vec![EngineName::PlainTract],
        EngineChoice::Onnxruntime => vec![EngineName::Onnxruntime],
        EngineChoice::Both => vec![EngineName::Tract, EngineName::Onnxruntime],
    });
    let engines: Vec<EngineName> = engines.collect();
    let mut entries = Vec::new();
    for path in &arguments.models {
        let inputs = Inputs::new(path, arguments, global)?;
        for &engine in &engines {
            let loaded = engine.load(path, global)?;
            entries.push(Entry { path, engine, inputs: inputs.clone(), loaded });
        }
    }
    let mut benchmark = Benchmark { results: Vec::new(), ratios: Vec::new(), profiles: Vec::new() };
    for &seq in &arguments.seq {
        for &batch in &arguments.batch {
            let rounds = Rounds { batch, seq, runs: arguments.runs as usize, warmup: arguments.warmup as usize };
            rounds.measure(&entries, global.threads(), &mut benchmark)?;
        }
    }
    if arguments.profile {
        entries.dedup_by_key(|entry| entry.path);
        for Entry { path, inputs, loaded, .. } in entries {
            drop(loaded);
            let model = crate::engine::tract(path, global)?;
            for inputs in inputs.of.values().flatten() {
                let runs = arguments.runs as usize;
                benchmark.profiles.push(Profile::measure(path, &model, inputs, runs, global.threads())?);
            }
        }
    }
    if global.json {
        return print::json(&benchmark);
    }
    print_benchmark(&benchmark);
    benchmark.profiles.iter().for_each(Profile::print);
    Ok(())
}

/// A batch size and a length, and how often each is run.
struct Rounds {
    batch: usize,
    seq: usize,
    runs: usize,
    warmup: usize,
}

impl Rounds {
    fn measure(&self, entries: &[Entry<'_>], threads: usize, into: &mut Benchmark) -> Result<()> {
        let mut times = vec![Vec::with_capacity(self.runs); entries.len()];
        for round in 0..self.warmup + self.runs {
            for (entry, times) in entries.iter().zip(&mut times) {
                let inputs = &entry.inputs.of[&(self.seq, self.batch)];
                let start = Instant::now();
                for batch in inputs {
                    drop(run_on(entry.loaded.as_ref(), batch)?);
                }
                let elapsed = start.elapsed().as_secs_f64() * 1e3;
                if round >= self.warmup {
                    times.push(elapsed);
                }
            }
        }
        for (entry, times) in entries.iter().zip(&times) {
            let mut sorted = times.clone();
            sorted.sort_by(f64::total_cmp);
            let inputs = entry.inputs.of[&(self.seq, self.batch)].iter();
            let texts: usize = inputs.filter_map(|batch| batch.first()).map(|(_, value)| value.shape()[0]).sum();
            into.results.push(Timing {
                model: entry.path.display().to_string(),
                engine: entry.engine.name(),
                batch: self.batch,
                seq: self.seq,
                threads,
                median_ms: quantile(&sorted, 0.5),
                min_ms: sorted[0],
                runs: sorted.len(),
                texts_per_second: texts as f64 / (quantile(&sorted, 0.5) / 1e3),
            });
        }
        for (entry, of_entry) in entries.iter().zip(&times).skip(1) {
            let mut ratios: Vec<f64> = of_entry.iter().zip(&times[0]).map(|(a, b)| a / b).collect();
            ratios.sort_by(f64::total_cmp);
            into.ratios.push(Ratio {
                model: entry.path.display().to_string(),
                engine: entry.engine.name(),
                against: entries[0].path.display().to_string(),
                against_engine: entries[0].engine.name(),
                batch: self.batch,
                seq: self.seq,
                median: quantile(&ratios, 0.5),
                lower: quantile(&ratios, 0.25),
                upper: quantile(&ratios, 0.75),
            });
        }
        Ok(())
    }
}

/// Of sorted values, the one at a share of the way, interpolated.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = share * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

fn print_benchmark(benchmark: &Benchmark) {
    let ratio = |t: &Timing| {
        let same = |r: &&Ratio| r.model == t.model && r.engine == t.engine && (r.batch, r.seq) == (t.batch, t.seq);
        let found = benchmark.ratios.iter().find(same);
        found.map_or_else(|| "1".to_owned(), |r| format!("{:.3} ({:.3} to {:.3})", r.median, r.lower, r.upper))
    };
    let rows = benchmark.results.iter().map(|t| {
        vec![
            t.model.clone(),
            t.engine.to_owned(),
            t.batch.to_string(),
            t.seq.to_string(),
            t.threads.to_string(),
            format!("{:.2}", t.median_ms),
            format!("{:.2}", t.min_ms),
            t.runs.to_string(),
            format!("{:.0}", t.texts_per_second),
            ratio(t),
        ]
    });
    let header = [
        "Model",
        "Engine",
        "Batch",
        "Length",
        "Threads",
        "Median ms",
        "Least ms",
        "Runs",
        "Texts/s",
        "To the first (quartiles)",
    ];
    println!("{}", print::table(&header, 2, rows));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_interpolate() {
        let sorted = [1.0, 2.0, 4.0, 8.0];
        assert_eq!(quantile(&sorted, 0.5), 3.0);
        assert_eq!(quantile(&sorted, 0.25), 1.75);
        assert_eq!(quantile(&[5.0], 0.75), 5.0);
    }
}

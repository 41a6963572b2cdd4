//! `bench`: models and engines in turn, in one process.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use mabert_graph::Model;
use mabert_passes::inputs::EncoderInputs;
use mabert_runtime::{Engine, Named};
use mabert_transfer::data::{DataFile, Overlong, batches};
use mabert_transfer::progress::Progress as _;
use serde::Serialize;

use super::profile::Profile;
use crate::arguments::{Choice, DataArguments, Global, count, one_of, read_texts};
use crate::bars::Bars;
use crate::engines::{EngineName, Reads, load_tract, run_on};
use crate::failure::Usage;
use crate::print::{self, Page};

#[derive(Debug, Args)]
pub(crate) struct BenchArguments {
    /// The models; ratios are against the first
    #[arg(required = true)]
    models: Vec<PathBuf>,
    /// Batch sizes
    #[arg(long, value_delimiter = ',', default_value = "1", value_name = "N", value_parser = count(MOST_POSITIONS))]
    batch: Vec<usize>,
    /// Sequence lengths; with --data, where texts are cut [default: 128, or what the models take]
    #[arg(long, value_delimiter = ',', value_name = "N", value_parser = count(MOST_POSITIONS))]
    seq: Vec<usize>,
    /// The engines, in turn
    #[arg(
        long, value_delimiter = ',', default_value = EngineName::Tract.name(), value_parser = one_of(Engines::all())
    )]
    engine: Vec<Engines>,
    /// Timed rounds; in each, every model runs once
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Rounds before timing starts
    #[arg(long, default_value_t = 3, value_name = "N")]
    warmup: u32,
    /// Also time each operator and site, on tract
    #[arg(long, conflicts_with = "data")]
    profile: bool,
    #[command(flatten)]
    data: DataArguments,
}

/// One engine, or two by one name.
#[derive(Clone, Copy, Debug)]
enum Engines {
    One(EngineName),
    TractAndOnnxruntime,
}

impl Engines {
    fn all() -> impl Iterator<Item = Self> {
        EngineName::ALL.into_iter().map(Self::One).chain([Self::TractAndOnnxruntime])
    }

    fn names(self) -> Vec<EngineName> {
        match self {
            Self::One(engine) => vec![engine],
            Self::TractAndOnnxruntime => vec![EngineName::Tract, EngineName::Onnxruntime],
        }
    }
}

impl Choice for Engines {
    fn name(self) -> &'static str {
        match self {
            Self::One(engine) => engine.name(),
            Self::TractAndOnnxruntime => "both",
        }
    }

    fn help(self) -> Option<&'static str> {
        match self {
            Self::One(engine) => engine.help(),
            Self::TractAndOnnxruntime => Some("tract and onnxruntime"),
        }
    }
}

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

/// Inputs of one model: what a run is over, by length and batch size.
#[derive(Clone)]
struct Inputs {
    runs: BTreeMap<(usize, usize), Vec<Named>>,
}

/// Tokens of a batch, and pairs of tokens that attend to each other, at most: more would fill any machine's memory.
const MOST_POSITIONS: usize = 1 << 18;
const MOST_PAIRS: usize = 1 << 28;
/// The length where none is asked for.
const SEQ: usize = 128;
/// Texts of the data that a run is over, at most.
const MOST_TEXTS: usize = 512;

impl Inputs {
    /// Made before the model is loaded to run: it is not in memory twice.
    fn new(path: &Path, arguments: &BenchArguments, plan: &Plan, global: &Global) -> Result<Self> {
        let model = Model::load(path)?;
        let mut runs = BTreeMap::new();
        for (seq, batch) in plan.sizes() {
            let inputs = match &plan.file {
                Some(file) => text_batches(&model, &arguments.data, file, seq, batch)?,
                None => vec![made_up_batch(&model, &arguments.data, batch, seq, global.seed)?],
            };
            runs.insert((seq, batch), inputs);
        }
        Ok(Self { runs })
    }
}

/// The data's texts, cut to `seq` tokens.
fn text_batches(model: &Model, data: &DataArguments, file: &DataFile, seq: usize, batch: usize) -> Result<Vec<Named>> {
    let reads = Reads::new(model, seq, &data.input_roles)?;
    let encoder = data.encoder(reads.max_seq, Overlong::Truncate)?;
    let mut sequences = read_texts(file, &encoder, reads.vocabulary())?.sequences;
    sequences.truncate(MOST_TEXTS);
    let batches = batches(&sequences, usize::MAX, batch, &reads.shape(&encoder));
    batches.iter().map(|batch| Ok(batch.inputs(&model.inputs())?)).collect()
}

fn made_up_batch(model: &Model, data: &DataArguments, batch: usize, seq: usize, seed: u64) -> Result<Named> {
    let inputs = EncoderInputs::new(model, &data.input_roles)?.made_up(batch, seq, seed)?;
    // A model may fix its sizes: then nothing else can be timed on it.
    match inputs.iter().find(|(_, value)| value.shape() != [batch, seq]) {
        None => Ok(inputs),
        Some((name, value)) => {
            let reason = format!("{}: input `{name}` is fixed at {:?}", model.origin(), value.shape());
            Err(Usage(format!("{reason}; give matching --batch and --seq")).into())
        }
    }
}

/// What is timed.
struct Plan {
    batch: Vec<usize>,
    seq: Vec<usize>,
    /// The texts, where they are not made up.
    file: Option<DataFile>,
}

impl Plan {
    fn new(arguments: &BenchArguments) -> Result<Self> {
        let BenchArguments { batch, seq, data, .. } = arguments;
        data.check("")?;
        if data.data.is_none() {
            data.refuse_tokenizer("without --data: the tokens are made up")?;
        }
        let file = data.data.as_ref().map(|_| data.open(None)).transpose()?;
        let seq = if seq.is_empty() { vec![arguments.usual_length()?] } else { seq.clone() };
        let plan = Self { batch: batch.clone(), seq, file };
        let is_much = |&(seq, batch): &(usize, usize)| {
            let positions = seq.saturating_mul(batch);
            positions > MOST_POSITIONS || positions.saturating_mul(seq) > MOST_PAIRS
        };
        if let Some((seq, batch)) = plan.sizes().find(is_much) {
            let reason = format!("--batch {batch} with --seq {seq}: more at once than a machine's memory holds");
            return Err(Usage(reason).into());
        }
        Ok(plan)
    }

    /// Every length with every batch size.
    fn sizes(&self) -> impl Iterator<Item = (usize, usize)> {
        self.seq.iter().flat_map(|&seq| self.batch.iter().map(move |&batch| (seq, batch)))
    }
}

impl BenchArguments {
    /// The length that is timed where none is asked for: all models take it.
    fn usual_length(&self) -> Result<usize> {
        let given = &self.data.input_roles;
        self.models.iter().try_fold(SEQ, |limit, path| Ok(Reads::new(&Model::load(path)?, limit, given)?.max_seq))
    }

    /// Every model on every engine.
    fn entries(&self, plan: &Plan, global: &Global) -> Result<Vec<Entry<'_>>> {
        let engines: Vec<EngineName> = self.engine.iter().flat_map(|engines| engines.names()).collect();
        let mut entries = Vec::new();
        for path in &self.models {
            let inputs = Inputs::new(path, self, plan, global)?;
            for &engine in &engines {
                let loaded = engine.load(path, global)?;
                entries.push(Entry { path, engine, inputs: inputs.clone(), loaded });
            }
        }
        Ok(entries)
    }

    /// Every model on tract, operator by operator, one model after the other.
    fn profiles(&self, mut entries: Vec<Entry<'_>>, global: &Global) -> Result<Vec<Profile>> {
        entries.dedup_by_key(|entry| entry.path);
        let mut profiles = Vec::new();
        for Entry { path, inputs, loaded, .. } in entries {
            drop(loaded);
            let model = load_tract(path, global)?;
            for inputs in inputs.runs.values().flatten() {
                profiles.push(Profile::measure(path, &model, inputs, self.runs as usize, global.threads())?);
            }
        }
        Ok(profiles)
    }
}

pub(super) fn bench(arguments: &BenchArguments, global: &Global) -> Result<()> {
    let plan = Plan::new(arguments)?;
    let entries = arguments.entries(&plan, global)?;
    let bars = Bars::new(global);
    let mut benchmark = Benchmark { results: Vec::new(), ratios: Vec::new(), profiles: Vec::new() };
    for (seq, batch) in plan.sizes() {
        bars.begin("bench", 0);
        let rounds = Rounds { batch, seq, runs: arguments.runs as usize, warmup: arguments.warmup as usize };
        let times = rounds.time(&entries)?;
        benchmark.results.extend(rounds.timings(&entries, &times, global.threads()));
        benchmark.ratios.extend(rounds.ratios(&entries, &times));
        bars.end();
    }
    if arguments.profile {
        benchmark.profiles = arguments.profiles(entries, global)?;
    }
    if global.json {
        return print::json(&benchmark);
    }
    let mut page = Page::default();
    page.lines(timings_table(&benchmark));
    benchmark.profiles.iter().for_each(|profile| profile.add_to(&mut page));
    page.print()
}

/// A batch size and a length, and how often each is run.
struct Rounds {
    batch: usize,
    seq: usize,
    runs: usize,
    warmup: usize,
}

impl Rounds {
    /// The milliseconds of each entry's timed rounds. Entries take turns, so that what slows the machine slows all of them.
    fn time(&self, entries: &[Entry<'_>]) -> Result<Vec<Vec<f64>>> {
        let mut times = vec![Vec::with_capacity(self.runs); entries.len()];
        for round in 0..self.warmup + self.runs {
            for (entry, times) in entries.iter().zip(&mut times) {
                let start = Instant::now();
                for batch in self.inputs(entry) {
                    drop(run_on(entry.loaded.as_ref(), batch)?);
                }
                let elapsed = start.elapsed().as_secs_f64() * 1e3;
                if round >= self.warmup {
                    times.push(elapsed);
                }
            }
        }
        Ok(times)
    }

    fn inputs<'e>(&self, entry: &'e Entry<'_>) -> &'e [Named] {
        &entry.inputs.runs[&(self.seq, self.batch)]
    }

    fn timings(&self, entries: &[Entry<'_>], times: &[Vec<f64>], threads: usize) -> Vec<Timing> {
        let timing = |(entry, times): (&Entry<'_>, &Vec<f64>)| {
            let times = sorted(times.iter().copied());
            let first_inputs = self.inputs(entry).iter().filter_map(|batch| batch.first());
            let texts: usize = first_inputs.map(|(_, value)| value.shape()[0]).sum();
            Timing {
                model: entry.path.display().to_string(),
                engine: entry.engine.name(),
                batch: self.batch,
                seq: self.seq,
                threads,
                median_ms: quantile(&times, 0.5),
                min_ms: times[0],
                runs: times.len(),
                texts_per_second: texts as f64 / (quantile(&times, 0.5) / 1e3),
            }
        };
        entries.iter().zip(times).map(timing).collect()
    }

    fn ratios(&self, entries: &[Entry<'_>], times: &[Vec<f64>]) -> Vec<Ratio> {
        let ratio = |(entry, times_here): (&Entry<'_>, &Vec<f64>)| {
            let ratios = sorted(times_here.iter().zip(&times[0]).map(|(here, first)| here / first));
            Ratio {
                model: entry.path.display().to_string(),
                engine: entry.engine.name(),
                against: entries[0].path.display().to_string(),
                against_engine: entries[0].engine.name(),
                batch: self.batch,
                seq: self.seq,
                median: quantile(&ratios, 0.5),
                lower: quantile(&ratios, 0.25),
                upper: quantile(&ratios, 0.75),
            }
        };
        entries.iter().zip(times).skip(1).map(ratio).collect()
    }
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

/// Of sorted values, the one at a share of the way, interpolated.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = share * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
    low + (high - low) * at.fract()
}

fn timings_table(benchmark: &Benchmark) -> comfy_table::Table {
    let ratio = |t: &Timing| {
        let is_same = |r: &&Ratio| r.model == t.model && r.engine == t.engine && (r.batch, r.seq) == (t.batch, t.seq);
        match benchmark.ratios.iter().find(is_same) {
            Some(r) => format!("{:.3} ({:.3} to {:.3})", r.median, r.lower, r.upper),
            None => "1".to_owned(),
        }
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
    print::table(&header, 2, rows)
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

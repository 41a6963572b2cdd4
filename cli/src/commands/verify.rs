//! `verify`: two models, or one on two engines, output by output.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use clap::Args;
use mabert_graph::Model;
use mabert_passes::inputs::EncoderInputs;
use mabert_passes::pipeline::simplify;
use mabert_passes::recognise::recognise;
use mabert_runtime::{Engine, borrowed, npz};
use mabert_transfer::Setting;
use mabert_transfer::compare::{Distances, OutputDistance, Tolerance};
use mabert_transfer::data::{BatchShape, Overlong, Sequence, Vocabulary, batches, made_up_sequences, sameness_note};
use mabert_transfer::pooling::{Features, Pooling, table_columns};
use mabert_transfer::progress::Progress as _;
use serde::Serialize;

use crate::arguments::{Choice as _, DataArguments, Global, VectorArguments, count, one_of, read_texts};
use crate::bars::Bars;
use crate::engines::{EngineName, Reads, refuse_negative_ids, run_on};
use crate::failure::{CheckFailed, Usage};
use crate::print::{self, Page};

#[derive(Debug, Args)]
pub(crate) struct VerifyArguments {
    /// The first model; distances are relative to it
    first: PathBuf,
    /// The second model; without it, the first one on tract and on onnxruntime
    second: Option<PathBuf>,
    #[command(flatten)]
    data: DataArguments,
    #[command(flatten)]
    vectors: VectorArguments,
    /// Arrays named as the models' inputs
    #[arg(long, value_name = "FILE", conflicts_with = "data")]
    npz: Option<PathBuf>,
    /// Sequences to compare on; the first ones of the data, or made up
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = count(1 << 20))]
    sequences: usize,
    /// The largest absolute difference allowed [default: 1e-3, unless --cosine is given]
    #[arg(long, value_name = "X")]
    atol: Option<f64>,
    /// What is allowed on top, relative to the first model's value
    #[arg(long, value_name = "X")]
    rtol: Option<f64>,
    /// The smallest cosine allowed between rows, of a feature model between vectors of texts
    #[arg(long, value_name = "X")]
    cosine: Option<f64>,
    /// Also compare at every site whose value both models have
    #[arg(long)]
    sites: bool,
    /// The engine of both models, or of the first and the second as in tract,onnxruntime
    #[arg(
        long, value_delimiter = ',', num_args = 1..=2, value_name = "ENGINE", value_parser = one_of(EngineName::ALL)
    )]
    engine: Vec<EngineName>,
}

/// Made-up sequences and texts are cut to this, or to what both models take.
const LONGEST: usize = 512;
/// Positions of one batch, and rows at most.
const BATCH_TOKENS: usize = 2048;
const BATCH_ROWS: usize = 8;
/// The tolerance where none is asked for.
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
    /// What makes it doubtful that the figures say something.
    notes: Vec<String>,
}

pub(super) fn verify(arguments: &VerifyArguments, global: &Global) -> Result<()> {
    let paths = [&arguments.first, arguments.second.as_ref().unwrap_or(&arguments.first)].map(PathBuf::as_path);
    arguments.data.check("")?;
    if arguments.npz.is_some() {
        arguments.data.refuse_tokenizer("with --npz, which has token ids")?;
        if arguments.vectors.pooling.is_some() {
            let reason = "--pooling makes vectors of texts, and --npz holds arrays: give --data, or neither";
            return Err(Usage(reason.to_owned()).into());
        }
    }
    let engines = engines(arguments)?;
    let bars = Bars::new(global);
    bars.begin("verify", 0);
    let sites = if arguments.sites { shared_sites(paths, engines)? } else { Vec::new() };
    let tolerance = tolerance(arguments);
    let pair = Pair {
        paths,
        models: [engines[0].load_tapped(paths[0], &sites, global)?, engines[1].load_tapped(paths[1], &sites, global)?],
    };
    let (distances, Compared { described: inputs, notes, .. }) = pair.compare(arguments, tolerance, &sites, global)?;
    bars.end();
    print::notes(&notes, global);
    let (at_sites, outputs): (Vec<_>, Vec<_>) =
        distances.outputs().into_iter().partition(|o| sites.contains(&o.output));
    if outputs.is_empty() {
        let [first, second] = paths.map(Path::display);
        let reason = format!("{first} and {second} have no output of the same name");
        return Err(mabert_transfer::Error::Compare(reason).into());
    }
    let verified = Verified {
        first: paths[0].display().to_string(),
        second: paths[1].display().to_string(),
        engines: engines.map(EngineName::name),
        inputs,
        tolerance,
        holds: outputs.iter().all(|o| o.holds(&tolerance)),
        outputs,
        sites: at_sites,
        notes,
    };
    if global.json {
        print::json(&verified)?;
    } else if !global.quiet {
        print_verified(&verified)?;
    }
    match verified.holds {
        true => Ok(()),
        false => Err(CheckFailed("the outputs differ by more than the tolerance".to_owned()).into()),
    }
}

/// What is compared.
struct Pair<'a> {
    paths: [&'a Path; 2],
    models: [Box<dyn Engine>; 2],
}

impl Pair<'_> {
    /// How far apart the two are, and on what.
    fn compare(
        &self,
        arguments: &VerifyArguments,
        tolerance: Tolerance,
        sites: &[String],
        global: &Global,
    ) -> Result<(Distances, Compared)> {
        let [first, second] = self.models.each_ref().map(Box::as_ref);
        let mut distances = Distances::new(tolerance).inner(sites);
        if let Some(path) = &arguments.npz {
            let roles = &arguments.data.input_roles;
            let arrays = npz::for_inputs(path, first.inputs())?;
            let model = Model::load(self.paths[0])?;
            refuse_negative_ids(&model, &arrays, roles).with_context(|| path.display().to_string())?;
            let rows = EncoderInputs::new(&model, roles)?.vocabulary();
            let channels = rows.and_then(|rows| table_columns(&model, rows));
            // What is text of the arrays is not known, so that nothing is pooled.
            distances = distances.features(Features::new(Some(Pooling::None)).channels(channels));
            let others = npz::for_inputs(path, second.inputs())?;
            distances.add(&run_on(first, &arrays)?, &run_on(second, &others)?, None)?;
            return Ok((distances, Compared::arrays(path)));
        }
        let compared = compared(arguments, self.paths, global)?;
        distances = distances.features(compared.features.clone());
        let [first_shape, second_shape] = &compared.shapes;
        for batch in batches(&compared.sequences, BATCH_TOKENS, BATCH_ROWS, first_shape) {
            let run = |model: &dyn Engine, shape: &BatchShape| -> Result<_> {
                Ok(model.run(&borrowed(&batch.inputs_as(&shape.roles, model.inputs())?))?)
            };
            distances.add(&run(first, first_shape)?, &run(second, second_shape)?, Some(&batch))?;
        }
        Ok((distances, compared))
    }
}

fn engines(arguments: &VerifyArguments) -> Result<[EngineName; 2]> {
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

fn tolerance(arguments: &VerifyArguments) -> Tolerance {
    let asked = arguments.atol.is_some() || arguments.rtol.is_some();
    let defaults = if asked { (0.0, 0.0) } else { (ATOL, RTOL) };
    let elements = (asked || arguments.cosine.is_none())
        .then(|| (arguments.atol.unwrap_or(defaults.0), arguments.rtol.unwrap_or(defaults.1)));
    Tolerance { elements, cosine: arguments.cosine }
}

/// What two models are compared on.
struct Compared {
    sequences: Vec<Sequence>,
    /// What the models' batches are like.
    shapes: [BatchShape; 2],
    /// What makes vectors of texts of their outputs.
    features: Features,
    /// What the sequences are, for people.
    described: String,
    notes: Vec<String>,
}

impl Compared {
    fn arrays(path: &Path) -> Self {
        let described = path.display().to_string();
        let features = Features::default();
        Self { sequences: Vec::new(), shapes: Default::default(), features, described, notes: Vec::new() }
    }
}

/// Texts, or made-up sequences, that both models take.
fn compared(arguments: &VerifyArguments, paths: [&Path; 2], global: &Global) -> Result<Compared> {
    let given = &arguments.data.input_roles;
    let first = Reads::new(&Model::load(paths[0])?, LONGEST, given)?;
    let second = Reads::new(&Model::load(paths[1])?, first.max_seq, given)?;
    let longest = second.max_seq;
    let encoder = arguments.data.encoder(longest, Overlong::Truncate)?;
    let shapes = [first.shape(&encoder), second.shape(&encoder)];
    let channels = first.channels().or_else(|| second.channels());
    let features = arguments.vectors.features(paths[0], arguments.data.tokenizer.as_deref(), channels);
    let wanted = arguments.sequences;
    if arguments.data.data.is_some() {
        let rows = [&first, &second].into_iter().filter_map(|reads| reads.vocabulary()).min();
        let mut texts = read_texts(&arguments.data.open(None)?, &encoder, rows)?;
        texts.sequences.truncate(wanted);
        texts.notes.extend(sameness_note(&texts.file, &texts.sequences));
        let (count, file, cut) = (texts.sequences.len(), texts.file.display(), texts.truncated());
        let described = format!("{count} sequences of {file}, {cut} of them cut to {longest} tokens");
        return Ok(Compared { sequences: texts.sequences, shapes, features, described, notes: texts.notes });
    }
    let Some(size) = first.vocabulary().zip(second.vocabulary()).map(|(a, b)| a.min(b)) else {
        let reason = "no table that token ids index was found in both models, so that none can be made up: give data";
        return Err(mabert_transfer::Error::Setting {
            reason: reason.to_owned(),
            settings: &[Setting::Data, Setting::Arrays],
        }
        .into());
    };
    let vocabulary = Vocabulary { size, frame: encoder.frame()? };
    let mut sequences = made_up_sequences(&vocabulary, longest, wanted.saturating_mul(longest), global.seed);
    sequences.truncate(wanted);
    let described = format!("{} sequences of random tokens, up to {longest} each", sequences.len());
    Ok(Compared { sequences, shapes, features, described, notes: encoder.notes(size)? })
}

/// The sites' values that both models have under the same name.
fn shared_sites(paths: [&Path; 2], engines: [EngineName; 2]) -> Result<Vec<String>> {
    if engines != [EngineName::Tract; 2] {
        return Err(Usage("--sites taps inner values, which only tract does here".to_owned()).into());
    }
    let computed = |model: &Model| -> HashSet<String> {
        model.graph().node.iter().flat_map(|n| n.output.iter().cloned()).collect()
    };
    let mut model = Model::load(paths[0])?;
    let both: HashSet<String> = &computed(&model) & &computed(&Model::load(paths[1])?);
    simplify(&mut model)?;
    let sites = recognise(&model)?;
    let values = sites.attentions.iter().flat_map(|a| [&a.probabilities, &a.context]);
    let values = values.chain(sites.activations.iter().map(|a| &a.output)).chain(sites.norms.iter().map(|n| &n.output));
    let shared: Vec<String> = values.filter(|v| both.contains(*v)).cloned().collect();
    if shared.is_empty() {
        let reason =
            "no site's value is left under the same name in both; compare with a student of `rewrite --no-fold`";
        return Err(Usage(reason.to_owned()).into());
    }
    Ok(shared)
}

fn print_verified(v: &Verified) -> Result<()> {
    let mut page = Page::default();
    page.line(format!("{} on {} against {} on {}", v.first, v.engines[0], v.second, v.engines[1]));
    page.line(format!("on {}", v.inputs));
    let all: Vec<&OutputDistance> = v.outputs.iter().chain(&v.sites).collect();
    let likeness = print::Likeness::new(&all);
    let row = |o: &&OutputDistance| {
        let (least, mean) = o.cosines().unzip();
        let figures =
            [print::number(o.max_abs), print::number(o.mean_abs), print::optional(least), print::optional(mean)];
        let holds = if o.holds(&v.tolerance) { "holds" } else { "FAILS" }.to_owned();
        [std::slice::from_ref(&o.output), &figures[..], &likeness.cells(o), &[holds]].concat()
    };
    let header = ["Value", "Largest difference", "Mean", "Least cosine", "Mean cosine"];
    let header = [&header[..], &likeness.header(), &["Tolerance"]].concat();
    page.lines(print::table(&header, 1, all.iter().map(row)));
    likeness.vectors(&all).into_iter().for_each(|line| page.line(line));
    let elements = v.tolerance.elements.map(|(atol, rtol)| format!("|a - b| <= {atol} + {rtol} |a|"));
    let cosine = v.tolerance.cosine.map(|c| format!("cosine >= {c}"));
    page.line(format!("tolerance: {}", elements.into_iter().chain(cosine).collect::<Vec<_>>().join(", ")));
    page.print()
}

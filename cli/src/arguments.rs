//! What can be said on the command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use mabert_passes::pipeline::Pass;

/// Rewrite BERT-family ONNX models into MA-BERT: matrix arithmetic and ReLU only.
///
/// Exit codes: 0 done; 1 a check did not hold; 2 usage; 3 the model or the data cannot be used.
#[derive(Debug, Parser)]
#[command(name = "onnx-mabert", version)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Print results as JSON on standard output
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// No progress, no notes
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    /// More notes on standard error; twice for still more
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub(crate) verbose: u8,
    /// Threads [default: all cores]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(crate) threads: Option<u16>,
    /// Seed of everything drawn at random
    #[arg(long, global = true, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// onnxruntime's library [default: the one that ORT_DYLIB_PATH names]
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) ort_lib: Option<PathBuf>,
}

impl Global {
    pub(crate) fn threads(&self) -> usize {
        let all = || std::thread::available_parallelism().map_or(1, usize::from);
        self.threads.map_or_else(all, usize::from)
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Rewrite a model into MA-BERT form
    Rewrite(Rewrite),
    /// Train a student further, end to end, and fold it
    Transfer(Transfer),
    /// Show inputs, outputs, operators, layers, sites, and what is not matrix arithmetic
    Inspect(Inspect),
    /// Show what was tried around each anchor, and why something was not recognised
    Explain(Explain),
    /// Run a model on texts or arrays
    Run(Run),
    /// Compare two models, or one on two engines, output by output
    Verify(Verify),
    /// Measure models on a labelled task, and their agreement with the first
    Eval(Eval),
    /// Time models in turn: on made-up tokens, or with --data on a file's texts, 512 at most, in batches of like lengths
    Bench(Bench),
}

/// Texts, or ready token ids.
#[derive(Debug, Args)]
pub(crate) struct DataArguments {
    /// Data: .txt (one text a line), .tsv or .csv with a header, .jsonl, or .npz of token ids
    #[arg(long, value_name = "FILE")]
    pub(crate) data: Option<PathBuf>,
    /// The model's tokenizer.json; needed where the data is text
    #[arg(long, value_name = "FILE")]
    pub(crate) tokenizer: Option<PathBuf>,
    /// The column of the text [default: text or sentence, or the first of a pair as the usual data sets call it]
    #[arg(long, value_name = "NAME", requires = "data")]
    pub(crate) text_column: Option<String>,
    /// The column of the second text of a pair [default: sentence2 beside sentence1, hypothesis beside premise...]
    #[arg(long, value_name = "NAME", requires = "data")]
    pub(crate) pair_column: Option<String>,
    /// Labels that are words, in the order of the model's classes, as in `entailment,not_entailment`
    #[arg(long, value_name = "WORDS", value_delimiter = ',', requires = "data")]
    pub(crate) classes: Vec<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Rewrite {
    /// The model to rewrite
    pub(crate) model: PathBuf,
    /// Where to write the student
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// Keep large constants in a file of their own, OUTPUT.data, as a model does that came so
    #[arg(long)]
    pub(crate) external_data: bool,
    /// The longest sequence the student takes [default: the model's limit, at most 128]
    #[arg(long, value_name = "N")]
    pub(crate) max_seq: Option<usize>,
    /// Hidden size of the approximators [default: the longest sequence, at most 128]
    #[arg(long, value_name = "H")]
    pub(crate) hidden: Option<usize>,
    /// Which heads share an approximator
    #[arg(long, value_enum, default_value_t = Softmax::PerHead)]
    pub(crate) softmax: Softmax,
    /// Whether approximators depend on the number of real tokens
    #[arg(long, value_enum, default_value_t = Switch::On)]
    pub(crate) length_tables: Switch,
    /// The order of attention's products: cost linear in length, or the paper's
    #[arg(long, value_enum, default_value_t = Attention::Linear)]
    pub(crate) attention: Attention,
    #[command(flatten)]
    pub(crate) data: DataArguments,
    /// How the student's parameters are found [default: blockwise with data, closed-form without]
    #[arg(long, value_enum)]
    pub(crate) transfer: Option<TransferStage>,
    /// Tokens that go through the student to calibrate it [default: 40000 of text, 12000 made up]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(100..))]
    pub(crate) calibration_tokens: Option<u64>,
    /// More text to calibrate and train on, not to measure on; half of all sequences come from it
    #[arg(long, value_name = "FILE", requires = "data")]
    pub(crate) extra_data: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) dev: DevArguments,
    /// Sites to leave as they are
    #[arg(long, value_enum, value_delimiter = ',', value_name = "KIND")]
    pub(crate) keep: Vec<Kept>,
    /// Leave parameters as they are, with the affine maps that replace norms, for `transfer`
    #[arg(long)]
    pub(crate) no_fold: bool,
    /// The last pass to run
    #[arg(long, value_name = "PASS", value_parser = pass)]
    pub(crate) until: Option<Pass>,
    /// Accept sites that are not recognised
    #[arg(long)]
    pub(crate) partial: bool,
    /// Write the whole report to a file as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) full: FullArguments,
}

/// The end-to-end stage.
#[derive(Debug, Args)]
#[command(next_help_heading = "End-to-end stage")]
pub(crate) struct FullArguments {
    /// Where its options start from: this program's own, or the paper's distillation (temperature 15, alpha 0.9,
    /// attention weight 100; needs --label-column)
    #[arg(long, value_enum, default_value_t = Recipe::Default)]
    pub(crate) recipe: Recipe,
    /// Gradient steps [default: 900]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) steps: Option<u32>,
    /// Sequences a step [default: as many as have 840 tokens]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) batch: Option<u16>,
    /// Learning rate, once warm [default: 4e-5 over how often each text is seen]
    #[arg(long, value_name = "X", value_parser = positive)]
    pub(crate) lr: Option<f64>,
    /// Logits are divided by it before they are compared [default: 2]
    #[arg(long, value_name = "T", value_parser = positive)]
    pub(crate) temperature: Option<f64>,
    /// The teacher's share in the loss of the outputs; labels have the rest [default: 1]
    #[arg(long, value_name = "X", value_parser = share)]
    pub(crate) alpha: Option<f64>,
    /// What hidden states count [default: 1]
    #[arg(long, value_name = "X", value_parser = weight)]
    pub(crate) hidden_weight: Option<f64>,
    /// What attention's probabilities count [default: 0]
    #[arg(long, value_name = "X", value_parser = weight)]
    pub(crate) attention_weight: Option<f64>,
    /// Keep the state of the stage in this folder
    #[arg(long, value_name = "FOLDER")]
    pub(crate) checkpoint: Option<PathBuf>,
    /// Go on with the run whose state the folder holds
    #[arg(long, requires = "checkpoint")]
    pub(crate) resume: bool,
    /// The column of the label, a number: for --alpha below 1, and for --dev
    #[arg(long, value_name = "NAME")]
    pub(crate) label_column: Option<String>,
}

/// Labelled data to measure on.
#[derive(Debug, Args)]
pub(crate) struct DevArguments {
    /// Labelled data, with the same columns: teacher and student are measured on it after each stage
    #[arg(long, value_name = "FILE", requires = "label_column")]
    pub(crate) dev: Option<PathBuf>,
    /// The metric on it
    #[arg(long, value_enum, default_value_t = MetricName::Accuracy, requires = "dev")]
    pub(crate) metric: MetricName,
}

#[derive(Debug, Args)]
pub(crate) struct Transfer {
    /// The model that the student was made from
    pub(crate) teacher: PathBuf,
    /// The student, made by `rewrite --no-fold`
    pub(crate) student: PathBuf,
    /// Where to write the trained and folded student
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// Keep large constants in a file of their own, OUTPUT.data, as a model does that came so
    #[arg(long)]
    pub(crate) external_data: bool,
    #[command(flatten)]
    pub(crate) data: DataArguments,
    /// More text to train on, not to measure on; half of all sequences come from it
    #[arg(long, value_name = "FILE", requires = "data")]
    pub(crate) extra_data: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) dev: DevArguments,
    /// Write the whole report to a file as JSON
    #[arg(long, value_name = "FILE")]
    pub(crate) report: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) full: FullArguments,
}

#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// The model
    pub(crate) model: PathBuf,
    /// Also print the graph, one line a node
    #[arg(long)]
    pub(crate) graph: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Explain {
    /// The model
    pub(crate) model: PathBuf,
    /// Only what concerns this node
    #[arg(long, value_name = "NAME")]
    pub(crate) node: Option<String>,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["text", "data", "npz"]))]
pub(crate) struct Run {
    /// The model
    pub(crate) model: PathBuf,
    /// A text
    #[arg(long, value_name = "TEXT", requires = "tokenizer")]
    pub(crate) text: Option<String>,
    #[command(flatten)]
    pub(crate) data: DataArguments,
    /// Arrays named as the model's inputs
    #[arg(long, value_name = "FILE")]
    pub(crate) npz: Option<PathBuf>,
    /// Cut texts that are too long for the model
    #[arg(long)]
    pub(crate) truncate: bool,
    /// Write the outputs to an .npz file
    #[arg(short, long, value_name = "FILE")]
    pub(crate) output: Option<PathBuf>,
    /// The engine
    #[arg(long, value_enum, default_value_t = EngineName::Tract)]
    pub(crate) engine: EngineName,
}

#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// The first model; distances are relative to it
    pub(crate) first: PathBuf,
    /// The second model; without it, the first one on tract and on onnxruntime
    pub(crate) second: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) data: DataArguments,
    /// Arrays named as the models' inputs
    #[arg(long, value_name = "FILE", conflicts_with = "data")]
    pub(crate) npz: Option<PathBuf>,
    /// Sequences to compare on; the first ones of the data, or made up
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(crate) sequences: usize,
    /// The largest absolute difference allowed [default: 1e-3, unless --cosine is given]
    #[arg(long, value_name = "X")]
    pub(crate) atol: Option<f64>,
    /// What is allowed on top, relative to the first model's value
    #[arg(long, value_name = "X")]
    pub(crate) rtol: Option<f64>,
    /// The smallest cosine allowed between rows
    #[arg(long, value_name = "X")]
    pub(crate) cosine: Option<f64>,
    /// Also compare at every site whose value both models have
    #[arg(long)]
    pub(crate) sites: bool,
    /// The engine of both models, or of the first and the second as in tract,onnxruntime
    #[arg(long, value_enum, value_delimiter = ',', num_args = 1..=2, value_name = "ENGINE")]
    pub(crate) engine: Vec<EngineName>,
}

#[derive(Debug, Args)]
pub(crate) struct Eval {
    /// The models; agreement is with the first
    #[arg(required = true)]
    pub(crate) models: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) data: DataArguments,
    /// The column of the label, a number
    #[arg(long, value_name = "NAME")]
    pub(crate) label_column: String,
    /// The metric
    #[arg(long, value_enum, default_value_t = MetricName::Accuracy)]
    pub(crate) metric: MetricName,
    /// Fail (exit code 1) where a model's metric is below this
    #[arg(long, value_name = "X")]
    pub(crate) min: Option<f64>,
    /// The engine
    #[arg(long, value_enum, default_value_t = EngineName::Tract)]
    pub(crate) engine: EngineName,
}

#[derive(Debug, Args)]
pub(crate) struct Bench {
    /// The models; ratios are against the first
    #[arg(required = true)]
    pub(crate) models: Vec<PathBuf>,
    /// Batch sizes
    #[arg(long, value_delimiter = ',', default_value = "1", value_name = "N")]
    pub(crate) batch: Vec<usize>,
    /// Sequence lengths; with --data, where texts are cut
    #[arg(long, value_delimiter = ',', default_value = "128", value_name = "N")]
    pub(crate) seq: Vec<usize>,
    /// The engines, in turn
    #[arg(long, value_enum, value_delimiter = ',', default_value = "tract")]
    pub(crate) engine: Vec<EngineChoice>,
    /// Timed rounds; in each, every model runs once
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) runs: u32,
    /// Rounds before timing starts
    #[arg(long, default_value_t = 3, value_name = "N")]
    pub(crate) warmup: u32,
    /// Also time each operator and site, on tract
    #[arg(long, conflicts_with = "data")]
    pub(crate) profile: bool,
    #[command(flatten)]
    pub(crate) data: DataArguments,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Softmax {
    PerHead,
    PerLayer,
    Shared,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub(crate) enum Switch {
    On,
    Off,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Attention {
    Linear,
    Paper,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub(crate) enum TransferStage {
    /// Not at all: only the structure
    None,
    /// Layer by layer, by least squares
    ClosedForm,
    /// The same, with gradient steps on each attention block
    Blockwise,
    /// After that, gradient steps on everything at once
    Full,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub(crate) enum Recipe {
    Default,
    Paper,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub(crate) enum Kept {
    Softmax,
    Activation,
    Norm,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub(crate) enum MetricName {
    Accuracy,
    /// Of class 1
    F1,
    /// Matthews' correlation
    Mcc,
    Pearson,
    Spearman,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub(crate) enum EngineName {
    /// tract with this project's fused operators
    Tract,
    /// tract as it is, for comparison
    PlainTract,
    Onnxruntime,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub(crate) enum EngineChoice {
    /// tract with this project's fused operators
    Tract,
    /// tract as it is
    PlainTract,
    Onnxruntime,
    /// tract and onnxruntime
    Both,
}

fn number(text: &str, allowed: impl Fn(f64) -> bool, what: &str) -> Result<f64, String> {
    text.parse().ok().filter(|v: &f64| v.is_finite() && allowed(*v)).ok_or_else(|| what.to_owned())
}

fn positive(text: &str) -> Result<f64, String> {
    number(text, |v| v > 0.0, "it must be a number above 0")
}

fn weight(text: &str) -> Result<f64, String> {
    number(text, |v| v >= 0.0, "it must be a number, 0 or more")
}

fn share(text: &str) -> Result<f64, String> {
    number(text, |v| (0.0..=1.0).contains(&v), "it must be a number from 0 to 1")
}

fn pass(name: &str) -> Result<Pass, String> {
    let known = || Pass::ALL.map(Pass::name).join(", ");
    Pass::ALL.into_iter().find(|p| p.name() == name).ok_or_else(|| format!("the passes are {}", known()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        use clap::CommandFactory as _;
        Arguments::command().debug_assert();
    }
}

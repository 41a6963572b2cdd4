//! What the end-to-end stage is told, by `rewrite` and by `transfer`, and the job that says it to the library.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, ValueEnum};
use mabert_transfer::data::DataFile;
use mabert_transfer::evaluate::Metric;
use mabert_transfer::full::FullOptions;
use mabert_transfer::job::{CheckpointFolder, Dev, FullStage, Job};

use super::values::{duration, not_negative, one_of, positive, share};
use super::{DataArguments, Global};
use crate::failure::Usage;
use crate::files::Files;

/// The end-to-end stage.
#[derive(Debug, Args)]
#[command(next_help_heading = "End-to-end stage")]
pub(crate) struct EndToEndArguments {
    /// Where its options start from: this program's own, or the paper's distillation (temperature 15, alpha 0.9,
    /// attention weight 100; needs labels)
    #[arg(long, value_enum, default_value_t = Recipe::Default)]
    recipe: Recipe,
    /// Gradient steps [default: 900]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    steps: Option<u32>,
    /// In place of a number of steps, how long the whole command may take, such as 90s, 10m or 1h30m: the steps take what
    /// the other stages leave
    #[arg(long, value_name = "TIME", value_parser = duration, conflicts_with = "steps")]
    time: Option<Duration>,
    /// Sequences a step [default: as many as have 840 tokens]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    batch: Option<u16>,
    /// Learning rate, once warm [default: 4e-5 at up to 128 channels, less in proportion at more, over how often each
    /// text is seen]
    #[arg(long, value_name = "X", value_parser = positive)]
    lr: Option<f64>,
    /// Logits are divided by it before they are compared [default: 2]
    #[arg(long, value_name = "T", value_parser = positive)]
    temperature: Option<f64>,
    /// The teacher's share in the loss of the outputs; labels have the rest [default: 1]
    #[arg(long, value_name = "X", value_parser = share)]
    alpha: Option<f64>,
    /// What hidden states count [default: 1]
    #[arg(long, value_name = "X", value_parser = not_negative)]
    hidden_weight: Option<f64>,
    /// What attention's probabilities count [default: 0]
    #[arg(long, value_name = "X", value_parser = not_negative)]
    attention_weight: Option<f64>,
    /// What a feature model's vectors of texts count [default: 1]
    #[arg(long, value_name = "X", value_parser = not_negative)]
    vector_weight: Option<f64>,
    /// Keep the state of the stage in this folder
    #[arg(long, value_name = "FOLDER")]
    checkpoint: Option<PathBuf>,
    /// Go on with the run whose state the folder holds
    #[arg(long, requires = "checkpoint")]
    resume: bool,
    /// The column of the label: for --alpha below 1, and for --dev; tagged words and answers are found without
    #[arg(long, value_name = "NAME")]
    label_column: Option<String>,
}

/// Labelled data to measure on.
#[derive(Debug, Args)]
pub(crate) struct DevArguments {
    /// Labelled data, with the same columns: teacher and student are measured on it after each stage
    #[arg(long, value_name = "FILE")]
    dev: Option<PathBuf>,
    /// The metric on it [default: what fits labels and outputs]
    #[arg(long, value_parser = one_of(Metric::ALL), requires = "dev")]
    metric: Option<Metric>,
}

/// Where the options of the stage start from.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Recipe {
    Default,
    Paper,
}

impl Recipe {
    fn options(self) -> FullOptions {
        match self {
            Self::Default => FullOptions::default(),
            Self::Paper => FullOptions::paper(),
        }
    }
}

impl EndToEndArguments {
    /// The first option given that says something to this stage alone.
    pub(crate) fn first_given(&self) -> Option<&'static str> {
        let options = [
            ("recipe", self.recipe != Recipe::Default),
            ("steps", self.steps.is_some()),
            ("time", self.time.is_some()),
            ("batch", self.batch.is_some()),
            ("lr", self.lr.is_some()),
            ("temperature", self.temperature.is_some()),
            ("alpha", self.alpha.is_some()),
            ("hidden-weight", self.hidden_weight.is_some()),
            ("attention-weight", self.attention_weight.is_some()),
            ("vector-weight", self.vector_weight.is_some()),
            ("checkpoint", self.checkpoint.is_some()),
        ];
        options.into_iter().find_map(|(name, is_given)| is_given.then_some(name))
    }

    /// What a job on this data reads, and the state that it keeps.
    pub(crate) fn files(&self, data: &DataArguments, dev: &DevArguments, global: &Global) -> Files {
        Files::default()
            .reads(data.files())
            .reads(&dev.dev)
            .reads(&global.ort_lib)
            .keeps_state_in(self.checkpoint.as_ref())
    }

    /// The stage itself.
    pub(crate) fn stage(&self, global: &Global) -> FullStage {
        let checkpoint = self.checkpoint.clone().map(|path| CheckpointFolder { path, resume: self.resume });
        FullStage { options: self.options(global), checkpoint, start: None }
    }

    fn options(&self, global: &Global) -> FullOptions {
        let mut options = self.recipe.options();
        options.steps = self.steps.map_or(options.steps, |n| n as usize);
        options.time = self.time;
        options.batch = self.batch.map(usize::from).or(options.batch);
        options.rate = self.lr.map(|rate| rate as f32).or(options.rate);
        options.temperature = self.temperature.unwrap_or(options.temperature);
        options.alpha = self.alpha.unwrap_or(options.alpha);
        options.hidden_weight = self.hidden_weight.unwrap_or(options.hidden_weight);
        options.attention_weight = self.attention_weight.unwrap_or(options.attention_weight);
        options.vector_weight = self.vector_weight.unwrap_or(options.vector_weight);
        options.seed = global.seed;
        options
    }

    /// A job on this data, with everything else as it is by default. Labels are read where something asks for them.
    pub(crate) fn job(&self, data: &DataArguments, dev: &DevArguments, global: &Global) -> Result<Job> {
        let label = self.label_column.as_deref();
        let trains_on_labels = self.options(global).alpha < 1.0;
        // Files of tagged words and of questions say themselves where their labels are. What a pipe holds is read once.
        let lacks_label = |path: &PathBuf| -> Result<bool> {
            Ok(label.is_none() && path.is_file() && DataFile::open(&data.file_at(path, None))?.usual_label()?.is_none())
        };
        if trains_on_labels && data.data.as_ref().map_or(Ok(true), lacks_label)? {
            let reason = "alpha below 1 takes labels into the loss: give --data with --label-column, or --alpha 1";
            return Err(Usage(reason.to_owned()).into());
        }
        if label.is_some() && dev.dev.is_none() && !trains_on_labels {
            let reason = "--label-column: nothing reads labels; give --dev, or an --alpha below 1";
            return Err(Usage(reason.to_owned()).into());
        }
        if dev.dev.as_ref().map_or(Ok(false), lacks_label)? {
            return Err(Usage("--dev needs --label-column: which column holds the label?".to_owned()).into());
        }
        let file = |path: &PathBuf, label| data.file_at(path, label);
        let training_label = label.filter(|_| trains_on_labels);
        let job = Job::default()
            .input_roles(data.input_roles.clone())
            .data(data.data.as_ref().map(|path| file(path, training_label)))
            .dev(dev.dev.as_ref().map(|path| Dev { data: file(path, label), metric: dev.metric }))
            .seed(global.seed);
        Ok(match &data.tokenizer {
            Some(tokenizer) => job.tokenizer(tokenizer),
            None => job,
        })
    }
}

//! `transfer`: the end-to-end stage on its own.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use mabert_transfer::job::{FullStage, Transfer};

use super::student::{Destination, make_student};
use crate::arguments::{DataArguments, DevArguments, EndToEndArguments, Global, VectorArguments};
use crate::failure::Usage;

#[derive(Debug, Args)]
pub(crate) struct TransferArguments {
    /// The model that the student was made from
    teacher: PathBuf,
    /// The student, made by `rewrite --no-fold`
    student: PathBuf,
    /// Where to write the trained and folded student
    #[arg(short, long, value_name = "FILE")]
    output: PathBuf,
    /// Keep large constants in a file of their own, OUTPUT.data, as a model does that came so
    #[arg(long)]
    external_data: bool,
    #[command(flatten)]
    data: DataArguments,
    #[command(flatten)]
    vectors: VectorArguments,
    /// More text to train on, not to measure on; half of all sequences come from it
    #[arg(long, value_name = "FILE", requires = "data")]
    extra_data: Vec<PathBuf>,
    /// Where the data is little, do without text made of it (texts cut and joined, words replaced by neighbours)
    #[arg(long, requires = "data")]
    no_augmentation: bool,
    #[command(flatten)]
    dev: DevArguments,
    /// Do not hold the student's values: tokens unlike all that it was fitted to may make it overflow
    #[arg(long)]
    no_bounds: bool,
    /// Write the whole report to a file as JSON
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    #[command(flatten)]
    end_to_end: EndToEndArguments,
}

pub(super) fn transfer(arguments: &TransferArguments, global: &Global) -> Result<()> {
    // Random tokens would take a student of text away from text.
    if arguments.data.data.is_none() {
        return Err(Usage("--data is needed: text like the model's own".to_owned()).into());
    }
    arguments.data.check("")?;
    let files = arguments.end_to_end.files(&arguments.data, &arguments.dev, global);
    files
        .models([&arguments.teacher, &arguments.student])
        .reads(&arguments.extra_data)
        .writes_model(&arguments.output)
        .writes(arguments.report.as_ref())
        .check()?;
    let destination = Destination {
        model: &arguments.output,
        external_data: arguments.external_data,
        report: arguments.report.as_deref(),
    };
    let stage = FullStage { start: Some(arguments.student.clone()), ..arguments.end_to_end.stage(global) };
    let job = arguments.end_to_end.job(&arguments.data, &arguments.dev, global)?;
    let job = job
        .extra_data(arguments.extra_data.clone())
        .bounds(!arguments.no_bounds)
        .augmentation(!arguments.no_augmentation)
        .pooling(arguments.vectors.pooling)
        .transfer(Transfer::Full(stage));
    make_student(&arguments.teacher, &job, &destination, global)
}

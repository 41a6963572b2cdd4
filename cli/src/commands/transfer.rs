//! `transfer`: the end-to-end stage on its own.

use anyhow::Result;
use mabert_transfer::job::{FullStage, Transfer};

use super::rewrite::{Output, make, refuse_overwriting};
use crate::arguments::{self, Global};
use crate::failure::Usage;

pub(super) fn transfer(arguments: &arguments::Transfer, global: &Global) -> Result<()> {
    // Random tokens would take a student of text away from text.
    if arguments.data.data.is_none() {
        return Err(Usage("--data is needed: text like the model's own".to_owned()).into());
    }
    let stage = FullStage { start: Some(arguments.student.clone()), ..arguments.full.stage(global) };
    let job = arguments.full.job(&stage, &arguments.data, &arguments.dev, global)?;
    let job = job.extra_data(arguments.extra_data.clone()).transfer(Transfer::Full(stage));
    let output = Output { path: &arguments.output, external_data: arguments.external_data };
    refuse_overwriting(output.path, [arguments.teacher.as_path(), &arguments.student])?;
    make(&arguments.teacher, &job, &output, arguments.report.as_deref(), global)
}

//! `transfer`: the end-to-end stage on its own.

use anyhow::Result;
use mabert_transfer::job::Job;

use super::rewrite::{Output, make};
use crate::arguments::{Global, Transfer};
use crate::failure::Usage;

pub(super) fn transfer(arguments: &Transfer, global: &Global) -> Result<()> {
    // Random tokens would take a student of text away from text.
    if arguments.data.data.is_none() {
        return Err(Usage("--data is needed: text like the model's own".to_owned()).into());
    }
    let job = Job {
        parameters: Some(arguments.student.clone()),
        ..arguments.full.job(&arguments.data, &arguments.dev, &arguments.extra_data, global)?
    };
    let output = Output { path: &arguments.output, external_data: arguments.external_data };
    make(&arguments.teacher, &job, &output, arguments.report.as_deref(), global)
}

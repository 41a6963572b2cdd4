//! Making a student, as `rewrite` and `transfer` do: the job, the files, and what is printed.

use std::path::Path;

use anyhow::{Context as _, Result};
use mabert_graph::Model;
use mabert_transfer::job::{Job, rewrite};

use crate::arguments::Global;
use crate::bars::Bars;
use crate::failure::{CheckFailed, Usage};
use crate::print;
use crate::print::summary::StudentReport;

/// Where a student goes.
pub(super) struct Destination<'a> {
    pub(super) model: &'a Path,
    /// Whether its large constants go to a file of their own.
    pub(super) external_data: bool,
    pub(super) report: Option<&'a Path>,
}

/// Runs a job on the teacher, writes the student and its report, and prints what was done.
pub(super) fn make_student(teacher: &Path, job: &Job, to: &Destination<'_>, global: &Global) -> Result<()> {
    // Before the long work, not after it.
    to.check_writable()?;
    let (mut student, report) = rewrite(Model::load(teacher)?, job, &Bars::new(global))?;
    if to.external_data {
        student.keep_data_outside();
    }
    student.save(to.model)?;
    if Model::load(to.model)?.proto() != student.proto() {
        let reason = format!("{}: what was written does not read back the same", to.model.display());
        return Err(CheckFailed(reason).into());
    }
    let report = StudentReport {
        report: &report,
        output: to.model.display().to_string(),
        bytes_before: file_size(teacher),
        bytes_after: file_size(to.model),
    };
    if let Some(path) = to.report {
        let text = serde_json::to_vec_pretty(&report)?;
        mabert_graph::write_atomically(path, |file| std::io::Write::write_all(file, &text)).context("the report")?;
    }
    if global.json {
        return print::json(&report);
    }
    print!("{report}");
    Ok(())
}

impl Destination<'_> {
    /// Refuses to write the student over one of the files that it is made of.
    pub(super) fn refuse_overwriting<'p>(&self, inputs: impl IntoIterator<Item = &'p Path>) -> Result<()> {
        let Some(input) = inputs.into_iter().find(|input| is_same_file(input, self.model)) else { return Ok(()) };
        let (output, input) = (self.model.display(), input.display());
        Err(Usage(format!("{output}: `{input}` would be overwritten; choose another output")).into())
    }

    fn check_writable(&self) -> Result<()> {
        mabert_graph::check_writable(self.model)?;
        if let Some(report) = self.report {
            mabert_graph::check_writable(report)?;
        }
        Ok(())
    }
}

fn is_same_file(a: &Path, b: &Path) -> bool {
    a.canonicalize().ok().is_some_and(|a| b.canonicalize().is_ok_and(|b| a == b))
}

/// The size of a model's file and of its external data.
fn file_size(model: &Path) -> u64 {
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |m| m.len());
    let data = mabert_graph::data_files(model).unwrap_or_default();
    size(model) + data.iter().map(|path| size(path)).sum::<u64>()
}

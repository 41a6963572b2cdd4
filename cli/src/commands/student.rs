//! Making a student, as `rewrite` and `transfer` do: the job, the files, and what is printed.

use std::path::Path;

use anyhow::{Context as _, Result};
use mabert_graph::Model;
use mabert_transfer::job::{Job, rewrite};

use crate::arguments::Global;
use crate::bars::Bars;
use crate::failure::CheckFailed;
use crate::print::summary::StudentReport;
use crate::print::{self, Page};

/// Where a student goes.
pub(super) struct Destination<'a> {
    pub(super) model: &'a Path,
    /// Whether its large constants go to a file of their own.
    pub(super) external_data: bool,
    pub(super) report: Option<&'a Path>,
}

/// Runs a job on the teacher, writes the student and its report, and prints what was done. Whether the files can be
/// written was checked before.
pub(super) fn make_student(teacher: &Path, job: &Job, to: &Destination<'_>, global: &Global) -> Result<()> {
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
        let text = print::json_text(&report)?;
        let write = |file: &mut mabert_graph::Buffered<'_>| std::io::Write::write_all(file, text.as_bytes());
        mabert_graph::write_atomically(path, write).context("the report")?;
    }
    if global.json {
        return print::json(&report);
    }
    if global.quiet {
        return Ok(());
    }
    let mut page = Page::default();
    page.lines(report);
    page.print()
}

/// The size of a model's file and of its external data.
fn file_size(model: &Path) -> u64 {
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |m| m.len());
    let data = mabert_graph::data_files(model).unwrap_or_default();
    size(model) + data.iter().map(|path| size(path)).sum::<u64>()
}

//! From a teacher to a student.

use std::path::Path;

use mabert_transfer::job::{self, Job, Report};
use mabert_transfer::progress::Progress;

use crate::{Model, Result, RunOptions, Runnable};

/// A rewritten model: matrix arithmetic and ReLU, but for the task's head, which is its teacher's.
#[derive(Clone, Debug)]
pub struct Student {
    model: Model,
    longest_sequence: usize,
}

impl Student {
    /// The student as an ONNX model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The student as an ONNX model, without a copy.
    pub fn into_model(self) -> Model {
        self.model
    }

    /// The longest sequence that it takes, in tokens.
    pub fn longest_sequence(&self) -> usize {
        self.longest_sequence
    }

    /// Writes it, as [`Model::save`] does.
    ///
    /// # Errors
    /// The folder or the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        self.model.save(path)
    }

    /// Prepares it to run.
    ///
    /// # Errors
    /// tract cannot handle the model.
    pub fn prepare(&self) -> Result<Runnable> {
        RunOptions::default().prepare(&self.model)
    }
}

/// Rewrites a model: makes a student of it, finds the student's parameters as `job` says, and measures it against its
/// teacher. `progress` is told what is going on; [`Silent`](crate::Silent) takes no notice.
///
/// # Errors
/// The model is no encoder of the BERT family, or has sites that are not recognised; the job or its data do not fit it;
/// or a check of the student does not hold.
pub fn rewrite(model: Model, job: &Job, progress: &dyn Progress) -> Result<(Student, Report)> {
    let (student, report) = job::rewrite(model.0, job, progress)?;
    let longest_sequence = report.options.approximator.longest();
    Ok((Student { model: Model(student), longest_sequence }, report))
}

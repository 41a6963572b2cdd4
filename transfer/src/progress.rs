//! What a caller is told while a student is made.

/// Takes notice of progress; the command line draws bars with it.
pub trait Progress: Sync {
    /// A stage of `steps` steps begins.
    fn begin(&self, stage: &str, steps: usize);
    /// A step is done; `note` says what came of it.
    fn step(&self, note: &str);
    /// The stage is over.
    fn end(&self);
    /// What a stage achieved, in one line.
    fn summary(&self, line: &str);
}

/// Takes no notice.
#[derive(Debug)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&self, _: &str, _: usize) {}
    fn step(&self, _: &str) {}
    fn end(&self) {}
    fn summary(&self, _: &str) {}
}

//! Rewrites a model and says how far the student is from its teacher.
//!
//! `cargo run --release --example rewrite -- MODEL DATA TOKENIZER OUTPUT`

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use mabert::{Data, Job, Model, Progress, Transfer};

/// Prints what is going on, a line a step.
struct Lines;

impl Progress for Lines {
    fn begin(&self, stage: &str, steps: usize) {
        eprintln!("{stage}: {steps} steps");
    }
    fn step(&self, note: &str) {
        eprintln!("  {note}");
    }
    fn end(&self) {}
    fn summary(&self, line: &str) {
        eprintln!("{line}");
    }
}

fn main() -> Result<()> {
    let mut paths = std::env::args_os().skip(1).map(PathBuf::from);
    let mut next = |what: &str| paths.next().with_context(|| format!("give MODEL DATA TOKENIZER OUTPUT: no {what}"));
    let (model, data, tokenizer, output) = (next("model")?, next("data")?, next("tokenizer")?, next("output")?);

    let job = Job::default().data(Data::new(data)).tokenizer(tokenizer).transfer(Transfer::Blockwise);
    let (student, report) = mabert::rewrite(Model::load(&model)?, &job, &Lines)?;
    student.save(&output)?;

    for distance in &report.outputs {
        println!("{}: mean difference {:.3}", distance.output, distance.mean_abs);
        if let Some(agreement) = distance.agreement {
            println!("  same answer on {:.1} % of texts kept apart", 100.0 * agreement);
        }
    }
    println!("{} takes up to {} tokens", output.display(), student.longest_sequence());
    Ok(())
}

//! `rewrite`: the main job.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context as _, Result};
use mabert_graph::Model;
use mabert_passes::lower::Sharing;
use mabert_passes::pipeline::{Keep, Order};
use mabert_passes::sites::{LayerSite, SiteId};
use mabert_transfer::full;
use mabert_transfer::job::{CheckpointFolder, Data, Dev, FullStage, Job, Report, Transfer, rewrite as rewrite_model};
use serde::Serialize;

use crate::arguments::{
    Attention, DataArguments, DevArguments, FullArguments, Global, Kept, Recipe, Rewrite, Softmax, Switch,
    TransferStage,
};
use crate::failure::{CheckFailed, Usage};
use crate::print;
use crate::progress::Bars;

/// The report with what only the files tell.
#[derive(Serialize)]
struct Outcome<'r> {
    #[serde(flatten)]
    report: &'r Report,
    output: String,
    bytes_before: u64,
    bytes_after: u64,
}

pub(super) fn rewrite(arguments: &Rewrite, global: &Global) -> Result<()> {
    let job = job(arguments, global)?;
    let output = Output { path: &arguments.output, external_data: arguments.external_data };
    refuse_overwriting(output.path, [arguments.model.as_path()])?;
    make(&arguments.model, &job, &output, arguments.report.as_deref(), global)
}

/// Where a student goes.
pub(super) struct Output<'a> {
    pub(super) path: &'a Path,
    pub(super) external_data: bool,
}

/// Runs a job, writes the student and its report, and prints what was done.
pub(super) fn make(
    model: &Path,
    job: &Job,
    to: &Output<'_>,
    report_file: Option<&Path>,
    global: &Global,
) -> Result<()> {
    let output = to.path;
    // Before the long work, not after it.
    mabert_graph::check_writable(output)?;
    if let Some(report) = report_file {
        mabert_graph::check_writable(report)?;
    }
    let (mut student, report) = rewrite_model(Model::load(model)?, job, &Bars::new(global))?;
    if to.external_data {
        student.keep_data_outside();
    }
    student.save(output)?;
    if Model::load(output)?.proto() != student.proto() {
        return Err(CheckFailed(format!("{}: what was written does not read back the same", output.display())).into());
    }
    let full = Outcome {
        report: &report,
        output: output.display().to_string(),
        bytes_before: bytes(model),
        bytes_after: bytes(output),
    };
    if let Some(path) = report_file {
        let text = serde_json::to_vec_pretty(&full)?;
        mabert_graph::write_atomically(path, |file| std::io::Write::write_all(file, &text)).context("the report")?;
    }
    if global.json {
        return print::json(&full);
    }
    print_report(&full);
    Ok(())
}

/// Refuses an output that is one of the files that the job reads.
pub(super) fn refuse_overwriting<'p>(output: &Path, read: impl IntoIterator<Item = &'p Path>) -> Result<()> {
    match read.into_iter().find(|file| same_file(file, output)) {
        None => Ok(()),
        Some(file) => {
            let (output, file) = (output.display(), file.display());
            Err(Usage(format!("{output}: `{file}` would be overwritten; choose another output")).into())
        }
    }
}

fn job(arguments: &Rewrite, global: &Global) -> Result<Job> {
    let kept = |kind: Kept| arguments.keep.contains(&kind);
    let default = if arguments.data.data.is_some() { TransferStage::Blockwise } else { TransferStage::ClosedForm };
    let stage = arguments.transfer.unwrap_or(default);
    if stage != TransferStage::Full
        && let Some(option) = arguments.full.first_given()
    {
        return Err(Usage(format!("--{option} is of the end-to-end stage: add --transfer full")).into());
    }
    let full = arguments.full.stage(global);
    let job = arguments.full.job(&full, &arguments.data, &arguments.dev, global)?;
    let job = job
        .max_seq(arguments.max_seq)
        .hidden(arguments.hidden)
        .sharing(match arguments.softmax {
            Softmax::PerHead => Sharing::PerHead,
            Softmax::PerLayer => Sharing::PerLayer,
            Softmax::Shared => Sharing::Shared,
        })
        .length_tables(arguments.length_tables == Switch::On)
        .order(match arguments.attention {
            Attention::Linear => Order::Linear,
            Attention::Paper => Order::Paper,
        })
        .keep(Keep { softmax: kept(Kept::Softmax), activation: kept(Kept::Activation), norm: kept(Kept::Norm) })
        .fold(!arguments.no_fold)
        .until(arguments.until)
        .partial(arguments.partial)
        .extra_data(arguments.extra_data.clone())
        .calibration_tokens(arguments.calibration_tokens.map(|n| n as usize));
    Ok(job.transfer(match stage {
        TransferStage::None => Transfer::None,
        TransferStage::ClosedForm => Transfer::ClosedForm,
        TransferStage::Blockwise => Transfer::Blockwise,
        TransferStage::Full => Transfer::Full(full),
    }))
}

impl FullArguments {
    /// An option that says something only to the end-to-end stage.
    fn first_given(&self) -> Option<&'static str> {
        let given = [
            ("recipe", self.recipe != Recipe::Default),
            ("steps", self.steps.is_some()),
            ("batch", self.batch.is_some()),
            ("lr", self.lr.is_some()),
            ("temperature", self.temperature.is_some()),
            ("alpha", self.alpha.is_some()),
            ("hidden-weight", self.hidden_weight.is_some()),
            ("attention-weight", self.attention_weight.is_some()),
            ("checkpoint", self.checkpoint.is_some()),
        ];
        given.into_iter().find_map(|(name, given)| given.then_some(name))
    }

    /// The end-to-end stage as the options have it.
    pub(super) fn stage(&self, global: &Global) -> FullStage {
        let recipe = match self.recipe {
            Recipe::Default => full::FullOptions::default(),
            Recipe::Paper => full::FullOptions::paper(),
        };
        let options = full::FullOptions {
            steps: self.steps.map_or(recipe.steps, |n| n as usize),
            batch: self.batch.map(usize::from).or(recipe.batch),
            rate: self.lr.map(|rate| rate as f32).or(recipe.rate),
            temperature: self.temperature.unwrap_or(recipe.temperature),
            alpha: self.alpha.unwrap_or(recipe.alpha),
            hidden_weight: self.hidden_weight.unwrap_or(recipe.hidden_weight),
            attention_weight: self.attention_weight.unwrap_or(recipe.attention_weight),
            seed: global.seed,
            ..recipe
        };
        let checkpoint = self.checkpoint.clone().map(|path| CheckpointFolder { path, resume: self.resume });
        FullStage { options, checkpoint, start: None }
    }

    /// A job on the data that the options name, with everything else as it is by default.
    pub(super) fn job(
        &self,
        stage: &FullStage,
        data: &DataArguments,
        dev: &DevArguments,
        global: &Global,
    ) -> Result<Job> {
        let label = self.label_column.as_deref();
        let takes_labels = stage.options.alpha < 1.0;
        if takes_labels && (label.is_none() || data.data.is_none()) {
            let reason = "alpha below 1 takes labels into the loss: give --data with --label-column, or --alpha 1";
            return Err(Usage(reason.to_owned()).into());
        }
        if label.is_some() && dev.dev.is_none() && !takes_labels {
            let reason = "--label-column: nothing reads labels; give --dev, or an --alpha below 1";
            return Err(Usage(reason.to_owned()).into());
        }
        let training_label = label.filter(|_| takes_labels);
        let training =
            data.data.as_ref().map(|path| Data { path: path.clone(), columns: data.columns(training_label) });
        let dev = dev.dev.as_ref().map(|path| Dev {
            data: Data { path: path.clone(), columns: data.columns(label) },
            metric: dev.metric.metric(),
        });
        Ok(Job::default().data(training).dev(dev).tokenizer(data.tokenizer.clone()).seed(global.seed))
    }
}

fn same_file(a: &Path, b: &Path) -> bool {
    a.canonicalize().ok().is_some_and(|a| b.canonicalize().is_ok_and(|b| a == b))
}

/// The size of a model's file and of its external data.
fn bytes(model: &Path) -> u64 {
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |m| m.len());
    let data = mabert_graph::data_files(model).unwrap_or_default();
    size(model) + data.iter().map(|path| size(path)).sum::<u64>()
}

fn print_report(full: &Outcome<'_>) {
    let report = full.report;
    let before = &report.operators_before;
    let after = &report.operators_after;
    let names: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let count = |n: Option<&usize>| n.map_or_else(|| "-".to_owned(), usize::to_string);
    let rows = names.into_iter().map(|name| vec![name.clone(), count(before.get(name)), count(after.get(name))]);
    let total =
        vec!["(all)".to_owned(), before.values().sum::<usize>().to_string(), after.values().sum::<usize>().to_string()];
    println!("{}\n", print::table(&["Operator", "Before", "After"], 1, rows.chain([total])));

    print_sites(report);
    let blocks = report.closed_form.as_ref().map_or(&[] as &[_], |c| &c.blocks);
    if !blocks.is_empty() {
        let steps = blocks.iter().map(|b| format!("{} -> {}", print::number(b.before), print::number(b.after)));
        println!(
            "Gradient steps, squared error of each attention block on sequences kept apart: {}",
            steps.collect::<Vec<_>>().join(", ")
        );
    }
    if let Some(full) = &report.full {
        let loss = |of: &full::Losses| {
            let parts =
                [("outputs", of.outputs), ("hidden", of.hidden), ("labels", of.labels), ("attention", of.attention)];
            let some = parts.iter().filter(|(_, value)| *value != 0.0);
            some.map(|(name, value)| format!("{name} {}", print::number(*value))).collect::<Vec<_>>().join(", ")
        };
        println!(
            "End to end, {} steps of {:.1} sequences at rate {:.1e}, {:.0} tokens a second on the {}, loss on sequences kept apart: {} -> {}{}{}",
            full.options.steps,
            full.sequences_a_step,
            full.rate,
            full.tokens_per_second,
            full.device,
            loss(&full.before),
            loss(&full.after),
            if full.skipped > 0 {
                format!("; {} steps were not finite and left out", full.skipped)
            } else {
                String::new()
            },
            if full.kept { "" } else { "; it gained nothing there and was put back" }
        );
    }
    for miss in &report.misses {
        println!("left alone: {miss}");
    }
    println!();
    match &report.source {
        Some(source) => {
            let mut used = Vec::new();
            if let Some(closed_form) = &report.closed_form {
                let what = if source.file.is_some() { "tokens" } else { "random tokens" };
                used.push(format!("calibrated on {} {what} ({} sequences)", closed_form.tokens, source.sequences));
            }
            if report.full.is_some() {
                used.push(format!("trained on {} sequences", source.training));
            }
            match &source.file {
                Some(file) => println!(
                    "Of {}: {}; {} texts cut; measured on {} others:",
                    file.display(),
                    used.join(", "),
                    source.truncated,
                    source.held_out
                ),
                None => println!(
                    "Without data: {}; measured on {} others. For accuracy on text give --data and --tokenizer.",
                    used.join(", "),
                    source.held_out
                ),
            }
        }
        None => println!("Not calibrated: only the structure is MA-BERT's; the outputs mean nothing yet. Measured:"),
    }
    let rows = report.outputs.iter().map(|o| {
        vec![
            o.output.clone(),
            print::number(o.mean_abs),
            print::number(o.max_abs),
            print::optional(o.mean_cosine),
            o.agreement.map_or_else(|| "-".to_owned(), |a| format!("{:.1} %", 100.0 * a)),
        ]
    });
    let header = ["Output against the teacher's", "Mean difference", "Largest", "Mean cosine", "Same argmax"];
    println!("{}\n", print::table(&header, 1, rows));

    let odd = report.odd_inputs;
    match odd.overflow {
        0 => {
            println!("Inputs unlike text (a few random tokens, one token repeated): all {} stay finite.", odd.sequences)
        }
        bad => println!(
            "Inputs unlike text (a few random tokens, one token repeated): {bad} of {} overflow; check such answers.",
            odd.sequences
        ),
    }

    let (head, encoder): (Vec<_>, Vec<_>) = report.non_linear_after.iter().partition(|n| n.in_head);
    let list = |nodes: &[&mabert_passes::contract::NonLinear]| {
        let listed: Vec<String> = nodes.iter().map(|n| format!("{} `{}`", n.operator, n.node)).collect();
        if listed.is_empty() { "none".to_owned() } else { listed.join(", ") }
    };
    println!(
        "Not matrix arithmetic: before {} nodes; now in the encoder {}, in the head {}",
        report.non_linear_before,
        list(&encoder),
        list(&head)
    );
    if report.fold.explicit_channels > 0 {
        println!("Folding left an explicit scale on {} channels.", report.fold.explicit_channels);
    }
    println!("Exact passes changed the outputs by {} of their size.", print::number(report.exact_passes_differ_by));
    let memory = report.peak_memory.map_or_else(String::new, |m| format!(", {} of memory", print::megabytes(m)));
    println!(
        "{} -> {}: {} -> {}, up to {} tokens, in {:.1} s{memory}",
        report.model,
        full.output,
        print::megabytes(full.bytes_before),
        print::megabytes(full.bytes_after),
        report.options.approximator.max_seq,
        report.seconds
    );
}

/// A row a layer: how far each site is from the teacher's, or what it is now.
fn print_sites(report: &Report) {
    let mut rows: Vec<Vec<String>> = Vec::new();
    for site in &report.sites {
        let module = site.site.module();
        if rows.last().is_none_or(|row| row[0] != module) {
            rows.push(vec![module, String::new(), String::new(), String::new(), String::new()]);
        }
        let column = match site.site {
            SiteId::Layer(_, LayerSite::Attention) | SiteId::SharedNetwork => 1,
            SiteId::Layer(_, LayerSite::AttentionNorm) => 2,
            SiteId::Layer(_, LayerSite::Activation) => 3,
            SiteId::Layer(_, LayerSite::OutputNorm) | SiteId::EmbeddingNorm => 4,
        };
        let row = rows.last_mut().expect("pushed above");
        row[column] = match site.relative_error {
            Some(error) => format!("{} ({})", site.now, print::number(error)),
            None => site.now.to_owned(),
        };
    }
    let header = ["Layer", "Attention", "Norm", "Activation", "Norm"];
    let when = if report.full.is_some() { " before the end-to-end stage" } else { "" };
    println!(
        "Sites, with their error relative to the teacher's on the calibration data{when} (0 equal, 1 no better than a constant):"
    );
    println!("{}", print::table(&header, 5, rows));
}

//! `rewrite`: the main job.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context as _, Result};
use mabert_graph::Model;
use mabert_passes::pipeline::{Keep, Order};
use mabert_passes::rewrite::Sharing;
use mabert_transfer::rewrite::{Data, Job, Report, Transfer, rewrite as rewrite_model};
use serde::Serialize;

use crate::arguments::{Attention, Global, Kept, Rewrite, Softmax, Switch, TransferStage};
use crate::failure::{CheckFailed, Usage};
use crate::print;
use crate::progress::Bars;

/// The report with what only the files tell.
#[derive(Serialize)]
struct FullReport<'r> {
    #[serde(flatten)]
    report: &'r Report,
    output: String,
    bytes_before: u64,
    bytes_after: u64,
}

pub(super) fn rewrite(arguments: &Rewrite, global: &Global) -> Result<()> {
    let output = &arguments.output;
    if same_file(&arguments.model, output) {
        let reason = format!("{}: the student would overwrite its teacher; choose another output", output.display());
        return Err(Usage(reason).into());
    }
    // Before the long work, not after it.
    mabert_graph::check_writable(output)?;
    if let Some(report) = &arguments.report {
        mabert_graph::check_writable(report)?;
    }
    let (model, report) = rewrite_model(&arguments.model, &job(arguments, global), &Bars::new(global))?;
    model.save(output)?;
    if Model::load(output)?.proto() != model.proto() {
        return Err(CheckFailed(format!("{}: what was written does not read back the same", output.display())).into());
    }
    let full = FullReport {
        report: &report,
        output: output.display().to_string(),
        bytes_before: bytes(&arguments.model),
        bytes_after: bytes(output),
    };
    if let Some(path) = &arguments.report {
        let text = serde_json::to_vec_pretty(&full)?;
        mabert_graph::write_atomically(path, |file| std::io::Write::write_all(file, &text)).context("the report")?;
    }
    if global.json {
        return print::json(&full);
    }
    print_report(&full);
    Ok(())
}

fn job(arguments: &Rewrite, global: &Global) -> Job {
    let kept = |kind: Kept| arguments.keep.contains(&kind);
    let default = if arguments.data.data.is_some() { TransferStage::Blockwise } else { TransferStage::ClosedForm };
    Job {
        max_seq: arguments.max_seq,
        hidden: arguments.hidden,
        sharing: match arguments.softmax {
            Softmax::PerHead => Sharing::PerHead,
            Softmax::PerLayer => Sharing::PerLayer,
            Softmax::Shared => Sharing::Shared,
        },
        length_tables: arguments.length_tables == Switch::On,
        order: match arguments.attention {
            Attention::Linear => Order::Linear,
            Attention::Paper => Order::Paper,
        },
        keep: Keep { softmax: kept(Kept::Softmax), activation: kept(Kept::Activation), norm: kept(Kept::Norm) },
        fold: !arguments.no_fold,
        until: arguments.until,
        partial: arguments.partial,
        transfer: match arguments.transfer.unwrap_or(default) {
            TransferStage::None => Transfer::None,
            TransferStage::ClosedForm => Transfer::ClosedForm,
            TransferStage::Blockwise => Transfer::Blockwise,
        },
        data: arguments
            .data
            .data
            .as_ref()
            .map(|path| Data { path: path.clone(), columns: arguments.data.columns(None) }),
        tokenizer: arguments.data.tokenizer.clone(),
        calibration_tokens: arguments.calibration_tokens,
        seed: global.seed,
    }
}

fn same_file(a: &Path, b: &Path) -> bool {
    a.canonicalize().ok().is_some_and(|a| b.canonicalize().is_ok_and(|b| a == b))
}

/// The size of a model's file and of its external data.
fn bytes(model: &Path) -> u64 {
    let size = |path: &Path| std::fs::metadata(path).map_or(0, |m| m.len());
    let mut data = model.as_os_str().to_owned();
    data.push(".data");
    size(model) + size(Path::new(&data))
}

fn print_report(full: &FullReport<'_>) {
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
    for miss in &report.misses {
        println!("left alone: {miss}");
    }
    println!();
    match &report.source {
        Some(source) => {
            let tokens = report.closed_form.as_ref().map_or(0, |c| c.tokens);
            match &source.file {
                Some(file) => println!(
                    "Calibrated on {tokens} tokens of {} ({} sequences; {} texts cut); measured on {} others:",
                    file.display(),
                    source.sequences,
                    source.truncated,
                    source.held_out
                ),
                None => println!(
                    "Calibrated on {tokens} random tokens ({} sequences); measured on {} others. \
                     For accuracy on text give --data and --tokenizer.",
                    source.sequences, source.held_out
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
        let (layer, part) = site.site.split_once('/').unwrap_or((&site.site, ""));
        if rows.last().is_none_or(|row| row[0] != layer) {
            rows.push(vec![layer.to_owned(), String::new(), String::new(), String::new(), String::new()]);
        }
        let column = match part {
            "attention" => 1,
            "attention/norm" => 2,
            "activation" => 3,
            _ => 4,
        };
        let row = rows.last_mut().expect("pushed above");
        row[column] = match site.relative_error {
            Some(error) => format!("{} ({})", site.now, print::number(error)),
            None => site.now.to_owned(),
        };
    }
    let header = ["Layer", "Attention", "Norm", "Activation", "Norm"];
    println!(
        "Sites, with their error relative to the teacher's on the calibration data (0 equal, 1 no better than a constant):"
    );
    println!("{}", print::table(&header, 5, rows));
}

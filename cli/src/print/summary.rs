//! What `rewrite` and `transfer` print of the student that they made.

use std::collections::BTreeSet;
use std::fmt::{self, Display, Formatter};

use mabert_passes::contract::NonLinear;
use mabert_passes::lower::Form;
use mabert_passes::pipeline::{Pass, Skipped};
use mabert_passes::sites::{LayerSite, SiteId};
use mabert_transfer::compare::OutputDistance;
use mabert_transfer::full::{Ended, FullReport, Losses};
use mabert_transfer::job::{BeyondReport, Dequantised, Reason, Report, SiteReport, Source};
use serde::Serialize;

use super::likeness::{Likeness, in_words};
use super::{megabytes, number, one_line, optional, table};

/// The library's report, with what only the files tell.
#[derive(Serialize)]
pub(crate) struct StudentReport<'r> {
    #[serde(flatten)]
    pub(crate) report: &'r Report,
    pub(crate) output: String,
    /// Of the teacher's file and of its data.
    pub(crate) bytes_before: u64,
    /// Of the student's.
    pub(crate) bytes_after: u64,
}

impl Display for StudentReport<'_> {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let report = self.report;
        operators(f, report)?;
        sites(f, report)?;
        blocks(f, report)?;
        if let Some(full) = &report.full {
            end_to_end(f, full)?;
        }
        for miss in &report.misses {
            writeln!(f, "left alone: {}", one_line(miss))?;
        }
        for note in &report.notes {
            writeln!(f, "note: {}", one_line(note))?;
        }
        writeln!(f)?;
        if let Some(dequantised) = &report.dequantised {
            quantised(f, dequantised)?;
        }
        source(f, report)?;
        outputs(f, report)?;
        if let Some(texts) = &report.beyond {
            beyond(f, report, texts)?;
        }
        odd_inputs(f, report)?;
        bounds(f, report)?;
        order(f, report)?;
        contract(f, report)?;
        files(f, self)
    }
}

/// How many there are of each operator.
fn operators(f: &mut Formatter<'_>, report: &Report) -> fmt::Result {
    let (before, after) = (&report.operators_before, &report.operators_after);
    let names: BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let count = |n: Option<&usize>| n.map_or_else(|| "-".to_owned(), usize::to_string);
    let rows = names.into_iter().map(|name| vec![name.clone(), count(before.get(name)), count(after.get(name))]);
    let total = [before, after].map(|counts| counts.values().sum::<usize>().to_string());
    let total = [["(all)".to_owned()].as_slice(), &total].concat();
    writeln!(f, "{}\n", table(&["Operator", "Before", "After"], 1, rows.chain([total])))
}

/// A row a layer: how far each site is from the teacher's, or what it is now.
fn sites(f: &mut Formatter<'_>, report: &Report) -> fmt::Result {
    const HEADER: [&str; 5] = ["Layer", "Attention", "Norm", "Activation", "Norm"];
    let mut rows: Vec<Vec<String>> = Vec::new();
    for site in &report.sites {
        let module = site.site.module();
        if rows.last().is_none_or(|row| row[0] != module) {
            rows.push(vec![String::new(); HEADER.len()]);
        }
        let column = match site.site {
            SiteId::Layer(_, LayerSite::Attention) | SiteId::SharedNetwork => 1,
            SiteId::Layer(_, LayerSite::AttentionNorm) => 2,
            SiteId::Layer(_, LayerSite::Activation) => 3,
            SiteId::Layer(_, LayerSite::OutputNorm) | SiteId::EmbeddingNorm => 4,
        };
        let row = rows.last_mut().expect("pushed above");
        row[0] = module;
        row[column] = site_cell(site);
    }
    let when = if report.full.is_some() { " before the end-to-end stage" } else { "" };
    writeln!(
        f,
        "Sites, with their error relative to the teacher's on the calibration data{when} (0 equal, 1 no better than a constant):"
    )?;
    writeln!(f, "{}", table(&HEADER, 5, rows))?;
    forms(f, report)
}

/// Why layers have their forms, where these were weighed against each other.
fn forms(f: &mut Formatter<'_>, report: &Report) -> fmt::Result {
    let told = [
        (Reason::CheaperWithinBound, "the cheaper and close enough"),
        (Reason::OtherNotWithinBound, "the closer, since the cheaper is not close enough"),
        (Reason::LesserError, "the closer, neither close enough"),
    ];
    let parts: Vec<String> = [Form::Hinges, Form::Network]
        .into_iter()
        .flat_map(|form| told.map(|(reason, why)| (form, reason, why)))
        .filter_map(|(form, reason, why)| {
            let layers = report.softmax.iter().filter(|c| c.form == form && c.reason == reason).count();
            (layers > 0).then(|| format!("{} in {layers} of {} layers ({why})", form.name(), report.softmax.len()))
        })
        .collect();
    if parts.is_empty() { Ok(()) } else { writeln!(f, "In the place of softmax: {}\n", parts.join(", ")) }
}

fn site_cell(site: &SiteReport) -> String {
    match site.relative_error {
        Some(error) => format!("{} ({})", site.now, number(error)),
        None => site.now.to_owned(),
    }
}

fn blocks(f: &mut Formatter<'_>, report: &Report) -> fmt::Result {
    let blocks: Vec<_> = report.closed_form.iter().flat_map(|c| &c.blocks).map(|block| block.fitted).collect();
    if blocks.is_empty() {
        return Ok(());
    }
    let errors: Vec<String> = blocks.iter().map(|b| format!("{} -> {}", number(b.before), number(b.after))).collect();
    let errors = errors.join(", ");
    writeln!(f, "Gradient steps, squared error of each half of a layer on sequences kept apart: {errors}")
}

fn end_to_end(f: &mut Formatter<'_>, full: &FullReport) -> fmt::Result {
    let steps = match full.ended {
        Ended::NothingGained => format!("{} of {} steps, as nothing was gained,", full.taken, full.planned),
        Ended::TimeUp => format!("{} of {} steps, as time was up,", full.taken, full.planned),
        _ => format!("{} steps", full.taken),
    };
    write!(
        f,
        "End to end, {steps} of {:.1} sequences at rate {:.1e}, {:.0} tokens a second on the {}",
        full.sequences_a_step, full.rate, full.tokens_per_second, full.device
    )?;
    write!(f, ", loss on sequences kept apart: {} -> {}", losses(&full.before), losses(&full.after))?;
    if full.skipped > 0 {
        write!(f, "; {} steps were not finite and left out", full.skipped)?;
    }
    writeln!(f, "{}", if full.kept { "" } else { "; it gained nothing there and was put back" })
}

/// The parts of a loss that count.
fn losses(losses: &Losses) -> String {
    let parts = [
        ("outputs", losses.outputs),
        ("hidden", losses.hidden),
        ("labels", losses.labels),
        ("attention", losses.attention),
        ("vectors", losses.vectors),
    ];
    let counting = parts.iter().filter(|(_, value)| *value != 0.0);
    counting.map(|(name, value)| format!("{name} {}", number(*value))).collect::<Vec<_>>().join(", ")
}

/// What the student was calibrated and trained on, and what it is measured on.
fn source(f: &mut Formatter<'_>, report: &Report) -> fmt::Result {
    let Some(source) = &report.source else {
        return writeln!(f, "Not calibrated: only the structure is MA-BERT's; the outputs mean nothing yet. Measured:");
    };
    let uses = uses(report, source).join(", ");
    let measured = match (source.kept_apart, source.held_out) {
        (true, others) => format!("measured on {others} others"),
        (false, same) => format!("measured on the same {same}, as none were kept apart"),
    };
    match &source.file {
        Some(file) => {
            let file = one_line(file.display());
            writeln!(f, "Of {file}: {uses}; {} texts cut; {measured}:", source.truncated)
        }
        None => writeln!(f, "Without data: {uses}; {measured}. For accuracy on text give --data and --tokenizer."),
    }
}

fn uses(report: &Report, source: &Source) -> Vec<String> {
    let made = |count: usize| if count > 0 { format!(", {count} of them made of others") } else { String::new() };
    let tokens = if source.file.is_some() { "tokens" } else { "random tokens" };
    let calibrated = report.closed_form.as_ref().map(|closed_form| {
        let made = made(source.augmented.calibration);
        format!("calibrated on {} {tokens} ({} sequences{made})", closed_form.tokens, source.sequences)
    });
    let trained = report.full.as_ref().map(|_| {
        let made = made(source.augmented.training);
        format!("trained on {} sequences{made}", source.training)
    });
    calibrated.into_iter().chain(trained).collect()
}

/// What the teacher is where the model is quantised.
fn quantised(f: &mut Formatter<'_>, dequantised: &Dequantised) -> fmt::Result {
    let distance = |o: &OutputDistance| format!("{} differs by {}{}", o.output, number(o.mean_abs), in_words(o));
    let distances: Vec<String> = dequantised.outputs.iter().map(distance).collect();
    writeln!(
        f,
        "The model is quantised ({} operators): the teacher is the same in single precision. From the model as it came, {}.",
        dequantised.operators,
        distances.join("; ")
    )
}

/// How far the student's outputs are from the teacher's.
fn outputs(f: &mut Formatter<'_>, report: &Report) -> fmt::Result {
    let all: Vec<&OutputDistance> = report.outputs.iter().collect();
    let likeness = Likeness::new(&all);
    let least_header = likeness.has_vectors().then_some("Least cosine");
    let rows = all.iter().map(|o| {
        let (least, mean) = o.cosines().unzip();
        let figures = [o.output.clone(), number(o.mean_abs), number(o.max_abs), optional(mean)];
        let least = least_header.map(|_| optional(least));
        [&figures[..], least.as_slice(), &likeness.cells(o)].concat()
    });
    let header = ["Output against the teacher's", "Mean difference", "Largest", "Mean cosine"];
    let header = [&header[..], least_header.as_slice(), &likeness.header()].concat();
    writeln!(f, "{}", table(&header, 1, rows))?;
    likeness.vectors(&all).map_or(Ok(()), |line| writeln!(f, "{line}"))?;
    writeln!(f)
}

/// How far the outputs are on texts longer than the student is fitted to.
fn beyond(f: &mut Formatter<'_>, report: &Report, beyond: &BeyondReport) -> fmt::Result {
    let distance = |o: &OutputDistance| format!("{} differs by {}{}", o.output, number(o.mean_abs), in_words(o));
    let distances: Vec<String> = beyond.outputs.iter().map(distance).collect();
    let BeyondReport { sequences, shortest, longest, .. } = beyond;
    let fitted = report.options.approximator.max_seq;
    let distances = distances.join("; ");
    writeln!(f, "Of {sequences} texts of {shortest} to {longest} tokens, fitted to {fitted}: {distances}.")
}

fn odd_inputs(f: &mut Formatter<'_>, report: &Report) -> fmt::Result {
    let odd = report.odd_inputs;
    write!(f, "Inputs unlike text (a few random tokens, one token repeated): ")?;
    match odd.overflow {
        0 => writeln!(f, "all {} stay finite.", odd.sequences),
        overflow => writeln!(f, "{overflow} of {} overflow; check such answers.", odd.sequences),
    }
}

/// What holds the student's values, or why nothing does.
fn bounds(f: &mut Formatter<'_>, report: &Report) -> fmt::Result {
    let Some(bounds) = report.bounds else {
        let pass = report.passes.iter().find(|outcome| outcome.pass == Pass::Bound);
        return match pass.and_then(|outcome| outcome.skipped) {
            // They hold it.
            None | Some(Skipped::NormKept) => Ok(()),
            Some(skipped) => writeln!(f, "Nothing holds its values ({skipped}): some input may make it overflow."),
        };
    };
    write!(f, "Bounds behind {} norms, {:.1} ranges beyond what was seen: ", bounds.norms, bounds.margin)?;
    match bounds.largest.map(number) {
        Some(largest) if bounds.promised => {
            writeln!(f, "no value of the encoder exceeds {largest}, whatever the tokens.")?;
        }
        Some(largest) => writeln!(f, "values of {largest} cannot be ruled out, which may overflow.")?,
        None => writeln!(f, "how large values can get between them is not known.")?,
    }
    let ((texts, all_texts), (odd, all_odd)) = (bounds.held_out, bounds.odd);
    writeln!(
        f,
        "They are reached by {texts} of {all_texts} texts kept apart, and by {odd} of {all_odd} inputs unlike text."
    )
}

/// Why attention is in the paper's order, where the model decides that.
fn order(f: &mut Formatter<'_>, report: &Report) -> fmt::Result {
    let decided = |skipped: &Skipped| matches!(skipped, Skipped::PositionBias | Skipped::ProbabilitiesShown);
    let reassociate = report.passes.iter().find(|outcome| outcome.pass == Pass::Reassociate);
    match reassociate.and_then(|outcome| outcome.skipped).filter(decided) {
        Some(skipped) => writeln!(f, "Note: {skipped}."),
        None => Ok(()),
    }
}

/// What is left that is not matrix arithmetic, and what the exact passes did.
fn contract(f: &mut Formatter<'_>, report: &Report) -> fmt::Result {
    let (head, encoder): (Vec<_>, Vec<_>) = report.non_linear_after.iter().partition(|n| n.in_head);
    writeln!(
        f,
        "Not matrix arithmetic: before {} nodes; now in the encoder {}, in the head {}",
        report.non_linear_before,
        listed(&encoder),
        listed(&head)
    )?;
    if report.fold.explicit_channels > 0 {
        writeln!(f, "Folding left an explicit scale on {} channels.", report.fold.explicit_channels)?;
    }
    writeln!(f, "Exact passes changed the outputs by {} of their size.", number(report.exact_passes_differ_by))
}

fn listed(nodes: &[&NonLinear]) -> String {
    let listed: Vec<String> = nodes.iter().map(|n| one_line(format!("{} `{}`", n.operator, n.node))).collect();
    if listed.is_empty() { "none".to_owned() } else { listed.join(", ") }
}

fn files(f: &mut Formatter<'_>, student: &StudentReport<'_>) -> fmt::Result {
    let report = student.report;
    let memory = report.peak_memory.map_or_else(String::new, |m| format!(", {} of memory", megabytes(m)));
    let (longest, max_seq) = (report.options.approximator.longest(), report.options.approximator.max_seq);
    let tokens = match longest == max_seq {
        true => format!("{max_seq} tokens"),
        false => format!("{longest} tokens, fitted to {max_seq}"),
    };
    writeln!(
        f,
        "{} -> {}: {} -> {}, up to {tokens}, in {:.1} s{memory}",
        one_line(&report.model),
        one_line(&student.output),
        megabytes(student.bytes_before),
        megabytes(student.bytes_after),
        report.seconds
    )
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::path::{Path, PathBuf};

    use mabert_graph::Model;
    use mabert_transfer::full::FullOptions;
    use mabert_transfer::job::{Data, Job, Transfer, rewrite};
    use mabert_transfer::progress::Silent;

    use super::*;

    /// The report of a tiny model that went through every stage.
    fn report() -> Report {
        let mut data = tempfile::Builder::new().suffix(".jsonl").tempfile().unwrap();
        for line in 0..60 {
            let ids: Vec<i64> = (0..4 + line % 9).map(|at| 5 + (7 * line + 3 * at) % 50).collect();
            writeln!(data, "{}", serde_json::json!({ "input_ids": ids })).unwrap();
        }
        let options = FullOptions::default().with_steps(3, 8);
        let job = Job::default()
            .max_seq(16)
            .transfer(Transfer::Full(options.into()))
            .data(Data::new(data.path()))
            .calibration_tokens(400);
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures");
        let teacher = Model::load(fixtures.join("coverage/bert-classification-torchscript-17.onnx")).unwrap();
        rewrite(teacher, &job, &Silent).unwrap().1
    }

    /// Numbers that rounding, the clock, the machine or the passes decide, put in place of what was found.
    fn with_fixed_numbers(mut report: Report) -> Report {
        report.model = "teacher.onnx".to_owned();
        let counts = |counts: &[(&str, usize)]| counts.iter().map(|(name, n)| ((*name).to_owned(), *n)).collect();
        report.operators_before = counts(&[("MatMul", 16), ("Softmax", 2)]);
        report.operators_after = counts(&[("MatMul", 26), ("Relu", 4)]);
        report
            .sites
            .iter_mut()
            .zip(1..)
            .for_each(|(s, n)| s.relative_error = s.relative_error.and(Some(0.01 * f64::from(n))));
        for output in &mut report.outputs {
            (output.mean_abs, output.max_abs) = (0.012_34, 123.45);
            (output.mean_cosine, output.agreement) = (Some(0.998_76), Some(0.9375));
        }
        for (choice, form) in report.softmax.iter_mut().zip(Form::ALL) {
            (choice.form, choice.reason) = (form, Reason::CheaperWithinBound);
        }
        report.odd_inputs.overflow = 0;
        let bounds = report.bounds.as_mut().unwrap();
        (bounds.largest, bounds.promised, bounds.held_out, bounds.odd) = (Some(1.234e9), true, (0, 6), (7, 313));
        (report.exact_passes_differ_by, report.seconds) = (3.21e-6, 12.34);
        report.peak_memory = Some(56_700_000);
        report.source.as_mut().unwrap().file = Some(PathBuf::from("reviews.jsonl"));
        let blocks = &mut report.closed_form.as_mut().unwrap().blocks;
        blocks.iter_mut().for_each(|block| (block.fitted.before, block.fitted.after) = (0.25, 0.125));
        let full = report.full.as_mut().unwrap();
        (full.rate, full.tokens_per_second, full.device) = (4e-5, 4321.0, "CPU");
        (full.planned, full.taken) = (3, 3);
        (full.kept, full.skipped) = (true, 0);
        (full.before.outputs, full.before.hidden) = (0.5, 0.25);
        (full.after.outputs, full.after.hidden) = (0.4, 0.125);
        report
    }

    fn printed(report: &Report) -> String {
        let output = "student.onnx".to_owned();
        StudentReport { report, output, bytes_before: 4_600_000, bytes_after: 3_210_000 }.to_string()
    }

    #[test]
    fn what_is_printed_of_a_student() {
        let mut report = with_fixed_numbers(report());
        insta::assert_snapshot!("trained_on_text", printed(&report));

        let full = report.full.as_mut().unwrap();
        (full.skipped, full.kept) = (2, false);
        (full.taken, full.ended) = (2, Ended::NothingGained);
        report.odd_inputs.overflow = 3;
        let bounds = report.bounds.as_mut().unwrap();
        (bounds.largest, bounds.promised) = (Some(5e40), false);
        report.fold.explicit_channels = 5;
        report.peak_memory = None;
        insta::assert_snapshot!("with_what_went_wrong", printed(&report));

        report.full = None;
        report.closed_form.as_mut().unwrap().blocks.clear();
        report.source.as_mut().unwrap().file = None;
        report.softmax.iter_mut().for_each(|choice| choice.reason = Reason::NoText);
        insta::assert_snapshot!("calibrated_on_random_tokens", printed(&report));

        (report.source, report.closed_form, report.bounds) = (None, None, None);
        let bound = report.passes.iter_mut().find(|outcome| outcome.pass == Pass::Bound).unwrap();
        bound.skipped = Some(Skipped::NotCalibrated);
        report.sites.iter_mut().for_each(|site| site.relative_error = None);
        insta::assert_snapshot!("not_calibrated", printed(&report));

        let order = report.passes.iter_mut().find(|outcome| outcome.pass == Pass::Reassociate).unwrap();
        order.skipped = Some(Skipped::PositionBias);
        let note = "Note: attention is in the paper's order: a bias by position is added to its scores.";
        assert!(printed(&report).contains(note));
    }
}

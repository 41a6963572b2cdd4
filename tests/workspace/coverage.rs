//! Every model of `fixtures/coverage`, architecture x head x exporter x opset: rewritten and checked, or refused with the
//! reason. `docs/coverage.md` is the table that this test makes; `UPDATE_DOCS=1` writes it anew.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use mabert_graph::{Dim, Model};
use mabert_passes::contract::non_linear_nodes;
use mabert_passes::pipeline::{Order, Pass, PassOptions, Rewriting, Skipped};
use mabert_passes::sites::Precision;
use mabert_runtime::{Engine, Named, OrtModel, borrowed};
use mabert_tests::{MAX_SEQ, fixture, options, padded_inputs};
use mabert_transfer::job::{Job, rewrite};
use mabert_transfer::progress::Silent;
use rayon::prelude::*;

const WORDS: i64 = 64;

/// What the table says of one model.
struct Cell {
    name: String,
    outcome: Result<Measured, String>,
}

struct Measured {
    order: Order,
    half: bool,
    quantised: bool,
    /// Of the canonical teacher on tract, from the model as exported on onnxruntime.
    teacher: f32,
    /// Of the student on tract, from the same student on onnxruntime.
    student: f32,
    /// Operators of the head that are not matrix arithmetic.
    head: Vec<String>,
}

/// Models that are refused, by what their names begin with, and a part of the reason.
const REFUSED: [(&str, &str); 9] = [
    ("robertaprelayernorm", "only post-LN encoders are supported"),
    ("megatronbert", "only post-LN encoders are supported"),
    ("debertav2", "which depends on the text, is added to its scores, as relative positions are"),
    ("bertrelative", "which depends on the text, is added to its scores, as relative positions are"),
    ("modernbert", "it depends on where a token stands, as rotary positions do"),
    ("roformer", "it depends on where a token stands, as rotary positions do"),
    ("mobilebert", "queries, keys and values come from"),
    ("xmod", "though it runs on 3 of 7, and its inputs declare any size"),
    (
        "torchencoder-classification-torchscript-17-openaxes",
        "though it runs on 2 of 12, and its inputs declare any size",
    ),
];

/// The same in words.
const REASONS: [&str; 9] = [
    "it normalises before its blocks, not after",
    "it normalises before its blocks, not after",
    "its attention adds terms by position that depend on the text",
    "its attention adds terms by position that depend on the text",
    "its queries and keys are rotated by position, and it normalises before its blocks",
    "its queries and keys are rotated by position",
    "values come from another place than queries and keys",
    "its exporter fixes the batch size inside, though it declares any",
    "TorchScript fixes the length inside, though it declares any",
];

/// Differences relative to outputs above 1. A student that is not calibrated computes large numbers on the way, whose
/// rounding shows.
const TEACHER: f32 = 1e-4;
const STUDENT: f32 = 5e-4;
/// onnxruntime rounds each value of a model of half precision; tract computes it in single precision.
const HALF: f32 = 5e-2;
/// A number of a quantised model may be rounded to the other side; its teacher has no such roundings.
const ROUNDED: f32 = 5e-2;
const DEQUANTISED: f32 = 0.2;

fn models() -> Vec<PathBuf> {
    let files = std::fs::read_dir(fixture("coverage")).expect("fixtures/coverage is part of the repository");
    let mut found: Vec<PathBuf> = files.map(|f| f.expect("a readable folder").path()).collect();
    found.retain(|f| f.extension().is_some_and(|e| e == "onnx"));
    found.sort();
    found
}

/// The furthest of all outputs over sizes and masks, relative to outputs above 1.
fn furthest(a: &dyn Engine, b: &dyn Engine) -> Result<f32, String> {
    let mut worst = 0f32;
    for (batch, length) in sizes(a) {
        let inputs = padded_inputs(a.inputs(), batch, length, WORDS, 5 + length as u64);
        let run = |engine: &dyn Engine| engine.run(&borrowed(&inputs)).map_err(|e| format!("{batch} x {length}: {e}"));
        let (x, y) = (run(a)?, run(b)?);
        worst = worst.max(far(&x, &y)?);
    }
    Ok(worst)
}

fn far(x: &Named, y: &Named) -> Result<f32, String> {
    let mut worst = 0f32;
    for ((name, x), (other, y)) in x.iter().zip(y) {
        if name != other || x.shape() != y.shape() || x.element_type() != y.element_type() {
            return Err(format!("output `{name}` {:?} against `{other}` {:?}", x.shape(), y.shape()));
        }
        let largest = x.to_f32().iter().fold(1f32, |m, v| m.max(v.abs()));
        worst = worst.max(x.largest_difference(y) / largest);
    }
    Ok(worst)
}

/// Batch sizes and lengths that the model takes.
fn sizes(engine: &dyn Engine) -> Vec<(usize, usize)> {
    let dims = engine.inputs()[0].dims.clone().unwrap_or_default();
    let fixed = |axis: usize| match dims.get(axis) {
        Some(Dim::Fixed(n)) => Some(*n),
        _ => None,
    };
    let wanted = [(1, 1), (1, 7), (3, 12), (2, 5)];
    let mut sizes: Vec<_> = wanted.map(|(b, l)| (fixed(0).unwrap_or(b), fixed(1).unwrap_or(l))).to_vec();
    sizes.dedup();
    sizes
}

fn check(path: &Path) -> Result<Measured, String> {
    let model = Model::load(path).map_err(|e| e.to_string())?;
    let rewriting = Rewriting::new(model.clone(), PassOptions { order: Order::Auto, ..options() });
    let rewriting = rewriting.map_err(|e| e.to_string())?;
    let half = rewriting.precision == Precision::Half;
    let quantised = mabert_graph::is_quantised(&model);
    let bound = |single: f32| if half { HALF } else { single };
    let rounded = |single: f32, quantised_bound: f32| if quantised { quantised_bound } else { bound(single) };
    let exported = OrtModel::load(path, 1).map_err(|e| e.to_string())?;
    let tract = |model: &Model| {
        let ready = mabert_runtime::LoadOptions::default().prepare(model).map_err(|e| e.to_string())?;
        // No operators are known before the first run where each shape has a plan of its own.
        let once = !ready.operators().is_empty();
        once.then_some(ready).ok_or_else(|| "tract cannot plan it for every shape at once".to_owned())
    };
    let as_it_is = furthest(&exported, &tract(&model)?).map_err(|e| format!("as exported: {e}"))?;
    if as_it_is > rounded(TEACHER, ROUNDED) {
        return Err(format!("on tract the exported model is {as_it_is:.1e} from itself on onnxruntime"));
    }
    let teacher = furthest(&exported, &tract(&rewriting.teacher)?).map_err(|e| format!("teacher: {e}"))?;
    if teacher > rounded(TEACHER, DEQUANTISED) {
        return Err(format!("the canonical teacher is {teacher:.1e} from the exported model"));
    }
    // The structure is the same whether calibrated or not; only half precision needs values that fit it.
    let (model, order) = match half {
        true => {
            let job = Job::default().max_seq(MAX_SEQ).hidden(8).calibration_tokens(2_000);
            let teacher = Model::load(path).map_err(|e| e.to_string())?;
            let (student, report) = rewrite(teacher, &job, &Silent).map_err(|e| e.to_string())?;
            (student, report.options.order)
        }
        false => {
            let mut student = rewriting.approximate().map_err(|e| e.to_string())?;
            student.finish().map_err(|e| e.to_string())?;
            (student.model, student.options.order)
        }
    };
    let folder = tempfile::tempdir().map_err(|e| e.to_string())?;
    let saved = folder.path().join("student.onnx");
    model.save(&saved).map_err(|e| e.to_string())?;
    let last = rewriting.encoder.layers.last().expect("an encoder has layers");
    let mask = rewriting.encoder.mask.as_ref().map(|m| m.input.as_str());
    let end = [format!("{}/first_token", last.output_norm.output), last.output_norm.output.clone()];
    let computed = |value: &&String| model.graph().node.iter().any(|n| n.output.contains(value));
    let end = end.iter().find(computed).map(String::as_str);
    let left = non_linear_nodes(&model, mask, end).map_err(|e| format!("contract: {e}"))?;
    if let Some(node) = left.iter().find(|n| !n.in_head) {
        return Err(format!("{} `{}` is left in the encoder", node.operator, node.node));
    }
    let on_ort = OrtModel::load(&saved, 1).map_err(|e| format!("student: {e}"))?;
    let student = furthest(&on_ort, &tract(&model)?).map_err(|e| format!("student: {e}"))?;
    if student > bound(STUDENT) {
        return Err(format!("the student on tract is {student:.1e} from itself on onnxruntime"));
    }
    let mut head: Vec<String> = left.into_iter().map(|n| n.operator).collect();
    head.sort();
    head.dedup();
    Ok(Measured { order, half, quantised, teacher, student, head })
}

/// The page that people read.
fn page(cells: &[Cell]) -> String {
    let mut rows: BTreeMap<[&str; 2], BTreeMap<String, Vec<&Cell>>> = BTreeMap::new();
    for cell in cells {
        let mut parts = cell.name.split('-');
        let [family, head, exporter, opset] = std::array::from_fn(|_| parts.next().unwrap_or_default());
        let column = format!("{exporter} {opset}");
        rows.entry([family, head]).or_default().entry(column).or_default().push(cell);
    }
    let mut text = "# Coverage\n\n".to_owned();
    text.push_str(INTRODUCTION);
    let rewritten = cells.iter().filter(|c| c.outcome.is_ok()).count();
    writeln!(text, "{} models: {rewritten} rewritten, {} refused.\n", cells.len(), cells.len() - rewritten).unwrap();
    text.push_str("| architecture | head | exporter and opset | variant | result |\n|---|---|---|---|---|\n");
    for ([family, head], columns) in &rows {
        for (column, cells) in columns {
            for cell in cells {
                let variant = cell.name.splitn(5, '-').nth(4).unwrap_or_default().replace('-', " ");
                let result = match &cell.outcome {
                    Ok(m) => {
                        let mut notes = vec!["rewritten".to_owned()];
                        notes.extend((m.order == Order::Paper).then(|| "in the paper's order".to_owned()));
                        notes.extend(m.half.then(|| "in half precision".to_owned()));
                        notes.extend(m.quantised.then(|| "in single precision".to_owned()));
                        notes.extend((!m.head.is_empty()).then(|| format!("{} in the head", m.head.join(", "))));
                        notes.join(", ")
                    }
                    Err(_) => {
                        let refused = REFUSED.iter().zip(REASONS).find(|((part, _), _)| cell.name.starts_with(part));
                        format!("refused: {}", refused.map_or("", |(_, words)| words))
                    }
                };
                writeln!(text, "| {family} | {head} | {column} | {variant} | {result} |").unwrap();
            }
        }
    }
    text
}

const INTRODUCTION: &str = include_str!("coverage.md");

#[test]
fn every_model_is_rewritten_or_refused_with_the_reason() {
    let of = |path: &PathBuf| {
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Cell { name, outcome: check(path) }
    };
    let cells: Vec<Cell> = models().par_iter().map(of).collect();
    assert!(cells.len() > 150, "only {} models", cells.len());
    let mut faults = String::new();
    let mut worst = [0f32; 2];
    for cell in &cells {
        let expected = REFUSED.iter().find(|(part, _)| cell.name.starts_with(part)).map(|(_, reason)| *reason);
        match (&cell.outcome, expected) {
            (Ok(found), None) if !found.half && !found.quantised => {
                worst = [worst[0].max(found.teacher), worst[1].max(found.student)];
            }
            (Ok(_), None) => {}
            (Err(reason), Some(part)) if reason.contains(part) => {}
            (Ok(_), Some(_)) => writeln!(faults, "{}: is rewritten, not refused", cell.name).unwrap(),
            (Err(reason), _) => writeln!(faults, "{}: {reason}", cell.name).unwrap(),
        }
    }
    eprintln!("furthest teacher {:.1e}, student {:.1e}", worst[0], worst[1]);
    assert!(faults.is_empty(), "\n{faults}");
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/coverage.md");
    let page = page(&cells);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(&file, &page).unwrap();
    }
    let written = std::fs::read_to_string(&file).unwrap_or_default();
    assert!(written == page, "docs/coverage.md is not what the models give: run this test with UPDATE_DOCS=1");
}

#[test]
fn a_bias_by_position_takes_the_papers_order() {
    let rewriting = |order: Order| {
        let path = fixture("coverage/mpnet-classification-torchscript-17.onnx");
        Rewriting::new(Model::load(path).unwrap(), PassOptions { order, ..options() })
    };
    // Asked for, the linear order cannot be given.
    let refused = rewriting(Order::Linear).unwrap_err();
    assert!(matches!(refused, mabert_passes::Error::PositionBias(_)), "{refused}");
    let mut student = rewriting(Order::Auto).unwrap().approximate().unwrap();
    student.finish().unwrap();
    assert_eq!(student.options.order, Order::Paper);
    let reassociate = student.outcomes.iter().find(|outcome| outcome.pass == Pass::Reassociate).unwrap();
    assert_eq!(reassociate.skipped, Some(Skipped::PositionBias));
}

/// A layer of flattened tokens is brought back from that by the one before it: where the first is lost, `--partial` has nothing
/// to stand on.
#[test]
fn flattened_layers_need_the_one_before() {
    let mut model = Model::load(fixture("coverage/bert-answers-tf2onnx-17-tensorflow1.onnx")).unwrap();
    let softmax = model.graph_mut().node.iter_mut().find(|n| n.op_type == "Softmax").unwrap();
    softmax.op_type = "Sigmoid".to_owned();
    softmax.attribute.clear();
    let partial = PassOptions { partial: true, ..options() };
    let reason = Rewriting::new(model, partial).unwrap_err().to_string();
    assert!(reason.contains("its input has shape [32, 16]"), "{reason}");
}

//! No input of legal token ids makes a bounded student overflow, on either engine.

use mabert_graph::{Model, Tensor};
use mabert_passes::lower::{ChannelRanges, NormRanges, saturations};
use mabert_passes::pipeline::{Rewriting, Student};
use mabert_runtime::{Engine, LoadOptions, Model as Runnable, OrtModel, Taps, borrowed};
use mabert_tests::{distance, fixture, options};
use mabert_transfer::bounds::BoundedStudent;
use mabert_transfer::data::{BatchShape, Sequence};
use mabert_transfer::job::{Data, Job, Report, Transfer, rewrite};
use mabert_transfer::progress::Silent;
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};
use rayon::prelude::*;

const WORDS: i64 = 4096;
/// Rows of a batch of random ids.
const ROWS: usize = 64;
/// What runs in every test run; `MABERT_RANDOM_INPUTS` says more.
const INPUTS: usize = 20_000;

fn teacher() -> Model {
    Model::load(fixture("bert-mini-sst2/model.onnx")).unwrap()
}

fn job() -> Job {
    let job = Job::default().data(Data::new(fixture("reviews/reviews.tsv")));
    job.tokenizer(fixture("bert-mini-sst2/tokenizer.json")).transfer(Transfer::ClosedForm).calibration_tokens(8_000)
}

fn rewritten(job: &Job) -> (Model, Report) {
    rewrite(teacher(), job, &Silent).unwrap()
}

type Inputs = [(&'static str, Tensor); 3];

/// Random ids of 1 to 8 tokens; one batch in so many is of up to 64. Some rows are nothing but padding.
fn random_inputs(seed: u64) -> Inputs {
    let mut rng = StdRng::seed_from_u64(seed);
    let n = if seed.is_multiple_of(50) { rng.random_range(9..=64) } else { rng.random_range(1..=8) };
    let kinds: Vec<u32> = (0..ROWS).map(|_| rng.random_range(0..4)).collect();
    let mut ids = Vec::new();
    let mut mask = Vec::new();
    for kind in kinds {
        let one = rng.random_range(0..WORDS);
        // Any tokens, a few again and again, one alone; and a length from nothing to all.
        let few: [i64; 3] = std::array::from_fn(|_| rng.random_range(0..WORDS));
        let length = if rng.random_bool(0.02) { 0 } else { rng.random_range(1..=n) };
        ids.extend((0..n).map(|_| match kind {
            0 | 1 => rng.random_range(0..WORDS),
            2 => few[rng.random_range(0..3)],
            _ => one,
        }));
        mask.extend((0..n).map(|at| i64::from(at < length)));
    }
    let types = (0..ROWS * n).map(|_| rng.random_range(0..2i64)).collect();
    let of = |values: Vec<i64>| Tensor::new(&[ROWS, n], values);
    [("input_ids", of(ids)), ("attention_mask", of(mask)), ("token_type_ids", of(types))]
}

fn is_finite(value: &Tensor) -> bool {
    value.to_f32().iter().all(|v| v.is_finite())
}

/// How many batches of so many inputs hold one whose answer, or a value where the encoder ends, is not finite.
fn overflowing(model: &Model, inputs: usize) -> [usize; 2] {
    let end = model.metadata("onnx_mabert.encoder_end").unwrap().to_owned();
    let mut tapped = model.clone();
    tapped.graph_mut().output.push(mabert_graph::proto::ValueInfoProto { name: end.clone(), ..Default::default() });
    let tract = LoadOptions::default().taps(Taps::Values(vec![end])).prepare(model).unwrap();
    let ort = OrtModel::prepare(&tapped, 1).unwrap();
    let engines: [&(dyn Engine + Sync); 2] = [&tract, &ort];
    engines.map(|engine| {
        let seeds = 0..inputs.div_ceil(ROWS) as u64;
        let overflows = |seed: &u64| {
            let outputs = engine.run(&borrowed(&random_inputs(*seed))).unwrap();
            assert_eq!(outputs.len(), 2);
            !outputs.iter().all(|(_, value)| is_finite(value))
        };
        seeds.into_par_iter().filter(overflows).count()
    })
}

fn inputs_wanted() -> usize {
    std::env::var("MABERT_RANDOM_INPUTS").map_or(INPUTS, |count| count.parse().expect("a number of inputs"))
}

/// It is told before a single input is run, and so it is.
#[test]
fn no_tokens_make_a_bounded_student_overflow() {
    let (student, report) = rewritten(&job());
    let bounds = report.bounds.unwrap();
    assert_eq!((bounds.norms, saturations(&student).len(), bounds.held_out.0), (6, 6, 0));
    assert!(bounds.promised && bounds.largest.is_some_and(|largest| largest < 1e30), "{bounds:?}");
    assert_eq!(overflowing(&student, inputs_wanted()), [0, 0]);
}

#[test]
fn bounds_can_be_left_out() {
    let (bounded, with) = rewritten(&job());
    let (free, without) = rewritten(&job().bounds(false));
    assert!(without.bounds.is_none() && saturations(&free).is_empty());
    // Text is answered alike.
    for (a, b) in with.outputs.iter().zip(&without.outputs) {
        assert!((a.mean_abs - b.mean_abs).abs() < 1e-4 && a.agreement == b.agreement, "{a:?} {b:?}");
    }
    assert_eq!(bounded.operators()["Clip"], 6);
    let uncalibrated = rewritten(&job().transfer(Transfer::None)).1;
    assert!(uncalibrated.bounds.is_none());
}

/// The fixture as a student whose feed-forward parts add far more than floats hold, and the same bounded.
fn students_that_overflow() -> [Student; 2] {
    let mut model = teacher();
    for layer in 0..3 {
        let name = format!("m.bert.encoder.layer.{layer}.intermediate.dense.bias");
        let bias = model.constant(&name).unwrap().to_f32() + 1e16;
        model.set_constant(&name, &bias.into());
    }
    let rewriting = Rewriting::new(model, options()).unwrap();
    [false, true].map(|bounded| {
        let mut student = rewriting.approximate().unwrap();
        let seen =
            ndarray::Array2::from_shape_fn((2, 128), |(row, channel)| (row as f32 - 0.4) * (1 + channel % 3) as f32);
        let norms = student.encoder.norms();
        let ranges: NormRanges = norms.iter().map(|(id, _)| (*id, ChannelRanges::of(seen.view()))).collect();
        student.bound(bounded.then_some(ranges)).unwrap();
        student.finish().unwrap();
        student
    })
}

/// Where values would overflow they are held, by fused operators as by plain ones, and by onnxruntime.
#[test]
fn what_would_overflow_is_held_alike_everywhere() {
    let [free, bounded] = students_that_overflow().map(|student| student.model);
    let inputs: Inputs = {
        let of = |value: fn(usize) -> i64| Tensor::new(&[3, 14], (0..42).map(value).collect());
        [
            ("input_ids", of(|i| (7 + i * 37) as i64 % WORDS)),
            ("attention_mask", of(|i| i64::from(i % 14 < 14 - i / 14))),
            ("token_type_ids", of(|_| 0)),
        ]
    };
    let answers = |model: &Model| {
        let fused = LoadOptions::default().prepare(model).unwrap();
        let plain = LoadOptions::default().plain().prepare(model).unwrap();
        let ort = OrtModel::prepare(model, 1).unwrap();
        let engines: [&dyn Engine; 3] = [&fused, &plain, &ort];
        (engines.map(|engine| engine.run(&borrowed(&inputs)).unwrap().remove(0).1), fused.operators())
    };
    let (overflowed, _) = answers(&free);
    assert!(!is_finite(&overflowed[0]) && !is_finite(&overflowed[2]));
    let (held, operators) = answers(&bounded);
    for other in &held {
        assert!(is_finite(other) && distance(&held[0], other) < 1e-3, "{held:?}");
    }
    // The limits are in the linear layers, and nothing is taken out of its panels for them. The last layer's rows are
    // tract's own.
    let count = |name: &str| operators.get(name).copied().unwrap_or(0);
    assert_eq!(["LinearAttention", "Linear", "ToPanels", "FromPanels"].map(count), [3, 9, 2, 2], "{operators:?}");
    let student = BoundedStudent::new(&bounded, 1).unwrap().unwrap();
    let shape = BatchShape::new(&mabert_passes::inputs::EncoderInputs::new(&bounded, &[]).unwrap());
    let (ids, types) = (vec![2, 100, 3], vec![0; 3]);
    let text = Sequence { ids, types, label: None, line: 1, truncated: false, made_up: false };
    let leaves = student.leaves(&shape, &[text]).unwrap();
    assert!(leaves[0].is_some(), "{leaves:?}");
}

/// A million, by `tests/real-models`.
#[test]
#[ignore = "minutes"]
fn not_one_of_a_million_inputs_overflows() {
    let (student, _) = rewritten(&job().calibration_tokens(40_000));
    assert_eq!(overflowing(&student, 1_000_000), [0, 0]);
}

/// Saved and loaded, a student is bounded as it was.
#[test]
fn bounds_are_read_off_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("student.onnx");
    let (student, report) = rewritten(&job().calibration_tokens(2_000));
    student.save(&path).unwrap();
    let loaded = Model::load(&path).unwrap();
    assert_eq!(saturations(&loaded), saturations(&student));
    let said: f64 = loaded.metadata(mabert_transfer::job::LARGEST_VALUE_KEY).unwrap().parse().unwrap();
    let largest = report.bounds.unwrap().largest.unwrap();
    assert_eq!(said, largest);
    assert!(Runnable::load(&path).is_ok());
}

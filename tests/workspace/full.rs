//! The end-to-end stage: what it gains, on every kind of head, and that an interrupted run goes on as if it were not.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use mabert_graph::proto::ValueInfoProto;
use mabert_graph::{Boundary, Builder, Dim, ElementType, Model, Tensor, attribute};
use mabert_passes::lower::{ApproximatorOptions, Form, Sharing};
use mabert_passes::pipeline::{Keep, Order, PassOptions, Rewriting};
use mabert_tests::fixture;
use mabert_transfer::data::Columns;
use mabert_transfer::evaluate::Metric;
use mabert_transfer::full::{Ended, FullOptions, Losses, SiteChange};
use mabert_transfer::job::{CheckpointFolder, Data, Dev, FullStage, Job, Report, Transfer, rewrite};
use mabert_transfer::progress::{Progress, Silent};

fn teacher() -> PathBuf {
    fixture("bert-mini-sst2/model.onnx")
}

fn reviews(label: bool) -> Data {
    let columns = Columns { label: label.then(|| "label".to_owned()), ..Columns::default() };
    Data::new(fixture("reviews/reviews.tsv")).columns(columns)
}

fn job(full: FullOptions) -> Job {
    stage_job(full.into())
}

fn stage_job(stage: FullStage) -> Job {
    Job::default()
        .data(reviews(stage.options.alpha < 1.0))
        .transfer(Transfer::Full(stage))
        .tokenizer(fixture("bert-mini-sst2/tokenizer.json"))
        .calibration_tokens(4_000)
}

fn rewrite_file(path: &Path, job: &Job) -> mabert_transfer::Result<(Model, Report)> {
    rewrite(Model::load(path).unwrap(), job, &Silent)
}

fn some_steps(steps: usize) -> FullOptions {
    FullOptions::default().with_steps(steps, 16)
}

fn losses(report: &Report) -> (Losses, Losses) {
    let full = report.full.as_ref().unwrap();
    assert!(full.skipped == 0, "{full:?}");
    let squares = |of: fn(&SiteChange) -> f64| full.sites.iter().map(|s| of(s).powi(2)).sum::<f64>() / 7.0;
    approx::assert_relative_eq!(squares(|s| s.before), full.before.hidden, max_relative = 1e-5);
    approx::assert_relative_eq!(squares(|s| s.after), full.after.hidden, max_relative = 1e-5);
    assert_eq!((full.sites.len(), full.sites[6].site.to_string()), (7, "layer.2/output/norm".to_owned()));
    (full.before.clone(), full.after.clone())
}

#[test]
fn outputs_come_closer_than_blockwise_brings_them() {
    let dev = Dev { data: reviews(true), metric: Some(Metric::Accuracy) };
    let (_, report) = rewrite_file(&teacher(), &job(some_steps(300)).dev(dev)).unwrap();
    let (before, after) = losses(&report);
    assert!(after.hidden < 0.98 * before.hidden && after.outputs < before.outputs, "{before:?} {after:?}");
    assert!(report.full.as_ref().unwrap().kept);
    let stages: Vec<&str> = report.stages.iter().map(|s| s.stage).collect();
    assert_eq!(stages, ["blockwise", "full"]);
    // Of texts that no stage has seen.
    let far = |at: usize| report.stages[at].outputs[0].mean_abs;
    assert!(far(1) < far(0), "{} {}", far(0), far(1));
    let dev = report.dev.unwrap();
    assert_eq!(report.stages[1].dev, Some(dev.student));
    assert!(dev.examples == 2400 && dev.teacher > 0.9 && dev.student > 0.85 && dev.agreement > 0.85, "{dev:?}");
    assert_eq!(report.odd_inputs.overflow, 0);
}

#[test]
fn the_papers_recipe_takes_labels_and_attention_into_the_loss() {
    let full = FullOptions::paper().with_steps(200, 16);
    assert_eq!((full.temperature, full.alpha, full.attention_weight), (15.0, 0.9, 100.0));
    let (_, report) = rewrite_file(&teacher(), &job(full)).unwrap();
    let (before, after) = losses(&report);
    assert!(before.labels > 0.0 && before.attention > 0.0, "{before:?}");
    assert!(after.attention < before.attention && after.outputs < before.outputs, "{before:?} {after:?}");
    // Attention alone.
    let mut alone = full.with_steps(100, 16);
    (alone.alpha, alone.hidden_weight, alone.attention_weight) = (1.0, 0.0, 1e6);
    let (before, after) = losses(&rewrite_file(&teacher(), &job(alone)).unwrap().1);
    assert!(after.attention < 0.99 * before.attention, "{before:?} {after:?}");
}

/// The fixture's encoder with other heads, as models for other tasks have them.
fn with_head(folder: &Path, outputs: &[(&str, &[usize])]) -> PathBuf {
    let approximator = ApproximatorOptions::network(64, 8);
    let options = PassOptions::new(approximator);
    let rewriting = Rewriting::new(Model::load(teacher()).unwrap(), options).unwrap();
    let hidden = rewriting.encoder.layers.last().unwrap().output_norm.output.clone();
    let inner = rewriting.encoder.layers[0].output_norm.output.clone();
    let mut model = Model::load(teacher()).unwrap();
    let b = Builder::new(model.opset(), "head");
    let mut heads = Vec::new();
    for (number, (name, shape)) in outputs.iter().enumerate() {
        if name == &"hidden" || name == &"inner" {
            heads.push(if name == &"inner" { inner.clone() } else { hidden.clone() });
            continue;
        }
        let elements = shape.iter().product::<usize>();
        let values = (0..elements).map(|at| ((at * 37 + number * 11) % 19) as f32 / 19.0 - 0.45).collect();
        let weight = b.constant(&format!("{name}/weight"), &Tensor::new(shape, values));
        let mut value = b.value(&hidden);
        if *name == "value/mean" {
            // The mean over real tokens, as sentence embeddings are exported.
            let ones = b.op("ConstantOfShape", &[b.ints(&[3])], vec![attribute::tensor("value", &Tensor::ints(&[1]))]);
            let free = b.op("Equal", &[value.shape(), b.op("Mul", &[ones, b.ints(&[-1])], vec![])], vec![]);
            let size = b.op("Where", &[free, ones, value.shape()], vec![]);
            let mask = b.op("Expand", &[b.value("attention_mask").reshape(&[0, -1, 1]), size], vec![]);
            let mask = mask.cast(ElementType::F32);
            let sum = |of| b.op("ReduceSum", &[of, b.ints(&[1])], vec![attribute::int("keepdims", 0)]);
            let least = b.constant("value/mean/least", &Tensor::scalar(1e-9f32));
            value = sum(value * mask) * b.op("Clip", &[sum(mask), least], vec![]).reciprocal();
        } else if name.starts_with("value") {
            // The mean over tokens, without its axis.
            value = value.transpose(&[0, 2, 1]).mean_last().reshape(&[0, shape[0] as i64]);
        }
        value = value.matmul(weight);
        if name.starts_with("start") {
            // A position a token, without the axis of one.
            value = value.reshape(&[0, 0]);
        }
        if *name == "value/pooled" {
            // As sentence embeddings are normalised, and scores bounded.
            let axes = || vec![attribute::ints("axes", &[1])];
            let length = b.op("ReduceL2", &[value], axes());
            value = b.op("Sigmoid", &[value * length.reciprocal()], vec![]);
            value = value + b.op("ReduceSum", &[value, b.ints(&[1])], vec![]) * b.op("Clip", &[length], vec![]);
        }
        heads.push(value.named(name).name());
    }
    model.graph_mut().output =
        heads.into_iter().map(|name| ValueInfoProto { name, ..ValueInfoProto::default() }).collect();
    b.patch().apply(&mut model).unwrap();
    model.remove_dead();
    let path = folder.join("teacher.onnx");
    model.save(&path).unwrap();
    path
}

#[test]
fn every_kind_of_head_is_trained() {
    let folder = tempfile::tempdir().unwrap();
    let kinds: [&[(&str, &[usize])]; 8] = [
        &[("inner", &[]), ("tags", &[128, 3])],
        &[("value/pooled", &[128, 5])],
        &[("value/mean", &[128, 5])],
        &[("start", &[128, 1])],
        &[("tags", &[128, 7])],
        &[("hidden", &[])],
        &[("value", &[128, 1])],
        &[("tags", &[128, 3]), ("value", &[128, 1])],
    ];
    for outputs in kinds {
        let path = with_head(folder.path(), outputs);
        let (student, report) = rewrite_file(&path, &job(some_steps(150))).unwrap();
        let (before, after) = losses(&report);
        let both = |of: &Losses| of.hidden + of.outputs;
        assert!(both(&after) < 0.97 * both(&before), "{outputs:?}: {before:?} {after:?}");
        let has_head = outputs.iter().any(|(name, _)| *name != "hidden" && *name != "inner");
        assert_eq!(before.outputs > 0.0, has_head, "{outputs:?}: {before:?}");
        assert!(!has_head || after.outputs < before.outputs, "{outputs:?}: {before:?} {after:?}");
        assert_eq!(student.outputs().len(), outputs.len());
    }
}

/// The fixture without its mask, or with sizes that are fixed.
fn with_inputs(folder: &Path, mask: bool, dims: &[&str]) -> PathBuf {
    let mut model = Model::load(teacher()).unwrap();
    let mut inputs = vec!["input_ids", "token_type_ids"];
    if mask {
        inputs.push("attention_mask");
    } else {
        let b = Builder::new(model.opset(), "mask");
        let ids = b.value("input_ids");
        b.op("Expand", &[b.ints(&[1]), ids.shape()], vec![]).named("attention_mask");
        model.graph_mut().input.retain(|input| input.name != "attention_mask");
        b.patch().apply(&mut model).unwrap();
    }
    let boundary = |name: &&str| Boundary::symbolic(name, ElementType::I64, dims);
    let path = folder.join(format!("{mask}-{}.onnx", dims.join("-")));
    model.extract(&inputs.iter().map(boundary).collect::<Vec<_>>(), &["logits"]).unwrap().save(&path).unwrap();
    path
}

#[test]
fn other_inputs_and_what_is_kept_or_shared_are_trained() {
    let folder = tempfile::tempdir().unwrap();
    let gains = |path: &Path, job: Job| {
        let (student, report) = rewrite_file(path, &job).unwrap();
        let (before, after) = losses(&report);
        let both = |of: &Losses| of.hidden + of.outputs;
        assert!(both(&after) < both(&before) && report.full.as_ref().unwrap().kept, "{before:?} {after:?}");
        (student, report)
    };
    // So few steps gain on networks; hinges begin nearer.
    let usual = || job(some_steps(200)).softmax(Form::Network);
    gains(&with_inputs(folder.path(), false, &["batch", "16"]), usual());
    let (fixed, _) = gains(&with_inputs(folder.path(), true, &["2", "16"]), usual());
    assert_eq!(fixed.inputs()[0].dims, Some(vec![Dim::Fixed(2), Dim::Fixed(16)]));
    let (unmasked, _) = gains(&with_inputs(folder.path(), false, &["batch", "n"]), usual());
    assert_eq!(unmasked.inputs().len(), 2);
    gains(&teacher(), usual().sharing(Sharing::Shared).length_tables(false));
    let softmax = Keep { softmax: true, ..Keep::default() };
    let (_, report) = gains(&teacher(), usual().keep(softmax));
    assert!(report.operators_after.contains_key("Softmax"));
    let norms = Keep { norm: true, ..Keep::default() };
    let (_, report) = gains(&teacher(), usual().keep(norms));
    assert!(report.operators_after.contains_key("LayerNormalization"));
}

#[test]
fn labels_that_do_not_fit_the_head_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut full = some_steps(1);
    full.alpha = 0.5;
    let refused = |path: &Path, job: Job| rewrite_file(path, &job).unwrap_err().to_string();
    let tags = with_head(folder.path(), &[("tags", &[128, 7])]);
    assert!(refused(&tags, job(full)).contains("labels cannot be used"));
    let data = folder.path().join("labels.tsv");
    let lines = (0..40).map(|number| format!("good film number {number}\t2\n"));
    std::fs::write(&data, "text\tlabel\n".to_owned() + &lines.collect::<String>()).unwrap();
    let data = Data::new(data).columns(reviews(true).columns);
    assert!(refused(&teacher(), job(full).data(data)).contains("label 2 is none of the 2 classes"));
}

#[test]
fn an_unfolded_student_is_trained_on_and_folded() {
    let folder = tempfile::tempdir().unwrap();
    let unfolded = folder.path().join("unfolded.onnx");
    let first = job(some_steps(1)).fold(false).transfer(Transfer::ClosedForm);
    let (model, report) = rewrite_file(&teacher(), &first).unwrap();
    model.save(&unfolded).unwrap();
    let further =
        |start: &Path, steps: usize| stage_job(FullStage { start: Some(start.to_owned()), ..some_steps(steps).into() });
    let (model, trained) = rewrite_file(&teacher(), &further(&unfolded, 200)).unwrap();
    // It starts where the other ended, and ends closer to the teacher, folded.
    let start = &trained.stages[0];
    assert_eq!(start.stage, "start");
    let far = |a: f64, b: f64| (a - b).abs() / b;
    assert!(far(start.outputs[0].mean_abs, report.outputs[0].mean_abs) < 1e-3, "{start:?} {:?}", report.outputs);
    assert!(trained.outputs[0].mean_abs < 0.95 * report.outputs[0].mean_abs, "{:?}", trained.outputs);
    assert!(trained.fold.norms > 0 && trained.options.fold);

    let folded = folder.path().join("folded.onnx");
    model.save(&folded).unwrap();
    let refused = |teacher: &Path, start: &Path| rewrite_file(teacher, &further(start, 1)).unwrap_err().to_string();
    assert!(refused(&teacher(), &folded).contains("not folded"));
    assert!(refused(&teacher(), &teacher()).contains("no student"));
    let other = with_head(folder.path(), &[("value", &[128, 1])]);
    let mut another = Model::load(&other).unwrap();
    let weight = another.graph().initializer.iter().find(|t| t.dims == [4096, 128]).unwrap().name.clone();
    another.set_constant(&weight, &Tensor::new(&[4096, 128], vec![0.1f32; 4096 * 128]));
    another.save(&other).unwrap();
    let message = refused(&other, &unfolded);
    assert!(message.contains("teacher"), "{message}");
}

/// A model that needs the paper's order gets it, and its unfolded student says so: `transfer` makes the same student again.
#[test]
fn a_student_is_trained_on_in_its_own_order() {
    let folder = tempfile::tempdir().unwrap();
    let unfolded = folder.path().join("unfolded.onnx");
    let ids = folder.path().join("ids.jsonl");
    let row =
        |at: usize| (0..3 + at % 9).map(|i| ((7 * at + 3 * i) % 50 + 5).to_string()).collect::<Vec<_>>().join(",");
    std::fs::write(&ids, (0..80).map(|at| format!("{{\"input_ids\":[{}]}}\n", row(at))).collect::<String>()).unwrap();
    let job = || Job::default().data(Data::new(&ids)).max_seq(16).calibration_tokens(500);
    let (bias, shown) = ("mpnet-classification-torchscript-17", "bert-none-dynamo-20-attentions");
    for (name, form, order) in [
        (bias, Form::Network, Order::Paper),
        (bias, Form::Hinges, Order::Auto),
        (shown, Form::Network, Order::Paper),
        (shown, Form::Hinges, Order::Paper),
    ] {
        let teacher = fixture(&format!("coverage/{name}.onnx"));
        let (model, report) = rewrite_file(&teacher, &job().softmax(form).fold(false)).unwrap();
        assert_eq!(report.options.order, order, "{name}, {form:?}");
        model.save(&unfolded).unwrap();
        let stage = FullStage { start: Some(unfolded.clone()), ..some_steps(1).into() };
        let (_, trained) = rewrite_file(&teacher, &job().transfer(Transfer::Full(stage))).unwrap();
        assert_eq!(trained.options.order, order, "{name}, {form:?}");
        let [before, after] = [&report.outputs[0], &trained.stages[0].outputs[0]].map(|output| output.mean_abs);
        assert!((before - after).abs() < 1e-3 * before, "{name}: {before} {after}");
    }
}

/// Stops a run at a step of the full stage, as killing it would: nothing after it is done.
struct Interrupted {
    at: usize,
    seen: AtomicUsize,
}

impl Progress for Interrupted {
    fn begin(&self, stage: &str, _: usize) {
        if stage == "full" {
            self.seen.store(1, Ordering::Relaxed);
        }
    }

    fn step(&self, _: &str) {
        if self.seen.load(Ordering::Relaxed) > 0 && self.seen.fetch_add(1, Ordering::Relaxed) == self.at {
            std::panic::resume_unwind(Box::new("interrupted"));
        }
    }

    fn end(&self) {
        self.seen.store(0, Ordering::Relaxed);
    }

    fn summary(&self, _: &str) {}
}

#[test]
fn an_interrupted_run_goes_on_as_if_it_were_not() {
    let folder = tempfile::tempdir().unwrap();
    let quick = || job(some_steps(120)).calibration_tokens(1_000);
    let kept = |resume| {
        let checkpoint = Some(CheckpointFolder { path: folder.path().join("state"), resume });
        stage_job(FullStage { checkpoint, ..some_steps(120).into() }).calibration_tokens(1_000)
    };
    let one_thread = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    let uninterrupted = one_thread.install(|| rewrite_file(&teacher(), &quick()).unwrap().0);
    // Before the first state, after one, and 60 steps after what was taken up.
    for at in [20, 77, 60] {
        let interrupted = || {
            let progress = Interrupted { at, seen: AtomicUsize::new(0) };
            rewrite(Model::load(teacher()).unwrap(), &kept(at > 20), &progress)
        };
        let run = one_thread.install(|| std::panic::catch_unwind(std::panic::AssertUnwindSafe(interrupted)));
        assert!(run.is_err(), "it was stopped");
    }
    let (resumed, report) = one_thread.install(|| rewrite_file(&teacher(), &kept(true)).unwrap());
    assert!(report.full.as_ref().unwrap().resumed_at >= 100);
    for (a, b) in uninterrupted.graph().initializer.iter().zip(&resumed.graph().initializer) {
        assert!(a == b, "`{}` is not bit by bit the same", a.name);
    }
    assert!(resumed.proto() == uninterrupted.proto(), "as little are metadata");

    assert_eq!(report.full.unwrap().ended, Ended::StepsTaken);

    let refused = |job: Job| rewrite_file(&teacher(), &job).unwrap_err().to_string();
    assert!(refused(kept(false)).contains("go on with it"));
    let other = refused(kept(true).seed(9));
    assert!(other.contains("`seed` was 0, now 9"), "{other}");
    let file = folder.path().join("state/state.safetensors");
    std::fs::write(&file, b"noise").unwrap();
    assert!(refused(kept(true)).contains("state.safetensors"));
}

/// As many steps as fit, in two runs together: the second has what the first left.
#[test]
fn a_time_is_kept_to_and_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let time = Duration::from_secs(40);
    let kept = |resume| {
        let checkpoint = Some(CheckpointFolder { path: folder.path().join("state"), resume });
        let mut options = FullOptions::default();
        (options.time, options.batch) = (Some(time), Some(2));
        stage_job(FullStage { options, checkpoint, ..FullStage::default() }).calibration_tokens(500)
    };
    let begun = Instant::now();
    let progress = Interrupted { at: 53, seen: AtomicUsize::new(0) };
    let interrupted = || rewrite(Model::load(teacher()).unwrap(), &kept(false), &progress);
    assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(interrupted)).is_err(), "it was stopped");
    let report = rewrite_file(&teacher(), &kept(true)).unwrap().1;
    let full = report.full.unwrap();
    assert_eq!(full.resumed_at, 50);
    assert!(full.taken > 50 && full.taken <= full.planned, "{} of {}", full.taken, full.planned);
    assert!(full.ended != Ended::StepsTaken || full.taken == full.planned);
    // A machine that is busy with other tests takes longer before the steps and behind them.
    assert!(begun.elapsed() < 3 * time, "{:?}", begun.elapsed());
}

#[test]
fn a_checkpoint_is_refused_once_the_weights_beside_the_model_changed() {
    let folder = tempfile::tempdir().unwrap();
    let path = mabert_tests::save_as_optimum(&Model::load(teacher()).unwrap(), folder.path());
    let state = |resume| {
        let checkpoint = Some(CheckpointFolder { path: folder.path().join("state"), resume });
        let full = FullOptions::default().with_steps(2, 4);
        stage_job(FullStage { checkpoint, ..full.into() }).calibration_tokens(500)
    };
    rewrite_file(&path, &state(false)).unwrap();
    assert_eq!(rewrite_file(&path, &state(true)).unwrap().1.full.unwrap().resumed_at, 2);
    let data = folder.path().join("model.onnx_data");
    let mut weights = std::fs::read(&data).unwrap();
    // The lowest bit of the first number.
    weights[0] ^= 1;
    std::fs::write(&data, weights).unwrap();
    let refused = rewrite_file(&path, &state(true)).unwrap_err().to_string();
    assert!(refused.contains("`model` was"), "{refused}");
}

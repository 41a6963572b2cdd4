//! The hot pieces, on the small model that comes with the sources: teacher and student, short and long texts, one and many.
//!
//! `cargo bench -p mabert-tests` runs them; `onnx-mabert bench` compares models and engines in turn, which is what to report.

use std::sync::LazyLock;

use divan::Bencher;
use divan::counter::ItemsCount;
use mabert_graph::Model as Graph;
use mabert_passes::pipeline::Rewriting;
use mabert_runtime::{LoadOptions, Model, Named, borrowed};
use mabert_tests::{fixture, options, padded_inputs};

/// Sentences and tokens of each.
const SIZES: [(usize, usize); 4] = [(1, 16), (1, 64), (8, 16), (8, 64)];
const WORDS: i64 = 2_000;

fn main() {
    divan::main();
}

fn teacher() -> Graph {
    Graph::load(fixture("bert-mini-sst2/model.onnx")).expect("a fixture")
}

/// Not calibrated, which costs the same time.
static STUDENT: LazyLock<Graph> = LazyLock::new(|| {
    let mut options = options();
    options.approximator.max_seq = 64;
    options.approximator.hidden = 64;
    let rewriting = Rewriting::new(teacher(), options).expect("an encoder");
    let mut student = rewriting.approximate().expect("a student");
    student.finish().expect("exact passes");
    student.model
});

fn run(bencher: Bencher<'_, '_>, model: &Model, (batch, length): (usize, usize)) {
    let inputs: Named = padded_inputs(model.inputs(), batch, length, WORDS, 3);
    let inputs = borrowed(&inputs);
    bencher.counter(ItemsCount::new(batch * length)).bench_local(|| model.run(&inputs).expect("a run"));
}

#[divan::bench(args = SIZES)]
fn student_fused(bencher: Bencher<'_, '_>, size: (usize, usize)) {
    run(bencher, &LoadOptions::default().prepare(&STUDENT).expect("a model"), size);
}

#[divan::bench(args = SIZES)]
fn student_on_plain_tract(bencher: Bencher<'_, '_>, size: (usize, usize)) {
    run(bencher, &LoadOptions::default().plain().prepare(&STUDENT).expect("a model"), size);
}

#[divan::bench(args = SIZES)]
fn teacher_fused(bencher: Bencher<'_, '_>, size: (usize, usize)) {
    run(bencher, &LoadOptions::default().prepare(&teacher()).expect("a model"), size);
}

#[divan::bench]
fn load_and_prepare(bencher: Bencher<'_, '_>) {
    bencher.bench_local(|| LoadOptions::default().load(fixture("bert-mini-sst2/model.onnx")).expect("a model"));
}

#[divan::bench]
fn recognise(bencher: Bencher<'_, '_>) {
    let mut model = teacher();
    mabert_passes::pipeline::simplify(&mut model).expect("a graph");
    bencher.bench_local(|| mabert_passes::recognise::recognise(&model).expect("a graph that runs"));
}

#[divan::bench]
fn check_inputs(bencher: Bencher<'_, '_>) {
    let model = LoadOptions::default().prepare(&STUDENT).expect("a model");
    let inputs = padded_inputs(model.inputs(), 8, 64, WORDS, 3);
    let inputs = borrowed(&inputs);
    bencher.bench_local(|| model.check(&inputs).expect("good inputs"));
}

//! Twin tests of the passes: the graph before and after a pass, run on the same inputs.

use mabert_graph::{Model, Tensor};
use mabert_passes::lower::{ApproximatorOptions, Sharing};
use mabert_passes::pipeline::{Order, Pass, PassOptions, Rewriting, Student};
use mabert_runtime::Model as Runnable;
use mabert_runtime::borrowed;
use mabert_tests::{MAX_SEQ, distance, exports, fixture, padded_inputs};

fn options(order: Order, sharing: Sharing, length_tables: bool) -> PassOptions {
    let default = mabert_tests::options();
    PassOptions {
        approximator: ApproximatorOptions { sharing, length_tables, ..default.approximator },
        order,
        ..default
    }
}

fn export(name: &str) -> Model {
    Model::load(fixture(&format!("exports/{name}/model.onnx"))).unwrap()
}

fn student(model: Model, options: PassOptions) -> Student {
    let mut student = Rewriting::new(model, options).unwrap().approximate().unwrap();
    student.finish().unwrap();
    student
}

/// The largest difference over batch sizes, lengths and masks, relative to outputs above 1: a student that is not
/// calibrated yet gives large ones. Sentences are padded to different lengths.
fn furthest(a: &Model, b: &Model) -> f32 {
    let [a, b] = [a, b].map(|m| mabert_runtime::LoadOptions::default().prepare(m).unwrap());
    let mut worst = 0f32;
    for (batch, length) in [(1, 1), (1, 7), (3, MAX_SEQ), (2, 5)] {
        let inputs = padded_inputs(a.inputs(), batch, length, 64, 5 + length as u64);
        let (x, y) = (a.run(&borrowed(&inputs)).unwrap(), b.run(&borrowed(&inputs)).unwrap());
        let largest = x[0].1.to_f32().iter().fold(1f32, |m, v| m.max(v.abs()));
        worst = worst.max(distance(&x[0].1, &y[0].1) / largest);
    }
    worst
}

#[test]
fn the_canonical_form_is_exact_on_every_export() {
    for folder in exports() {
        let model = Model::load(folder.join("model.onnx")).unwrap();
        let rewriting = Rewriting::new(model.clone(), options(Order::Linear, Sharing::PerHead, true)).unwrap();
        let far = furthest(&model, &rewriting.teacher);
        assert!(far < 1e-4, "{}: {far}", folder.display());
    }
}

#[test]
fn both_orders_of_attention_are_equal() {
    for (sharing, tables) in
        [(Sharing::PerHead, true), (Sharing::PerHead, false), (Sharing::PerLayer, true), (Sharing::Shared, true)]
    {
        let [linear, paper] = [Order::Linear, Order::Paper]
            .map(|order| student(export("bert-sdpa-torchscript-17"), options(order, sharing, tables)));
        assert!(linear.ran(Pass::Reassociate) && !paper.ran(Pass::Reassociate));
        let far = furthest(&linear.model, &paper.model);
        assert!(far < 1e-4, "{sharing:?}, tables {tables}: {far}");
    }
}

/// Of every export, those with biases by position, without masks and with probabilities as outputs among them.
#[test]
fn hinges_without_probabilities_are_equal() {
    for folder in exports() {
        let model = Model::load(folder.join("model.onnx")).unwrap();
        let approximator = ApproximatorOptions::hinges(MAX_SEQ, MAX_SEQ);
        let [auto, paper] = [Order::Auto, Order::Paper].map(|order| {
            let options = PassOptions { approximator, order, ..mabert_tests::options() };
            student(model.clone(), options)
        });
        let far = furthest(&auto.model, &paper.model);
        assert!(far < 1e-4, "{}: {far}", folder.display());
        assert_eq!(auto.ran(Pass::Reassociate), !auto.encoder.shows_probabilities(), "{}", folder.display());
    }
}

#[test]
fn folding_is_exact() {
    let unfolded = PassOptions { fold: false, ..options(Order::Linear, Sharing::PerHead, true) };
    for name in ["bert-eager-torchscript-11", "distilbert-sdpa-dynamo-18", "roberta-sdpa-torchscript-17"] {
        let with = student(export(name), options(Order::Linear, Sharing::PerHead, true));
        let without = student(export(name), unfolded.clone());
        assert_eq!(with.fold.norms, 5);
        let far = furthest(&with.model, &without.model);
        assert!(far < 1e-4, "{name}: {far}");
    }
}

#[test]
fn a_sentence_alone_equals_itself_inside_a_padded_batch() {
    let student = student(export("bert-eager-torchscript-17"), options(Order::Linear, Sharing::PerHead, true));
    let model = mabert_runtime::LoadOptions::default().prepare(&student.model).unwrap();
    let run = |model: &Runnable, ids: &[i64], mask: &[i64], batch: usize| -> Tensor {
        let shape = [batch, ids.len() / batch];
        let inputs = [
            ("input_ids", Tensor::new(&shape, ids.to_vec())),
            ("attention_mask", Tensor::new(&shape, mask.to_vec())),
            ("token_type_ids", Tensor::new(&shape, vec![0i64; ids.len()])),
        ];
        model.run(&borrowed(&inputs)).unwrap().remove(0).1
    };
    let alone = run(&model, &[7, 9, 11], &[1, 1, 1], 1).to_f32();
    let padded = run(&model, &[20, 21, 22, 23, 24, 7, 9, 11, 33, 44], &[1, 1, 1, 1, 1, 1, 1, 1, 0, 0], 2).to_f32();
    for c in 0..3 {
        approx::assert_abs_diff_eq!(alone[[0, c]], padded[[1, c]], epsilon = 1e-4);
    }
}

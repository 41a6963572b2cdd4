//! Numbers that break things: weights at the edges of what a model may hold, and inputs at the edges of what it takes.

use mabert_graph::{Model, Tensor};
use mabert_passes::lower::Form;
use mabert_runtime::{Engine, Model as Runnable, OrtModel, borrowed};
use mabert_tests::{distance, fixture};
use mabert_transfer::Error;
use mabert_transfer::job::{Data, Job, Report, rewrite};
use mabert_transfer::progress::Silent;

const WORDS: &str = "m.bert.embeddings.word_embeddings.weight";
const FIRST_NORM: &str = "m.bert.embeddings.LayerNorm";
const NORM: &str = "m.bert.encoder.layer.1.output.LayerNorm";
const CHANNELS: usize = 128;

/// An initializer, and what becomes of each of its elements.
type Change<'c> = (&'c str, &'c dyn Fn(usize, f32) -> f32);

/// The fixture with some of its initializers changed.
fn teacher(changes: &[Change<'_>]) -> Model {
    let mut model = Model::load(fixture("bert-mini-sst2/model.onnx")).unwrap();
    for (name, change) in changes {
        let mut value = model.constant(name).unwrap().to_f32();
        value.iter_mut().enumerate().for_each(|(at, v)| *v = change(at, *v));
        model.set_constant(name, &Tensor::from(value));
    }
    model
}

fn calibrated(model: &Model) -> Result<(Model, Report), Error> {
    let data = Data::new(fixture("reviews/reviews.tsv"));
    let tokenizer = fixture("bert-mini-sst2/tokenizer.json");
    let job = Job::default().data(data).tokenizer(tokenizer).calibration_tokens(4_000);
    rewrite(model.clone(), &job, &Silent)
}

type Inputs = [(&'static str, Tensor); 3];

/// Token ids `[batch, n]`, of which the first `real` count in each row.
fn inputs(batch: usize, n: usize, real: &[usize]) -> Inputs {
    let ids = (0..batch * n).map(|i| (5 + i * 37 % 4000) as i64).collect();
    let mask = (0..batch * n).map(|i| i64::from(i % n < real[i / n])).collect();
    let of = |values: Vec<i64>| Tensor::new(&[batch, n], values);
    [("input_ids", of(ids)), ("attention_mask", of(mask)), ("token_type_ids", of(vec![0; batch * n]))]
}

/// A model on both engines.
fn engines(model: &Model) -> [Box<dyn Engine>; 2] {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    model.save(&path).unwrap();
    [Box::new(Runnable::load(&path).unwrap()), Box::new(OrtModel::load(&path, 1).unwrap())]
}

fn logits(engine: &dyn Engine, inputs: &Inputs) -> Tensor {
    engine.run(&borrowed(inputs)).unwrap().remove(0).1
}

/// Values of the encoder may overflow and the head's Tanh bound them: counted all the same, as onnxruntime shows them.
#[test]
fn what_overflows_before_a_bounded_head_is_counted() {
    let weights = [0, 1, 2].map(|layer| format!("m.bert.encoder.layer.{layer}.intermediate.dense.bias"));
    let grow = |_: usize, bias: f32| bias + 1e16;
    let changes: Vec<Change<'_>> =
        weights.iter().map(|name| (name.as_str(), &grow as &dyn Fn(usize, f32) -> f32)).collect();
    let model = teacher(&changes);
    let job = Job::default().transfer(mabert_transfer::job::Transfer::None).max_seq(16).softmax(Form::Network);
    let (student, report) = rewrite(model, &job, &Silent).unwrap();
    let [tract, ort] = engines(&student);
    for engine in [tract, ort] {
        assert!(!is_finite(&logits(&*engine, &inputs(1, 5, &[5]))));
    }
    assert_eq!(report.odd_inputs.overflow, report.odd_inputs.sequences);
}

fn is_finite(value: &Tensor) -> bool {
    value.to_f32().iter().all(|v| v.is_finite())
}

/// The student of a changed teacher, which both engines agree on, and the share of its teacher's answers that it gives.
fn sound(changes: &[Change<'_>]) -> (Model, Report, f64) {
    let (student, report) = calibrated(&teacher(changes)).unwrap();
    assert!(report.misses.is_empty());
    assert_eq!(report.odd_inputs.overflow, 0);
    let [tract, ort] = engines(&student);
    for (batch, n, real) in [(1, 7, &[7][..]), (3, 20, &[20, 1, 9])] {
        let (a, b) = (logits(&*tract, &inputs(batch, n, real)), logits(&*ort, &inputs(batch, n, real)));
        assert!(is_finite(&a) && distance(&a, &b) < 1e-3, "{a:?} {b:?}");
    }
    let agreement = report.outputs[0].agreement.unwrap();
    (student, report, agreement)
}

fn channel(of: usize) -> impl Fn(usize) -> bool {
    move |at| at % CHANNELS == of
}

#[test]
fn a_channel_without_variance_is_calibrated() {
    // Nothing but zeros goes into the first norm's channel.
    let here = channel(3);
    let tables =
        [WORDS, "m.bert.embeddings.position_embeddings.weight", "m.bert.embeddings.token_type_embeddings.weight"];
    let silent = |at: usize, v: f32| if here(at) { 0.0 } else { v };
    let changes: Vec<Change<'_>> = tables.iter().map(|t| (*t, &silent as _)).collect();
    let (_, _, agreement) = sound(&changes);
    assert!(agreement > 0.85, "{agreement}");
}

#[test]
fn a_channel_of_zero_gamma_is_calibrated() {
    let weight = format!("{NORM}.weight");
    let (_, _, agreement) = sound(&[(&weight, &|at, v| if at == 3 { 0.0 } else { v })]);
    assert!(agreement > 0.85, "{agreement}");
}

#[test]
fn a_channel_of_tiny_gamma_keeps_an_explicit_scale() {
    let weight = format!("{FIRST_NORM}.weight");
    let (_, report, agreement) = sound(&[(&weight, &|at, v| if at == 3 { 1e-30 } else { v })]);
    assert!(report.fold.explicit_channels > 0, "{:?}", report.fold);
    assert!(agreement > 0.85, "{agreement}");
}

#[test]
fn a_norm_of_zero_gamma_is_refused() {
    let weight = format!("{NORM}.weight");
    let refused = calibrated(&teacher(&[(&weight, &|_, _| 0.0)])).unwrap_err().to_string();
    assert!(refused.contains("its result does not depend on its input"), "{refused}");
}

#[test]
fn huge_activations_are_calibrated() {
    // What goes into the first norm is a million times as large, and comes out the same.
    let tables =
        [WORDS, "m.bert.embeddings.position_embeddings.weight", "m.bert.embeddings.token_type_embeddings.weight"];
    let huge = |_: usize, v: f32| v * 1e6;
    let changes: Vec<Change<'_>> = tables.iter().map(|t| (*t, &huge as _)).collect();
    let (_, _, agreement) = sound(&changes);
    let (_, _, expected) = sound(&[]);
    assert!(agreement > expected - 0.03, "{agreement} against {expected}");
}

#[test]
fn weights_that_are_no_numbers_are_named() {
    for (bad, word) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        let refused =
            calibrated(&teacher(&[(WORDS, &|at, v| if at == 70 { bad } else { v })])).unwrap_err().to_string();
        assert!(refused.contains(WORDS) && refused.contains(word) && refused.contains("element 70"), "{refused}");
    }
}

#[test]
fn one_token_all_padding_and_nothing_are_defined() {
    let teacher = teacher(&[]);
    let (student, _) = calibrated(&teacher).unwrap();
    for model in [&teacher, &student] {
        let [tract, ort] = engines(model);
        let both = |inputs: &Inputs| (logits(&*tract, inputs), logits(&*ort, inputs));
        let (a, b) = both(&inputs(1, 1, &[1]));
        assert!(is_finite(&a) && distance(&a, &b) < 1e-4, "one token: {a:?} {b:?}");
        // A row of padding alone means nothing, but it is finite, and the rows beside it are as they are without it.
        let (a, b) = both(&inputs(2, 9, &[9, 0]));
        let alone = logits(&*tract, &inputs(1, 9, &[9]));
        let first = |t: &Tensor| Tensor::from(t.to_f32().slice_axis(ndarray::Axis(0), (..1).into()).into_owned());
        assert!(is_finite(&a) && is_finite(&b), "padding: {a:?} {b:?}");
        assert!(distance(&first(&a), &alone) < 1e-4 && distance(&first(&b), &alone) < 1e-4, "{a:?} {b:?} {alone:?}");
        for empty in [inputs(0, 9, &[]), inputs(2, 0, &[0, 0])] {
            let refused = tract.run(&borrowed(&empty)).unwrap_err().to_string();
            assert!(refused.contains("input_ids") && refused.contains("is empty"), "{refused}");
        }
    }
}

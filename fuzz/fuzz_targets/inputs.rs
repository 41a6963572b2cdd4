//! Any inputs to a model that is sound: refused, or run.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use mabert_runtime::{Model, Tensor};

static MODEL: LazyLock<Model> = LazyLock::new(|| {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../fixtures/coverage/roberta-classification-torchscript-17.onnx");
    Model::load(path).expect("a fixture")
});

fuzz_target!(|bytes: &[u8]| {
    let [batch, length, kind, values @ ..] = bytes else { return };
    let (batch, length) = (usize::from(batch % 5), usize::from(length % 48));
    let value = |at: usize| i64::from(values.get(at % values.len().max(1)).copied().unwrap_or(0)) - 32;
    let made = |offset: usize| {
        let ids = (0..batch * length).map(|at| value(at + offset)).collect();
        Tensor::new(&[batch, length], ids)
    };
    let mask = if kind & 1 == 0 { made(7) } else { Tensor::new(&[batch, length], vec![1i64; batch * length]) };
    let inputs = [("input_ids", made(0)), ("attention_mask", mask), ("token_type_ids", made(3))];
    _ = MODEL.run(&inputs[..if kind & 2 == 0 { 2 } else { 3 }]);
});

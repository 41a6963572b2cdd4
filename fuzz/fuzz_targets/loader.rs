//! Any bytes as a model: read, indexed, spelled out, written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mabert_graph::{Index, Model};

fuzz_target!(|bytes: &[u8]| {
    let Ok(mut model) = Model::from_bytes(bytes) else { return };
    let written = model.to_bytes().expect("what was read can be written");
    let again = Model::from_bytes(&written).expect("what was written can be read");
    // A number in an attribute may be NaN, which equals nothing; unknown fields are written in any order.
    assert!(again.proto() == model.proto() || format!("{:?}", model.proto()).contains("NaN"));
    _ = mabert_graph::text::render(&model, &Default::default());
    _ = (model.inputs(), model.outputs(), model.operators());
    _ = Index::new(&model);
    for tensor in &model.graph().initializer {
        _ = mabert_graph::Tensor::from_proto(tensor);
    }
    _ = mabert_graph::inline_functions(&mut model);
    _ = mabert_graph::widen_half(&mut model);
    _ = mabert_graph::decompose_fused(&mut model);
    _ = mabert_graph::narrow_to_half(&mut model);
});

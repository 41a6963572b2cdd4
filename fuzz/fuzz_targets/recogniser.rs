//! Any bytes as a model to be rewritten.
#![no_main]

use libfuzzer_sys::fuzz_target;
use mabert_graph::Model;

fuzz_target!(|bytes: &[u8]| {
    let Ok(mut model) = Model::from_bytes(bytes) else { return };
    if mabert_passes::rewrite::prepare(&mut model).is_ok() {
        _ = mabert_passes::recognise::recognise(&model);
    }
});

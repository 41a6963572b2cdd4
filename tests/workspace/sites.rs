//! The same sites whichever exporter spelled them.

use mabert_graph::Model;
use mabert_passes::{pipeline::simplify, recognise::recognise};
use mabert_tests::{exports, fixture};

#[test]
fn every_export_has_the_same_sites() {
    for folder in exports() {
        let mut model = Model::load(folder.join("model.onnx")).unwrap();
        simplify(&mut model).unwrap();
        let found = recognise(&model).unwrap();
        assert!(found.misses.is_empty(), "{}: {:#?}", folder.display(), found.misses);
        let counts = (found.attentions.len(), found.norms.len());
        assert_eq!(counts, (2, 5), "{}", folder.display());
        let encoder = found.encoder.expect("an encoder");
        assert_eq!((encoder.layers.len(), encoder.heads(), encoder.head_size()), (2, 4, 4), "{}", folder.display());
        assert_eq!(encoder.mask.as_ref().map(|m| m.input.as_str()), Some("attention_mask"));
        for layer in &encoder.layers {
            // Once folded into the weights, the scale of the scores is 1 / sqrt(d) wherever the exporter put it.
            let scale = layer.attention.scale * layer.query.scale * layer.key.scale;
            assert!((scale - 0.5).abs() < 1e-4, "{}: {scale}", folder.display());
            let epsilon = layer.output_norm.epsilon;
            let expected = if folder.ends_with("distilbert-sdpa-dynamo-18") { 1e-12 } else { 1e-5 };
            assert!((epsilon - expected).abs() < 1e-6, "{}: {epsilon}", folder.display());
        }
    }
}

#[test]
fn the_fixture_has_three_layers() {
    let mut model = Model::load(fixture("bert-mini-sst2/model.onnx")).unwrap();
    simplify(&mut model).unwrap();
    let found = recognise(&model).unwrap();
    assert!(found.misses.is_empty(), "{:#?}", found.misses);
    assert_eq!((found.attentions.len(), found.activations.len(), found.norms.len()), (3, 3, 7));
}

//! The structure of rewritten models: the same whichever exporter spelled the teacher.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use mabert_graph::Model;
use mabert_graph::text::render_nodes;
use mabert_passes::contract::non_linear_nodes;
use mabert_passes::pipeline::Rewriting;
use mabert_passes::recording::symbolic_shapes;
use mabert_tests::{exports, fixture, options};

struct Structure {
    operators: BTreeMap<String, usize>,
    layer: String,
}

/// Rewrites an export; checks that nothing but matrix arithmetic is left in the encoder.
fn structure(folder: &std::path::Path) -> Structure {
    let model = Model::load(folder.join("model.onnx")).unwrap();
    let rewriting = Rewriting::new(model, options()).unwrap();
    let mut student = rewriting.approximate().unwrap();
    student.finish().unwrap();
    let end = &student.encoder.layers.last().unwrap().output_norm.output;
    let mask = rewriting.encoder.mask.as_ref().map(|m| m.input.as_str());
    let left = non_linear_nodes(&student.model, mask, Some(end)).unwrap();
    assert!(left.iter().all(|n| n.in_head), "{}: {left:?}", folder.display());
    let shapes = symbolic_shapes(&student.model).unwrap();
    let layer = render_nodes(&student.model, &shapes, |node| node.name.starts_with("layer.1/"));
    Structure { operators: student.model.operators(), layer }
}

/// Every export's operators, and the text form of a layer, which all exports of a family must share.
#[test]
fn every_export_is_rewritten_to_the_same_layer() {
    let mut layers: BTreeMap<String, String> = BTreeMap::new();
    let mut table = String::new();
    for folder in exports() {
        let name = folder.file_name().unwrap().to_string_lossy().into_owned();
        let found = structure(&folder);
        let counts: Vec<String> = found.operators.iter().map(|(op, n)| format!("{op} {n}")).collect();
        writeln!(table, "{name}: {}", counts.join(", ")).unwrap();
        let family = name.split('-').next().unwrap().to_owned();
        let first = layers.entry(family).or_insert_with(|| found.layer.clone());
        assert_eq!(*first, found.layer, "{name}");
    }
    insta::assert_snapshot!("operators_after", table);
    assert_eq!(layers.len(), 3);
    // The families differ in what surrounds their layers, not in the layers.
    assert_eq!(layers["bert"], layers["roberta"]);
    assert_eq!(layers["bert"], layers["distilbert"]);
    insta::assert_snapshot!("layer_after", layers["bert"]);
}

#[test]
fn the_fixture_is_rewritten_to_this_layer() {
    insta::assert_snapshot!("bert_mini_layer_after", structure(&fixture("bert-mini-sst2")).layer);
}

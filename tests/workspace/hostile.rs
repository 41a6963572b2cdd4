//! Files that are broken on purpose: refused with a reason, never a panic.

use std::panic::{AssertUnwindSafe, catch_unwind};

use mabert_graph::proto::{GraphProto, Message as _, NodeProto};
use mabert_graph::{Model, Tensor};
use mabert_passes::pipeline::Rewriting;
use mabert_tests::{fixture, options};
use proptest::prelude::*;

fn small() -> Vec<u8> {
    std::fs::read(fixture("coverage/bert-classification-torchscript-11-eager.onnx")).expect("a fixture")
}

/// All that is done with a file before anyone trusts it.
fn everything(bytes: &[u8]) {
    let Ok(model) = Model::from_bytes(bytes) else { return };
    _ = model.to_bytes();
    _ = mabert_graph::text::render(&model, &Default::default());
    _ = mabert_runtime::Model::from_bytes(bytes);
    _ = Rewriting::new(model, options());
}

fn no_panic(what: &str, work: impl FnOnce()) -> Result<(), TestCaseError> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|_| TestCaseError::fail(format!("a panic on {what}")))
}

/// What `fuzz/` does to bytes under libFuzzer, here with a few random ones.
#[path = "../../fuzz/targets.rs"]
mod targets;

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn changed_bytes_are_no_panic(changes in prop::collection::vec((0usize..1 << 20, any::<u8>()), 1..24), cut in 0usize..1 << 18) {
        let mut bytes = small();
        let length = bytes.len();
        for (at, value) in &changes {
            bytes[at % length] = *value;
        }
        if cut % 3 == 0 {
            bytes.truncate(cut % length);
        }
        no_panic("changed bytes", || everything(&bytes))?;
    }

    #[test]
    fn fuzzed_exports_are_no_panic(bytes in prop::collection::vec(any::<u8>(), 1..74)) {
        no_panic("a changed export", || targets::recogniser(&bytes))?;
    }

    #[test]
    fn fuzzed_inputs_are_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        no_panic("inputs", || targets::inputs(&bytes))?;
    }

    /// Nodes keep their form and lose their sense: operands dropped, doubled, or taken from elsewhere.
    #[test]
    fn changed_wiring_is_no_panic(changes in prop::collection::vec((any::<u16>(), any::<u16>(), 0u8..8), 1..6)) {
        let mut model = Model::from_bytes(&small()).unwrap();
        for (at, other, kind) in &changes {
            let graph = model.graph_mut();
            let count = graph.node.len();
            let (at, other) = (usize::from(*at) % count, usize::from(*other) % count);
            let taken = graph.node[other].output.first().cloned().unwrap_or_default();
            let operator = graph.node[other].op_type.clone();
            let node = &mut graph.node[at];
            match kind {
                0 => _ = node.input.pop(),
                1 => node.input.push(taken),
                2 => node.input.clear(),
                3 => node.output.clear(),
                4 => node.attribute.clear(),
                5 => _ = node.input.first_mut().map(|input| *input = taken),
                6 => node.op_type = operator,
                _ => {
                    if let Some(tensor) = graph.initializer.get_mut(other % 40) {
                        tensor.dims.push(i64::from(*kind) - 9);
                    }
                }
            }
        }
        let bytes = model.proto().write_to_bytes().unwrap();
        no_panic("changed wiring", || everything(&bytes))?;
    }
}

/// Two bytes a level, all unknown to ONNX: protobuf would go down as far as the file is long.
#[test]
fn nested_groups_are_refused_before_they_are_followed() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let grouped = [0xa3, 0x06].repeat(1 << 20);
    std::fs::write(file.path(), &grouped).unwrap();
    for refused in [Model::from_bytes(&grouped), Model::load(file.path())] {
        let reason = refused.unwrap_err().to_string();
        assert!(reason.contains("a group, which ONNX does not have, at byte 0"), "{reason}");
    }
    let mut inside = small();
    inside.extend(&grouped);
    assert!(Model::from_bytes(&inside).is_err());
}

#[test]
fn deep_and_wide_graphs_are_refused_or_handled() {
    let mut model = Model::from_bytes(&small()).unwrap();
    // A thousand subgraphs, one in the other.
    let mut inner = GraphProto::default();
    for _ in 0..1_000 {
        let mut node = NodeProto { op_type: "If".to_owned(), output: vec!["y".to_owned()], ..NodeProto::default() };
        node.input.push("condition".to_owned());
        let attribute = mabert_graph::proto::AttributeProto {
            name: "then_branch".to_owned(),
            g: Some(std::mem::take(&mut inner)).into(),
            ..Default::default()
        };
        node.attribute.push(attribute);
        inner.node.push(node);
    }
    model.graph_mut().node.extend(inner.node);
    let bytes = std::thread::Builder::new()
        .stack_size(256 << 20)
        .spawn(move || model.proto().write_to_bytes().unwrap())
        .unwrap()
        .join()
        .unwrap();
    assert!(Model::from_bytes(&bytes).is_err());
    // A constant that claims a size no machine has.
    let mut model = Model::from_bytes(&small()).unwrap();
    let name = model.graph().initializer[0].name.clone();
    let mut tensor = Tensor::new(&[1], vec![1f32]).to_proto(&name);
    tensor.dims = vec![i64::MAX, 4];
    model.graph_mut().initializer[0] = tensor;
    let message = Rewriting::new(model, options()).unwrap_err().to_string();
    assert!(message.contains("impossible shape") || message.contains(&name), "{message}");
}

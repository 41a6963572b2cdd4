//! Files that are broken on purpose: refused with a reason, never a panic.

use std::io::{BufRead as _, BufReader};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

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

/// The seeds of mutated models that a child works on, one after the other: `FROM..TO`.
const SEEDS: &str = "MABERT_MUTATIONS";
/// Seconds that one mutated model may take: a hundred times what most do.
const LONGEST: Duration = Duration::from_secs(60);

/// Models whose attributes, operands and constants make no sense are refused or run: in bounded time and memory, with no
/// panic and no end of the process. `MABERT_MUTATIONS=0..5000` tries more of them.
#[test]
fn mutated_models_end_in_bounded_time_and_memory() {
    let range = std::env::var(SEEDS).unwrap_or_else(|_| "0..160".to_owned());
    let (from, to) = range.split_once("..").expect("FROM..TO");
    let mut left: Range<u64> = from.parse().unwrap()..to.parse().unwrap();
    let mut faults = Vec::new();
    while !left.is_empty() {
        let Some((seed, fault)) = worked_on(left.clone()) else { break };
        faults.push(format!("seed {seed}: {fault}"));
        left.start = seed + 1;
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

/// The first of the seeds at which a child stopped, and how; `None` where it worked on all of them.
fn worked_on(seeds: Range<u64>) -> Option<(u64, String)> {
    let program = std::env::current_exe().unwrap();
    // Where memory cannot be limited, the test still says what does not end.
    let limited =
        "ulimit -v 6000000 2>/dev/null; exec \"$0\" --exact hostile::works_on_mutated_models --ignored --nocapture";
    let mut child = Command::new("sh")
        .args(["-c", limited])
        .arg(program)
        .env(SEEDS, format!("{}..{}", seeds.start, seeds.end))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || lines.map_while(Result::ok).for_each(|line| _ = sender.send(line)));
    let mut current = seeds.start;
    let fault = loop {
        match receiver.recv_timeout(LONGEST) {
            Ok(line) => match line.split_once(' ') {
                Some(("seed", seed)) => current = seed.parse().unwrap(),
                Some(("panic", what)) => break what.to_owned(),
                _ => {}
            },
            Err(mpsc::RecvTimeoutError::Timeout) => break "no end".to_owned(),
            Err(mpsc::RecvTimeoutError::Disconnected) => match child.wait().unwrap() {
                status if status.success() => return None,
                status => break status.to_string(),
            },
        }
    };
    _ = child.kill();
    _ = child.wait();
    Some((current, fault))
}

/// What the child does.
#[test]
#[ignore = "the child of mutated_models_end_in_bounded_time_and_memory"]
fn works_on_mutated_models() {
    let range = std::env::var(SEEDS).expect("seeds");
    let (from, to) = range.split_once("..").expect("FROM..TO");
    for seed in from.parse::<u64>().unwrap()..to.parse().unwrap() {
        println!("seed {seed}");
        let work = || {
            targets::mutations(&drawn(seed));
            _ = Rewriting::new(targets::mutated(&drawn(seed)), options());
        };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
            let text = panic.downcast_ref::<String>().map(String::as_str).or(panic.downcast_ref::<&str>().copied());
            println!("panic {}", text.unwrap_or("without a word").replace('\n', " "));
        }
    }
}

/// `MABERT_MUTATION=SEED:FILE` writes the mutated model of a seed.
#[test]
#[ignore = "for looking into what a seed gave"]
fn writes_a_mutated_model() {
    let asked = std::env::var("MABERT_MUTATION").expect("SEED:FILE");
    let (seed, file) = asked.split_once(':').expect("SEED:FILE");
    targets::mutated(&drawn(seed.parse().unwrap())).save(file).unwrap();
}

/// Bytes that are the same for the same seed everywhere: SplitMix64's.
fn drawn(seed: u64) -> Vec<u8> {
    let number = |at: u64| {
        let state = seed.wrapping_mul(64).wrapping_add(at).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    };
    (0..64).flat_map(|at| number(at).to_le_bytes()).collect()
}

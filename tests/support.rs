//! What the workspace's tests share: fixtures, seeded inputs, comparisons.

use std::path::{Path, PathBuf};

use mabert_graph::proto::{Message as _, ModelProto, ValueInfoProto};
use mabert_graph::{Builder, ElementType, Model, attribute};
use mabert_passes::lower::ApproximatorOptions;
use mabert_passes::pipeline::{Order, PassOptions};
use mabert_runtime::{Named, Tensor};

/// The longest sequence of the students that the tests make.
pub const MAX_SEQ: usize = 16;

/// How the tests rewrite where it does not matter: everything, for short sequences.
pub fn options() -> PassOptions {
    let approximator = ApproximatorOptions::network(MAX_SEQ, 8);
    PassOptions { order: Order::Linear, ..PassOptions::new(approximator) }
}

/// Models or data that are not in the repository: the folder that the environment names, else `shared/` beside the
/// repository. Tests that need them are ignored by default; `tests/real-models` runs them.
pub fn outside(variable: &str, folder: &str) -> PathBuf {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared").join(folder);
    let path = std::env::var_os(variable).map_or_else(beside, PathBuf::from);
    assert!(path.is_dir(), "{} is not here; set {variable} to the folder that has it", path.display());
    path
}

/// A file or folder under `fixtures/`.
pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures").join(name)
}

/// The folders of `fixtures/exports/` that hold a model, sorted.
pub fn exports() -> Vec<PathBuf> {
    let folders = std::fs::read_dir(fixture("exports")).expect("fixtures/exports is part of the repository");
    let mut found: Vec<PathBuf> = folders.map(|f| f.expect("a readable folder").path()).collect();
    found.retain(|f| f.join("model.onnx").is_file());
    found.sort();
    found
}

/// The largest absolute difference between two tensors of the same shape.
pub fn distance(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.shape(), b.shape());
    a.largest_difference(b)
}

/// Seeded inputs for a model: token ids below `vocabulary`, and sentences padded to different lengths on the right.
pub fn padded_inputs(
    inputs: &[mabert_runtime::TensorType],
    batch: usize,
    length: usize,
    vocabulary: i64,
    seed: u64,
) -> Named {
    use rand::{Rng as _, SeedableRng as _};
    let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
    let kept = |row: usize| length - (row * length / (batch + 1)).min(length - 1);
    let value = |name: &str, at: usize, rng: &mut rand::rngs::StdRng| match name {
        "input_ids" => rng.random_range(4..vocabulary),
        name if name.contains("mask") => i64::from(at % length < kept(at / length)),
        "token_type_ids" | "segment_ids" => i64::from(at % length > length / 2),
        "position_ids" => (at % length) as i64,
        _ => 0,
    };
    let tensor = |input: &mabert_runtime::TensorType, rng: &mut rand::rngs::StdRng| {
        let vector = input.dims.as_ref().is_some_and(|dims| dims.len() == 1);
        let shape = if vector { vec![batch] } else { vec![batch, length] };
        let values = (0..shape.iter().product()).map(|at| value(&input.name, at, rng));
        match input.element {
            Some(mabert_runtime::ElementType::I32) => Tensor::new(&shape, values.map(|v| v as i32).collect()),
            _ => Tensor::new(&shape, values.collect()),
        }
    };
    inputs.iter().map(|i| (i.name.clone(), tensor(i, &mut rng))).collect()
}

/// Saves a model in `folder` as optimum does: `model.onnx` with its constants in `model.onnx_data`.
pub fn save_as_optimum(model: &Model, folder: &Path) -> PathBuf {
    let (path, data) = (folder.join("model.onnx"), "model.onnx_data");
    let mut model = model.clone();
    model.keep_data_outside();
    model.save(&path).unwrap();
    std::fs::rename(folder.join("model.onnx.data"), folder.join(data)).unwrap();
    let mut proto = ModelProto::parse_from_bytes(&std::fs::read(&path).unwrap()).unwrap();
    let initializers = &mut proto.graph.as_mut().unwrap().initializer;
    for entry in initializers.iter_mut().flat_map(|t| &mut t.external_data).filter(|e| e.key == "location") {
        data.clone_into(&mut entry.value);
    }
    std::fs::write(&path, proto.write_to_bytes().unwrap()).unwrap();
    path
}

/// The fixture's encoder as sentence-transformers exports it: its hidden states, `last_hidden_state`, and where it pools
/// itself the mean over real tokens, `sentence_embedding`.
pub fn sentence_model(pools: bool) -> Model {
    const HIDDEN: &str = "/m/bert/encoder/layer.2/output/LayerNorm/LayerNormalization_output_0";
    let mut model = Model::load(fixture("bert-mini-sst2/model.onnx")).unwrap();
    let b = Builder::new(model.opset(), "sentence");
    let hidden = b.value(HIDDEN);
    let mut outputs = vec![b.op("Identity", &[hidden], vec![]).named("last_hidden_state").name()];
    if pools {
        let mask = b.value("attention_mask").cast(ElementType::F32).reshape(&[0, -1, 1]);
        let sum = |of| b.op("ReduceSum", &[of, b.ints(&[1])], vec![attribute::int("keepdims", 0)]);
        outputs.push((sum(hidden * mask) / sum(mask)).named("sentence_embedding").name());
    }
    let output = |name: String| ValueInfoProto { name, ..ValueInfoProto::default() };
    model.graph_mut().output = outputs.into_iter().map(output).collect();
    b.patch().apply(&mut model).unwrap();
    model.remove_dead();
    model
}

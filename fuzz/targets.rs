//! What the fuzz targets do with bytes. The workspace's tests do it with a few random ones as well.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use mabert_graph::{Dim, ElementType, Model as Graph, TensorType};
use mabert_runtime::{Model, Named, Tensor, borrowed};

#[path = "mutation.rs"]
mod mutation;

use mutation::Choices;

/// Exports of several styles, to be changed.
const EXPORTS: [&[u8]; 5] = [
    include_bytes!("../fixtures/coverage/bert-none-torchscript-11-eager.onnx"),
    include_bytes!("../fixtures/coverage/bert-classification-dynamo-20-packed-unbind.onnx"),
    include_bytes!("../fixtures/coverage/bert-classification-dynamo-20-transformers.onnx"),
    include_bytes!("../fixtures/coverage/bert-answers-tf2onnx-10-tensorflow1.onnx"),
    include_bytes!("../fixtures/coverage/mpnet-none-torchscript-17.onnx"),
];

/// Any model to be rewritten: any bytes, and real exports with any changes to their graphs.
pub(crate) fn recogniser(bytes: &[u8]) {
    let Ok(mut model) = Graph::from_bytes(bytes).or_else(|_| changed(bytes)) else { return };
    if mabert_passes::pipeline::simplify(&mut model).is_ok() {
        _ = mabert_passes::recognise::recognise(&model);
    }
}

/// One of the exports with its graph changed: six bytes a change.
fn changed(bytes: &[u8]) -> mabert_graph::Result<Graph> {
    let (export, changes) = bytes.split_first().unwrap_or((&0, &[]));
    let mut model = Graph::from_bytes(EXPORTS[usize::from(*export) % EXPORTS.len()])?;
    for change in changes.chunks_exact(6).take(12) {
        let number = |at: usize| usize::from(u16::from_le_bytes([change[at], change[at + 1]]));
        let (at, other, detail) = (number(1), number(3), usize::from(change[5]));
        let graph = model.graph_mut();
        let (nodes, constants) = (graph.node.len(), graph.initializer.len());
        let (at, other) = (at % nodes, other % nodes);
        let taken = graph.node[other].output.first().cloned().unwrap_or_default();
        let operator = graph.node[other].op_type.clone();
        let constant = &mut graph.initializer[other % constants];
        let node = &mut graph.node[at];
        let operands = node.input.len().max(1);
        match change[0] % 12 {
            0 => _ = node.input.pop(),
            1 => node.input.push(taken),
            2 => node.input.iter_mut().skip(detail % operands).take(1).for_each(|input| input.clone_from(&taken)),
            3 => node.input.reverse(),
            4 => node.op_type = operator,
            5 => node.attribute.iter_mut().for_each(|a| a.i = detail as i64 - 128),
            6 => node.attribute.iter_mut().flat_map(|a| &mut a.ints).for_each(|i| *i = detail as i64 - 128),
            7 => node.attribute.clear(),
            8 => constant.dims.iter_mut().for_each(|d| *d = detail as i64 - 64),
            9 => constant.dims.push(1),
            10 => constant.raw_data.iter_mut().skip(at).take(8).for_each(|v| *v = change[5]),
            _ if nodes > 1 => _ = graph.node.remove(at),
            _ => {}
        }
    }
    Ok(model)
}

/// Any inputs to a model that is sound: refused, or run.
pub(crate) fn inputs(bytes: &[u8]) {
    static MODEL: LazyLock<Model> = LazyLock::new(|| {
        let export = include_bytes!("../fixtures/coverage/roberta-classification-torchscript-17.onnx");
        Model::from_bytes(export).expect("a fixture")
    });
    let [batch, length, kind, values @ ..] = bytes else { return };
    let (batch, length) = (usize::from(batch % 5), usize::from(length % 48));
    let value = |at: usize| i64::from(values.get(at % values.len().max(1)).copied().unwrap_or(0)) - 32;
    let made = |offset: usize| {
        let ids = (0..batch * length).map(|at| value(at + offset)).collect();
        Tensor::new(&[batch, length], ids)
    };
    let mask = if kind & 1 == 0 { made(7) } else { Tensor::new(&[batch, length], vec![1i64; batch * length]) };
    let inputs = [("input_ids", made(0)), ("attention_mask", mask), ("token_type_ids", made(3))];
    _ = MODEL.run(&borrowed(&inputs[..if kind & 2 == 0 { 2 } else { 3 }]));
}

/// Real exports of every kind that is tested, their attributes, operands and constants changed.
pub(crate) fn mutations(bytes: &[u8]) {
    use_in_every_way(&mutated(bytes));
}

/// One of the exports that are tested, changed.
pub(crate) fn mutated(bytes: &[u8]) -> Graph {
    static FILES: LazyLock<Vec<PathBuf>> = LazyLock::new(|| {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/coverage");
        let files = std::fs::read_dir(folder).expect("the fixtures").map(|entry| entry.expect("a file").path());
        let mut models: Vec<PathBuf> = files.filter(|f| f.extension().is_some_and(|e| e == "onnx")).collect();
        models.sort();
        models
    });
    let mut choices = Choices(bytes);
    let mut model = Graph::load(&FILES[choices.below(FILES.len())]).expect("a fixture");
    mutation::mutate(&mut model, &mut choices);
    model
}

/// Loads a model, runs it and looks for what it holds.
fn use_in_every_way(graph: &Graph) {
    if let Ok(model) = mabert_runtime::LoadOptions::default().prepare(graph) {
        _ = model.run(&borrowed(&some_inputs(model.inputs())));
    }
    let mut graph = graph.clone();
    if mabert_passes::pipeline::simplify(&mut graph).is_ok() {
        _ = mabert_passes::recognise::recognise(&graph);
    }
}

/// Inputs of the types and shapes declared, small where a size is free.
fn some_inputs(declared: &[TensorType]) -> Named {
    let shape = |input: &TensorType| -> Vec<usize> {
        let Some(dims) = &input.dims else { return vec![2, 8] };
        let size = |(axis, dim): (usize, &Dim)| match dim {
            Dim::Fixed(size) => (*size).min(64),
            _ => [2, 8, 3, 5][axis % 4],
        };
        dims.iter().take(6).enumerate().map(size).collect()
    };
    let made = |input: &TensorType| {
        let shape = shape(input);
        let count = shape.iter().product();
        match input.element {
            Some(ElementType::F32) => Tensor::new(&shape, vec![0.5f32; count]),
            Some(ElementType::I32) => Tensor::new(&shape, vec![1i32; count]),
            Some(ElementType::Bool) => Tensor::new(&shape, vec![true; count]),
            _ => Tensor::new(&shape, vec![1i64; count]),
        }
    };
    declared.iter().map(|input| (input.name.clone(), made(input))).collect()
}

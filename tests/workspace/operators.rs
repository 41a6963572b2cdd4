//! Operators that tract has otherwise than ONNX, and inputs that it plans otherwise, each against onnxruntime.

use mabert_graph::{Builder, ElementType, Expr, Model, Tensor};
use mabert_passes::pipeline::Rewriting;
use mabert_runtime::{LoadOptions, Named, OrtModel, borrowed};
use mabert_tests::{fixture, options, padded_inputs};

/// The model gives on tract, planned once, what it gives on onnxruntime.
fn compare(name: &str, graph: &Model, all_inputs: impl IntoIterator<Item = Named>) {
    let tract = LoadOptions::default().prepare(graph).unwrap_or_else(|e| panic!("{name}: {e}"));
    let file = tempfile::Builder::new().suffix(".onnx").tempfile().unwrap();
    graph.save(file.path()).unwrap();
    let ort = OrtModel::load(file.path(), 1).unwrap_or_else(|e| panic!("{name}: {e}"));
    for inputs in all_inputs {
        let shapes: Vec<&[usize]> = inputs.iter().map(|(_, value)| value.shape()).collect();
        let found = tract.run(&borrowed(&inputs)).unwrap_or_else(|e| panic!("{name} at {shapes:?}: {e}"));
        let expected = ort.run(&borrowed(&inputs)).unwrap_or_else(|e| panic!("{name} at {shapes:?}: {e}"));
        for ((_, found), (_, expected)) in found.iter().zip(&expected) {
            assert_eq!(found.shape(), expected.shape(), "{name} at {shapes:?}");
            let distance = found.largest_difference(expected);
            assert!(distance < 1e-5, "{name} at {shapes:?}: {found:?} for {expected:?}");
        }
    }
}

fn values(shape: [usize; 2]) -> Tensor {
    Tensor::new(&shape, (0..shape[0] * shape[1]).map(|at| (at * 7 % 11) as f32 - 4.5).collect())
}

type Function = for<'b> fn(&'b Builder, Expr<'b>) -> Expr<'b>;

/// Functions of a matrix `[batch, n]`, at several sizes.
fn compare_functions(functions: &[(&str, Function)]) {
    for (name, function) in functions {
        let b = Builder::new(17, "test");
        let x = b.input("x", ElementType::F32, &["batch", "n"]);
        let graph = b.model(&[function(&b, x).named("y")]);
        let inputs = [[2, 5], [1, 1], [3, 12], [2, 24]].map(|shape| vec![("x".to_owned(), values(shape))]);
        compare(name, &graph, inputs);
    }
}

/// The length of the text, `[1]`.
fn length<'b>(x: Expr<'b>) -> Expr<'b> {
    x.shape().slice(0, 1, 2)
}

/// The length as a number without axes.
fn scalar<'b>(b: &'b Builder, x: Expr<'b>) -> Expr<'b> {
    b.op("Squeeze", &[length(x), b.ints(&[0])], vec![])
}

fn table(b: &Builder) -> Expr<'_> {
    b.parameter("table", &Tensor::new(&[1, 24], (0..24).map(|at| at as f32 / 2.0).collect()))
}

#[test]
fn slices_go_up_to_lengths_of_any_type() {
    use ElementType::{F32, F64, I32, I64};
    compare_functions(&[
        ("through i32", |b, x| x + table(b).slice(1, 0, length(x).cast(I32).cast(I64))),
        ("through f32", |b, x| x + table(b).slice(1, 0, length(x).cast(F32).cast(I64))),
        ("through f64", |b, x| x + table(b).slice(1, 0, length(x).cast(F64).cast(I64))),
        ("through both", |b, x| x + table(b).slice(1, 0, length(x).cast(I32).cast(F32).cast(I64))),
        ("half of it", |_, x| x.slice(1, 0, (length(x).cast(F32) * 0.5).cast(I64))),
        ("a shape", |b, x| {
            let shape = x.shape().cast(F32).cast(I64);
            b.op("Expand", &[b.parameter("two", &Tensor::scalar(2f32)), shape], vec![])
        }),
    ]);
}

#[test]
fn slices_end_where_their_axis_does() {
    compare_functions(&[
        ("beyond its own end", |b, x| x.slice(1, 0, length(x) + b.ints(&[5]))),
        ("beyond a fixed end", |_, x| x.slice(1, 0, 8)),
        ("from before the start", |_, x| x.slice(1, -8, i64::MAX)),
        ("from beyond the end", |_, x| x.slice(1, 8, i64::MAX)),
        ("up to before the start", |_, x| x.slice(1, 0, -8)),
        ("the last", |_, x| x.slice(1, -1, i64::MAX)),
    ]);
}

#[test]
fn ranges_and_comparisons_of_sizes_are_those_of_their_values() {
    use ElementType::{F32, I64};
    compare_functions(&[
        ("down", |b, x| {
            let [one, down] = [1, -1].map(|v| b.parameter("number", &Tensor::scalar(v as i64)));
            b.op("Range", &[scalar(b, x) - one, down, down], vec![]).cast(F32)
        }),
        ("by halves", |b, x| {
            let [zero, half] = [0f32, 0.5].map(|v| b.parameter("number", &Tensor::scalar(v)));
            b.op("Range", &[zero, scalar(b, x).cast(F32), half], vec![])
        }),
        ("from a number that may be beyond", |b, x| {
            let [six, one] = [6, 1].map(|v| b.parameter("number", &Tensor::scalar(v as i64)));
            b.op("Range", &[six, scalar(b, x), one], vec![]).cast(F32)
        }),
        ("equal to a number", |b, x| {
            let same = b.op("Equal", &[length(x), b.ints(&[5])], vec![]);
            b.op("Where", &[same, x, x * 2.0], vec![])
        }),
        ("equal to each other", |b, x| {
            let same = b.op("Equal", &[length(x), x.shape().slice(0, 0, 1)], vec![]);
            b.op("Where", &[same, x, x * 2.0], vec![])
        }),
        ("integers squared", |_, x| (x.cast(I64) * x.cast(I64)).cast(F32)),
        ("integers to a power", |b, x| {
            let two = b.parameter("two", &Tensor::scalar(2i64));
            b.op("Pow", &[x.cast(I64), two], vec![]).cast(F32)
        }),
    ]);
}

fn ids(shape: [usize; 2]) -> Tensor {
    Tensor::new(&shape, (0..shape[0] * shape[1]).map(|at| (at % 9) as i64).collect())
}

#[test]
fn inputs_need_not_be_as_long_as_each_other() {
    let b = Builder::new(17, "test");
    let [first, second] =
        [("question", "n"), ("answer", "m")].map(|(name, n)| b.input(name, ElementType::I64, &["batch", n]));
    let words = b.parameter("words", &Tensor::new(&[9, 4], (0..36).map(|at| (at % 5) as f32).collect()));
    let scores = words.gather(first).matmul(words.gather(second).transpose(&[0, 2, 1]));
    let graph = b.model(&[scores.named("scores")]);
    let inputs = [([2, 3], [2, 7]), ([1, 4], [1, 4]), ([3, 1], [3, 6])]
        .map(|(a, b)| vec![("question".to_owned(), ids(a)), ("answer".to_owned(), ids(b))]);
    compare("two lengths", &graph, inputs);
}

#[test]
fn inputs_may_declare_no_shape() {
    let undeclared = |path: &str| {
        let mut graph = Model::load(fixture(path)).unwrap();
        for input in &mut graph.graph_mut().input {
            if let Some(mabert_graph::proto::type_proto::Value::TensorType(tensor)) =
                input.type_.as_mut().and_then(|t| t.value.as_mut())
            {
                tensor.shape.clear();
            }
        }
        graph
    };
    let graph = undeclared("bert-mini-sst2/model.onnx");
    let declared = Model::load(fixture("bert-mini-sst2/model.onnx")).unwrap().inputs();
    let inputs = [(1, 3), (2, 9)].map(|(batch, length)| padded_inputs(&declared, batch, length, 64, 3));
    compare("without shapes", &graph, inputs);
    let rewriting = Rewriting::new(graph, options()).unwrap();
    assert_eq!(rewriting.encoder.layers.len(), 3);
}

#[test]
fn sizes_may_be_fixed_at_one() {
    let b = Builder::new(17, "test");
    let input = b.input("input_ids", ElementType::I64, &["1", "1"]);
    let words = b.parameter("words", &Tensor::new(&[9, 4], (0..36).map(|at| (at * 3 % 7) as f32).collect()));
    let [gamma, beta] = [1.5f32, 0.25].map(|v| b.parameter("affine", &Tensor::new(&[4], vec![v; 4])));
    let graph = b.model(&[words.gather(input).layer_norm(gamma, Some(beta), 1e-5).named("y")]);
    compare("one token", &graph, [vec![("input_ids".to_owned(), ids([1, 1]))]]);
}

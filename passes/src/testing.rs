//! What the passes' own tests share: a small encoder built in the test, and comparisons.

use mabert_graph::text::render_nodes;
use mabert_graph::{Builder, ElementType, Expr, Model, Tensor};
use mabert_runtime::{Named, Taps};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use crate::pipeline::{Keep, Options, Order, Pass, Rewriting, Student};
use crate::recording::symbolic_shapes;
use crate::rewrite::{ApproximatorOptions, Sharing};

pub(crate) const CHANNELS: usize = 8;
pub(crate) const HEADS: usize = 2;
pub(crate) const MAX_SEQ: usize = 8;
const HEAD_SIZE: i64 = (CHANNELS / HEADS) as i64;
const WORDS: usize = 20;

/// Weights far from trivial, drawn from one seed.
struct Weights<'b> {
    b: &'b Builder,
    rng: StdRng,
}

impl<'b> Weights<'b> {
    fn random(&mut self, name: &str, shape: &[usize], around: f32, spread: f32) -> Expr<'b> {
        let count = shape.iter().product::<usize>();
        let values = (0..count).map(|_| around + spread * self.rng.random_range(-1f32..1.0)).collect();
        self.b.constant(name, &Tensor::new(shape, values))
    }

    fn linear(&mut self, name: &str, x: Expr<'b>, inputs: usize, outputs: usize) -> Expr<'b> {
        let weight = self.random(&format!("{name}.weight"), &[inputs, outputs], 0.0, 0.8);
        x.matmul(weight) + self.random(&format!("{name}.bias"), &[outputs], 0.1, 0.3)
    }

    fn norm(&mut self, name: &str, x: Expr<'b>) -> Expr<'b> {
        let gamma = self.random(&format!("{name}.gamma"), &[CHANNELS], 0.9, 0.5);
        let beta = self.random(&format!("{name}.beta"), &[CHANNELS], 0.1, 0.4);
        let centred = x - x.mean_last();
        (centred / (centred.pow(2.0).mean_last() + 1e-5).sqrt()) * gamma + beta
    }
}

/// An encoder of one layer with GELU, spelled as TorchScript exporters do; its output is the last hidden state.
pub(crate) fn encoder() -> Model {
    let b = Builder::new(17, "test");
    let mut w = Weights { b: &b, rng: StdRng::seed_from_u64(7) };
    let ids = b.input("input_ids", ElementType::I64, &["batch", "n"]);
    let mask = b.input("attention_mask", ElementType::I64, &["batch", "n"]);
    let words = w.random("words", &[WORDS, CHANNELS], 0.0, 1.5);
    let x = w.norm("embeddings", words.gather(ids)).named("embedded");
    let removed = (1.0 - mask.cast(ElementType::F32).reshape(&[0, 1, 1, -1])) * -1e9;
    let heads = |y: Expr<'_>, order: &[i64]| y.reshape(&[0, 0, HEADS as i64, HEAD_SIZE]).transpose(order).name();
    let [q, k, v] = [("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3])].map(|(name, order)| {
        let y = w.linear(name, x, CHANNELS, CHANNELS);
        b.value(&heads(y, &order))
    });
    let scores = q.matmul(k) / (HEAD_SIZE as f32).sqrt();
    let context = (scores + removed).softmax().matmul(v).transpose(&[0, 2, 1, 3]).reshape(&[0, 0, CHANNELS as i64]);
    let attended = w.linear("attention.output", context, CHANNELS, CHANNELS) + x;
    let y = w.norm("attention.norm", attended);
    let up = w.linear("intermediate", y, CHANNELS, 2 * CHANNELS);
    let active = 0.5 * up * ((up / std::f32::consts::SQRT_2).erf() + 1.0);
    let down = w.linear("output", active, 2 * CHANNELS, CHANNELS) + y;
    let out = w.norm("output.norm", down).named("last_hidden_state");
    b.model(&[out])
}

pub(crate) fn options(until: Option<Pass>) -> Options {
    Options {
        approximator: ApproximatorOptions {
            max_seq: MAX_SEQ,
            hidden: 5,
            sharing: Sharing::PerHead,
            length_tables: true,
        },
        order: Order::Linear,
        keep: Keep::default(),
        fold: true,
        until,
        partial: false,
    }
}

/// The student after `until`, its parameters set to seeded random ones as calibration would.
pub(crate) fn student(until: Pass) -> Student {
    let rewriting = Rewriting::new(encoder(), options(Some(until))).unwrap();
    let mut student = rewriting.approximate().unwrap();
    let mut rng = StdRng::seed_from_u64(3);
    let names: Vec<String> = student.model.graph().initializer.iter().map(|t| t.name.clone()).collect();
    let is_parameter = |name: &str| {
        let norm = name.ends_with("norm/scale") || name.ends_with("norm/offset");
        norm || (name.contains("attention/approximator/") && !name.contains("ints"))
    };
    for name in names.iter().filter(|n| is_parameter(n)) {
        let shape = student.model.constant(name).unwrap().shape().to_vec();
        let around = if name.ends_with("scale") { 0.8 } else { 0.0 };
        let values = (0..shape.iter().product()).map(|_| around + rng.random_range(-0.6f32..0.6)).collect();
        student.model.set_constant(name, &Tensor::new(&shape, values));
    }
    student.finish().unwrap();
    student
}

/// Sentences of different lengths in one batch, padded on the right.
pub(crate) fn inputs(lengths: &[usize]) -> Named {
    let n = lengths.iter().copied().max().unwrap();
    let mut rng = StdRng::seed_from_u64(n as u64);
    let ids = (0..lengths.len() * n).map(|_| rng.random_range(0..WORDS as i64)).collect();
    let mask = lengths.iter().flat_map(|&l| (0..n).map(move |at| i64::from(at < l))).collect();
    let shape = [lengths.len(), n];
    vec![("input_ids".to_owned(), Tensor::new(&shape, ids)), ("attention_mask".to_owned(), Tensor::new(&shape, mask))]
}

/// Inner values of a model.
pub(crate) fn values(model: &Model, names: &[&str], lengths: &[usize]) -> Vec<ndarray::ArrayD<f32>> {
    let taps = Taps::Values(names.iter().map(|n| (*n).to_owned()).collect());
    let runnable = mabert_runtime::Options::default().taps(taps).prepare(model).unwrap();
    let inputs = inputs(lengths);
    let given: Vec<(&str, Tensor)> = inputs.iter().map(|(n, t)| (n.as_str(), t.clone())).collect();
    let found = runnable.run(&given).unwrap();
    names.iter().map(|n| found.iter().find(|(name, _)| name == n).unwrap().1.to_f32()).collect()
}

/// The largest difference of two models' outputs on real tokens, over batch sizes, lengths and masks.
pub(crate) fn furthest(a: &Model, b: &Model) -> f32 {
    let mut worst = 0f32;
    for lengths in [&[1][..], &[4], &[6, 3, 1], &[2, 5]] {
        let [x, y] = [a, b].map(|m| values(m, &["last_hidden_state"], lengths).remove(0));
        let n = x.shape()[1];
        for (row, (x, y)) in x.rows().into_iter().zip(y.rows()).enumerate() {
            if row % n < lengths[row / n] {
                // `max` would drop a NaN.
                let far = x.iter().zip(&y).map(|(x, y)| if (x - y).is_nan() { f32::INFINITY } else { (x - y).abs() });
                worst = far.fold(worst, f32::max);
            }
        }
    }
    worst
}

/// The text form of the nodes that passes have made or left in the layer.
pub(crate) fn layer_text(model: &Model) -> String {
    let shapes = symbolic_shapes(model).unwrap();
    render_nodes(model, &shapes, |node| !node.output[0].starts_with("embed"))
}

//! What the passes' own tests share: a small encoder built in the test, and comparisons.

use mabert_graph::text::render_nodes;
use mabert_graph::{Builder, ElementType, Expr, Model, Tensor, largest_difference};
use mabert_runtime::{Named, Taps, borrowed};
use rand::{Rng as _, SeedableRng as _, rngs::StdRng};

use crate::lower::{Approximator, ApproximatorOptions, ChannelRanges, Form, HingeSizes, NormRanges};
use crate::pipeline::{Order, Pass, PassOptions, Rewriting, Student};
use crate::recording::symbolic_shapes;
use crate::sites::Encoder;

pub(crate) const CHANNELS: usize = 8;
pub(crate) const HEADS: usize = 2;
pub(crate) const MAX_SEQ: usize = 8;
const WORDS: usize = 20;

/// What the weights of an encoder hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Values {
    /// What is far from trivial.
    Random,
    /// Ones, without biases: of each token a map leaves its channels' sum alone.
    Ones,
    /// Ones on the diagonal, without biases: a map leaves tokens as they are.
    Identity,
}

/// How an exporter may spell the same function, where each field counts through the variants; and what it holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spelling {
    /// Of norms, below [`NORMS`].
    pub(crate) norm: usize,
    /// Of GELU, below [`GELUS`].
    pub(crate) gelu: usize,
    /// Of the mask, below [`MASKS`].
    pub(crate) mask: usize,
    /// Of linear maps, below [`LINEARS`].
    pub(crate) linear: usize,
    /// Of hidden states, below [`LAYOUTS`].
    pub(crate) layout: usize,
    /// Channels of the stream, for two heads.
    pub(crate) channels: usize,
    pub(crate) values: Values,
}

impl Default for Spelling {
    fn default() -> Self {
        Self { norm: 0, gelu: 0, mask: 0, linear: 0, layout: 0, channels: CHANNELS, values: Values::Random }
    }
}

pub(crate) const NORMS: usize = 7;
pub(crate) const GELUS: usize = 7;
pub(crate) const MASKS: usize = 6;
pub(crate) const LINEARS: usize = 3;
pub(crate) const LAYOUTS: usize = 4;

/// Weights far from trivial, drawn from one seed.
struct Weights<'b> {
    b: &'b Builder,
    rng: StdRng,
    spelling: Spelling,
}

impl<'b> Weights<'b> {
    fn random(&mut self, name: &str, shape: &[usize], around: f32, spread: f32) -> Expr<'b> {
        let count = shape.iter().product::<usize>();
        let values = (0..count).map(|_| around + spread * self.rng.random_range(-1f32..1.0)).collect();
        self.b.constant(name, &Tensor::new(shape, values))
    }

    fn weight(&mut self, name: &str, [inputs, outputs]: [usize; 2]) -> Expr<'b> {
        let one = match self.spelling.values {
            Values::Random => return self.random(name, &[inputs, outputs], 0.0, 0.8),
            Values::Ones => |_: usize, _: usize| true,
            Values::Identity => |row, column| row == column,
        };
        let ones = (0..inputs * outputs).map(|at| f32::from(u8::from(one(at / outputs, at % outputs))));
        self.b.constant(name, &Tensor::new(&[inputs, outputs], ones.collect()))
    }

    /// A vector around some value, and of nothing but that where weights are trivial.
    fn vector(&mut self, name: &str, size: usize, [around, spread, trivial]: [f32; 3]) -> Expr<'b> {
        match self.spelling.values {
            Values::Random => self.random(name, &[size], around, spread),
            _ => self.b.constant(name, &Tensor::new(&[size], vec![trivial; size])),
        }
    }

    fn linear(&mut self, name: &str, x: Expr<'b>, inputs: usize, outputs: usize) -> Expr<'b> {
        let weight = self.weight(&format!("{name}.weight"), [inputs, outputs]);
        let bias = self.vector(&format!("{name}.bias"), outputs, [0.1, 0.3, 0.0]);
        match self.spelling.linear {
            0 => x.matmul(weight) + bias,
            1 => bias + x.matmul(weight),
            // Flattened tokens, as keras and some optimisers write them.
            _ => {
                let rows = x.reshape(&[-1, inputs as i64]);
                let y = self.b.op("Gemm", &[rows, weight, bias], vec![]);
                y.reshape_to(self.b.concat(&[x.shape().slice(0, 0, 2), self.b.ints(&[outputs as i64])], 0))
            }
        }
    }

    fn norm(&mut self, name: &str, x: Expr<'b>) -> Expr<'b> {
        let channels = self.spelling.channels;
        let gamma = self.vector(&format!("{name}.gamma"), channels, [0.9, 0.5, 1.0]);
        let beta = self.vector(&format!("{name}.beta"), channels, [0.1, 0.4, 0.0]);
        const EPSILON: f32 = 1e-5;
        let centred = x - x.mean_last();
        let deviation = || ((centred * centred).mean_last() + EPSILON).sqrt();
        match self.spelling.norm {
            0 => (centred / (centred.pow(2.0).mean_last() + EPSILON).sqrt()) * gamma + beta,
            1 => gamma * (centred / deviation()) + beta,
            2 => (centred * deviation().reciprocal()) * gamma + beta,
            // keras: x * (gamma / deviation) + (beta - mean * gamma / deviation).
            3 => {
                let factor = deviation().reciprocal() * gamma;
                x * factor + (beta - x.mean_last() * factor)
            }
            4 => centred * ((centred * centred).mean_last() + EPSILON).pow(-0.5) * gamma + beta,
            op => {
                let epsilon = mabert_graph::attribute::float("epsilon", EPSILON);
                let attributes = vec![mabert_graph::attribute::int("axis", -1), epsilon];
                // onnxruntime's optimiser leaves the mean out of some.
                match op {
                    5 => self.b.op("SimplifiedLayerNormalization", &[centred, gamma], attributes) + beta,
                    _ => self.b.op("LayerNormalization", &[x, gamma, beta], attributes),
                }
            }
        }
    }

    fn gelu(&self, x: Expr<'b>) -> Expr<'b> {
        let erf = || (x / std::f32::consts::SQRT_2).erf() + 1.0;
        match self.spelling.gelu {
            0 => 0.5 * x * erf(),
            1 => x * (0.5 * erf()),
            2 => (x * erf()) * 0.5,
            3 => erf() * (x * 0.5),
            // The half is the next map's.
            4 => x * erf(),
            5 => self.b.op("Sum", &[x, x * (x / std::f32::consts::SQRT_2).erf()], vec![]),
            _ => {
                let inner = (x + 0.044_715 * x.pow(3.0)) * (2.0 / std::f32::consts::PI).sqrt();
                0.5 * x * (1.0 + inner.tanh())
            }
        }
    }

    fn probabilities(&self, scores: Expr<'b>, mask: Expr<'b>) -> Expr<'b> {
        let b = self.b;
        let keep = mask.reshape(&[0, 1, 1, -1]);
        match self.spelling.mask {
            0 => (scores + (1.0 - keep.cast(ElementType::F32)) * -1e9).softmax(),
            1 => ((keep.cast(ElementType::F32) - 1.0) * 3e4 + scores).softmax(),
            2 => {
                let low = b.parameter("low", &Tensor::scalar(-1e9f32));
                b.op("Where", &[keep.cast(ElementType::Bool), scores, low], vec![]).softmax()
            }
            // The model takes a mask and ignores it, or takes none.
            4 => scores.softmax(),
            // As optimisers spell it out, where an engine has no such operator.
            5 => {
                let scores = scores + (1.0 - keep.cast(ElementType::F32)) * -1e4;
                let axes = || vec![mabert_graph::attribute::ints("axes", &[-1])];
                let axis = b.ints(&[-1]);
                let exponentials = b.op("Exp", &[scores - b.op("ReduceMax", &[scores], axes())], vec![]);
                exponentials / b.op("ReduceSum", &[exponentials, axis], vec![])
            }
            _ => {
                let [low, zero] = [f32::NEG_INFINITY, 0.0].map(|v| b.parameter("choice", &Tensor::scalar(v)));
                let added = b.op("Where", &[keep.cast(ElementType::Bool), zero, low], vec![]);
                let raw = (scores + added).softmax();
                b.op("Where", &[b.op("IsNaN", &[raw], vec![]), zero, raw], vec![])
            }
        }
    }
}

/// An encoder of one layer with GELU, spelled as TorchScript exporters do; its output is the last hidden state.
pub(crate) fn encoder() -> Model {
    encoder_with(Spelling::default(), |scores, _| scores)
}

/// The same encoder in another spelling; `change` may do something to the scores that no encoder does.
pub(crate) fn encoder_with(spelling: Spelling, change: impl for<'b> Fn(Expr<'b>, &'b Builder) -> Expr<'b>) -> Model {
    let b = Builder::new(17, "test");
    let mut w = Weights { b: &b, rng: StdRng::seed_from_u64(7), spelling };
    let ids = b.input("input_ids", ElementType::I64, &["batch", "n"]);
    let mask = b.input("attention_mask", ElementType::I64, &["batch", "n"]);
    let channels = spelling.channels;
    let head_size = channels / HEADS;
    let words = w.random("words", &[WORDS, channels], 0.0, 1.5);
    // Hidden states may have tokens before sentences, from the embeddings on, or from behind their norm.
    let (tokens_first, swapped) = (spelling.layout != 0, [1, 0, 2]);
    let embedded = match spelling.layout {
        1 => words.gather(ids.transpose(&[1, 0])) + w.random("positions", &[1, 1, channels], 0.0, 0.5),
        2 => words.gather(ids).transpose(&swapped),
        _ => words.gather(ids),
    };
    let x = w.norm("embeddings", embedded).named("embedded");
    let x = if spelling.layout == 3 { x.transpose(&swapped) } else { x };
    let orders = match tokens_first {
        true => [[1, 2, 0, 3], [1, 2, 3, 0], [2, 0, 1, 3]],
        false => [[0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]],
    };
    let heads = |y: Expr<'_>, order: &[i64]| y.reshape(&[0, 0, HEADS as i64, head_size as i64]).transpose(order).name();
    let [q, k, v] = [("query", orders[0]), ("key", orders[1]), ("value", orders[0])].map(|(name, order)| {
        let y = w.linear(name, x, channels, channels);
        b.value(&heads(y, &order))
    });
    let scores = change(q.matmul(k) / (head_size as f32).sqrt(), &b);
    let context = w.probabilities(scores, mask).matmul(v).transpose(&orders[2]).reshape(&[0, 0, channels as i64]);
    let attended = w.linear("attention.output", context, channels, channels) + x;
    let y = w.norm("attention.norm", attended);
    let up = w.linear("intermediate", y, channels, 2 * channels);
    let active = w.gelu(up);
    let down = w.linear("output", active, 2 * channels, channels) + y;
    let out = w.norm("output.norm", down);
    let out = if tokens_first { out.transpose(&swapped) } else { out };
    b.model(&[out.named("last_hidden_state")])
}

pub(crate) fn options(until: Option<Pass>) -> PassOptions {
    let approximator = ApproximatorOptions {
        positions: MAX_SEQ + 4,
        hinges: HingeSizes { statistics: 2, hinges: 2, hidden: 3 },
        ..ApproximatorOptions::network(MAX_SEQ, 5)
    };
    PassOptions { order: Order::Linear, until, ..PassOptions::new(approximator) }
}

/// The student of networks after `until`, its parameters set to seeded random ones as calibration would, not bounded.
pub(crate) fn student(until: Pass) -> Student {
    student_with(options(Some(until)))
}

/// The same with hinges.
pub(crate) fn student_of_hinges(until: Pass) -> Student {
    let usual = options(Some(until));
    let approximator = ApproximatorOptions { form: Form::Hinges, ..usual.approximator };
    student_with(PassOptions { approximator, order: Order::Auto, ..usual })
}

fn student_with(options: PassOptions) -> Student {
    let mut student = unbounded(options);
    student.finish().unwrap();
    student
}

/// The student of networks, bounded by what a few sequences gave.
pub(crate) fn bounded_student(until: Pass) -> Student {
    let mut student = unbounded(options(Some(until)));
    let seen = norm_ranges(&student.model, &student.encoder, &[6, 3, 1]);
    student.bound(Some(seen)).unwrap();
    student.finish().unwrap();
    student
}

/// What the norms of an encoder put out for sequences of these lengths and of some others.
pub(crate) fn norm_ranges(model: &Model, encoder: &Encoder, lengths: &[usize]) -> NormRanges {
    let mut ranges = NormRanges::new();
    for (id, site) in encoder.norms() {
        for lengths in [lengths, &[1], &[4], &[2, 5]] {
            let value = values(model, &[&site.output], lengths).remove(0);
            let rows = value.to_shape((value.len() / CHANNELS, CHANNELS)).unwrap().into_owned();
            let found = ChannelRanges::of(rows.view());
            ranges.entry(id).and_modify(|known: &mut ChannelRanges| known.join(&found)).or_insert(found);
        }
    }
    ranges
}

/// A student before it is bounded and finished, its parameters set to seeded random ones as calibration would.
pub(crate) fn unbounded(options: PassOptions) -> Student {
    let mut student = Rewriting::new(encoder(), options).unwrap().approximate().unwrap();
    let mut rng = StdRng::seed_from_u64(3);
    let names: Vec<String> = student.model.graph().initializer.iter().map(|t| t.name.clone()).collect();
    let is_parameter = |name: &str| {
        let norm = name.ends_with("norm/scale") || name.ends_with("norm/offset");
        norm || student.approximators.iter().flat_map(Approximator::parameters).any(|parameter| parameter == name)
    };
    for name in names.iter().filter(|n| is_parameter(n)) {
        let shape = student.model.constant(name).unwrap().shape().to_vec();
        let around = if name.ends_with("scale") { 0.8 } else { 0.0 };
        let values = (0..shape.iter().product()).map(|_| around + rng.random_range(-0.6f32..0.6)).collect();
        student.model.set_constant(name, &Tensor::new(&shape, values));
    }
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
    inner_values(model, names, &inputs(lengths))
}

/// The same for given tokens of `batch` sentences.
pub(crate) fn values_of(
    model: &Model,
    names: &[&str],
    ids: &[i64],
    mask: &[i64],
    batch: usize,
) -> Vec<ndarray::ArrayD<f32>> {
    let input =
        |name: &str, values: &[i64]| (name.to_owned(), Tensor::new(&[batch, values.len() / batch], values.to_vec()));
    inner_values(model, names, &vec![input("input_ids", ids), input("attention_mask", mask)])
}

fn inner_values(model: &Model, names: &[&str], inputs: &Named) -> Vec<ndarray::ArrayD<f32>> {
    let taps = Taps::Values(names.iter().map(|n| (*n).to_owned()).collect());
    let runnable = mabert_runtime::LoadOptions::default().taps(taps).prepare(model).unwrap();
    let outputs = runnable.run(&borrowed(inputs)).unwrap();
    names.iter().map(|n| outputs.iter().find(|(name, _)| name == n).unwrap().1.to_f32()).collect()
}

/// The largest difference of two models' outputs on real tokens, over batch sizes, lengths and masks.
pub(crate) fn largest_output_difference(a: &Model, b: &Model) -> f32 {
    let mut worst = 0f32;
    for lengths in [&[1][..], &[4], &[6, 3, 1], &[2, 5]] {
        let [x, y] = [a, b].map(|m| values(m, &["last_hidden_state"], lengths).remove(0));
        let n = x.shape()[1];
        for (row, (x, y)) in x.rows().into_iter().zip(y.rows()).enumerate() {
            if row % n < lengths[row / n] {
                worst = worst.max(largest_difference(x, y));
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

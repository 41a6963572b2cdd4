//! The approximator of softmax: `P = (scale[len] relu((S m) W1 + b1[len]) W2 + b2[len]) m`.
//!
//! Tables by length would grow with `n * h`; here a length is first turned into a few features, read from one small
//! table with `Gather`, and each layer multiplies them by its own knots. It is the same family of tables, a row for
//! each length, piecewise linear between knots, at a fraction of the size. `scale` and `b2` are divided by the length,
//! so that even attention, `1 / len`, is exact at every length.

use mabert_graph::{Builder, ElementType, Expr, Tensor};
use serde::{Deserialize, Serialize};

use super::mask::MASK;
use crate::sites::Encoder;

/// Which heads share an approximator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sharing {
    /// One for each head.
    PerHead,
    /// One for each layer.
    PerLayer,
    /// One for the whole encoder.
    Shared,
}

impl Sharing {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::PerHead, Self::PerLayer, Self::Shared];

    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::PerHead => "per-head",
            Self::PerLayer => "per-layer",
            Self::Shared => "shared",
        }
    }
}

/// What the approximators look like.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct ApproximatorOptions {
    /// The longest sequence, `n`.
    pub max_seq: usize,
    /// The hidden size, `h`.
    pub hidden: usize,
    /// Which heads share one.
    pub sharing: Sharing,
    /// Whether bias and scale depend on the number of real tokens.
    pub length_tables: bool,
}

/// The parameters of one approximator, by the names of their initializers. `G` is the number of heads that have their
/// own, or 1; `K` the number of length features.
#[derive(Clone, Debug, Serialize)]
pub struct Approximator {
    /// `[G, n, h]`.
    pub w1: String,
    /// `[G, h, n]`.
    pub w2: String,
    /// `[K, G * h]`.
    pub b1: String,
    /// `[K, G * h]`.
    pub scale: String,
    /// `[K, G * n]`.
    pub b2: String,
    /// `G`.
    pub groups: usize,
}

/// The features of a length: how much each knot counts.
#[derive(Clone, Debug)]
pub struct LengthFeatures {
    /// The lengths at which parameters are given.
    pub knots: Vec<usize>,
    max_seq: usize,
}

impl LengthFeatures {
    /// Two knots an octave up to `max_seq`; a single one without length tables.
    pub fn new(options: &ApproximatorOptions) -> Self {
        let n = options.max_seq;
        if !options.length_tables {
            return Self { knots: vec![n], max_seq: n };
        }
        let octaves = (0..).map(|i| 1usize << i).take_while(|&k| k < n);
        let mut knots: Vec<usize> = octaves.flat_map(|k| [k, k + k / 2]).filter(|&k| k < n).collect();
        knots.push(n);
        knots.dedup();
        Self { knots, max_seq: n }
    }

    /// The weights of the knots at `length`, which sum to 1: linear between the two neighbours.
    pub fn at(&self, length: usize) -> Vec<f32> {
        let mut weights = vec![0.0; self.knots.len()];
        match self.knots.iter().position(|&k| k >= length) {
            Some(0) => weights[0] = 1.0,
            Some(next) => {
                let (low, high) = (self.knots[next - 1] as f32, self.knots[next] as f32);
                let share = (length as f32 - low) / (high - low);
                (weights[next - 1], weights[next]) = (1.0 - share, share);
            }
            None => *weights.last_mut().expect("there is a knot") = 1.0,
        }
        weights
    }

    /// A row for each length from 0 to `n`, and the same divided by the length; a sentence of no tokens shares nothing.
    fn tables(&self) -> [Tensor; 2] {
        let shape = [self.max_seq + 1, self.knots.len()];
        let rows = |divisor: fn(usize) -> f32| {
            let row = move |length: usize| {
                let divisor = divisor(length);
                self.at(length).into_iter().map(move |w| if length == 0 { 0.0 } else { w / divisor })
            };
            Tensor::new(&shape, (0..=self.max_seq).flat_map(row).collect())
        };
        [rows(|_| 1.0), rows(|length| length as f32)]
    }
}

/// What all layers know of a batch: the mask in the shapes they need, the length, and the length features.
pub(super) struct BatchValues<'b> {
    /// `[batch, 1, 1, n]`.
    pub(super) over_keys: Expr<'b>,
    /// `[batch, 1, n, 1]`.
    pub(super) over_rows: Expr<'b>,
    /// The sequence length `[1]`.
    length: Expr<'b>,
    /// `[batch, K]`, or `[1, K]` without a mask: plain, and divided by the number of real tokens; `None` without length
    /// tables.
    features: Option<[Expr<'b>; 2]>,
}

impl<'b> BatchValues<'b> {
    /// Where the model takes no mask every token is real, and all rows have the batch's length.
    pub(super) fn new(b: &'b Builder, options: &ApproximatorOptions, encoder: &Encoder, scope: &str) -> Self {
        b.scope(scope);
        let mask = b.value(MASK);
        let length = mask.shape().slice(0, 1, 2);
        let features = options.length_tables.then(|| {
            let ones = b.parameter("ones", &Tensor::new(&[options.max_seq, 1], vec![1f32; options.max_seq]));
            let ones = ones.slice(0, 0, length);
            // Without a mask counted too: tract looks nothing up at a size that it knows as a symbol only.
            let row = if encoder.mask.is_some() { mask } else { ones.reshape(&[1, -1]) };
            let real = row.matmul(ones).cast(ElementType::I64).reshape(&[-1]);
            let tables = LengthFeatures::new(options).tables();
            let names = ["length_features", "length_features_over_length"];
            [0, 1].map(|i| b.parameter(names[i], &tables[i]).gather(real))
        });
        let over_keys = mask.reshape(&[0, 1, 1, -1]);
        let over_rows = mask.reshape(&[0, 1, -1, 1]);
        Self { over_keys, over_rows, length, features }
    }
}

/// An approximator's parameters as they apply to a batch.
pub(super) struct Applied<'b> {
    /// `[G, n', h]`.
    pub(super) w1: Expr<'b>,
    /// `[G, h, n']`.
    pub(super) w2: Expr<'b>,
    /// `[batch, G, 1, h]`, or `[G, 1, h]` without length tables.
    pub(super) b1: Expr<'b>,
    /// `[batch, G, 1, h]`; `None` without length tables, where `W2` holds it.
    pub(super) scale: Option<Expr<'b>>,
    /// As `scale`, `[batch, G, h, 1]`.
    pub(super) scale_column: Option<Expr<'b>>,
    /// `[batch, G, 1, n']`, or `[G, 1, n']` without length tables.
    pub(super) b2: Expr<'b>,
}

impl Approximator {
    /// The names of a site's parameters under `scope`.
    pub(super) fn in_scope(scope: &str, groups: usize) -> Self {
        let name = |part: &str| format!("{scope}/{part}");
        Self { w1: name("w1"), w2: name("w2"), b1: name("b1"), scale: name("scale"), b2: name("b2"), groups }
    }

    /// The parameters as they apply to a batch.
    pub(super) fn apply<'b>(&self, b: &'b Builder, batch: &BatchValues<'b>) -> Applied<'b> {
        let g = self.groups as i64;
        let [w1, w2, b1, scale, b2] = [&self.w1, &self.w2, &self.b1, &self.scale, &self.b2].map(|name| b.value(name));
        let w1 = w1.slice(1, 0, batch.length);
        let w2 = w2.slice(2, 0, batch.length);
        let Some([plain, over_length]) = batch.features else {
            let b1 = b1.reshape(&[g, 1, -1]);
            let b2 = b2.reshape(&[g, 1, -1]).slice(2, 0, batch.length);
            return Applied { w1, w2, b1, scale: None, scale_column: None, b2 };
        };
        let row = |knots: Expr<'b>, features: Expr<'b>| features.matmul(knots).reshape(&[0, g, 1, -1]);
        let scale_row = over_length.matmul(scale);
        Applied {
            w1,
            w2,
            b1: row(b1, plain),
            scale: Some(scale_row.reshape(&[0, g, 1, -1])),
            scale_column: Some(scale_row.reshape(&[0, g, -1, 1])),
            b2: row(b2, over_length).slice(3, 0, batch.length),
        }
    }
}

//! The network: `P = (scale[len] relu((S m) W1 + b1[len]) W2 + b2[len]) m`.
//!
//! `scale` and `b2` are divided by the length, so that even attention, `1 / len`, is exact at every length. Only ReLU
//! stands between the products, so `((Q K^T m) W1 ...)` is `Q ((m K)^T W1)`, and `(... W2 m) V` is `... (W2 (m V))`: in
//! that order no `n x n` matrix is formed, and padding contributes nothing.

use mabert_graph::{Builder, ElementType, Expr, Tensor};
use serde::Serialize;

use super::super::mask::MASK;
use super::ApproximatorOptions;
use crate::sites::{AttentionSite, Encoder};

/// The parameters of networks, by the names of their initializers. `G` is the number of heads that have their
/// own, or 1; `K` the number of length features.
#[derive(Clone, Debug, Serialize)]
pub struct NetworkParameters {
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

/// What all layers know of a batch: the mask in the shapes they need, the length, and the length features.
pub(in super::super) struct NetworkBatch<'b> {
    /// `[batch, 1, 1, n]`.
    over_keys: Expr<'b>,
    /// `[batch, 1, n, 1]`.
    over_rows: Expr<'b>,
    /// The sequence length `[1]`.
    length: Expr<'b>,
    /// `[batch, K]`, or `[1, K]` without a mask: plain, and divided by the number of real tokens; `None` without length
    /// tables.
    features: Option<[Expr<'b>; 2]>,
}

impl<'b> NetworkBatch<'b> {
    /// Where the model takes no mask every token is real, and all rows have the batch's length.
    pub(super) fn new(b: &'b Builder, options: &ApproximatorOptions, encoder: &Encoder) -> Self {
        let mask = b.value(MASK);
        let length = mask.shape().slice(0, 1, 2);
        let features = options.length_tables.then(|| {
            let ones = b.parameter("ones", &Tensor::new(&[options.max_seq, 1], vec![1f32; options.max_seq]));
            let ones = ones.slice(0, 0, length);
            // Without a mask counted too: tract looks nothing up at a size that it knows as a symbol only.
            let row = if encoder.mask.is_some() { mask } else { ones.reshape(&[1, -1]) };
            let real = row.matmul(ones).cast(ElementType::I64).reshape(&[-1]);
            let tables = options.length_features().tables();
            let names = ["length_features", "length_features_over_length"];
            [0, 1].map(|i| b.parameter(names[i], &tables[i]).gather(real))
        });
        let over_keys = mask.reshape(&[0, 1, 1, -1]);
        let over_rows = mask.reshape(&[0, 1, -1, 1]);
        Self { over_keys, over_rows, length, features }
    }
}

/// A network's parameters as they apply to a batch.
struct Applied<'b> {
    /// `[G, n', h]`.
    w1: Expr<'b>,
    /// `[G, h, n']`.
    w2: Expr<'b>,
    /// `[batch, G, 1, h]`, or `[G, 1, h]` without length tables.
    b1: Expr<'b>,
    /// `[batch, G, 1, h]`; `None` without length tables, where `W2` holds it.
    scale: Option<Expr<'b>>,
    /// As `scale`, `[batch, G, h, 1]`.
    scale_column: Option<Expr<'b>>,
    /// `[batch, G, 1, n']`, or `[G, 1, n']` without length tables.
    b2: Expr<'b>,
}

impl NetworkParameters {
    /// The names of a site's parameters under `scope`.
    pub(in super::super) fn in_scope(scope: &str, groups: usize) -> Self {
        let name = |part: &str| format!("{scope}/{part}");
        Self { w1: name("w1"), w2: name("w2"), b1: name("b1"), scale: name("scale"), b2: name("b2"), groups }
    }

    /// The parameters as they apply to a batch.
    fn apply<'b>(&self, b: &'b Builder, batch: &NetworkBatch<'b>) -> Applied<'b> {
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

    /// The initializers; without length tables there is no `scale`.
    pub(super) fn names(&self) -> Vec<&String> {
        vec![&self.w1, &self.w2, &self.b1, &self.b2, &self.scale]
    }

    /// Even attention, `1 / len`, plus what exceeds zero of each score.
    pub(super) fn declare(&self, b: &Builder, options: &ApproximatorOptions) {
        let (g, n, h) = (self.groups, options.max_seq, options.hidden);
        let k = options.length_features().knots.len();
        let unit = |i: usize, j: usize| if i % h == j { 1f32 } else { 0.0 };
        let w1 = (0..g * n * h).map(|at| unit(at / h % n, at % h)).collect();
        let w2 = (0..g * h * n).map(|at| unit(at % n, at / n % h)).collect();
        b.constant(&self.w1, &Tensor::new(&[g, n, h], w1));
        b.constant(&self.w2, &Tensor::new(&[g, h, n], w2));
        b.constant(&self.b1, &Tensor::new(&[k, g * h], vec![0f32; k * g * h]));
        b.constant(&self.b2, &Tensor::new(&[k, g * n], vec![1f32; k * g * n]));
        if options.length_tables {
            // The first knot is that of one token alone, which attends to itself whatever its score.
            let scale = (0..k * g * h).map(|at| if at < g * h { 0.0 } else { 1f32 }).collect();
            b.constant(&self.scale, &Tensor::new(&[k, g * h], scale));
        }
    }

    /// In the paper's order.
    pub(super) fn probabilities<'b>(&self, b: &'b Builder, batch: &NetworkBatch<'b>, scores: Expr<'b>) -> Expr<'b> {
        let net = self.apply(b, batch);
        let hidden = ((scores * batch.over_keys).matmul(net.w1) + net.b1).relu();
        let hidden = net.scale.map_or(hidden, |scale| hidden * scale);
        (hidden.matmul(net.w2) + net.b2) * batch.over_keys
    }

    /// In the order whose cost is linear in the length.
    pub(super) fn context<'b>(&self, b: &'b Builder, batch: &NetworkBatch<'b>, site: &AttentionSite) -> Expr<'b> {
        let [query, key, value] = [&site.query, &site.key, &site.value].map(|v| b.value(v));
        let net = self.apply(b, batch);
        // [batch, heads, d, h]
        let keys = (key * batch.over_keys).matmul(net.w1);
        let values = value * batch.over_rows;
        // [batch, heads, h, d]
        let outputs = net.w2.matmul(values);
        let outputs = net.scale_column.map_or(outputs, |scale| outputs * scale);
        let hidden = (query.matmul(keys) + net.b1).relu();
        hidden.matmul(outputs) + net.b2.matmul(values)
    }
}

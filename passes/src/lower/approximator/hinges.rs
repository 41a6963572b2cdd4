//! Hinges: in all that matters softmax over a row is one hinge a key, with a threshold that depends on the row.
//!
//! Softmax does not see what is added to all scores of a row, so scores are taken from the row's mean over real keys,
//! `s_ij = q_i . (k_j - mean_j k_j)`. For a row `i` with `len` real keys, of which `first` and `last` are the ends:
//!
//! ```text
//! u_ir  = sum_j m_j relu(s_ij - t_r) / len                        r = 1..R statistics
//! x_i   = [u_i, s_i,first, s_i,last]
//! z_i   = relu(x_i W1 + b1[len])
//! tau_i = [z_i, x_i] W2 + b2[len]                                 G thresholds, and two sinks
//! P_ij  = m_j (sum_g weight_g[len] relu(s_ij - tau_ig) + even[len] + [j = first] relu(tau_i,G+1) + [j = last] relu(tau_i,G+2))
//! ```
//!
//! `weight` and `even` are divided by the length. The two sinks are there because many heads park their attention on the
//! tokens that open and close a text. One token alone has neither hinges nor sinks, and attends to itself exactly.

use mabert_graph::{Builder, ElementType, Expr, Tensor};
use serde::{Deserialize, Serialize};

use super::super::mask::MASK;
use super::ApproximatorOptions;
use crate::sites::AttentionSite;

/// The two ends of a text.
const ENDS: usize = 2;

/// The sizes of one head's hinges.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HingeSizes {
    /// Statistics of a row, `R`.
    pub statistics: usize,
    /// Hinges a key, `G`.
    pub hinges: usize,
    /// Hidden size of what computes the thresholds.
    pub hidden: usize,
}

impl Default for HingeSizes {
    fn default() -> Self {
        Self { statistics: 3, hinges: 2, hidden: 16 }
    }
}

impl HingeSizes {
    /// What is known of a row: its statistics, and its scores at the two ends.
    pub fn features(self) -> usize {
        self.statistics + ENDS
    }

    /// What is computed for a row: thresholds and sinks.
    pub fn thresholds(self) -> usize {
        self.hinges + ENDS
    }
}

/// The parameters of all heads' hinges in a layer, by the names of their initializers. `H` is the number of heads, `K` that
/// of length features, `X` that of a row's features, `T` that of its thresholds and sinks.
#[derive(Clone, Debug, Serialize)]
pub struct HingeParameters {
    /// A threshold for each statistic, `[H, 1, 1]` each.
    pub statistics: Vec<String>,
    /// `[H, X, hidden]`.
    pub w1: String,
    /// `[K, H * hidden]`.
    pub b1: String,
    /// `[H, hidden + X, T]`.
    pub w2: String,
    /// `[K, H * T]`.
    pub b2: String,
    /// What each hinge counts, `[K, H * G]`.
    pub weight: String,
    /// What all keys share, `[K, H]`.
    pub even: String,
    /// `H`.
    pub heads: usize,
    /// Their sizes.
    pub sizes: HingeSizes,
}

/// What all layers know of a batch. Without padding `first` and `last` are the ends; what lies between padding counts alike.
pub(in super::super) struct HingeBatch<'b> {
    /// `[batch, 1, 1, n]`.
    over_keys: Expr<'b>,
    /// `[batch, 1, n, 1]`.
    over_rows: Expr<'b>,
    /// `m / len`, `[batch, 1, 1, n]`.
    mean_row: Expr<'b>,
    /// The same, `[batch, 1, n, 1]`.
    mean_column: Expr<'b>,
    /// 1 at the first and at the last real token, `[batch, 1, 2, n]`; nothing where they are one.
    end_rows: Expr<'b>,
    /// The same, `[batch, 1, n, 2]`.
    end_columns: Expr<'b>,
    /// `[batch, K]`: plain, and divided by the number of real tokens.
    features: [Expr<'b>; 2],
}

impl<'b> HingeBatch<'b> {
    pub(super) fn new(b: &'b Builder, options: &ApproximatorOptions) -> Self {
        let longest = options.longest();
        // [batch, n]
        let mask = b.value(MASK);
        let n = mask.shape().slice(0, 1, 2);
        let ones = b.parameter("ones", &Tensor::new(&[longest, 1], vec![1f32; longest])).slice(0, 0, n);
        let places = Tensor::new(&[longest, 1], (0..longest).map(|i| i as f32).collect());
        let places = b.parameter("places", &places).slice(0, 0, n);
        // 1 where the row's token comes before the column's, [n, n].
        let ahead = places.reshape(&[1, -1]) - places;
        let before = ahead.relu() - (ahead - 1.0).relu();
        // [batch, 1], and [batch, n]: real tokens before each, and after it.
        let length = mask.matmul(ones);
        let earlier = mask.matmul(before);
        let later = (length - earlier) - mask;
        let real = length.cast(ElementType::I64).reshape(&[-1]);
        let (features, names) = (options.length_features(), ["length_features", "length_features_over_length"]);
        let tables = features.tables();
        let features = [0, 1].map(|i| b.parameter(names[i], &tables[i]).gather(real));
        let per_length = |name: &str, value: fn(usize) -> f32| {
            let values = (0..=longest).map(value).collect();
            b.parameter(name, &Tensor::new(&[longest + 1, 1], values)).gather(real)
        };
        let mean = mask * per_length("one_over_length", |length| 1.0 / length.max(1) as f32);
        let several = mask * per_length("several", |length| f32::from(u8::from(length > 1)));
        let ends = [earlier, later].map(|others| several * (1.0 - others).relu());
        let row = |value: Expr<'b>| value.reshape(&[0, 1, 1, -1]);
        let column = |value: Expr<'b>| value.reshape(&[0, 1, -1, 1]);
        Self {
            over_keys: row(mask),
            over_rows: column(mask),
            mean_row: row(mean),
            mean_column: column(mean),
            end_rows: b.concat(&ends.map(row), 2),
            end_columns: b.concat(&ends.map(column), 3),
            features,
        }
    }
}

/// What hinges make of rows of scores.
struct Rows<'b> {
    /// Each hinge of each score, weighted where they are summed, `[batch, H, n, n]`, with its weight `[batch, H, 1, 1]`.
    hinges: Vec<(Expr<'b>, Expr<'b>)>,
    /// What the ends get, `[batch, H, n, 2]`.
    sinks: Expr<'b>,
    /// What all keys share before it is divided by the length, `[batch, H, 1, 1]`.
    even: Expr<'b>,
}

impl HingeParameters {
    /// The names of a site's parameters under `scope`.
    pub(in super::super) fn in_scope(scope: &str, heads: usize, sizes: HingeSizes) -> Self {
        let name = |part: &str| format!("{scope}/{part}");
        Self {
            statistics: (1..=sizes.statistics).map(|r| name(&format!("statistic_{r}"))).collect(),
            w1: name("w1"),
            b1: name("b1"),
            w2: name("w2"),
            b2: name("b2"),
            weight: name("weight"),
            even: name("even"),
            heads,
            sizes,
        }
    }

    /// All of them, in the order of the fields.
    pub fn names(&self) -> Vec<&String> {
        let others = [&self.w1, &self.b1, &self.w2, &self.b2, &self.weight, &self.even];
        self.statistics.iter().chain(others).collect()
    }

    /// A hinge at each row's mean; no sinks.
    pub(super) fn declare(&self, b: &Builder, options: &ApproximatorOptions) {
        let (heads, sizes) = (self.heads, self.sizes);
        let k = options.length_features().knots.len();
        let zeros = |name: &String, shape: &[usize]| {
            b.constant(name, &Tensor::new(shape, vec![0f32; shape.iter().product()]));
        };
        self.statistics.iter().for_each(|name| zeros(name, &[heads, 1, 1]));
        zeros(&self.w1, &[heads, sizes.features(), sizes.hidden]);
        zeros(&self.b1, &[k, heads * sizes.hidden]);
        zeros(&self.w2, &[heads, sizes.hidden + sizes.features(), sizes.thresholds()]);
        zeros(&self.b2, &[k, heads * sizes.thresholds()]);
        // The first knot is that of one token alone, which attends to itself whatever its score.
        let first = |width: usize, at_one: f32, others: f32| {
            let values = (0..k * width).map(|at| if at < width { at_one } else { others }).collect();
            Tensor::new(&[k, width], values)
        };
        b.constant(&self.weight, &first(heads * sizes.hinges, 0.0, 1.0 / sizes.hinges as f32));
        b.constant(&self.even, &first(heads, 1.0, 0.5));
    }

    /// The probabilities as a value of the graph.
    pub(super) fn probabilities<'b>(&self, b: &'b Builder, batch: &HingeBatch<'b>, scores: Expr<'b>) -> Expr<'b> {
        let centred = scores - scores.matmul(batch.mean_column);
        let Rows { hinges, sinks, even } = self.rows(b, batch, centred, centred.matmul(batch.end_columns));
        let weighted = hinges.into_iter().map(|(hinge, weight)| hinge * weight);
        let sum = weighted.reduce(|sum, hinge| sum + hinge).expect("there is a hinge");
        sum * batch.over_keys + sinks.matmul(batch.end_rows) + even * batch.mean_row
    }

    /// The contexts without them: hinges meet the values one by one, and the scores at the ends are products with two keys.
    pub(super) fn context<'b>(&self, b: &'b Builder, batch: &HingeBatch<'b>, site: &AttentionSite) -> Expr<'b> {
        let [query, key, value] = [&site.query, &site.key, &site.value].map(|v| b.value(v));
        // [batch, H, d, n]: keys from their mean, and the scores from theirs.
        let (centred, at_ends) = match site.bias {
            None => {
                let keys = key - key.matmul(batch.mean_column);
                (query.matmul(keys), query.matmul(keys.matmul(batch.end_columns)))
            }
            // What is added by position has a mean of its own.
            Some(_) => {
                let scores = b.value(&site.products);
                let centred = scores - scores.matmul(batch.mean_column);
                (centred, centred.matmul(batch.end_columns))
            }
        };
        let Rows { hinges, sinks, even } = self.rows(b, batch, centred, at_ends);
        let values = value * batch.over_rows;
        let seen = hinges.into_iter().map(|(hinge, weight)| hinge.matmul(values * weight));
        let seen = seen.reduce(|sum, context| sum + context).expect("there is a hinge");
        seen + sinks.matmul(batch.end_rows.matmul(value)) + batch.mean_row.matmul(value) * even
    }

    /// `centred` scores `[batch, H, n, n]`, and those of them `at_ends` `[batch, H, n, 2]`.
    fn rows<'b>(&self, b: &'b Builder, batch: &HingeBatch<'b>, centred: Expr<'b>, at_ends: Expr<'b>) -> Rows<'b> {
        let (heads, g) = (self.heads as i64, self.sizes.hinges as i64);
        let at_length =
            |table: &String, features: Expr<'b>| features.matmul(b.value(table)).reshape(&[0, heads, 1, -1]);
        let [plain, over_length] = batch.features;
        let statistic = |threshold: &String| (centred - b.value(threshold)).relu().matmul(batch.mean_column);
        let mut features: Vec<Expr<'b>> = self.statistics.iter().map(statistic).collect();
        features.push(at_ends);
        let features = b.concat(&features, 3);
        let hidden = (features.matmul(b.value(&self.w1)) + at_length(&self.b1, plain)).relu();
        let thresholds = b.concat(&[hidden, features], 3).matmul(b.value(&self.w2)) + at_length(&self.b2, plain);
        let weights = at_length(&self.weight, over_length);
        let hinge = |at: i64| {
            let weight = if g == 1 { weights } else { weights.slice(3, at, at + 1) };
            ((centred - thresholds.slice(3, at, at + 1)).relu(), weight)
        };
        Rows {
            hinges: (0..g).map(hinge).collect(),
            sinks: thresholds.slice(3, g, g + ENDS as i64).relu(),
            even: at_length(&self.even, plain),
        }
    }
}

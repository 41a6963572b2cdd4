//! Approximating: softmax becomes a two-layer ReLU network on each row of scores, in the paper's order.

use mabert_graph::{Builder, Model, Tensor};

use super::approximator::{Approximator, ApproximatorOptions, LengthFeatures, Shared, Sharing};
use crate::Result;
use crate::sites::Encoder;

/// Replaces each layer's probabilities; returns the approximator of each layer (the same one where it is shared).
/// Parameters start at even attention, `1 / len`, plus what exceeds zero of each score; they are for calibration to set.
///
/// # Errors
/// The graph's wiring is broken.
pub fn approximate_softmax(
    model: &mut Model,
    encoder: &Encoder,
    options: &ApproximatorOptions,
) -> Result<Vec<Approximator>> {
    let groups = if options.sharing == Sharing::PerHead { encoder.heads() } else { 1 };
    let builder = Builder::new(model.opset(), "softmax");
    let b = &builder;
    let shared = Shared::new(b, options, "approximator");
    let mut approximators: Vec<Approximator> = Vec::new();
    let mut shunts = Vec::new();
    for layer in &encoder.layers {
        let scope = match options.sharing {
            Sharing::Shared => "approximator".to_owned(),
            _ => format!("layer.{}/attention/approximator", layer.index),
        };
        let approximator = Approximator::named(&scope, groups);
        if options.sharing != Sharing::Shared || approximators.is_empty() {
            declare(b, &approximator, options);
        }
        b.scope(&scope);
        let net = approximator.apply(b, &shared);
        let scores = b.value(&layer.attention.products);
        let hidden = ((scores * shared.over_keys).matmul(net.w1) + net.b1).relu();
        let hidden = net.scale.map_or(hidden, |scale| hidden * scale);
        let probabilities = (hidden.matmul(net.w2) + net.b2) * shared.over_keys;
        shunts.push((layer.attention.probabilities.clone(), probabilities.name()));
        approximators.push(approximator);
    }
    let patch = shunts.iter().fold(builder.patch(), |patch, (old, new)| patch.shunt(old, new));
    patch.apply(model)?;
    Ok(approximators)
}

fn declare(b: &Builder, approximator: &Approximator, options: &ApproximatorOptions) {
    let (g, n, h) = (approximator.groups, options.max_seq, options.hidden);
    let k = LengthFeatures::new(options).knots.len();
    let unit = |i: usize, j: usize| if i % h == j { 1f32 } else { 0.0 };
    let w1 = (0..g * n * h).map(|at| unit(at / h % n, at % h)).collect();
    let w2 = (0..g * h * n).map(|at| unit(at % n, at / n % h)).collect();
    b.constant(&approximator.w1, &Tensor::new(&[g, n, h], w1));
    b.constant(&approximator.w2, &Tensor::new(&[g, h, n], w2));
    b.constant(&approximator.b1, &Tensor::new(&[k, g * h], vec![0f32; k * g * h]));
    b.constant(&approximator.b2, &Tensor::new(&[k, g * n], vec![1f32; k * g * n]));
    if options.length_tables {
        b.constant(&approximator.scale, &Tensor::new(&[k, g * h], vec![1f32; k * g * h]));
    }
}

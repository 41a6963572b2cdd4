//! Approximating: softmax becomes a two-layer ReLU network on each row of scores, in the paper's order.

use mabert_graph::{Builder, Model, Tensor};

use super::approximator::{Approximator, ApproximatorOptions, BatchValues, LengthFeatures, Sharing};
use crate::Result;
use crate::sites::{Encoder, LayerSite};

/// Replaces each layer's probabilities; returns the approximator of each layer (the same one where it is shared).
/// Parameters start at even attention, `1 / len`, plus what exceeds zero of each score; they are for calibration to set.
///
/// # Errors
/// The graph's wiring is broken.
pub(crate) fn approximate_softmax(
    model: &mut Model,
    encoder: &Encoder,
    options: &ApproximatorOptions,
) -> Result<Vec<Approximator>> {
    let groups = if options.sharing == Sharing::PerHead { encoder.heads() } else { 1 };
    let builder = Builder::new(model.opset(), "softmax");
    let b = &builder;
    let batch = BatchValues::new(b, options, encoder, "approximator");
    let mut approximators: Vec<Approximator> = Vec::new();
    let mut shunts = Vec::new();
    for layer in &encoder.layers {
        let scope = match options.sharing {
            Sharing::Shared => "approximator".to_owned(),
            _ => format!("{}/approximator", layer.site(LayerSite::Attention)),
        };
        let approximator = Approximator::in_scope(&scope, groups);
        if options.sharing != Sharing::Shared || approximators.is_empty() {
            declare(b, &approximator, options);
        }
        b.scope(&scope);
        let net = approximator.apply(b, &batch);
        let scores = b.value(&layer.attention.products);
        let hidden = ((scores * batch.over_keys).matmul(net.w1) + net.b1).relu();
        let hidden = net.scale.map_or(hidden, |scale| hidden * scale);
        let probabilities = (hidden.matmul(net.w2) + net.b2) * batch.over_keys;
        shunts.push((&layer.attention.probabilities, probabilities));
        approximators.push(approximator);
    }
    builder.patch_with(shunts).apply(model)?;
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
        // The first knot is that of one token alone, which attends to itself whatever its score.
        let scale = (0..k * g * h).map(|at| if at < g * h { 0.0 } else { 1f32 }).collect();
        b.constant(&approximator.scale, &Tensor::new(&[k, g * h], scale));
    }
}

#[cfg(test)]
mod tests {
    use ndarray::{Ix2, Ix3, Ix4};

    use super::super::approximator::LengthFeatures;
    use crate::pipeline::Pass;
    use crate::testing::{HEADS, MAX_SEQ, layer_text, options, student, values};

    /// `P = (scale[len] relu((S m) W1 + b1[len]) W2 + b2[len]) m`, written out here once more, row by row.
    #[test]
    fn probabilities_are_those_of_the_formula() {
        let student = student(Pass::Softmax);
        let site = &student.encoder.layers[0].attention;
        let lengths = [8, 4, 1];
        let computed = values(&student.model, &[&site.products, &site.probabilities], &lengths);
        let [scores, probabilities] = [0, 1].map(|i| computed[i].clone().into_dimensionality::<Ix4>().unwrap());
        let approximator = &student.approximators[0];
        let constant = |name: &str| student.model.constant(name).unwrap().to_f32();
        let [w1, w2] = [&approximator.w1, &approximator.w2].map(|n| constant(n).into_dimensionality::<Ix3>().unwrap());
        let tables = [&approximator.b1, &approximator.scale, &approximator.b2];
        let [b1, scale, b2] = tables.map(|n| constant(n).into_dimensionality::<Ix2>().unwrap());
        let (n, h) = (MAX_SEQ, w1.shape()[2]);
        let features = LengthFeatures::new(&options(None).approximator);
        for (sentence, &len) in lengths.iter().enumerate() {
            let at = features.at(len);
            let table = |t: &ndarray::Array2<f32>, column: usize| -> f32 {
                at.iter().enumerate().map(|(knot, w)| w * t[[knot, column]]).sum()
            };
            for (head, query) in (0..HEADS).flat_map(|head| (0..n).map(move |query| (head, query))) {
                let hidden: Vec<f32> = (0..h)
                    .map(|j| {
                        let s: f32 = (0..len).map(|i| scores[[sentence, head, query, i]] * w1[[head, i, j]]).sum();
                        (s + table(&b1, head * h + j)).max(0.0) * table(&scale, head * h + j) / len as f32
                    })
                    .collect();
                for key in 0..n {
                    let p: f32 = (0..h).map(|j| hidden[j] * w2[[head, j, key]]).sum();
                    let p = if key < len { p + table(&b2, head * n + key) / len as f32 } else { 0.0 };
                    approx::assert_abs_diff_eq!(probabilities[[sentence, head, query, key]], p, epsilon = 1e-5);
                }
            }
        }
    }

    #[test]
    fn a_row_of_padding_alone_shares_nothing() {
        let student = student(Pass::Softmax);
        let site = &student.encoder.layers[0].attention;
        let computed = values(&student.model, &[&site.probabilities, &site.context], &[3, 0]);
        for value in computed {
            assert!(value.iter().all(|v| v.is_finite()));
            assert!(value.index_axis(ndarray::Axis(0), 1).iter().all(|v| *v == 0.0));
        }
    }

    #[test]
    fn the_structure_is_as_expected() {
        let student = student(Pass::Softmax);
        assert!(!student.model.operators().contains_key("Softmax"));
        assert_eq!(student.outcomes.iter().find(|o| o.pass == Pass::Softmax).unwrap().changed, 1);
        insta::assert_snapshot!(layer_text(&student.model));
    }
}

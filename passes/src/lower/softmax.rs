//! Approximating: softmax becomes hinges or a two-layer ReLU network, on each row of scores.

use mabert_graph::{Builder, Model};

use super::approximator::{Approximator, BatchValues, Form, HingeParameters, NetworkParameters, Sharing};
use crate::Result;
use crate::pipeline::PassOptions;
use crate::sites::{Encoder, Layer, LayerSite};

/// Replaces each layer's probabilities; returns the approximator of each layer (the same one where it is shared).
/// Parameters start at what is finite and far from right; they are for calibration to set.
///
/// # Errors
/// The graph's wiring is broken.
pub(crate) fn approximate_softmax(
    model: &mut Model,
    encoder: &Encoder,
    options: &PassOptions,
) -> Result<Vec<Approximator>> {
    let builder = Builder::new(model.opset(), "softmax");
    let b = &builder;
    let all = &options.approximator;
    let is_shared = all.form == Form::Network && all.sharing == Sharing::Shared;
    let approximators = approximators(encoder, options, is_shared);
    let batch = BatchValues::new(b, all, encoder, "approximator", &approximators);
    let mut shunts = Vec::new();
    for (index, (layer, approximator)) in encoder.layers.iter().zip(&approximators).enumerate() {
        if !is_shared || index == 0 {
            approximator.declare(b, &options.approximator_of(index));
        }
        b.scope(&scope(layer, is_shared));
        let site = &layer.attention;
        shunts.push((&site.probabilities, approximator.probabilities(b, &batch, site)));
    }
    builder.patch_with(shunts).apply(model)?;
    Ok(approximators)
}

/// Where the parameters of a layer's approximator are named.
fn scope(layer: &Layer, is_shared: bool) -> String {
    match is_shared {
        true => "approximator".to_owned(),
        false => format!("{}/approximator", layer.site(LayerSite::Attention)),
    }
}

/// The approximator of each layer.
fn approximators(encoder: &Encoder, options: &PassOptions, is_shared: bool) -> Vec<Approximator> {
    let heads = encoder.heads();
    let approximator = |(index, layer): (usize, &Layer)| {
        let (options, scope) = (options.approximator_of(index), scope(layer, is_shared));
        match options.form {
            Form::Hinges => Approximator::Hinges(HingeParameters::in_scope(&scope, heads, options.hinges)),
            Form::Network => {
                let groups = if options.sharing == Sharing::PerHead { heads } else { 1 };
                Approximator::Network(NetworkParameters::in_scope(&scope, groups))
            }
        }
    };
    encoder.layers.iter().enumerate().map(approximator).collect()
}

#[cfg(test)]
mod tests {
    use ndarray::{Ix2, Ix3, Ix4};

    use super::*;
    use crate::lower::ApproximatorOptions;
    use crate::pipeline::{Order, Pass, PassOptions, Rewriting};
    use crate::testing::{HEADS, MAX_SEQ, encoder, layer_text, options, student, student_of_hinges, values};

    /// `P = (scale[len] relu((S m) W1 + b1[len]) W2 + b2[len]) m`, written out here once more, row by row.
    #[test]
    fn probabilities_are_those_of_the_formula() {
        let student = student(Pass::Softmax);
        let site = &student.encoder.layers[0].attention;
        let lengths = [8, 4, 1];
        let computed = values(&student.model, &[&site.products, &site.probabilities], &lengths);
        let [scores, probabilities] = [0, 1].map(|i| computed[i].clone().into_dimensionality::<Ix4>().unwrap());
        let Approximator::Network(approximator) = &student.approximators[0] else { panic!("a network") };
        let constant = |name: &str| student.model.constant(name).unwrap().to_f32();
        let [w1, w2] = [&approximator.w1, &approximator.w2].map(|n| constant(n).into_dimensionality::<Ix3>().unwrap());
        let tables = [&approximator.b1, &approximator.scale, &approximator.b2];
        let [b1, scale, b2] = tables.map(|n| constant(n).into_dimensionality::<Ix2>().unwrap());
        let (n, h) = (MAX_SEQ, w1.shape()[2]);
        let features = options(None).approximator.length_features();
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

    /// The formula of [`HingeParameters`], written out here once more, row by row.
    #[test]
    fn hinges_are_those_of_the_formula() {
        let student = student_of_hinges(Pass::Softmax);
        let site = &student.encoder.layers[0].attention;
        let lengths = [8, 4, 2, 1];
        let computed = values(&student.model, &[&site.products, &site.probabilities], &lengths);
        let [scores, probabilities] = [0, 1].map(|i| computed[i].clone().into_dimensionality::<Ix4>().unwrap());
        let Approximator::Hinges(hinges) = &student.approximators[0] else { panic!("hinges") };
        let constant = |name: &String| student.model.constant(name).unwrap().to_f32();
        let [w1, w2] = [&hinges.w1, &hinges.w2].map(|n| constant(n).into_dimensionality::<Ix3>().unwrap());
        let tables = [&hinges.b1, &hinges.b2, &hinges.weight, &hinges.even];
        let [b1, b2, weight, even] = tables.map(|n| constant(n).into_dimensionality::<Ix2>().unwrap());
        let statistics: Vec<_> = hinges.statistics.iter().map(constant).collect();
        let features = options(None).approximator.length_features();
        let (g, hidden, t) = (hinges.sizes.hinges, hinges.sizes.hidden, hinges.sizes.thresholds());
        for (sentence, &len) in lengths.iter().enumerate() {
            let at = features.at(len);
            let table = |t: &ndarray::Array2<f32>, column: usize| -> f32 {
                at.iter().enumerate().map(|(knot, w)| w * t[[knot, column]]).sum()
            };
            for (head, query) in (0..HEADS).flat_map(|head| (0..MAX_SEQ).map(move |query| (head, query))) {
                let row: Vec<f32> = (0..len).map(|key| scores[[sentence, head, query, key]]).collect();
                let mean = row.iter().sum::<f32>() / len as f32;
                let row: Vec<f32> = row.iter().map(|score| score - mean).collect();
                let above = |threshold: f32| row.iter().map(|s| (s - threshold).max(0.0)).sum::<f32>() / len as f32;
                let mut known: Vec<f32> = statistics.iter().map(|of| above(of[[head, 0, 0]])).collect();
                known.extend([row[0], row[len - 1]]);
                let unit = |j: usize| {
                    let sum: f32 = known.iter().enumerate().map(|(x, value)| value * w1[[head, x, j]]).sum();
                    (sum + table(&b1, head * hidden + j)).max(0.0)
                };
                let inner: Vec<f32> = (0..hidden).map(unit).chain(known.iter().copied()).collect();
                let threshold = |of: usize| {
                    let sum: f32 = inner.iter().enumerate().map(|(i, value)| value * w2[[head, i, of]]).sum();
                    sum + table(&b2, head * t + of)
                };
                for key in 0..MAX_SEQ {
                    let hinge = |of: usize| table(&weight, head * g + of) * (row[key] - threshold(of)).max(0.0);
                    let sink = |of: usize, place: usize| {
                        if len > 1 && key == place { threshold(g + of).max(0.0) } else { 0.0 }
                    };
                    let p = match key < len {
                        true => {
                            let seen = ((0..g).map(hinge).sum::<f32>() + table(&even, head)) / len as f32;
                            seen + sink(0, 0) + sink(1, len - 1)
                        }
                        false => 0.0,
                    };
                    approx::assert_abs_diff_eq!(probabilities[[sentence, head, query, key]], p, epsilon = 1e-5);
                }
            }
        }
    }

    /// Before anything is fitted, and whatever the scores.
    #[test]
    fn one_token_alone_attends_to_itself() {
        let options = options(Some(Pass::Softmax));
        let approximator = ApproximatorOptions { form: Form::Hinges, ..options.approximator };
        let options = PassOptions { approximator, order: Order::Auto, ..options };
        let student = Rewriting::new(encoder(), options).unwrap().approximate().unwrap();
        let site = &student.encoder.layers[0].attention;
        let probabilities = values(&student.model, &[&site.probabilities], &[1, 3, 0]).remove(0);
        let of_sentence = |sentence: usize| probabilities.index_axis(ndarray::Axis(0), sentence);
        for row in of_sentence(0).rows() {
            assert_eq!(row.to_vec(), [1.0, 0.0, 0.0]);
        }
        assert!(of_sentence(1).iter().all(|p| p.is_finite()) && of_sentence(2).iter().all(|p| *p == 0.0));
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
        let student = student_of_hinges(Pass::Softmax);
        assert!(!student.model.operators().contains_key("Softmax"));
        insta::assert_snapshot!("hinges", layer_text(&student.model));
    }
}

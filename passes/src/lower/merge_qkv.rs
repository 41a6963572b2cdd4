//! Exact: queries, keys and values out of one product.

use mabert_graph::{Builder, Model, Tensor};
use ndarray::{Axis, concatenate};

use super::weights::{matrix, vector};
use crate::Result;
use crate::sites::{Encoder, LayerSite};

/// Merges the three products of each layer into one of `[channels, 3 heads d]`; keys and values alone where queries read
/// something else. Returns how many layers there are.
///
/// # Errors
/// A weight cannot be read, or the graph's wiring is broken.
pub(crate) fn merge_query_key_value(model: &mut Model, encoder: &Encoder) -> Result<usize> {
    let builder = Builder::new(model.opset(), "merge-qkv");
    let b = &builder;
    let mut shunts = Vec::new();
    for layer in &encoder.layers {
        let site = &layer.attention;
        let mut parts = vec![(&layer.query, &site.query), (&layer.key, &site.key), (&layer.value, &site.value)];
        parts.retain(|(map, _)| map.input == layer.key.input);
        let mut weights = Vec::new();
        let mut biases = Vec::new();
        for (map, _) in &parts {
            weights.push(matrix(model, &map.weight)?.mapv(|v| v as f32));
            let name = map.bias_name.as_deref().expect("canonical maps have a bias");
            biases.push(vector(model, name)?.mapv(|v| v as f32));
        }
        let views: Vec<_> = weights.iter().map(|w| w.view()).collect();
        let weight = concatenate(Axis(1), &views).expect("all have as many rows");
        let views: Vec<_> = biases.iter().map(|b| b.view()).collect();
        let bias = concatenate(Axis(0), &views).expect("vectors");
        let (heads, d) = (layer.attention.heads as i64, layer.attention.head_size as i64);
        b.scope(&format!("{}/qkv", layer.site(LayerSite::Attention)));
        let w = b.parameter("weight", &Tensor::from(weight.as_standard_layout().into_owned().into_dyn()));
        let all = b.value(&layer.key.input).matmul(w) + b.parameter("bias", &Tensor::from(bias.into_dyn()));
        let all = all.reshape(&[0, 0, parts.len() as i64 * heads, d]).transpose(&[0, 2, 1, 3]);
        for (i, (_, old)) in parts.iter().enumerate() {
            let i = i as i64;
            let part = all.slice(1, i * heads, (i + 1) * heads);
            let part = if **old == site.key { part.transpose(&[0, 1, 3, 2]) } else { part };
            shunts.push((*old, part));
        }
    }
    builder.patch_with(shunts).apply(model)?;
    Ok(encoder.layers.len())
}

#[cfg(test)]
mod tests {
    use crate::pipeline::Pass;
    use crate::testing::{largest_output_difference, layer_text, student};

    #[test]
    fn one_product_computes_the_same() {
        let (before, after) = (student(Pass::Fold), student(Pass::MergeQkv));
        let products = |s: &crate::pipeline::Student| s.model.operators()["MatMul"];
        assert_eq!(products(&before) - products(&after), 2);
        let difference = largest_output_difference(&before.model, &after.model);
        assert!(difference < 1e-4, "{difference}");
        insta::assert_snapshot!(layer_text(&after.model));
    }
}

//! Exact: attention in the order whose cost is linear in length.
//!
//! Only ReLU stands between the products, so `((Q K^T m) W1 ...)` is `Q ((m K)^T W1)`, and `(... W2 m) V` is
//! `... (W2 (m V))`: no `n x n` matrix is formed, and padding contributes nothing.

use mabert_graph::{Builder, Model};

use super::approximator::{Approximator, ApproximatorOptions, BatchValues};
use crate::Result;
use crate::sites::{Encoder, LayerSite};

/// Re-associates the attention of each layer; returns how many there are.
///
/// # Errors
/// The graph's wiring is broken.
pub(crate) fn reassociate_attention(
    model: &mut Model,
    encoder: &Encoder,
    approximators: &[Approximator],
    options: &ApproximatorOptions,
) -> Result<usize> {
    let builder = Builder::new(model.opset(), "reassociate");
    let b = &builder;
    let batch = BatchValues::new(b, options, encoder, "linear_attention");
    let mut shunts = Vec::new();
    for (layer, approximator) in encoder.layers.iter().zip(approximators) {
        b.scope(&format!("{}/linear", layer.site(LayerSite::Attention)));
        let site = &layer.attention;
        let [query, key, value] = [&site.query, &site.key, &site.value].map(|v| b.value(v));
        let net = approximator.apply(b, &batch);
        // [batch, heads, d, h]
        let keys = (key * batch.over_keys).matmul(net.w1);
        let values = value * batch.over_rows;
        // [batch, heads, h, d]
        let outputs = net.w2.matmul(values);
        let outputs = net.scale_column.map_or(outputs, |scale| outputs * scale);
        let hidden = (query.matmul(keys) + net.b1).relu();
        let context = hidden.matmul(outputs) + net.b2.matmul(values);
        shunts.push((&site.context, context));
    }
    builder.patch_with(shunts).apply(model)?;
    Ok(encoder.layers.len())
}

#[cfg(test)]
mod tests {
    use crate::pipeline::Pass;
    use crate::testing::{largest_output_difference, layer_text, student};

    #[test]
    fn the_linear_order_computes_the_same() {
        let (before, after) = (student(Pass::Norm), student(Pass::Reassociate));
        assert!(after.ran(Pass::Reassociate));
        let difference = largest_output_difference(&before.model, &after.model);
        assert!(difference < 1e-4, "{difference}");
        insta::assert_snapshot!(layer_text(&after.model));
    }
}

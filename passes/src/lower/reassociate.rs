//! Exact: attention without its probabilities as a value. Networks get the order whose cost is linear in length; hinges
//! meet the values one by one.

use mabert_graph::{Builder, Model};

use super::approximator::{Approximator, BatchValues};
use crate::Result;
use crate::pipeline::PassOptions;
use crate::sites::{Encoder, LayerSite};

/// Re-associates the attention of each layer; returns how many there are.
///
/// # Errors
/// The graph's wiring is broken.
pub(crate) fn reassociate_attention(
    model: &mut Model,
    encoder: &Encoder,
    approximators: &[Approximator],
    options: &PassOptions,
) -> Result<usize> {
    let builder = Builder::new(model.opset(), "reassociate");
    let b = &builder;
    let batch = BatchValues::new(b, &options.approximator, encoder, "linear_attention", approximators);
    let mut shunts = Vec::new();
    for (layer, approximator) in encoder.layers.iter().zip(approximators) {
        b.scope(&format!("{}/linear", layer.site(LayerSite::Attention)));
        shunts.push((&layer.attention.context, approximator.context(b, &batch, &layer.attention)));
    }
    builder.patch_with(shunts).apply(model)?;
    Ok(encoder.layers.len())
}

#[cfg(test)]
mod tests {
    use crate::pipeline::Pass;
    use crate::testing::{largest_output_difference, layer_text, student, student_of_hinges, values_of};

    #[test]
    fn the_linear_order_computes_the_same() {
        let (before, after) = (student(Pass::Norm), student(Pass::Reassociate));
        assert!(after.ran(Pass::Reassociate));
        let difference = largest_output_difference(&before.model, &after.model);
        assert!(difference < 1e-4, "{difference}");
        insta::assert_snapshot!(layer_text(&after.model));
    }

    #[test]
    fn hinges_compute_the_same_without_probabilities() {
        let (before, after) = (student_of_hinges(Pass::Norm), student_of_hinges(Pass::Reassociate));
        assert!(after.ran(Pass::Reassociate));
        let difference = largest_output_difference(&before.model, &after.model);
        assert!(difference < 1e-4, "{difference}");
        insta::assert_snapshot!("hinges", layer_text(&after.model));
    }

    /// Longer texts than it was fitted to, and padding on either side or between tokens.
    #[test]
    fn hinges_see_tokens_wherever_padding_is() {
        let student = student_of_hinges(Pass::ShareConstants);
        let ids = [3i64, 7, 1, 12, 5, 9, 2, 16, 4, 11];
        let hidden = |places: &[usize], n: usize| {
            let (mut tokens, mut mask) = (vec![13i64; n], vec![0i64; n]);
            places.iter().zip(ids).for_each(|(&place, id)| (tokens[place], mask[place]) = (id, 1));
            let hidden = values_of(&student.model, &["last_hidden_state"], &tokens, &mask, 1).remove(0);
            places.iter().map(|&place| hidden.slice(ndarray::s![0, place, ..]).to_vec()).collect::<Vec<_>>()
        };
        for count in [1, 2, 5, 10] {
            let alone: Vec<usize> = (0..count).collect();
            let alone = hidden(&alone, count);
            let right: Vec<usize> = (0..count).collect();
            let left: Vec<usize> = (12 - count..12).collect();
            let between: Vec<usize> = (0..count).map(|i| i + usize::from(i > 1) + usize::from(i > 3)).collect();
            for places in [right, left, between] {
                for (padded, alone) in hidden(&places, 12).iter().flatten().zip(alone.iter().flatten()) {
                    approx::assert_abs_diff_eq!(padded, alone, epsilon = 1e-4 * alone.abs().max(1.0));
                }
            }
        }
    }
}

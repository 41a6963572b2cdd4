//! Approximating: GELU becomes ReLU.

use mabert_graph::{Builder, Model};

use crate::Result;
use crate::sites::{Activation, Encoder, LayerSite};

/// Replaces the activation of each layer; returns how many were not ReLU already.
///
/// # Errors
/// The graph's wiring is broken.
pub(crate) fn approximate_activations(model: &mut Model, encoder: &Encoder) -> Result<usize> {
    let builder = Builder::new(model.opset(), "activation");
    let mut shunts = Vec::new();
    for layer in encoder.layers.iter().filter(|l| l.activation.function != Activation::Relu) {
        builder.scope(&layer.site(LayerSite::Activation).to_string());
        let relu = builder.value(&layer.activation.input).relu();
        shunts.push((&layer.activation.output, relu));
    }
    let count = shunts.len();
    builder.patch_with(shunts).apply(model)?;
    Ok(count)
}

#[cfg(test)]
mod tests {
    use crate::pipeline::Pass;
    use crate::testing::{layer_text, student, values};

    #[test]
    fn gelu_becomes_relu() {
        let student = student(Pass::Activation);
        let site = &student.encoder.layers[0].activation;
        let computed = values(&student.model, &[&site.input, &site.output], &[5, 2]);
        assert!(computed[0].iter().any(|x| *x < 0.0));
        assert_eq!(computed[1], computed[0].mapv(|x| x.max(0.0)));
        assert!(!student.model.operators().contains_key("Erf"));
        insta::assert_snapshot!(layer_text(&student.model));
    }
}

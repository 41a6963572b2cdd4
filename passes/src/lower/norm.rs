//! Approximating: layer normalisation becomes a constant affine map of each channel, `a x + c`.

use mabert_graph::{Builder, Model, Tensor};

use crate::Result;
use crate::sites::{Encoder, SiteId};

/// The names of a norm's scale `a` and offset `c`, both `[channels]`.
pub fn norm_parameters(norm: SiteId) -> [String; 2] {
    ["scale", "offset"].map(|parameter| format!("{norm}/{parameter}"))
}

/// Replaces every norm; `a` and `c` start as gamma and beta, for calibration to set.
///
/// # Errors
/// The graph's wiring is broken.
pub(crate) fn approximate_norms(model: &mut Model, encoder: &Encoder) -> Result<usize> {
    let builder = Builder::new(model.opset(), "norm");
    let b = &builder;
    let mut shunts = Vec::new();
    for (id, site) in encoder.norms() {
        let [scale, offset] = norm_parameters(id);
        let a = b.constant(&scale, &Tensor::new(&[site.gamma.len()], site.gamma.clone()));
        let c = b.constant(&offset, &Tensor::new(&[site.beta.len()], site.beta.clone()));
        b.scope(&id.to_string());
        let y = b.value(&site.input) * a + c;
        shunts.push((&site.output, y));
    }
    let count = shunts.len();
    builder.patch_with(shunts).apply(model)?;
    Ok(count)
}

#[cfg(test)]
mod tests {
    use crate::lower::norm_parameters;
    use crate::pipeline::Pass;
    use crate::testing::{layer_text, student, values};

    #[test]
    fn a_norm_becomes_its_affine_map() {
        let student = student(Pass::Norm);
        for (id, site) in student.encoder.norms() {
            let computed = values(&student.model, &[&site.input, &site.output], &[5, 2]);
            let [a, c] = norm_parameters(id).map(|n| student.model.constant(&n).unwrap().to_f32());
            let expected = &computed[0] * &a + &c;
            approx::assert_abs_diff_eq!(computed[1].as_slice().unwrap(), expected.as_slice().unwrap(), epsilon = 1e-5);
        }
        assert_eq!(student.outcomes.iter().find(|o| o.pass == Pass::Norm).unwrap().changed, 3);
        assert!(!student.model.operators().contains_key("ReduceMean"));
        insta::assert_snapshot!(layer_text(&student.model));
    }
}

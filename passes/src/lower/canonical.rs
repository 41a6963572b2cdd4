//! Exact: attention and the linear maps in one spelling, whichever exporter wrote them.
//!
//! Heads are split by `Reshape [0, 0, heads, d]` and `Transpose`, which need no computed shapes; the scale goes into the
//! query's weights; the mask becomes floats once for all layers. What the exporter called the sites' outputs, they are
//! still called.

use mabert_graph::{Builder, ElementType, Expr, Model, Tensor};
use ndarray::Axis;

use super::position_bias::PositionBiases;
use crate::Result;
use crate::sites::{Encoder, LayerSite, LinearSite, NormSite, SiteId};

/// The value that holds the mask as floats, `[batch, n]`.
pub const MASK: &str = "mask/float";

/// What a masked score is lowered by: far beyond every score, far from the largest float.
const REMOVED: f32 = 1e9;

/// Rewrites attention and linear maps canonically; `encoder` then describes the new nodes. Where the scores have a bias by
/// position, it becomes a table for up to `max_seq` tokens.
///
/// # Errors
/// A weight cannot be read.
pub fn canonicalise(model: &mut Model, encoder: &mut Encoder, max_seq: usize) -> Result<()> {
    let builder = Builder::new(model.opset(), "canonical");
    let b = &builder;
    let mask = float_mask(b, encoder);
    b.scope("mask");
    let removed = (mask.reshape(&[0, 1, 1, -1]) - 1.0) * REMOVED;
    let biases = PositionBiases::new(b, model, encoder, max_seq)?;
    let mut shunts = Vec::new();
    if let Some(site) = &mut encoder.embedding_projection {
        let (input, old) = (b.value(&site.input), site.output.clone());
        let y = linear(b, model, site, input, "embeddings/projection", 1.0)?;
        // Layers read it under its own name; whoever else uses it, under the exporter's.
        shunts.push((old, b.op("Identity", &[y], vec![]).name()));
        site.output = y.name();
        encoder.layers[0].input = y.name();
    }
    // What a layer starts from, where the one before no longer ends in the exporter's own value.
    let mut ended: Option<(String, String)> = None;
    for layer in &mut encoder.layers {
        if let Some((old, new)) = ended.take()
            && layer.input == old
        {
            layer.input = new;
        }
        let (heads, d) = (layer.attention.heads as i64, layer.attention.head_size as i64);
        let scope = layer.site(LayerSite::Attention).to_string();
        let x = b.value(&layer.input);
        let scale = layer.attention.scale;
        let query = linear(b, model, &mut layer.query, x, &format!("{scope}/query"), scale)?;
        let key = linear(b, model, &mut layer.key, x, &format!("{scope}/key"), 1.0)?;
        let value = linear(b, model, &mut layer.value, x, &format!("{scope}/value"), 1.0)?;
        for (site, y) in [(&mut layer.query, query), (&mut layer.key, key), (&mut layer.value, value)] {
            site.output = y.name();
        }
        b.scope(&scope);
        let query = query.reshape(&[0, 0, heads, d]).transpose(&[0, 2, 1, 3]).named(&format!("{scope}/q"));
        let key = key.reshape(&[0, 0, heads, d]).transpose(&[0, 2, 3, 1]).named(&format!("{scope}/k"));
        let value = value.reshape(&[0, 0, heads, d]).transpose(&[0, 2, 1, 3]).named(&format!("{scope}/v"));
        let scores = biases.add(query.matmul(key), layer.attention.bias.as_ref()).named(&format!("{scope}/scores"));
        let probabilities = (scores + removed).softmax().named(&format!("{scope}/probabilities"));
        let context = probabilities.matmul(value).named(&format!("{scope}/context_of_heads"));
        let joined = context.transpose(&[0, 2, 1, 3]).reshape(&[0, 0, heads * d]).named(&format!("{scope}/context"));
        layer.attention.scale = 1.0;
        layer.attention.query = query.name();
        layer.attention.key = key.name();
        layer.attention.value = value.name();
        layer.attention.products = scores.name();
        layer.attention.probabilities = probabilities.name();
        layer.attention.context = context.name();
        let old = layer.attention_output.output.clone();
        let o = linear(b, model, &mut layer.attention_output, joined, &format!("{scope}/output"), 1.0)?;
        shunts.push((old, o.name()));
        let sum = x + o;
        shunts.push((layer.attention_norm.input.clone(), sum.name()));
        let id = layer.site(LayerSite::AttentionNorm);
        unflatten(b, &mut layer.attention_norm, sum, id, &mut shunts);
        let scope = format!("layer.{}", layer.index);
        let stream = b.value(&layer.attention_norm.output);
        let old = [&layer.intermediate.output, &layer.output.output].map(String::clone);
        let up = linear(b, model, &mut layer.intermediate, stream, &format!("{scope}/intermediate"), 1.0)?;
        let active = b.value(&layer.output.input);
        let down = linear(b, model, &mut layer.output, active, &format!("{scope}/output"), 1.0)?;
        shunts.extend(old.into_iter().zip([up.name(), down.name()]));
        let sum = stream + down;
        shunts.push((layer.output_norm.input.clone(), sum.name()));
        let old = layer.output_norm.output.clone();
        let id = layer.site(LayerSite::OutputNorm);
        if unflatten(b, &mut layer.output_norm, sum, id, &mut shunts) {
            ended = Some((old, layer.output_norm.output.clone()));
        }
    }
    let patch = shunts.iter().fold(builder.patch(), |patch, (old, new)| patch.shunt(old, new));
    patch.apply(model)?;
    Ok(())
}

/// A norm of flattened tokens, which may name its axis by number, becomes one of `sum`, `[batch, n, channels]`; what the
/// exporter called its output stays flattened, for whoever uses it outside. Returns whether it was one.
fn unflatten(b: &Builder, norm: &mut NormSite, sum: Expr<'_>, id: SiteId, shunts: &mut Vec<(String, String)>) -> bool {
    if !std::mem::take(&mut norm.flattened) {
        return false;
    }
    b.scope(&format!("{id}/unflattened"));
    let channels = norm.gamma.len();
    let vector = |label: &str, values: &[f32]| b.parameter(label, &Tensor::new(&[channels], values.to_vec()));
    let (gamma, beta) = (vector("gamma", &norm.gamma), vector("beta", &norm.beta));
    let y = b.value(&sum.name()).layer_norm(gamma, Some(beta), norm.epsilon);
    shunts.push((norm.output.clone(), y.reshape(&[-1, channels as i64]).name()));
    norm.output = y.name();
    true
}

/// The mask as floats `[batch, n]`; ones for models that take none.
fn float_mask<'b>(b: &'b Builder, encoder: &Encoder) -> Expr<'b> {
    b.scope("mask");
    let mask = match &encoder.mask {
        Some(mask) => b.value(&mask.input).cast(ElementType::F32),
        None => {
            let shape = b.value(&encoder.layers[0].input).shape().slice(0, 0, 2);
            b.op("Expand", &[b.parameter("one", &Tensor::new(&[1, 1], vec![1f32])), shape], vec![])
        }
    };
    mask.named(MASK)
}

/// `x W + bias`, scale and `factor` folded into both; `site` then describes it. The output keeps the site's name.
fn linear<'b>(
    b: &'b Builder,
    model: &Model,
    site: &mut LinearSite,
    x: Expr<'b>,
    scope: &str,
    factor: f32,
) -> Result<Expr<'b>> {
    let stored = model.constant(&site.weight)?.to_f32();
    let stored = stored.into_dimensionality::<ndarray::Ix2>().expect("the recogniser only takes matrices");
    let weight = if site.transposed { stored.reversed_axes() } else { stored } * (site.scale * factor);
    let weight = match site.columns.take() {
        Some(columns) => weight.select(Axis(1), &columns),
        None => weight,
    };
    let weight = weight.as_standard_layout().into_owned();
    site.bias.iter_mut().for_each(|v| *v *= factor);
    b.scope(scope);
    site.inputs = weight.nrows();
    let w = b.parameter("weight", &Tensor::from(weight.into_dyn()));
    let bias = b.parameter("bias", &Tensor::new(&[site.bias.len()], site.bias.clone()));
    site.input = x.name();
    site.weight = w.name();
    site.bias_name = Some(bias.name());
    site.transposed = false;
    site.scale = 1.0;
    Ok(x.matmul(w) + bias)
}

#[cfg(test)]
mod tests {
    use crate::pipeline::{Pass, Rewriting};
    use crate::testing::{encoder, furthest, layer_text, options};

    #[test]
    fn the_canonical_form_computes_the_same() {
        let rewriting = Rewriting::new(encoder(), options(Some(Pass::Canonical))).unwrap();
        assert!(furthest(&encoder(), &rewriting.teacher) < 1e-4);
        assert_eq!(rewriting.encoder.layers[0].attention.scale, 1.0);
        insta::assert_snapshot!(layer_text(&rewriting.teacher));
    }
}

//! Exact: attention and the linear maps in one spelling, whichever exporter wrote them.
//!
//! Heads are split by `Reshape [0, 0, heads, d]` and `Transpose`, which need no computed shapes; the scale goes into the
//! query's weights; the mask becomes floats once for all layers. What the exporter called the sites' outputs, they are
//! still called.

use mabert_graph::{Builder, Expr, Model, Tensor};
use ndarray::Axis;

use super::mask::float_mask;
use super::position_bias::PositionBiases;
use crate::Result;
use crate::sites::{Activation, Encoder, Layer, LayerSite, LinearSite, NormSite, SiteId, ValueName};

/// What a masked score is lowered by: far beyond every score, far from the largest float.
const REMOVED: f32 = 1e9;

/// Rewrites attention and linear maps canonically; `encoder` then describes the new nodes. Where the scores have a bias by
/// position, it becomes a table for up to `max_seq` tokens. Returns how many layers there are.
///
/// # Errors
/// A weight cannot be read.
pub(crate) fn canonicalise(model: &mut Model, encoder: &mut Encoder, max_seq: usize) -> Result<usize> {
    let builder = Builder::new(model.opset(), "canonical");
    let mut writer = Writer::new(&builder, model, encoder, max_seq)?;
    writer.embedding_projection(encoder)?;
    let mut replaced = None;
    for layer in &mut encoder.layers {
        if let Some(Replaced { old, new }) = replaced.take()
            && layer.input == old
        {
            layer.input = new;
        }
        writer.attention(layer)?;
        replaced = writer.feed_forward(layer)?;
    }
    builder.patch_with(writer.shunts).apply(model)?;
    Ok(encoder.layers.len())
}

/// A value that a layer no longer ends in, and the one that it ends in.
struct Replaced {
    old: ValueName,
    new: ValueName,
}

/// Writes the canonical nodes.
struct Writer<'b, 'm> {
    b: &'b Builder,
    model: &'m Model,
    /// What is added to the scores of padding, `[batch, 1, 1, n]`.
    removed: Expr<'b>,
    biases: PositionBiases<'b>,
    shunts: Vec<(ValueName, Expr<'b>)>,
}

impl<'b, 'm> Writer<'b, 'm> {
    fn new(b: &'b Builder, model: &'m Model, encoder: &Encoder, max_seq: usize) -> Result<Self> {
        let mask = float_mask(b, encoder);
        b.scope("mask");
        let removed = (mask.reshape(&[0, 1, 1, -1]) - 1.0) * REMOVED;
        let biases = PositionBiases::new(b, model, encoder, max_seq)?;
        Ok(Self { b, model, removed, biases, shunts: Vec::new() })
    }

    /// The map between the embeddings and the first layer, where there is one.
    fn embedding_projection(&mut self, encoder: &mut Encoder) -> Result<()> {
        let Some(site) = &mut encoder.embedding_projection else { return Ok(()) };
        let (input, old) = (self.b.value(&site.input), site.output.clone());
        let y = self.linear(site, input, "embeddings/projection", 1.0)?;
        // Layers read it under its own name; whoever else uses it, under the exporter's.
        self.shunts.push((old, self.b.op("Identity", &[y], vec![])));
        site.output = y.name();
        encoder.layers[0].input = y.name();
        Ok(())
    }

    /// From the layer's input to the norm after attention.
    fn attention(&mut self, layer: &mut Layer) -> Result<()> {
        let b = self.b;
        let scope = layer.site(LayerSite::Attention).to_string();
        let x = b.value(&layer.input);
        let joined = self.context(layer, x, &scope)?;
        let old = layer.attention_output.output.clone();
        let branch = self.linear(&mut layer.attention_output, joined, &format!("{scope}/output"), 1.0)?;
        self.shunts.push((old, branch));
        let sum = x + branch;
        self.shunts.push((layer.attention_norm.input.clone(), sum));
        let id = layer.site(LayerSite::AttentionNorm);
        self.unflatten(id, &mut layer.attention_norm, sum);
        Ok(())
    }

    /// The contexts of all heads side by side, `[batch, n, heads * d]`, of the layer's input `x`.
    fn context(&mut self, layer: &mut Layer, x: Expr<'b>, scope: &str) -> Result<Expr<'b>> {
        let b = self.b;
        let (heads, d) = (layer.attention.heads as i64, layer.attention.head_size as i64);
        let scale = layer.attention.scale;
        let query = self.linear(&mut layer.query, x, &format!("{scope}/query"), scale)?;
        let key = self.linear(&mut layer.key, x, &format!("{scope}/key"), 1.0)?;
        let value = self.linear(&mut layer.value, x, &format!("{scope}/value"), 1.0)?;
        for (site, y) in [(&mut layer.query, query), (&mut layer.key, key), (&mut layer.value, value)] {
            site.output = y.name();
        }
        b.scope(scope);
        let query = query.reshape(&[0, 0, heads, d]).transpose(&[0, 2, 1, 3]).named(&format!("{scope}/q"));
        let key = key.reshape(&[0, 0, heads, d]).transpose(&[0, 2, 3, 1]).named(&format!("{scope}/k"));
        let value = value.reshape(&[0, 0, heads, d]).transpose(&[0, 2, 1, 3]).named(&format!("{scope}/v"));
        let site = &mut layer.attention;
        let shown = site.probabilities_shown.map(|rank| (rank, site.probabilities.clone()));
        let scores = self.biases.add(query.matmul(key), site.bias.as_ref()).named(&format!("{scope}/scores"));
        let probabilities = (scores + self.removed).softmax().named(&format!("{scope}/probabilities"));
        let context = probabilities.matmul(value).named(&format!("{scope}/context_of_heads"));
        let joined = context.transpose(&[0, 2, 1, 3]).reshape(&[0, 0, heads * d]).named(&format!("{scope}/context"));
        if let Some((rank, old)) = shown {
            self.shunts.push((old, self.as_shown(probabilities, rank)));
        }
        site.scale = 1.0;
        site.query = query.name();
        site.key = key.name();
        site.value = value.name();
        site.products = scores.name();
        site.probabilities = probabilities.name();
        site.context = context.name();
        Ok(joined)
    }

    /// The probabilities, `[batch, heads, n, n]`, as the exporter's graph has them: of rank 3, with heads beside sentences.
    fn as_shown(&self, probabilities: Expr<'b>, rank: usize) -> Expr<'b> {
        let b = self.b;
        match rank {
            3 => {
                let rows = probabilities.shape().slice(0, 2, 4);
                probabilities.reshape_to(b.concat(&[b.ints(&[-1]), rows], 0))
            }
            // Layers read them under their own name; whoever else uses them, under the exporter's.
            _ => b.op("Identity", &[probabilities], vec![]),
        }
    }

    /// From the norm after attention to the layer's end. What the next layer may know by another name is told.
    fn feed_forward(&mut self, layer: &mut Layer) -> Result<Option<Replaced>> {
        let b = self.b;
        let id = layer.site(LayerSite::OutputNorm);
        let scope = id.module();
        let stream = b.value(&layer.attention_norm.output);
        let old = [&layer.intermediate.output, &layer.output.output].map(String::clone);
        let up = self.linear(&mut layer.intermediate, stream, &format!("{scope}/intermediate"), 1.0)?;
        let active = self.active(layer, up, &old[0]);
        let down = self.linear(&mut layer.output, active, &format!("{scope}/output"), 1.0)?;
        self.shunts.extend(old.into_iter().zip([up, down]));
        let sum = stream + down;
        self.shunts.push((layer.output_norm.input.clone(), sum));
        Ok(self.unflatten(id, &mut layer.output_norm, sum))
    }

    /// What goes into the layer's second map: its activation. A factor of that becomes the map's. `up` is what the first map
    /// makes, and was called `old`.
    fn active(&self, layer: &mut Layer, up: Expr<'b>, old: &str) -> Expr<'b> {
        let b = self.b;
        let scope = layer.site(LayerSite::Activation).to_string();
        let site = &mut layer.activation;
        if site.factor == 1.0 {
            return b.value(&layer.output.input);
        }
        b.scope(&scope);
        let x = if site.input == old { up } else { b.value(&site.input) };
        let active = match site.function {
            Activation::GeluErf => x.gelu_erf(),
            Activation::GeluTanh => x.gelu_tanh(),
            Activation::GeluSigmoid => x * b.op("Sigmoid", &[x * 1.702], vec![]),
            Activation::Relu => x.relu(),
        };
        site.output = active.name();
        layer.output.scale *= std::mem::replace(&mut site.factor, 1.0);
        active
    }

    /// A norm of flattened tokens, which may name its axis by number, becomes one of `sum`, `[batch, n, channels]`; what the
    /// exporter called its output stays flattened, for whoever uses it outside.
    fn unflatten(&mut self, id: SiteId, norm: &mut NormSite, sum: Expr<'b>) -> Option<Replaced> {
        if !std::mem::take(&mut norm.flattened) {
            return None;
        }
        self.b.scope(&format!("{id}/unflattened"));
        let channels = norm.gamma.len();
        let vector = |label: &str, values: &[f32]| self.b.parameter(label, &Tensor::new(&[channels], values.to_vec()));
        let (gamma, beta) = (vector("gamma", &norm.gamma), vector("beta", &norm.beta));
        let y = sum.layer_norm(gamma, Some(beta), norm.epsilon);
        let old = std::mem::replace(&mut norm.output, y.name());
        self.shunts.push((old.clone(), y.reshape(&[-1, channels as i64])));
        Some(Replaced { old, new: y.name() })
    }

    /// `x W + bias`, scale and `factor` folded into both; `site` then describes it. The output keeps the site's name.
    fn linear(&self, site: &mut LinearSite, x: Expr<'b>, scope: &str, factor: f32) -> Result<Expr<'b>> {
        let stored = self.model.constant(&site.weight)?.to_f32();
        let stored = stored.into_dimensionality::<ndarray::Ix2>().expect("the recogniser only takes matrices");
        let weight = if site.transposed { stored.reversed_axes() } else { stored } * (site.scale * factor);
        let weight = match site.columns.take() {
            Some(columns) => weight.select(Axis(1), &columns),
            None => weight,
        };
        let weight = weight.as_standard_layout().into_owned();
        site.bias.iter_mut().for_each(|v| *v *= factor);
        self.b.scope(scope);
        site.inputs = weight.nrows();
        let w = self.b.parameter("weight", &Tensor::from(weight.into_dyn()));
        let bias = self.b.parameter("bias", &Tensor::new(&[site.bias.len()], site.bias.clone()));
        site.input = x.name();
        site.weight = w.name();
        site.bias_name = Some(bias.name());
        site.transposed = false;
        site.scale = 1.0;
        Ok(x.matmul(w) + bias)
    }
}

#[cfg(test)]
mod tests {
    use crate::pipeline::{Pass, Rewriting};
    use crate::testing::{encoder, largest_output_difference, layer_text, options};

    #[test]
    fn the_canonical_form_computes_the_same() {
        let rewriting = Rewriting::new(encoder(), options(Some(Pass::Canonical))).unwrap();
        assert!(largest_output_difference(&encoder(), &rewriting.teacher) < 1e-4);
        assert_eq!(rewriting.encoder.layers[0].attention.scale, 1.0);
        insta::assert_snapshot!(layer_text(&rewriting.teacher));
    }
}

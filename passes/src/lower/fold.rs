//! Exact: the affine maps that the norms have become disappear into the weights beside them.
//!
//! With `LN -> a r + c`, the stream carries `r` in a scaled basis: the value the teacher knows is `p s + q`, channel by
//! channel. Consumers with constant weights absorb it (`diag(p) W`, `b + q W`); branches that are added to the stream
//! are divided by `p`, with `q` in their bias. Where the value leaves the encoder, `p s + q` is applied once. Where a norm
//! is bounded, a constant on top of the branch puts the middle of the bounds at zero, and `s` saturates.

use mabert_graph::{Builder, Expr, Model, Tensor};
use ndarray::{Array1, Array2, Axis, Zip};
use serde::Serialize;

use super::basis::Through;
use super::bound::{Bounds, FOLDED};
use super::norm::norm_parameters;
use super::weights::{matrix, single, vector};
use crate::Result;
use crate::sites::{Encoder, Layer, LayerSite, LinearSite, NormSite, Precision, SiteId, ValueName};

/// What folding did.
#[derive(Clone, Copy, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct FoldReport {
    /// Norms that disappeared.
    pub norms: usize,
    /// Channels, over all norms, that kept an explicit scale.
    pub explicit_channels: usize,
}

/// Folds every norm of the encoder, all of which must be affine, and held to `bounds`; `encoder` then describes the new
/// nodes. Weights will be rounded to `precision`.
///
/// # Errors
/// A parameter cannot be read, or the graph's wiring is broken.
pub(crate) fn fold_norms(
    model: &mut Model,
    encoder: &mut Encoder,
    precision: Precision,
    bounds: &Bounds,
) -> Result<FoldReport> {
    let builder = Builder::new(model.opset(), "fold");
    let stream = Stream::unscaled(builder.value(&encoder.embedding_norm.input), encoder.embedding_norm.gamma.len());
    let report = FoldReport::default();
    let mut folding = Folding { b: &builder, model, precision, bounds, stream, report, shunts: Vec::new() };
    folding.norm(SiteId::EmbeddingNorm, &encoder.embedding_norm)?;
    if let Some(site) = &mut encoder.embedding_projection {
        folding.embedding_projection(site)?;
    }
    for layer in &mut encoder.layers {
        folding.layer(layer)?;
    }
    let Folding { shunts, report, .. } = folding;
    builder.patch_with(shunts).apply(model)?;
    Ok(report)
}

/// The stream at one place: its value `s`, and `p`, `q` with which the teacher's value is `p s + q`.
struct Stream<'b> {
    value: Expr<'b>,
    p: Array1<f64>,
    q: Array1<f64>,
}

impl<'b> Stream<'b> {
    /// The teacher's value itself.
    fn unscaled(value: Expr<'b>, channels: usize) -> Self {
        Self { value, p: Array1::ones(channels), q: Array1::zeros(channels) }
    }
}

/// A walk along the stream.
struct Folding<'b, 'm> {
    b: &'b Builder,
    model: &'m Model,
    precision: Precision,
    bounds: &'m Bounds,
    stream: Stream<'b>,
    report: FoldReport,
    shunts: Vec<(ValueName, Expr<'b>)>,
}

impl<'b> Folding<'b, '_> {
    fn embedding_projection(&mut self, site: &mut LinearSite) -> Result<()> {
        let old = site.output.clone();
        let value = self.absorb(site, "embeddings/projection/folded")?;
        // Under the old name for whoever else uses it; the layers read the stream by its own.
        self.b.scope("embeddings/projection/leave");
        self.shunts.push((old, self.b.op("Identity", &[value], vec![])));
        self.stream = Stream::unscaled(value, site.outputs);
        Ok(())
    }

    fn layer(&mut self, layer: &mut Layer) -> Result<()> {
        let [attention_norm, output_norm] =
            [LayerSite::AttentionNorm, LayerSite::OutputNorm].map(|site| layer.site(site));
        let scope = attention_norm.module();
        let attention = layer.site(LayerSite::Attention).to_string();
        for (site, part) in [(&mut layer.query, "query"), (&mut layer.key, "key"), (&mut layer.value, "value")] {
            self.consumer(site, &format!("{attention}/{part}/folded"))?;
        }
        layer.input = self.stream.value.name();
        self.add_branch(&mut layer.attention_output, &attention, attention_norm)?;
        self.norm(attention_norm, &layer.attention_norm)?;
        self.consumer(&mut layer.intermediate, &format!("{scope}/intermediate/folded"))?;
        self.add_branch(&mut layer.output, &scope, output_norm)?;
        self.norm(output_norm, &layer.output_norm)
    }

    /// Through a norm; whoever uses its output outside the encoder gets the teacher's value.
    fn norm(&mut self, id: SiteId, site: &NormSite) -> Result<()> {
        self.pass_norm(id)?;
        self.b.scope(&format!("{id}/leave"));
        let Stream { value, p, q } = &self.stream;
        let left = *value * self.b.parameter("scale", &single(p)) + self.b.parameter("offset", &single(q));
        self.shunts.push((site.output.clone(), left));
        Ok(())
    }

    /// Through `a r + c`, and the bound behind it.
    fn pass_norm(&mut self, id: SiteId) -> Result<()> {
        let [a, c] = self.affine(id)?;
        let Through { p, explicit, explicit_channels } = Through::norm(&self.stream.p, &a, self.precision);
        let (b, stream) = (self.b, &mut self.stream);
        stream.q = &stream.q * &a + c;
        stream.p = p;
        let bound = self.bounds.get(&id);
        if explicit_channels > 0 {
            b.scope(&format!("{id}/explicit"));
            stream.value = stream.value * b.parameter("scale", &single(&explicit));
            if let Some(bound) = bound {
                let offset = Zip::from(&stream.q).and(&bound.middle).and(&stream.p).map_collect(|q, m, p| (q - m) / p);
                stream.value = stream.value + b.parameter("offset", &single(&offset));
            }
        }
        if let Some(bound) = bound {
            b.scope(&format!("{id}/{FOLDED}"));
            stream.value = stream.value.clip(-bound.limit, bound.limit);
            stream.q.assign(&bound.middle);
        }
        self.report.norms += 1;
        self.report.explicit_channels += explicit_channels;
        Ok(())
    }

    /// A norm's `a` and `c`.
    fn affine(&self, id: SiteId) -> Result<[Array1<f64>; 2]> {
        let [scale, offset] = norm_parameters(id);
        Ok([vector(self.model, &scale)?, vector(self.model, &offset)?])
    }

    /// What comes on top of the branch before a norm, so that the middle of the bounds behind it is zero. Channels with an
    /// explicit scale, which may be zero, get theirs behind that.
    fn shift(&self, id: SiteId) -> Result<Array1<f64>> {
        let Some(bound) = self.bounds.get(&id) else { return Ok(Array1::zeros(self.stream.p.len())) };
        let [a, c] = self.affine(id)?;
        let Through { p, explicit, .. } = Through::norm(&self.stream.p, &a, self.precision);
        let to_zero = (c - &bound.middle) / p;
        Ok(Zip::from(&to_zero)
            .and(&explicit)
            .map_collect(|shift, explicit| if *explicit == 1.0 { *shift } else { 0.0 }))
    }

    /// A linear map of the stream, for whoever knew it as one of the teacher's value.
    fn consumer(&mut self, site: &mut LinearSite, scope: &str) -> Result<()> {
        let old = site.output.clone();
        let y = self.absorb(site, scope)?;
        self.shunts.push((old, y));
        Ok(())
    }

    /// A linear map of the teacher's value as one of the stream: `(p s + q) W + b = s (diag(p) W) + (b + q W)`.
    fn absorb(&self, site: &mut LinearSite, scope: &str) -> Result<Expr<'b>> {
        let weight = matrix(self.model, &site.weight)?;
        let bias = bias(self.model, site)? + self.stream.q.dot(&weight);
        let weight = weight * self.stream.p.view().insert_axis(Axis(1));
        self.b.scope(scope);
        Ok(self.linear(site, self.stream.value, &weight, &bias))
    }

    /// The stream plus a branch, the output map under `scope`, before a norm:
    /// `p s + q + (x W + b) = p (s + (x W + b + q) / p + shift) - p shift`.
    fn add_branch(&mut self, site: &mut LinearSite, scope: &str, norm: SiteId) -> Result<()> {
        let shift = self.shift(norm)?;
        let Stream { p, q, .. } = &self.stream;
        let weight = matrix(self.model, &site.weight)? / p.view().insert_axis(Axis(0));
        let bias = (bias(self.model, site)? + q) / p + &shift;
        let input = self.b.value(&site.input);
        self.b.scope(&format!("{scope}/output/folded"));
        let branch = self.linear(site, input, &weight, &bias);
        self.stream.value = (self.stream.value + branch).named(&format!("{scope}/stream"));
        self.stream.q = -shift * &self.stream.p;
        Ok(())
    }

    /// `x W + b` in the scope of the builder; `site` then describes it.
    fn linear(&self, site: &mut LinearSite, x: Expr<'b>, weight: &Array2<f64>, bias: &Array1<f64>) -> Expr<'b> {
        let stored = weight.mapv(|v| v as f32).as_standard_layout().into_owned();
        let w = self.b.parameter("weight", &Tensor::from(stored.into_dyn()));
        let offset = self.b.parameter("bias", &single(bias));
        let y = x.matmul(w) + offset;
        site.input = x.name();
        site.output = y.name();
        site.weight = w.name();
        site.bias_name = Some(offset.name());
        y
    }
}

fn bias(model: &Model, site: &LinearSite) -> Result<Array1<f64>> {
    match &site.bias_name {
        Some(name) => vector(model, name),
        None => Ok(site.bias.iter().map(|&v| f64::from(v)).collect()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::Pass;
    use crate::testing::{CHANNELS, largest_output_difference, layer_text, student};

    #[test]
    fn the_folded_stream_computes_the_same() {
        let (before, after) = (student(Pass::Reassociate), student(Pass::Fold));
        assert_eq!((after.fold.norms, after.fold.explicit_channels), (3, 0));
        let difference = largest_output_difference(&before.model, &after.model);
        assert!(difference < 1e-4, "{difference}");
        insta::assert_snapshot!(layer_text(&after.model));
    }

    #[test]
    fn channels_that_would_leave_the_safe_range_keep_a_scale() {
        let before = student(Pass::Reassociate);
        let mut model = before.model.clone();
        let mut encoder = before.encoder.clone();
        let [scale, _] = norm_parameters(SiteId::Layer(0, LayerSite::AttentionNorm));
        let mut values = vec![0.9f32; CHANNELS];
        (values[1], values[4], values[6]) = (1e-5, 1e5, 0.0);
        model.set_constant(&scale, &Tensor::new(&[CHANNELS], values));
        let unfolded = model.clone();
        let report = fold_norms(&mut model, &mut encoder, Precision::Single, &Bounds::new()).unwrap();
        assert_eq!(report.explicit_channels, 3);
        assert!(model.graph().node.iter().any(|n| n.name.starts_with("layer.0/attention/norm/explicit")));
        // One channel carries values around 1e5: rounding is relative to those.
        let difference = largest_output_difference(&unfolded, &model);
        assert!(difference < 1e-4 * 1e5, "{difference}");
    }

    /// A scale that single precision takes, and by which half precision would overflow: it is kept apart.
    #[test]
    fn half_precision_has_a_safe_range_of_its_own() {
        let before = student(Pass::Reassociate);
        let [scale, offset] = norm_parameters(SiteId::Layer(0, LayerSite::AttentionNorm));
        let mut wide = before.model.clone();
        let [first, _] = norm_parameters(SiteId::EmbeddingNorm);
        for (name, value) in [(first, 1f32), (scale, 3e-3), (offset, 300.0)] {
            let mut values = wide.constant(&name).unwrap().to_f32();
            values[1] = value;
            wide.set_constant(&name, &values.into());
        }
        let folded = |precision: Precision| {
            let (mut model, mut encoder) = (wide.clone(), before.encoder.clone());
            let explicit = fold_norms(&mut model, &mut encoder, precision, &Bounds::new()).unwrap().explicit_channels;
            mabert_graph::narrow_to_half(&mut model).map(|()| (explicit, model))
        };
        let reason = folded(Precision::Single).map(|(explicit, _)| explicit).unwrap_err().to_string();
        assert!(reason.contains("beyond half precision"), "{reason}");
        let (explicit, mut model) = folded(Precision::Half).unwrap();
        assert_eq!(explicit, 1);
        mabert_graph::widen_half(&mut model).unwrap();
        // A channel carries values around 300.
        let difference = largest_output_difference(&wide, &model);
        assert!(difference < 1e-2 * 300.0, "{difference}");
    }
}

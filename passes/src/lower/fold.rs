//! Exact: the affine maps that the norms have become disappear into the weights beside them.
//!
//! With `LN -> a r + c`, the stream carries `r` in a scaled basis: the value the teacher knows is `p s + q`, channel by
//! channel. Consumers with constant weights absorb it (`diag(p) W`, `b + q W`); branches that are added to the stream
//! are divided by `p`, with `q` in their bias. Where the value leaves the encoder, `p s + q` is applied once.

use std::ops::RangeInclusive;

use mabert_graph::{Builder, Expr, Model, Tensor};
use ndarray::{Array1, Array2, Axis};
use serde::Serialize;

use super::norm::norm_parameters;
use crate::Result;
use crate::sites::{Encoder, LayerSite, LinearSite, SiteId};

/// Channels whose running product leaves this range keep an explicit scale: dividing by them would blow rounding up.
const SAFE: RangeInclusive<f64> = 1.0 / 1024.0..=1024.0;
/// The same in half precision, which holds 6e-5 to 65,504 at full precision: weights and streams of ordinary size stay inside.
const SAFE_IN_HALF: RangeInclusive<f64> = 1.0 / 32.0..=32.0;

/// What folding did.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct FoldReport {
    /// Norms that disappeared.
    pub norms: usize,
    /// Channels, over all norms, that kept an explicit scale.
    pub explicit_channels: usize,
}

/// The stream at one place: its value `s`, and `p`, `q` with which the teacher's value is `p s + q`.
struct Stream<'b> {
    value: Expr<'b>,
    p: Array1<f64>,
    q: Array1<f64>,
}

/// Folds every norm of the encoder, all of which must be affine; `encoder` then describes the new nodes. `half` says that the
/// weights will be rounded to half precision.
///
/// # Errors
/// A parameter cannot be read, or the graph's wiring is broken.
pub fn fold_norms(model: &mut Model, encoder: &mut Encoder, half: bool) -> Result<FoldReport> {
    let safe = if half { SAFE_IN_HALF } else { SAFE };
    let builder = Builder::new(model.opset(), "fold");
    let b = &builder;
    let mut report = FoldReport::default();
    let mut shunts = Vec::new();
    let start = Stream {
        value: b.value(&encoder.embedding_norm.input),
        p: Array1::ones(encoder.embedding_norm.gamma.len()),
        q: Array1::zeros(encoder.embedding_norm.gamma.len()),
    };
    let mut stream = pass_norm(b, model, start, SiteId::EmbeddingNorm, &safe, &mut report)?;
    shunts.push((encoder.embedding_norm.output.clone(), leave(b, &stream, SiteId::EmbeddingNorm)));
    if let Some(site) = &mut encoder.embedding_projection {
        let old = site.output.clone();
        let value = absorb(b, model, site, &stream, "embeddings/projection/folded")?;
        // Under the old name for whoever else uses it; the layers read the stream by its own.
        b.scope("embeddings/projection/leave");
        shunts.push((old, b.op("Identity", &[value], vec![]).name()));
        let channels = site.outputs;
        stream = Stream { value, p: Array1::ones(channels), q: Array1::zeros(channels) };
    }
    for layer in &mut encoder.layers {
        let [attention_norm, output_norm] =
            [LayerSite::AttentionNorm, LayerSite::OutputNorm].map(|site| layer.site(site));
        let scope = attention_norm.module();
        let attention = layer.site(LayerSite::Attention).to_string();
        for (site, part) in [(&mut layer.query, "query"), (&mut layer.key, "key"), (&mut layer.value, "value")] {
            let old = site.output.clone();
            let y = absorb(b, model, site, &stream, &format!("{attention}/{part}/folded"))?;
            shunts.push((old, y.name()));
        }
        layer.input = stream.value.name();
        stream = add_branch(b, model, &mut layer.attention_output, stream, &attention, "output")?;
        stream = pass_norm(b, model, stream, attention_norm, &safe, &mut report)?;
        shunts.push((layer.attention_norm.output.clone(), leave(b, &stream, attention_norm)));
        let old = layer.intermediate.output.clone();
        let y = absorb(b, model, &mut layer.intermediate, &stream, &format!("{scope}/intermediate/folded"))?;
        shunts.push((old, y.name()));
        stream = add_branch(b, model, &mut layer.output, stream, &scope, "output")?;
        stream = pass_norm(b, model, stream, output_norm, &safe, &mut report)?;
        shunts.push((layer.output_norm.output.clone(), leave(b, &stream, output_norm)));
    }
    let patch = shunts.iter().fold(builder.patch(), |patch, (old, new)| patch.shunt(old, new));
    patch.apply(model)?;
    Ok(report)
}

/// Through `a r + c`: nothing happens to the stream unless a channel's product would leave the safe range.
fn pass_norm<'b>(
    b: &'b Builder,
    model: &Model,
    stream: Stream<'b>,
    norm: SiteId,
    safe: &RangeInclusive<f64>,
    report: &mut FoldReport,
) -> Result<Stream<'b>> {
    let [scale, offset] = norm_parameters(norm);
    let a = vector(model, &scale)?;
    let c = vector(model, &offset)?;
    let mut p = &stream.p * &a;
    let q = &stream.q * &a + c;
    let mut value = stream.value;
    let unsafe_channels = p.iter().filter(|v| !safe.contains(&v.abs())).count();
    if unsafe_channels > 0 {
        let explicit = p.mapv(|v| if safe.contains(&v.abs()) { 1.0 } else { v });
        b.scope(&format!("{norm}/explicit"));
        value = value * b.parameter("scale", &tensor(&explicit));
        p.zip_mut_with(&explicit, |p, e| {
            if *e != 1.0 || !safe.contains(&p.abs()) {
                *p = 1.0;
            }
        });
    }
    report.norms += 1;
    report.explicit_channels += unsafe_channels;
    Ok(Stream { value, p, q })
}

/// The teacher's value, for whoever uses it outside the encoder.
fn leave(b: &Builder, stream: &Stream<'_>, norm: SiteId) -> String {
    b.scope(&format!("{norm}/leave"));
    let value = b.value(&stream.value.name());
    (value * b.parameter("scale", &tensor(&stream.p)) + b.parameter("offset", &tensor(&stream.q))).name()
}

/// A linear map of the teacher's value as one of the stream: `(p s + q) W + b = s (diag(p) W) + (b + q W)`.
fn absorb<'b>(
    b: &'b Builder,
    model: &Model,
    site: &mut LinearSite,
    stream: &Stream<'b>,
    scope: &str,
) -> Result<Expr<'b>> {
    let weight = matrix(model, &site.weight)?;
    let bias = bias(model, site)? + stream.q.dot(&weight);
    let weight = weight * stream.p.view().insert_axis(Axis(1));
    let y = place(b, site, stream.value, scope, &weight, &bias);
    site.output = y.name();
    Ok(y)
}

/// The stream plus a branch: `p s + q + (x W + b) = p (s + (x W + b + q) / p)`.
fn add_branch<'b>(
    b: &'b Builder,
    model: &Model,
    site: &mut LinearSite,
    stream: Stream<'b>,
    scope: &str,
    part: &str,
) -> Result<Stream<'b>> {
    let weight = matrix(model, &site.weight)? / stream.p.view().insert_axis(Axis(0));
    let bias = (bias(model, site)? + &stream.q) / &stream.p;
    let input = b.value(&site.input);
    let branch = place(b, site, input, &format!("{scope}/{part}/folded"), &weight, &bias);
    site.output = branch.name();
    let value = (stream.value + branch).named(&format!("{scope}/stream"));
    let q = Array1::zeros(stream.p.len());
    Ok(Stream { value, p: stream.p, q })
}

fn place<'b>(
    b: &'b Builder,
    site: &mut LinearSite,
    x: Expr<'b>,
    scope: &str,
    weight: &Array2<f64>,
    bias: &Array1<f64>,
) -> Expr<'b> {
    b.scope(scope);
    let stored = weight.mapv(|v| v as f32).as_standard_layout().into_owned();
    let w = b.parameter("weight", &Tensor::from(stored.into_dyn()));
    let offset = b.parameter("bias", &tensor(bias));
    site.input = x.name();
    site.weight = w.name();
    site.bias_name = Some(offset.name());
    x.matmul(w) + offset
}

fn tensor(values: &Array1<f64>) -> Tensor {
    Tensor::new(&[values.len()], values.iter().map(|&v| v as f32).collect())
}

pub(super) fn vector(model: &Model, name: &str) -> Result<Array1<f64>> {
    Ok(model.constant(name)?.to_f32().iter().map(|&v| f64::from(v)).collect())
}

pub(super) fn matrix(model: &Model, name: &str) -> Result<Array2<f64>> {
    let array = model.constant(name)?.to_f32().mapv(f64::from);
    Ok(array.into_dimensionality().expect("canonical weights are matrices"))
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
    use crate::testing::{CHANNELS, furthest, layer_text, student};

    #[test]
    fn the_folded_stream_computes_the_same() {
        let (before, after) = (student(Pass::Reassociate), student(Pass::Fold));
        assert_eq!((after.fold.norms, after.fold.explicit_channels), (3, 0));
        let far = furthest(&before.model, &after.model);
        assert!(far < 1e-4, "{far}");
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
        let report = fold_norms(&mut model, &mut encoder, false).unwrap();
        assert_eq!(report.explicit_channels, 3);
        assert!(model.graph().node.iter().any(|n| n.name.starts_with("layer.0/attention/norm/explicit")));
        // One channel carries values around 1e5: rounding is relative to those.
        let far = furthest(&unfolded, &model);
        assert!(far < 1e-4 * 1e5, "{far}");
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
        let folded = |half: bool| {
            let (mut model, mut encoder) = (wide.clone(), before.encoder.clone());
            let explicit = fold_norms(&mut model, &mut encoder, half).unwrap().explicit_channels;
            mabert_graph::narrow_to_half(&mut model).map(|()| (explicit, model))
        };
        let reason = folded(false).map(|(explicit, _)| explicit).unwrap_err().to_string();
        assert!(reason.contains("beyond half precision"), "{reason}");
        let (explicit, mut model) = folded(true).unwrap();
        assert_eq!(explicit, 1);
        mabert_graph::widen_half(&mut model).unwrap();
        // A channel carries values around 300.
        let far = furthest(&wide, &model);
        assert!(far < 1e-2 * 300.0, "{far}");
    }
}

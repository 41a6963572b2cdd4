//! Fused operators: linear layers, and attention in its linear order, on tract-linalg's machinery.
//!
//! [`fuse`] finds them in a decluttered tract model, whose file stays plain ONNX. Between fused operators activations stay
//! in the panels that the matrix kernel reads, from the first linear layer of an encoder to its last; [`repack`] has the
//! ways in and out.

mod attention;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod heads;
mod hinges;
mod kernel;
mod linear;
mod panels;
mod patterns;
mod repack;
#[cfg(test)]
mod testing;

use tract_core::internal::*;

use attention::LinearAttention;
pub(crate) use hinges::{DOMAIN, OPERATOR, gather, hinge_attention};
use kernel::Kernel;
use linear::Linear;
use repack::{FromPanels, ToPanels};

/// The machine's kernel, in operators that were only made because there is one.
fn kernel() -> TractResult<&'static Kernel> {
    Kernel::get().context("no matrix kernel with a square tile")
}

/// How often each operator was fused.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fused {
    pub(crate) attentions: usize,
    pub(crate) linears: usize,
}

/// Puts fused operators in the place of what they compute. What is not recognised stays as it is.
pub(crate) fn fuse(model: &mut TypedModel) -> TractResult<Fused> {
    let mut fused = Fused::default();
    let Some(kernel) = Kernel::get() else { return Ok(fused) };
    while let Some(patch) = first(model, |model, node| attention(kernel, model, node))? {
        patch.apply(model)?;
        fused.attentions += 1;
    }
    model.compact()?;
    let mut freed = crate::memory::Freed::default();
    while let Some(patch) = first(model, |model, node| linear(kernel, model, node))? {
        let made = patch.model.nodes().iter().find_map(|node| node.op_as::<Linear>());
        let bytes = made.map_or(0, |linear| linear.weights.len() * f32::datum_type().size_of());
        patch.apply(model)?;
        freed.add(bytes);
        fused.linears += 1;
        // The weights as they were read go as their packed copy comes: together they would be twice the model.
        model.compact()?;
    }
    while let Some(patch) = first(model, stay_in_panels)? {
        patch.apply(model)?;
    }
    model.compact()?;
    Ok(fused)
}

fn first(
    model: &TypedModel,
    rule: impl Fn(&TypedModel, &TypedNode) -> TractResult<Option<TypedModelPatch>>,
) -> TractResult<Option<TypedModelPatch>> {
    for node in model.eval_order()? {
        match rule(model, model.node(node)) {
            Ok(Some(patch)) => return Ok(Some(patch)),
            Ok(None) => {}
            Err(e) => tracing::debug!("`{}` is left to tract: {e:#}", model.node(node).name),
        }
    }
    Ok(None)
}

/// Wires `outlet` in panels.
fn in_panels(
    patch: &mut TypedModelPatch,
    model: &TypedModel,
    name: &str,
    outlet: OutletId,
    channels: usize,
) -> TractResult<OutletId> {
    let tap = patch.tap_model(model, outlet)?;
    Ok(patch.wire_node(format!("{name}.to_panels"), ToPanels { channels }, &[tap])?[0])
}

/// Replaces `outlet` by the values that `panels` holds.
fn replace(
    mut patch: TypedModelPatch,
    model: &TypedModel,
    outlet: OutletId,
    panels: OutletId,
    channels: usize,
) -> TractResult<Option<TypedModelPatch>> {
    let shape = model.outlet_fact(outlet)?.shape.clone();
    let name = &model.node(outlet.node).name;
    let values = patch.wire_node(name, FromPanels { shape, channels }, &[panels])?[0];
    patch.shunt_outside(model, outlet, values)?;
    Ok(Some(patch))
}

fn linear(kernel: &Kernel, model: &TypedModel, node: &TypedNode) -> TractResult<Option<TypedModelPatch>> {
    let Some(found) = patterns::linear(kernel, model, node) else { return Ok(None) };
    let mut patch = TypedModelPatch::default();
    let name = &model.node(found.output.node).name;
    let mut inputs = tvec![in_panels(&mut patch, model, &format!("{name}.x"), found.input, found.k)?];
    if let Some(residual) = found.residual {
        inputs.push(in_panels(&mut patch, model, &format!("{name}.residual"), residual, found.n)?);
    }
    let weights = panels::values(&found.weights)?;
    let op = Linear {
        weights: repack::weights(kernel, found.k, found.n, |k, n| weights[k * found.n + n])?,
        bias: found.bias,
        relu: found.relu,
        limits: found.limits.map(|limit| limit.map(|limit| tensor0(limit).into_arc_tensor())),
        n: found.n,
    };
    let output = patch.wire_node(format!("{name}.linear"), op, &inputs)?[0];
    replace(patch, model, found.output, output, found.n)
}

fn attention(kernel: &Kernel, model: &TypedModel, node: &TypedNode) -> TractResult<Option<TypedModelPatch>> {
    let Some(found) = patterns::attention(kernel, model, node) else { return Ok(None) };
    let mut patch = TypedModelPatch::default();
    let name = &model.node(found.output.node).name;
    let channels = found.heads * found.channels;
    let (query, parts) = found.query;
    let (keys_values, key_part, parts_of_keys) = found.keys_values;
    let mut inputs = tvec![
        in_panels(&mut patch, model, &format!("{name}.query"), query, parts * channels)?,
        in_panels(&mut patch, model, &format!("{name}.keys_values"), keys_values, parts_of_keys * channels)?,
    ];
    for outlet in [Some(found.b1), Some(found.b2), found.mask, found.scale].into_iter().flatten() {
        inputs.push(patch.tap_model(model, outlet)?);
    }
    let (n, h) = (found.longest, found.hidden);
    let w1 = panels::values(&found.w1)?.chunks_exact(n * h);
    let w2 = panels::values(&found.w2)?.chunks_exact(h * n);
    let whole = h.next_multiple_of(kernel.width());
    // Whole panels of keys: one that is begun is complete.
    let columns = attention::most_keys(found.channels, h, n, found.queries == found.length);
    let columns = columns.next_multiple_of(kernel.width()).min(n);
    let by_key = |w2: &[f32]| repack::weights(kernel, whole, columns, |j, t| if j < h { w2[j * n + t] } else { 0.0 });
    let op = LinearAttention {
        batch: found.batch,
        length: found.length,
        queries: found.queries,
        key_part,
        heads: found.heads,
        channels: found.channels,
        hidden: h,
        w1: w1.map(|w1| repack::weights(kernel, n, h, |t, j| w1[t * h + j])).collect::<TractResult<_>>()?,
        w2: w2.clone().map(|w2| repack::weights(kernel, n, h, |t, j| w2[j * n + t])).collect::<TractResult<_>>()?,
        w2_by_key: w2.map(by_key).collect::<TractResult<_>>()?,
        masked: found.mask.is_some(),
        scaled: found.scale.is_some(),
    };
    let output = patch.wire_node(format!("{name}.attention"), op, &inputs)?[0];
    replace(patch, model, found.output, output, channels)
}

/// Out of panels and into panels again is nothing.
fn stay_in_panels(model: &TypedModel, node: &TypedNode) -> TractResult<Option<TypedModelPatch>> {
    let Some(into) = node.op_as::<ToPanels>() else { return Ok(None) };
    let producer = model.node(node.inputs[0].node);
    let Some(out) = producer.op_as::<FromPanels>() else { return Ok(None) };
    if out.channels != into.channels {
        return Ok(None);
    }
    let mut patch = TypedModelPatch::default();
    let panels = patch.tap_model(model, producer.inputs[0])?;
    patch.shunt_outside(model, node.id.into(), panels)?;
    Ok(Some(patch))
}

//! Fused operators spelled with plain ones, for engines and recognisers that only know the plain ones.

mod microsoft;
mod standard;

use onnx_protobuf::NodeProto;

use crate::{Builder, Expr, Index, Model, NodeExt, Patch, Result};

/// Replaces the fused operators of `model` by what they compute; returns how many were replaced.
///
/// Handled are `CastLike` and `Attention` of the standard domain (opset 23, without cache, causality or soft cap) and, of
/// `com.microsoft`, what onnxruntime's optimisers make of encoders: `Gelu`, `FastGelu`, `BiasGelu`, `QuickGelu`,
/// `FusedMatMul`, `FusedGemm`, `SkipLayerNormalization`, `EmbedLayerNormalization`, `Attention` and `MultiHeadAttention`.
/// Others, and variants that do more than an encoder needs, are left as they are.
///
/// # Errors
/// The graph's wiring is broken.
pub fn decompose_fused(model: &mut Model) -> Result<usize> {
    let mut count = 0;
    let mut skipped = 0;
    // One node at a time: a patch changes the graph that the index describes.
    while let Some(replacement) = next(model, skipped)? {
        match replacement {
            Some(patch) => {
                patch.apply(model)?;
                count += 1;
            }
            None => skipped += 1,
        }
    }
    Ok(count)
}

/// What is needed to replace a node.
struct Fused<'b, 'm> {
    b: &'b Builder,
    model: &'m Model,
    index: &'m Index<'m>,
    node: &'m NodeProto,
}

impl<'b, 'm> Fused<'b, 'm> {
    /// The name of an operand, if it is given.
    fn name(&self, at: usize) -> Option<&'m str> {
        self.node.input.get(at).map(String::as_str).filter(|i| !i.is_empty())
    }

    fn operand(&self, at: usize) -> Option<Expr<'b>> {
        self.name(at).map(|name| self.b.value(name))
    }

    /// Whether anyone reads an output.
    fn used(&self, at: usize) -> bool {
        let read = |o: &String| !o.is_empty() && (self.index.is_output(o) || !self.index.consumers_at(o).is_empty());
        self.node.output.get(at).is_some_and(read)
    }

    /// Axis `axis` of an initializer.
    fn size(&self, name: &str, axis: usize) -> Option<i64> {
        self.model.initializer(name)?.dims.get(axis).copied()
    }
}

/// What a node gives, by the number of the output.
type Outputs<'b> = Vec<(usize, Expr<'b>)>;

/// The fused node before the last `skip` ones, and its replacement if it has one. Attention comes before the embeddings, from
/// which it may have its mask.
fn next(model: &Model, skip: usize) -> Result<Option<Option<Patch>>> {
    let index = Index::new(model)?;
    let fused = |n: &&NodeProto| n.is("Attention") || n.is("CastLike") || n.domain == "com.microsoft";
    let Some(node) = model.graph().node.iter().rev().filter(fused).nth(skip) else { return Ok(None) };
    let builder = Builder::new(model.opset(), "decompose-fused");
    builder.scope(&format!("{}/plain", node.label()));
    let fused = Fused { b: &builder, model, index: &index, node };
    let outputs = match node.op_type.as_str() {
        "Attention" if node.is("Attention") => standard::attention(&fused),
        "CastLike" if node.is("CastLike") => standard::cast_like(&fused),
        _ => microsoft::plain(&fused),
    };
    Ok(Some(outputs.map(|outputs| {
        let shunts: Vec<(&String, String)> = outputs.iter().map(|(at, y)| (&node.output[*at], y.name())).collect();
        shunts.iter().fold(builder.patch(), |patch, (old, new)| patch.shunt(old, new))
    })))
}

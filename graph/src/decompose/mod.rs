//! Fused operators spelled with plain ones, for engines and recognisers that only know the plain ones.

mod einsum;
mod microsoft;
mod standard;

use onnx_protobuf::NodeProto;

use crate::{Builder, Error, Expr, Index, Model, NodeExt, Patch, Result, Tensor, attribute};

/// Replaces the fused operators of `model` by what they compute; returns how many were replaced.
///
/// Handled are `Einsum` (as a matrix product), products with a `OneHot` (as a lookup), `Sum`, `CastLike`,
/// `RMSNormalization` and `Attention` of the standard domain (opset 23, without cache or soft cap), and what
/// onnxruntime's optimisers make of encoders: `SimplifiedLayerNormalization` and, of `com.microsoft`, `Gelu`, `FastGelu`,
/// `BiasGelu`, `QuickGelu`, `FusedMatMul`, `FusedGemm`, `SkipLayerNormalization`, `SkipSimplifiedLayerNormalization`,
/// `EmbedLayerNormalization`, `Attention` and `MultiHeadAttention`.
/// Others, and variants that do more than an encoder needs, are left as they are.
///
/// # Errors
/// The graph's wiring is broken, or there are more such operators than any encoder has.
pub fn decompose_fused(model: &mut Model) -> Result<usize> {
    let patches: Vec<Patch> = {
        let index = Index::new(model)?;
        model.graph().node.iter().filter_map(|node| plain(model, &index, node)).collect()
    };
    if patches.len() > MOST {
        let reason = format!("{} fused operators, more than {MOST}", patches.len());
        return Err(Error::Graph(reason).in_model(model.origin()));
    }
    let count = patches.len();
    // Each names values only: that an earlier one made some of them anew does not matter.
    patches.into_iter().try_for_each(|patch| patch.apply(model))?;
    Ok(count)
}

/// Each patch looks at the whole graph: more would take for ever.
const MOST: usize = 10_000;

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

    /// 1 where a key comes after the query, 0 elsewhere, `[n, keys]`, for scores `[batch, heads, n, keys]`.
    fn later_keys(&self, scores: Expr<'b>) -> Expr<'b> {
        let (b, sizes) = (self.b, scores.shape().slice(0, 2, 4));
        let ones = b.op("Expand", &[b.parameter("one", &Tensor::scalar(1f32)), sizes], vec![]);
        let above = b.parameter("above", &Tensor::scalar(1i64));
        b.op("Trilu", &[ones, above], vec![attribute::int("upper", 1)])
    }

    /// Whether anyone reads an output.
    fn used(&self, at: usize) -> bool {
        let read = |o: &String| !o.is_empty() && (self.index.is_output(o) || !self.index.consumers_at(o).is_empty());
        self.node.output.get(at).is_some_and(read)
    }

    /// Whether a value is a constant of one axis, as what goes with the last axis of another is.
    fn is_vector(&self, name: &str) -> bool {
        self.dims(name).is_some_and(|dims| dims.len() == 1)
    }

    /// The size of the last axis of a value, where a linear map with a constant weight, or a vector that is added, tells.
    fn width(&self, value: &str) -> Option<i64> {
        let node = self.index.producer(value)?;
        let inputs = || node.input.iter().map(String::as_str);
        match node.op_type.as_str() {
            "MatMul" if node.is("MatMul") => self.size(node.input.get(1)?, 1),
            "Gemm" if node.is("Gemm") => self.size(node.input.get(1)?, usize::from(node.int("transB", 0) == 0)),
            "Add" if node.is("Add") => {
                let vector = inputs().find(|i| self.is_vector(i) && self.size(i, 0) > Some(1));
                vector.map_or_else(|| inputs().find_map(|i| self.width(i)), |vector| self.size(vector, 0))
            }
            _ => None,
        }
    }

    /// Axis `axis` of a constant.
    fn size(&self, name: &str, axis: usize) -> Option<i64> {
        self.dims(name)?.get(axis).copied()
    }

    /// The axes of a constant: an initializer, or what a node holds, behind casts too.
    fn dims(&self, name: &str) -> Option<&'m [i64]> {
        let name = self.index.behind_casts(name);
        if let Some(constant) = self.model.initializer(name) {
            return Some(&constant.dims);
        }
        let node = self.index.producer(name).filter(|node| node.is("Constant"))?;
        Some(&node.attribute("value")?.t.as_ref()?.dims)
    }
}

/// What a node gives, by the number of the output.
type Outputs<'b> = Vec<(usize, Expr<'b>)>;

/// What replaces a node, if it is fused and can be replaced.
fn plain(model: &Model, index: &Index<'_>, node: &NodeProto) -> Option<Patch> {
    let builder = Builder::new(model.opset(), "decompose-fused");
    builder.scope(&format!("{}/plain", node.label()));
    let fused = Fused { b: &builder, model, index, node };
    let outputs = match node.op_type.as_str() {
        "Attention" if node.is("Attention") => standard::attention(&fused),
        "MatMul" if node.is("MatMul") => standard::one_hot_product(&fused),
        "Einsum" if node.is("Einsum") => einsum::einsum(&fused),
        "CastLike" if node.is("CastLike") => standard::cast_like(&fused),
        "Sum" if node.is("Sum") => standard::sum(&fused),
        // onnxruntime has the first in the standard domain, where it is not.
        "SimplifiedLayerNormalization" | "RMSNormalization" if node.is(&node.op_type) => standard::rms_norm(&fused),
        _ if node.domain == "com.microsoft" => microsoft::plain(&fused),
        _ => None,
    }?;
    let shunts: Vec<(&String, Expr<'_>)> =
        outputs.into_iter().map(|(at, y)| Some((node.output.get(at)?, y))).collect::<Option<_>>()?;
    Some(builder.patch_with(shunts))
}

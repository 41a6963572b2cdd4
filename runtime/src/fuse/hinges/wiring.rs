//! Attention of hinges in tract's terms: the node that stands for it in the ONNX graph, into panels and out of them.

use tract_onnx::model::ParsingContext;
use tract_onnx::pb::NodeProto;
use tract_onnx::tract_hir::internal::*;

use super::super::repack::{FromPanels, ToPanels};
use super::attention::HingeAttention;

/// What the node is called; its domain is this project's own.
pub(crate) const OPERATOR: &str = "HingeAttention";
pub(crate) const DOMAIN: &str = "onnx_mabert";

/// Inputs before the statistics' thresholds, which are as many as there are.
pub(super) const FIRST_STATISTIC: usize = 11;

/// The node's attributes.
#[derive(Clone, Debug)]
pub(super) struct Parts {
    pub(super) heads: usize,
    /// Channels of a head.
    pub(super) channels: usize,
    /// Of `heads * channels` in the value that begins with the queries.
    pub(super) query_parts: usize,
    /// And in the one that has keys as its part `key_part`, with values behind them.
    pub(super) key_parts: usize,
    pub(super) key_part: usize,
}

/// Inputs: queries `[batch, q, query_parts * heads * d]`, keys and values `[batch, n, key_parts * heads * d]`, then those of
/// [`HingeAttention`], and its constants: `w1`, `w2`, the statistics. Gives `[batch, q, heads * d]`.
pub(crate) fn hinge_attention(
    _: &ParsingContext<'_>,
    node: &NodeProto,
) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
    ensure!(node.domain == DOMAIN, "operator {}.{OPERATOR} is not known", node.domain);
    let size = |name: &str| node.get_attr::<i64>(name).map(|value| value as usize);
    let parts = Parts {
        heads: size("heads")?,
        channels: size("channels")?,
        query_parts: size("query_parts")?,
        key_parts: size("key_parts")?,
        key_part: size("key_part")?,
    };
    Ok((expand(Wiring { parts, inputs: node.input.len() }), vec![]))
}

#[derive(Clone, Debug)]
struct Wiring {
    parts: Parts,
    inputs: usize,
}

impl Expansion for Wiring {
    fn name(&self) -> StaticName {
        OPERATOR.into()
    }

    fn rules<'r, 'p: 'r, 's: 'r>(
        &'s self,
        s: &mut Solver<'r>,
        inputs: &'p [TensorProxy],
        outputs: &'p [TensorProxy],
    ) -> InferenceResult {
        check_input_arity(inputs, self.inputs)?;
        check_output_arity(outputs, 1)?;
        s.equals(&outputs[0].datum_type, f32::datum_type())?;
        s.equals(&outputs[0].rank, 3)?;
        s.equals(&outputs[0].shape[0], &inputs[0].shape[0])?;
        s.equals(&outputs[0].shape[1], &inputs[0].shape[1])?;
        s.equals(&outputs[0].shape[2], (self.parts.heads * self.parts.channels).to_dim())
    }

    fn wire(&self, prefix: &str, model: &mut TypedModel, inputs: &[OutletId]) -> TractResult<TVec<OutletId>> {
        let Parts { heads, channels, query_parts, key_parts, key_part } = self.parts;
        let shape = |model: &TypedModel, at: usize| model.outlet_fact(inputs[at]).map(|fact| fact.shape.clone());
        let (asking, asked) = (shape(model, 0)?, shape(model, 1)?);
        let constant = |at: usize| -> TractResult<Arc<Tensor>> {
            model.outlet_fact(inputs[at])?.konst.clone().context("a parameter that is no constant")
        };
        let op = HingeAttention {
            batch: asking[0].clone(),
            length: asked[1].clone(),
            queries: asking[1].clone(),
            key_part,
            heads,
            channels,
            statistics: (FIRST_STATISTIC..inputs.len()).map(constant).collect::<TractResult<_>>()?,
            w1: constant(9)?,
            w2: constant(10)?,
        };
        let mut in_panels = |name: &str, at: usize, channels: usize| {
            model.wire_node(format!("{prefix}.{name}"), ToPanels { channels }, &[inputs[at]]).map(|outlets| outlets[0])
        };
        let query = in_panels("query", 0, query_parts * heads * channels)?;
        let keys_values = in_panels("keys_values", 1, key_parts * heads * channels)?;
        let mut operands: TVec<OutletId> = tvec![query, keys_values];
        operands.extend(inputs[2..9].iter().copied());
        let contexts = model.wire_node(format!("{prefix}.attention"), op, &operands)?[0];
        let channels = heads * channels;
        let shape = [asking[0].clone(), asking[1].clone(), channels.to_dim()];
        let out = FromPanels { shape: shape.iter().collect(), channels };
        model.wire_node(prefix, out, &[contexts])
    }
}

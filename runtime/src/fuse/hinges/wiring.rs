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
pub(super) const FIRST_STATISTIC: usize = 12;

/// The node's attributes.
#[derive(Clone, Debug)]
pub(super) struct Parts {
    pub(super) heads: usize,
    /// Channels of a head.
    pub(super) channels: usize,
    /// Of the values that hold queries, keys and values, how many times `heads * channels` each has, and which is wanted.
    pub(super) of: [(usize, usize); 3],
}

/// Inputs: what holds queries `[batch, q, parts * heads * d]`, keys and values `[batch, n, parts * heads * d]`, then those of
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
        of: [
            (size("query_parts")?, size("query_part")?),
            (size("key_parts")?, size("key_part")?),
            (size("value_parts")?, size("value_part")?),
        ],
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
        let Parts { heads, channels, of } = self.parts;
        let shape = |model: &TypedModel, at: usize| model.outlet_fact(inputs[at]).map(|fact| fact.shape.clone());
        let (asking, asked) = (shape(model, 0)?, shape(model, 1)?);
        let constant = |at: usize| -> TractResult<Arc<Tensor>> {
            model.outlet_fact(inputs[at])?.konst.clone().context("a parameter that is no constant")
        };
        let op = HingeAttention {
            batch: asking[0].clone(),
            length: asked[1].clone(),
            queries: asking[1].clone(),
            parts: of.map(|(_, part)| part),
            heads,
            channels,
            statistics: (FIRST_STATISTIC..inputs.len()).map(constant).collect::<TractResult<_>>()?,
            w1: constant(10)?,
            w2: constant(11)?,
        };
        let mut operands: TVec<OutletId> = tvec![];
        for (at, name) in ["query", "keys", "values"].into_iter().enumerate() {
            // What holds several of them is put into panels once.
            let panels = match (0..at).find(|before| inputs[*before] == inputs[at]) {
                Some(before) => operands[before],
                None => {
                    let op = ToPanels { channels: of[at].0 * heads * channels };
                    model.wire_node(format!("{prefix}.{name}"), op, &[inputs[at]])?[0]
                }
            };
            operands.push(panels);
        }
        // Networks of other layers read the same view of the mask, and tract must be free to move its axes for them.
        let mut mask = inputs[3];
        for axis in [3, 1] {
            if model.outlet_fact(mask)?.shape.get(axis) == Some(&1.to_dim()) {
                mask = model.wire_node(format!("{prefix}.mask.{axis}"), AxisOp::Rm(axis), &[mask])?[0];
            }
        }
        operands.push(mask);
        operands.extend(inputs[4..10].iter().copied());
        let contexts = model.wire_node(format!("{prefix}.attention"), op, &operands)?[0];
        let channels = heads * channels;
        let shape = [asking[0].clone(), asking[1].clone(), channels.to_dim()];
        let out = FromPanels { shape: shape.iter().collect(), channels };
        model.wire_node(prefix, out, &[contexts])
    }
}

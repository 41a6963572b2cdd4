//! tract's operators whose loops and sizes come from numbers of the file, each looked at before tract infers a shape from it: by
//! then tract knows the ranks of the operands, and the values of those that are constant. What tract is not asked does not
//! hang, and does not end the process.

mod axes;
mod known;
mod sizes;
mod windows;

use std::sync::Arc;

use tract_onnx::Onnx;
use tract_onnx::model::ParsingContext;
use tract_onnx::pb::NodeProto;
use tract_onnx::tract_hir::internal::{
    EvalContext, EvalOp, InferenceFact, InferenceModel, InferenceModelPatch, InferenceNode, InferenceOp, Op, OpState,
    OutletId, SessionId, StaticName, TValue, TVec, TractResult, TypedModel, TypedOp, Validation,
};

use self::known::Known;
use crate::operators::OPERATORS;

/// Why a node is not given to tract.
#[derive(Debug, thiserror::Error)]
#[error("node `{node}` ({operator}) {reason}")]
pub(crate) struct Refused {
    pub(crate) node: String,
    pub(crate) operator: String,
    pub(crate) reason: String,
}

/// Puts our own operators and checked ones in the places of those that need it; they are found in subgraphs too.
pub(crate) fn check_operators(onnx: &mut Onnx) {
    onnx.op_register = OPERATORS.clone();
    for operator in axes::OPERATORS.iter().map(|row| row.operator).chain(sizes::OPERATORS).chain(windows::OPERATORS) {
        if OPERATORS.0.contains_key(operator) {
            onnx.op_register.insert(operator, checked);
        }
    }
}

fn checked(context: &ParsingContext<'_>, node: &NodeProto) -> TractResult<(Box<dyn InferenceOp>, Vec<String>)> {
    let (inner, captured) = OPERATORS.0[&node.op_type](context, node)?;
    Ok((Box::new(Checked { inner, node: Arc::new(node.clone()) }), captured))
}

/// An operator of tract's, and the node that it comes from.
#[derive(Clone, Debug)]
struct Checked {
    inner: Box<dyn InferenceOp>,
    node: Arc<NodeProto>,
}

impl Checked {
    fn check(&self, inputs: &[&InferenceFact], outputs: &[&InferenceFact]) -> TractResult<()> {
        let known = Known { node: &self.node, inputs, outputs };
        let fault = axes::fault(&known).or_else(|| windows::fault(&known)).or_else(|| sizes::fault(&known));
        fault.map_or(Ok(()), |reason| {
            let node = if self.node.name.is_empty() { self.node.output.first() } else { Some(&self.node.name) };
            let (node, operator) = (node.cloned().unwrap_or_default(), self.node.op_type.clone());
            Err(Refused { node, operator, reason }.into())
        })
    }
}

impl PartialEq for Checked {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.node, &other.node)
    }
}

impl Eq for Checked {}

impl Op for Checked {
    fn name(&self) -> StaticName {
        self.inner.name()
    }

    fn validation(&self) -> Validation {
        self.inner.validation()
    }

    fn info(&self) -> TractResult<Vec<String>> {
        self.inner.info()
    }

    fn mints_runtime_symbols(&self) -> bool {
        self.inner.mints_runtime_symbols()
    }

    fn as_typed(&self) -> Option<&dyn TypedOp> {
        self.inner.as_typed()
    }
}

impl EvalOp for Checked {
    fn eval(&self, context: &EvalContext<'_>, inputs: TVec<TValue>) -> TractResult<TVec<TValue>> {
        self.inner.eval(context, inputs)
    }

    fn forwards_input(&self) -> Option<usize> {
        self.inner.forwards_input()
    }

    fn eval_out_of_plan(&self, inputs: TVec<TValue>) -> TractResult<Option<TVec<TValue>>> {
        self.inner.eval_out_of_plan(inputs)
    }

    fn state(&self, context: &EvalContext<'_>) -> TractResult<Option<Box<dyn OpState>>> {
        self.inner.state(context)
    }

    fn drop_session(&self, session: SessionId, node: usize) {
        self.inner.drop_session(session, node);
    }
}

type Facts = TVec<InferenceFact>;

impl InferenceOp for Checked {
    fn infer(
        &mut self,
        inputs: TVec<&InferenceFact>,
        outputs: TVec<&InferenceFact>,
        observed: TVec<&InferenceFact>,
    ) -> TractResult<(Facts, Facts, Facts)> {
        self.check(&inputs, &outputs)?;
        self.inner.infer(inputs, outputs, observed)
    }

    fn infer_facts(
        &mut self,
        inputs: TVec<&InferenceFact>,
        outputs: TVec<&InferenceFact>,
        observed: TVec<&InferenceFact>,
    ) -> TractResult<(Facts, Facts, Facts)> {
        self.check(&inputs, &outputs)?;
        self.inner.infer_facts(inputs, outputs, observed)
    }

    fn observe_outlets(&self, model: &InferenceModel, node: &InferenceNode) -> TractResult<Vec<OutletId>> {
        self.inner.observe_outlets(model, node)
    }

    fn incorporate(&self, model: &InferenceModel, node: &InferenceNode) -> TractResult<Option<InferenceModelPatch>> {
        self.inner.incorporate(model, node)
    }

    fn nboutputs(&self) -> TractResult<usize> {
        self.inner.nboutputs()
    }

    fn as_op(&self) -> &dyn Op {
        self.inner.as_op()
    }

    fn as_op_mut(&mut self) -> &mut dyn Op {
        self.inner.as_op_mut()
    }

    fn to_typed(
        &self,
        source: &InferenceModel,
        node: &InferenceNode,
        target: &mut TypedModel,
        mapping: &std::collections::HashMap<OutletId, OutletId>,
    ) -> TractResult<TVec<OutletId>> {
        self.inner.to_typed(source, node, target, mapping)
    }
}

#[cfg(test)]
mod tests {
    use mabert_graph::proto::AttributeProto;
    use mabert_graph::{Builder, ElementType, Expr, Tensor, attribute};

    /// What is said of a node of `op` on operands that `operands` makes of an input `[batch, 8, 4]`.
    fn refused(
        opset: i64,
        op: &str,
        operands: impl for<'b> Fn(&'b Builder, Expr<'b>) -> Vec<Expr<'b>>,
        attributes: Vec<AttributeProto>,
    ) -> String {
        let b = Builder::new(opset, "test");
        let x = b.input("x", ElementType::F32, &["batch", "8", "4"]);
        let y = b.op(op, &operands(&b, x), attributes);
        let graph = b.model(&[(y + b.parameter("one", &Tensor::scalar(1f32))).named("y")]);
        crate::LoadOptions::default().prepare(&graph).unwrap_err().to_string()
    }

    fn number<'b>(b: &'b Builder, value: i64) -> Expr<'b> {
        b.parameter("number", &Tensor::scalar(value))
    }

    #[test]
    fn axes_are_within_the_rank_and_named_once() {
        fn scaled<'b>(b: &'b Builder, x: Expr<'b>) -> Vec<Expr<'b>> {
            vec![x, b.parameter("gamma", &Tensor::new(&[4], vec![1f32; 4]))]
        }
        for axis in [-4, 3, i64::MIN, i64::MAX] {
            let error = refused(17, "LayerNormalization", scaled, vec![attribute::int("axis", axis)]);
            assert!(error.contains(&format!("has the axis {axis}, its operand has 3")), "{error}");
        }
        fn alone<'b>(_: &'b Builder, x: Expr<'b>) -> Vec<Expr<'b>> {
            vec![x]
        }
        for perm in [&[0, 1, 1][..], &[0, 1], &[0, 1, 3], &[2, 2, 2, 2]] {
            let error = refused(17, "Transpose", alone, vec![attribute::ints("perm", perm)]);
            assert!(error.contains("(Transpose) has the"), "{error}");
        }
        let error = refused(11, "ReduceMean", alone, vec![attribute::ints("axes", &[1, -2])]);
        assert!(error.contains("has the axis 1 twice"), "{error}");
        let error = refused(17, "Softmax", alone, vec![attribute::int("axis", 1 << 40)]);
        assert!(error.contains("has the axis"), "{error}");
        for op in ["Squeeze", "Unsqueeze", "ReduceSum"] {
            let error = refused(17, op, |b, x| vec![x, b.ints(&[-9])], vec![]);
            assert!(error.contains("has the axis -9"), "{error}");
        }
        let error = refused(17, "Concat", |_, x| vec![x, x], vec![attribute::int("axis", 5)]);
        assert!(error.contains("has the axis 5"), "{error}");
    }

    #[test]
    fn what_no_machine_holds_is_not_made() {
        let cases = [
            refused(17, "ConstantOfShape", |b, _| vec![b.ints(&[1 << 40, 1 << 20])], vec![]),
            refused(17, "Expand", |b, x| vec![x, b.ints(&[1 << 50, 1, 1, 1])], vec![]),
            // The number is computed.
            refused(17, "Expand", |b, x| vec![x, b.ints(&[1 << 20]) * b.ints(&[1 << 20])], vec![]),
            refused(17, "Tile", |b, x| vec![x, b.ints(&[1, 1 << 40, 1])], vec![]),
            refused(17, "Pad", |b, x| vec![x, b.ints(&[0, 0, 0, 0, 1 << 40, 0])], vec![]),
            refused(17, "RandomNormal", |_, _| vec![], vec![attribute::ints("shape", &[1 << 20, 1 << 20])]),
        ];
        for error in cases {
            assert!(error.contains("asks for"), "{error}");
        }
        let steps: [fn(&Builder) -> [Expr<'_>; 3]; 3] = [
            |b| [number(b, 0), number(b, 1 << 60), number(b, 1)],
            |b| [number(b, 0), number(b, 8), number(b, 0)],
            |b| [number(b, 0), number(b, 8), number(b, -(1 << 31))],
        ];
        for operands in steps {
            let b = Builder::new(17, "test");
            let graph = b.model(&[b.op("Range", &operands(&b), vec![]).named("y")]);
            let error = crate::LoadOptions::default().prepare(&graph).unwrap_err().to_string();
            assert!(error.contains("(Range) asks for"), "{error}");
        }
    }

    #[test]
    fn windows_are_positive_and_of_the_rank() {
        for (name, values) in [
            ("kernel_shape", &[0][..]),
            ("kernel_shape", &[2, 2]),
            ("strides", &[0]),
            ("pads", &[1 << 40, 0]),
            ("pads", &[0]),
            ("dilations", &[1, 1, 1]),
        ] {
            let mut attributes = vec![attribute::ints(name, values)];
            if name != "kernel_shape" {
                attributes.push(attribute::ints("kernel_shape", &[2]));
            }
            let error = refused(17, "MaxPool", |_, x| vec![x], attributes);
            assert!(error.contains(&format!("in `{name}`")), "{error}");
        }
    }
}

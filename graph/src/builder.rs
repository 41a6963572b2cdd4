//! Graphs written as formulas: `gamma * ((x - x.mean_last()) / (variance + eps).sqrt()) + beta`.
//!
//! A [`Builder`] collects nodes; an [`Expr`] is a value of it, cheap to copy. What was collected becomes a model
//! ([`Builder::model`]) or an edit of one ([`Builder::patch`]).

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::{Add, Div, Mul, Sub};

use onnx_protobuf::{
    AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto, TensorProto,
    ValueInfoProto,
};

use crate::tensor_type::value_info;
use crate::{ElementType, Model, Patch, Tensor, attribute};

/// The key of a node's `metadata_props` entry that names the pass which made it.
pub(crate) const PASS_KEY: &str = "onnx_mabert.pass";

/// Collects the nodes and constants of new expressions.
#[derive(Debug)]
pub struct Builder {
    opset: i64,
    pass: String,
    state: RefCell<State>,
}

#[derive(Debug, Default)]
struct State {
    values: Vec<String>,
    nodes: Vec<NodeProto>,
    constants: Vec<TensorProto>,
    inputs: Vec<ValueInfoProto>,
    scope: String,
    used: HashMap<String, usize>,
}

/// A value of a [`Builder`].
#[derive(Clone, Copy, Debug)]
pub struct Expr<'b> {
    builder: &'b Builder,
    id: usize,
}

impl Builder {
    /// A builder for operator set `opset`; `pass` names who makes the nodes.
    pub fn new(opset: i64, pass: &str) -> Self {
        Self { opset, pass: pass.to_owned(), state: RefCell::default() }
    }

    /// Names of new nodes and values begin with `scope/` from here on.
    pub fn scope(&self, scope: &str) {
        self.state.borrow_mut().scope = scope.to_owned();
    }

    /// A value that exists already, by name.
    pub fn value(&self, name: &str) -> Expr<'_> {
        let mut state = self.state.borrow_mut();
        state.values.push(name.to_owned());
        Expr { builder: self, id: state.values.len() - 1 }
    }

    /// A graph input; dimensions are numbers or symbols.
    pub fn input(&self, name: &str, element: ElementType, dims: &[&str]) -> Expr<'_> {
        self.state.borrow_mut().inputs.push(value_info(name, element, dims));
        self.value(name)
    }

    /// A constant under exactly this name.
    pub fn constant(&self, name: &str, value: &Tensor) -> Expr<'_> {
        self.state.borrow_mut().constants.push(value.to_proto(name));
        self.value(name)
    }

    /// A constant named after the current scope and `label`.
    pub fn parameter(&self, label: &str, value: &Tensor) -> Expr<'_> {
        let name = self.fresh(label);
        self.constant(&name, value)
    }

    /// A vector of integers, as shapes and axes are given.
    pub fn ints(&self, values: &[i64]) -> Expr<'_> {
        self.parameter("ints", &Tensor::ints(values))
    }

    /// Any operator of the standard domain with one output.
    pub fn op<'b>(&'b self, op: &str, inputs: &[Expr<'b>], attributes: Vec<AttributeProto>) -> Expr<'b> {
        let output = self.fresh(op);
        let mut state = self.state.borrow_mut();
        let node = NodeProto {
            op_type: op.to_owned(),
            name: output.clone(),
            input: inputs.iter().map(|e| state.values[e.id].clone()).collect(),
            output: vec![output.clone()],
            attribute: attributes,
            metadata_props: vec![StringStringEntryProto {
                key: PASS_KEY.to_owned(),
                value: self.pass.clone(),
                ..Default::default()
            }],
            ..NodeProto::default()
        };
        state.nodes.push(node);
        state.values.push(output);
        Expr { builder: self, id: state.values.len() - 1 }
    }

    /// Values joined along `axis`.
    pub fn concat<'b>(&'b self, values: &[Expr<'b>], axis: i64) -> Expr<'b> {
        self.op("Concat", values, vec![attribute::int("axis", axis)])
    }

    fn fresh(&self, label: &str) -> String {
        let mut state = self.state.borrow_mut();
        let stem = if state.scope.is_empty() { label.to_owned() } else { format!("{}/{label}", state.scope) };
        let count = state.used.entry(stem.clone()).or_default();
        *count += 1;
        if *count == 1 { stem } else { format!("{stem}_{count}") }
    }

    /// What was collected so far, as an edit; the builder starts anew.
    pub fn patch(&self) -> Patch {
        let state = self.state.take();
        Patch::new(state.nodes, state.constants)
    }

    /// What was collected so far, as an edit in which everyone who used the old value of a pair uses the new one
    /// ([`Patch::shunt`]); the builder starts anew.
    ///
    /// ```
    /// # use mabert_graph::{Builder, ElementType};
    /// # let b = Builder::new(17, "example");
    /// # let mut model = b.model(&[b.input("x", ElementType::F32, &["n"]).erf().named("y")]);
    /// let b = Builder::new(model.opset(), "erf-to-relu");
    /// let relu = b.value("x").relu();
    /// b.patch_with([("y", relu)]).apply(&mut model)?;
    /// assert_eq!(model.graph().node[0].op_type, "Relu");
    /// # Ok::<(), mabert_graph::Error>(())
    /// ```
    pub fn patch_with<'b>(&'b self, shunts: impl IntoIterator<Item = (impl AsRef<str>, Expr<'b>)>) -> Patch {
        // Names first: they are gone once the nodes are taken.
        let shunts: Vec<_> = shunts.into_iter().map(|(old, new)| (old, new.name())).collect();
        shunts.iter().fold(self.patch(), |patch, (old, new)| patch.shunt(old.as_ref(), new))
    }

    /// What was collected so far, as a model with these outputs; the builder starts anew.
    pub fn model(&self, outputs: &[Expr<'_>]) -> Model {
        let outputs: Vec<String> = outputs.iter().map(Expr::name).collect();
        let state = self.state.take();
        let output = |name: &String| ValueInfoProto { name: name.clone(), ..ValueInfoProto::default() };
        let graph = GraphProto {
            name: "built".to_owned(),
            node: state.nodes,
            initializer: state.constants,
            input: state.inputs,
            output: outputs.iter().map(output).collect(),
            ..GraphProto::default()
        };
        let proto = ModelProto {
            ir_version: 8,
            producer_name: "onnx-mabert".to_owned(),
            opset_import: vec![OperatorSetIdProto { version: self.opset, ..Default::default() }],
            graph: Some(graph).into(),
            ..ModelProto::default()
        };
        Model::from_proto(proto).expect("a built model has a graph, a version and no external data")
    }
}

impl<'b> Expr<'b> {
    /// The value's name.
    pub fn name(&self) -> String {
        self.builder.state.borrow().values[self.id].clone()
    }

    /// Renames the value, which must be made by this builder's latest use of it (before others read it).
    pub fn named(self, name: &str) -> Self {
        let mut state = self.builder.state.borrow_mut();
        let old = std::mem::replace(&mut state.values[self.id], name.to_owned());
        for node in &mut state.nodes {
            let uses = node.input.iter_mut().chain(&mut node.output);
            uses.filter(|v| **v == old).for_each(|v| *v = name.to_owned());
        }
        drop(state);
        self
    }

    fn unary(self, op: &str) -> Self {
        self.builder.op(op, &[self], vec![])
    }

    fn binary(self, op: &str, other: Self) -> Self {
        self.builder.op(op, &[self, other], vec![])
    }

    /// Matrix product.
    pub fn matmul(self, other: Self) -> Self {
        self.binary("MatMul", other)
    }
    /// `max(x, 0)`.
    pub fn relu(self) -> Self {
        self.unary("Relu")
    }
    /// Held between two limits.
    pub fn clip(self, low: f32, high: f32) -> Self {
        let builder = self.builder;
        // Before operator set 11 limits are attributes.
        if builder.opset < 11 {
            let limits = vec![attribute::float("min", low), attribute::float("max", high)];
            return builder.op("Clip", &[self], limits);
        }
        let [low, high] = [("low", low), ("high", high)].map(|(name, v)| builder.parameter(name, &Tensor::scalar(v)));
        builder.op("Clip", &[self, low, high], vec![])
    }
    /// Square root.
    pub fn sqrt(self) -> Self {
        self.unary("Sqrt")
    }
    /// `1 / x`.
    pub fn reciprocal(self) -> Self {
        self.unary("Reciprocal")
    }
    /// The error function.
    pub fn erf(self) -> Self {
        self.unary("Erf")
    }
    /// Hyperbolic tangent.
    pub fn tanh(self) -> Self {
        self.unary("Tanh")
    }
    /// `x^p`.
    pub fn pow(self, p: f32) -> Self {
        let p = p.into_expr(self.builder);
        self.binary("Pow", p)
    }
    /// The dimensions of the value, `[rank]`.
    pub fn shape(self) -> Self {
        self.unary("Shape")
    }
    /// The value under new dimensions: 0 keeps, -1 infers.
    pub fn reshape(self, dims: &[i64]) -> Self {
        let dims = self.builder.ints(dims);
        self.reshape_to(dims)
    }
    /// The value under computed dimensions.
    pub fn reshape_to(self, dims: Self) -> Self {
        self.binary("Reshape", dims)
    }
    /// Axes in another order.
    pub fn transpose(self, order: &[i64]) -> Self {
        self.builder.op("Transpose", &[self], vec![attribute::ints("perm", order)])
    }
    /// `start..end` along `axis`.
    pub fn slice(self, axis: i64, start: impl IntoExpr<'b>, end: impl IntoExpr<'b>) -> Self {
        let (start, end) = (start.into_expr(self.builder), end.into_expr(self.builder));
        let axis = self.builder.ints(&[axis]);
        self.builder.op("Slice", &[self, start, end, axis], vec![])
    }
    /// Rows of `self` picked by `indices`, along axis 0.
    pub fn gather(self, indices: Self) -> Self {
        self.builder.op("Gather", &[self, indices], vec![attribute::int("axis", 0)])
    }
    /// The value as another element type.
    pub fn cast(self, element: ElementType) -> Self {
        self.builder.op("Cast", &[self], vec![attribute::int("to", i64::from(element.onnx()))])
    }
    /// Softmax over the last axis.
    pub fn softmax(self) -> Self {
        self.builder.op("Softmax", &[self], vec![attribute::int("axis", -1)])
    }
    /// Layer normalisation over the last axis: `gamma (x - mean) / sqrt(variance + epsilon) + beta`.
    pub fn layer_norm(self, gamma: Self, beta: Option<Self>, epsilon: f32) -> Self {
        let centred = self - self.mean_last();
        let variance = (centred * centred).mean_last();
        let scaled = centred / (variance + epsilon).sqrt() * gamma;
        beta.map_or(scaled, |beta| scaled + beta)
    }
    /// GELU: `x / 2 (1 + erf(x / sqrt 2))`.
    pub fn gelu_erf(self) -> Self {
        0.5 * self * ((self / std::f32::consts::SQRT_2).erf() + 1.0)
    }
    /// GELU's approximation by tanh: `x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`.
    pub fn gelu_tanh(self) -> Self {
        let c = (2.0 / std::f32::consts::PI).sqrt();
        0.5 * self * ((c * (self + 0.044_715 * self * self * self)).tanh() + 1.0)
    }
    /// Normalisation by the root of the mean square over the last axis: `gamma x / sqrt(mean(x^2) + epsilon)`.
    pub fn rms_norm(self, gamma: Self, epsilon: f32) -> Self {
        self / ((self * self).mean_last() + epsilon).sqrt() * gamma
    }
    /// Mean over the last axis, which is kept with size 1.
    pub fn mean_last(self) -> Self {
        let keep = attribute::int("keepdims", 1);
        // From operator set 18 the axes are an input.
        if self.builder.opset < 18 {
            return self.builder.op("ReduceMean", &[self], vec![attribute::ints("axes", &[-1]), keep]);
        }
        let axes = self.builder.ints(&[-1]);
        self.builder.op("ReduceMean", &[self, axes], vec![keep])
    }
}

/// What can stand where an expression is expected.
pub trait IntoExpr<'b> {
    /// The expression.
    fn into_expr(self, builder: &'b Builder) -> Expr<'b>;
}

impl<'b> IntoExpr<'b> for Expr<'b> {
    fn into_expr(self, _: &'b Builder) -> Expr<'b> {
        self
    }
}

impl<'b> IntoExpr<'b> for f32 {
    fn into_expr(self, builder: &'b Builder) -> Expr<'b> {
        builder.parameter("scalar", &Tensor::scalar(self))
    }
}

impl<'b> IntoExpr<'b> for i64 {
    fn into_expr(self, builder: &'b Builder) -> Expr<'b> {
        builder.ints(&[self])
    }
}

macro_rules! operator {
    ($($trait:ident $method:ident $op:literal;)*) => {$(
        impl<'b, R: IntoExpr<'b>> $trait<R> for Expr<'b> {
            type Output = Expr<'b>;
            fn $method(self, right: R) -> Expr<'b> {
                let right = right.into_expr(self.builder);
                self.binary($op, right)
            }
        }
        impl<'b> $trait<Expr<'b>> for f32 {
            type Output = Expr<'b>;
            fn $method(self, right: Expr<'b>) -> Expr<'b> {
                self.into_expr(right.builder).binary($op, right)
            }
        }
    )*};
}
operator! { Add add "Add"; Sub sub "Sub"; Mul mul "Mul"; Div div "Div"; }

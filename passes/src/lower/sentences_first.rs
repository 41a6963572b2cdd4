//! Exact: hidden states `[n, batch, channels]`, as PyTorch's encoder has them unless it is told otherwise, become
//! `[batch, n, channels]`.
//!
//! A transposition goes down the graph through everything that works on each token alone, and through sums, up to where
//! it is taken back or something reads the values in their own layout. Attention inside may be laid out as it likes.

use std::collections::{HashMap, HashSet};

use mabert_graph::proto::{NodeProto, TensorProto};
use mabert_graph::{Builder, Dependence, ElementType, Expr, Index, Model, NodeExt as _, Tensor};

use crate::Result;
use crate::recording::Recording;

/// Sentences and tokens of the run that tells shapes.
const PROBED: (usize, usize) = (2, 7);
const SWAPPED: [i64; 3] = [1, 0, 2];

/// Operators on each element alone, of one operand.
const UNARY: [&str; 12] =
    ["Identity", "Cast", "Relu", "Gelu", "Erf", "Tanh", "Sigmoid", "Exp", "Sqrt", "Neg", "Reciprocal", "Dropout"];
const BINARY: [&str; 5] = ["Add", "Sub", "Mul", "Div", "Pow"];

/// Puts sentences first where the residual stream has tokens first; returns how many values were turned.
///
/// # Errors
/// The graph's wiring is broken.
pub(crate) fn put_sentences_first(model: &mut Model) -> Result<usize> {
    let graph = model.graph();
    let turns = |node: &NodeProto| node.is("Transpose") && (swaps(node, &SWAPPED) || swaps(node, &SWAPPED[..2]));
    let captures = |node: &NodeProto| !node.subgraphs().is_empty();
    if !graph.node.iter().any(turns) || graph.node.iter().any(captures) {
        return Ok(0);
    }
    // A model that cannot be run is refused with the reason later.
    let Ok(recording) = Recording::new(model, PROBED.0, PROBED.1) else { return Ok(0) };
    let builder = Builder::new(model.opset(), "fold-constants");
    builder.scope("sentences_first");
    let index = Index::new(model)?;
    let mut walk = Walk::new(&builder, &index, &recording);
    graph.node.iter().for_each(|node| walk.pass(node));
    // Attention may well turn its own operands around: the stream is what sums of several values go along.
    if !walk.turns_a_sum {
        return Ok(0);
    }
    let turned = walk.shunts.len();
    let shunts = walk.shunts;
    builder.patch_with(shunts).apply(model)?;
    Ok(turned)
}

fn swaps(node: &NodeProto, order: &[i64]) -> bool {
    node.ints("perm") == Some(order)
}

struct Walk<'b, 'g> {
    b: &'b Builder,
    index: &'g Index<'g>,
    recording: &'g Recording,
    /// Values `[batch, n, channels]` that are made of the embeddings token by token, and of what is added to them.
    plain: HashSet<&'g str>,
    /// What such values would be called if the graph were written anew, where they are something else's transposition.
    anew: HashMap<&'g str, Expr<'b>>,
    /// Of values `[n, batch, ..]`, the same with sentences first.
    turned: HashMap<&'g str, Expr<'b>>,
    shunts: Vec<(String, Expr<'b>)>,
    turns_a_sum: bool,
}

impl<'b, 'g> Walk<'b, 'g> {
    fn new(b: &'b Builder, index: &'g Index<'g>, recording: &'g Recording) -> Self {
        let (plain, anew, turned) = (HashSet::new(), HashMap::new(), HashMap::new());
        Self { b, index, recording, plain, anew, turned, shunts: Vec::new(), turns_a_sum: false }
    }

    fn pass(&mut self, node: &'g NodeProto) {
        let [output] = node.output.as_slice() else { return };
        if self.index.dependence(output) != Dependence::Data {
            return;
        }
        if node.is("Transpose") {
            self.transpose(node, output);
        } else if node.is("Gather") && node.int("axis", 0) == 0 {
            self.look_up(node, output);
        } else if self.of_each_token(node) {
            self.token_by_token(node, output);
        }
    }

    /// A transposition starts a turned value, or takes one back.
    fn transpose(&mut self, node: &'g NodeProto, output: &'g str) {
        let input = node.input[0].as_str();
        let ids = self.recording.value(input).is_some_and(|v| v.element_type() != ElementType::F32);
        if swaps(node, &SWAPPED[..2]) && ids {
            self.turned.insert(output, self.b.value(input));
        } else if swaps(node, &SWAPPED) {
            if let Some(&expr) = self.turned.get(input) {
                self.plain.insert(output);
                self.anew.insert(output, expr);
                self.shunts.push((output.to_owned(), self.b.op("Identity", &[expr], vec![])));
            } else if self.plain.contains(input) {
                self.turned.insert(output, self.written_anew(input));
            }
        }
    }

    /// Rows of a table: the embeddings, of ids that may be turned already.
    fn look_up(&mut self, node: &'g NodeProto, output: &'g str) {
        let [table, ids] = [0, 1].map(|at| node.input[at].as_str());
        if self.index.dependence(table) != Dependence::Constant || self.recording.shape(output).len() != 3 {
            return;
        }
        match self.turned.get(ids) {
            Some(&ids) => {
                let rows = self.b.op("Gather", &[self.b.value(table), ids], node.attribute.clone());
                self.turn(output, rows);
            }
            None => _ = self.plain.insert(output),
        }
    }

    fn token_by_token(&mut self, node: &'g NodeProto, output: &'g str) {
        let inputs = || node.input.iter().map(String::as_str);
        if inputs().any(|input| self.turned.contains_key(input)) {
            let operands = node.input.iter().map(|input| self.operand(node, input));
            let Some(operands) = operands.collect::<Option<Vec<Expr<'b>>>>() else { return };
            let whole = self.recording.shape(output);
            let joins = |input: &str| !self.turned.contains_key(input) && self.recording.shape(input) == whole;
            self.turns_a_sum |=
                node.is("Add") && inputs().any(|i| joins(i) && self.index.dependence(i) == Dependence::Data);
            let value = self.b.op(&node.op_type, &operands, node.attribute.clone());
            self.turn(output, value);
        } else if inputs().any(|input| self.plain.contains(input)) {
            self.plain.insert(output);
        }
    }

    /// An operand of a turned value with its sentences first: what has no such axes stays as it is.
    fn operand(&self, node: &NodeProto, input: &'g str) -> Option<Expr<'b>> {
        if let Some(&expr) = self.turned.get(input) {
            return Some(expr);
        }
        let value = || self.written_anew(input);
        let constant = self.constant(input).map(|tensor| tensor.dims.as_slice());
        match (constant.map_or(self.recording.shape(input).len(), <[i64]>::len), constant) {
            (0 | 1, _) => Some(value()),
            (2, Some(&[rows, _])) if node.is("MatMul") || rows == 1 => Some(value()),
            (3, _) => Some(value().transpose(&SWAPPED)),
            _ => None,
        }
    }

    fn constant(&self, name: &str) -> Option<&'g TensorProto> {
        self.index.graph().initializer.iter().find(|tensor| tensor.name == name)
    }

    fn written_anew(&self, value: &'g str) -> Expr<'b> {
        self.anew.get(value).copied().unwrap_or_else(|| self.b.value(value))
    }

    fn turn(&mut self, output: &'g str, value: Expr<'b>) {
        self.turned.insert(output, value);
        self.shunts.push((output.to_owned(), value.transpose(&SWAPPED)));
    }

    /// Whether a node works on each token alone, along the last axis of three.
    fn of_each_token(&self, node: &NodeProto) -> bool {
        let rank = |input: &str| self.recording.shape(input).len();
        let last = |axis: i64| axis == -1 || axis == 2;
        let first = node.input.first().map_or(0, |input| rank(input));
        match node.op_type.as_str() {
            op if !node.is(op) => false,
            op if UNARY.contains(&op) => first == 3,
            op if BINARY.contains(&op) => node.input.iter().any(|input| rank(input) == 3),
            "LayerNormalization" => first == 3 && last(node.int("axis", -1)),
            "ReduceMean" => {
                first == 3
                    && node.int("keepdims", 1) == 1
                    && self.axes(node).is_some_and(|axes| axes.iter().all(|&a| last(a)))
            }
            "MatMul" => first == 3 && self.constant(&node.input[1]).is_some_and(|weight| weight.dims.len() == 2),
            _ => false,
        }
    }

    fn axes(&self, node: &NodeProto) -> Option<Vec<i64>> {
        if let Some(axes) = node.ints("axes") {
            return Some(axes.to_vec());
        }
        let axes = Tensor::from_proto(self.constant(node.input.get(1)?)?).ok()?;
        Some(axes.to_i64()?.iter().copied().collect())
    }
}

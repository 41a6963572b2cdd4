//! What exporters write and tract 0.23 computes wrongly, not at all, or only for one shape at a time, spelled so that it does.
//!
//! tract computes with 64-bit integers as with the sizes of axes, which may be symbols.

mod sizes;
mod spelling;

use std::collections::{HashMap, HashSet};

use mabert_graph::proto::NodeProto;
use mabert_graph::{ElementType, Index, Model as Graph, NodeExt as _, Tensor, attribute, cast_node};

use crate::Result;

/// Rewrites what needs it, exactly.
///
/// # Errors
/// The graph is not valid.
pub(crate) fn adapt(graph: &mut Graph) -> Result<()> {
    narrow_counts(graph);
    sizes::widen(graph);
    narrow_flat_indices(graph)?;
    compute_largest(graph);
    slice_to_the_end(graph);
    spelling::spell(graph)?;
    keep_not_a_number(graph);
    tell_apart(graph);
    Ok(())
}

/// Every name of a value that a graph has: what is added must be called otherwise.
struct Names(HashSet<String>);

impl Names {
    fn taken(graph: &Graph) -> Self {
        Self(graph.value_names())
    }

    /// `value/part`, or that with a number where something is called so already.
    fn fresh(&mut self, value: &str, part: &str) -> String {
        let mut name = format!("{value}/{part}");
        let mut number = 1;
        while !self.0.insert(name.clone()) {
            number += 1;
            name = format!("{value}/{part}_{number}");
        }
        name
    }
}

fn casts_to(node: &NodeProto, to: ElementType) -> bool {
    node.is("Cast") && node.int("to", 0) == i64::from(to.onnx())
}

/// `mask[b, k]`, as transformers 5 looks the attention mask up, is exported as a `Gather` from the flattened mask at
/// `b * length + k`. tract neither flattens symbols nor multiplies them: the mask is reshaped, and the places in it are
/// computed in 32 bits.
fn narrow_flat_indices(graph: &mut Graph) -> Result<()> {
    let ranks: HashMap<String, usize> =
        graph.inputs().into_iter().filter_map(|input| Some((input.name, input.dims?.len()))).collect();
    let index = Index::new(graph)?;
    let (mut flattened, mut places) = (HashSet::new(), HashSet::new());
    for node in graph.graph().node.iter().filter(|n| n.is("Gather") && n.int("axis", 0) == 0) {
        let [flat, place] = node.input.as_slice() else { continue };
        let Some(flatten) = index.producer(flat).filter(|n| n.is("Flatten")) else { continue };
        let rank = ranks.get(index.behind_casts(&flatten.input[0]));
        let whole = rank.and_then(|&rank| i64::try_from(rank).ok()) == Some(flatten.int("axis", 1));
        if !whole || index.element_type(place) != Some(ElementType::I64) {
            continue;
        }
        flattened.insert(flat.clone());
        let mut pending = vec![place];
        while let Some(value) = pending.pop() {
            let Some(node) = index.producer(value).filter(|n| n.is("Add") || n.is("Mul")) else { continue };
            if places.insert(value.clone()) {
                pending.extend(&node.input);
            }
        }
    }
    if flattened.is_empty() {
        return Ok(());
    }
    let mut names = Names::taken(graph);
    for mut node in std::mem::take(&mut graph.graph_mut().node) {
        let output = node.output.first().cloned().unwrap_or_default();
        if flattened.contains(&output) {
            let shape = names.fresh(&output, "shape");
            graph.set_constant(&shape, &Tensor::ints(&[-1, 1]));
            node.op_type = "Reshape".to_owned();
            node.attribute.clear();
            node.input.push(shape);
            graph.graph_mut().node.push(node);
        } else if places.contains(&output) {
            let operands = node.input.len();
            in_32_bits(&mut graph.graph_mut().node, &mut names, node, operands);
        } else {
            graph.graph_mut().node.push(node);
        }
    }
    Ok(())
}

/// Adds `node` so that it computes its first `operands` inputs in 32 bits, between casts.
fn in_32_bits(nodes: &mut Vec<NodeProto>, names: &mut Names, mut node: NodeProto, operands: usize) {
    let output = node.output[0].clone();
    for input in node.input.iter_mut().take(operands) {
        let narrow = names.fresh(&output, "operand_i32");
        nodes.push(cast_node(input, &narrow, ElementType::I32));
        *input = narrow;
    }
    let narrow = names.fresh(&output, "i32");
    node.name.clone_from(&narrow);
    node.output[0].clone_from(&narrow);
    nodes.push(node);
    nodes.push(cast_node(&narrow, &output, ElementType::I64));
}

/// `CumSum` cannot sum symbols up: where positions are counted in 64 bits, as exporters of RoBERTa's family do, they are
/// counted in 32.
fn narrow_counts(graph: &mut Graph) {
    let mut names = Names::taken(graph);
    let nodes = &mut graph.graph_mut().node;
    let widened: HashSet<String> =
        nodes.iter().filter(|n| casts_to(n, ElementType::I64)).flat_map(|n| n.output.iter().cloned()).collect();
    for node in std::mem::take(nodes) {
        match node.is("CumSum") && node.input.first().is_some_and(|i| widened.contains(i)) {
            true => in_32_bits(nodes, &mut names, node, 1),
            false => nodes.push(node),
        }
    }
}

/// "To the end" is written as the largest integer. Passed through casts and reshapes it overflows in tract, so these are
/// computed here.
fn compute_largest(graph: &mut Graph) {
    let large = |value: &Tensor| matches!(value, Tensor::I64(a) if a.iter().any(|v| v.unsigned_abs() > 1 << 31));
    let mut known: HashMap<String, Tensor> = HashMap::new();
    let small = |t: &&mabert_graph::proto::TensorProto| t.dims.iter().product::<i64>() <= 8;
    for proto in graph.graph().initializer.iter().filter(small) {
        known.extend(Tensor::from_proto(proto).ok().filter(large).map(|value| (proto.name.clone(), value)));
    }
    let mut computed = Vec::new();
    for node in &graph.graph().node {
        let Some(output) = node.output.first() else { continue };
        if node.is("Constant") {
            known.extend(attribute::constant(node).ok().flatten().filter(large).map(|value| (output.clone(), value)));
            continue;
        }
        let Some(given) = node.input.first().and_then(|input| known.get(input)) else { continue };
        let moved = match node.op_type.as_str() {
            _ if casts_to(node, ElementType::I64) || node.is("Identity") => Some(given.clone()),
            // Of a single number: whatever shape is asked for, it is a vector of one.
            "Reshape" | "Unsqueeze" if given.len() == 1 && given.shape().is_empty() => given.clone().reshaped(&[1]),
            "Reshape" if given.shape().len() == 1 => Some(given.clone()),
            "Squeeze" if given.len() == 1 => given.clone().reshaped(&[]),
            _ => None,
        };
        if let Some(value) = moved {
            computed.push((output.clone(), value.clone()));
            known.insert(output.clone(), value);
        }
    }
    let names: HashSet<&String> = computed.iter().map(|(name, _)| name).collect();
    let outputs: HashSet<String> = graph.graph().output.iter().map(|o| o.name.clone()).collect();
    let replaced = |node: &NodeProto| {
        node.output.iter().any(|o| names.contains(o)) && !node.output.iter().any(|o| outputs.contains(o))
    };
    let keep: Vec<bool> = graph.graph().node.iter().map(|node| !replaced(node)).collect();
    let mut at = 0;
    graph.graph_mut().node.retain(|_| {
        at += 1;
        keep[at - 1]
    });
    for (name, value) in computed.iter().filter(|(name, _)| !outputs.contains(name)) {
        graph.set_constant(name, value);
    }
}

/// tract's Tanh and Sigmoid make a number of NaN, so that a model which overflowed would seem to answer: what is not equal to
/// itself is passed by them, as onnxruntime does.
fn keep_not_a_number(graph: &mut Graph) {
    let mut names = Names::taken(graph);
    let node = |operator: &str, input: &[&str], output: &str| NodeProto {
        op_type: operator.to_owned(),
        name: output.to_owned(),
        input: input.iter().map(|&name| name.to_owned()).collect(),
        output: vec![output.to_owned()],
        ..NodeProto::default()
    };
    let mut nodes = Vec::with_capacity(graph.graph().node.len());
    for mut bounded in std::mem::take(&mut graph.graph_mut().node) {
        let (true, [input], [output]) =
            (bounded.is("Tanh") || bounded.is("Sigmoid"), bounded.input.as_slice(), bounded.output.as_slice())
        else {
            nodes.push(bounded);
            continue;
        };
        let (input, output) = (input.clone(), output.clone());
        let [number, value] = ["number", "bounded"].map(|part| names.fresh(&output, part));
        bounded.output = vec![value.clone()];
        nodes.push(bounded);
        nodes.push(node("Equal", &[&input, &input], &number));
        nodes.push(node("Where", &[&number, &value, &input], &output));
    }
    graph.graph_mut().node = nodes;
}

/// tf2onnx writes "to the end" as 10^9, in 32 bits; tract takes that for a size, unless it is the largest integer of 64.
fn slice_to_the_end(graph: &mut Graph) {
    const END: i64 = 1_000_000_000;
    let mut names = Names::taken(graph);
    let none = HashMap::new();
    let bounds = |node: &NodeProto| {
        let [starts, ends] = [1, 2].map(|at| node.input.get(at).and_then(|name| sizes::whole(graph, &none, name)));
        let (starts, ends) = (starts?.to_i64()?, ends?.to_i64()?);
        ends.iter().any(|end| *end >= END).then_some((starts, ends))
    };
    let found: Vec<_> =
        graph.graph().node.iter().map(|node| node.is("Slice").then(|| bounds(node)).flatten()).collect();
    for (at, bounds) in found.into_iter().enumerate() {
        let Some((starts, ends)) = bounds else { continue };
        let ends = ends.mapv(|end| if end >= END { i64::MAX } else { end });
        for (operand, values) in [(1, starts), (2, ends)] {
            let name = names.fresh(&graph.graph().node[at].input[operand], "i64");
            graph.set_constant(&name, &values.into());
            graph.graph_mut().node[at].input[operand] = name;
        }
    }
}

/// Names of nodes say nothing in ONNX, and some tools repeat them; tract tells nodes, inputs and constants apart by name.
fn tell_apart(graph: &mut Graph) {
    let graph = graph.graph_mut();
    let values = graph.input.iter().map(|i| &i.name).chain(graph.initializer.iter().map(|t| &t.name));
    let mut taken: HashSet<String> = values.cloned().collect();
    for (at, node) in graph.node.iter_mut().enumerate() {
        let named = [node.label(), node.output.first().map_or("", String::as_str)];
        let free = named.into_iter().find(|name| !name.is_empty() && !taken.contains(*name));
        let mut name = free.map_or_else(|| format!("{}_{at}", node.op_type), str::to_owned);
        while !taken.insert(name.clone()) {
            name.push('_');
        }
        node.name = name;
    }
}

#[cfg(test)]
mod tests {
    use mabert_graph::{Builder, Expr};

    use super::*;

    fn run(y: impl for<'b> Fn(&'b Builder, Expr<'b>) -> Expr<'b>, ids: &[i64]) -> Tensor {
        let b = Builder::new(17, "test");
        let x = b.input("x", ElementType::I64, &["batch", "n"]);
        let graph = b.model(&[y(&b, x).named("y")]);
        let model = crate::LoadOptions::default().prepare(&graph).unwrap();
        model.run(&[("x", &Tensor::new(&[1, ids.len()], ids.to_vec()))]).unwrap().remove(0).1
    }

    #[test]
    fn positions_counted_in_64_bits_are_counted() {
        let counted = run(
            |b, x| {
                let real =
                    b.op("Not", &[b.op("Equal", &[x, b.parameter("pad", &Tensor::scalar(1i64))], vec![])], vec![]);
                b.op("CumSum", &[real.cast(ElementType::I64), b.parameter("axis", &Tensor::scalar(1i64))], vec![])
            },
            &[5, 1, 7, 9],
        );
        assert_eq!(counted.to_i64().unwrap().as_slice().unwrap(), [1, 1, 2, 3]);
    }

    /// The model whose output `y` makes of `x`, planned once for every shape, and its output for each of `given`.
    fn symbolic(y: impl for<'b> Fn(&'b Builder, Expr<'b>) -> Expr<'b>, given: &[(&[usize], &[i64])]) -> Vec<Vec<f32>> {
        let b = Builder::new(17, "test");
        let x = b.input("x", ElementType::I64, &["batch", "n"]);
        let model = crate::LoadOptions::default().prepare(&b.model(&[y(&b, x).named("y")])).unwrap();
        assert!(!model.operators().is_empty(), "planned for each shape apart");
        let run = |(shape, values): &(&[usize], &[i64])| {
            let outputs = model.run(&[("x", &Tensor::new(shape, values.to_vec()))]).unwrap();
            outputs[0].1.to_f32().into_iter().collect()
        };
        given.iter().map(run).collect()
    }

    fn int<'b>(b: &'b Builder, value: i64) -> Expr<'b> {
        b.parameter("int", &Tensor::scalar(value))
    }

    #[test]
    fn a_mask_looked_up_by_place_is_planned_for_every_shape() {
        let looked_up = symbolic(
            |b, x| {
                let size = |axis| b.op("Gather", &[x.shape(), int(b, axis)], vec![]);
                let range = |axis| b.op("Range", &[int(b, 0), size(axis), int(b, 1)], vec![]);
                let unsqueezed = |value, axes: &[i64]| b.op("Unsqueeze", &[value, b.ints(axes)], vec![]);
                let (row, column) = (unsqueezed(range(0), &[1, 2, 3]), unsqueezed(range(1), &[0, 1, 2]));
                let place = column + row * size(1);
                let flat = b.op("Flatten", &[x], vec![attribute::int("axis", 2)]);
                let found = b.op("Gather", &[flat, place], vec![]);
                found.reshape(&[-1]).reshape_to(place.shape()).cast(ElementType::F32)
            },
            &[(&[2, 3], &[1, 0, 2, 3, 4, 5]), (&[1, 4], &[7, 8, 9, 6])],
        );
        assert_eq!(looked_up, [vec![1.0, 0.0, 2.0, 3.0, 4.0, 5.0], vec![7.0, 8.0, 9.0, 6.0]]);
    }

    #[test]
    fn sizes_in_32_bits_are_planned_for_every_shape() {
        let filled = symbolic(
            |b, x| {
                let sizes = x.shape().cast(ElementType::I32);
                let length = sizes.slice(0, 1, 2);
                let scalar = b.op("Squeeze", &[length, b.ints(&[0])], vec![]);
                let int = |value: i32| b.parameter("int", &Tensor::scalar(value));
                let positions = b.op("Range", &[int(0), scalar, int(1)], vec![]);
                let one = b.parameter("one", &Tensor::new(&[1], vec![1i32]));
                let shape = b.concat(&[one, length], 0).cast(ElementType::I64);
                x.cast(ElementType::F32) + positions.reshape_to(shape).cast(ElementType::F32)
            },
            &[(&[2, 3], &[0, 0, 0, 5, 5, 5]), (&[1, 1], &[7])],
        );
        assert_eq!(filled, [vec![0.0, 1.0, 2.0, 5.0, 6.0, 7.0], vec![7.0]]);
    }

    /// What tells the indices of a lookup is a graph of its own, which is adapted too.
    #[test]
    fn positions_counted_backwards_in_32_bits_are_looked_up() {
        let found = symbolic(
            |b, x| {
                let length = b.op("Squeeze", &[x.shape().cast(ElementType::I32).slice(0, 1, 2), b.ints(&[0])], vec![]);
                let int = |value: i32| b.parameter("int", &Tensor::scalar(value));
                let table = b.parameter("table", &Tensor::new(&[9, 1], (0..9).map(|i| i as f32).collect()));
                table.gather(length - b.op("Range", &[int(0), length, int(1)], vec![]))
            },
            &[(&[1, 3], &[0, 0, 0]), (&[2, 1], &[0, 0])],
        );
        assert_eq!(found, [vec![3.0, 2.0, 1.0], vec![1.0]]);
    }

    #[test]
    fn names_that_are_taken_stay_what_they_are() {
        let found = symbolic(
            |b, x| {
                let sizes = x.shape().cast(ElementType::I32).named("sizes");
                let one = b.constant("one", &Tensor::new(&[1], vec![1i32]));
                let seven = b.constant("one/i64", &Tensor::ints(&[7]));
                let length = sizes.slice(0, 1, 2).named("length");
                let taken = b.constant("length/i64", &Tensor::scalar(5f32));
                let shape = b.concat(&[one, length], 0).cast(ElementType::I64);
                let row = b.op("Expand", &[x.cast(ElementType::F32), shape], vec![]);
                row + seven.cast(ElementType::F32) + taken
            },
            &[(&[1, 2], &[1, 2])],
        );
        assert_eq!(found, [vec![13.0, 14.0]]);
    }

    #[test]
    fn what_is_not_a_number_stays_so() {
        let b = Builder::new(17, "test");
        let x = b.input("x", ElementType::F32, &["batch", "n"]);
        let [tanh, sigmoid] = ["Tanh", "Sigmoid"].map(|operator| b.op(operator, &[x], vec![]));
        let model =
            crate::LoadOptions::default().prepare(&b.model(&[tanh.named("tanh"), sigmoid.named("sigmoid")])).unwrap();
        let values = Tensor::new(&[1, 4], vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0]);
        let outputs = model.run(&[("x", &values)]).unwrap();
        for ((_, value), expected) in outputs.iter().zip([[1.0, -1.0, 0.0], [1.0, 0.0, 0.5]]) {
            let value = value.to_f32();
            assert!(value[[0, 0]].is_nan(), "{value}");
            for (at, expected) in expected.into_iter().enumerate() {
                assert!((value[[0, at + 1]] - expected).abs() < 1e-6, "{value}");
            }
        }
    }

    #[test]
    fn nodes_of_one_name_are_told_apart() {
        let b = Builder::new(17, "test");
        let x = b.input("x", ElementType::F32, &["batch", "n"]);
        let y = (x + b.parameter("one", &Tensor::scalar(1f32))).relu().reshape(&[-1]);
        let mut graph = b.model(&[y.named("y")]);
        graph.graph_mut().node.iter_mut().for_each(|node| node.name = "x".to_owned());
        let model = crate::LoadOptions::default().prepare(&graph).unwrap();
        let outputs = model.run(&[("x", &Tensor::new(&[1, 2], vec![-2f32, 3.0]))]).unwrap();
        assert_eq!(outputs[0].1.to_f32().as_slice().unwrap(), [0.0, 4.0]);
    }

    #[test]
    fn to_the_end_may_be_computed() {
        let whole = run(
            |b, x| {
                let end = b.parameter("end", &Tensor::scalar(i64::MAX)).cast(ElementType::I64).reshape(&[-1]);
                b.op("Slice", &[x, b.ints(&[1]), end, b.ints(&[1])], vec![])
            },
            &[5, 6, 7],
        );
        assert_eq!(whole.to_i64().unwrap().as_slice().unwrap(), [6, 7]);
    }
}

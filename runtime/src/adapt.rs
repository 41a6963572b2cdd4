//! What exporters write and tract 0.23 computes wrongly or not at all, spelled so that it does.
//!
//! tract computes with 64-bit integers as with the sizes of axes, which may be symbols.

use std::collections::{HashMap, HashSet};

use mabert_graph::proto::NodeProto;
use mabert_graph::{ElementType, Model as Graph, NodeExt as _, Tensor, attribute};

/// Rewrites what needs it, exactly.
pub(crate) fn adapt(graph: &mut Graph) {
    narrow_counts(graph);
    compute_largest(graph);
}

/// `CumSum` cannot sum symbols up: where positions are counted in 64 bits, as exporters of RoBERTa's family do, they are
/// counted in 32.
fn narrow_counts(graph: &mut Graph) {
    let int64 = i64::from(ElementType::I64.onnx());
    let nodes = &mut graph.graph_mut().node;
    let widened: HashSet<String> = nodes
        .iter()
        .filter(|n| n.is("Cast") && n.int("to", 0) == int64)
        .flat_map(|n| n.output.iter().cloned())
        .collect();
    let cast = |input: &str, output: &str, to: i64| NodeProto {
        op_type: "Cast".to_owned(),
        name: output.to_owned(),
        input: vec![input.to_owned()],
        output: vec![output.to_owned()],
        attribute: vec![attribute::int("to", to)],
        ..NodeProto::default()
    };
    for mut node in std::mem::take(nodes) {
        if !(node.is("CumSum") && node.input.first().is_some_and(|i| widened.contains(i))) {
            nodes.push(node);
            continue;
        }
        let (given, sum) = (node.input[0].clone(), node.output[0].clone());
        let [narrow, narrow_sum] = ["given_i32", "i32"].map(|part| format!("{sum}/{part}"));
        node.input[0].clone_from(&narrow);
        node.output[0].clone_from(&narrow_sum);
        nodes.push(cast(&given, &narrow, i64::from(ElementType::I32.onnx())));
        nodes.push(node);
        nodes.push(cast(&narrow_sum, &sum, int64));
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
        let to_int64 = node.is("Cast") && node.int("to", 0) == i64::from(ElementType::I64.onnx());
        let moved = match node.op_type.as_str() {
            "Cast" | "Identity" if to_int64 || node.is("Identity") => Some(given.clone()),
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

#[cfg(test)]
mod tests {
    use mabert_graph::{Builder, Expr};

    use super::*;

    fn run(y: impl for<'b> Fn(&'b Builder, Expr<'b>) -> Expr<'b>, ids: &[i64]) -> Tensor {
        let b = Builder::new(17, "test");
        let x = b.input("x", ElementType::I64, &["batch", "n"]);
        let graph = b.model(&[y(&b, x).named("y")]);
        let model = crate::Options::default().prepare(&graph).unwrap();
        model.run(&[("x", Tensor::new(&[1, ids.len()], ids.to_vec()))]).unwrap().remove(0).1
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

//! What a file may ask for: a few bytes can name a size that no machine has, and an allocation that fails ends the process.

use mabert_graph::proto::TensorProto;
use mabert_graph::{ElementType, Index, Model as Graph, NodeExt as _, Tensor, attribute};

use crate::Result;

/// Elements that one node may make of nothing but constants.
const MOST_ELEMENTS: f64 = (1u64 << 31) as f64;
/// Nodes of a graph; encoders have thousands.
const MOST_NODES: usize = 1 << 18;

/// Refuses graphs of too many nodes, constants whose data does not fill their shape, and nodes whose constant operands ask for more than a machine holds.
pub(crate) fn check(graph: &Graph) -> Result<()> {
    let nodes = &graph.graph().node;
    if nodes.len() > MOST_NODES {
        let reason = format!("{} nodes, more than {MOST_NODES}: no encoder has so many", nodes.len());
        return Err(mabert_graph::Error::Graph(reason).into());
    }
    let known = |t: &&TensorProto| ElementType::from_onnx(t.data_type).is_some();
    for tensor in graph.graph().initializer.iter().filter(known) {
        Tensor::check(tensor)?;
    }
    let index = Index::new(graph)?;
    let constant = |name: &String| -> Option<Tensor> {
        match index.producer(name) {
            Some(node) if node.is("Constant") => attribute::constant(node).ok()?,
            Some(_) => None,
            None => graph.constant(name).ok(),
        }
    };
    let product = |name: &String| constant(name).map(|t| t.to_f32().iter().map(|&v| f64::from(v).abs()).product());
    let size = |name: &String| graph.initializer(name).map_or(1.0, |t| t.dims.iter().map(|&d| d as f64).product());
    for node in nodes {
        let operand = |at: usize| node.input.get(at);
        let asked: Option<f64> = match node.op_type.as_str() {
            "ConstantOfShape" => operand(0).and_then(product),
            "Expand" => operand(1).and_then(product),
            "Tile" => operand(1).and_then(product).zip(operand(0).map(size)).map(|(times, size)| times * size),
            "OneHot" => operand(1).and_then(product),
            "Pad" => operand(1).and_then(constant).map(|t| t.to_f32().iter().map(|&v| f64::from(v).abs()).sum()),
            "Range" => {
                let [start, end, step] = [0, 1, 2].map(|at| {
                    operand(at).and_then(constant).filter(|t| t.len() == 1).map(|t| f64::from(t.to_f32().sum()))
                });
                start.zip(end).zip(step).map(|((start, end), step)| ((end - start) / step).abs())
            }
            _ => None,
        };
        if let Some(asked) = asked.filter(|&n| n.is_nan() || n > MOST_ELEMENTS) {
            let reason = format!("node `{}` ({}) asks for {asked:.1e} elements", node.label(), node.op_type);
            return Err(mabert_graph::Error::Graph(reason).into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use mabert_graph::{Builder, ElementType, Expr};

    use super::*;

    #[test]
    fn what_no_machine_holds_is_refused_before_anything_is_made() {
        fn built<'b>(b: &'b Builder, op: &str, operands: &[Expr<'b>]) -> crate::Error {
            let x = b.input("x", ElementType::F32, &["n"]);
            let large = b.op(op, operands, vec![]);
            let graph = b.model(&[(x + large).named("y")]);
            crate::LoadOptions::default().prepare(&graph).unwrap_err()
        }
        let b = Builder::new(17, "test");
        let number = |v: i64| b.parameter("number", &Tensor::scalar(v));
        let cases = [
            built(&b, "ConstantOfShape", &[b.ints(&[1 << 40, 1 << 20])]),
            built(&b, "Expand", &[b.parameter("one", &Tensor::scalar(1f32)), b.ints(&[1 << 50])]),
            built(&b, "Range", &[number(0), number(1 << 60), number(1)]),
            built(&b, "Tile", &[b.parameter("two", &Tensor::new(&[2], vec![1f32; 2])), b.ints(&[1 << 40])]),
        ];
        for error in cases {
            assert!(error.to_string().contains("asks for"), "{error}");
        }
    }
}

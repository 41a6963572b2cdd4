//! Nodes in the order in which they can be computed, in graphs, subgraphs and functions.
//!
//! ONNX asks for that order, and not every tool writes it; onnxruntime sorts what it loads.

use std::collections::HashMap;

use onnx_protobuf::{AttributeProto, ModelProto, NodeProto};

use crate::index::used_values;
use crate::{Error, NodeExt as _, Result};

/// Sorts every graph and function of a model. What is in order already stays as it is.
///
/// # Errors
/// Nodes depend on each other in a circle.
pub(crate) fn sort_model(proto: &mut ModelProto) -> Result<()> {
    let functions = proto.functions.iter_mut().map(|function| &mut function.node);
    proto.graph.as_mut().map(|graph| &mut graph.node).into_iter().chain(functions).try_for_each(sort_with_inner)
}

/// Inner graphs first: what they take from outside is only known of those in order.
fn sort_with_inner(nodes: &mut Vec<NodeProto>) -> Result<()> {
    let inner = |a: &mut AttributeProto| {
        a.g.as_mut().into_iter().chain(&mut a.graphs).try_for_each(|graph| sort_with_inner(&mut graph.node))
    };
    nodes.iter_mut().flat_map(|node| &mut node.attribute).try_for_each(inner)?;
    sort(nodes)
}

/// Puts every node behind those it depends on, and otherwise keeps the order.
///
/// # Errors
/// Nodes depend on each other in a circle.
pub(crate) fn sort(nodes: &mut Vec<NodeProto>) -> Result<()> {
    let mut producer: HashMap<&str, usize> = HashMap::new();
    for (at, node) in nodes.iter().enumerate() {
        // A name that two nodes give is no circle; whoever looks at the graph's values says so.
        node.output.iter().for_each(|output| _ = producer.entry(output).or_insert(at));
    }
    let needed = |node: &NodeProto| -> Vec<usize> {
        used_values(node).into_iter().filter_map(|value| producer.get(value).copied()).collect()
    };
    let needs: Vec<Vec<usize>> = nodes.iter().map(needed).collect();
    if needs.iter().enumerate().all(|(at, needs)| needs.iter().all(|&need| need < at)) {
        return Ok(());
    }
    let order = order(&needs).map_err(|at| {
        let node = &nodes[at];
        Error::Graph(format!("node `{}` ({}) depends on itself, in a circle of nodes", node.label(), node.op_type))
    })?;
    let mut unsorted: Vec<Option<NodeProto>> = std::mem::take(nodes).into_iter().map(Some).collect();
    nodes.extend(order.into_iter().filter_map(|at| unsorted[at].take()));
    Ok(())
}

/// An order in which each comes after all that it needs; else one that needs itself.
fn order(needs: &[Vec<usize>]) -> std::result::Result<Vec<usize>, usize> {
    let mut order = Vec::with_capacity(needs.len());
    let mut mark = vec![Mark::New; needs.len()];
    for root in 0..needs.len() {
        // An explicit stack: graphs may be thousands of nodes deep.
        let mut stack = vec![(root, 0)];
        while let Some((node, next)) = stack.pop() {
            match (mark[node], next) {
                (Mark::Done, _) => continue,
                (Mark::Open, 0) => return Err(node),
                _ => mark[node] = Mark::Open,
            }
            match needs[node].get(next) {
                Some(&need) => {
                    stack.push((node, next + 1));
                    if mark[need] != Mark::Done {
                        stack.push((need, 0));
                    }
                }
                None => {
                    mark[node] = Mark::Done;
                    order.push(node);
                }
            }
        }
    }
    Ok(order)
}

#[derive(Clone, Copy, PartialEq)]
enum Mark {
    New,
    Open,
    Done,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Builder, ElementType, Model, attribute};

    fn node(op: &str, inputs: &[&str], output: &str) -> NodeProto {
        NodeProto {
            op_type: op.to_owned(),
            input: inputs.iter().map(|&i| i.to_owned()).collect(),
            output: vec![output.to_owned()],
            ..NodeProto::default()
        }
    }

    fn outputs(nodes: &[NodeProto]) -> Vec<&str> {
        nodes.iter().map(|n| n.output[0].as_str()).collect()
    }

    /// `a = relu(x)`, `b = if(flag) { p = a, q = p } else { q = x }`, `y = f(b)`.
    fn model() -> Model {
        let b = Builder::new(17, "test");
        let x = b.input("x", ElementType::F32, &["2"]);
        let mut model = b.model(&[x.relu().named("a")]);
        let branch = |nodes: Vec<NodeProto>, output: &str| onnx_protobuf::GraphProto {
            output: vec![onnx_protobuf::ValueInfoProto { name: output.to_owned(), ..Default::default() }],
            node: nodes,
            ..Default::default()
        };
        let graph = |name: &str, graph: onnx_protobuf::GraphProto| AttributeProto {
            g: Some(graph).into(),
            name: name.to_owned(),
            ..attribute::int(name, 0)
        };
        let mut choice = node("If", &["flag"], "b");
        choice.attribute = vec![
            graph("then_branch", branch(vec![node("Relu", &["a"], "p"), node("Relu", &["p"], "q")], "q")),
            graph("else_branch", branch(vec![], "x")),
        ];
        let mut call = node("f", &["b"], "y");
        call.domain = "local".to_owned();
        model.graph_mut().node.extend([choice, call]);
        model.graph_mut().output[0].name = "y".to_owned();
        let body = vec![node("Neg", &["in"], "m"), node("Neg", &["m"], "out")];
        model.proto_mut().functions.push(onnx_protobuf::FunctionProto {
            name: "f".to_owned(),
            domain: "local".to_owned(),
            input: vec!["in".to_owned()],
            output: vec!["out".to_owned()],
            node: body,
            ..Default::default()
        });
        model
    }

    #[test]
    fn graphs_subgraphs_and_functions_are_sorted_and_what_is_in_order_stays() {
        let sorted = model().proto().clone();
        let mut same = sorted.clone();
        sort_model(&mut same).unwrap();
        assert!(same == sorted);
        let mut mixed = sorted.clone();
        let graph = mixed.graph.as_mut().unwrap();
        // The inner graph alone says that `b` needs `a`.
        graph.node.rotate_left(1);
        graph.node[0].attribute[0].g.as_mut().unwrap().node.reverse();
        mixed.functions[0].node.reverse();
        assert!(mixed != sorted);
        sort_model(&mut mixed).unwrap();
        assert!(mixed == sorted);
    }

    #[test]
    fn what_does_not_depend_on_each_other_keeps_its_order() {
        let mut nodes = vec![node("F", &["b"], "c"), node("F", &[], "z"), node("F", &[], "b"), node("F", &[], "a")];
        sort(&mut nodes).unwrap();
        assert_eq!(outputs(&nodes), ["b", "c", "z", "a"]);
    }

    #[test]
    fn a_circle_is_refused_and_one_of_its_nodes_named() {
        let mut circle = model().proto().clone();
        circle.graph.as_mut().unwrap().node[0].input[0] = "b".to_owned();
        let message = sort_model(&mut circle).unwrap_err().to_string();
        assert!(message.contains("node `Relu` (Relu) depends on itself"), "{message}");
        let mut alone = vec![node("Add", &["x", "s"], "s")];
        assert!(sort(&mut alone).unwrap_err().to_string().contains("`s` (Add)"));
        // No circle, but another fault.
        assert!(sort(&mut vec![node("F", &["x"], "h"), node("F", &["h"], "h")]).is_ok());
    }
}

//! Whether a graph's operators are among those that are run.

use mabert_graph::proto::NodeProto;
use mabert_graph::{Model as Graph, NodeExt as _};

use crate::operators::OPERATORS;
use crate::{Error, Result};

/// Refuses a graph with an operator that cannot be run, by name: tract says so in its own words, and late.
pub(crate) fn check(graph: &Graph) -> Result<()> {
    refuse(graph, &|node| !OPERATORS.0.contains_key(&node.op_type))
}

/// Refuses a graph that comes with nodes such as only the runtime itself makes.
pub(crate) fn refuse_own(graph: &Graph) -> Result<()> {
    refuse(graph, &|node| node.domain == crate::fuse::DOMAIN)
}

fn refuse(graph: &Graph, is_refused: &dyn Fn(&NodeProto) -> bool) -> Result<()> {
    match first(&graph.graph().node, is_refused) {
        None => Ok(()),
        Some(node) => {
            let domain = if node.is(&node.op_type) { String::new() } else { format!("{}.", node.domain) };
            let operator = format!("{domain}{}", node.op_type);
            Err(Error::Operator { model: String::new(), operator, node: node.label().to_owned() })
        }
    }
}

/// The first such node, in subgraphs too.
fn first<'g>(nodes: &'g [NodeProto], is_refused: &dyn Fn(&NodeProto) -> bool) -> Option<&'g NodeProto> {
    nodes.iter().find_map(|node| match is_refused(node) {
        true => Some(node),
        false => node.subgraphs().into_iter().find_map(|graph| first(&graph.node, is_refused)),
    })
}

#[cfg(test)]
mod tests {
    use mabert_graph::{Builder, ElementType};

    /// What no output needs is no matter.
    #[test]
    fn an_operator_that_is_not_known_is_named_where_it_is_needed() {
        let b = Builder::new(17, "test");
        let x = b.input("x", ElementType::F32, &["n"]);
        let y = b.op("Whatever", &[x], vec![]).named("y");
        let mut graph = b.model(&[(y + 1.0).named("z")]);
        graph.graph_mut().node[0].domain = "some.where".to_owned();
        let message = crate::LoadOptions::default().prepare(&graph).unwrap_err().to_string();
        assert!(message.starts_with("operator some.where.Whatever (node `Whatever`) is not supported"), "{message}");
        graph.graph_mut().node[1].input[0] = "x".to_owned();
        crate::LoadOptions::default().prepare(&graph).unwrap();
        // Nor one that only the runtime makes.
        let node = &mut graph.graph_mut().node[1];
        (node.op_type, node.domain) = ("HingeAttention".to_owned(), "onnx_mabert".to_owned());
        let message = crate::LoadOptions::default().prepare(&graph).unwrap_err().to_string();
        assert!(message.starts_with("operator onnx_mabert.HingeAttention"), "{message}");
    }
}

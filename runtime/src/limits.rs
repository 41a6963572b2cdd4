//! What a file may ask for: a few bytes can name a size that no machine has, and an allocation that fails ends the process.

use mabert_graph::proto::TensorProto;
use mabert_graph::{ElementType, Model as Graph, Tensor};
use tract_onnx::prelude::TypedModel;

use crate::bounded::Refused;

/// Elements that one node may make of nothing but numbers of the file: 4 GB of floats.
pub(crate) const MOST_ELEMENTS: f64 = (1u64 << 30) as f64;
/// Nodes of a graph; encoders have thousands.
const MOST_NODES: usize = 1 << 18;

/// Refuses graphs of too many nodes, and constants whose data does not fill their shape.
pub(crate) fn check(graph: &Graph) -> crate::Result<()> {
    let nodes = &graph.graph().node;
    if nodes.len() > MOST_NODES {
        let reason = format!("{} nodes, more than {MOST_NODES}: no encoder has so many", nodes.len());
        return Err(mabert_graph::Error::Graph(reason).into());
    }
    let known = |t: &&TensorProto| ElementType::from_onnx(t.data_type).is_some();
    for tensor in graph.graph().initializer.iter().filter(known) {
        Tensor::check(tensor)?;
    }
    Ok(())
}

/// Refuses values whose sizes, as far as they are numbers, are more than a machine holds: constants are computed next.
pub(crate) fn check_shapes(model: &TypedModel) -> Result<(), Refused> {
    for node in model.nodes() {
        for output in &node.outputs {
            let sizes = output.fact.shape.iter().map(|size| size.to_i64().map_or(1.0, |size| size as f64));
            let elements: f64 = sizes.product();
            if elements > MOST_ELEMENTS {
                let reason = format!("makes {elements:.1e} elements");
                return Err(Refused { node: node.name.clone(), operator: node.op.name().into_owned(), reason });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use mabert_graph::{Builder, ElementType};

    use super::*;

    /// Each step asks for little, and multiplies what there is.
    #[test]
    fn what_grows_step_by_step_is_refused_before_it_is_made() {
        let b = Builder::new(17, "test");
        let x = b.input("x", ElementType::F32, &["n"]);
        let row = b.parameter("row", &Tensor::new(&[1, 64], vec![1f32; 64]));
        let wide = b.op("Tile", &[row, b.ints(&[1, 1 << 13])], vec![]);
        let high = b.op("Tile", &[wide, b.ints(&[1 << 13, 1])], vec![]);
        let graph = b.model(&[(high + b.op("ReduceSum", &[x], vec![])).named("y")]);
        let error = crate::LoadOptions::default().prepare(&graph).unwrap_err().to_string();
        assert!(error.contains("elements"), "{error}");
    }
}

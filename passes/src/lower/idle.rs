//! Exact: what leaves its input as it is is taken out.

use std::collections::HashMap;

use mabert_graph::proto::NodeProto;
use mabert_graph::{Index, Model, NodeExt as _};

use crate::Result;

/// Takes out identities, dropouts, casts to what a value is already, and moves that are taken back at once (a transposition
/// and its inverse, axes added and removed); returns how many nodes went. What is an output of the graph keeps its node.
///
/// # Errors
/// The graph's wiring is broken.
pub(crate) fn remove_idle(model: &mut Model) -> Result<usize> {
    // Subgraphs may capture a value under its name: such models stay as they are.
    if model.graph().node.iter().any(|node| !node.subgraphs().is_empty()) {
        return Ok(0);
    }
    let before = model.graph().node.len();
    loop {
        let index = Index::new(model)?;
        let mut same: HashMap<String, String> = HashMap::new();
        for node in &index.graph().node {
            if let Some(value) = idle(model, &index, node)
                && !index.is_output(&node.output[0])
            {
                // The value may itself be one that goes.
                let value = same.get(value).map_or(value, String::as_str).to_owned();
                same.insert(node.output[0].clone(), value);
            }
        }
        if same.is_empty() {
            return Ok(before - model.graph().node.len());
        }
        let graph = model.graph_mut();
        graph.node.retain(|node| !node.output.first().is_some_and(|o| same.contains_key(o)));
        for input in graph.node.iter_mut().flat_map(|node| &mut node.input) {
            if let Some(value) = same.get(input) {
                input.clone_from(value);
            }
        }
        model.remove_dead();
    }
}

/// The value that a node gives back as it is, or as it was before the node in front of it.
fn idle<'m>(model: &Model, index: &Index<'m>, node: &'m NodeProto) -> Option<&'m str> {
    let input = node.input.first()?.as_str();
    // Taken back at once.
    let undone = |op: &str| index.producer(input).filter(|earlier| earlier.is(op));
    match node.op_type.as_str() {
        "Identity" if node.is("Identity") => Some(input),
        "Dropout" if node.is("Dropout") && !trains(model, node) && !mask_is_used(index, node) => Some(input),
        "Cast" if node.is("Cast") => {
            let element = index.element_type(input)?;
            (i64::from(element.onnx()) == node.int("to", 0)).then_some(input)
        }
        "Transpose" if node.is("Transpose") => {
            let (first, second) = (undone("Transpose")?.ints("perm")?, node.ints("perm")?);
            let back = first.len() == second.len()
                && second.iter().enumerate().all(|(axis, &from)| {
                    usize::try_from(from).ok().and_then(|from| first.get(from)) == Some(&(axis as i64))
                });
            back.then(|| index.producer(input).map(|earlier| earlier.input[0].as_str()))?
        }
        "Squeeze" | "Unsqueeze" if node.is(&node.op_type) => {
            let other = if node.op_type == "Squeeze" { "Unsqueeze" } else { "Squeeze" };
            let earlier = undone(other)?;
            (axes(model, earlier)? == axes(model, node)?).then_some(earlier.input[0].as_str())
        }
        _ => None,
    }
}

/// Whether a dropout's third operand may tell it to drop.
fn trains(model: &Model, node: &NodeProto) -> bool {
    let mode = node.input.get(2).filter(|mode| !mode.is_empty());
    mode.is_some_and(|mode| {
        model.constant(mode).is_ok_and(|m| m.to_f32().sum() != 0.0) || model.initializer(mode).is_none()
    })
}

fn mask_is_used(index: &Index<'_>, node: &NodeProto) -> bool {
    node.output.get(1).is_some_and(|mask| index.is_output(mask) || !index.consumers_at(mask).is_empty())
}

/// The axes of a `Squeeze` or `Unsqueeze`: an attribute, and from operator set 13 an operand.
fn axes(model: &Model, node: &NodeProto) -> Option<Vec<i64>> {
    if let Some(axes) = node.ints("axes") {
        return Some(axes.to_vec());
    }
    let values = model.constant(node.input.get(1)?).ok()?.to_i64()?;
    Some(values.iter().copied().collect())
}

#[cfg(test)]
mod tests {
    use mabert_graph::{Builder, ElementType, Tensor, attribute};

    use super::*;

    #[test]
    fn only_what_does_nothing_goes() {
        let b = Builder::new(17, "test");
        let x = b.input("x", ElementType::F32, &["2", "3", "4"]);
        let kept = b.op("Identity", &[x], vec![]).cast(ElementType::F32);
        let kept = b.op("Dropout", &[kept], vec![]).transpose(&[2, 0, 1]).transpose(&[1, 2, 0]);
        let axes = b.ints(&[0]);
        let kept = b.op("Squeeze", &[b.op("Unsqueeze", &[kept, axes], vec![]), axes], vec![]);
        // These do something.
        let moved = kept.cast(ElementType::F16).cast(ElementType::F32).transpose(&[2, 0, 1]).transpose(&[2, 0, 1]);
        let dropped = b.parameter("ratio", &Tensor::scalar(0.5f32));
        let trains = b.parameter("trains", &Tensor::scalar(true));
        let moved = b.op("Dropout", &[moved, dropped, trains], vec![attribute::int("seed", 1)]);
        let mut model = b.model(&[moved.named("y")]);
        assert_eq!(remove_idle(&mut model).unwrap(), 7);
        let left: Vec<&str> = model.graph().node.iter().map(|n| n.op_type.as_str()).collect();
        assert_eq!(left, ["Cast", "Cast", "Transpose", "Transpose", "Dropout"]);
        assert_eq!(model.graph().node[0].input, ["x"]);
    }
}

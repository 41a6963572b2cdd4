//! Exact: what depends on no input is computed once.

use mabert_graph::{Dependence, Index, Model, NodeExt as _, Tensor, attribute};
use mabert_runtime::LoadOptions;

use crate::{Error, Result};

/// Replaces every value that depends on no input by an initializer; returns how many nodes went.
///
/// # Errors
/// The graph's wiring is broken, or a constant cannot be computed.
pub(crate) fn fold_constants(model: &mut Model) -> Result<usize> {
    let before = model.graph().node.len();
    inline_constant_nodes(model)?;
    let index = Index::new(model)?;
    let graph = model.graph();
    let mut wanted: Vec<&str> = Vec::new();
    for node in &graph.node {
        let constant = |v: &str| index.dependence(v) == Dependence::Constant;
        for output in node.output.iter().filter(|o| constant(o)) {
            let used = index.consumers(output).any(|n| n.output.iter().any(|o| !constant(o)));
            if used || index.is_output(output) {
                wanted.push(output);
            }
        }
    }
    // Constants that are outputs of the graph keep their node: an initializer cannot be one in every engine.
    wanted.retain(|v| !index.is_output(v));
    if !wanted.is_empty() {
        let part = model.extract(&[], &wanted)?;
        let values = LoadOptions::default().prepare(&part)?.run(&[])?;
        let computed: Vec<String> = values.iter().map(|(name, _)| name.clone()).collect();
        for node in &mut model.graph_mut().node {
            for output in node.output.iter_mut().filter(|o| computed.contains(o)) {
                *output = format!("{output}/folded");
            }
        }
        for (name, value) in values {
            model.set_constant(&name, &value);
        }
    }
    model.remove_dead();
    Ok(before - model.graph().node.len())
}

/// `Constant` nodes become initializers.
fn inline_constant_nodes(model: &mut Model) -> Result<()> {
    let outputs: Vec<String> = model.graph().output.iter().map(|o| o.name.clone()).collect();
    let mut constants = Vec::new();
    let graph = model.graph_mut();
    let mut fault = None;
    graph.node.retain(|node| {
        if !node.is("Constant") || node.output.first().is_none_or(|o| outputs.contains(o)) {
            return true;
        }
        match attribute::constant(node) {
            Ok(Some(value)) => constants.push((node.output[0].clone(), value)),
            Ok(None) => return true,
            Err(e) => {
                fault = Some(e);
                return true;
            }
        }
        false
    });
    if let Some(fault) = fault {
        return Err(fault.into());
    }
    for (name, value) in constants {
        graph.initializer.push(value.to_proto(&name));
    }
    Ok(())
}

/// Weights that are NaN or infinite would spoil every statistic: they are refused by name. Infinite scalars, and tables of
/// nothing but zero and minus infinity, are masks.
///
/// # Errors
/// The first weight that is not finite.
pub fn refuse_unusable_weights(model: &Model) -> Result<()> {
    for proto in model.graph().initializer.iter().filter(|t| t.dims.iter().product::<i64>() > 1) {
        let Ok(Tensor::F32(values)) = Tensor::from_proto(proto) else { continue };
        if values.iter().all(|&v| v == 0.0 || v == f32::NEG_INFINITY) {
            continue;
        }
        if let Some((at, value)) = values.iter().copied().enumerate().find(|(_, v)| !v.is_finite()) {
            return Err(Error::NotFinite { name: proto.name.clone(), value, at });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use mabert_graph::{Builder, ElementType};

    #[test]
    fn what_depends_on_no_input_becomes_an_initializer() {
        let b = Builder::new(17, "test");
        let x = b.input("x", ElementType::F32, &["n", "2"]);
        let held = b.op("Constant", &[], vec![attribute::tensor("value", &Tensor::new(&[2], vec![1f32, 2.0]))]);
        let doubled = (held * 2.0).named("doubled");
        let mut model = b.model(&[(x + doubled).named("y")]);
        assert_eq!(fold_constants(&mut model).unwrap(), 2);
        assert_eq!(model.operators().into_iter().collect::<Vec<_>>(), [("Add".to_owned(), 1)]);
        assert_eq!(model.constant("doubled").unwrap(), Tensor::new(&[2], vec![2f32, 4.0]));
    }

    #[test]
    fn weights_that_are_no_numbers_are_named() {
        let b = Builder::new(17, "test");
        let x = b.input("x", ElementType::F32, &["n", "2"]);
        let w = b.constant("w", &Tensor::new(&[2], vec![1f32, f32::NAN]));
        let model = b.model(&[(x * w).named("y")]);
        let message = refuse_unusable_weights(&model).unwrap_err().to_string();
        assert!(message.contains("`w` holds NaN at element 1"), "{message}");
    }
}

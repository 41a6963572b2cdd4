//! Exact: equal constants are kept once.

use std::collections::HashMap;

use mabert_graph::Model;

/// Makes all users of equal constants use the first of them; returns how many constants went.
pub(crate) fn share_equal_constants(model: &mut Model) -> usize {
    let graph = model.graph_mut();
    let before = graph.initializer.len();
    let mut first: HashMap<(i32, Vec<i64>, &[u8]), &str> = HashMap::new();
    let mut renamed: HashMap<String, String> = HashMap::new();
    for tensor in graph.initializer.iter().filter(|t| !t.raw_data.is_empty()) {
        let key = (tensor.data_type, tensor.dims.clone(), tensor.raw_data.as_slice());
        let kept = first.entry(key).or_insert(&tensor.name);
        if *kept != tensor.name {
            renamed.insert(tensor.name.clone(), (*kept).to_owned());
        }
    }
    // Subgraphs may capture an initializer under its name: such models keep their constants as they are.
    if renamed.is_empty()
        || graph.node.iter().any(|n| n.attribute.iter().any(|a| a.g.is_some() || !a.graphs.is_empty()))
    {
        return 0;
    }
    for input in graph.node.iter_mut().flat_map(|n| &mut n.input) {
        if let Some(kept) = renamed.get(input) {
            input.clone_from(kept);
        }
    }
    graph.initializer.retain(|t| !renamed.contains_key(&t.name));
    before - graph.initializer.len()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use crate::pipeline::Pass;
    use crate::testing::{largest_output_difference, student};

    #[test]
    fn equal_constants_are_kept_once() {
        let (before, after) = (student(Pass::MergeQkv), student(Pass::ShareConstants));
        let constants = |s: &crate::pipeline::Student| s.model.graph().initializer.len();
        assert!(constants(&after) < constants(&before));
        let graph = after.model.graph();
        let distinct: HashSet<_> = graph.initializer.iter().map(|t| (t.data_type, &t.dims, &t.raw_data)).collect();
        assert_eq!(distinct.len(), graph.initializer.len());
        assert_eq!(largest_output_difference(&before.model, &after.model), 0.0);
    }
}

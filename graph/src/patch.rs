//! Edits: new nodes built aside, values re-routed to them, and what nobody needs any more removed.

use std::collections::HashSet;

use onnx_protobuf::{NodeProto, TensorProto};

use crate::index::used_values;
use crate::order::sort;
use crate::{Error, Model, Result};

/// An edit of a graph. Its nodes may use any value of the graph; a [`shunt`](Patch::shunt) makes everyone who used the
/// old value use the new one. The new value takes over the old one's name, so graph outputs and exporters' names stay.
#[derive(Debug, Default)]
pub struct Patch {
    nodes: Vec<NodeProto>,
    constants: Vec<TensorProto>,
    shunts: Vec<(String, String)>,
}

impl Patch {
    pub(crate) fn new(nodes: Vec<NodeProto>, constants: Vec<TensorProto>) -> Self {
        Self { nodes, constants, shunts: Vec::new() }
    }

    /// Everyone outside this patch who used `old` uses `new` (a value that the patch computes) instead.
    pub fn shunt(mut self, old: &str, new: &str) -> Self {
        self.shunts.push((old.to_owned(), new.to_owned()));
        self
    }

    /// Whether the patch changes nothing.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty() && self.shunts.is_empty()
    }

    /// Applies the edit, sorts the graph, and removes the nodes that no output needs any more.
    ///
    /// # Errors
    /// A shunt names a value that no node computes, a name is taken, or the edit makes a cycle.
    pub fn apply(self, model: &mut Model) -> Result<()> {
        let origin = model.origin().to_owned();
        self.edit(model).map_err(|e| e.in_model(&origin))
    }

    fn edit(mut self, model: &mut Model) -> Result<()> {
        let mut taken = model.value_names();
        for (old, new) in std::mem::take(&mut self.shunts) {
            self.take_over(model, &mut taken, &old, &new)?;
        }
        for name in self.nodes.iter().flat_map(|n| &n.output).chain(self.constants.iter().map(|c| &c.name)) {
            if !taken.insert(name.clone()) {
                return Err(Error::Graph(format!("a new value is called `{name}`, but that name is taken")));
            }
        }
        let graph = model.graph_mut();
        graph.node.append(&mut self.nodes);
        graph.initializer.append(&mut self.constants);
        sort(&mut model.graph_mut().node)?;
        remove_dead(model);
        Ok(())
    }

    fn take_over(&mut self, model: &mut Model, taken: &mut HashSet<String>, old: &str, new: &str) -> Result<()> {
        let nodes = &mut model.graph_mut().node;
        let Some(producer) = nodes.iter_mut().find(|n| n.output.iter().any(|o| o == old)) else {
            return Err(Error::Graph(format!("`{old}` cannot be replaced: no node computes it")));
        };
        if !self.nodes.iter().any(|n| n.output.iter().any(|o| o == new)) {
            return Err(Error::Graph(format!(
                "`{old}` cannot be replaced by `{new}`, which the patch does not compute"
            )));
        }
        let mut retired = format!("{old}/replaced");
        while taken.contains(&retired) {
            retired.push('\'');
        }
        rename(producer.output.iter_mut(), old, &retired);
        for node in &mut self.nodes {
            rename(node.input.iter_mut(), old, &retired);
            rename(node.input.iter_mut().chain(&mut node.output), new, old);
        }
        taken.remove(old);
        taken.insert(retired);
        Ok(())
    }
}

fn rename<'n>(names: impl Iterator<Item = &'n mut String>, from: &str, to: &str) {
    names.filter(|n| *n == from).for_each(|n| *n = to.to_owned());
}

/// Removes the nodes, initializers and declared types that no output needs; returns how many nodes went.
pub(crate) fn remove_dead(model: &mut Model) -> usize {
    let graph = model.graph_mut();
    let before = graph.node.len();
    let mut needed: HashSet<String> = graph.output.iter().map(|o| o.name.clone()).collect();
    let mut keep = vec![false; graph.node.len()];
    for (i, node) in graph.node.iter().enumerate().rev() {
        keep[i] = node.output.iter().any(|o| needed.contains(o));
        if keep[i] {
            needed.extend(used_values(node).into_iter().map(str::to_owned));
        }
    }
    let mut kept = keep.iter();
    graph.node.retain(|_| *kept.next().expect("one mark a node"));
    let initialised: HashSet<String> = graph.initializer.iter().map(|t| t.name.clone()).collect();
    graph.initializer.retain(|t| needed.contains(&t.name));
    graph.sparse_initializer.retain(|t| needed.contains(&t.values.name));
    // Real inputs stay even when unused: they are the model's interface. Defaults of removed initializers go.
    graph.input.retain(|i| !initialised.contains(&i.name) || needed.contains(&i.name));
    let computed: HashSet<String> = graph.node.iter().flat_map(|n| n.output.iter().cloned()).collect();
    graph.value_info.retain(|v| computed.contains(&v.name) || needed.contains(&v.name));
    before - graph.node.len()
}

impl Model {
    /// Removes the nodes and constants that no output needs; returns how many nodes went.
    pub fn remove_dead(&mut self) -> usize {
        remove_dead(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Builder, ElementType, NodeExt as _};

    fn chain() -> Model {
        let b = Builder::new(17, "test");
        let x = b.input("x", ElementType::F32, &["4"]);
        let y = x.erf().named("y");
        let z = y.sqrt().named("z");
        b.model(&[z])
    }

    fn operators(model: &Model) -> Vec<&str> {
        model.graph().node.iter().map(|n| n.op_type.as_str()).collect()
    }

    #[test]
    fn a_shunt_keeps_the_name_and_drops_what_it_orphans() {
        let mut model = chain();
        let b = Builder::new(17, "swap");
        let new = b.value("x").relu();
        let name = new.name();
        b.patch().shunt("y", &name).apply(&mut model).unwrap();
        assert_eq!(operators(&model), ["Relu", "Sqrt"]);
        assert_eq!(model.graph().node[0].output, ["y"]);
        assert!(model.graph().node[1].is("Sqrt") && model.graph().node[1].input == ["y"]);
    }

    #[test]
    fn a_patch_with_several_shunts_replaces_each() {
        let mut model = chain();
        let b = Builder::new(17, "swap");
        let (y, z) = (b.value("x").relu(), b.value("y").tanh());
        b.patch_with([("y", y), ("z", z.named("renamed"))]).apply(&mut model).unwrap();
        assert_eq!(operators(&model), ["Erf", "Tanh"]);
        assert_eq!(model.graph().node[1].output, ["z"]);
    }

    #[test]
    fn a_patch_may_use_the_value_it_replaces() {
        let mut model = chain();
        let b = Builder::new(17, "scale");
        let name = (b.value("y") * 2.0).name();
        b.patch().shunt("y", &name).apply(&mut model).unwrap();
        assert_eq!(operators(&model), ["Erf", "Mul", "Sqrt"]);
        assert_eq!(model.graph().node[2].input, ["y"]);
    }

    #[test]
    fn a_cycle_is_refused() {
        let mut model = chain();
        let b = Builder::new(17, "loop");
        let name = b.value("z").relu().name();
        let error = b.patch().shunt("y", &name).apply(&mut model).unwrap_err();
        assert!(error.to_string().contains("depends on itself"), "{error}");
    }
}

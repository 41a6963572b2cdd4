//! A model's own functions, written out where they are called: <https://onnx.ai/onnx/repo-docs/IR.html#functions>.

use std::collections::{HashMap, HashSet};

use onnx_protobuf::attribute_proto::AttributeType;
use onnx_protobuf::{AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto};

use crate::node::is_standard;
use crate::{Error, Model, NodeExt as _, Result};

/// Functions may call functions, never themselves; deeper calls than this are taken for a circle.
const DEEPEST: usize = 32;
/// A few functions that call each other twice could ask for any number of nodes.
const MOST_NODES: usize = 1 << 20;

/// Replaces every call of one of the model's functions by the function's nodes, and drops the functions; returns how many
/// calls there were.
///
/// # Errors
/// Functions call themselves, grow beyond a million nodes, or want another version of the standard operators than the model.
pub fn inline_functions(model: &mut Model) -> Result<usize> {
    let origin = model.origin().to_owned();
    inline(model).map_err(|e| e.in_model(&origin))
}

fn inline(model: &mut Model) -> Result<usize> {
    if model.proto().functions.is_empty() {
        return Ok(0);
    }
    let functions = std::mem::take(&mut model.proto_mut().functions);
    let opset = model.opset();
    let other_version = functions.iter().find_map(|f| {
        let import = f.opset_import.iter().find(|o| is_standard(&o.domain) && o.version != opset)?;
        Some((f.name.clone(), import.version))
    });
    if let Some((name, version)) = other_version {
        let reason =
            format!("function `{name}` is of operator set {version}, the model of {opset}: convert it to one version");
        return Err(Error::Graph(reason));
    }
    let imported: HashSet<String> = model.proto().opset_import.iter().map(|o| o.domain.clone()).collect();
    let further: Vec<_> =
        functions.iter().flat_map(|f| &f.opset_import).filter(|o| !imported.contains(&o.domain)).collect();
    let mut inliner = Inliner { functions: &functions, taken: all_names(model.proto()), calls: 0, nodes: 0 };
    let graph = model.graph_mut();
    let nodes = std::mem::take(&mut graph.node);
    graph.node = inliner.inline(nodes, 0)?;
    let calls = inliner.calls;
    for import in further {
        if !model.proto().opset_import.iter().any(|o| o.domain == import.domain) {
            model.proto_mut().opset_import.push(import.clone());
        }
    }
    Ok(calls)
}

/// One call of a function.
struct Call<'c> {
    function: &'c FunctionProto,
    node: &'c NodeProto,
    /// What the names of the function's own values begin with.
    prefix: &'c str,
}

impl Call<'_> {
    /// The value of one of the function's attributes: the call's, or the function's own.
    fn attribute(&self, name: &str) -> Option<&AttributeProto> {
        self.node.attribute.iter().chain(&self.function.attribute_proto).find(|a| a.name == name)
    }
}

struct Inliner<'f> {
    functions: &'f [FunctionProto],
    taken: HashSet<String>,
    calls: usize,
    nodes: usize,
}

impl Inliner<'_> {
    fn inline(&mut self, nodes: Vec<NodeProto>, depth: usize) -> Result<Vec<NodeProto>> {
        if depth > DEEPEST {
            return Err(Error::Graph(format!("functions call each other more than {DEEPEST} deep")));
        }
        let mut flat = Vec::with_capacity(nodes.len());
        for mut node in nodes {
            self.nodes += 1;
            if self.nodes > MOST_NODES {
                return Err(Error::Graph(format!("functions grow beyond {MOST_NODES} nodes")));
            }
            for attribute in &mut node.attribute {
                for graph in attribute.g.as_mut().into_iter().chain(&mut attribute.graphs) {
                    let inner = std::mem::take(&mut graph.node);
                    graph.node = self.inline(inner, depth + 1)?;
                }
            }
            let called =
                |f: &&FunctionProto| f.name == node.op_type && f.domain == node.domain && f.overload == node.overload;
            match self.functions.iter().find(called) {
                Some(function) => {
                    self.calls += 1;
                    let body = self.body(&Call { function, node: &node, prefix: node.label() });
                    flat.extend(self.inline(body, depth + 1)?);
                }
                None => flat.push(node),
            }
        }
        Ok(flat)
    }

    /// The nodes of the function under the names of one call.
    fn body(&mut self, call: &Call<'_>) -> Vec<NodeProto> {
        let Call { function, node: caller, prefix } = *call;
        // Missing operands are the empty name.
        let operand = |at: usize| caller.input.get(at).cloned().unwrap_or_default();
        let mut values: HashMap<String, String> =
            function.input.iter().enumerate().map(|(at, name)| (name.clone(), operand(at))).collect();
        let mut copies = Vec::new();
        for (name, output) in function.output.iter().zip(&caller.output).filter(|(_, output)| !output.is_empty()) {
            match values.get(name) {
                // An input, or a value that is given back twice.
                Some(known) => copies.push((known.clone(), output.clone())),
                None => _ = values.insert(name.clone(), output.clone()),
            }
        }
        let mut nodes = function.node.clone();
        for node in &mut nodes {
            node.name = self.fresh(prefix, &node.name);
            self.adopt(node, call, &mut values);
        }
        nodes.extend(copies.into_iter().map(|(from, to)| NodeProto {
            op_type: "Identity".to_owned(),
            name: self.fresh(prefix, "Identity"),
            input: vec![from],
            output: vec![to],
            ..NodeProto::default()
        }));
        nodes
    }

    fn adopt(&mut self, node: &mut NodeProto, call: &Call<'_>, values: &mut HashMap<String, String>) {
        for input in node.input.iter_mut().filter(|i| !i.is_empty()) {
            if let Some(known) = values.get(input) {
                input.clone_from(known);
            }
        }
        // What refers to an attribute that the call does not give is not given.
        node.attribute.retain_mut(|a| {
            if a.ref_attr_name.is_empty() {
                return true;
            }
            let Some(value) = call.attribute(&a.ref_attr_name) else { return false };
            *a = AttributeProto { name: a.name.clone(), ..value.clone() };
            true
        });
        for a in node
            .attribute
            .iter_mut()
            .filter(|a| matches!(a.type_.enum_value(), Ok(AttributeType::GRAPH | AttributeType::GRAPHS)))
        {
            for graph in a.g.as_mut().into_iter().chain(&mut a.graphs) {
                self.adopt_graph(graph, call, &mut values.clone());
            }
        }
        for output in node.output.iter_mut().filter(|o| !o.is_empty()) {
            *output = self.renamed(output, call.prefix, values);
        }
    }

    fn adopt_graph(&mut self, graph: &mut GraphProto, call: &Call<'_>, values: &mut HashMap<String, String>) {
        let inputs = graph.input.iter_mut().map(|i| &mut i.name);
        for name in inputs.chain(graph.initializer.iter_mut().map(|t| &mut t.name)) {
            values.remove(name);
            *name = self.renamed(name, call.prefix, values);
        }
        for node in &mut graph.node {
            self.adopt(node, call, values);
        }
        for output in &mut graph.output {
            if let Some(known) = values.get(&output.name) {
                output.name.clone_from(known);
            }
        }
    }

    fn renamed(&mut self, name: &str, prefix: &str, values: &mut HashMap<String, String>) -> String {
        if let Some(known) = values.get(name) {
            return known.clone();
        }
        let fresh = self.fresh(prefix, name);
        values.insert(name.to_owned(), fresh.clone());
        fresh
    }

    fn fresh(&mut self, prefix: &str, name: &str) -> String {
        let stem = format!("{prefix}/{name}");
        let mut fresh = stem.clone();
        for count in 2.. {
            if self.taken.insert(fresh.clone()) {
                break;
            }
            fresh = format!("{stem}_{count}");
        }
        fresh
    }
}

/// Every name of a value or node, those of subgraphs included.
fn all_names(proto: &ModelProto) -> HashSet<String> {
    fn collect(graph: &GraphProto, into: &mut HashSet<String>) {
        into.extend(graph.input.iter().map(|i| i.name.clone()));
        into.extend(graph.initializer.iter().map(|t| t.name.clone()));
        for node in &graph.node {
            into.insert(node.name.clone());
            into.extend(node.output.iter().cloned());
            node.subgraphs().into_iter().for_each(|g| collect(g, into));
        }
    }
    let mut names = HashSet::new();
    proto.graph.iter().for_each(|g| collect(g, &mut names));
    names
}

#[cfg(test)]
mod tests {
    use onnx_protobuf::OperatorSetIdProto;

    use super::*;
    use crate::{Builder, ElementType, attribute};

    fn node(op: &str, domain: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
        NodeProto {
            op_type: op.to_owned(),
            domain: domain.to_owned(),
            input: inputs.iter().map(|&i| i.to_owned()).collect(),
            output: outputs.iter().map(|&o| o.to_owned()).collect(),
            ..NodeProto::default()
        }
    }

    fn function(name: &str, inputs: &[&str], outputs: &[&str], nodes: Vec<NodeProto>) -> FunctionProto {
        FunctionProto {
            name: name.to_owned(),
            domain: "local".to_owned(),
            input: inputs.iter().map(|&i| i.to_owned()).collect(),
            output: outputs.iter().map(|&o| o.to_owned()).collect(),
            node: nodes,
            opset_import: vec![OperatorSetIdProto { version: 17, ..Default::default() }],
            ..FunctionProto::default()
        }
    }

    /// `y = f(f(x))` with `f(a) = concat(a, transposed g(a))` and `g(t) = t + t`.
    fn nested() -> Model {
        let b = Builder::new(17, "test");
        let x = b.input("x", ElementType::F32, &["n", "n"]);
        let mut model = b.model(&[x.relu().named("y")]);
        let mut transposed = node("Transpose", "", &["s"], &["t"]);
        let mut perm = attribute::ints("perm", &[]);
        perm.ref_attr_name = "order".to_owned();
        transposed.attribute.push(perm);
        let mut joined = node("Concat", "", &["a", "t"], &["c"]);
        joined.attribute.push(attribute::int("axis", 0));
        let f = vec![node("G", "local", &["a"], &["s"]), transposed, joined];
        let mut f = function("F", &["a"], &["c", "a"], f);
        f.attribute.push("order".to_owned());
        let g = function("G", &["t"], &["r"], vec![node("Add", "", &["t", "t"], &["r"])]);
        model.proto_mut().functions = vec![f, g];
        let mut first = node("F", "local", &["x"], &["m", "same"]);
        first.attribute.push(attribute::ints("order", &[1, 0]));
        let second = node("F", "local", &["same"], &["y"]);
        model.graph_mut().node = vec![first, second];
        model
    }

    #[test]
    fn calls_are_replaced_by_what_they_do() {
        let mut model = nested();
        assert_eq!(inline_functions(&mut model).unwrap(), 4);
        assert!(model.proto().functions.is_empty());
        let counts: Vec<(String, usize)> = model.operators().into_iter().collect();
        let expected = [("Add", 2), ("Concat", 2), ("Identity", 1), ("Transpose", 2)];
        assert_eq!(counts, expected.map(|(op, n)| (op.to_owned(), n)));
        let transposes: Vec<usize> =
            model.graph().node.iter().filter(|n| n.is("Transpose")).map(|n| n.attribute.len()).collect();
        assert_eq!(transposes, [1, 0], "the second call gives no order");
        assert_eq!(crate::Index::new(&model).unwrap().producer("y").unwrap().op_type, "Concat");
    }

    #[test]
    fn circles_and_other_versions_are_refused() {
        let mut model = nested();
        model.proto_mut().functions[1].node[0] = node("F", "local", &["t"], &["r"]);
        let message = inline_functions(&mut model).unwrap_err().to_string();
        assert!(message.contains("call each other"), "{message}");
        let mut model = nested();
        model.proto_mut().functions[0].opset_import[0].version = 18;
        let message = inline_functions(&mut model).unwrap_err().to_string();
        assert!(message.contains("`F` is of operator set 18"), "{message}");
    }
}

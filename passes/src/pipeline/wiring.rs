//! Whether a graph hangs together.

use std::collections::HashSet;

use mabert_graph::{Error, Index, Model};

/// Checks that every value is an input, a constant or computed by one node before it is used, that no two share a name,
/// and that the outputs are among them.
pub(super) fn check(model: &Model) -> Result<(), Error> {
    let index = Index::new(model)?;
    let graph = index.graph();
    let mut names: HashSet<&str> = HashSet::new();
    // An input that is a constant too has it as its default.
    let inputs = graph.input.iter().map(|input| input.name.as_str()).filter(|name| !index.is_initializer(name));
    let constants = graph.initializer.iter().map(|constant| constant.name.as_str());
    let outputs = graph.node.iter().flat_map(|node| &node.output).map(String::as_str).filter(|name| !name.is_empty());
    match inputs.chain(constants).chain(outputs).find(|name| !names.insert(name)) {
        Some(name) => Err(Error::Graph(format!("two values are called `{name}`"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use mabert_graph::proto::{GraphProto, ValueInfoProto};
    use mabert_graph::{Builder, ElementType, Tensor};

    use super::*;

    fn model(change: impl FnOnce(&mut GraphProto)) -> Model {
        let b = Builder::new(17, "test");
        let x = b.input("x", ElementType::F32, &["n", "2"]);
        let w = b.constant("w", &Tensor::new(&[2], vec![1f32, 2.0]));
        let mut model = b.model(&[(x * w).named("product").relu().named("y")]);
        change(model.graph_mut());
        model
    }

    #[test]
    fn every_way_to_break_a_graph_is_refused() {
        assert!(check(&model(|_| {})).is_ok());
        let value = |name: &str| ValueInfoProto { name: name.to_owned(), ..ValueInfoProto::default() };
        // A default for an input is no second value.
        assert!(check(&model(|g| g.input.push(value("w")))).is_ok());
        let broken: [(&str, Model); 6] = [
            ("product", model(|g| g.node.swap(0, 1))),
            ("w", model(|g| g.initializer.clear())),
            ("ghost", model(|g| g.output.push(value("ghost")))),
            ("w", model(|g| g.initializer.push(g.initializer[0].clone()))),
            ("x", model(|g| g.input.push(value("x")))),
            (
                "product",
                model(|g| {
                    let constant = Tensor::new(&[1], vec![1f32]);
                    g.initializer.push(constant.to_proto("product"));
                }),
            ),
        ];
        for (name, model) in broken {
            let message = check(&model).unwrap_err().to_string();
            assert!(message.contains(&format!("`{name}`")), "{name}: {message}");
        }
    }
}

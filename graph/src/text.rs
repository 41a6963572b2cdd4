//! The stable text form of a graph: one line a node, for snapshots and for people.
//!
//! Values are numbered in graph order, so exporters' names and float noise do not show; graph inputs and outputs keep
//! their names. Constants show their type and shape; small integer constants and scalars show their values.

use std::collections::HashMap;
use std::fmt::Write as _;

use onnx_protobuf::attribute_proto::AttributeType;
use onnx_protobuf::{AttributeProto, NodeProto};

use crate::{Model, NodeExt, Tensor, printable};

/// Dimensions of values, as `B`, `N`, `128`..., by value name.
pub type Shapes = HashMap<String, Vec<String>>;

/// The whole graph.
pub fn render(model: &Model, shapes: &Shapes) -> String {
    let mut out = String::new();
    for input in model.inputs() {
        let _ = writeln!(out, "input {}", printable(&input.to_string()));
    }
    out += &render_nodes(model, shapes, |_| true);
    for output in &model.graph().output {
        let line = format!("output {}{}", output.name, shape_text(&output.name, shapes));
        let _ = writeln!(out, "{}", printable(&line));
    }
    out
}

/// The nodes that `select` picks.
pub fn render_nodes(model: &Model, shapes: &Shapes, select: impl Fn(&NodeProto) -> bool) -> String {
    let graph = model.graph();
    let mut names: HashMap<&str, String> = HashMap::new();
    names.extend(graph.input.iter().map(|i| (i.name.as_str(), i.name.clone())));
    for tensor in &graph.initializer {
        let text = Tensor::from_proto(tensor).map_or_else(|e| format!("<{e}>"), |t| constant(&t));
        names.insert(&tensor.name, text);
    }
    let outputs: Vec<&str> = graph.output.iter().map(|o| o.name.as_str()).collect();
    let mut out = String::new();
    let mut count = 0;
    for node in graph.node.iter().filter(|n| select(n)) {
        for output in node.output.iter().filter(|o| !o.is_empty()) {
            let is_output = outputs.contains(&output.as_str());
            let name = if is_output { format!("%{count}:{output}") } else { format!("%{count}") };
            names.insert(output, name);
            count += 1;
        }
        let results: Vec<String> = node
            .output
            .iter()
            .filter(|o| !o.is_empty())
            .map(|o| format!("{}{}", names[o.as_str()], shape_text(o, shapes)))
            .collect();
        // A value from outside the selection is shown by the last part of its name.
        let operand = |i: &String| match (i.is_empty(), names.get(i.as_str())) {
            (true, _) => "_".to_owned(),
            (_, Some(name)) => name.clone(),
            _ => format!("@{}", i.rsplit('/').next().unwrap_or(i)),
        };
        let mut operands: Vec<String> = node.input.iter().map(operand).collect();
        let mut attributes: Vec<&AttributeProto> = node.attribute.iter().collect();
        attributes.sort_by(|a, b| a.name.cmp(&b.name));
        operands.extend(attributes.into_iter().map(attribute));
        let domain = if node.is(&node.op_type) { String::new() } else { format!("{}.", node.domain) };
        let line = format!("{} = {domain}{}({})", results.join(", "), node.op_type, operands.join(", "));
        let _ = writeln!(out, "{}", printable(&line));
    }
    out
}

fn shape_text(value: &str, shapes: &Shapes) -> String {
    shapes.get(value).map_or_else(String::new, |dims| format!("[{}]", dims.join(",")))
}

fn constant(tensor: &Tensor) -> String {
    const FEW: usize = 8;
    if tensor.len() <= FEW
        && let Some(ints) = tensor.to_i64()
    {
        let values: Vec<String> = ints.iter().map(i64::to_string).collect();
        return if tensor.shape().is_empty() { values.concat() } else { format!("[{}]", values.join(",")) };
    }
    if tensor.len() == 1 {
        return number(tensor.to_f32().iter().copied().next().unwrap_or_default());
    }
    let dims: Vec<String> = tensor.shape().iter().map(usize::to_string).collect();
    format!("{}[{}]", tensor.element_type(), dims.join(","))
}

/// Four significant digits: enough to recognise a constant, too few to show rounding.
fn number(x: f32) -> String {
    if x == 0.0 || !x.is_finite() {
        return format!("{x}");
    }
    let magnitude = x.abs().log10().floor();
    if (-4.0..6.0).contains(&magnitude) {
        let unit = 10f64.powf(3.0 - f64::from(magnitude));
        format!("{}", ((f64::from(x) * unit).round() / unit) as f32)
    } else {
        format!("{x:.3e}")
    }
}

fn attribute(a: &AttributeProto) -> String {
    let list = |items: Vec<String>| format!("[{}]", items.join(","));
    let value = match a.type_.enum_value_or_default() {
        AttributeType::INT => a.i.to_string(),
        AttributeType::FLOAT => number(a.f),
        AttributeType::STRING => format!("{:?}", String::from_utf8_lossy(&a.s)),
        AttributeType::INTS => list(a.ints.iter().map(i64::to_string).collect()),
        AttributeType::FLOATS => list(a.floats.iter().map(|x| number(*x)).collect()),
        AttributeType::TENSOR => {
            let value = a.t.as_ref().map(Tensor::from_proto);
            value.map_or_else(String::new, |t| t.map_or_else(|e| format!("<{e}>"), |t| constant(&t)))
        }
        other => format!("<{other:?}>"),
    };
    format!("{}={value}", a.name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Builder, ElementType};

    #[test]
    fn a_layer_norm_reads_like_its_formula() {
        let b = Builder::new(17, "test");
        let x = b.input("x", ElementType::F32, &["B", "N", "4"]);
        let gamma = b.constant("gamma", &Tensor::new(&[4], vec![1f32, 2.0, 3.0, 4.0]));
        let centred = x - x.mean_last();
        let y = gamma * (centred / (centred.pow(2.0).mean_last() + 1e-12).sqrt());
        let model = b.model(&[y.named("y")]);
        let shapes = Shapes::from([("y".to_owned(), vec!["B".to_owned(), "N".to_owned(), "4".to_owned()])]);
        insta::assert_snapshot!(render(&model, &shapes));
    }

    #[test]
    fn a_node_is_a_line_whatever_its_names_hold() {
        let b = Builder::new(17, "test");
        let x = b.input("x\n\u{1b}[2J", ElementType::F32, &["B\u{202e}"]);
        let text = render(&b.model(&[(x + 1.0).named("y\u{9b}")]), &Shapes::new());
        assert_eq!(text.lines().count(), 3, "{text}");
        assert!(text.chars().all(|c| c == '\n' || crate::is_printable(c)), "{text}");
    }

    #[test]
    fn numbers_have_four_digits() {
        assert_eq!(number(0.125), "0.125");
        assert_eq!(number(1.234_567), "1.235");
        assert_eq!(number(-0.176_776_7), "-0.1768");
        assert_eq!(number(1e-12), "1.000e-12");
        assert_eq!(number(12345.678), "12350");
    }
}

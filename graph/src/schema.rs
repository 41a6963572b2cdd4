//! What ONNX says of its operators: which operands and attributes a node of each may have.

use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;

use onnx_protobuf::attribute_proto::AttributeType;
use onnx_protobuf::{GraphProto, NodeProto};

use crate::node::is_standard;
use crate::{Error, Model, NodeExt as _, Result};

/// Every operator in the versions that changed what it takes, made by `graph/scripts/schemas.py`.
const FILE: &str = include_str!("schemas.txt");

static TABLE: LazyLock<Table> = LazyLock::new(|| Table::read(FILE));

#[derive(Default)]
struct Table {
    /// The newest version of each domain that is known.
    newest: HashMap<&'static str, i64>,
    /// By domain and name, from the first version to the last.
    operators: HashMap<&'static str, HashMap<&'static str, Vec<Schema>>>,
}

/// What one version of an operator takes and gives.
struct Schema {
    since: i64,
    inputs: Operands,
    outputs: Operands,
    attributes: HashMap<&'static str, Attribute>,
}

/// The inputs or outputs of an operator.
struct Operands {
    /// A letter each: required, optional, or any number of them.
    kinds: &'static str,
    least: usize,
}

#[derive(Clone, Copy)]
struct Attribute {
    kind: AttributeType,
    required: bool,
}

impl Table {
    fn read(file: &'static str) -> Self {
        let mut table = Self::default();
        for line in file.lines().filter(|line| !line.starts_with('#')) {
            let mut words = line.split(' ');
            let (Some(name), Some(version)) = (words.next(), words.next()) else { continue };
            if name == "@" {
                let newest = words.next().and_then(|v| v.parse().ok()).unwrap_or(0);
                table.newest.insert(version.trim_end_matches('.'), newest);
                continue;
            }
            let (Some(inputs), Some(outputs)) = (words.next(), words.next()) else { continue };
            let schema = Schema {
                since: version.parse().unwrap_or(1),
                inputs: Operands::read(inputs),
                outputs: Operands::read(outputs),
                attributes: words.filter_map(Attribute::read).collect(),
            };
            let (domain, name) = name.rsplit_once('.').unwrap_or(("", name));
            table.operators.entry(domain).or_default().entry(name).or_default().push(schema);
        }
        table
    }

    /// The operator of `node` in the newest version up to `version`.
    fn schema(&self, node: &NodeProto, version: i64) -> Option<&Schema> {
        self.versions(node).iter().rev().find(|schema| schema.since <= version)
    }

    fn versions(&self, node: &NodeProto) -> &[Schema] {
        let operators = self.operators.get(domain(&node.domain));
        operators.and_then(|named| named.get(node.op_type.as_str())).map_or(&[], Vec::as_slice)
    }
}

fn domain(domain: &str) -> &str {
    if is_standard(domain) { "" } else { domain }
}

impl Operands {
    fn read(word: &'static str) -> Self {
        let (kinds, least) = word.split_at(word.trim_end_matches(|c: char| c.is_ascii_digit()).len());
        Self { kinds, least: least.parse().unwrap_or(0) }
    }

    /// Why `names` cannot be these; `what` names one of them.
    fn fault(&self, what: &str, names: &[String], newer: bool) -> Option<String> {
        let count = names.len();
        let unlimited = newer || self.kinds.ends_with('v');
        if count < self.least {
            return Some(format!("has {count} {what}s, ONNX's has {} at least", self.least));
        }
        if count > self.kinds.len() && !unlimited {
            return Some(format!("has {count} {what}s, ONNX's has {} at most", self.kinds.len()));
        }
        let missing = names.iter().zip(self.kinds.bytes()).position(|(name, kind)| name.is_empty() && kind == b'r')?;
        Some(format!("lacks {what} {missing}"))
    }
}

impl Attribute {
    /// `name:k` or `name:k!`.
    fn read(word: &'static str) -> Option<(&'static str, Self)> {
        let (name, kind) = word.split_once(':')?;
        let attribute = Self { kind: kind_with(kind.chars().next()?)?, required: kind.ends_with('!') };
        Some((name, attribute))
    }
}

fn kind_with(letter: char) -> Option<AttributeType> {
    Some(match letter {
        'i' => AttributeType::INT,
        'f' => AttributeType::FLOAT,
        's' => AttributeType::STRING,
        't' => AttributeType::TENSOR,
        'g' => AttributeType::GRAPH,
        'p' => AttributeType::SPARSE_TENSOR,
        'y' => AttributeType::TYPE_PROTO,
        'I' => AttributeType::INTS,
        'F' => AttributeType::FLOATS,
        'S' => AttributeType::STRINGS,
        'T' => AttributeType::TENSORS,
        'G' => AttributeType::GRAPHS,
        'P' => AttributeType::SPARSE_TENSORS,
        'Y' => AttributeType::TYPE_PROTOS,
        _ => return None,
    })
}

/// Checks that every node, those of subgraphs included, has the operands and attributes that ONNX's operator of that name has in
/// the model's version. Operators that ONNX does not know pass.
///
/// # Errors
/// Too few or too many operands, a required one left out, an attribute that is missing, unknown, twice there or of another
/// type.
pub fn check_nodes(model: &Model) -> Result<()> {
    let imports = &model.proto().opset_import;
    let versions: HashMap<&str, i64> = imports.iter().map(|o| (domain(&o.domain), o.version)).collect();
    check_graph(model.graph(), &versions)
}

fn check_graph(graph: &GraphProto, versions: &HashMap<&str, i64>) -> Result<()> {
    for node in &graph.node {
        if let Some(&version) = versions.get(domain(&node.domain))
            && let Some(schema) = TABLE.schema(node, version)
        {
            let newer = TABLE.newest.get(domain(&node.domain)).is_some_and(|newest| version > *newest);
            if let Some(fault) = schema.fault(node, newer) {
                return Err(Error::Graph(format!("node `{}` ({}) {fault}", node.label(), node.op_type)));
            }
        }
        node.subgraphs().into_iter().try_for_each(|inner| check_graph(inner, versions))?;
    }
    Ok(())
}

impl Schema {
    /// Why `node` is none of these. A version that is `newer` than the table may have more operands and attributes.
    fn fault(&self, node: &NodeProto, newer: bool) -> Option<String> {
        let operands = self.inputs.fault("input", &node.input, newer);
        operands
            .or_else(|| self.outputs.fault("output", &node.output, newer))
            .or_else(|| self.wrong_attribute(node, newer))
    }

    fn wrong_attribute(&self, node: &NodeProto, newer: bool) -> Option<String> {
        let mut seen = HashSet::new();
        for attribute in &node.attribute {
            let name = attribute.name.as_str();
            if !seen.insert(name) {
                return Some(format!("has the attribute `{name}` twice"));
            }
            let known = self.attributes.get(name);
            let Some(known) = known else {
                // Names that begin so are the tools' own, as ONNX's checker has it.
                if newer || name.starts_with("__") {
                    continue;
                }
                return Some(format!("has an attribute `{name}`, which is none of ONNX's operator"));
            };
            let kind = attribute.type_.enum_value();
            if kind != Ok(known.kind) {
                let kind = kind.map_or_else(|number| number.to_string(), |kind| format!("{kind:?}"));
                return Some(format!("has {kind} as attribute `{name}`, {:?} is needed", known.kind));
            }
            let empty = match known.kind {
                AttributeType::TENSOR => attribute.t.is_none(),
                AttributeType::GRAPH => attribute.g.is_none(),
                _ => false,
            };
            if empty {
                return Some(format!("has nothing as attribute `{name}`"));
            }
        }
        let mut required = self.attributes.iter().filter(|(_, a)| a.required).map(|(name, _)| *name);
        required.find(|name| !seen.contains(name)).map(|name| format!("lacks the attribute `{name}`"))
    }
}

/// Inputs that no version of the node's operator can do without: whoever has an [`Index`](crate::Index) may take them for
/// granted.
pub(crate) fn fewest_inputs(node: &NodeProto) -> usize {
    TABLE.versions(node).iter().map(|schema| schema.inputs.least).min().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Builder, ElementType, attribute};

    /// What is said of a model of one node.
    fn checked(opset: i64, node: NodeProto) -> String {
        let b = Builder::new(opset, "test");
        let mut model = b.model(&[b.input("x", ElementType::F32, &["n", "4"]).named("x")]);
        model.graph_mut().node = vec![node];
        check_nodes(&model).err().map_or_else(String::new, |e| e.to_string())
    }

    fn node(op: &str, inputs: &[&str], attributes: Vec<onnx_protobuf::AttributeProto>) -> NodeProto {
        let owned = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        NodeProto {
            op_type: op.to_owned(),
            input: owned(inputs),
            output: owned(&["y"]),
            attribute: attributes,
            ..NodeProto::default()
        }
    }

    #[test]
    fn the_table_is_read_whole() {
        assert!(TABLE.operators[""].len() > 200, "{}", TABLE.operators[""].len());
        assert!(TABLE.newest[""] >= 28 && TABLE.newest["ai.onnx.ml"] >= 5);
        let lines = FILE.lines().filter(|l| !l.starts_with(['#', '@']));
        let words: usize = lines.map(|l| l.split(' ').count() - 4).sum();
        assert_eq!(
            TABLE.operators.values().flat_map(HashMap::values).flatten().map(|s| s.attributes.len()).sum::<usize>(),
            words
        );
    }

    #[test]
    fn operands_and_attributes_are_those_of_the_version() {
        let axes = || vec![attribute::ints("axes", &[1])];
        for (opset, sound) in [
            (17, node("LayerNormalization", &["x", "g"], vec![attribute::int("axis", -1)])),
            (12, node("Unsqueeze", &["x"], axes())),
            (13, node("Unsqueeze", &["x", "a"], vec![])),
            (17, node("ReduceMean", &["x"], axes())),
            (18, node("ReduceMean", &["x", "a"], vec![attribute::int("__note", 1)])),
            (13, node("Clip", &["x", "", "m"], vec![])),
            (13, node("Concat", &["x"; 9], vec![attribute::int("axis", 0)])),
            (13, node("Loop", &["", "c"], vec![attribute::int("body", 0)])),
            // Newer than the table, and not ONNX's own.
            (99, node("Relu", &["x", "y"], vec![attribute::int("new", 0)])),
            (17, node("SimplifiedLayerNormalization", &[], vec![attribute::int("axis", 0)])),
        ] {
            let said = checked(opset, sound.clone());
            assert!(said.is_empty() || said.contains("GRAPH"), "{said}");
        }
        for (opset, wrong, part) in [
            (13, node("Unsqueeze", &["x"], axes()), "has 1 inputs, ONNX's has 2 at least"),
            (17, node("Relu", &["x", "x"], vec![]), "has 2 inputs, ONNX's has 1 at most"),
            (17, node("Where", &["x", "", "x"], vec![]), "lacks input 1"),
            (17, node("Cast", &["x"], vec![]), "lacks the attribute `to`"),
            (17, node("Softmax", &["x"], vec![attribute::float("axis", 1.0)]), "has FLOAT as attribute `axis`, INT"),
            (17, node("Softmax", &["x"], vec![attribute::int("axes", 1)]), "`axes`, which is none of ONNX's"),
            (17, node("Softmax", &["x"], vec![attribute::int("axis", 1); 2]), "`axis` twice"),
            (18, node("ReduceMean", &["x"], axes()), "`axes`, which is none of ONNX's"),
        ] {
            let said = checked(opset, wrong);
            assert!(said.contains(part), "{said}");
        }
    }
}

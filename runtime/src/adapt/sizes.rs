//! Sizes that are computed with in other types than 64-bit integers: tract knows sizes while it plans as long as they are those.
//!
//! Exporters of TensorFlow's models compute with sizes in 32 bits and widen the result; PyTorch's and hand-written ones go
//! through floats, to halve a length and round it. What such a chain ends in is computed in 64 bits, beside what is there.

use std::collections::{HashMap, HashSet};

use mabert_graph::proto::NodeProto;
use mabert_graph::{ElementType, Model as Graph, NodeExt as _, Tensor, attribute, cast_node};

use super::{Names, casts_to};

/// Types that sizes are cast to.
const NARROW: [ElementType; 4] = [ElementType::I32, ElementType::F32, ElementType::F64, ElementType::F16];

/// Computes sizes in 64 bits.
pub(super) fn widen(graph: &mut Graph) {
    let mut widening = Widening {
        names: Names::taken(graph),
        sizes: HashSet::new(),
        wide: HashMap::new(),
        floating: HashSet::new(),
        quotients: HashMap::new(),
        constants: HashMap::new(),
        graph,
    };
    for node in std::mem::take(&mut widening.graph.graph_mut().node) {
        widening.add(node);
    }
}

struct Widening<'g> {
    graph: &'g mut Graph,
    names: Names,
    /// Sizes in 64 bits, and what is computed of them alone.
    sizes: HashSet<String>,
    /// Those in other types, with the same values in 64 bits.
    wide: HashMap<String, String>,
    /// Those of them, and of the quotients, that are floats.
    floating: HashSet<String>,
    /// Sizes divided by others, not yet rounded, with both in 64 bits.
    quotients: HashMap<String, [String; 2]>,
    /// What nodes give.
    constants: HashMap<String, Tensor>,
}

impl Widening<'_> {
    fn push(&mut self, node: NodeProto) {
        self.graph.graph_mut().node.push(node);
    }

    fn add(&mut self, mut node: NodeProto) {
        let (Some(output), input) = (node.output.first().cloned(), node.input.first().cloned().unwrap_or_default())
        else {
            return self.push(node);
        };
        let narrows = NARROW.iter().any(|&element| casts_to(&node, element));
        if narrows && !casts_to(&node, ElementType::I32) {
            self.floating.insert(output.clone());
        }
        if node.is("Shape") || node.is("Size") {
            self.sizes.insert(output);
        } else if node.is("Constant") {
            self.constants.extend(attribute::constant(&node).ok().flatten().map(|value| (output, value)));
        } else if narrows && self.sizes.contains(&input) {
            self.wide.insert(output, input);
        } else if narrows && self.wide.contains_key(&input) {
            self.wide.insert(output, self.wide[&input].clone());
        } else if casts_to(&node, ElementType::I32) && self.quotients.contains_key(&input) {
            let quotient = self.rounded(&input, &output, "Floor");
            self.wide.insert(output, quotient);
        } else if casts_to(&node, ElementType::I64)
            && (self.wide.contains_key(&input) || self.quotients.contains_key(&input))
        {
            let known = match self.wide.get(&input) {
                Some(known) => known.clone(),
                None => self.rounded(&input, &output, "Floor"),
            };
            node.op_type = "Identity".to_owned();
            node.attribute.clear();
            node.input[0] = known;
            self.sizes.insert(output);
        } else if node.is("Floor") || node.is("Ceil") || node.is("Round") {
            self.floating.insert(output.clone());
            if let Some(known) = self.wide.get(&input).cloned() {
                self.wide.insert(output, known);
            } else if self.quotients.contains_key(&input) && !node.is("Round") {
                let quotient = self.rounded(&input, &output, &node.op_type);
                self.wide.insert(output, quotient);
            }
        } else if node.is("Slice") {
            // Of sizes, or to one.
            for bound in node.input.iter_mut().skip(1).take(2) {
                if let Some(known) = self.wide.get(bound) {
                    bound.clone_from(known);
                }
            }
            node = self.compute(node, &output);
        } else {
            node = self.compute(node, &output);
        }
        self.push(node);
    }

    /// The node as it is to be, once what it computes of sizes is computed in 64 bits too.
    fn compute(&mut self, node: NodeProto, output: &str) -> NodeProto {
        let Some(operands) = sized_operands(&node) else { return node };
        let operands = &node.input[..operands.min(node.input.len())];
        if operands.iter().any(|i| self.sizes.contains(i)) {
            if operands.iter().all(|i| self.sizes.contains(i) || self.is_whole(i)) {
                self.sizes.insert(output.to_owned());
            }
            return node;
        }
        if !operands.iter().any(|i| self.wide.contains_key(i)) {
            return node;
        }
        let floating = operands.iter().any(|i| self.is_floating(i));
        if floating {
            self.floating.insert(output.to_owned());
        }
        if floating && (node.is("Div") || node.is("Mul")) && self.divide(&node, output) {
            return node;
        }
        if !operands.iter().all(|i| self.known(i)) || floating && node.is("Range") {
            return node;
        }
        self.twin(node, output)
    }

    /// Adds the node once more, in 64 bits.
    fn twin(&mut self, node: NodeProto, output: &str) -> NodeProto {
        let twin = self.names.fresh(output, "i64");
        let mut copy = node.clone();
        copy.name.clone_from(&twin);
        copy.output[0].clone_from(&twin);
        let operands = sized_operands(&node).unwrap_or(0).min(node.input.len());
        for operand in &mut copy.input[..operands] {
            *operand = self.in_64_bits(operand);
        }
        self.push(copy);
        self.wide.insert(output.to_owned(), twin.clone());
        // As long as a symbol says only where its end is one.
        if node.is("Range") { cast_node(&twin, output, ElementType::I32) } else { node }
    }

    /// Notes what is divided by what, where whole numbers are.
    fn divide(&mut self, node: &NodeProto, output: &str) -> bool {
        let [left, right] = node.input.as_slice() else { return false };
        let both = match node.is("Div") {
            true => [left, right].map(|name| self.known(name).then(|| self.in_64_bits(name))),
            // By a half, a quarter.
            false => {
                let by = |name: &String| {
                    let factors = number(self.graph, &self.constants, name)?.to_f32().mapv(|v| 1.0 / v);
                    let whole = factors.iter().all(|v| v.is_finite() && v.fract() == 0.0 && *v > 1.0);
                    whole.then(|| Tensor::from(factors.mapv(|v| v as i64)))
                };
                let (size, divisor) = match (by(left), by(right)) {
                    (Some(divisor), None) => (right, divisor),
                    (None, Some(divisor)) => (left, divisor),
                    _ => return false,
                };
                let size = self.known(size).then(|| self.in_64_bits(size));
                let name = self.names.fresh(output, "divisor");
                self.graph.set_constant(&name, &divisor);
                [size, Some(name)]
            }
        };
        let [Some(left), Some(right)] = both else { return false };
        self.quotients.insert(output.to_owned(), [left, right]);
        true
    }

    /// Adds a quotient that is rounded down or up to a whole number, for `output`.
    fn rounded(&mut self, quotient: &str, output: &str, how: &str) -> String {
        let [mut dividend, divisor] = self.quotients[quotient].clone();
        let add = |widening: &mut Self, operator: &str, inputs: [&str; 2]| {
            let name = widening.names.fresh(output, "i64");
            widening.push(NodeProto {
                op_type: operator.to_owned(),
                name: name.clone(),
                input: inputs.map(str::to_owned).to_vec(),
                output: vec![name.clone()],
                ..NodeProto::default()
            });
            name
        };
        if how == "Ceil" {
            let one = self.names.fresh(output, "one");
            self.graph.set_constant(&one, &Tensor::scalar(1i64));
            let more = add(self, "Add", [&dividend, &divisor]);
            dividend = add(self, "Sub", [&more, &one]);
        }
        add(self, "Div", [&dividend, &divisor])
    }

    fn is_whole(&self, name: &str) -> bool {
        whole(self.graph, &self.constants, name).is_some()
    }

    fn known(&self, name: &str) -> bool {
        self.wide.contains_key(name) || self.is_whole(name)
    }

    /// The name of the same value in 64 bits, for what is [known](Self::known).
    fn in_64_bits(&mut self, name: &str) -> String {
        if !self.wide.contains_key(name)
            && let Some(constant) = whole(self.graph, &self.constants, name)
        {
            let twin = self.names.fresh(name, "i64");
            self.graph.set_constant(&twin, &constant);
            self.wide.insert(name.to_owned(), twin);
        }
        self.wide[name].clone()
    }

    fn is_floating(&self, name: &str) -> bool {
        let constant = || number(self.graph, &self.constants, name).is_some_and(|value| value.to_i64().is_none());
        self.floating.contains(name) || constant()
    }
}

/// How many of a node's operands, from the first, are of the type of its result, for what sizes are computed with.
fn sized_operands(node: &NodeProto) -> Option<usize> {
    let moves = ["Slice", "Squeeze", "Unsqueeze", "Gather"].iter().any(|op| node.is(op));
    if moves {
        return Some(1);
    }
    ["Concat", "Range", "Mul", "Add", "Sub", "Div"].iter().any(|op| node.is(op)).then_some(node.input.len())
}

/// A small constant: an initializer, or one of those that nodes give.
fn number(graph: &Graph, of_nodes: &HashMap<String, Tensor>, value: &str) -> Option<Tensor> {
    const MOST: i64 = 1 << 16;
    if let Some(constant) = of_nodes.get(value) {
        return Some(constant.clone());
    }
    let small = graph.initializer(value)?.dims.iter().product::<i64>() <= MOST;
    if small { graph.constant(value).ok() } else { None }
}

/// A constant of whole numbers, in 64 bits.
pub(super) fn whole(graph: &Graph, of_nodes: &HashMap<String, Tensor>, value: &str) -> Option<Tensor> {
    let constant = number(graph, of_nodes, value)?;
    if let Some(integers) = constant.to_i64() {
        return Some(integers.into());
    }
    let floats = constant.to_f32();
    let whole = floats.iter().all(|v| v.fract() == 0.0 && v.abs() < 1e7);
    whole.then(|| floats.mapv(|v| v as i64).into())
}

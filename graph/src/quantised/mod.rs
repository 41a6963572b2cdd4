//! Quantised models, spelt in single precision.
//!
//! Integers stand for numbers: `real = (q - zero point) scale`. Weights that are kept so become what they mean. What a
//! model computes in between is rounded to integers on the way; these roundings are kept, so that the model computes what
//! it did, or dropped, so that it computes what it was before it was quantised, but for its weights.
//!
//! Operators are those of ONNX, and those of `com.microsoft` that onnxruntime's quantiser and optimisers write.

mod constants;
mod spelling;

use std::collections::{HashMap, HashSet};

use onnx_protobuf::tensor_proto::DataType;
use onnx_protobuf::{AttributeProto, GraphProto, NodeProto, TensorProto};

use crate::index::used_values;
use crate::patch::remove_dead;
use crate::{ElementType, Error, Model, NodeExt as _, Result, Tensor, cast_node};
use constants::{Constants, Grid, dequantised};

/// What becomes of the roundings of values that are computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// They are computed, in floats: the outputs stay what they were.
    Kept,
    /// They are left out.
    Dropped,
}

/// Whether a model computes with quantised numbers, in a subgraph or function too.
pub fn is_quantised(model: &Model) -> bool {
    fn any(nodes: &[NodeProto]) -> bool {
        nodes.iter().any(|n| spelling::is_quantised(n) || n.subgraphs().into_iter().any(|g| any(&g.node)))
    }
    any(&model.graph().node) || model.proto().functions.iter().any(|f| any(&f.node))
}

/// Spells the quantised operators of `model`, which must have no functions of its own, in single precision; returns how
/// many there were. Those of subgraphs, and what is not understood, stay.
///
/// # Errors
/// A constant cannot be read.
pub fn dequantise(model: &mut Model, rounding: Rounding) -> Result<usize> {
    if !is_quantised(model) {
        return Ok(0);
    }
    let mut writer = Writer::new(model, rounding);
    model.graph().node.iter().for_each(|node| writer.add(node));
    let Written { nodes, constants, count } = writer.finish().map_err(|e| e.in_model(model.origin()))?;
    let graph = model.graph_mut();
    graph.node = nodes;
    graph.initializer.extend(constants);
    // Values keep their names but not their types.
    graph.value_info.clear();
    graph.quantization_annotation.clear();
    remove_dead(model);
    Ok(count)
}

/// Operators whose output holds elements of their first operand, or of all that are joined.
const LAYOUT: [&str; 11] = [
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Identity",
    "Slice",
    "Gather",
    "Expand",
    "Split",
    "Concat",
];
fn is_layout(node: &NodeProto) -> bool {
    LAYOUT.iter().any(|op| node.is(op))
}

/// Operators on integers that are the same on floats.
const ARITHMETIC: [&str; 5] = ["Add", "Sub", "Mul", "Max", "Min"];
/// What is linear in its input, or ends a sum that is: where a ReLU may have been left to the saturation behind it.
const BEFORE_RELU: [&str; 4] = ["MatMul", "Gemm", "Add", "Conv"];
/// Quantised values are followed backwards through so many moves.
const DEEPEST: usize = 32;

/// Integers that are held as floats.
#[derive(Clone, Debug)]
struct Codes {
    value: String,
    data_type: i32,
}

/// What a value was before it was quantised, and by what.
#[derive(Clone, Debug)]
struct Meaning {
    value: String,
    scale: String,
    zero: String,
}

/// A product with a constant, `[.., k] [k, n]`.
#[derive(Clone, Debug)]
struct Product {
    input: String,
    weight: String,
}

/// Scale and zero point of a value: names, the empty one where there is none.
#[derive(Clone, Copy, Debug)]
struct Scheme<'n> {
    scale: &'n str,
    zero: &'n str,
    grid: Grid,
}

/// Writes the graph anew, node by node.
struct Writer<'g> {
    graph: &'g GraphProto,
    rounding: Rounding,
    opset: i64,
    constants: Constants<'g>,
    producers: HashMap<&'g str, &'g NodeProto>,
    consumers: HashMap<&'g str, Vec<&'g NodeProto>>,
    /// Graph outputs, and what subgraphs read: they keep name and type.
    pinned: HashSet<&'g str>,
    names: HashSet<String>,
    codes: HashMap<String, Codes>,
    meanings: HashMap<String, Meaning>,
    products: HashMap<String, Product>,
    /// Scales of what is no longer rounded.
    ones: HashSet<String>,
    /// What was computed of a value under a scheme.
    known: HashMap<(String, String, String, Grid), String>,
    written: Written,
    fault: Option<Error>,
}

#[derive(Default)]
struct Written {
    nodes: Vec<NodeProto>,
    constants: Vec<TensorProto>,
    count: usize,
}

impl<'g> Writer<'g> {
    fn new(model: &'g Model, rounding: Rounding) -> Self {
        let graph = model.graph();
        let outputs = graph.output.iter().map(|o| o.name.as_str());
        let mut consumers: HashMap<&str, Vec<&NodeProto>> = HashMap::new();
        for node in &graph.node {
            node.input.iter().for_each(|input| consumers.entry(input).or_default().push(node));
        }
        let inner = graph.node.iter().filter(|n| !n.subgraphs().is_empty()).flat_map(used_values);
        Self {
            graph,
            rounding,
            opset: model.opset(),
            constants: Constants::new(graph),
            producers: graph.node.iter().flat_map(|n| n.output.iter().map(move |o| (o.as_str(), n))).collect(),
            consumers,
            pinned: outputs.chain(inner).collect(),
            names: model.value_names(),
            codes: HashMap::new(),
            meanings: HashMap::new(),
            products: HashMap::new(),
            ones: HashSet::new(),
            known: HashMap::new(),
            written: Written::default(),
            fault: None,
        }
    }

    fn finish(mut self) -> Result<Written> {
        for output in &self.graph.output {
            self.restore(&output.name);
        }
        match self.fault {
            Some(fault) => Err(fault),
            None => Ok(self.written),
        }
    }

    fn add(&mut self, node: &'g NodeProto) {
        if spelling::is_quantised(node) && self.spell(node).is_some() {
            self.written.count += 1;
            return;
        }
        if self.keep_in_floats(node).is_none() {
            used_values(node).into_iter().for_each(|value| self.restore(value));
            self.written.nodes.push(node.clone());
        }
    }

    /// A node that is no quantised operator but reads, or makes, integers that are held as floats.
    fn keep_in_floats(&mut self, node: &'g NodeProto) -> Option<()> {
        let is = |operators: &[&str]| operators.iter().any(|op| node.is(op));
        if node.is("Mul") && self.rounding == Rounding::Dropped && self.scaled(node).is_some() {
            return Some(());
        }
        let operands = if is(&ARITHMETIC) || node.is("Concat") { node.input.len() } else { 1 };
        let first = node.input.iter().take(operands).find_map(|i| self.codes.get(i))?.clone();
        let mut copy = node.clone();
        for input in copy.input.iter_mut().take(operands).filter(|i| !i.is_empty()) {
            *input = self.codes(input)?;
        }
        if node.is("Shape") {
            self.written.nodes.push(copy);
            return Some(());
        }
        let to_float = node.is("Cast") && node.int("to", 0) == i64::from(ElementType::F32.onnx());
        if to_float {
            copy.op_type = "Identity".to_owned();
            copy.attribute.clear();
            if let Some(product) = self.products.get(&copy.input[0]).cloned() {
                self.products.insert(node.output[0].clone(), product);
            }
            self.written.nodes.push(copy);
            return Some(());
        }
        if !is_layout(node) && !is(&ARITHMETIC) {
            return None;
        }
        for output in copy.output.iter_mut().filter(|o| !o.is_empty()) {
            let value = self.fresh(output, "codes");
            self.codes.insert(output.clone(), Codes { value: value.clone(), data_type: first.data_type });
            *output = value;
        }
        self.written.nodes.push(copy);
        Some(())
    }

    /// A product with integers that is multiplied by its scale: the scale goes into the weight. Scales are multiplied too.
    fn scaled(&mut self, node: &NodeProto) -> Option<()> {
        let [a, b] = node.input.as_slice() else { return None };
        let output = node.output.first().filter(|o| !self.pinned.contains(o.as_str()))?;
        for (one, other) in [(a, b), (b, a)] {
            if self.ones.contains(one) && self.constants.is_float(other) {
                let values = self.values(other)?;
                self.constant(output, values);
                return Some(());
            }
        }
        let (product, scale) = if self.constants.is_constant(a) { (b, a) } else { (a, b) };
        let Product { input, weight } = self.products.get(product)?.clone();
        let values = self.values(&weight)?;
        let scaled = dequantised(&values, Some(&self.values(scale)?), None, Grid::COLUMNS)?;
        let name = self.fresh(&weight, "scaled");
        self.constant(&name, scaled);
        self.op_as("MatMul", &[&input, &name], output);
        Some(())
    }

    /// Gives integers that are held as floats their own type back, under their own name.
    fn restore(&mut self, value: &str) {
        let Some(Codes { value: codes, data_type }) = self.codes.remove(value) else { return };
        let element = ElementType::from_onnx(data_type).unwrap_or(ElementType::I32);
        let whole = match self.rounding {
            Rounding::Kept => codes,
            Rounding::Dropped => self.op("Round", &[&codes], value),
        };
        self.written.nodes.push(cast_node(&whole, value, element));
    }

    /// The floats that hold the integers of `value`.
    fn codes(&mut self, value: &str) -> Option<String> {
        if let Some(codes) = self.codes.get(value) {
            return Some(codes.value.clone());
        }
        let key = (value.to_owned(), "codes".to_owned(), String::new(), Grid::COLUMNS);
        if let Some(known) = self.known.get(&key) {
            return Some(known.clone());
        }
        let name = self.fresh(value, "codes");
        match self.constants.is_constant(value) {
            true => {
                let values = self.values(value)?;
                self.constant(&name, values);
            }
            false => self.written.nodes.push(cast_node(value, &name, ElementType::F32)),
        }
        self.known.insert(key, name.clone());
        Some(name)
    }

    /// What the integers of `value` mean.
    fn real(&mut self, value: &str, scheme: Scheme<'_>) -> Option<String> {
        self.real_within(value, scheme, DEEPEST)
    }

    fn real_within(&mut self, value: &str, scheme: Scheme<'_>, depth: usize) -> Option<String> {
        let (scale, zero) = (self.key(scheme.scale, 1.0), self.key(scheme.zero, 0.0));
        let key = (value.to_owned(), scale.clone(), zero.clone(), scheme.grid);
        if let Some(known) = self.known.get(&key) {
            return Some(known.clone());
        }
        let fixed = |writer: &Self, name: &str| name.is_empty() || writer.constants.is_constant(name);
        let whole = |writer: &Self, name: &str| name.is_empty() || writer.constants.single(name).is_some();
        let meaning = self.meanings.get(value).filter(|m| m.scale == scale && m.zero == zero).cloned();
        let result = if self.constants.is_constant(value) && fixed(self, scheme.scale) && fixed(self, scheme.zero) {
            let real = self.real_constant(value, scheme)?;
            let name = self.fresh(value, "real");
            self.constant(&name, real);
            name
        } else if let Some(meaning) = meaning {
            meaning.value
        } else if let Some(moved) = self.producers.get(value).copied().filter(|n| is_layout(n))
            && depth > 0
            && whole(self, scheme.scale)
            && whole(self, scheme.zero)
        {
            self.move_real(moved, value, scheme, depth - 1)?
        } else {
            let codes = self.codes(value)?;
            let centred = self.with(&codes, "Sub", (scheme.zero, scheme.grid), 0.0)?;
            self.with(&centred, "Mul", (scheme.scale, scheme.grid), 1.0)?
        };
        self.known.insert(key, result.clone());
        Some(result)
    }

    /// What is moved is the same before and after: `moved` on real numbers.
    fn move_real(&mut self, moved: &NodeProto, value: &str, scheme: Scheme<'_>, depth: usize) -> Option<String> {
        let mut copy = moved.clone();
        let operands = if moved.is("Concat") { moved.input.len() } else { 1 };
        for input in copy.input.iter_mut().take(operands) {
            *input = self.real_within(input, scheme, depth)?;
        }
        let mut result = None;
        for output in copy.output.iter_mut().filter(|o| !o.is_empty()) {
            let name = self.fresh(output, "real");
            if *output == value {
                result = Some(name.clone());
            }
            *output = name;
        }
        self.written.nodes.push(copy);
        result
    }

    fn real_constant(&mut self, value: &str, scheme: Scheme<'_>) -> Option<ndarray::ArrayD<f32>> {
        let q = self.values(value)?;
        let mut part = |name: &str| if name.is_empty() { Some(None) } else { self.values(name).map(Some) };
        let (scale, zero) = (part(scheme.scale)?, part(scheme.zero)?);
        dequantised(&q, scale.as_ref(), zero.as_ref(), scheme.grid)
    }

    /// `x operator y`, where `y` is a scale or zero point: nothing where it is `neutral`.
    fn with(&mut self, x: &str, operator: &str, (y, grid): (&str, Grid), neutral: f32) -> Option<String> {
        if y.is_empty() {
            return Some(x.to_owned());
        }
        if let Some(single) = self.constants.single(y) {
            return Some(if single == neutral { x.to_owned() } else { self.with_number(x, operator, single) });
        }
        // Of other axes than the last it is not known how many come after.
        if self.constants.rank(y).is_some_and(|rank| rank > 1) || (self.constants.is_constant(y) && grid.axis != -1) {
            return None;
        }
        // Scales are floats, zero points are not.
        let float = match self.constants.is_constant(y) {
            true => self.constants.is_float(y),
            false => !self.codes.contains_key(y) && (operator == "Mul" || operator == "Div"),
        };
        let operand = if float { y.to_owned() } else { self.codes(y)? };
        Some(self.op(operator, &[x, &operand], x))
    }

    fn with_number(&mut self, x: &str, operator: &str, number: f32) -> String {
        let name = self.fresh(x, "number");
        self.constant(&name, ndarray::arr0(number).into_dyn());
        self.op(operator, &[x, &name], x)
    }

    /// Quantises `x` to integers called `value`, which are held as floats.
    fn quantise(&mut self, x: &str, scheme: Scheme<'_>, data_type: i32, value: &str) -> Option<()> {
        let [low, high] = limits(data_type)?;
        let codes = match self.rounding {
            Rounding::Dropped => {
                let x = self.saturated(x, scheme, low, value);
                let scaled = self.with(&x, "Div", (scheme.scale, scheme.grid), 1.0)?;
                let (scale, zero) = (self.key(scheme.scale, 1.0), self.key(scheme.zero, 0.0));
                self.meanings.insert(value.to_owned(), Meaning { value: x, scale, zero });
                self.with(&scaled, "Add", (scheme.zero, scheme.grid), 0.0)?
            }
            Rounding::Kept => {
                let scaled = self.with(x, "Div", (scheme.scale, scheme.grid), 1.0)?;
                let whole = self.op("Round", &[&scaled], value);
                let moved = self.with(&whole, "Add", (scheme.zero, scheme.grid), 0.0)?;
                let above = self.with_number(&moved, "Max", low);
                self.with_number(&above, "Min", high)
            }
        };
        self.codes.insert(value.to_owned(), Codes { value: codes, data_type });
        Some(())
    }

    /// Quantisers take a ReLU out where the lowest integer stands for zero: what is below is cut off there.
    fn saturated(&mut self, x: &str, scheme: Scheme<'_>, low: f32, value: &str) -> String {
        let zero = if scheme.zero.is_empty() { Some(0.0) } else { self.constants.single(scheme.zero) };
        let latest = self.written.nodes.last().filter(|n| n.output.first().is_some_and(|o| o == x));
        let node = self.producers.get(x).copied().or(latest);
        let is_sum = node.is_some_and(|n| BEFORE_RELU.iter().any(|op| n.is(op)));
        match zero == Some(low) && is_sum && self.feeds_map(value, DEEPEST) {
            true => self.op("Relu", &[x], x),
            false => x.to_owned(),
        }
    }

    /// Whether a value goes into a product with a weight, as what a ReLU makes does in an encoder.
    fn feeds_map(&self, value: &str, depth: usize) -> bool {
        let users = self.consumers.get(value).map_or(&[] as &[_], Vec::as_slice);
        users.iter().any(|node| {
            let moves = ["DequantizeLinear", "Cast"].contains(&node.op_type.as_str()) || is_layout(node);
            let product = ["MatMul", "Gemm"].iter().any(|op| node.op_type.contains(op));
            let weight = || node.input.iter().any(|input| input != value && self.is_weight(input));
            (product && weight())
                || (moves && depth > 0 && node.output.iter().any(|output| self.feeds_map(output, depth - 1)))
        })
    }

    /// Whether a value is a matrix that does not depend on the inputs.
    fn is_weight(&self, value: &str) -> bool {
        if self.constants.is_constant(value) {
            return self.constants.rank(value) == Some(2);
        }
        let node = self.producers.get(value).copied();
        node.filter(|n| n.op_type == "DequantizeLinear" || is_layout(n))
            .and_then(|n| n.input.first())
            .is_some_and(|input| self.constants.rank(input) == Some(2))
    }

    /// What tells one scale or zero point from another: the number itself where there is one.
    fn key(&self, name: &str, default: f32) -> String {
        let number = if name.is_empty() { Some(default) } else { self.constants.single(name) };
        number.map_or_else(|| name.to_owned(), |number| format!("={number:?}"))
    }

    fn values(&mut self, name: &str) -> Option<ndarray::ArrayD<f32>> {
        match self.constants.values(name) {
            Ok(values) => values,
            Err(fault) => {
                self.fault.get_or_insert(fault);
                None
            }
        }
    }

    /// A new constant under exactly this name.
    fn constant(&mut self, name: &str, values: ndarray::ArrayD<f32>) {
        self.written.constants.push(Tensor::F32(values.clone()).to_proto(name));
        self.constants.add(name, values);
    }

    /// An operator of the standard domain; its output is called after `like`.
    fn op(&mut self, operator: &str, inputs: &[&str], like: &str) -> String {
        self.op_with(operator, inputs, vec![], like)
    }

    fn op_with(&mut self, operator: &str, inputs: &[&str], attributes: Vec<AttributeProto>, like: &str) -> String {
        let output = self.fresh(like, operator);
        self.op_as(operator, inputs, &output);
        self.written.nodes.last_mut().expect("pushed").attribute = attributes;
        output
    }

    fn op_as(&mut self, operator: &str, inputs: &[&str], output: &str) {
        self.written.nodes.push(NodeProto {
            op_type: operator.to_owned(),
            name: output.to_owned(),
            input: inputs.iter().map(|&i| i.to_owned()).collect(),
            output: vec![output.to_owned()],
            ..NodeProto::default()
        });
    }

    /// `value/part`, or that with a number where something is called so already.
    fn fresh(&mut self, value: &str, part: &str) -> String {
        let mut name = format!("{value}/{part}");
        let mut number = 1;
        while !self.names.insert(name.clone()) {
            number += 1;
            name = format!("{value}/{part}_{number}");
        }
        name
    }
}

/// The least and the greatest number of a type that values are quantised to.
fn limits(data_type: i32) -> Option<[f32; 2]> {
    const LIMITS: [(DataType, [f32; 2]); 6] = [
        (DataType::UINT8, [0.0, 255.0]),
        (DataType::INT8, [-128.0, 127.0]),
        (DataType::UINT16, [0.0, 65_535.0]),
        (DataType::INT16, [-32_768.0, 32_767.0]),
        (DataType::UINT4, [0.0, 15.0]),
        (DataType::INT4, [-8.0, 7.0]),
    ];
    LIMITS.into_iter().find(|(t, _)| *t as i32 == data_type).map(|(_, limits)| limits)
}

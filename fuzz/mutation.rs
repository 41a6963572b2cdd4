//! Models that stay valid protobuf and lose their sense: attributes, operands, constants and declarations are changed.

use mabert_graph::proto::attribute_proto::AttributeType;
use mabert_graph::proto::{AttributeProto, GraphProto, NodeProto, TensorProto, type_proto};
use mabert_graph::{ElementType, Model, Tensor, attribute};

/// Numbers that axes, sizes and steps are not expected to be.
const NUMBERS: [i64; 24] = [
    0,
    1,
    -1,
    2,
    -2,
    3,
    -3,
    4,
    -4,
    5,
    -5,
    8,
    64,
    127,
    -128,
    1000,
    1 << 16,
    1 << 31,
    -(1 << 31),
    (1 << 31) - 1,
    1 << 40,
    -(1 << 62),
    i64::MAX,
    i64::MIN,
];
const FLOATS: [f32; 10] = [0.0, -0.0, 1.0, -1.0, 1e-30, 1e30, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.5];
const TEXTS: [&str; 6] = ["", "none", "linear", "SAME_UPPER", "ij,jk->ik", "\u{7}"];
/// Operators whose sizes or loops come from numbers in the file.
const OPERATORS: [&str; 40] = [
    "Transpose",
    "LayerNormalization",
    "Softmax",
    "Range",
    "Expand",
    "Tile",
    "Pad",
    "Slice",
    "Gather",
    "GatherND",
    "GatherElements",
    "ConstantOfShape",
    "OneHot",
    "Squeeze",
    "Unsqueeze",
    "Split",
    "Concat",
    "ReduceMean",
    "ReduceSum",
    "ArgMax",
    "TopK",
    "CumSum",
    "Flatten",
    "Reshape",
    "Resize",
    "Conv",
    "MaxPool",
    "AveragePool",
    "GlobalAveragePool",
    "EyeLike",
    "Trilu",
    "Einsum",
    "Gemm",
    "DepthToSpace",
    "Compress",
    "NonZero",
    "ScatterElements",
    "DFT",
    "LSTM",
    "BatchNormalization",
];

/// Numbers that decide what is changed: every eight bytes one, then zeros.
pub(crate) struct Choices<'b>(pub(crate) &'b [u8]);

impl Choices<'_> {
    fn number(&mut self) -> u64 {
        let (first, rest) = self.0.split_at(self.0.len().min(8));
        self.0 = rest;
        first.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    pub(crate) fn below(&mut self, count: usize) -> usize {
        (self.number() % count.max(1) as u64) as usize
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

/// Changes a few things of `model`.
pub(crate) fn mutate(model: &mut Model, choices: &mut Choices<'_>) {
    for _ in 0..=choices.below(3) {
        match choices.below(16) {
            0..6 => change_node(model.graph_mut(), choices, change_attribute),
            6..9 => change_node(model.graph_mut(), choices, change_operands),
            9..13 => change_constant(model.graph_mut(), choices),
            13 => change_operator(model.graph_mut(), choices),
            14 => change_declaration(model.graph_mut(), choices),
            _ => model.proto_mut().opset_import.iter_mut().for_each(|o| o.version = 7 + choices.below(18) as i64),
        }
    }
}

fn change_node(
    graph: &mut GraphProto,
    choices: &mut Choices<'_>,
    change: fn(&mut NodeProto, Vec<String>, &mut Choices<'_>),
) {
    if graph.node.is_empty() {
        return;
    }
    let others = (0..3).map(|_| choices.below(graph.node.len()));
    let others = others.filter_map(|at| graph.node[at].output.first().cloned()).collect();
    // Nodes with attributes and constant operands are few among products and sums.
    let mut at = choices.below(graph.node.len());
    if choices.below(2) == 0 {
        let interesting: Vec<usize> =
            (0..graph.node.len()).filter(|&at| !graph.node[at].attribute.is_empty()).collect();
        at = if interesting.is_empty() { at } else { choices.of(&interesting) };
    }
    change(&mut graph.node[at], others, choices);
}

fn change_attribute(node: &mut NodeProto, _: Vec<String>, choices: &mut Choices<'_>) {
    let count = node.attribute.len();
    if count == 0 || choices.below(12) == 0 {
        let name = choices.of(&[
            "axis",
            "axes",
            "perm",
            "keepdims",
            "to",
            "equation",
            "kernel_shape",
            "pads",
            "strides",
            "value",
        ]);
        let number = choices.of(&NUMBERS);
        node.attribute.push(match choices.below(3) {
            0 => attribute::int(name, number),
            1 => attribute::ints(name, &[number, choices.of(&NUMBERS)]),
            _ => attribute::tensor(name, &Tensor::scalar(number)),
        });
        return;
    }
    let at = choices.below(count);
    match choices.below(12) {
        0 => _ = node.attribute.remove(at),
        1 => node.attribute[at].name = choices.of(&["axis", "axes", "perm", "alpha", "mode"]).to_owned(),
        2 => {
            node.attribute[at].type_ =
                choices.of(&[AttributeType::INT, AttributeType::INTS, AttributeType::TENSOR]).into()
        }
        _ => change_value(&mut node.attribute[at], choices),
    }
}

fn change_value(attribute: &mut AttributeProto, choices: &mut Choices<'_>) {
    let number = choices.of(&NUMBERS);
    match attribute.type_.enum_value() {
        Ok(AttributeType::INT) => attribute.i = number,
        Ok(AttributeType::INTS) => change_numbers(&mut attribute.ints, choices),
        Ok(AttributeType::FLOAT) => attribute.f = choices.of(&FLOATS),
        Ok(AttributeType::STRING) => attribute.s = choices.of(&TEXTS).as_bytes().to_vec(),
        Ok(AttributeType::TENSOR) => attribute.t.as_mut().into_iter().for_each(|tensor| change_tensor(tensor, choices)),
        Ok(AttributeType::GRAPH) => attribute.g.as_mut().into_iter().for_each(|graph| change_constant(graph, choices)),
        _ => attribute.i = number,
    }
}

fn change_numbers(numbers: &mut Vec<i64>, choices: &mut Choices<'_>) {
    let at = choices.below(numbers.len());
    match choices.below(6) {
        0 => _ = numbers.pop(),
        1 => numbers.push(choices.of(&NUMBERS)),
        2 => numbers.extend(numbers.clone()),
        3 => numbers.reverse(),
        _ if numbers.is_empty() => {}
        4 => numbers[at] = numbers[0],
        _ => numbers[at] = choices.of(&NUMBERS),
    }
}

fn change_operands(node: &mut NodeProto, others: Vec<String>, choices: &mut Choices<'_>) {
    let other = others.into_iter().next().unwrap_or_default();
    let at = choices.below(node.input.len());
    match choices.below(9) {
        0 => _ = node.input.pop(),
        1 => node.input.push(other),
        2 => node.input.reverse(),
        3 => node.input.push(String::new()),
        4 => _ = node.output.pop(),
        5 => node.output.push("another".to_owned()),
        _ if node.input.is_empty() => {}
        6 => node.input[at] = String::new(),
        7 => node.input[at] = other,
        _ => node.input[at] = node.input[0].clone(),
    }
}

/// Small constants are shapes, axes and steps; large ones are weights.
fn change_constant(graph: &mut GraphProto, choices: &mut Choices<'_>) {
    let mut tensors: Vec<&mut TensorProto> = graph.initializer.iter_mut().collect();
    let attributes = graph.node.iter_mut().filter(|n| n.op_type == "Constant").flat_map(|n| &mut n.attribute);
    tensors.extend(attributes.filter_map(|a| a.t.as_mut()));
    if choices.below(8) > 0 {
        tensors.retain(|t| t.dims.iter().product::<i64>() <= 8);
    }
    let at = choices.below(tensors.len());
    if let Some(tensor) = tensors.get_mut(at) {
        change_tensor(tensor, choices);
    }
}

fn change_tensor(proto: &mut TensorProto, choices: &mut Choices<'_>) {
    let kind = choices.below(10);
    if kind < 3 {
        match kind {
            0 => proto.dims.push(choices.of(&[1, 1, 0, 2, -1, 1 << 40])),
            1 => _ = proto.dims.pop(),
            _ => proto.data_type = choices.of(&[1, 6, 7, 9, 10, 11, 16]),
        }
        return;
    }
    let Ok(tensor) = Tensor::from_proto(proto) else { return };
    let (number, float, at) = (choices.of(&NUMBERS), choices.of(&FLOATS), choices.below(tensor.len()));
    let changed = match tensor {
        Tensor::I64(mut a) => a.iter_mut().nth(at).map(|v| *v = number).map(|()| a.into()),
        Tensor::I32(mut a) => a.iter_mut().nth(at).map(|v| *v = number as i32).map(|()| a.into()),
        Tensor::F32(mut a) => a.iter_mut().nth(at).map(|v| *v = float).map(|()| a.into()),
        Tensor::Bool(mut a) => a.iter_mut().nth(at).map(|v| *v = !*v).map(|()| a.into()),
        _ => None,
    };
    if let Some(changed) = changed {
        let changed: Tensor = changed;
        *proto = changed.to_proto(&proto.name);
    }
}

fn change_operator(graph: &mut GraphProto, choices: &mut Choices<'_>) {
    let at = choices.below(graph.node.len());
    if let Some(node) = graph.node.get_mut(at) {
        node.op_type = choices.of(&OPERATORS).to_owned();
        if choices.below(2) == 0 {
            node.attribute.clear();
        }
    }
}

fn change_declaration(graph: &mut GraphProto, choices: &mut Choices<'_>) {
    let at = choices.below(graph.input.len());
    let Some(input) = graph.input.get_mut(at) else { return };
    let Some(type_proto::Value::TensorType(tensor)) = input.type_.as_mut().and_then(|t| t.value.as_mut()) else {
        return;
    };
    match choices.below(4) {
        0 => tensor.shape.clear(),
        1 => {
            tensor.elem_type =
                choices.of(&[ElementType::F32, ElementType::I32, ElementType::Bool, ElementType::F16]).onnx()
        }
        2 => tensor.shape.as_mut().into_iter().for_each(|shape| _ = shape.dim.pop()),
        _ => tensor.shape.as_mut().into_iter().for_each(|shape| shape.dim.push(Default::default())),
    }
}

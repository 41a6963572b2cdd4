//! Random spellings of real exports: equivalent ones are all recognised, others are all refused.

use mabert_graph::proto::{AttributeProto, NodeProto};
use mabert_graph::{ElementType, Model, NodeExt as _, Tensor, attribute};
use mabert_passes::pipeline::Rewriting;
use mabert_passes::recording::Recording;
use mabert_runtime::borrowed;
use mabert_tests::{distance, exports, fixture, options, padded_inputs};
use proptest::prelude::*;
use rand::SeedableRng as _;

/// A model under change, and what it computed before.
struct Spelling<'r> {
    model: Model,
    recording: &'r Recording,
    /// Which of the places that fit is taken, counted around.
    at: usize,
    /// Changes made, for names that are free.
    count: usize,
}

/// A change, where there is a place for it.
type Change = fn(&mut Spelling<'_>) -> Option<()>;

/// Ways to write the same.
const EQUIVALENT: [(&str, Change); 15] = [
    ("a + b as b + a, a * b as b * a", swap),
    ("a - b as a + (-b)", subtract_by_adding),
    ("a / constant as a * (1 / constant)", divide_by_multiplying),
    ("x^2 as x * x", square_by_multiplying),
    ("sqrt x as x^0.5", root_by_power),
    ("a / b as a * reciprocal b", divide_by_reciprocal),
    ("a softmax as its exponentials over their sum", softmax_by_exponentials),
    ("a number before a map in the map's weight", number_into_weight),
    ("a value through Identity", |s| s.detour(|_, from, to| vec![node("Identity", &[from], to, vec![])])),
    ("a value through a Dropout that does nothing", |s| {
        s.detour(|_, from, to| vec![node("Dropout", &[from], to, vec![])])
    }),
    ("a value through a Cast to what it is", |s| {
        let to_float = attribute::int("to", i64::from(ElementType::F32.onnx()));
        s.detour(|_, from, to| vec![node("Cast", &[from], to, vec![to_float])])
    }),
    ("a value through a transposition and back", |s| s.detour(Spelling::turned_twice)),
    ("a value through one more axis and back", |s| s.detour(Spelling::through_one_more_axis)),
    ("an initializer as a Constant node", constant_node),
    ("a node by the name of another, or of none", name_node),
];

fn node(op: &str, inputs: &[&str], output: &str, attributes: Vec<AttributeProto>) -> NodeProto {
    NodeProto {
        op_type: op.to_owned(),
        name: output.to_owned(),
        input: inputs.iter().map(|&i| i.to_owned()).collect(),
        output: vec![output.to_owned()],
        attribute: attributes,
        ..NodeProto::default()
    }
}

impl Spelling<'_> {
    fn name(&self, part: &str) -> String {
        format!("spelled/{}/{part}", self.count)
    }

    /// One of the nodes that fit.
    fn place(&self, fits: impl Fn(&NodeProto) -> bool) -> Option<usize> {
        let nodes = &self.model.graph().node;
        let places: Vec<usize> = (0..nodes.len()).filter(|&i| fits(&nodes[i])).collect();
        places.get(self.at % places.len().max(1)).copied()
    }

    fn is_float(&self, value: &str) -> bool {
        self.recording.value(value).is_some_and(|v| v.element_type() == ElementType::F32)
    }

    fn operator_of_floats(&self, operator: &str) -> Option<usize> {
        self.place(|n| n.is(operator) && self.is_float(&n.output[0]))
    }

    /// Makes another operator of a node, and puts a new node before it that computes its second input.
    fn with_second_input(&mut self, at: usize, operator: &str, computed_by: &str) {
        let value = self.name(computed_by);
        let computed = node(computed_by, &[&self.model.graph().node[at].input[1].clone()], &value, vec![]);
        let changed = &mut self.model.graph_mut().node[at];
        changed.op_type = operator.to_owned();
        changed.input[1] = value;
        self.model.graph_mut().node.insert(at, computed);
    }

    /// Leads all users of some value of floats over other nodes, which give the same.
    fn detour(&mut self, nodes: impl FnOnce(&mut Self, &str, &str) -> Vec<NodeProto>) -> Option<()> {
        let outputs: Vec<String> = self.model.outputs().into_iter().map(|o| o.name).collect();
        let at =
            self.place(|n| n.output.len() == 1 && self.is_float(&n.output[0]) && !outputs.contains(&n.output[0]))?;
        let value = self.model.graph().node[at].output[0].clone();
        let end = self.name("end");
        let nodes = nodes(self, &value, &end);
        let graph = self.model.graph_mut();
        for user in &mut graph.node[at + 1..] {
            user.input.iter_mut().filter(|v| **v == value).for_each(|v| v.clone_from(&end));
        }
        graph.node.splice(at + 1..at + 1, nodes);
        Some(())
    }

    fn turned_twice(&mut self, from: &str, to: &str) -> Vec<NodeProto> {
        let order: Vec<i64> = (0..self.recording.shape(from).len() as i64).rev().collect();
        let turn = |from: &str, to: &str| node("Transpose", &[from], to, vec![attribute::ints("perm", &order)]);
        let through = self.name("through");
        vec![turn(from, &through), turn(&through, to)]
    }

    fn through_one_more_axis(&mut self, from: &str, to: &str) -> Vec<NodeProto> {
        let (through, axes) = (self.name("through"), self.name("axes"));
        if self.model.opset() < 13 {
            let first = || vec![attribute::ints("axes", &[0])];
            return vec![node("Unsqueeze", &[from], &through, first()), node("Squeeze", &[&through], to, first())];
        }
        self.model.set_constant(&axes, &Tensor::ints(&[0]));
        vec![node("Unsqueeze", &[from, &axes], &through, vec![]), node("Squeeze", &[&through, &axes], to, vec![])]
    }
}

fn swap(s: &mut Spelling<'_>) -> Option<()> {
    let at = s.place(|n| n.is("Add") || n.is("Mul"))?;
    s.model.graph_mut().node[at].input.reverse();
    Some(())
}

fn subtract_by_adding(s: &mut Spelling<'_>) -> Option<()> {
    let at = s.operator_of_floats("Sub")?;
    s.with_second_input(at, "Add", "Neg");
    Some(())
}

fn divide_by_reciprocal(s: &mut Spelling<'_>) -> Option<()> {
    let at = s.operator_of_floats("Div")?;
    s.with_second_input(at, "Mul", "Reciprocal");
    Some(())
}

fn divide_by_multiplying(s: &mut Spelling<'_>) -> Option<()> {
    let constant = |value: &str| s.model.initializer(value).is_some();
    let at = s.place(|n| n.is("Div") && s.is_float(&n.output[0]) && constant(&n.input[1]))?;
    let divisor = s.model.constant(&s.model.graph().node[at].input[1]).unwrap().to_f32();
    let factor = s.name("factor");
    s.model.set_constant(&factor, &Tensor::from(divisor.mapv(|v| 1.0 / v)));
    let div = &mut s.model.graph_mut().node[at];
    div.op_type = "Mul".to_owned();
    div.input[1] = factor;
    Some(())
}

fn square_by_multiplying(s: &mut Spelling<'_>) -> Option<()> {
    let two = |value: &str| s.model.constant(value).is_ok_and(|t| t.len() == 1 && t.to_f32().sum() == 2.0);
    let at = s.place(|n| n.is("Pow") && two(&n.input[1]))?;
    let pow = &mut s.model.graph_mut().node[at];
    pow.op_type = "Mul".to_owned();
    pow.input[1] = pow.input[0].clone();
    Some(())
}

fn root_by_power(s: &mut Spelling<'_>) -> Option<()> {
    let at = s.operator_of_floats("Sqrt")?;
    let half = s.name("half");
    s.model.set_constant(&half, &Tensor::scalar(0.5f32));
    let sqrt = &mut s.model.graph_mut().node[at];
    sqrt.op_type = "Pow".to_owned();
    sqrt.input.push(half);
    Some(())
}

fn softmax_by_exponentials(s: &mut Spelling<'_>) -> Option<()> {
    let at = s.place(|n| n.is("Softmax"))?;
    let softmax = s.model.graph_mut().node.remove(at);
    let [largest, less, exponentials, sum] = ["largest", "less", "exponentials", "sum"].map(|part| s.name(part));
    let (x, y) = (&softmax.input[0], &softmax.output[0]);
    let opset = s.model.opset();
    // The axes are an operand from some operator set on.
    let mut reduce = |op: &str, from: u8, x: &str, y: &str| {
        if opset < i64::from(from) {
            return node(op, &[x], y, vec![attribute::ints("axes", &[-1])]);
        }
        s.model.set_constant("spelled/last", &Tensor::ints(&[-1]));
        node(op, &[x, "spelled/last"], y, vec![])
    };
    let spelled = vec![
        reduce("ReduceMax", 18, x, &largest),
        node("Sub", &[x, &largest], &less, vec![]),
        node("Exp", &[&less], &exponentials, vec![]),
        reduce("ReduceSum", 13, &exponentials, &sum),
        node("Div", &[&exponentials, &sum], y, vec![]),
    ];
    s.model.graph_mut().node.splice(at..at, spelled);
    Some(())
}

/// As the half of a GELU is moved into the next product.
fn number_into_weight(s: &mut Spelling<'_>) -> Option<()> {
    let number = |v: &String| s.model.constant(v).ok().filter(|t| t.len() == 1).map(|t| t.to_f32().sum());
    let map_after = |value: &str| {
        let nodes = &s.model.graph().node;
        let users: Vec<usize> = (0..nodes.len()).filter(|&i| nodes[i].input.iter().any(|v| v == value)).collect();
        let [user] = users[..] else { return None };
        let is_map = nodes[user].is("MatMul") && nodes[user].input[0] == value;
        (is_map && s.model.initializer(&nodes[user].input[1]).is_some()).then_some(user)
    };
    let at =
        s.place(|n| n.is("Mul") && n.input.iter().any(|v| number(v).is_some()) && map_after(&n.output[0]).is_some())?;
    let mul = &s.model.graph().node[at];
    let map = map_after(&mul.output[0])?;
    let factor = mul.input.iter().find_map(number)?;
    let x = mul.input.iter().find(|v| number(v).is_none())?.clone();
    let weight = s.model.constant(&s.model.graph().node[map].input[1]).unwrap().to_f32() * factor;
    let name = s.name("weight");
    s.model.set_constant(&name, &Tensor::from(weight));
    s.model.graph_mut().node[map].input = vec![x, name];
    s.model.graph_mut().node.remove(at);
    Some(())
}

fn constant_node(s: &mut Spelling<'_>) -> Option<()> {
    let initializers = &mut s.model.graph_mut().initializer;
    let at = s.at.checked_rem(initializers.len())?;
    let tensor = initializers.remove(at);
    let value = attribute::tensor("value", &Tensor::from_proto(&tensor).unwrap());
    s.model.graph_mut().node.insert(0, node("Constant", &[], &tensor.name, vec![value]));
    Some(())
}

fn name_node(s: &mut Spelling<'_>) -> Option<()> {
    let at = s.at;
    let nodes = &mut s.model.graph_mut().node;
    let name = nodes.first().filter(|_| !at.is_multiple_of(3)).map_or_else(String::new, |n| n.name.clone());
    let place = at.checked_rem(nodes.len())?;
    nodes[place].name = name;
    Some(())
}

/// A way to write something else.
#[derive(Clone, Copy, Debug)]
enum Other {
    /// Another operator in the place of one.
    Operator(&'static str, &'static str),
    /// A number of the spelling that is off.
    Number(&'static str, f32, f32),
    /// Softmax or mean over another axis.
    Axis(&'static str, i64),
}

/// Of `bert-eager-torchscript-11`, where everything is spelled out.
const OTHERS: [Other; 12] = [
    Other::Operator("Erf", "Tanh"),
    Other::Operator("Erf", "Sigmoid"),
    Other::Operator("Sqrt", "Identity"),
    Other::Operator("Sqrt", "Exp"),
    Other::Operator("Softmax", "Sigmoid"),
    Other::Operator("Softmax", "LogSoftmax"),
    Other::Number("Pow", 2.0, 4.0),
    Other::Number("Div", std::f32::consts::SQRT_2, 1.5),
    Other::Number("Add", 1.0, 1.1),
    Other::Number("Mul", -65_504.0, 65_504.0),
    Other::Axis("Softmax", 2),
    Other::Axis("ReduceMean", 1),
];

/// Applies a change to one of the places that it fits, counted; `None` where there is none.
fn spoil(model: &mut Model, change: Other, at: usize) -> Option<()> {
    let places: Vec<usize> = (0..model.graph().node.len())
        .filter(|&i| {
            let node = &model.graph().node[i];
            match change {
                Other::Operator(op, _) | Other::Axis(op, _) => node.is(op),
                Other::Number(op, from, _) => {
                    node.is(op)
                        && node.input.iter().any(|v| {
                            let number =
                                |t: Tensor| t.len() == 1 && (t.to_f32().sum() - from).abs() < 1e-3 * from.abs();
                            model.constant(v).is_ok_and(number)
                        })
                }
            }
        })
        .collect();
    let i = *places.get(at.checked_rem(places.len())?)?;
    match change {
        Other::Operator(_, to) => {
            let node = &mut model.graph_mut().node[i];
            node.op_type = to.to_owned();
            if !to.ends_with("oftmax") {
                node.attribute.clear();
            }
        }
        Other::Axis(op, axis) => {
            let node = &mut model.graph_mut().node[i];
            node.attribute.retain(|a| a.name != "axis" && a.name != "axes");
            let axis = if op == "Softmax" { attribute::int("axis", axis) } else { attribute::ints("axes", &[axis]) };
            node.attribute.push(axis);
        }
        Other::Number(_, from, to) => {
            let wrong = format!("spoilt/{i}");
            let inputs = model.graph().node[i].input.clone();
            let is = |v: &String| {
                model.constant(v).is_ok_and(|t| t.len() == 1 && (t.to_f32().sum() - from).abs() < 1e-3 * from.abs())
            };
            let operand = inputs.iter().position(is)?;
            model.set_constant(&wrong, &Tensor::scalar(to));
            model.graph_mut().node[i].input[operand] = wrong;
        }
    }
    Some(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn equivalent_spellings_are_recognised(
        export in 0usize..64,
        changes in prop::collection::vec((prop::sample::select(&EQUIVALENT[..]), 0usize..10_000), 1..10),
    ) {
        let folders = exports();
        let folder = &folders[export % folders.len()];
        let original = Model::load(folder.join("model.onnx")).unwrap();
        let mut model = original.clone();
        mabert_passes::pipeline::simplify(&mut model).unwrap();
        for (count, ((_, change), at)) in changes.iter().enumerate() {
            let recording = Recording::new(&model, 2, 7).unwrap();
            let mut spelling = Spelling { model, recording: &recording, at: *at, count };
            // Where there is no place for it, nothing changes.
            _ = change(&mut spelling);
            model = spelling.model;
        }
        let rewriting = Rewriting::new(model, options());
        let rewriting = match rewriting {
            Ok(rewriting) => rewriting,
            Err(e) => return Err(TestCaseError::fail(format!("{}: {e}", folder.display()))),
        };
        let prepare = |m: &Model| mabert_runtime::LoadOptions::default().prepare(m).unwrap();
        let (before, after) = (prepare(&original), prepare(&rewriting.teacher));
        let inputs = padded_inputs(before.inputs(), 3, 9, 64, 5);
        let (x, y) = (before.run(&borrowed(&inputs)).unwrap(), after.run(&borrowed(&inputs)).unwrap());
        let far = distance(&x[0].1, &y[0].1);
        prop_assert!(far < 1e-4, "{}: {far}", folder.display());
    }

    /// As some tools write them, and onnxruntime sorts them.
    #[test]
    fn nodes_in_any_order_are_read(export in 0usize..64, seed in any::<u64>()) {
        let folders = exports();
        let folder = &folders[export % folders.len()];
        let original = Model::load(folder.join("model.onnx")).unwrap();
        let mut mixed = original.proto().clone();
        let mut random = rand::rngs::StdRng::seed_from_u64(seed);
        rand::seq::SliceRandom::shuffle(mixed.graph.as_mut().unwrap().node.as_mut_slice(), &mut random);
        prop_assert!(mixed != *original.proto());
        let rewriting = Rewriting::new(Model::from_proto(mixed).unwrap(), options());
        prop_assert!(rewriting.is_ok(), "{}: {}", folder.display(), rewriting.unwrap_err());
        let prepare = |m: &Model| mabert_runtime::LoadOptions::default().prepare(m).unwrap();
        let (before, after) = (prepare(&original), prepare(&rewriting.unwrap().teacher));
        let inputs = padded_inputs(before.inputs(), 3, 9, 64, 5);
        let (x, y) = (before.run(&borrowed(&inputs)).unwrap(), after.run(&borrowed(&inputs)).unwrap());
        let far = distance(&x[0].1, &y[0].1);
        prop_assert!(far < 1e-4, "{}: {far}", folder.display());
    }

    #[test]
    fn other_spellings_are_refused(change in prop::sample::select(&OTHERS[..]), at in 0usize..10_000) {
        let mut model = Model::load(fixture("exports/bert-eager-torchscript-11/model.onnx")).unwrap();
        mabert_passes::pipeline::simplify(&mut model).unwrap();
        prop_assume!(spoil(&mut model, change, at).is_some());
        // A refusal names sites; anything else is a fault of the change.
        match Rewriting::new(model, options()) {
            Ok(_) => prop_assert!(false, "{change:?} is rewritten"),
            Err(mabert_passes::Error::Incomplete { .. } | mabert_passes::Error::NotBert { .. }) => {}
            Err(other) => prop_assert!(false, "{change:?}: {other}"),
        }
    }
}

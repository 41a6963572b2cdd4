//! Random spellings of real exports: equivalent ones are all recognised, others are all refused.

use mabert_graph::proto::{AttributeProto, NodeProto};
use mabert_graph::{ElementType, Model, NodeExt as _, Tensor, attribute};
use mabert_passes::pipeline::Rewriting;
use mabert_passes::recording::Recording;
use mabert_runtime::borrowed;
use mabert_tests::{distance, exports, fixture, options, padded_inputs};
use proptest::prelude::*;

/// A way to write the same.
#[derive(Clone, Copy, Debug)]
enum Equivalent {
    /// `a + b` as `b + a`, `a * b` as `b * a`.
    Swap,
    /// `a - b` as `a + (-b)`.
    SubAsAdd,
    /// `a / constant` as `a * (1 / constant)`.
    DivAsMul,
    /// `x^2` as `x * x`.
    SquareAsMul,
    /// `sqrt x` as `x^0.5`.
    SqrtAsPow,
    /// `a / b` as `a * reciprocal b`.
    DivAsReciprocal,
    /// A value through `Identity`.
    Identity,
    /// Through a `Dropout` that does nothing.
    Dropout,
    /// Through a `Cast` to what it is.
    Cast,
    /// Through a transposition and back.
    Transposed,
    /// Through one more axis and back.
    Unsqueezed,
    /// An initializer as a `Constant` node.
    ConstantNode,
    /// A node by the name of another, or of none.
    NodeName,
}

use Equivalent::*;
const EQUIVALENT: [Equivalent; 13] = [
    Swap,
    SubAsAdd,
    DivAsMul,
    SquareAsMul,
    SqrtAsPow,
    DivAsReciprocal,
    Identity,
    Dropout,
    Cast,
    Transposed,
    Unsqueezed,
    ConstantNode,
    NodeName,
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

/// Applies one change somewhere, where there is a place for it.
fn apply(model: &mut Model, change: Equivalent, at: usize, count: usize, recording: &Recording) {
    let name = |part: &str| format!("spelled/{count}/{part}");
    let of = |model: &Model, fits: &dyn Fn(&NodeProto) -> bool| -> Option<usize> {
        let places: Vec<usize> = (0..model.graph().node.len()).filter(|&i| fits(&model.graph().node[i])).collect();
        places.get(at % places.len().max(1)).copied()
    };
    let is_constant = |model: &Model, value: &str| model.initializer(value).is_some();
    let float = |value: &str| recording.value(value).is_some_and(|v| v.element_type() == ElementType::F32);
    match change {
        Swap => {
            if let Some(i) = of(model, &|n| n.is("Add") || n.is("Mul")) {
                model.graph_mut().node[i].input.reverse();
            }
        }
        NodeName => {
            let nodes = &mut model.graph_mut().node;
            let name = nodes.first().filter(|_| !at.is_multiple_of(3)).map_or_else(String::new, |n| n.name.clone());
            let i = at % nodes.len().max(1);
            nodes[i].name = name;
        }
        SubAsAdd => {
            let Some(i) = of(model, &|n| n.is("Sub") && float(&n.output[0])) else { return };
            let negative = name("negative");
            let negated = node("Neg", &[&model.graph().node[i].input[1].clone()], &negative, vec![]);
            let sub = &mut model.graph_mut().node[i];
            sub.op_type = "Add".to_owned();
            sub.input[1] = negative;
            model.graph_mut().node.insert(i, negated);
        }
        DivAsMul => {
            let fits = |n: &NodeProto| n.is("Div") && float(&n.output[0]) && is_constant(model, &n.input[1]);
            let Some(i) = of(model, &fits) else { return };
            let divisor = model.constant(&model.graph().node[i].input[1]).unwrap().to_f32();
            model.set_constant(&name("factor"), &Tensor::from(divisor.mapv(|v| 1.0 / v)));
            let div = &mut model.graph_mut().node[i];
            div.op_type = "Mul".to_owned();
            div.input[1] = name("factor");
        }
        SquareAsMul => {
            let two = |value: &str| model.constant(value).is_ok_and(|t| t.len() == 1 && t.to_f32().sum() == 2.0);
            let Some(i) = of(model, &|n| n.is("Pow") && two(&n.input[1])) else { return };
            let pow = &mut model.graph_mut().node[i];
            pow.op_type = "Mul".to_owned();
            pow.input[1] = pow.input[0].clone();
        }
        SqrtAsPow => {
            let Some(i) = of(model, &|n| n.is("Sqrt") && float(&n.output[0])) else { return };
            model.set_constant(&name("half"), &Tensor::scalar(0.5f32));
            let sqrt = &mut model.graph_mut().node[i];
            sqrt.op_type = "Pow".to_owned();
            sqrt.input.push(name("half"));
        }
        DivAsReciprocal => {
            let Some(i) = of(model, &|n| n.is("Div") && float(&n.output[0])) else { return };
            let reciprocal = name("reciprocal");
            let inverse = node("Reciprocal", &[&model.graph().node[i].input[1].clone()], &reciprocal, vec![]);
            let div = &mut model.graph_mut().node[i];
            div.op_type = "Mul".to_owned();
            div.input[1] = reciprocal;
            model.graph_mut().node.insert(i, inverse);
        }
        Identity | Dropout | Cast | Transposed | Unsqueezed => {
            let outputs: Vec<String> = model.outputs().into_iter().map(|o| o.name).collect();
            let fits = |n: &NodeProto| n.output.len() == 1 && float(&n.output[0]) && !outputs.contains(&n.output[0]);
            let Some(i) = of(model, &fits) else { return };
            let value = model.graph().node[i].output[0].clone();
            let rank = recording.shape(&value).len() as i64;
            let (through, end) = (name("through"), name("end"));
            let nodes = match change {
                Identity => vec![node("Identity", &[&value], &end, vec![])],
                Dropout => vec![node("Dropout", &[&value], &end, vec![])],
                Cast => {
                    let to = attribute::int("to", i64::from(ElementType::F32.onnx()));
                    vec![node("Cast", &[&value], &end, vec![to])]
                }
                Transposed => {
                    let order: Vec<i64> = (0..rank).rev().collect();
                    let turn =
                        |from: &str, to: &str| node("Transpose", &[from], to, vec![attribute::ints("perm", &order)]);
                    vec![turn(&value, &through), turn(&through, &end)]
                }
                _ if model.opset() < 13 => vec![
                    node("Unsqueeze", &[&value], &through, vec![attribute::ints("axes", &[0])]),
                    node("Squeeze", &[&through], &end, vec![attribute::ints("axes", &[0])]),
                ],
                _ => {
                    model.set_constant(&name("axes"), &Tensor::ints(&[0]));
                    let axes = name("axes");
                    vec![
                        node("Unsqueeze", &[&value, &axes], &through, vec![]),
                        node("Squeeze", &[&through, &axes], &end, vec![]),
                    ]
                }
            };
            let graph = model.graph_mut();
            for user in &mut graph.node[i + 1..] {
                user.input.iter_mut().filter(|v| **v == value).for_each(|v| v.clone_from(&end));
            }
            for (offset, node) in nodes.into_iter().enumerate() {
                graph.node.insert(i + 1 + offset, node);
            }
        }
        ConstantNode => {
            let initializers = &mut model.graph_mut().initializer;
            if initializers.is_empty() {
                return;
            }
            let tensor = initializers.remove(at % initializers.len());
            let value = Tensor::from_proto(&tensor).unwrap();
            let constant = node("Constant", &[], &tensor.name, vec![attribute::tensor("value", &value)]);
            model.graph_mut().node.insert(0, constant);
        }
    }
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
const OTHERS: [Other; 13] = [
    Other::Operator("Erf", "Tanh"),
    Other::Operator("Erf", "Sigmoid"),
    Other::Operator("Sqrt", "Identity"),
    Other::Operator("Sqrt", "Exp"),
    Other::Operator("Softmax", "Sigmoid"),
    Other::Operator("Softmax", "LogSoftmax"),
    Other::Number("Pow", 2.0, 4.0),
    Other::Number("Mul", 0.5, 0.6),
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
                // Scores may be scaled by any number.
                Other::Number(_, 0.5, _) if node.name.contains("attention") => false,
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
        for (count, (change, at)) in changes.iter().enumerate() {
            let recording = Recording::new(&model, 2, 7).unwrap();
            apply(&mut model, *change, *at, count, &recording);
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

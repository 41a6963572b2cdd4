//! Fused operators against tract's own, on whole models.

use std::collections::BTreeMap;

use mabert_graph::{Model, Tensor};
use mabert_passes::lower::{Approximator, ApproximatorOptions, Form, HingeSizes, Sharing};
use mabert_passes::pipeline::{Order, Rewriting, Student};
use mabert_runtime::{LoadOptions, borrowed};
use mabert_tests::{MAX_SEQ, distance, exports, fixture, padded_inputs};

/// The fixture with networks, rewritten but not calibrated.
fn student(order: Order, sharing: Sharing, length_tables: bool, hidden: usize) -> Model {
    let default = mabert_tests::options().approximator;
    student_with(order, ApproximatorOptions { sharing, length_tables, hidden, ..default })
}

fn student_with(order: Order, approximator: ApproximatorOptions) -> Model {
    let mut student = unfinished(order, approximator);
    student.finish().unwrap();
    student.model
}

/// Before the exact passes.
fn unfinished(order: Order, approximator: ApproximatorOptions) -> Student {
    unfinished_with(order, approximator, &[approximator.form; 3])
}

/// The same with a form for each layer.
fn unfinished_with(order: Order, approximator: ApproximatorOptions, forms: &[Form]) -> Student {
    let model = Model::load(fixture("bert-mini-sst2/model.onnx")).unwrap();
    let options = mabert_passes::pipeline::PassOptions { approximator, order, ..mabert_tests::options() };
    let mut student = Rewriting::new(model, options).unwrap().approximate_as(forms).unwrap();
    // What is not calibrated is the same everywhere, and tract simplifies it away.
    let tables = |approximator: &Approximator| match approximator {
        Approximator::Network(a) => [&a.b1, &a.b2, &a.scale].map(String::clone).to_vec(),
        hinges => hinges.parameters().into_iter().cloned().collect(),
    };
    let names: Vec<String> = student.approximators.iter().flat_map(tables).collect();
    for (seed, name) in names.iter().enumerate() {
        if let Ok(values) = student.model.constant(name) {
            let wave = (0..values.len()).map(|i| 0.5 + 0.2 * ((seed * 31 + i * 7) as f32).sin());
            student.model.set_constant(name, &Tensor::new(values.shape(), wave.collect()));
        }
    }
    student
}

/// Compares fused and plain, relative to outputs above 1, over batch sizes, lengths and masks; gives the operators that ran
/// with fusing.
fn compare(model: &Model, threads: usize) -> BTreeMap<String, usize> {
    let fused = LoadOptions::default().threads(threads).prepare(model).unwrap();
    let plain = LoadOptions::default().plain().prepare(model).unwrap();
    for (batch, length) in [(1, 1), (1, 7), (3, MAX_SEQ), (2, 5), (5, 13)] {
        let inputs = padded_inputs(fused.inputs(), batch, length, 64, 11 + length as u64);
        let (x, y) = (fused.run(&borrowed(&inputs)).unwrap(), plain.run(&borrowed(&inputs)).unwrap());
        for ((name, x), (_, y)) in x.iter().zip(&y) {
            let largest = y.to_f32().iter().fold(1f32, |m, v| m.max(v.abs()));
            let far = distance(x, y) / largest;
            assert!(far < 1e-4, "{name} at {batch} x {length}: {far}");
        }
    }
    assert!(!plain.operators().contains_key("Linear"), "{:?}", plain.operators());
    fused.operators()
}

#[test]
fn students_stay_in_panels_from_their_first_linear_layer_to_their_last() {
    for (sharing, tables, hidden) in [
        (Sharing::PerHead, true, 16),
        (Sharing::PerHead, false, 16),
        (Sharing::PerLayer, true, 8),
        (Sharing::PerLayer, false, 24),
        (Sharing::Shared, true, 19),
    ] {
        let model = student(Order::Linear, sharing, tables, hidden);
        for threads in [1, 2] {
            let operators = compare(&model, threads);
            let count = |name: &str| operators.get(name).copied().unwrap_or(0);
            // The last layer's queries are a row for each sequence: its linear layers but one are left to tract.
            let found = ["LinearAttention", "Linear", "ToPanels", "FromPanels"].map(count);
            assert_eq!(found, [3, 9, 2, 2], "{sharing:?}, tables {tables}: {operators:?}");
        }
    }
}

#[test]
fn attention_of_hinges_is_one_operator() {
    for (statistics, hinges) in [(3, 2), (1, 1), (2, 4), (4, 3)] {
        let sizes = HingeSizes { statistics, hinges, hidden: 7 };
        let approximator = ApproximatorOptions { hinges: sizes, ..ApproximatorOptions::hinges(MAX_SEQ, 64) };
        let model = student_with(Order::Auto, approximator);
        for threads in [1, 2] {
            let operators = compare(&model, threads);
            let count = |name: &str| operators.get(name).copied().unwrap_or(0);
            let found = ["HingeAttention", "Linear", "ToPanels", "FromPanels"].map(count);
            assert_eq!(found, [3, 9, 2, 2], "{statistics} statistics, {hinges} hinges: {operators:?}");
        }
    }
    // More hinges than registers hold: the nodes run one by one.
    let usual = ApproximatorOptions::hinges(MAX_SEQ, 64);
    let many = HingeSizes { statistics: 2, hinges: 5, hidden: 4 };
    let model = student_with(Order::Auto, ApproximatorOptions { hinges: many, ..usual });
    assert!(!compare(&model, 1).contains_key("HingeAttention"));
}

/// Each layer's attention is fused as its form has it, and computes what it did with its probabilities.
#[test]
fn layers_of_different_forms_are_each_fused() {
    use Form::{Hinges, Network};
    let approximator = ApproximatorOptions { hidden: 16, ..ApproximatorOptions::hinges(MAX_SEQ, 64) };
    for forms in [[Hinges, Network, Hinges], [Network, Hinges, Network], [Network, Network, Hinges]] {
        let mut student = unfinished_with(Order::Auto, approximator, &forms);
        assert_eq!(student.options.approximator.longest(), MAX_SEQ);
        let before = LoadOptions::default().plain().prepare(&student.model).unwrap();
        student.finish().unwrap();
        let after = LoadOptions::default().plain().prepare(&student.model).unwrap();
        let inputs = padded_inputs(after.inputs(), 3, MAX_SEQ, 64, 5);
        let (x, y) = (before.run(&borrowed(&inputs)).unwrap(), after.run(&borrowed(&inputs)).unwrap());
        for ((name, x), (_, y)) in x.iter().zip(&y) {
            let largest = y.to_f32().iter().fold(1f32, |m, v| m.max(v.abs()));
            let far = distance(x, y) / largest;
            assert!(far < 1e-3, "{name}, {forms:?}: {far}");
        }
        let operators = compare(&student.model, 2);
        let networks = forms.iter().filter(|form| **form == Network).count();
        let count = |name: &str| operators.get(name).copied().unwrap_or(0);
        let found = ["HingeAttention", "LinearAttention", "Linear"].map(count);
        assert_eq!(found, [3 - networks, networks, 9], "{forms:?}: {operators:?}");
    }
}

/// Probabilities are a value of their graph: in the paper's order, and while parameters are looked for.
#[test]
fn hinges_with_probabilities_are_one_operator_too() {
    let usual = ApproximatorOptions::hinges(MAX_SEQ, 64);
    let one = ApproximatorOptions { hinges: HingeSizes { statistics: 1, hinges: 1, hidden: 3 }, ..usual };
    for approximator in [usual, one] {
        for model in [student_with(Order::Paper, approximator), unfinished(Order::Auto, approximator).model] {
            let operators = compare(&model, 2);
            assert_eq!(operators.get("HingeAttention"), Some(&3), "{operators:?}");
        }
    }
}

#[test]
fn linear_layers_of_other_models_are_fused_too() {
    let paper = student(Order::Paper, Sharing::PerHead, true, 16);
    let teacher = Model::load(fixture("bert-mini-sst2/model.onnx")).unwrap();
    for (model, linears) in [(paper, 9), (teacher, 18)] {
        let operators = compare(&model, 1);
        assert_eq!(
            (operators.get("Linear"), operators.get("LinearAttention")),
            (Some(&linears), None),
            "{operators:?}"
        );
    }
}

#[test]
fn what_is_not_recognised_is_left_to_tract() {
    // Their heads are narrower than a panel, their channels not always whole panels.
    for folder in exports() {
        compare(&Model::load(folder.join("model.onnx")).unwrap(), 1);
    }
}

#[test]
fn programs_that_embed_tract_find_the_fused_operators_by_name() {
    use tract_onnx::prelude::*;
    use tract_onnx::tract_core::runtime::runtime_for_name;
    let model = student(Order::Linear, Sharing::PerHead, true, 16);
    let file = tempfile::tempdir().unwrap().keep().join("ma.onnx");
    model.save(&file).unwrap();
    let onnx = tract_onnx::onnx().model_for_path(&file).unwrap();
    let [b, l] = ["B", "L"].map(|name| TDim::from(onnx.symbols.sym(name)));
    for shape in [[b, l], [1.into(), 9.into()], [2.into(), 9.into()], [1.into(), 1.into()]] {
        let mut onnx = onnx.clone();
        for input in 0..3 {
            onnx.set_input_fact(input, InferenceFact::dt_shape(i64::datum_type(), &shape)).unwrap();
        }
        let typed = onnx.into_typed().unwrap();
        let runnable =
            runtime_for_name("mabert").unwrap().expect("it registers itself").prepare(typed.clone()).unwrap();
        let [b, l] = shape.map(|size| size.as_i64().map(|size| size as usize));
        let (b, l) = (b.unwrap_or(3), l.unwrap_or(9));
        let nodes = runnable.typed_model().unwrap().nodes();
        let count = |name: &str| nodes.iter().filter(|node| node.op.name() == name).count();
        let found = [count("LinearAttention"), count("Linear")];
        // One token alone would fill one lane of a panel.
        let wanted = if b * l == 1 { [0, 0] } else { [3, 9] };
        assert_eq!(found, wanted, "{b} x {l}");
        let plain = typed.into_optimized().unwrap().into_runnable().unwrap();
        let ids = |value: i64| tract_ndarray::Array2::from_shape_fn((b, l), |(b, t)| value * (4 + (b * 9 + t) as i64));
        let mask = tract_ndarray::Array2::from_shape_fn((b, l), |(b, t)| i64::from(t < l - 2 * b));
        let inputs: TVec<TValue> = tvec![ids(1).into_tvalue(), mask.into_tvalue(), ids(0).into_tvalue()];
        let found = runnable.run(inputs.clone()).unwrap();
        let wanted = plain.run(inputs).unwrap();
        found[0].close_enough(&wanted[0], tract_onnx::tract_core::internal::Approximation::Approximate).unwrap();
    }
}

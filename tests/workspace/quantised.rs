//! Quantised models: what quantisers make of a real export is computed as onnxruntime computes it, and rewritten from what
//! it means in single precision.

use mabert_graph::proto::tensor_proto::DataType;
use mabert_graph::proto::{NodeProto, OperatorSetIdProto, TensorProto};
use mabert_graph::{Model, NodeExt as _, Rounding, Tensor, attribute};
use mabert_passes::pipeline::{Pass, Rewriting};
use mabert_runtime::{Engine, LoadOptions, OrtModel, borrowed};
use mabert_tests::{MAX_SEQ, distance, fixture, options, padded_inputs};
use mabert_transfer::job::{Job, rewrite};
use mabert_transfer::progress::Silent;
use ndarray::{Array2, Axis};

const EXPORT: &str = "coverage/bert-classification-torchscript-17.onnx";
const MICROSOFT: &str = "com.microsoft";

/// A form of a linear map `x W`, whose weight `[k, n]` is quantised.
type Form = fn(&mut Quantiser, &NodeProto, &Array2<f32>);

/// What quantisers write, onnxruntime's and others.
const FORMS: [(&str, Form); 11] = [
    ("int8 weights, cast and multiplied", cast_and_multiplied),
    ("int8 weights, one scale", |q, node, w| dequantised(q, node, w, Scales::One)),
    ("int8 weights, a scale a column", |q, node, w| dequantised(q, node, w, Scales::Columns)),
    ("int4 weights in blocks", |q, node, w| dequantised(q, node, w, Scales::Blocks)),
    ("int4 weights in blocks, in one operator", matmul_n_bits),
    ("dynamic", |q, node, w| dynamic(q, node, w, Scales::One)),
    ("dynamic, a scale a column", |q, node, w| dynamic(q, node, w, Scales::Columns)),
    ("dynamic, product and scales in one operator", integer_to_float),
    ("dynamic, in one operator", dynamic_in_one),
    ("static, quantised and read around the product", around),
    ("static, a product of integers", linear_matmul),
];

#[derive(Clone, Copy, PartialEq)]
enum Scales {
    One,
    Columns,
    /// Of eight rows.
    Blocks,
}

const BLOCK: usize = 8;

/// Builds the nodes that take the place of one.
struct Quantiser {
    nodes: Vec<NodeProto>,
    constants: Vec<TensorProto>,
    prefix: String,
}

impl Quantiser {
    fn constant(&mut self, part: &str, value: &Tensor) -> String {
        let name = format!("{}/{part}", self.prefix);
        self.constants.push(value.to_proto(&name));
        name
    }

    fn node(&mut self, domain: &str, op: &str, inputs: &[&str], outputs: &[&str]) -> &mut NodeProto {
        self.nodes.push(NodeProto {
            op_type: op.to_owned(),
            domain: domain.to_owned(),
            name: format!("{}/{op}", outputs[0]),
            input: inputs.iter().map(|&i| i.to_owned()).collect(),
            output: outputs.iter().map(|&o| o.to_owned()).collect(),
            ..NodeProto::default()
        });
        self.nodes.last_mut().unwrap()
    }

    /// An intermediate value.
    fn op(&mut self, op: &str, inputs: &[&str]) -> String {
        let output = format!("{}/{op}", self.prefix);
        self.node("", op, inputs, &[&output]);
        output
    }

    /// Integers and what they are multiplied by, `[n]` or one.
    fn int8(&mut self, w: &Array2<f32>, scales: Scales) -> [String; 2] {
        let largest = |values: &mut dyn Iterator<Item = &f32>| values.fold(1e-6f32, |m, v| m.max(v.abs())) / 127.0;
        let scale: Vec<f32> = match scales {
            Scales::One => vec![largest(&mut w.iter())],
            _ => w.columns().into_iter().map(|c| largest(&mut c.iter())).collect(),
        };
        let of = |column: usize| scale[column % scale.len()];
        let q = w.indexed_iter().map(|((_, n), v)| (v / of(n)).round() as i8).collect();
        let shape: Vec<usize> = if scales == Scales::One { vec![] } else { vec![scale.len()] };
        [self.constant("q", &Tensor::new(&[w.nrows(), w.ncols()], q)), self.constant("s", &Tensor::new(&shape, scale))]
    }

    /// Numbers from 0 to 15 around 8, and the scales of blocks of rows, `[k / BLOCK, n]`.
    fn int4(w: &Array2<f32>) -> (Array2<u8>, Array2<f32>) {
        let blocks = w.axis_chunks_iter(Axis(0), BLOCK);
        let scales: Vec<f32> = blocks
            .flat_map(|block| {
                let columns = block.columns().into_iter();
                columns.map(|c| c.iter().fold(1e-6f32, |m, v| m.max(v.abs())) / 7.0).collect::<Vec<f32>>()
            })
            .collect();
        let scales = Array2::from_shape_vec((w.nrows() / BLOCK, w.ncols()), scales).unwrap();
        (Array2::from_shape_fn(w.dim(), |(k, n)| (w[(k, n)] / scales[(k / BLOCK, n)] + 8.0).round() as u8), scales)
    }
}

/// Two numbers of four bits to a byte.
fn packed(values: &[u8]) -> Vec<u8> {
    values.chunks(2).map(|pair| pair[0] | pair.get(1).unwrap_or(&0) << 4).collect()
}

fn cast_and_multiplied(q: &mut Quantiser, node: &NodeProto, w: &Array2<f32>) {
    let [codes, scale] = q.int8(w, Scales::Columns);
    let cast = q.op("Cast", &[&codes]);
    q.nodes.last_mut().unwrap().attribute.push(attribute::int("to", 1));
    let weight = q.op("Mul", &[&cast, &scale]);
    q.node("", "MatMul", &[&node.input[0], &weight], &[&node.output[0]]);
}

fn dequantised(q: &mut Quantiser, node: &NodeProto, w: &Array2<f32>, scales: Scales) {
    let weight = match scales {
        Scales::Blocks => {
            let (codes, scale) = Quantiser::int4(w);
            let name = format!("{}/q", q.prefix);
            q.constants.push(TensorProto {
                name: name.clone(),
                data_type: DataType::UINT4 as i32,
                dims: vec![w.nrows() as i64, w.ncols() as i64],
                raw_data: packed(codes.as_slice().unwrap()),
                ..TensorProto::default()
            });
            let zero = TensorProto {
                name: format!("{}/z", q.prefix),
                data_type: DataType::UINT4 as i32,
                dims: scale.shape().iter().map(|&d| d as i64).collect(),
                raw_data: vec![0x88; scale.len().div_ceil(2)],
                ..TensorProto::default()
            };
            q.constants.push(zero);
            let scale = q.constant("s", &Tensor::from(scale.into_dyn()));
            let zero = format!("{}/z", q.prefix);
            q.op("DequantizeLinear", &[&name, &scale, &zero])
        }
        _ => {
            let [codes, scale] = q.int8(w, scales);
            q.op("DequantizeLinear", &[&codes, &scale])
        }
    };
    let attributes = match scales {
        Scales::Blocks => vec![attribute::int("axis", 0), attribute::int("block_size", BLOCK as i64)],
        _ => vec![attribute::int("axis", 1)],
    };
    q.nodes.last_mut().unwrap().attribute = attributes;
    q.node("", "MatMul", &[&node.input[0], &weight], &[&node.output[0]]);
}

fn matmul_n_bits(q: &mut Quantiser, node: &NodeProto, w: &Array2<f32>) {
    // onnxruntime takes blocks of 16 and more; the last may be cut.
    const BLOCK: usize = 16;
    let (k, n) = w.dim();
    let blocks = k.div_ceil(BLOCK);
    let (mut bytes, mut scales) = (Vec::new(), Vec::new());
    for column in w.columns() {
        for block in column.axis_chunks_iter(Axis(0), BLOCK) {
            let scale = block.iter().fold(1e-6f32, |m, v| m.max(v.abs())) / 7.0;
            let mut codes: Vec<u8> = block.iter().map(|v| (v / scale + 8.0).round() as u8).collect();
            codes.resize(BLOCK, 0);
            bytes.extend(packed(&codes));
            scales.push(scale);
        }
    }
    let codes = q.constant("q", &Tensor::new(&[n, blocks, BLOCK / 2], bytes));
    let scales = q.constant("s", &Tensor::new(&[n * blocks], scales));
    let node = q.node(MICROSOFT, "MatMulNBits", &[&node.input[0], &codes, &scales], &[&node.output[0]]);
    let sizes = [("K", k), ("N", n), ("bits", 4), ("block_size", BLOCK)];
    node.attribute = sizes.map(|(name, size)| attribute::int(name, size as i64)).to_vec();
}

/// `DynamicQuantizeLinear`: integers, their scale and their zero point.
fn quantised_dynamically(q: &mut Quantiser, x: &str) -> [String; 3] {
    let outputs = ["x", "xs", "xz"].map(|part| format!("{}/{part}", q.prefix));
    q.node("", "DynamicQuantizeLinear", &[x], &[&outputs[0], &outputs[1], &outputs[2]]);
    outputs
}

fn dynamic(q: &mut Quantiser, node: &NodeProto, w: &Array2<f32>, scales: Scales) {
    let [codes, scale] = q.int8(w, scales);
    let [x, x_scale, x_zero] = quantised_dynamically(q, &node.input[0]);
    let shape: &[usize] = if scales == Scales::One { &[] } else { &[w.ncols()] };
    let zero = q.constant("z", &Tensor::new(shape, vec![0i8; shape.iter().product()]));
    let product = q.op("MatMulInteger", &[&x, &codes, &x_zero, &zero]);
    let cast = q.op("Cast", &[&product]);
    q.nodes.last_mut().unwrap().attribute.push(attribute::int("to", 1));
    let scales = q.op("Mul", &[&x_scale, &scale]);
    q.node("", "Mul", &[&cast, &scales], &[&node.output[0]]);
}

fn integer_to_float(q: &mut Quantiser, node: &NodeProto, w: &Array2<f32>) {
    let [codes, scale] = q.int8(w, Scales::One);
    let [x, x_scale, x_zero] = quantised_dynamically(q, &node.input[0]);
    let inputs = [x.as_str(), &codes, &x_scale, &scale, &x_zero];
    q.node(MICROSOFT, "MatMulIntegerToFloat", &inputs, &[&node.output[0]]);
}

fn dynamic_in_one(q: &mut Quantiser, node: &NodeProto, w: &Array2<f32>) {
    let [codes, scale] = q.int8(w, Scales::Columns);
    q.node(MICROSOFT, "DynamicQuantizeMatMul", &[&node.input[0], &codes, &scale], &[&node.output[0]]);
}

/// A scale and a zero point for values between -6 and 6.
fn static_scheme(q: &mut Quantiser) -> [String; 2] {
    [q.constant("xs", &Tensor::scalar(12f32 / 255.0)), q.constant("xz", &Tensor::scalar(128u8))]
}

fn around(q: &mut Quantiser, node: &NodeProto, w: &Array2<f32>) {
    let [codes, scale] = q.int8(w, Scales::One);
    let [x_scale, x_zero] = static_scheme(q);
    let x = q.op("QuantizeLinear", &[&node.input[0], &x_scale, &x_zero]);
    let x = q.op("DequantizeLinear", &[&x, &x_scale, &x_zero]);
    let weight = format!("{}/w", q.prefix);
    q.node("", "DequantizeLinear", &[&codes, &scale], &[&weight]);
    q.node("", "MatMul", &[&x, &weight], &[&node.output[0]]);
}

fn linear_matmul(q: &mut Quantiser, node: &NodeProto, w: &Array2<f32>) {
    let [codes, scale] = q.int8(w, Scales::One);
    let [x_scale, x_zero] = static_scheme(q);
    let zero = q.constant("z", &Tensor::scalar(0i8));
    let x = q.op("QuantizeLinear", &[&node.input[0], &x_scale, &x_zero]);
    let y = q.op("QLinearMatMul", &[&x, &x_scale, &x_zero, &codes, &scale, &zero, &x_scale, &x_zero]);
    q.node("", "DequantizeLinear", &[&y, &x_scale, &x_zero], &[&node.output[0]]);
}

/// An export whose linear maps are in this form.
fn quantised(form: Form) -> Model {
    let mut model = Model::load(fixture(EXPORT)).unwrap();
    let weight = |model: &Model, node: &NodeProto| {
        let name = node.input.get(1).filter(|_| node.is("MatMul"))?;
        model.constant(name).ok()?.to_f32().into_dimensionality::<ndarray::Ix2>().ok()
    };
    let mut all = Vec::new();
    let mut constants = Vec::new();
    for node in &model.graph().node {
        match weight(&model, node) {
            None => all.push(node.clone()),
            Some(w) => {
                let prefix = format!("{}/quantised", node.output[0]);
                let mut q = Quantiser { nodes: Vec::new(), constants: Vec::new(), prefix };
                form(&mut q, node, &w);
                all.extend(q.nodes);
                constants.extend(q.constants);
            }
        }
    }
    model.graph_mut().node = all;
    model.graph_mut().initializer.extend(constants);
    model.remove_dead();
    let imports = &mut model.proto_mut().opset_import;
    // Blocks, and numbers of four bits, are of operator set 21.
    imports[0].version = 21;
    imports.push(OperatorSetIdProto { domain: MICROSOFT.to_owned(), version: 1, ..Default::default() });
    model.proto_mut().ir_version = 10;
    model
}

/// The furthest outputs of two engines.
fn furthest(a: &dyn Engine, b: &dyn Engine) -> f32 {
    let sizes = [(1, 1), (3, 12), (2, 5)];
    let far = sizes.map(|(batch, length)| {
        let inputs = padded_inputs(a.inputs(), batch, length, 64, 5 + length as u64);
        let [x, y] = [a, b].map(|engine| engine.run(&borrowed(&inputs)).unwrap());
        distance(&x[0].1, &y[0].1)
    });
    far.into_iter().fold(0.0, f32::max)
}

#[test]
fn quantised_models_compute_what_they_do_on_onnxruntime() {
    for (name, form) in FORMS {
        let model = quantised(form);
        let on_ort = OrtModel::prepare(&model, 1).unwrap_or_else(|e| panic!("{name}: {e}"));
        let on_tract = LoadOptions::default().prepare(&model).unwrap_or_else(|e| panic!("{name}: {e}"));
        let far = furthest(&on_ort, &on_tract);
        // onnxruntime rounds the input of a product whose weights alone are quantised; else one number of many may be
        // rounded to the other side.
        let bound = if name.contains("weights") { 3e-2 } else { 1e-3 };
        assert!(far < bound, "{name}: {far}");
    }
}

#[test]
fn quantised_models_are_rewritten_from_what_they_mean() {
    let exported = LoadOptions::default().prepare(&Model::load(fixture(EXPORT)).unwrap()).unwrap();
    for (name, form) in FORMS {
        let model = quantised(form);
        let rewriting = Rewriting::new(model.clone(), options()).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(rewriting.encoder.layers.len(), 2, "{name}");
        let teacher = LoadOptions::default().prepare(&rewriting.teacher).unwrap();
        let far = furthest(&exported, &teacher);
        // The weights alone are rounded.
        let bound = if name.contains("int4") { 0.3 } else { 0.02 };
        assert!(far < bound, "{name}: {far}");
        let dequantises = rewriting.approximate().unwrap().outcomes.iter().any(|o| o.pass == Pass::Dequantise);
        assert_eq!(dequantises, mabert_graph::is_quantised(&model), "{name}");
    }
}

#[test]
fn the_job_says_how_far_the_teacher_is_from_the_model_as_it_came() {
    let job = Job::default().max_seq(MAX_SEQ).hidden(8).calibration_tokens(2_000);
    let (student, report) = rewrite(quantised(around), &job, &Silent).unwrap();
    let dequantised = report.dequantised.unwrap();
    // Two maps of the head are in the form too.
    assert_eq!(dequantised.operators, 3 * 12);
    let distance = &dequantised.outputs[0];
    assert!(distance.mean_abs > 0.0 && distance.mean_abs < 0.1, "{distance:?}");
    assert!(!mabert_graph::is_quantised(&student) && report.operators_before.contains_key("QuantizeLinear"));
    // A range that is a hundred times too small cuts everything off.
    let mut broken = quantised(around);
    let scales: Vec<String> =
        broken.graph().initializer.iter().map(|t| t.name.clone()).filter(|n| n.ends_with("/xs")).collect();
    scales.iter().for_each(|name| broken.set_constant(name, &Tensor::scalar(12f32 / 25_500.0)));
    let refused = rewrite(broken, &job, &Silent).unwrap_err().to_string();
    assert!(refused.contains("it is quantised, and the rounding of its inner values changes `logits`"), "{refused}");
}

/// Quantisers leave a ReLU out where integers below zero are cut off: without the roundings it is needed.
#[test]
fn a_relu_that_a_quantiser_left_to_saturation_comes_back() {
    let mut model = Model::load(fixture("coverage/bert-none-torchscript-14-relu.onnx")).unwrap();
    let original = model.clone();
    let nodes = std::mem::take(&mut model.graph_mut().node);
    let mut q = Quantiser { nodes: Vec::new(), constants: Vec::new(), prefix: String::new() };
    let is_layers = |node: &NodeProto| node.is("Relu");
    assert!(nodes.iter().filter(|n| is_layers(n)).count() == 2);
    for node in nodes {
        if !is_layers(&node) {
            q.nodes.push(node);
            continue;
        }
        q.prefix.clone_from(&node.output[0]);
        let (scale, zero) = (q.constant("s", &Tensor::scalar(0.02f32)), q.constant("z", &Tensor::scalar(0u8)));
        let x = q.op("QuantizeLinear", &[&node.input[0], &scale, &zero]);
        q.node("", "DequantizeLinear", &[&x, &scale, &zero], &[&node.output[0]]);
    }
    model.graph_mut().node = q.nodes;
    model.graph_mut().initializer.extend(q.constants);
    mabert_graph::dequantise(&mut model, Rounding::Dropped).unwrap();
    assert_eq!(model.operators().get("Relu"), Some(&2));
    let [a, b] = [&original, &model].map(|m| LoadOptions::default().prepare(m).unwrap());
    assert_eq!(furthest(&a, &b), 0.0);
}

/// Weights of bfloat16 behind casts, and models of it throughout, are those of the rounded weights.
#[test]
fn bfloat16_is_read_as_single_precision() {
    // The upper half of a single's bits, the rest cut off.
    let short = |v: f32| (v.to_bits() >> 16) as u16;
    let cut = |values: &Tensor| values.to_f32().mapv(|v| f32::from_bits(u32::from(short(v)) << 16));
    let original = Model::load(fixture(EXPORT)).unwrap();
    let weights: Vec<String> =
        original.graph().initializer.iter().filter(|t| t.data_type == 1).map(|t| t.name.clone()).collect();
    let mut reference = original.clone();
    let (mut behind_casts, mut throughout) = (original.clone(), original.clone());
    for name in &weights {
        let value = cut(&original.constant(name).unwrap());
        reference.set_constant(name, &Tensor::from(value.clone()));
        let raw_data = value.iter().flat_map(|&v| short(v).to_le_bytes()).collect();
        let dims = value.shape().iter().map(|&d| d as i64).collect();
        let data_type = DataType::BFLOAT16 as i32;
        let held = TensorProto { name: name.clone(), data_type, dims, raw_data, ..TensorProto::default() };
        for model in [&mut behind_casts, &mut throughout] {
            let slot = model.graph_mut().initializer.iter_mut().find(|t| t.name == *name).unwrap();
            slot.clone_from(&held);
        }
        let graph = behind_casts.graph_mut();
        graph.initializer.iter_mut().find(|t| t.name == *name).unwrap().name = format!("{name}/short");
        let cast = mabert_graph::cast_node(&format!("{name}/short"), name, mabert_graph::ElementType::F32);
        graph.node.insert(0, cast);
    }
    for node in throughout.graph_mut().node.iter_mut().filter(|n| n.is("Cast")) {
        node.attribute.iter_mut().filter(|a| a.i == 1).for_each(|a| a.i = i64::from(DataType::BFLOAT16 as i32));
    }
    let expected = LoadOptions::default().prepare(&reference).unwrap();
    for model in [behind_casts, throughout] {
        let teacher = Rewriting::new(model.clone(), options()).unwrap().teacher;
        for model in [&model, &teacher] {
            let far = furthest(&expected, &LoadOptions::default().prepare(model).unwrap());
            assert!(far < 1e-4, "{far}");
        }
    }
}

//! How a model is written: every attribute with its value, and weights straight from where they are.
//!
//! ONNX is proto2, where a zero can be written, and an attribute's type says which field holds its value. The generated code
//! is that of proto3, which leaves zeros and empty text out; strict readers then find an attribute without a value. Here
//! these fields are written as unknown ones, which look the same, and only on the way out: what is read again has none.

use std::borrow::Cow;
use std::io::{Error, Result, Write};

use onnx_protobuf::attribute_proto::AttributeType;
use onnx_protobuf::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto};
use protobuf::rt::{compute_raw_varint64_size, tag_size, write_message_field_with_cached_size};
use protobuf::{CodedOutputStream, Message};

/// The largest message that protobuf reads, in bytes.
pub(crate) const LARGEST: u64 = i32::MAX as u64;

/// The numbers of fields in `onnx.proto`.
mod field {
    pub(super) const MODEL_GRAPH: u32 = 7;
    pub(super) const GRAPH_NODE: u32 = 1;
    pub(super) const GRAPH_INITIALIZER: u32 = 5;
    pub(super) const ATTRIBUTE_FLOAT: u32 = 2;
    pub(super) const ATTRIBUTE_INT: u32 = 3;
    pub(super) const ATTRIBUTE_TEXT: u32 = 4;
}

/// Writes `proto`.
///
/// # Errors
/// `out` fails, or the message is larger than protobuf's 2 GiB.
pub(crate) fn write(proto: &ModelProto, out: &mut dyn Write) -> Result<()> {
    Pieces::new(proto)?.write(CodedOutputStream::new(out))
}

/// The bytes of `proto`.
///
/// # Errors
/// The message is larger than protobuf's 2 GiB.
pub(crate) fn to_bytes(proto: &ModelProto) -> Result<Vec<u8>> {
    let pieces = Pieces::new(proto)?;
    let mut bytes = Vec::with_capacity(pieces.size as usize);
    pieces.write(CodedOutputStream::vec(&mut bytes))?;
    Ok(bytes)
}

/// A model as it is written: nodes whose attributes lack a field are copied, other nodes and all initializers are not.
struct Pieces<'m> {
    /// All but the graph.
    model: ModelProto,
    /// All but nodes and initializers.
    graph: GraphProto,
    nodes: Vec<Cow<'m, NodeProto>>,
    initializers: &'m [TensorProto],
    /// Bytes of the graph.
    graph_size: u64,
    /// Bytes of the model.
    size: u64,
}

impl<'m> Pieces<'m> {
    /// Computes the sizes of all messages too, which protobuf keeps in them until they are written.
    fn new(proto: &'m ModelProto) -> Result<Self> {
        let mut model = without_graph(proto);
        for function in &mut model.functions {
            function.attribute_proto.iter_mut().for_each(state_value);
            function.node.iter_mut().for_each(state_values);
        }
        for training in &mut model.training_info {
            let graphs = [training.initialization.as_mut(), training.algorithm.as_mut()];
            graphs.into_iter().flatten().for_each(state_values_of_graph);
        }
        let graph = without_nodes(&proto.graph);
        let nodes: Vec<Cow<'_, NodeProto>> = proto.graph.node.iter().map(stated).collect();
        let initializers = proto.graph.initializer.as_slice();
        let graph_size = graph.compute_size()
            + nodes.iter().map(|node| field_size(field::GRAPH_NODE, node.as_ref())).sum::<u64>()
            + initializers.iter().map(|tensor| field_size(field::GRAPH_INITIALIZER, tensor)).sum::<u64>();
        let size = model.compute_size() + sized(field::MODEL_GRAPH, graph_size);
        if size > LARGEST {
            return Err(Error::other(format!("{size} bytes, more than protobuf's 2 GiB")));
        }
        Ok(Self { model, graph, nodes, initializers, graph_size, size })
    }

    fn write(&self, mut out: CodedOutputStream<'_>) -> Result<()> {
        self.model.write_to_with_cached_sizes(&mut out)?;
        out.write_tag(field::MODEL_GRAPH, protobuf::rt::WireType::LengthDelimited)?;
        out.write_raw_varint64(self.graph_size)?;
        self.graph.write_to_with_cached_sizes(&mut out)?;
        for node in &self.nodes {
            write_message_field_with_cached_size(field::GRAPH_NODE, node.as_ref(), &mut out)?;
        }
        for tensor in self.initializers {
            write_message_field_with_cached_size(field::GRAPH_INITIALIZER, tensor, &mut out)?;
        }
        Ok(out.flush()?)
    }
}

/// Bytes of a message in a field.
fn field_size(number: u32, message: &impl Message) -> u64 {
    sized(number, message.compute_size())
}

/// Bytes of a field that holds so many.
fn sized(number: u32, bytes: u64) -> u64 {
    tag_size(number) + compute_raw_varint64_size(bytes) + bytes
}

/// A node with the values of all its attributes, copied only where one is missing.
fn stated(node: &NodeProto) -> Cow<'_, NodeProto> {
    if !node.attribute.iter().any(lacks_value) {
        return Cow::Borrowed(node);
    }
    let mut node = node.clone();
    state_values(&mut node);
    Cow::Owned(node)
}

/// Whether the generated code would leave the value of an attribute out, or that of one in its graphs.
fn lacks_value(attribute: &AttributeProto) -> bool {
    let mut graphs = attribute.g.as_ref().into_iter().chain(&attribute.graphs);
    is_left_out(attribute) || graphs.any(|graph| graph.node.iter().any(|node| node.attribute.iter().any(lacks_value)))
}

fn is_left_out(attribute: &AttributeProto) -> bool {
    // What refers to an attribute of a function has no value of its own.
    attribute.ref_attr_name.is_empty()
        && match attribute.type_.enum_value() {
            Ok(AttributeType::INT) => attribute.i == 0,
            Ok(AttributeType::FLOAT) => attribute.f == 0.0,
            Ok(AttributeType::STRING) => attribute.s.is_empty(),
            _ => false,
        }
}

fn state_values_of_graph(graph: &mut GraphProto) {
    graph.node.iter_mut().for_each(state_values);
}

fn state_values(node: &mut NodeProto) {
    node.attribute.iter_mut().for_each(state_value);
}

fn state_value(attribute: &mut AttributeProto) {
    if is_left_out(attribute) {
        let unknown = attribute.special_fields.mut_unknown_fields();
        match attribute.type_.enum_value() {
            Ok(AttributeType::INT) => unknown.add_varint(field::ATTRIBUTE_INT, 0),
            // Its sign too: minus zero is zero to the generated code.
            Ok(AttributeType::FLOAT) => unknown.add_fixed32(field::ATTRIBUTE_FLOAT, attribute.f.to_bits()),
            Ok(AttributeType::STRING) => unknown.add_length_delimited(field::ATTRIBUTE_TEXT, Vec::new()),
            _ => {}
        }
    }
    attribute.g.as_mut().into_iter().chain(&mut attribute.graphs).for_each(state_values_of_graph);
}

/// A copy of the message in which the data of the initializers that `is_stripped` names is left out, never copied.
pub(crate) fn without_data(proto: &ModelProto, is_stripped: impl Fn(&TensorProto) -> bool) -> ModelProto {
    let light_tensor = |t: &TensorProto| {
        if !is_stripped(t) {
            return t.clone();
        }
        TensorProto {
            dims: t.dims.clone(),
            data_type: t.data_type,
            name: t.name.clone(),
            doc_string: t.doc_string.clone(),
            metadata_props: t.metadata_props.clone(),
            special_fields: t.special_fields.clone(),
            ..TensorProto::default()
        }
    };
    let graph = GraphProto {
        node: proto.graph.node.clone(),
        initializer: proto.graph.initializer.iter().map(light_tensor).collect(),
        ..without_nodes(&proto.graph)
    };
    ModelProto { graph: Some(graph).into(), ..without_graph(proto) }
}

fn without_nodes(graph: &GraphProto) -> GraphProto {
    GraphProto {
        node: Vec::new(),
        name: graph.name.clone(),
        initializer: Vec::new(),
        sparse_initializer: graph.sparse_initializer.clone(),
        doc_string: graph.doc_string.clone(),
        input: graph.input.clone(),
        output: graph.output.clone(),
        value_info: graph.value_info.clone(),
        quantization_annotation: graph.quantization_annotation.clone(),
        metadata_props: graph.metadata_props.clone(),
        special_fields: graph.special_fields.clone(),
    }
}

fn without_graph(proto: &ModelProto) -> ModelProto {
    ModelProto {
        ir_version: proto.ir_version,
        opset_import: proto.opset_import.clone(),
        producer_name: proto.producer_name.clone(),
        producer_version: proto.producer_version.clone(),
        domain: proto.domain.clone(),
        model_version: proto.model_version,
        doc_string: proto.doc_string.clone(),
        graph: None.into(),
        metadata_props: proto.metadata_props.clone(),
        training_info: proto.training_info.clone(),
        functions: proto.functions.clone(),
        special_fields: proto.special_fields.clone(),
    }
}

#[cfg(test)]
mod tests {
    use onnx_protobuf::{FunctionProto, TrainingInfoProto};

    use super::*;
    use crate::{Builder, ElementType, Model, Tensor, attribute};

    /// A field as it stands in the bytes: its number, and what it holds as far as it is of known length.
    type Field<'b> = (u64, &'b [u8]);

    fn number(bytes: &mut &[u8]) -> u64 {
        let mut value = 0;
        for place in 0.. {
            let (first, rest) = bytes.split_first().unwrap();
            *bytes = rest;
            value |= u64::from(first & 0x7f) << (7 * place);
            if *first < 0x80 {
                break;
            }
        }
        value
    }

    /// The fields of a message, decoded by hand.
    fn fields(mut bytes: &[u8]) -> Vec<Field<'_>> {
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let tag = number(&mut bytes);
            let length = match tag & 7 {
                0 => bytes.iter().position(|byte| *byte < 0x80).unwrap() + 1,
                1 => 8,
                2 => number(&mut bytes) as usize,
                5 => 4,
                other => panic!("wire type {other}"),
            };
            let (value, rest) = bytes.split_at(length);
            fields.push((tag >> 3, value));
            bytes = rest;
        }
        fields
    }

    /// What a message holds in the fields along a path of their numbers.
    fn at<'b>(bytes: &'b [u8], path: &[u64]) -> Vec<&'b [u8]> {
        let Some((first, rest)) = path.split_first() else { return vec![bytes] };
        fields(bytes).into_iter().filter(|field| field.0 == *first).flat_map(|field| at(field.1, rest)).collect()
    }

    /// The attributes of a node that the generated code leaves without a value, and one that has one.
    fn attributes() -> Vec<AttributeProto> {
        vec![
            attribute::int("axis", 0),
            attribute::float("alpha", 0.0),
            attribute::float("beta", -0.0),
            attribute::text("mode", ""),
            attribute::int("to", 1),
            attribute::ints("perm", &[0]),
        ]
    }

    /// The number of the field that an attribute's value must be in, and its bytes, by the attribute's name.
    const VALUES: [(&[u8], u64, &[u8]); 6] = [
        (b"axis", 3, &[0]),
        (b"alpha", 2, &[0, 0, 0, 0]),
        (b"beta", 2, &[0, 0, 0, 0x80]),
        (b"mode", 4, &[]),
        (b"to", 3, &[1]),
        (b"perm", 8, &[0]),
    ];

    fn assert_stated(written: &[&[u8]]) {
        for (name, field, value) in VALUES {
            let named: Vec<&&[u8]> = written.iter().filter(|bytes| at(bytes, &[1]) == [name]).collect();
            assert!(!named.is_empty(), "{name:?}");
            for bytes in named {
                assert_eq!(at(bytes, &[field]), [value], "{:?}", String::from_utf8_lossy(name));
            }
        }
    }

    fn node() -> NodeProto {
        NodeProto {
            op_type: "Any".to_owned(),
            output: vec!["y".to_owned()],
            attribute: attributes(),
            ..Default::default()
        }
    }

    /// A model with such attributes wherever attributes can be.
    fn model() -> Model {
        let nested = GraphProto { node: vec![node()], name: "nested".to_owned(), ..Default::default() };
        let branch = |name: &str| AttributeProto {
            name: name.to_owned(),
            type_: AttributeType::GRAPH.into(),
            g: Some(nested.clone()).into(),
            ..Default::default()
        };
        let several = AttributeProto {
            name: "several".to_owned(),
            type_: AttributeType::GRAPHS.into(),
            graphs: vec![nested.clone()],
            ..Default::default()
        };
        let b = Builder::new(17, "test");
        let x = b.input("x", ElementType::F32, &["n"]);
        let weight = b.constant("w", &Tensor::new(&[600], vec![0.5f32; 600]));
        let y = b.op("Any", &[x, weight], attributes()).named("y");
        let mut model = b.model(&[b.op("If", &[y], vec![branch("then_branch"), several])]);
        model.proto_mut().functions = vec![FunctionProto {
            name: "F".to_owned(),
            node: vec![node()],
            attribute_proto: attributes(),
            ..Default::default()
        }];
        model.proto_mut().training_info =
            vec![TrainingInfoProto { algorithm: Some(nested).into(), ..Default::default() }];
        model
    }

    #[test]
    fn every_attribute_is_written_with_its_value() {
        let model = model();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.onnx");
        let mut outside = model.clone();
        outside.keep_data_outside();
        let saved = |model: &Model| {
            model.save(&path).unwrap();
            assert!(Model::load(&path).unwrap().proto() == model.proto(), "what is read again is the same");
            std::fs::read(&path).unwrap()
        };
        for bytes in [saved(&model), saved(&outside), model.to_bytes().unwrap()] {
            let places: [&[u64]; 6] = [
                &[7, 1, 5],           // the graph's nodes
                &[7, 1, 5, 6, 1, 5],  // those of a graph in an attribute
                &[7, 1, 5, 11, 1, 5], // and of several
                &[25, 7, 5],          // those of a function
                &[25, 11],            // a function's defaults
                &[20, 2, 1, 5],       // those of a training graph
            ];
            for path in places {
                assert_stated(&at(&bytes, path));
            }
        }
        let read = Model::from_bytes(&model.to_bytes().unwrap()).unwrap();
        assert!(read.proto() == model.proto(), "what is read again is the same");
        assert!(read.graph().node[0].attribute[2].f.is_sign_negative());
    }

    #[test]
    fn what_refers_to_an_attribute_has_no_value() {
        let mut model = model();
        let mut reference = attribute::int("axis", 0);
        reference.ref_attr_name = "other".to_owned();
        model.proto_mut().functions[0].node[0].attribute = vec![reference];
        let bytes = model.to_bytes().unwrap();
        let written = at(&bytes, &[25, 7, 5]);
        assert_eq!(written.len(), 1);
        assert_eq!(at(written[0], &[21]), [b"other"]);
        assert!(at(written[0], &[3]).is_empty());
    }
}

//! What is checked of a model's bytes before protobuf reads them.
//!
//! protobuf 3.4.0, which `onnx-protobuf` needs, follows groups (an encoding that ONNX has never used) into each other without
//! a limit, so that two bytes a level overflow the stack (RUSTSEC-2024-0437). No file with a group where a message has
//! its fields reaches it.

use std::io::{BufRead, ErrorKind, Seek};

use crate::Error;

/// The messages of ONNX that hold others.
#[derive(Clone, Copy)]
enum Message {
    Model,
    Graph,
    Node,
    Attribute,
    Function,
    Training,
    Tensor,
    SparseTensor,
    ValueInfo,
    Annotation,
    Type,
    /// Of tensors and of sparse tensors.
    TensorType,
    /// Of sequences, optional values and maps: a type in field 1 or 2.
    Container,
    Shape,
    /// Whatever holds none.
    Leaf,
}

/// The message in a field, by its number in `onnx.proto`; `None` for text, bytes, packed numbers and unknown fields.
fn message(holder: Message, field: u32) -> Option<Message> {
    use Message::*;
    Some(match (holder, field) {
        (Model, 7) => Graph,
        (Model, 8 | 14) => Leaf,
        (Model, 20) => Training,
        (Model, 25) => Function,
        (Graph, 1) => Node,
        (Graph, 5) => Tensor,
        (Graph, 11..=13) => ValueInfo,
        (Graph, 14) => Annotation,
        (Graph, 15) => SparseTensor,
        (Graph, 16) => Leaf,
        (Node, 5) => Attribute,
        (Node, 9) => Leaf,
        (Attribute, 5 | 10) => Tensor,
        (Attribute, 6 | 11) => Graph,
        (Attribute, 14 | 15) => Type,
        (Attribute, 22 | 23) => SparseTensor,
        (Function, 7) => Node,
        (Function, 9 | 14) => Leaf,
        (Function, 11) => Attribute,
        (Function, 12) => ValueInfo,
        (Training, 1 | 2) => Graph,
        (Training, 3 | 4) => Leaf,
        (Tensor, 3 | 13 | 16) => Leaf,
        (SparseTensor, 1 | 2) => Tensor,
        (ValueInfo, 2) => Type,
        (ValueInfo, 4) => Leaf,
        (Annotation, 2) => Leaf,
        (Type, 1 | 8) => TensorType,
        (Type, 4 | 5 | 9) => Container,
        (TensorType, 2) => Shape,
        (Container, 1 | 2) => Type,
        (Shape, 1) => Leaf,
        _ => return None,
    })
}

/// Refuses bytes with a group anywhere that protobuf would look for one, or that are not protobuf at all; `bytes` is then at
/// its end. Bytes that end too early pass: protobuf says so itself.
pub(crate) fn check(origin: &str, bytes: &mut (impl BufRead + Seek)) -> crate::Result<()> {
    let refused = |reason: String| Error::NotOnnx { origin: origin.to_owned(), reason };
    let mut reader = Reader { bytes, at: 0 };
    let mut open = vec![(Message::Model, u64::MAX)];
    while let Some(&(holder, end)) = open.last() {
        if reader.at >= end {
            open.pop();
            continue;
        }
        let at = reader.at;
        let malformed = |fault: &str| refused(format!("{fault} at byte {at}"));
        let result = (|| {
            let tag = u32::try_from(reader.number()?).map_err(|_| ErrorKind::InvalidData)?;
            match tag & 7 {
                0 => _ = reader.number()?,
                1 => reader.skip(8)?,
                5 => reader.skip(4)?,
                2 => {
                    let length = reader.number()?;
                    if length > end.saturating_sub(reader.at) || length > i64::MAX as u64 {
                        return Err(ErrorKind::InvalidData.into());
                    }
                    match message(holder, tag >> 3) {
                        Some(inner) => open.push((inner, reader.at + length)),
                        None => reader.skip(length as i64)?,
                    }
                }
                3 => return Err(ErrorKind::Unsupported.into()),
                _ => return Err(ErrorKind::InvalidData.into()),
            }
            Ok::<_, std::io::Error>(())
        })();
        match result.map_err(|e| e.kind()) {
            Ok(()) => {}
            Err(ErrorKind::UnexpectedEof) => return Ok(()),
            Err(ErrorKind::Unsupported) => return Err(malformed("a group, which ONNX does not have,")),
            Err(ErrorKind::InvalidData) => return Err(malformed("a malformed field")),
            Err(kind) => return Err(refused(kind.to_string())),
        }
    }
    Ok(())
}

struct Reader<'r, R> {
    bytes: &'r mut R,
    at: u64,
}

impl<R: BufRead + Seek> Reader<'_, R> {
    /// A number of at most 64 bits, seven to a byte.
    fn number(&mut self) -> std::io::Result<u64> {
        let mut value = 0;
        for place in 0..10 {
            let mut byte = [0];
            self.bytes.read_exact(&mut byte)?;
            self.at += 1;
            value |= u64::from(byte[0] & 0x7f) << (7 * place);
            if byte[0] < 0x80 {
                return Ok(value);
            }
        }
        Err(ErrorKind::InvalidData.into())
    }

    fn skip(&mut self, count: i64) -> std::io::Result<()> {
        self.at += count as u64;
        self.bytes.seek_relative(count)
    }
}

#[cfg(test)]
mod tests {
    use onnx_protobuf::{
        AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, SparseTensorProto,
        StringStringEntryProto, TensorAnnotation, TensorProto, TensorShapeProto, TrainingInfoProto, TypeProto,
        ValueInfoProto, tensor_proto, tensor_shape_proto, type_proto,
    };
    use protobuf::{Message as _, MessageField};

    use super::check;

    fn checked(bytes: &[u8]) -> crate::Result<()> {
        check("test", &mut std::io::Cursor::new(bytes))
    }

    /// A model with every message that ONNX has in every field that holds one, each with an unknown field 100 of value 804:
    /// bytes `A0 06 A4 06`, which a changed bit makes an empty group.
    fn everything() -> Vec<u8> {
        macro_rules! marked {
            ($kind:ident { $($field:ident: $value:expr),* $(,)? }) => {{
                let mut message = $kind { $($field: $value,)* ..Default::default() };
                message.special_fields.mut_unknown_fields().add_varint(100, 804);
                message
            }};
        }
        macro_rules! one {
            ($kind:ident { $($rest:tt)* }) => { MessageField::some(marked!($kind { $($rest)* })) };
        }
        use tensor_proto::Segment;
        use type_proto::{Map, Optional, Sequence, SparseTensor, Tensor, Value};
        let leaf = || vec![marked!(StringStringEntryProto {})];
        let opset = || vec![marked!(OperatorSetIdProto {})];
        let tensor =
            || marked!(TensorProto { segment: one!(Segment {}), external_data: leaf(), metadata_props: leaf() });
        let sparse = || {
            marked!(SparseTensorProto { values: MessageField::some(tensor()), indices: MessageField::some(tensor()) })
        };
        let shape = || {
            use tensor_shape_proto::Dimension;
            one!(TensorShapeProto { dim: vec![marked!(Dimension {})] })
        };
        let of = |value: Value| marked!(TypeProto { value: Some(value) });
        let plain = || MessageField::some(of(Value::TensorType(marked!(Tensor { shape: shape() }))));
        let types = || {
            vec![
                of(Value::SequenceType(marked!(Sequence { elem_type: plain() }))),
                of(Value::MapType(marked!(Map { value_type: plain() }))),
                of(Value::OptionalType(marked!(Optional { elem_type: plain() }))),
                of(Value::SparseTensorType(marked!(SparseTensor { shape: shape() }))),
            ]
        };
        let info = || vec![marked!(ValueInfoProto { type_: plain(), metadata_props: leaf() })];
        let small = || marked!(GraphProto { initializer: vec![tensor()] });
        let attribute = || {
            vec![marked!(AttributeProto {
                t: MessageField::some(tensor()),
                g: MessageField::some(small()),
                sparse_tensor: MessageField::some(sparse()),
                tp: plain(),
                tensors: vec![tensor()],
                graphs: vec![small()],
                sparse_tensors: vec![sparse()],
                type_protos: types(),
            })]
        };
        let node = || vec![marked!(NodeProto { attribute: attribute(), metadata_props: leaf() })];
        let graph = || {
            one!(GraphProto {
                node: node(),
                initializer: vec![tensor()],
                sparse_initializer: vec![sparse()],
                input: info(),
                output: info(),
                value_info: info(),
                quantization_annotation: vec![marked!(TensorAnnotation { quant_parameter_tensor_names: leaf() })],
                metadata_props: leaf(),
            })
        };
        let model = marked!(ModelProto {
            opset_import: opset(),
            graph: graph(),
            metadata_props: leaf(),
            training_info: vec![marked!(TrainingInfoProto {
                initialization: graph(),
                algorithm: graph(),
                initialization_binding: leaf(),
                update_binding: leaf(),
            })],
            functions: vec![marked!(FunctionProto {
                node: node(),
                opset_import: opset(),
                attribute_proto: attribute(),
                value_info: info(),
                metadata_props: leaf(),
            })],
        });
        model.write_to_bytes().unwrap()
    }

    #[test]
    fn a_group_in_any_message_is_refused() {
        let bytes = everything();
        checked(&bytes).unwrap();
        let marks: Vec<usize> = (0..bytes.len() - 3).filter(|&at| bytes[at..at + 4] == [0xa0, 6, 0xa4, 6]).collect();
        assert!(marks.len() > 300, "{}", marks.len());
        for at in marks {
            let mut grouped = bytes.clone();
            grouped[at] |= 3;
            assert!(ModelProto::parse_from_bytes(&grouped).is_ok(), "protobuf follows the group at {at}");
            let error = checked(&grouped).unwrap_err().to_string();
            assert!(error.contains(&format!("a group, which ONNX does not have, at byte {at}")), "{error}");
        }
    }

    #[test]
    fn what_is_not_protobuf_is_refused_and_what_ends_early_is_left_to_protobuf() {
        let bytes = everything();
        for end in 0..bytes.len() {
            checked(&bytes[..end]).unwrap();
        }
        for (bytes, at) in [
            (vec![0x0f], 0),                         // no such wire type
            (vec![8, 1, 0x0c], 2),                   // the end of no group
            (vec![0xff; 12], 0),                     // a tag of too many bytes
            (vec![0xf8, 0xff, 0xff, 0xff, 0x7f], 0), // a tag beyond 32 bits
            (vec![0x3a, 2, 0x0a, 1, 0], 2),          // a node that is longer than its graph
        ] {
            let error = checked(&bytes).unwrap_err().to_string();
            assert!(error.contains(&format!("a malformed field at byte {at}")), "{error}");
        }
    }
}

//! Constants of types that this project does not compute with, as files keep them: what a model of low precision holds.

use half::bf16;
use ndarray::{ArrayD, IxDyn};
use onnx_protobuf::TensorProto;
use onnx_protobuf::tensor_proto::{DataLocation, DataType};

use crate::tensor::checked_shape;
use crate::{ElementType, Error, Result, Tensor};

/// A type of numbers that is read, and computed with as `f32`.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Stored {
    Bf16,
    I16,
    U16,
    U32,
    /// Two to a byte, the first in its low half.
    I4,
    U4,
}

impl Stored {
    const ALL: [(Self, DataType); 6] = [
        (Self::Bf16, DataType::BFLOAT16),
        (Self::I16, DataType::INT16),
        (Self::U16, DataType::UINT16),
        (Self::U32, DataType::UINT32),
        (Self::I4, DataType::INT4),
        (Self::U4, DataType::UINT4),
    ];

    fn from_onnx(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|(_, onnx)| *onnx as i32 == code).map(|(stored, _)| stored)
    }

    fn bytes(self, count: usize) -> Option<usize> {
        match self {
            Self::I4 | Self::U4 => Some(count.div_ceil(2)),
            Self::U32 => count.checked_mul(4),
            Self::Bf16 | Self::I16 | Self::U16 => count.checked_mul(2),
        }
    }

    /// `count` elements out of the bytes that hold them.
    fn values(self, bytes: &[u8], count: usize) -> Vec<f32> {
        let pairs = bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        match self {
            Self::Bf16 => pairs.map(|bits| bf16::from_bits(bits).to_f32()).collect(),
            Self::I16 => pairs.map(|bits| f32::from(bits as i16)).collect(),
            Self::U16 => pairs.map(f32::from).collect(),
            Self::U32 => bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as f32).collect(),
            Self::I4 => halves(bytes, count).map(|half| f32::from(((half << 4) as i8) >> 4)).collect(),
            Self::U4 => halves(bytes, count).map(f32::from).collect(),
        }
    }
}

/// Numbers of four bits, the low half of a byte first.
fn halves(bytes: &[u8], count: usize) -> impl Iterator<Item = u8> + '_ {
    bytes.iter().flat_map(|byte| [byte & 15, byte >> 4]).take(count)
}

/// How many bytes `count` elements of a type take, where its numbers can be read.
pub(crate) fn stored_bytes(data_type: i32, count: usize) -> Option<usize> {
    match ElementType::from_onnx(data_type) {
        Some(element) => count.checked_mul(element.size()),
        None => Stored::from_onnx(data_type)?.bytes(count),
    }
}

/// A constant of any type of numbers as `f32`.
///
/// # Errors
/// Its data does not fill its shape, or its type is none of numbers that are read.
pub(crate) fn to_single(proto: &TensorProto) -> Result<ArrayD<f32>> {
    let Some(stored) = Stored::from_onnx(proto.data_type) else {
        return Ok(Tensor::from_proto(proto)?.to_f32());
    };
    let name = proto.name.as_str();
    if proto.data_location.enum_value() == Ok(DataLocation::EXTERNAL) {
        return Err(Error::tensor(name, "its external data was not loaded"));
    }
    let (shape, count) = checked_shape(proto)?;
    // Small integers may stand in the fields of larger ones; those of four bits two at a time, as in bytes.
    let typed: Vec<u8> = match stored {
        Stored::U32 => proto.uint64_data.iter().flat_map(|&v| (v as u32).to_le_bytes()).collect(),
        Stored::I4 | Stored::U4 => proto.int32_data.iter().map(|&v| v as u8).collect(),
        _ => proto.int32_data.iter().flat_map(|&v| (v as u16).to_le_bytes()).collect(),
    };
    let bytes = if proto.raw_data.is_empty() { &typed } else { &proto.raw_data };
    if stored.bytes(count) != Some(bytes.len()) {
        let held = bytes.len();
        let reason = format!("shape {shape:?} needs {count} elements of {stored:?}, its data holds {held} bytes");
        return Err(Error::tensor(name, reason));
    }
    let values = stored.values(bytes, count);
    ArrayD::from_shape_vec(IxDyn(&shape), values).map_err(|e| Error::tensor(name, e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_of_every_stored_type_are_read() {
        let proto = |data_type: DataType, dims: &[i64], raw: &[u8]| TensorProto {
            dims: dims.to_vec(),
            data_type: data_type as i32,
            raw_data: raw.to_vec(),
            ..TensorProto::default()
        };
        let read = |proto: &TensorProto| to_single(proto).unwrap().into_raw_vec_and_offset().0;
        assert_eq!(read(&proto(DataType::BFLOAT16, &[2], &[0xc0, 0x3f, 0x00, 0xc0])), [1.5, -2.0]);
        assert_eq!(read(&proto(DataType::INT16, &[1], &[0xfe, 0xff])), [-2.0]);
        assert_eq!(read(&proto(DataType::UINT16, &[1], &[0xfe, 0xff])), [65_534.0]);
        assert_eq!(read(&proto(DataType::INT4, &[3], &[0xf7, 0x08])), [7.0, -1.0, -8.0]);
        assert_eq!(read(&proto(DataType::UINT4, &[2, 2], &[0xf7, 0x08])), [7.0, 15.0, 8.0, 0.0]);
        assert_eq!(read(&proto(DataType::UINT32, &[1], &[0, 0, 1, 0])), [65_536.0]);
        let mut typed = proto(DataType::BFLOAT16, &[2], &[]);
        typed.int32_data = vec![0x3fc0, 0xc000];
        assert_eq!(read(&typed), [1.5, -2.0]);
        assert!(to_single(&proto(DataType::INT4, &[3], &[0])).unwrap_err().to_string().contains("needs 3 elements"));
        assert_eq!(
            [(4, 3), (21, 3), (16, 3), (1, 3), (8, 3)].map(|(t, n)| stored_bytes(t, n)),
            [Some(6), Some(2), Some(6), Some(12), None]
        );
    }
}

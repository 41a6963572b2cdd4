//! Typed arrays: the constants of a model, and the values that flow through it.

use half::f16;
use ndarray::{ArrayD, ArrayViewD, IxDyn};
use onnx_protobuf::TensorProto;
use onnx_protobuf::tensor_proto::{DataLocation, DataType};

use crate::{Error, Result};

macro_rules! element_types {
    ($($variant:ident $rust:ty, $onnx:ident, $name:literal;)*) => {
        /// The type of a tensor's elements.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum ElementType {
            $(#[doc = $name] $variant,)*
        }

        impl ElementType {
            /// The short name, as printed in text forms and messages.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// ONNX's number for the type.
            pub fn onnx(self) -> i32 {
                match self { $(Self::$variant => DataType::$onnx as i32,)* }
            }

            /// The type with ONNX's number `code`, where this project handles it.
            pub fn from_onnx(code: i32) -> Option<Self> {
                $(if code == DataType::$onnx as i32 { return Some(Self::$variant); })*
                None
            }

            /// Bytes per element.
            pub fn size(self) -> usize {
                match self { $(Self::$variant => size_of::<$rust>(),)* }
            }
        }

        /// A dense array of any rank.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Tensor {
            $(#[doc = $name] $variant(ArrayD<$rust>),)*
        }

        impl Tensor {
            /// The sizes of the axes.
            pub fn shape(&self) -> &[usize] {
                match self { $(Self::$variant(a) => a.shape(),)* }
            }

            /// The type of the elements.
            pub fn element_type(&self) -> ElementType {
                match self { $(Self::$variant(_) => ElementType::$variant,)* }
            }

            /// The same elements, in row-major order, under another shape; `None` where the counts differ.
            pub fn reshaped(self, shape: &[usize]) -> Option<Self> {
                if shape.iter().product::<usize>() != self.len() { return None; }
                Some(match self {
                    $(Self::$variant(a) => {
                        let values = a.as_standard_layout().into_owned();
                        Self::$variant(values.into_shape_with_order(IxDyn(shape)).ok()?)
                    })*
                })
            }

            /// All elements converted to `f32`.
            pub fn to_f32(&self) -> ArrayD<f32> {
                match self { $(Self::$variant(a) => a.mapv(|x| <$rust as Element>::to_f64(x) as f32),)* }
            }

            /// The elements in row-major order, the lowest byte of each first.
            pub fn to_le_bytes(&self) -> Vec<u8> {
                match self {
                    $(Self::$variant(a) => a.iter().flat_map(|x| <$rust as Element>::to_le(*x)).collect(),)*
                }
            }
        }

        $(impl From<ArrayD<$rust>> for Tensor {
            fn from(array: ArrayD<$rust>) -> Self { Self::$variant(array) }
        })*
    };
}

element_types! {
    F32 f32, FLOAT, "f32";
    F64 f64, DOUBLE, "f64";
    F16 f16, FLOAT16, "f16";
    I64 i64, INT64, "i64";
    I32 i32, INT32, "i32";
    I8 i8, INT8, "i8";
    U8 u8, UINT8, "u8";
    Bool bool, BOOL, "bool";
}

impl std::fmt::Display for ElementType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// The largest absolute difference of values in pairs; a NaN on either side counts as infinitely far, which `f32::max`
/// alone would drop.
pub fn largest_difference<'a>(a: impl IntoIterator<Item = &'a f32>, b: impl IntoIterator<Item = &'a f32>) -> f32 {
    let pairs = a.into_iter().zip(b).map(|(x, y)| (x - y).abs());
    pairs.fold(0.0, |largest, d| if d.is_nan() { f32::INFINITY } else { largest.max(d) })
}

trait Element: Copy {
    fn to_f64(self) -> f64;
    fn to_le(self) -> impl IntoIterator<Item = u8>;
    fn from_le(bytes: &[u8]) -> Self;
}

macro_rules! numeric_element {
    ($($t:ty),*) => {$(
        impl Element for $t {
            fn to_f64(self) -> f64 { self as f64 }
            fn to_le(self) -> impl IntoIterator<Item = u8> { self.to_le_bytes() }
            fn from_le(bytes: &[u8]) -> Self { Self::from_le_bytes(bytes.try_into().expect("one element's bytes")) }
        }
    )*};
}
numeric_element!(f32, f64, i64, i32, i8, u8);

impl Element for f16 {
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    fn to_le(self) -> impl IntoIterator<Item = u8> {
        self.to_le_bytes()
    }
    fn from_le(bytes: &[u8]) -> Self {
        Self::from_le_bytes(bytes.try_into().expect("two bytes"))
    }
}

impl Element for bool {
    fn to_f64(self) -> f64 {
        f64::from(u8::from(self))
    }
    fn to_le(self) -> impl IntoIterator<Item = u8> {
        [u8::from(self)]
    }
    fn from_le(bytes: &[u8]) -> Self {
        bytes[0] != 0
    }
}

impl Tensor {
    /// A tensor of `shape` from row-major elements; the counts must agree.
    pub fn new<T>(shape: &[usize], elements: Vec<T>) -> Self
    where
        Self: From<ArrayD<T>>,
    {
        let array = ArrayD::from_shape_vec(IxDyn(shape), elements).expect("as many elements as the shape holds");
        Self::from(array)
    }

    /// A tensor of rank 0.
    pub fn scalar<T>(value: T) -> Self
    where
        Self: From<ArrayD<T>>,
    {
        Self::new(&[], vec![value])
    }

    /// A vector of `i64`, as shapes and axes are given.
    pub fn ints(values: &[i64]) -> Self {
        Self::new(&[values.len()], values.to_vec())
    }

    /// How many elements it holds.
    pub fn len(&self) -> usize {
        self.shape().iter().product()
    }

    /// Whether it holds no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The `f32` array inside, if it is one.
    pub fn as_f32(&self) -> Option<ArrayViewD<'_, f32>> {
        match self {
            Self::F32(a) => Some(a.view()),
            _ => None,
        }
    }

    /// The largest absolute difference to `other`; infinite where the shapes differ or a NaN is on either side.
    pub fn largest_difference(&self, other: &Self) -> f32 {
        if self.shape() != other.shape() {
            return f32::INFINITY;
        }
        largest_difference(&self.to_f32(), &other.to_f32())
    }

    /// The elements as integers, if they are of an integer or Boolean type.
    pub fn to_i64(&self) -> Option<ArrayD<i64>> {
        Some(match self {
            Self::I64(a) => a.clone(),
            Self::I32(a) => a.mapv(i64::from),
            Self::I8(a) => a.mapv(i64::from),
            Self::U8(a) => a.mapv(i64::from),
            Self::Bool(a) => a.mapv(i64::from),
            Self::F32(_) | Self::F64(_) | Self::F16(_) => return None,
        })
    }

    /// Whether a constant's data fills its shape; nothing is copied. Returns its type and shape.
    ///
    /// # Errors
    /// A type that this project does not handle, negative dimensions, or data that does not fill the shape.
    pub fn check(proto: &TensorProto) -> Result<(ElementType, Vec<usize>)> {
        let name = proto.name.as_str();
        let Some(element) = ElementType::from_onnx(proto.data_type) else {
            return Err(Error::tensor(name, format!("element type {} is not supported", proto.data_type)));
        };
        if proto.data_location.enum_value() == Ok(DataLocation::EXTERNAL) {
            return Err(Error::tensor(name, "its external data was not loaded"));
        }
        let (shape, count) = checked_shape(proto)?;
        let (held, fills) = match proto.raw_data.len() {
            0 if count > 0 => {
                let held = match element {
                    ElementType::F32 => proto.float_data.len(),
                    ElementType::F64 => proto.double_data.len(),
                    ElementType::I64 => proto.int64_data.len(),
                    _ => proto.int32_data.len(),
                };
                (held, held == count)
            }
            bytes => (bytes / element.size(), count.checked_mul(element.size()) == Some(bytes)),
        };
        match fills {
            true => Ok((element, shape)),
            false => Err(Error::tensor(
                name,
                format!("shape {shape:?} needs {count} elements of {element}, its data holds {held}"),
            )),
        }
    }

    /// Reads a constant out of its message.
    ///
    /// # Errors
    /// As those of [`check`](Self::check).
    pub fn from_proto(proto: &TensorProto) -> Result<Self> {
        let (element, shape) = Self::check(proto)?;
        if !proto.raw_data.is_empty() || shape.contains(&0) {
            return Ok(Self::from_le_bytes(element, &shape, &proto.raw_data));
        }
        let int32 = &proto.int32_data;
        Ok(match element {
            ElementType::F32 => Self::new(&shape, proto.float_data.clone()),
            ElementType::F64 => Self::new(&shape, proto.double_data.clone()),
            ElementType::I64 => Self::new(&shape, proto.int64_data.clone()),
            ElementType::I32 => Self::new(&shape, int32.clone()),
            ElementType::I8 => Self::new(&shape, int32.iter().map(|&x| x as i8).collect()),
            ElementType::U8 => Self::new(&shape, int32.iter().map(|&x| x as u8).collect()),
            ElementType::Bool => Self::new(&shape, int32.iter().map(|&x| x != 0).collect()),
            // The specification keeps the sixteen bits of a half in the low bits of an int32.
            ElementType::F16 => Self::new(&shape, int32.iter().map(|&x| f16::from_bits(x as u16)).collect()),
        })
    }

    /// A tensor of what [`to_le_bytes`](Self::to_le_bytes) gives; as many bytes as the shape holds.
    pub fn from_le_bytes(element: ElementType, shape: &[usize], bytes: &[u8]) -> Self {
        fn read<T: Element>(shape: &[usize], bytes: &[u8]) -> Tensor
        where
            Tensor: From<ArrayD<T>>,
        {
            Tensor::new(shape, bytes.chunks_exact(size_of::<T>()).map(T::from_le).collect())
        }
        match element {
            ElementType::F32 => read::<f32>(shape, bytes),
            ElementType::F64 => read::<f64>(shape, bytes),
            ElementType::F16 => read::<f16>(shape, bytes),
            ElementType::I64 => read::<i64>(shape, bytes),
            ElementType::I32 => read::<i32>(shape, bytes),
            ElementType::I8 => read::<i8>(shape, bytes),
            ElementType::U8 => read::<u8>(shape, bytes),
            ElementType::Bool => read::<bool>(shape, bytes),
        }
    }

    /// The message of a constant called `name`, its data in `raw_data`.
    pub fn to_proto(&self, name: &str) -> TensorProto {
        TensorProto {
            name: name.to_owned(),
            data_type: self.element_type().onnx(),
            dims: self.shape().iter().map(|&d| d as i64).collect(),
            raw_data: self.to_le_bytes(),
            ..TensorProto::default()
        }
    }
}

/// The shape of a constant and its element count, refused where a dimension is negative or the count overflows: that of the
/// axes that are not empty too, as ndarray asks.
pub(crate) fn checked_shape(proto: &TensorProto) -> Result<(Vec<usize>, usize)> {
    let shape: Option<Vec<usize>> = proto.dims.iter().map(|&d| usize::try_from(d).ok()).collect();
    let product = |shape: &[usize]| {
        let product = shape.iter().filter(|&&d| d > 0).try_fold(1usize, |n, &d| n.checked_mul(d))?;
        isize::try_from(product).ok().map(|_| if shape.contains(&0) { 0 } else { product })
    };
    let count = shape.as_deref().and_then(product);
    match (shape, count) {
        (Some(shape), Some(count)) => Ok((shape, count)),
        _ => Err(Error::tensor(&proto.name, format!("impossible shape {:?}", proto.dims))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_type_survives_the_message() {
        let shape = [2, 2];
        let tensors = [
            Tensor::new(&shape, vec![1.5f32, -0.0, f32::MIN, 3e-40]),
            Tensor::new(&shape, vec![1.5f64, -2.0, 1e300, 0.1]),
            Tensor::new(&shape, [1.5f32, -2.0, 6e4, 0.1].map(f16::from_f32).to_vec()),
            Tensor::new(&shape, vec![i64::MIN, -1, 0, i64::MAX]),
            Tensor::new(&shape, vec![i32::MIN, -1, 0, i32::MAX]),
            Tensor::new(&shape, vec![-128i8, -1, 0, 127]),
            Tensor::new(&shape, vec![0u8, 1, 128, 255]),
            Tensor::new(&shape, vec![true, false, false, true]),
        ];
        for tensor in tensors {
            assert_eq!(Tensor::from_proto(&tensor.to_proto("t")).unwrap(), tensor);
        }
    }

    #[test]
    fn shapes_that_overflow_are_refused() {
        for dims in
            [vec![-1, 2], vec![1 << 40, 1 << 40], vec![0, 1 << 40, 1 << 40], vec![1 << 62, 2], vec![1 << 62, 2, 0]]
        {
            let proto = TensorProto { dims, data_type: ElementType::F32.onnx(), ..TensorProto::default() };
            let reason = Tensor::from_proto(&proto).unwrap_err().to_string();
            assert!(reason.contains("impossible shape"), "{reason}");
        }
        let empty = TensorProto { dims: vec![0, 7], data_type: ElementType::F32.onnx(), ..TensorProto::default() };
        assert_eq!(Tensor::from_proto(&empty).unwrap().shape(), [0, 7]);
    }

    #[test]
    fn typed_fields_are_read_too() {
        let mut proto = TensorProto { dims: vec![2], ..TensorProto::default() };
        proto.data_type = ElementType::F16.onnx();
        proto.int32_data = vec![0x3c00, 0xc000];
        let read = Tensor::from_proto(&proto).unwrap();
        assert_eq!(read.to_f32().as_slice().unwrap(), [1.0, -2.0]);
    }

    #[test]
    fn data_that_does_not_fill_the_shape_is_refused() {
        let mut proto = Tensor::new(&[3], vec![1f32, 2.0, 3.0]).to_proto("w");
        proto.dims = vec![4];
        let message = Tensor::from_proto(&proto).unwrap_err().to_string();
        assert!(message.contains("`w`") && message.contains("needs 4 elements"), "{message}");
        proto.dims = vec![i64::MAX, i64::MAX];
        assert!(Tensor::from_proto(&proto).unwrap_err().to_string().contains("impossible shape"));
    }
}

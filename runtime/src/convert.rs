//! Between this project's models and tensors and tract's.

use mabert_graph::proto::Message as _;
use mabert_graph::{Model as Graph, Tensor};
use prost::Message as _;
use tract_onnx::pb;
use tract_onnx::prelude::{Datum, Tensor as TractTensor};

use crate::{Error, Result};

/// tract's own message of the model. It is encoded without the constants' values, decoded with `prost`, and the values are
/// moved in directly: weights are never in memory twice on the way, and there is no limit of 2 GiB.
pub(crate) fn message(graph: &mut Graph) -> Result<pb::ModelProto> {
    let constants = &mut graph.graph_mut().initializer;
    let values: Vec<Vec<u8>> = constants.iter_mut().map(|tensor| std::mem::take(&mut tensor.raw_data)).collect();
    let bytes = graph.proto().write_to_bytes().map_err(|e| Error::tract(e.to_string()))?;
    let mut message = pb::ModelProto::decode(bytes.as_slice()).map_err(Error::tract)?;
    for (tensor, values) in message.graph.iter_mut().flat_map(|g| &mut g.initializer).zip(values) {
        tensor.raw_data = values;
    }
    Ok(message)
}

/// A tensor as tract holds it.
pub(crate) fn to_tract(tensor: &Tensor) -> TractTensor {
    match tensor {
        Tensor::F32(a) => a.clone().into(),
        Tensor::F64(a) => a.clone().into(),
        Tensor::F16(a) => a.clone().into(),
        Tensor::I64(a) => a.clone().into(),
        Tensor::I32(a) => a.clone().into(),
        Tensor::I8(a) => a.clone().into(),
        Tensor::U8(a) => a.clone().into(),
        Tensor::Bool(a) => a.clone().into(),
    }
}

/// A tensor as this project holds it. tract computes shapes in its own dimension type, which is read as `i64`.
pub(crate) fn from_tract(tensor: &TractTensor) -> Result<Tensor> {
    use tract_onnx::prelude::{DatumType, TDim};
    fn owned<T: Datum>(tensor: &TractTensor) -> Result<ndarray::ArrayD<T>> {
        Ok(tensor.to_plain_array_view::<T>().map_err(Error::tract)?.to_owned())
    }
    Ok(match tensor.datum_type() {
        DatumType::F32 => owned::<f32>(tensor)?.into(),
        DatumType::F64 => owned::<f64>(tensor)?.into(),
        DatumType::F16 => owned::<half::f16>(tensor)?.into(),
        DatumType::I64 => owned::<i64>(tensor)?.into(),
        DatumType::I32 => owned::<i32>(tensor)?.into(),
        DatumType::I8 => owned::<i8>(tensor)?.into(),
        DatumType::U8 => owned::<u8>(tensor)?.into(),
        DatumType::Bool => owned::<bool>(tensor)?.into(),
        other if other == TDim::datum_type() => {
            let cast = tensor.cast_to::<i64>().map_err(Error::tract)?;
            owned::<i64>(&cast)?.into()
        }
        other => return Err(Error::tract(format!("a value of type {other:?} cannot be read"))),
    })
}

//! Between this project's models and tensors and tract's.

use std::collections::HashSet;
use std::sync::Arc;

use mabert_graph::proto::{Message as _, TensorProto};
use mabert_graph::{Boundary, ElementType, Model as Graph, NodeExt as _, Tensor};
use prost::Message as _;
use tract_core::ops::konst::Const;
use tract_onnx::pb;
use tract_onnx::prelude::{Datum, InferenceModel, Tensor as TractTensor, TractResult, TypedFact};

use crate::{Error, Result, memory};

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

/// Constants of fewer bytes stay in the message: tract needs shapes and the like when it reads the graph.
const WEIGHT: usize = 1 << 16;

/// Takes large constants of `f32` out of the graph, where they become inputs: tract copies what it reads, and one at a time is
/// less than all of them. [`put_weight`] puts each back.
pub(crate) fn take_weights(graph: &mut Graph) -> Vec<TensorProto> {
    // Subgraphs capture values by name: such models keep their constants where they are.
    if graph.graph().node.iter().any(|node| !node.subgraphs().is_empty()) {
        return Vec::new();
    }
    let outputs: HashSet<String> = graph.graph().output.iter().map(|o| o.name.clone()).collect();
    let graph = graph.graph_mut();
    let declared: HashSet<String> = graph.input.iter().map(|i| i.name.clone()).collect();
    let is_weight = |t: &TensorProto| {
        let known = declared.contains(&t.name) || outputs.contains(&t.name);
        t.raw_data.len() >= WEIGHT && t.data_type == ElementType::F32.onnx() && !known
    };
    let all = std::mem::take(&mut graph.initializer);
    let (weights, others): (Vec<TensorProto>, _) = all.into_iter().partition(is_weight);
    graph.initializer = others;
    graph.input.extend(weights.iter().map(|t| {
        let dims: Vec<usize> = t.dims.iter().map(|&d| usize::try_from(d).unwrap_or(0)).collect();
        Boundary::fixed(&t.name, ElementType::F32, &dims).declared()
    }));
    weights
}

/// Makes the input that stands for `weight` a constant of `model`.
pub(crate) fn put_weight(model: &mut InferenceModel, weight: TensorProto) -> Result<()> {
    let (_, shape) = Tensor::check(&weight)?;
    let tensor = Arc::new(memory::from_le_bytes(&shape, &weight.raw_data).map_err(Error::tract)?);
    let place = || -> TractResult<()> {
        let id = model.node_by_name(&weight.name)?.id;
        let node = model.node_mut(id);
        node.outputs[0].fact = TypedFact::try_from(tensor.clone())?.into();
        node.op = Box::new(Const::new(tensor)?);
        model.inputs.retain(|input| input.node != id);
        Ok(())
    };
    place().map_err(Error::tract)
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

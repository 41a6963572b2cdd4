//! How a model's bytes become a message: checked before protobuf reads them, and after.

use std::io::{BufRead, Seek};

use onnx_protobuf::ModelProto;
use protobuf::Message as _;

use crate::{Error, Result, foreign, wire};

/// Reads a message from the start of `bytes`.
pub(crate) fn decode(origin: &str, bytes: &mut (impl BufRead + Seek)) -> Result<ModelProto> {
    read(origin, bytes).map_err(|fault| match foreign::recognised(bytes) {
        Some(what) => Error::Foreign { origin: origin.to_owned(), what },
        None => fault,
    })
}

fn read(origin: &str, bytes: &mut (impl BufRead + Seek)) -> Result<ModelProto> {
    let fault = |reason: String| Error::NotOnnx { origin: origin.to_owned(), reason };
    wire::check(origin, bytes)?;
    bytes.rewind().map_err(|e| fault(e.to_string()))?;
    let proto = ModelProto::parse_from_reader(bytes).map_err(|e| fault(e.to_string()))?;
    check_message(origin, &proto)?;
    Ok(proto)
}

/// Random bytes can decode as a message of unknown fields: a model has a version, an operator set and a graph.
pub(crate) fn check_message(origin: &str, proto: &ModelProto) -> Result<()> {
    let fault = |reason: &str| Err(Error::NotOnnx { origin: origin.to_owned(), reason: reason.to_owned() });
    if *proto == ModelProto::default() {
        return fault("it is empty");
    }
    let Some(graph) = proto.graph.as_ref() else { return fault("it holds no graph") };
    if proto.ir_version <= 0 {
        return fault("it states no IR version");
    }
    if proto.opset_import.is_empty() {
        return fault("it states no operator set");
    }
    if graph.output.is_empty() {
        return fault("its graph has no output");
    }
    Ok(())
}

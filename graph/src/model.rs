//! A model: its message, where it came from, and how it is read and written.

use std::collections::{BTreeMap, HashSet};
use std::io::{BufReader, Cursor, Read as _};
use std::path::{Path, PathBuf};

use onnx_protobuf::{GraphProto, ModelProto, StringStringEntryProto, TensorProto};

use crate::external::{self, Storage};
use crate::files::write_atomically;
use crate::node::is_standard;
use crate::{Error, NodeExt, Result, Tensor, TensorType, decode, encode, foreign, order};

/// An ONNX model, all of its constants in memory.
#[derive(Clone, Debug)]
pub struct Model {
    proto: ModelProto,
    storage: Storage,
    origin: String,
}

impl Model {
    /// Reads a model and the external data that it names.
    ///
    /// # Errors
    /// The file or its external data is missing, truncated, or not ONNX; or nodes depend on each other in a circle.
    pub fn load(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let unreadable = |source| Error::Read { path: path.to_owned(), source };
        let file = std::fs::File::open(path).map_err(unreadable)?;
        let kind = file.metadata().map_err(unreadable)?.file_type();
        if kind.is_dir() {
            return Err(Error::Foreign { origin: path.display().to_string(), what: foreign::folder(path) });
        }
        let origin = path.display().to_string();
        let proto = if kind.is_file() {
            // Read as it comes: the file is never in memory beside the message. Not mapped either: a file that is cut short
            // under a map ends the process.
            decode::decode(&origin, &mut BufReader::new(file))?
        } else {
            // A pipe can be read once only.
            let mut bytes = Vec::new();
            file.take(encode::LARGEST + 1).read_to_end(&mut bytes).map_err(unreadable)?;
            decode::decode(&origin, &mut Cursor::new(bytes))?
        };
        let folder = path.parent().map_or_else(PathBuf::new, Path::to_owned);
        Self::complete(origin, proto, |proto| external::load(proto, &folder))
    }

    /// Reads a model that has no external data.
    ///
    /// # Errors
    /// The bytes are not ONNX, or refer to external data; or nodes depend on each other in a circle.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        let origin = "<bytes>".to_owned();
        let proto = decode::decode(&origin, &mut Cursor::new(bytes))?;
        Self::complete(origin, proto, external::refuse)
    }

    /// Wraps a message made in memory.
    ///
    /// # Errors
    /// The message has no graph, or refers to external data; or nodes depend on each other in a circle.
    pub fn from_proto(proto: ModelProto) -> Result<Self> {
        let origin = "<memory>".to_owned();
        decode::check_message(&origin, &proto)?;
        Self::complete(origin, proto, external::refuse)
    }

    /// A message with its external data, in an order in which it can be computed.
    fn complete(
        origin: String,
        mut proto: ModelProto,
        data: impl FnOnce(&mut ModelProto) -> Result<Storage>,
    ) -> Result<Self> {
        let storage = data(&mut proto).and_then(|storage| order::sort_model(&mut proto).map(|()| storage));
        let storage = storage.map_err(|e| e.in_model(&origin))?;
        Ok(Self { proto, storage, origin })
    }

    /// Writes the model to a temporary file beside `path` and renames it: `path` is either the old model or the new one,
    /// whole. A model that was read with external data, or that would exceed protobuf's 2 GiB, keeps its large constants in
    /// `<file name>.data` beside it; where another model's data has that name already, in `<file name>.2.data` and so on,
    /// and what the old model at `path` kept in such a file is removed once the new one is there.
    ///
    /// # Errors
    /// The folder or the file cannot be written.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let write = |proto: &ModelProto| write_atomically(path, |file| encode::write(proto, file));
        if self.storage != Storage::Outside && !external::must_be_outside(&self.proto) {
            let old = external::OldData::beside(path);
            write(&self.proto)?;
            old.remove(None);
            return Ok(());
        }
        let (proto, data) = external::write(&self.proto, path)?;
        let old = external::OldData::beside(path);
        match write(&proto) {
            Ok(()) => old.remove(Some(&data)),
            Err(e) => {
                // Nothing refers to it.
                _ = std::fs::remove_file(&data);
                return Err(e);
            }
        }
        Ok(())
    }

    /// Keeps large constants in a file of their own when saved, whatever the model came as.
    pub fn keep_data_outside(&mut self) {
        self.storage = Storage::Outside;
    }

    /// The bytes of the model, everything inside.
    ///
    /// # Errors
    /// The model is larger than protobuf's 2 GiB.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        encode::to_bytes(&self.proto).map_err(|e| Error::Graph(e.to_string()).in_model(&self.origin))
    }

    /// The file that the model was read from, for messages; in angle brackets what it was made from instead.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// The whole message.
    pub fn proto(&self) -> &ModelProto {
        &self.proto
    }

    /// The whole message, to be changed.
    pub fn proto_mut(&mut self) -> &mut ModelProto {
        &mut self.proto
    }

    /// The main graph.
    pub fn graph(&self) -> &GraphProto {
        self.proto.graph.as_ref().expect("checked when the model was read")
    }

    /// The main graph, to be changed.
    pub fn graph_mut(&mut self) -> &mut GraphProto {
        self.proto.graph.as_mut().expect("checked when the model was read")
    }

    /// The version of the standard operator set.
    pub fn opset(&self) -> i64 {
        self.proto.opset_import.iter().find(|o| is_standard(&o.domain)).map_or(1, |o| o.version)
    }

    /// The inputs that a caller must give: graph inputs without an initializer.
    pub fn inputs(&self) -> Vec<TensorType> {
        let graph = self.graph();
        let initialised = |name: &str| graph.initializer.iter().any(|t| t.name == name);
        graph.input.iter().filter(|i| !initialised(&i.name)).map(TensorType::declared).collect()
    }

    /// The outputs of the graph.
    pub fn outputs(&self) -> Vec<TensorType> {
        self.graph().output.iter().map(TensorType::declared).collect()
    }

    /// Every name that a value of the main graph has: inputs, constants and what nodes compute.
    pub fn value_names(&self) -> HashSet<String> {
        let graph = self.graph();
        let sources = graph.input.iter().map(|i| &i.name).chain(graph.initializer.iter().map(|t| &t.name));
        sources.chain(graph.node.iter().flat_map(|n| &n.output)).cloned().collect()
    }

    /// The message of an initializer.
    pub fn initializer(&self, name: &str) -> Option<&TensorProto> {
        self.graph().initializer.iter().find(|t| t.name == name)
    }

    /// An initializer's value.
    ///
    /// # Errors
    /// There is none of that name, or its data does not fit its shape.
    pub fn constant(&self, name: &str) -> Result<Tensor> {
        let proto = self.initializer(name).ok_or_else(|| Error::tensor(name, "no such initializer"));
        proto.and_then(Tensor::from_proto).map_err(|e| e.in_model(&self.origin))
    }

    /// Replaces or adds an initializer.
    pub fn set_constant(&mut self, name: &str, value: &Tensor) {
        let proto = value.to_proto(name);
        let initializers = &mut self.graph_mut().initializer;
        match initializers.iter_mut().find(|t| t.name == name) {
            Some(slot) => *slot = proto,
            None => initializers.push(proto),
        }
    }

    /// An entry of the model's `metadata_props`.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.proto.metadata_props.iter().find(|p| p.key == key).map(|p| p.value.as_str())
    }

    /// Sets an entry of the model's `metadata_props`.
    pub fn set_metadata(&mut self, key: &str, value: &str) {
        self.proto.metadata_props.retain(|p| p.key != key);
        let entry = StringStringEntryProto { key: key.to_owned(), value: value.to_owned(), ..Default::default() };
        self.proto.metadata_props.push(entry);
    }

    /// How often each operator occurs, subgraphs included; operators outside the standard domain with their domain.
    pub fn operators(&self) -> BTreeMap<String, usize> {
        fn count(graph: &GraphProto, into: &mut BTreeMap<String, usize>) {
            for node in &graph.node {
                let standard = node.is(&node.op_type);
                let name = if standard { node.op_type.clone() } else { format!("{}.{}", node.domain, node.op_type) };
                *into.entry(name).or_default() += 1;
                node.subgraphs().into_iter().for_each(|g| count(g, into));
            }
        }
        let mut counts = BTreeMap::new();
        count(self.graph(), &mut counts);
        counts
    }
}

//! Constants kept outside the model's file: <https://onnx.ai/onnx/repo-docs/ExternalData.html>.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Component, Path, PathBuf};

use onnx_protobuf::tensor_proto::DataLocation;
use onnx_protobuf::{AttributeProto, GraphProto, ModelProto, StringStringEntryProto, TensorProto};

use crate::decode::decode;
use crate::encode::without_data;
use crate::files::temporary_beside;
use crate::foreign;
use crate::stored::stored_bytes;
use crate::tensor::checked_shape;
use crate::{Error, Result};

/// Where a model's large constants are kept when it is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Storage {
    Inside,
    Outside,
}

/// Constants below this many bytes stay inside the model's file, as exporters do.
const SMALLEST_OUTSIDE: usize = 1024;
/// Offsets that readers can memory-map.
const ALIGNMENT: u64 = 4096;
/// Protobuf refuses messages above 2 GiB; the rest of the message gets what is left.
const LARGEST_INSIDE: usize = (1 << 31) - (64 << 20);

/// Reads every external constant into memory.
pub(crate) fn load(proto: &mut ModelProto, folder: &Path) -> Result<Storage> {
    let mut files = HashMap::new();
    let mut storage = Storage::Inside;
    for_each_tensor(proto, &mut |tensor| {
        if tensor.data_location.enum_value() == Ok(DataLocation::EXTERNAL) {
            storage = Storage::Outside;
            load_tensor(tensor, folder, &mut files)?;
        }
        Ok(())
    })?;
    Ok(storage)
}

/// Models without a folder cannot have external constants.
pub(crate) fn refuse(proto: &mut ModelProto) -> Result<Storage> {
    for_each_tensor(proto, &mut |tensor| match tensor.data_location.enum_value() {
        Ok(DataLocation::EXTERNAL) => {
            Err(fault(tensor, "the model was given as bytes; load it from its file, beside its data"))
        }
        _ => Ok(()),
    })?;
    Ok(Storage::Inside)
}

/// Where a tensor's data lies, relative to the model's folder.
fn location(tensor: &TensorProto) -> Result<&str> {
    let location = entry(tensor, "location").unwrap_or_default();
    let inside_folder = Path::new(location).components().all(|c| matches!(c, Component::Normal(_) | Component::CurDir));
    if location.is_empty() || !inside_folder {
        return Err(fault(tensor, "the location must be a file in the model's own folder"));
    }
    Ok(location)
}

fn load_tensor(tensor: &mut TensorProto, folder: &Path, files: &mut HashMap<String, File>) -> Result<()> {
    let location = location(tensor)?.to_owned();
    let number = |key: &str| -> Result<Option<u64>> {
        let parse = |text: &str| text.parse().map_err(|_| fault(tensor, format!("its {key} `{text}` is not a number")));
        entry(tensor, key).map(parse).transpose()
    };
    let (shape, count) = checked_shape(tensor)?;
    let Some(size) = stored_bytes(tensor.data_type, count) else {
        return Err(fault(tensor, format!("element type {} is not supported", tensor.data_type)));
    };
    let size = size as u64;
    let offset = number("offset")?.unwrap_or(0);
    if let Some(length) = number("length")?
        && length != size
    {
        return Err(fault(tensor, format!("length {length}, but shape {shape:?} needs {size} bytes")));
    }
    if !files.contains_key(&location) {
        let path = folder.join(&location);
        // Asked before it is opened: whoever opens a pipe waits for the other end.
        let kind = std::fs::metadata(&path).map(|about| about.file_type());
        let open = match kind {
            Ok(kind) if !kind.is_file() => return Err(fault(tensor, format!("{} is not a file", path.display()))),
            Ok(_) => File::open(&path),
            Err(e) => Err(e),
        };
        let open = open.map_err(|e| fault(tensor, format!("{}: {e}", path.display())))?;
        files.insert(location.clone(), open);
    }
    let file = files.get_mut(&location).expect("inserted above");
    let held = file.metadata().map_err(|e| fault(tensor, e.to_string()))?.len();
    // Checked before the buffer is made: a wrong header must not ask for more memory than the file holds.
    if offset.checked_add(size).is_none_or(|end| end > held) {
        if let Some(what) = foreign::recognised(file) {
            return Err(fault(tensor, format!("it is {what}")));
        }
        return Err(fault(tensor, format!("bytes {offset} to {offset}+{size} of a file of {held} bytes: truncated?")));
    }
    let mut data = vec![0; size as usize];
    let read = file.seek(SeekFrom::Start(offset)).and_then(|_| file.read_exact(&mut data));
    read.map_err(|e| fault(tensor, e.to_string()))?;
    tensor.raw_data = data;
    tensor.external_data.clear();
    tensor.data_location = DataLocation::DEFAULT.into();
    Ok(())
}

/// Whether the constants alone pass what one protobuf file can hold.
pub(crate) fn must_be_outside(proto: &ModelProto) -> bool {
    proto.graph.initializer.iter().map(|t| t.raw_data.len()).sum::<usize>() > LARGEST_INSIDE
}

/// The data file that goes with a model's file, the first of its kind or another.
fn data_path(model: &Path, number: usize) -> PathBuf {
    let mut name = model.file_name().unwrap_or_default().to_owned();
    name.push(if number == 1 { ".data".to_owned() } else { format!(".{number}.data") });
    model.with_file_name(name)
}

/// The files beside the model at `path` that hold its external data, in the order in which it names them, each once. The
/// model itself says what they are called: exporters choose different names. Their data is not read, nor is a model that is
/// no file: what comes out of a pipe comes once, and its data lies nowhere.
///
/// # Errors
/// The model cannot be read, is not ONNX, or names a file outside its own folder.
pub fn data_files(path: impl AsRef<Path>) -> Result<Vec<PathBuf>> {
    let path = path.as_ref();
    let unreadable = |source| Error::Read { path: path.to_owned(), source };
    if !std::fs::metadata(path).map_err(unreadable)?.is_file() {
        return Ok(Vec::new());
    }
    let file = File::open(path).map_err(unreadable)?;
    let mut proto = decode(&path.display().to_string(), &mut BufReader::new(file))?;
    let mut files: Vec<PathBuf> = Vec::new();
    for_each_tensor(&mut proto, &mut |tensor| {
        if tensor.data_location.enum_value() == Ok(DataLocation::EXTERNAL) {
            let file = path.with_file_name(location(tensor)?);
            if !files.contains(&file) {
                files.push(file);
            }
        }
        Ok(())
    })
    .map_err(|e| e.in_model(&path.display().to_string()))?;
    Ok(files)
}

/// Whether a file has a name as this program gives to the data of the model at `model`.
pub fn is_own_data_name(file: &Path, model: &Path) -> bool {
    let [name, model] = [file, model].map(|p| p.file_name().unwrap_or_default().to_string_lossy());
    let number = name.strip_prefix(&*model).and_then(|rest| rest.strip_suffix(".data"));
    number
        .is_some_and(|number| number.is_empty() || number.strip_prefix('.').is_some_and(|n| n.parse::<usize>().is_ok()))
}

/// Data files of the model that is at a path now which have [names of this program's](is_own_data_name): they go when the
/// model is overwritten.
pub fn own_data_files(model: &Path) -> Vec<PathBuf> {
    // Most models have none: then they need not be read. Whatever else lies there is about to be overwritten.
    let any = (1..4).any(|number| data_path(model, number).exists());
    let files = if any { data_files(model).unwrap_or_default() } else { Vec::new() };
    files.into_iter().filter(|file| is_own_data_name(file, model)).collect()
}

/// Data files of the model that is at a path before it is overwritten.
pub(crate) struct OldData(Vec<PathBuf>);

impl OldData {
    /// Those that this program would have named so.
    pub(crate) fn beside(model: &Path) -> Self {
        Self(own_data_files(model))
    }

    /// Removes them, but for what the new model refers to. One that cannot be removed is only in the way.
    pub(crate) fn remove(self, new: Option<&Path>) {
        for path in self.0.iter().filter(|path| Some(path.as_path()) != new) {
            _ = std::fs::remove_file(path);
        }
    }
}

/// Writes the large constants to a new file beside `model`; returns the message that refers to them, and the file.
pub(crate) fn write(proto: &ModelProto, model: &Path) -> Result<(ModelProto, PathBuf)> {
    let outside = |t: &TensorProto| t.raw_data.len() >= SMALLEST_OUTSIDE;
    let attempt = || -> std::io::Result<(PathBuf, Vec<u64>)> {
        let mut offsets = Vec::new();
        let mut temporary = temporary_beside(model, |file| {
            let mut at = 0u64;
            for whole in proto.graph.initializer.iter().filter(|t| outside(t)) {
                let padding = at.next_multiple_of(ALIGNMENT) - at;
                file.write_all(&vec![0; padding as usize])?;
                at += padding;
                file.write_all(&whole.raw_data)?;
                offsets.push(at);
                at += whole.raw_data.len() as u64;
            }
            Ok(())
        })?;
        // Who may read the model that is there may read its data.
        if let Some(old) = std::fs::metadata(model).ok().filter(std::fs::Metadata::is_file) {
            temporary.as_file().set_permissions(old.permissions())?;
        }
        // The name must be free: the model that is there now may read the file that has it.
        for number in 1.. {
            let path = data_path(model, number);
            match temporary.persist_noclobber(&path) {
                Ok(_) => return Ok((path, offsets)),
                Err(e) if e.error.kind() == std::io::ErrorKind::AlreadyExists => temporary = e.file,
                Err(e) => return Err(e.error),
            }
        }
        unreachable!("some number is free")
    };
    let (path, offsets) = attempt().map_err(|source| Error::Write { path: data_path(model, 1), source })?;
    let location = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut light = without_data(proto, outside);
    let kept = light.graph.as_mut().expect("copied from a model that has one").initializer.iter_mut();
    let moved = kept.zip(&proto.graph.initializer).filter(|(_, whole)| outside(whole));
    for ((kept, whole), at) in moved.zip(offsets) {
        let facts =
            [("location", location.clone()), ("offset", at.to_string()), ("length", whole.raw_data.len().to_string())];
        kept.external_data = facts.into_iter().map(|(k, v)| key_value(k, v)).collect();
        kept.data_location = DataLocation::EXTERNAL.into();
    }
    Ok((light, path))
}

fn key_value(key: &str, value: String) -> StringStringEntryProto {
    StringStringEntryProto { key: key.to_owned(), value, ..Default::default() }
}

fn entry<'t>(tensor: &'t TensorProto, key: &str) -> Option<&'t str> {
    tensor.external_data.iter().find(|e| e.key == key).map(|e| e.value.as_str())
}

fn fault(tensor: &TensorProto, reason: impl Into<String>) -> Error {
    Error::ExternalData {
        tensor: tensor.name.clone(),
        location: entry(tensor, "location").unwrap_or_default().to_owned(),
        reason: reason.into(),
    }
}

type Visit<'v> = dyn FnMut(&mut TensorProto) -> Result<()> + 'v;

fn for_each_tensor(proto: &mut ModelProto, visit: &mut Visit) -> Result<()> {
    if let Some(graph) = proto.graph.as_mut() {
        graph_tensors(graph, visit)?;
    }
    for node in proto.functions.iter_mut().flat_map(|f| &mut f.node) {
        node.attribute.iter_mut().try_for_each(|a| attribute_tensors(a, visit))?;
    }
    Ok(())
}

fn graph_tensors(graph: &mut GraphProto, visit: &mut Visit) -> Result<()> {
    graph.initializer.iter_mut().try_for_each(&mut *visit)?;
    for node in &mut graph.node {
        node.attribute.iter_mut().try_for_each(|a| attribute_tensors(a, visit))?;
    }
    Ok(())
}

fn attribute_tensors(attribute: &mut AttributeProto, visit: &mut Visit) -> Result<()> {
    if let Some(tensor) = attribute.t.as_mut() {
        visit(tensor)?;
    }
    attribute.tensors.iter_mut().try_for_each(&mut *visit)?;
    if let Some(graph) = attribute.g.as_mut() {
        graph_tensors(graph, visit)?;
    }
    attribute.graphs.iter_mut().try_for_each(|g| graph_tensors(g, visit))
}

//! Named arrays in numpy's `.npz` files, as `numpy.savez` and `numpy.savez_compressed` write them.

mod header;

use std::fs::File;
use std::io::{BufReader, Cursor, Read, Seek, Write as _};
use std::path::{Path, PathBuf};

use mabert_graph::{Tensor, TensorType};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

use self::header::Header;
use crate::{Error, Named, Result};

/// Bytes that are asked for at a time: an array's header may claim any size.
const STEP: usize = 16 << 20;

/// The arrays of a file, each read when it is asked for.
pub struct Arrays {
    path: PathBuf,
    zip: ZipArchive<BufReader<File>>,
    names: Vec<String>,
    /// Bytes of the file.
    length: u64,
}

impl std::fmt::Debug for Arrays {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Arrays").field("path", &self.path).field("names", &self.names).finish_non_exhaustive()
    }
}

impl Arrays {
    /// Opens a file.
    ///
    /// # Errors
    /// The file cannot be read, or is not an `.npz`.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let open = || {
            let file = File::open(&path).map_err(|e| format!("cannot be read: {e}"))?;
            let about = file.metadata().map_err(|e| e.to_string())?;
            if !about.is_file() {
                return Err("not a file that can be read here and there, as an .npz must be".to_owned());
            }
            let zip = ZipArchive::new(BufReader::new(file)).map_err(|e| format!("not an .npz file: {e}"))?;
            let names = zip.file_names().map(|name| Ok(plain(&name.map_err(|e| e.to_string())?).to_owned()));
            let names = names.collect::<std::result::Result<_, String>>()?;
            Ok((zip, names, about.len()))
        };
        match open() {
            Ok((zip, names, length)) => Ok(Self { path, zip, names, length }),
            Err(reason) => Err(fault(&path, reason)),
        }
    }

    /// What the arrays are called.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The array called `name`; `None` where there is none.
    ///
    /// # Errors
    /// It is not of f32, f64, f16, i64, i32, i8, u8 or bool, or not as large as its header says.
    pub fn read(&mut self, name: &str) -> Result<Option<Tensor>> {
        let Some(at) = self.names.iter().position(|known| known == name) else { return Ok(None) };
        let length = self.length;
        let mut read = || {
            let mut entry = self.zip.by_index(at).map_err(|e| e.to_string())?;
            // What is not compressed is in the file as it is.
            let most = if entry.compression() == CompressionMethod::Stored { length } else { u64::MAX };
            let held = entry.size().min(most);
            read_array(&mut entry, held)
        };
        read().map(Some).map_err(|reason| fault(&self.path, format!("array `{name}`: {reason}")))
    }
}

fn fault(path: &Path, reason: String) -> Error {
    Error::Npz { path: path.display().to_string(), reason }
}

/// The name as numpy gives it.
fn plain(name: &str) -> &str {
    name.strip_suffix(".npy").unwrap_or(name)
}

/// Reads every array of a file.
///
/// # Errors
/// As those of [`Arrays::open`] and [`Arrays::read`].
pub fn read(path: impl AsRef<Path>) -> Result<Named> {
    let mut arrays = Arrays::open(path)?;
    let names = arrays.names.clone();
    names.into_iter().filter_map(|name| arrays.read(&name).map(|t| Some((name, t?))).transpose()).collect()
}

/// Reads those arrays of a file that are called as `inputs`; a note names the others. Where an input has none, the others are
/// read too: one of them may be meant for it, and who runs the model says what it takes.
///
/// # Errors
/// As those of [`Arrays::open`] and [`Arrays::read`].
pub fn for_inputs(path: impl AsRef<Path>, inputs: &[TensorType]) -> Result<Named> {
    let mut arrays = Arrays::open(path)?;
    let mut named = Vec::new();
    for input in inputs {
        named.extend(arrays.read(&input.name)?.map(|tensor| (input.name.clone(), tensor)));
    }
    let is_input = |name: &String| inputs.iter().any(|input| input.name == *name);
    let others: Vec<String> = arrays.names.iter().filter(|name| !is_input(name)).cloned().collect();
    let complete = named.len() == inputs.len();
    for name in others {
        if complete {
            tracing::warn!("{}: array `{name}` is not used: it is no input of the model", arrays.path.display());
        } else {
            named.extend(arrays.read(&name).ok().flatten().map(|tensor| (name, tensor)));
        }
    }
    Ok(named)
}

/// An array of a file of so many bytes.
fn read_array(reader: &mut impl Read, held: u64) -> std::result::Result<Tensor, String> {
    let header = Header::read(reader)?;
    let shape = &header.shape;
    let size = header.size().filter(|&size| size as u64 <= held);
    let size = size.ok_or_else(|| format!("shape {shape:?} needs more than the {held} bytes that it has"))?;
    let mut bytes = Vec::new();
    while bytes.len() < size {
        let step = STEP.min(size - bytes.len());
        bytes.try_reserve(step).map_err(|e| e.to_string())?;
        let count = reader.take(step as u64).read_to_end(&mut bytes).map_err(|e| e.to_string())?;
        if count < step {
            return Err(format!("shape {shape:?} needs {size} bytes, it has {}", bytes.len()));
        }
    }
    if header.big_endian {
        bytes.chunks_exact_mut(header.element.size()).for_each(<[u8]>::reverse);
    }
    let transposed: Vec<usize> = shape.iter().rev().copied().collect();
    let tensor = Tensor::from_le_bytes(header.element, if header.fortran { &transposed } else { shape }, &bytes);
    Ok(if header.fortran { rows_first(tensor) } else { tensor })
}

/// Columns came first; everything here is row-major.
fn rows_first(tensor: Tensor) -> Tensor {
    macro_rules! transposed {
        ($($kind:ident),*) => {
            match tensor { $(Tensor::$kind(a) => a.t().as_standard_layout().into_owned().into(),)* }
        };
    }
    transposed!(F32, F64, F16, I64, I32, I8, U8, Bool)
}

/// Writes arrays to a file, whole or not at all. Of arrays of one name the first is written.
///
/// # Errors
/// The file cannot be written.
pub fn write(path: impl AsRef<Path>, arrays: &[(String, Tensor)]) -> Result<()> {
    let path = path.as_ref();
    let written = mabert_graph::write_atomically(path, |file| {
        let mut bytes = Cursor::new(Vec::new());
        write_arrays(&mut bytes, arrays).map_err(std::io::Error::other)?;
        file.write_all(bytes.get_ref())
    });
    written.map_err(|e| fault(path, e.to_string()))
}

fn write_arrays(into: &mut (impl std::io::Write + Seek), arrays: &[(String, Tensor)]) -> zip::result::ZipResult<()> {
    let mut zip = ZipWriter::new(into);
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (at, (name, tensor)) in arrays.iter().enumerate() {
        // A model may give one value as two outputs.
        if arrays[..at].iter().any(|(other, _)| other == name) {
            continue;
        }
        let header = Header {
            element: tensor.element_type(),
            big_endian: false,
            fortran: false,
            shape: tensor.shape().to_vec(),
        };
        let elements = tensor.to_le_bytes();
        zip.start_file(format!("{name}.npy"), options.large_file(elements.len() >= u32::MAX as usize))?;
        zip.write_all(&header.write())?;
        zip.write_all(&elements)?;
    }
    zip.finish().map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_survive_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.npz");
        let half = [0.5f32, -1.0, 2.0].map(half::f16::from_f32).to_vec();
        let mut arrays = vec![
            ("ids".to_owned(), Tensor::new(&[2, 2], vec![1i64, 2, 3, 4])),
            ("x".to_owned(), Tensor::new(&[3], vec![0.5f32, -1.0, 2.0])),
            ("half".to_owned(), Tensor::new(&[3, 1], half)),
            ("keep".to_owned(), Tensor::new(&[2], vec![true, false])),
            ("one".to_owned(), Tensor::scalar(7i32)),
            ("none".to_owned(), Tensor::new(&[0, 3], Vec::<f64>::new())),
        ];
        write(&path, &arrays).unwrap();
        assert_eq!(read(&path).unwrap(), arrays);
        arrays.push(("ids".to_owned(), Tensor::scalar(0u8)));
        write(&path, &arrays).unwrap();
        assert_eq!(read(&path).unwrap(), arrays[..6]);
        std::fs::write(&path, b"PK nonsense").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("not an .npz file"));
        assert!(Arrays::open(folder.path()).unwrap_err().to_string().contains("not a file"));
    }

    /// A file of the entries given, as `method` keeps them.
    fn archive(method: CompressionMethod, entries: &[(&str, &[u8])]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut zip = ZipWriter::new(file.as_file());
        for (name, bytes) in entries {
            zip.start_file(*name, SimpleFileOptions::default().compression_method(method)).unwrap();
            zip.write_all(bytes).unwrap();
        }
        zip.finish().unwrap();
        file
    }

    fn array(text: &str, elements: &[u8]) -> Vec<u8> {
        let length = u16::try_from(text.len()).unwrap().to_le_bytes();
        [b"\x93NUMPY\x01\0", &length[..], text.as_bytes(), elements].concat()
    }

    const METHODS: [CompressionMethod; 2] = [CompressionMethod::Stored, CompressionMethod::Deflated];

    #[test]
    fn what_a_header_claims_is_not_allocated() {
        for shape in ["(1000000000000, 4)", "(9223372036854775807, 9223372036854775807)", "(3,)"] {
            let text = format!("{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}}}");
            for method in METHODS {
                let file = archive(method, &[("ids.npy", &array(&text, &[7; 16]))]);
                let error = read(file.path()).unwrap_err().to_string();
                assert!(error.contains("array `ids`") && error.contains("needs"), "{error}");
            }
        }
    }

    #[test]
    fn arrays_are_read_compressed_and_in_any_order() {
        let [little, big] =
            [[1i16, 0, 0, 0, 2, 0, 0, 0], [0, 0, 0, 256, 0, 0, 0, 512]].map(|v| v.map(i16::to_le_bytes).concat());
        let columns = [1i32, 4, 2, 5, 3, 6].map(i32::to_le_bytes).concat();
        for method in METHODS {
            let file = archive(
                method,
                &[
                    ("words.npy", &array("{'descr': '|O', 'fortran_order': False, 'shape': (3,)}", b"pickled")),
                    ("little.npy", &array("{'descr': '<i8', 'fortran_order': False, 'shape': (2,)}", &little)),
                    ("big.npy", &array("{'descr': '>i8', 'fortran_order': False, 'shape': (2,)}", &big)),
                    ("columns", &array("{'descr': '<i4', 'fortran_order': True, 'shape': (2, 3)}", &columns)),
                ],
            );
            let mut arrays = Arrays::open(file.path()).unwrap();
            assert_eq!(arrays.names(), ["words", "little", "big", "columns"]);
            for name in ["little", "big"] {
                assert_eq!(arrays.read(name).unwrap(), Some(Tensor::ints(&[1, 2])));
            }
            let rows = Tensor::new(&[2, 3], vec![1i32, 2, 3, 4, 5, 6]);
            assert_eq!(arrays.read("columns").unwrap(), Some(rows));
            assert_eq!(arrays.read("nothing").unwrap(), None);
            let input = |name: &str| TensorType { name: name.to_owned(), element: None, dims: None };
            let named = for_inputs(file.path(), &[input("big"), input("little")]).unwrap();
            assert_eq!(named.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["big", "little"]);
            let named = for_inputs(file.path(), &[input("big"), input("ids")]).unwrap();
            assert_eq!(named.len(), 3);
            let refused = arrays.read("words").unwrap_err().to_string();
            assert!(refused.contains("array `words`: of type `|O`"), "{refused}");
        }
    }
}

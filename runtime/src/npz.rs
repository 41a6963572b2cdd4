//! Named arrays in numpy's `.npz` files.

use std::fs::File;
use std::path::Path;

use mabert_graph::Tensor;
use ndarray::{ArrayD, IxDyn, OwnedRepr};
use ndarray_npy::{NpzReader, NpzWriter, ReadNpzError};

use crate::{Error, Named, Result};

/// Reads every array of a file.
///
/// # Errors
/// The file cannot be read, is not an `.npz`, or holds arrays that are not f32, f64, i64, i32, i8, u8 or bool.
pub fn read(path: impl AsRef<Path>) -> Result<Named> {
    let path = path.as_ref();
    let fault = |reason: String| Error::Npz { path: path.display().to_string(), reason };
    let file = File::open(path).map_err(|e| fault(e.to_string()))?;
    let mut reader = NpzReader::new(file).map_err(|e| fault(format!("not an .npz file: {e}")))?;
    let names = reader.names().map_err(|e| fault(e.to_string()))?;
    let mut arrays = Vec::new();
    for name in names {
        let tensor = read_array(&mut reader, &name).map_err(|e| fault(format!("array `{name}`: {e}")))?;
        arrays.push((name.trim_end_matches(".npy").to_owned(), tensor));
    }
    Ok(arrays)
}

/// numpy's header states the element type; the reader asks for one type at a time, so each is tried.
fn read_array(reader: &mut NpzReader<File>, name: &str) -> std::result::Result<Tensor, ReadNpzError> {
    macro_rules! attempt {
        ($($rust:ty),*) => {{
            $(if let Ok(array) = reader.by_name::<OwnedRepr<$rust>, IxDyn>(name) {
                return Ok(Tensor::from(standard(array)));
            })*
        }};
    }
    attempt!(i64, i32, f64, bool, u8, i8);
    // The last attempt's error stands for all: it names the element type found.
    reader.by_name::<OwnedRepr<f32>, IxDyn>(name).map(|a| Tensor::from(standard(a)))
}

/// numpy may store columns first; everything here is row-major.
fn standard<T: Clone>(array: ArrayD<T>) -> ArrayD<T> {
    if array.is_standard_layout() { array } else { array.as_standard_layout().into_owned() }
}

/// Writes arrays to a file, whole or not at all. Halves are written as f32, which numpy readers expect.
///
/// # Errors
/// The file cannot be written.
pub fn write(path: impl AsRef<Path>, arrays: &[(String, Tensor)]) -> Result<()> {
    let path = path.as_ref();
    let fault = |reason: String| Error::Npz { path: path.display().to_string(), reason };
    mabert_graph::write_atomically(path, |file| {
        let mut bytes = std::io::Cursor::new(Vec::new());
        let mut writer = NpzWriter::new(&mut bytes);
        for (name, tensor) in arrays {
            let written = match tensor {
                Tensor::F32(a) => writer.add_array(name.as_str(), a),
                Tensor::F64(a) => writer.add_array(name.as_str(), a),
                Tensor::F16(_) => writer.add_array(name.as_str(), &tensor.to_f32()),
                Tensor::I64(a) => writer.add_array(name.as_str(), a),
                Tensor::I32(a) => writer.add_array(name.as_str(), a),
                Tensor::I8(a) => writer.add_array(name.as_str(), a),
                Tensor::U8(a) => writer.add_array(name.as_str(), a),
                Tensor::Bool(a) => writer.add_array(name.as_str(), a),
            };
            written.map_err(std::io::Error::other)?;
        }
        writer.finish().map_err(std::io::Error::other)?;
        std::io::Write::write_all(file, bytes.get_ref())
    })
    .map_err(|e| fault(e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrays_survive_a_file() {
        let folder = std::env::temp_dir().join(format!("mabert-npz-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("a.npz");
        let arrays = vec![
            ("ids".to_owned(), Tensor::new(&[2, 2], vec![1i64, 2, 3, 4])),
            ("x".to_owned(), Tensor::new(&[3], vec![0.5f32, -1.0, 2.0])),
            ("keep".to_owned(), Tensor::new(&[2], vec![true, false])),
        ];
        write(&path, &arrays).unwrap();
        assert_eq!(read(&path).unwrap(), arrays);
        std::fs::write(&path, b"PK nonsense").unwrap();
        assert!(read(&path).unwrap_err().to_string().contains("not an .npz file"));
        std::fs::remove_dir_all(folder).unwrap();
    }
}

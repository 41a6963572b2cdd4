//! Files and folders that are given as a model and are none: what they are, and what to do.

use std::io::{Read, Seek};
use std::path::{Path, PathBuf};

/// So many of a folder's models are named.
const NAMED: usize = 8;
/// What is looked at of a file.
const BEGINNING: u64 = 512;

const EXPORT: &str = "export the model to ONNX, as `optimum-cli export onnx` and `torch.onnx.export` do";

/// How formats begin, from which byte on, what they are, and what to do.
const MAGIC: [(usize, &[u8], &str, &str); 16] = [
    (0, b"version https://git-lfs", "a Git LFS pointer in the place of the file", "fetch the file with `git lfs pull`"),
    (4, b"TFL3", "a TensorFlow Lite model", "convert the model that it was made from with tf2onnx"),
    (4, b"ORTM", "a model in onnxruntime's own format", "take the ONNX model that it was made from"),
    (0, b"GGUF", "weights in GGUF format", EXPORT),
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras saves models", "convert the model with tf2onnx"),
    (0, b"\x93NUMPY", "an array of NumPy", EXPORT),
    (0, b"\x80\x02", "a Python pickle, as PyTorch saves weights", EXPORT),
    (0, b"\x80\x03", "a Python pickle, as PyTorch saves weights", EXPORT),
    (0, b"\x80\x04", "a Python pickle, as PyTorch saves weights", EXPORT),
    (0, b"\x80\x05", "a Python pickle, as PyTorch saves weights", EXPORT),
    (0, b"PK\x03\x04", "a zip archive", "unpack it"),
    (0, b"\x1f\x8b", "a gzip archive", "unpack it"),
    (0, b"BZh", "a bzip2 archive", "unpack it"),
    (0, b"\xfd7zXZ\x00", "an xz archive", "unpack it"),
    (0, b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it"),
    (257, b"ustar", "a tar archive", "unpack it"),
];

/// What a file is that cannot be read as what it was given for, and what to do, told by how it begins.
pub(crate) fn recognised(file: &mut (impl Read + Seek)) -> Option<String> {
    let mut beginning = Vec::new();
    file.rewind().ok()?;
    file.take(BEGINNING).read_to_end(&mut beginning).ok()?;
    described(&beginning)
}

fn described(beginning: &[u8]) -> Option<String> {
    let said = |what: &str, advice: &str| Some(format!("{what}: {advice}"));
    // Both are archives: what is in one tells them apart.
    let contains = |text: &str| beginning.windows(text.len()).any(|w| w == text.as_bytes());
    if beginning.starts_with(b"PK\x03\x04") && (contains("data.pkl") || contains(".data/")) {
        return said("a PyTorch checkpoint", EXPORT);
    }
    // Other files may begin with these two bytes too.
    let pickle = beginning.first_chunk().is_some_and(|[a, _, c]| *a != 0x80 || b"}](cX\x8c\x95\x8aq".contains(c));
    let begins = |&&(at, magic, ..): &&(usize, &[u8], _, _)| beginning.get(at..).is_some_and(|b| b.starts_with(magic));
    if let Some((.., what, advice)) = MAGIC.iter().find(begins).filter(|_| pickle) {
        return said(what, advice);
    }
    // Eight bytes of a header's length, and the header.
    if let Some((length, header)) = beginning.split_first_chunk()
        && u64::from_le_bytes(*length) < 1 << 32
        && header.starts_with(b"{\"")
    {
        return said("weights in safetensors format, without what computes with them", EXPORT);
    }
    let text = text(beginning)?;
    let lower = text.to_lowercase();
    if lower.starts_with('<') && (lower.contains("<!doctype html") || lower.contains("<html")) {
        return said("a web page in the place of the file", "download the file itself, not the page that shows it");
    }
    match text.chars().next()? {
        '<' => said("an XML file, as OpenVINO has its models", EXPORT),
        '{' | '[' => said("a JSON file", "take the .onnx file beside it"),
        _ => {
            let line: String = text.lines().next().unwrap_or_default().chars().take(60).collect();
            said(&format!("text that begins with {line:?}"), "download or export the model again")
        }
    }
}

/// Bytes that are text, without what may stand before it; the last character may be cut.
fn text(bytes: &[u8]) -> Option<&str> {
    let text = match std::str::from_utf8(bytes) {
        Ok(text) => text,
        Err(e) if e.error_len().is_none() => std::str::from_utf8(&bytes[..e.valid_up_to()]).ok()?,
        Err(_) => return None,
    };
    let text = text.trim_start_matches('\u{feff}').trim_start();
    (!text.is_empty() && !text.contains(|c: char| c.is_control() && !c.is_whitespace())).then_some(text)
}

/// What to say of a folder in the place of a model: which models lie in it, or in its own folders.
pub(crate) fn folder(path: &Path) -> String {
    let inside = |folder: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
        paths.sort();
        paths
    };
    let is_model = |path: &PathBuf| path.extension().is_some_and(|e| e.eq_ignore_ascii_case("onnx")) && path.is_file();
    let here = inside(path);
    let below = here.iter().filter(|p| p.is_dir()).flat_map(|folder| inside(folder));
    let models: Vec<PathBuf> = here.iter().cloned().chain(below).filter(is_model).collect();
    let mut named: Vec<String> = models.iter().take(NAMED).map(|model| format!("`{}`", model.display())).collect();
    match (named.len(), models.len()) {
        (0, _) => "a folder, in which no .onnx file lies; a model is one file".to_owned(),
        (1, _) => format!("a folder; the model in it is {}", named[0]),
        (shown, all) => {
            if all > shown {
                named.push(format!("{} more", all - shown));
            }
            format!("a folder; take one of the models in it: {}", named.join(", "))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::{Error, Model};

    #[test]
    fn files_that_are_no_models_are_told_by_how_they_begin() {
        let mut safetensors = 900u64.to_le_bytes().to_vec();
        safetensors.extend(b"{\"bert.embeddings.weight\":{\"dtype\":\"F32\"");
        let mut archive = vec![0; 257];
        archive.extend(b"ustar\x0000");
        let files: [(&[u8], &str); 16] = [
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "git lfs pull"),
            (b"\n<!DOCTYPE html>\n<html class=\"\">", "a web page"),
            (b"<HTML><head>", "a web page"),
            (b"<?xml version=\"1.0\"?><net name=\"m\">", "OpenVINO"),
            ("\u{feff}{\"architectures\": [\"BertModel\"]}".as_bytes(), "a JSON file"),
            (b"Entry not found", "text that begins with \"Entry not found\""),
            (b"PK\x03\x04\x00\x00\x08\x08archive/data.pkl", "a PyTorch checkpoint"),
            (b"PK\x03\x04\x14\x00model.onnx", "a zip archive: unpack it"),
            (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "a Python pickle"),
            (&safetensors, "safetensors"),
            (b"\x1c\x00\x00\x00TFL3", "tf2onnx"),
            (b"\x1c\x00\x00\x00ORTM", "onnxruntime's own format"),
            (b"GGUF\x03\x00\x00\x00", "GGUF"),
            (b"\x89HDF\r\n\x1a\n\x00", "Keras"),
            (b"\x1f\x8b\x08\x00", "a gzip archive"),
            (&archive, "a tar archive"),
        ];
        for (bytes, expected) in files {
            let described = recognised(&mut Cursor::new(bytes)).unwrap_or_default();
            assert!(described.contains(expected), "{expected}: {described}");
            let message = Model::from_bytes(bytes).unwrap_err().to_string();
            assert!(message.starts_with("<bytes>: ") && message.contains(expected), "{message}");
        }
        // A model that is cut short is none of these.
        let cut = Model::from_bytes(b"\x08\x08\x12\x07pytorch\x3a\x7f").unwrap_err();
        assert!(matches!(cut, Error::NotOnnx { .. }), "{cut}");
    }

    #[test]
    fn the_models_in_a_folder_are_named() {
        let home = tempfile::tempdir().unwrap();
        let refused = || Model::load(home.path()).unwrap_err().to_string();
        assert!(refused().contains("no .onnx file lies"), "{}", refused());
        std::fs::create_dir(home.path().join("onnx")).unwrap();
        std::fs::write(home.path().join("onnx/model.onnx"), "").unwrap();
        std::fs::write(home.path().join("config.json"), "{}").unwrap();
        let model = |name: &str| format!("`{}`", home.path().join(name).display());
        assert!(refused().ends_with(&format!("the model in it is {}", model("onnx/model.onnx"))), "{}", refused());
        std::fs::write(home.path().join("a.onnx"), "").unwrap();
        let both = format!("take one of the models in it: {}, {}", model("a.onnx"), model("onnx/model.onnx"));
        assert!(refused().ends_with(&both), "{}", refused());
        assert!(refused().starts_with(&home.path().display().to_string()), "{}", refused());
    }
}

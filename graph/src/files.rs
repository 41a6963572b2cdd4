//! Files that are written whole or not at all.

use std::io::Write as _;
use std::path::Path;

use crate::{Error, Result};

/// Writes to a temporary file in the same folder, makes it durable, and renames it over `path`, which is therefore
/// either the old file or the new one, whatever happens.
///
/// # Errors
/// The folder cannot be written to, or `write` fails.
pub fn write_atomically(path: &Path, write: impl FnOnce(&mut Buffered<'_>) -> std::io::Result<()>) -> Result<()> {
    let attempt = || -> std::io::Result<()> {
        temporary_beside(path, write)?.persist(path).map_err(|e| e.error)?;
        Ok(())
    };
    attempt().map_err(|source| Error::Write { path: path.to_owned(), source })
}

/// What is written to before it has its name.
pub type Buffered<'f> = std::io::BufWriter<&'f mut std::fs::File>;

/// A temporary file in the folder of `path`, written and durable.
pub(crate) fn temporary_beside(
    path: &Path,
    write: impl FnOnce(&mut Buffered<'_>) -> std::io::Result<()>,
) -> std::io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(".onnx-mabert-");
    // A temporary file is private by default; the model should be as readable as any file the user makes.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    let mut temporary = builder.tempfile_in(parent_folder(path))?;
    let mut buffered = std::io::BufWriter::with_capacity(1 << 20, temporary.as_file_mut());
    write(&mut buffered)?;
    buffered.flush()?;
    drop(buffered);
    temporary.as_file().sync_all()?;
    Ok(temporary)
}

/// Whether a file can be made at `path`: asked before long work, whose result would be lost.
///
/// # Errors
/// `path` is a folder, or its folder is missing or cannot be written to.
pub fn check_writable(path: &Path) -> Result<()> {
    let refused =
        |reason: &str| Error::Write { path: path.to_owned(), source: std::io::Error::other(reason.to_owned()) };
    if path.is_dir() || path.file_name().is_none() {
        return Err(refused("it is a folder; name a file in it"));
    }
    if !parent_folder(path).is_dir() {
        return Err(refused("its folder does not exist"));
    }
    let attempt = tempfile::Builder::new().prefix(".onnx-mabert-").tempfile_in(parent_folder(path));
    attempt.map(drop).map_err(|e| refused(&e.kind().to_string()))
}

fn parent_folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

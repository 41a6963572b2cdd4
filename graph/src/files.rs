//! Files that are written whole or not at all, and never over what is no plain file.

use std::fs::Metadata;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Writes to a temporary file in the same folder, makes it durable, and renames it over `path`, which is therefore
/// either the old file or the new one, whatever happens. Where `path` is a symbolic link, the file that it names is
/// replaced and the link stays. A file that is replaced keeps its permissions.
///
/// # Errors
/// The folder cannot be written to, `path` is no plain file, or `write` fails.
pub fn write_atomically(path: &Path, write: impl FnOnce(&mut Buffered<'_>) -> std::io::Result<()>) -> Result<()> {
    let place = Place::new(path)?;
    let attempt = || -> std::io::Result<()> {
        let temporary = temporary_beside(&place.path, write)?;
        if let Some(old) = &place.old {
            temporary.as_file().set_permissions(old.permissions())?;
        }
        temporary.persist(&place.path).map_err(|e| e.error)?;
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

/// Whether a file can be made at `path`, or replaced: asked before long work, whose result would be lost.
///
/// # Errors
/// `path` is a folder, a device, a pipe or a socket, or a file that must not be written to; or its folder is missing or
/// cannot be written to.
pub fn check_writable(path: &Path) -> Result<()> {
    let place = Place::new(path)?;
    let refused = |source| Error::Write { path: path.to_owned(), source };
    if place.old.is_some() {
        // A rename asks for the folder's permission alone; the file's own says what its owner wants.
        std::fs::OpenOptions::new().write(true).open(&place.path).map_err(refused)?;
    }
    let attempt = tempfile::Builder::new().prefix(".onnx-mabert-").tempfile_in(parent_folder(&place.path));
    // What the system says names the temporary file, which says nothing to a user.
    attempt.map(drop).map_err(|e| refused(std::io::Error::other(e.kind().to_string())))
}

/// Whether two names are of one file, whatever links lead to it and whether or not it is there yet.
pub fn is_same_file(a: &Path, b: &Path) -> bool {
    match (std::fs::metadata(a), std::fs::metadata(b)) {
        (Ok(a_facts), Ok(b_facts)) => match identity(&a_facts).zip(identity(&b_facts)) {
            Some((a, b)) => a == b,
            None => a.canonicalize().ok().is_some_and(|a| b.canonicalize().is_ok_and(|b| a == b)),
        },
        (Err(_), Err(_)) => match (Place::new(a), Place::new(b)) {
            (Ok(a), Ok(b)) => a.path == b.path,
            _ => false,
        },
        _ => false,
    }
}

/// What tells a file from all others, where the system says.
#[cfg(unix)]
fn identity(facts: &Metadata) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt as _;
    Some((facts.dev(), facts.ino()))
}

#[cfg(not(unix))]
fn identity(_: &Metadata) -> Option<(u64, u64)> {
    None
}

/// Where a file is written.
struct Place {
    /// Behind all links, in a folder by its canonical name.
    path: PathBuf,
    /// The file that is there.
    old: Option<Metadata>,
}

/// As many links lead to a file at most, as for the system.
const MOST_LINKS: usize = 40;

impl Place {
    fn new(path: &Path) -> Result<Self> {
        let refused =
            |reason: &str| Error::Write { path: path.to_owned(), source: std::io::Error::other(reason.to_owned()) };
        let mut next = path.to_owned();
        for _ in 0..MOST_LINKS {
            let Some(name) = next.file_name().filter(|_| !ends_in_separator(&next)) else {
                return Err(refused("it is a folder; name a file in it"));
            };
            let folder = parent_folder(&next);
            let folder = match folder.canonicalize() {
                Ok(folder) if folder.is_dir() => folder,
                Ok(_) => return Err(refused("its folder is a file")),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(refused("its folder does not exist")),
                Err(e) => return Err(refused(&e.to_string())),
            };
            // Links in there, as `/dev/stdout` leads to, name what is open already.
            if folder.starts_with("/proc") || folder.starts_with("/dev/fd") {
                return Err(refused("it is an open file or a part of the system; name a file"));
            }
            let here = folder.join(name);
            match std::fs::symlink_metadata(&here) {
                Ok(facts) if facts.is_symlink() => {
                    next = folder.join(std::fs::read_link(&here).map_err(|e| refused(&e.to_string()))?);
                }
                Ok(facts) if facts.is_dir() => return Err(refused("it is a folder; name a file in it")),
                Ok(facts) if !facts.is_file() => {
                    return Err(refused("it is a device, a pipe or a socket; name a file"));
                }
                Ok(facts) => return Ok(Self { path: here, old: Some(facts) }),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Self { path: here, old: None }),
                Err(e) => return Err(refused(&e.to_string())),
            }
        }
        Err(refused("too many symbolic links"))
    }
}

fn ends_in_separator(path: &Path) -> bool {
    path.as_os_str().to_string_lossy().ends_with(std::path::is_separator)
}

fn parent_folder(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

#[cfg(all(test, unix))]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    fn write(path: &Path, text: &str) -> Result<()> {
        write_atomically(path, |file| file.write_all(text.as_bytes()))
    }

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn links_stay_and_modes_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir(at("store")).unwrap();
        std::fs::write(at("store/old"), "old").unwrap();
        std::fs::set_permissions(at("store/old"), std::fs::Permissions::from_mode(0o640)).unwrap();
        symlink("store/old", at("link")).unwrap();
        symlink("link", at("link of link")).unwrap();
        symlink("store/new", at("dangling")).unwrap();
        for (name, target) in [("link", "store/old"), ("link of link", "store/old"), ("dangling", "store/new")] {
            check_writable(&at(name)).unwrap();
            write(&at(name), name).unwrap();
            assert!(std::fs::symlink_metadata(at(name)).unwrap().is_symlink(), "{name}");
            assert_eq!(std::fs::read_to_string(at(target)).unwrap(), name);
        }
        assert_eq!(mode(&at("store/old")), 0o640);
        // What is new has the mode of any new file.
        std::fs::write(at("any"), "").unwrap();
        assert_eq!(mode(&at("store/new")), mode(&at("any")));
        let left: Vec<_> = std::fs::read_dir(at("store")).unwrap().collect();
        assert_eq!(left.len(), 2, "{left:?}");
    }

    #[test]
    fn what_is_no_plain_file_is_refused_and_left() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let made = std::process::Command::new("mkfifo").arg(at("pipe")).status().unwrap();
        assert!(made.success());
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        std::fs::create_dir(at("folder")).unwrap();
        symlink("/dev/null", at("device")).unwrap();
        symlink("folder", at("link to a folder")).unwrap();
        symlink("circle", at("circle")).unwrap();
        std::fs::write(at("file"), "").unwrap();
        let here =
            ["pipe", "socket", "folder", "device", "link to a folder", "circle", "file/under", "no/such", "new/"];
        let elsewhere = ["/dev/null", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "/", "..", "."];
        for path in here.map(at).into_iter().chain(elsewhere.map(PathBuf::from)) {
            let before = std::fs::metadata(&path).ok().map(|facts| facts.file_type());
            for error in [check_writable(&path).unwrap_err(), write(&path, "x").unwrap_err()] {
                let shown = path.display().to_string();
                assert!(error.to_string().starts_with(&shown), "{error}");
            }
            assert_eq!(std::fs::metadata(&path).ok().map(|facts| facts.file_type()), before, "{}", path.display());
        }
    }

    #[test]
    fn one_file_is_known_by_all_its_names() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::fs::create_dir(at("sub")).unwrap();
        std::fs::write(at("a"), "").unwrap();
        std::fs::write(at("other"), "").unwrap();
        std::fs::hard_link(at("a"), at("hard")).unwrap();
        symlink("a", at("soft")).unwrap();
        symlink(".", at("here")).unwrap();
        symlink("sub/new", at("dangling")).unwrap();
        for name in ["a", "hard", "soft", "here/a", "sub/../a", "here/here/soft"] {
            assert!(is_same_file(&at("a"), &at(name)), "{name}");
            assert!(!is_same_file(&at("other"), &at(name)), "{name}");
        }
        // What is not there yet.
        for name in ["sub/new", "dangling", "here/sub/new", "sub/../sub/new"] {
            assert!(is_same_file(&at("sub/new"), &at(name)), "{name}");
        }
        assert!(!is_same_file(&at("sub/new"), &at("new")) && !is_same_file(&at("a"), &at("new")));
    }
}

//! Files in (mapped) and out (whole or not at all).

use crate::error::{Error, Result};
use bytes::Bytes;
use memmap2::{Mmap, UncheckedAdvice};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A file's bytes, memory-mapped.
///
/// # Errors
/// [`Error::Read`] when it is missing, unreadable or not a regular file.
pub fn map(path: &Path) -> Result<Bytes> {
    Mapping::of(path).map(|m| m.bytes())
}

/// A file in memory, whose pages are read when they are first looked at and can be given back.
#[derive(Clone, Debug)]
pub struct Mapping(Option<Arc<Mmap>>);

impl Mapping {
    /// Maps a file.
    ///
    /// # Errors
    /// As [`map`].
    pub fn of(path: &Path) -> Result<Mapping> {
        let read = |source| Error::Read { path: path.into(), source };
        let meta = fs::metadata(path).map_err(read)?;
        if meta.is_dir() {
            return Err(read(std::io::Error::other("is a directory, expected a file")));
        }
        if meta.len() == 0 {
            return Ok(Mapping(None));
        }
        let file = File::open(path).map_err(read)?;
        // SAFETY: the mapping is read-only; a model file truncated by another process while it is loaded is outside the
        // contract of this program (vedge itself replaces files by renaming).
        let map = unsafe { Mmap::map(&file) }.map_err(read)?;
        Ok(Mapping(Some(Arc::new(map))))
    }

    /// The file's bytes.
    pub fn bytes(&self) -> Bytes {
        self.0.clone().map_or_else(Bytes::new, |map| Bytes::from_owner(Shared(map)))
    }

    /// Gives the memory of `part` back where it is of this file; whoever looks at it again reads the file again.
    pub fn forget(&self, part: &[u8]) {
        let Some(map) = &self.0 else { return };
        let (file, part) = (map.as_ptr_range(), part.as_ptr_range());
        if file.start <= part.start && part.end <= file.end {
            let (offset, len) = (part.start.addr() - file.start.addr(), part.end.addr() - part.start.addr());
            // SAFETY: what is dropped is there again, from the file, when it is next read: nothing was written. A failure
            // costs memory only.
            let _ = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, offset, len) };
        }
    }
}

struct Shared(Arc<Mmap>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// Writes a file whole or not at all: to a temporary file beside it, flushed, then renamed. Through a symbolic link
/// the file that it leads to is replaced, not the link.
///
/// # Errors
/// [`Error::Write`]; the temporary file is removed and what was at `path` is untouched then.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomic_by(path, |f| f.write_all(bytes))
}

/// As [`write_atomic`], of what `fill` writes.
///
/// # Errors
/// As [`write_atomic`], and those of `fill`.
pub fn write_atomic_by(path: &Path, fill: impl FnOnce(&mut File) -> std::io::Result<()>) -> Result<()> {
    let write = |source| Error::Write { path: path.into(), source };
    check_output(path)?;
    let target = fs::canonicalize(path).unwrap_or_else(|_| path.into());
    let temporary = partial(&target);
    partials().push(temporary.clone());
    let result = File::create(&temporary)
        .and_then(|mut f| fill(&mut f).and_then(|()| f.sync_all()))
        .and_then(|()| fs::rename(&temporary, &target));
    if result.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    partials().retain(|p| *p != temporary);
    result.map_err(write)
}

/// Temporary files that are being written.
static PARTIALS: Mutex<Vec<PathBuf>> = Mutex::new(vec![]);

fn partials() -> MutexGuard<'static, Vec<PathBuf>> {
    PARTIALS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes what [`write_atomic`] has half written: for a program that is about to end on a signal. No write begins
/// after it.
pub fn remove_partial() {
    let list = partials();
    for path in list.iter() {
        let _ = fs::remove_file(path);
    }
    // Held until the process ends, so that no other thread begins.
    std::mem::forget(list);
}

/// Whether a file could be written at `path`, to be asked before long work: its folder exists, and what is there
/// already is a regular file (a device or pipe would be replaced, not written to).
///
/// # Errors
/// [`Error::Write`].
pub fn check_output(path: &Path) -> Result<()> {
    let write = |what: String| Err(Error::Write { path: path.into(), source: std::io::Error::other(what) });
    if let Ok(meta) = fs::metadata(path) {
        return match (meta.is_dir(), meta.is_file()) {
            (true, _) => write("is a directory, expected a file name".into()),
            (_, false) => write("is a device or pipe, expected a regular file".into()),
            _ => Ok(()),
        };
    }
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() && !dir.is_dir() => {
            write(format!("the folder {} does not exist", dir.display()))
        }
        _ => Ok(()),
    }
}

fn partial(path: &Path) -> PathBuf {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    path.with_file_name(format!(".{name}.{}.partial", std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_regular_files_are_replaced() {
        use std::os::unix::fs::symlink;
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("old"), "old").unwrap();
        symlink(at("old"), at("link")).unwrap();
        write_atomic(&at("link"), b"new").unwrap();
        assert!(at("link").is_symlink());
        assert_eq!(fs::read(at("old")).unwrap(), b"new");
        // A socket stands for every special file; anyone may make one.
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        symlink(at("socket"), at("to socket")).unwrap();
        for name in ["socket", "to socket"] {
            let e = write_atomic(&at(name), b"x").unwrap_err().to_string();
            assert!(e.ends_with("is a device or pipe, expected a regular file"), "{e}");
        }
        let e = write_atomic(&at("none/file"), b"x").unwrap_err().to_string();
        assert!(e.ends_with("none does not exist"), "{e}");
        assert!(write_atomic(dir.path(), b"x").is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4, "nothing else stays");
    }
}

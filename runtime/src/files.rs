//! Files in (mapped) and out (whole or not at all).

use crate::error::{Error, Result};
use bytes::Bytes;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

/// A file's bytes, memory-mapped.
///
/// # Errors
/// [`Error::Read`] when it is missing, unreadable or not a regular file.
pub fn map(path: &Path) -> Result<Bytes> {
    let read = |source| Error::Read { path: path.into(), source };
    let meta = fs::metadata(path).map_err(read)?;
    if meta.is_dir() {
        return Err(read(std::io::Error::other("is a directory, expected a file")));
    }
    if meta.len() == 0 {
        return Ok(Bytes::new());
    }
    let file = File::open(path).map_err(read)?;
    // SAFETY: the mapping is private and read-only; a model file truncated by another process while it is loaded
    // is outside the contract of this program (vedge itself replaces files by renaming).
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(read)?;
    Ok(Bytes::from_owner(map))
}

/// Writes a file whole or not at all: to a temporary file beside it, flushed, then renamed.
///
/// # Errors
/// [`Error::Write`]; the temporary file is removed and what was at `path` is untouched then.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let write = |source| Error::Write { path: path.into(), source };
    if path.is_dir() {
        return Err(write(std::io::Error::other("is a directory, expected a file name")));
    }
    let temporary = partial(path);
    let result = File::create(&temporary)
        .and_then(|mut f| f.write_all(bytes).and_then(|()| f.sync_all()))
        .and_then(|()| fs::rename(&temporary, path));
    result.map_err(|e| {
        let _ = fs::remove_file(&temporary);
        write(e)
    })
}

fn partial(path: &Path) -> PathBuf {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    path.with_file_name(format!(".{name}.{}.partial", std::process::id()))
}

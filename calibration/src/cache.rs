//! What calibration pictures told, kept between conversions of the same model with the same pictures, so that another
//! attempt need not run them again and an interrupted one goes on where it was.

use crate::statistics::Partial;
use sha2::{Digest, Sha256};
use std::fs;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};
use vedge_runtime::{Error, Result, files};

/// Bytes that all caches together take; the oldest go first.
const LIMIT: u64 = 1 << 30;
/// How often an unfinished calibration is written.
const EVERY: Duration = Duration::from_secs(15);
/// Changes with the form of the files.
const FORM: &str = "vedge statistics 3";

/// The file for one model and its pictures.
pub struct Cache {
    path: PathBuf,
    written: Option<Instant>,
}

impl Cache {
    /// The file in a folder for what `parts` stand for: everything that the statistics depend on.
    pub fn of(folder: &Path, parts: &[&[u8]]) -> Cache {
        let mut hash = Sha256::new();
        for part in [FORM.as_bytes()].iter().chain(parts) {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        let name: String = hash.finalize().iter().map(|b| format!("{b:02x}")).collect();
        Cache { path: folder.join(format!("{name}.statistics")), written: None }
    }

    /// What is known already; nothing where there is no file, or none that can be read.
    pub fn load(&self) -> Partial {
        let whole = files::map(&self.path).ok();
        let bytes = whole.as_deref().and_then(|b| b.split_last_chunk::<32>());
        let intact = bytes.filter(|(data, hash)| Sha256::digest(data)[..] == hash[..]);
        intact.and_then(|(data, _)| postcard::from_bytes(data).ok()).unwrap_or_default()
    }

    /// Writes what is known, if the last time was a while ago. Whole or not at all.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn save_now_and_then(&mut self, known: &Partial) -> Result<()> {
        let last = *self.written.get_or_insert_with(Instant::now);
        if last.elapsed() < EVERY { Ok(()) } else { self.save(known) }
    }

    /// Writes what is known, whole or not at all, and removes the oldest files of the folder where they are too large
    /// together.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn save(&mut self, known: &Partial) -> Result<()> {
        let failed = |source: io::Error| Error::Write { path: self.path.clone(), source };
        let folder = self.path.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder).map_err(failed)?;
        // As a stream: the statistics are large, and a copy of them in memory would be the peak of a conversion.
        files::write_atomic_by(&self.path, |file| {
            let hashed = Hashed { inner: BufWriter::new(file), hash: Sha256::new() };
            let Hashed { mut inner, hash } = postcard::to_io(known, hashed).map_err(io::Error::other)?;
            inner.write_all(&hash.finalize())?;
            inner.flush()
        })?;
        self.written = Some(Instant::now());
        make_room(folder, &self.path, LIMIT);
        Ok(())
    }
}

/// Writes on, and hashes what it wrote.
struct Hashed<W> {
    inner: W,
    hash: Sha256,
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(bytes)?;
        self.hash.update(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Removes the oldest statistics beyond `limit` bytes, but not `keep`.
fn make_room(folder: &Path, keep: &Path, limit: u64) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    let of = |path: PathBuf| {
        let known = fs::metadata(&path).ok()?;
        let ours = path.extension().is_some_and(|e| e == "statistics");
        ours.then(|| (known.modified().unwrap_or(SystemTime::UNIX_EPOCH), known.len(), path))
    };
    let mut all: Vec<_> = entries.filter_map(|e| of(e.ok()?.path())).collect();
    all.sort();
    let mut bytes: u64 = all.iter().map(|(_, size, _)| size).sum();
    for (_, size, path) in all.iter().filter(|(_, _, path)| path != keep) {
        if bytes > limit && fs::remove_file(path).is_ok() {
            bytes -= size;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seven() -> Partial {
        let mut known = Partial::default();
        known.pictures = 7;
        known
    }

    #[test]
    fn what_was_saved_is_loaded_by_the_same_parts_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = Cache::of(dir.path(), &[b"model", b"pictures"]);
        assert_eq!(cache.load().pictures, 0);
        cache.save(&seven()).unwrap();
        assert_eq!(Cache::of(dir.path(), &[b"model", b"pictures"]).load().pictures, 7);
        for other in [[&b"model"[..], b"picture"], [b"modelp", b"ictures"]] {
            assert_eq!(Cache::of(dir.path(), &other).load().pictures, 0);
        }
    }

    #[test]
    fn a_damaged_file_is_no_cache() {
        let dir = tempfile::tempdir().unwrap();
        let mut cache = Cache::of(dir.path(), &[b"m"]);
        cache.save(&seven()).unwrap();
        let path = fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let mut bytes = fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert_eq!(cache.load().pictures, 0);
        fs::write(&path, &bytes[..20]).unwrap();
        assert_eq!(cache.load().pictures, 0);
    }

    #[test]
    fn the_oldest_make_room() {
        let dir = tempfile::tempdir().unwrap();
        let path = |i: u64| dir.path().join(format!("{i}.statistics"));
        for i in 0..4 {
            fs::write(path(i), [0; 100]).unwrap();
            let age = SystemTime::now() - Duration::from_secs(100 - i);
            fs::File::options().write(true).open(path(i)).unwrap().set_modified(age).unwrap();
        }
        fs::write(dir.path().join("other"), [0; 1000]).unwrap();
        make_room(dir.path(), &path(0), 250);
        let left: Vec<bool> = (0..4).map(|i| path(i).exists()).collect();
        assert_eq!(left, [true, false, false, true]);
        assert!(dir.path().join("other").exists());
    }
}

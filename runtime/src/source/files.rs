//! Picture files, folders and patterns, in the order of their names: each as soon as the model is free, none dropped; or at
//! a rate, as a camera would.

use super::synthetic::Pace;
use super::{Frame, FrameSource, PATIENCE, Pixels, uri};
use crate::error::{Error, Result};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Extensions taken from a folder; a file that is named itself, or by a pattern, may have any.
const EXTENSIONS: [&str; 3] = ["jpg", "jpeg", "png"];

/// Files to read.
pub struct Files {
    described: String,
    files: Vec<PathBuf>,
    next: usize,
    repeat: bool,
    pace: Option<Pace>,
}

impl Files {
    /// Finds the files. A folder is searched with its sub-folders (class folders, for instance).
    ///
    /// # Errors
    /// [`Error::Source`] when nothing is there.
    pub fn open(options: &uri::Files) -> Result<Files> {
        let files = find(&options.path)?;
        let mut described = match files.as_slice() {
            [file] => file.display().to_string(),
            files => format!("{} pictures in {}", files.len(), options.path.display()),
        };
        if let Some(fps) = options.fps {
            described += &format!(" at {fps} a second");
        }
        Ok(Files { described, files, next: 0, repeat: options.repeat, pace: options.fps.map(Pace::new) })
    }
}

impl FrameSource for Files {
    fn next(&mut self) -> Result<Option<Frame>> {
        let skipped = self.pace.as_mut().map_or(0, Pace::wait);
        let next = self.next + skipped as usize;
        let number = if self.repeat { next % self.files.len() } else { next };
        let Some(file) = self.files.get(number).cloned() else { return Ok(None) };
        self.next = number + 1;
        let start = Instant::now();
        let bytes = std::fs::read(&file).map_err(|source| Error::Read { path: file.clone(), source })?;
        let frame = Frame::taken(Pixels::Encoded(bytes), start, start.elapsed());
        Ok(Some(Frame { file: Some(file), skipped, ..frame }))
    }

    fn describe(&self) -> String {
        self.described.clone()
    }

    fn patience(&self) -> Duration {
        PATIENCE + self.pace.as_ref().map_or(Duration::ZERO, Pace::period)
    }

    fn is_live(&self) -> bool {
        self.pace.is_some()
    }

    fn frames(&self) -> Option<usize> {
        (!self.repeat).then_some(self.files.len())
    }
}

fn find(path: &Path) -> Result<Vec<PathBuf>> {
    let none = |what: String, hint: &str| Error::Source { what, hint: hint.into() };
    let mut files = vec![];
    if path.is_dir() {
        collect(path, &mut files)?;
        if files.is_empty() {
            return Err(none(
                format!("no pictures in {}", path.display()),
                "a folder is searched, with its sub-folders, for .jpg, .jpeg and .png files",
            ));
        }
    } else if path.exists() {
        files.push(path.into());
    } else {
        let text = path.to_string_lossy();
        if !text.contains(['*', '?', '[']) {
            let hint = format!("a source is {}", super::uri::FORMS);
            return Err(Error::Source { what: format!("no such file or folder: {text}"), hint });
        }
        let matches = glob::glob(&text).map_err(|e| none(format!("bad pattern `{text}`: {e}"), ""))?;
        for entry in matches {
            let entry = entry.map_err(|e| Error::Read { path: e.path().into(), source: e.into() })?;
            if entry.is_file() {
                files.push(entry);
            }
        }
        if files.is_empty() {
            return Err(none(format!("no file matches the pattern `{text}`"), ""));
        }
    }
    files.sort();
    Ok(files)
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let read = |source| Error::Read { path: folder.into(), source };
    for entry in std::fs::read_dir(folder).map_err(read)? {
        let entry = entry.map_err(read)?;
        let path = entry.path();
        // a link to a folder is not followed: it could lead back here
        if entry.file_type().map_err(read)?.is_dir() {
            collect(&path, files)?;
        } else if is_picture(&path) && path.is_file() {
            files.push(path);
        }
    }
    Ok(())
}

fn is_picture(path: &Path) -> bool {
    let hidden = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.'));
    let extension = path.extension().map(|e| e.to_string_lossy().to_ascii_lowercase());
    !hidden && extension.is_some_and(|e| EXTENSIONS.contains(&e.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(path: &Path) -> Vec<String> {
        let name = |p: PathBuf| p.file_name().unwrap().to_string_lossy().into_owned();
        find(path).unwrap().into_iter().map(name).collect()
    }

    #[test]
    fn folders_patterns_and_files_in_order() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("b")).unwrap();
        for file in ["c.PNG", "a.jpg", "b/x.jpeg", "notes.txt", ".hidden.jpg"] {
            std::fs::write(dir.path().join(file), "x").unwrap();
        }
        assert_eq!(names(dir.path()), ["a.jpg", "x.jpeg", "c.PNG"]);
        assert_eq!(names(&dir.path().join("*.txt")), ["notes.txt"]);
        assert_eq!(names(&dir.path().join("notes.txt")), ["notes.txt"]);
        let options = |fps, repeat| uri::Files { path: dir.path().into(), fps, repeat };
        let files = Files::open(&options(None, false)).unwrap();
        assert_eq!(files.describe(), format!("3 pictures in {}", dir.path().display()));
        assert_eq!((files.frames(), files.is_live()), (Some(3), false));

        let mut paced = Files::open(&options(Some(100.0), true)).unwrap();
        assert!(paced.is_live() && paced.frames().is_none());
        let start = Instant::now();
        for _ in 0..7 {
            paced.next().unwrap().unwrap();
        }
        assert!(start.elapsed().as_millis() >= 60, "{:?}", start.elapsed());
    }

    #[test]
    fn nothing_there_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        for path in [dir.path().into(), dir.path().join("missing.jpg"), dir.path().join("*.jpg")] {
            let e = find(&path).unwrap_err();
            assert!(e.to_string().contains(&*dir.path().to_string_lossy()), "{e}");
        }
    }
}

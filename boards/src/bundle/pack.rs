//! A bundle as a folder or as one compressed archive.

use super::Entry;
use flate2::{Compression, GzBuilder};
use std::io::{self, Write};
use std::path::Path;

/// Seconds since 1970 of every packed file: archives of the same content are the same.
const TIME: u64 = 0;

/// Writes the files into a new folder.
///
/// # Errors
/// When something cannot be written.
pub fn folder(dir: &Path, files: &[Entry]) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    std::fs::create_dir_all(dir)?;
    for file in files {
        let path = dir.join(&file.path);
        std::fs::write(&path, &file.data)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(file.mode))?;
    }
    Ok(())
}

/// A gzip-compressed tar archive; every name begins with `prefix`. Folders are entries too, owner is root.
///
/// # Errors
/// When a name is too long for the format.
pub fn tar_gz(prefix: &str, files: &[Entry]) -> io::Result<Vec<u8>> {
    // No name and no time in the header.
    let gzip = GzBuilder::new().mtime(0).write(vec![], Compression::new(6));
    let mut tar = tar::Builder::new(gzip);
    let mut folders: Vec<String> = vec![];
    for file in files {
        let path = format!("{prefix}{}", file.path);
        let parents = path.match_indices('/').map(|(at, _)| path[..=at].to_string());
        for folder in parents.filter(|f| f != "./") {
            if !folders.contains(&folder) {
                let mut header = header(0o755, 0);
                header.set_entry_type(tar::EntryType::Directory);
                tar.append_data(&mut header, &folder, io::empty())?;
                folders.push(folder);
            }
        }
        tar.append_data(&mut header(file.mode, file.data.len() as u64), &path, file.data.as_slice())?;
    }
    let mut gzip = tar.into_inner()?;
    gzip.flush()?;
    gzip.finish()
}

fn header(mode: u32, size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_mode(mode);
    header.set_mtime(TIME);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(size);
    header
}

#[cfg(test)]
mod tests {
    use super::super::tests::sample;
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn an_archive_is_the_same_every_time_and_holds_the_files() {
        let files = sample().1;
        let archive = tar_gz("vedge/", &files).unwrap();
        assert_eq!(archive, tar_gz("vedge/", &files).unwrap());
        let mut names = vec![];
        let mut tar = tar::Archive::new(flate2::read::GzDecoder::new(archive.as_slice()));
        for entry in tar.entries().unwrap() {
            let entry = entry.unwrap();
            let header = entry.header();
            assert_eq!((header.mtime().unwrap(), header.uid().unwrap()), (0, 0));
            names.push((entry.path().unwrap().display().to_string(), header.mode().unwrap()));
        }
        assert_eq!(names[0], ("vedge/".into(), 0o755));
        assert!(names.contains(&("vedge/vedge-run".into(), 0o755)), "{names:?}");
        assert_eq!(names.len(), files.len() + 1);
    }

    #[test]
    fn a_folder_has_the_permissions() {
        let dir = tempfile::tempdir().unwrap();
        folder(&dir.path().join("b"), &sample().1).unwrap();
        let mode = |name: &str| dir.path().join("b").join(name).metadata().unwrap().permissions().mode() & 0o777;
        assert_eq!((mode("vedge-run"), mode("model.onnx")), (0o755, 0o644));
    }
}

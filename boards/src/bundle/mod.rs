//! What goes onto a board: program, model, profile, settings, service, licences and checksums, as one list of files that is
//! the same byte for byte whenever it is made from the same parts.

mod deb;
pub mod elf;
mod pack;
pub mod unit;

pub use deb::{Package, deb};
pub use pack::{folder, tar_gz};

use crate::Profile;
use elf::Elf;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Name of the file of checksums.
pub const SUMS: &str = "SHA256SUMS";
/// Name of its signature, in minisign's format.
pub const SIGNATURE: &str = "SHA256SUMS.minisig";
/// Name of the description.
pub const MANIFEST: &str = "manifest.json";

/// The licences of all that is linked into `vedge-run`.
pub const LICENCES: &str = include_str!("../../licences/NOTICES.txt");

/// One file of a bundle.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Path below the bundle's folder.
    pub path: String,
    /// Unix permissions.
    pub mode: u32,
    /// Content.
    pub data: Vec<u8>,
}

impl Entry {
    fn new(path: &str, mode: u32, data: impl Into<Vec<u8>>) -> Entry {
        Entry { path: path.into(), mode, data: data.into() }
    }
}

/// What a bundle says of itself, `manifest.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this JSON, 1.
    pub v: u32,
    /// Name of the service.
    pub name: String,
    /// Version of vedge and the beginning of the parts' SHA-256: names one content.
    pub version: String,
    /// Name of the board's profile.
    pub board: String,
    /// Rust target of the program.
    pub target: String,
    /// The model, for people.
    pub model: String,
    /// Largest memory of a process that loads the model and runs it, in MiB, estimated from the sizes of both.
    pub peak_memory_mib: u32,
    /// What is in the program's ELF file.
    pub program: Elf,
}

/// The parts that a bundle is made of.
#[derive(Clone, Debug)]
pub struct Parts<'a> {
    /// Name of the service: lower-case letters, digits and hyphens.
    pub name: &'a str,
    /// The board.
    pub profile: &'a Profile,
    /// Rust target of the program.
    pub target: &'a str,
    /// `vedge-run` for that target.
    pub program: Vec<u8>,
    /// What is in it.
    pub elf: Elf,
    /// The converted model.
    pub model: Vec<u8>,
    /// The model, for people.
    pub about: String,
    /// Largest memory in MiB, estimated from the sizes of program and model.
    pub peak_memory_mib: u32,
    /// Where frames come from.
    pub source: &'a str,
    /// More options of `vedge-run`.
    pub options: &'a str,
}

/// Hexadecimal SHA-256.
pub fn sha256(data: &[u8]) -> String {
    Sha256::digest(data).iter().map(|b| format!("{b:02x}")).collect()
}

/// The files, checksums last.
///
/// # Panics
/// Never: plain data becomes JSON.
pub fn assemble(p: Parts<'_>) -> (Manifest, Vec<Entry>) {
    let profile = serde_json::to_vec_pretty(p.profile).expect("a profile is plain data");
    let mut files = vec![
        Entry::new("LICENSES.txt", 0o644, LICENCES),
        Entry::new("model.onnx", 0o644, p.model),
        Entry::new("profile.json", 0o644, profile),
        Entry::new("vedge-run", 0o755, p.program),
        Entry::new("vedge.conf", 0o644, unit::settings(p.source, p.options)),
    ];
    let content = sha256(sums(&files).as_bytes());
    let manifest = Manifest {
        v: 1,
        name: p.name.into(),
        version: format!("{}+{}", env!("CARGO_PKG_VERSION"), &content[..12]),
        board: p.profile.name.clone(),
        target: p.target.into(),
        model: p.about,
        peak_memory_mib: p.peak_memory_mib,
        program: p.elf,
    };
    let json = serde_json::to_vec_pretty(&manifest).expect("a manifest is plain data");
    files.push(Entry::new(MANIFEST, 0o644, json));
    files.sort_by(|a, b| a.path.cmp(&b.path));
    let sums = sums(&files);
    files.push(Entry::new(SUMS, 0o644, sums));
    (manifest, files)
}

/// Lines as `sha256sum` writes and checks them.
fn sums(files: &[Entry]) -> String {
    files.iter().map(|f| format!("{}  {}\n", sha256(&f.data), f.path)).collect()
}

/// Memory in MiB that Linux, its services and a camera's buffers take beside the model: an estimate.
pub const SYSTEM_MIB: u32 = 128;

/// Whether a model of this peak memory fits a board with `size_mb`: of which firmware and graphics keep up to a fifth.
///
/// # Errors
/// Why not, with the numbers.
pub fn fits(peak_mib: u32, size_mb: u32) -> Result<(), String> {
    let linux = size_mb * 4 / 5;
    let free = linux.saturating_sub(SYSTEM_MIB);
    if peak_mib <= free {
        return Ok(());
    }
    Err(format!(
        "the model takes {peak_mib} MiB at its peak (measured here); of {size_mb} MiB Linux has some {linux}, of which \
         {SYSTEM_MIB} are kept for the system: {free} MiB are left"
    ))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::Catalogue;

    /// A small bundle.
    pub(crate) fn sample() -> (Manifest, Vec<Entry>) {
        let catalogue = Catalogue::built_in();
        let elf = Elf {
            machine: "aarch64".into(),
            size: 3,
            is_static: true,
            glibc: None,
            dot_products: 9,
            engine_dot_kernel: true,
        };
        assemble(Parts {
            name: "vedge",
            profile: catalogue.get("pi5").unwrap(),
            target: "aarch64-unknown-linux-musl",
            program: b"ELF".to_vec(),
            elf,
            model: b"onnx".to_vec(),
            about: "a model".into(),
            peak_memory_mib: 40,
            source: "v4l2:///dev/video0",
            options: "--top 1",
        })
    }

    #[test]
    fn the_same_parts_give_the_same_files() {
        let ((manifest, files), again) = (sample(), sample());
        assert_eq!((&manifest, &files), (&again.0, &again.1));
        let names: Vec<&str> = files.iter().map(|f| f.path.as_str()).collect();
        let expected = ["LICENSES.txt", MANIFEST, "model.onnx", "profile.json", "vedge-run", "vedge.conf", SUMS];
        assert_eq!(names, expected);
        let sums = String::from_utf8(files[6].data.clone()).unwrap();
        assert_eq!(sums.lines().count(), 6);
        assert!(sums.contains(&format!("{}  model.onnx\n", sha256(b"onnx"))), "{sums}");
    }

    #[test]
    fn what_cannot_fit_is_refused_with_numbers() {
        assert_eq!(fits(100, 512), Ok(()));
        let why = fits(300, 512).unwrap_err();
        assert!(why.starts_with("the model takes 300 MiB at its peak (measured here); of 512 MiB Linux has some 409"));
        assert!(why.ends_with("281 MiB are left"), "{why}");
        assert!(fits(1, 64).is_err());
    }
}

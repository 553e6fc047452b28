//! `vedge-run verify`: are a bundle's files what was packed, and signed by whom this board trusts?

use crate::tell::tell;
use anyhow::Result;
use minisign_verify::{PublicKey, Signature};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use vedge_runtime::{Error, files};

/// Verify a bundle's checksums, and its signature where this board has a trusted key
#[derive(clap::Args)]
pub struct Arguments {
    /// The bundle's folder
    folder: PathBuf,
    /// The minisign public key that must have signed it [default: /etc/vedge/trusted.pub where that file is there]
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
}

/// A board with this file loads only what its key signed.
const TRUSTED: &str = "/etc/vedge/trusted.pub";
const SUMS: &str = "SHA256SUMS";
const SIGNATURE: &str = "SHA256SUMS.minisig";

/// Verifies; status 0 when all is as it was packed.
pub fn run(a: &Arguments) -> Result<ExitCode> {
    let trusted = Some(PathBuf::from(TRUSTED)).filter(|p| p.exists());
    let key = a.key.clone().or(trusted);
    let count = verify(&a.folder, key.as_deref())?;
    let signed = match (&key, a.folder.join(SIGNATURE).exists()) {
        (Some(key), _) => format!("signed by the key in {}", key.display()),
        (None, true) => format!("signed, but there is no {TRUSTED} to check the signature with"),
        (None, false) => "not signed".to_string(),
    };
    tell(format_args!("{}: {count} files are as they were packed; {signed}", a.folder.display()));
    Ok(ExitCode::SUCCESS)
}

/// Number of files that the checksums cover.
fn verify(folder: &Path, key: Option<&Path>) -> Result<usize, Error> {
    let sums = read(&folder.join(SUMS))?;
    if let Some(key) = key {
        signature(folder, &sums, key)?;
    }
    let listed = parse(&sums).ok_or_else(|| refused(format!("{}/{SUMS} is damaged", folder.display())))?;
    for (name, expected) in &listed {
        let data = files::map(&folder.join(name))?;
        let found: String = Sha256::digest(&data).iter().map(|b| format!("{b:02x}")).collect();
        if found != *expected {
            return Err(refused(format!(
                "{}/{name} is not the file that was packed: its SHA-256 is {found}",
                folder.display()
            )));
        }
    }
    let entries = std::fs::read_dir(folder).map_err(|source| Error::Read { path: folder.into(), source })?;
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !listed.contains_key(&name) && name != SUMS && name != SIGNATURE {
            return Err(refused(format!("{}/{name} is not in {SUMS}", folder.display())));
        }
    }
    Ok(listed.len())
}

fn signature(folder: &Path, sums: &[u8], key: &Path) -> Result<(), Error> {
    let text = |path: &Path| Ok::<_, Error>(String::from_utf8_lossy(&read(path)?).into_owned());
    // A bare line, or minisign's file with a comment before it.
    let key_text = text(key)?;
    let line = key_text.lines().map(str::trim).rfind(|l| !l.is_empty() && !l.starts_with("untrusted comment:"));
    let public = line.and_then(|l| PublicKey::from_base64(l).ok());
    let public = public.ok_or_else(|| refused(format!("{} is no minisign public key", key.display())))?;
    let path = folder.join(SIGNATURE);
    if !path.exists() {
        return Err(refused(format!(
            "{} is not signed, and this board trusts only {}",
            folder.display(),
            key.display()
        )));
    }
    let good = Signature::decode(&text(&path)?).and_then(|s| public.verify(sums, &s, false));
    good.map_err(|e| refused(format!("{} is not signed by the key in {}: {e}", folder.display(), key.display())))
}

fn refused(what: String) -> Error {
    Error::Source {
        what,
        hint: "copy the bundle again, or make it again: vedge bundle MODEL --board NAME -o OUT".into(),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|source| Error::Read { path: path.into(), source })
}

/// Names and hexadecimal sums; `None` when a line is none, or a name would leave the folder.
fn parse(sums: &[u8]) -> Option<BTreeMap<String, String>> {
    let mut found = BTreeMap::new();
    for line in std::str::from_utf8(sums).ok()?.lines() {
        let (sum, name) = line.split_once("  ")?;
        let good = sum.len() == 64 && !name.is_empty() && !name.contains('/') && name != "..";
        found.insert(Some(name).filter(|_| good)?.to_string(), sum.to_string());
    }
    Some(found).filter(|f| !f.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made by minisign 0.11 for a file that holds what [`SIGNED`] holds, with this public key.
    const KEY: &str = "RWTesfzPOb38KGWpfBjg9L4iGewcssZgiZkxdlfJbsoidY79dOhQbKwG";
    const SIGNED: &[u8] = b"7e89398aeeeba2389c659c9eee508c74b99efe3bed7bd8e30ea63284bd0a83a1  model.onnx\n";
    const MINISIG: &str = "untrusted comment: signature from minisign secret key\nRUTesfzPOb38KCPF7kRhdfxrq3dt1WJVqc3gmfQFe/lKH6b4UhK/MKvS8DKiaguZL0G2RdDvCPdE942fE2L2lgGO6hTbblujxQk=\ntrusted comment: vedge 0.1.0\nnC+eQroJEHfY0CVC83LO4F6wf1/79MIXAcY3ubJFdaTk2x/XKEBrvU1SdP0kRLz6NlX4Tsll1jRkU9C7maqOAA==\n";

    fn bundle() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("model.onnx"), "onnx\n").unwrap();
        std::fs::write(dir.path().join(SUMS), SIGNED).unwrap();
        dir
    }

    #[test]
    fn files_as_packed_and_others() {
        let dir = bundle();
        assert_eq!(verify(dir.path(), None).unwrap(), 1);
        std::fs::write(dir.path().join("more"), "").unwrap();
        assert!(verify(dir.path(), None).unwrap_err().to_string().ends_with("more is not in SHA256SUMS"));
        std::fs::remove_file(dir.path().join("more")).unwrap();
        std::fs::write(dir.path().join("model.onnx"), "other\n").unwrap();
        let message = verify(dir.path(), None).unwrap_err().to_string();
        assert!(message.contains("model.onnx is not the file that was packed"), "{message}");
        std::fs::remove_file(dir.path().join("model.onnx")).unwrap();
        assert!(verify(dir.path(), None).is_err());
        std::fs::write(dir.path().join(SUMS), "../../etc/passwd").unwrap();
        assert!(verify(dir.path(), None).unwrap_err().to_string().ends_with("SHA256SUMS is damaged"));
    }

    #[test]
    fn signatures() {
        let dir = bundle();
        let key = dir.path().with_extension("pub");
        std::fs::write(&key, format!("untrusted comment: minisign public key\n{KEY}\n")).unwrap();
        let message = verify(dir.path(), Some(&key)).unwrap_err().to_string();
        assert!(message.contains("is not signed, and this board trusts only"), "{message}");
        std::fs::write(dir.path().join(SIGNATURE), MINISIG).unwrap();
        assert_eq!(verify(dir.path(), Some(&key)).unwrap(), 1);
        // The files fit their sums, but the sums are not what was signed.
        let sums = String::from_utf8(SIGNED.to_vec()).unwrap().to_uppercase().replace("MODEL.ONNX", "model.onnx");
        std::fs::write(dir.path().join(SUMS), sums).unwrap();
        let message = verify(dir.path(), Some(&key)).unwrap_err().to_string();
        assert!(message.contains("is not signed by the key in"), "{message}");
        std::fs::write(&key, "nonsense").unwrap();
        assert!(verify(dir.path(), Some(&key)).unwrap_err().to_string().ends_with("is no minisign public key"));
        std::fs::remove_file(&key).unwrap();
    }
}

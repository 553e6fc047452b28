//! `vedge deploy`

use super::boards::Profiles;
use super::out;
use crate::deploy::{self, Bundle, Ssh};
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use vedge_runtime::Error;

/// A bundle onto a board over your own ssh: checked, tested there, switched at once, rolled back when it does not run.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The bundle: a folder or FILE.tar.gz.
    #[arg(required_unless_present = "roll_back")]
    bundle: Option<PathBuf>,
    /// The board.
    #[arg(value_name = "USER@HOST", required_unless_present = "roll_back")]
    host: Option<String>,
    /// Make the previous release on this board the current one again.
    #[arg(long, value_name = "USER@HOST", conflicts_with_all = ["bundle", "host", "dry_run"])]
    roll_back: Option<String>,
    /// Name of the service to roll back.
    #[arg(long, default_value = "vedge", requires = "roll_back")]
    name: String,
    /// Check everything and copy nothing.
    #[arg(long)]
    dry_run: bool,
    /// Folder of installations on the board.
    #[arg(long, value_name = "DIR", default_value = "/opt/vedge")]
    root: String,
    /// Install without a systemd service.
    #[arg(long)]
    no_service: bool,
    /// Deploy although the board is not the one that the bundle was made for.
    #[arg(long)]
    any_board: bool,
    /// Fail when the model takes more milliseconds there (the median of ten runs).
    #[arg(long, value_name = "MS")]
    max_ms: Option<f64>,
    /// Seconds that the new service must stay up before the old release is given up.
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    settle: u32,
    /// A minisign public key: from now on the board loads only what it signed.
    #[arg(long, value_name = "FILE")]
    trust: Option<PathBuf>,
    /// Your ssh with its options, as one word: "ssh -p 2222 -i key".
    #[arg(long, value_name = "COMMAND", default_value = "ssh")]
    ssh: String,
    #[command(flatten)]
    profiles: Profiles,
}

/// Runs the command.
pub fn run(a: &Args) -> Result<()> {
    if !a.root.starts_with('/') || a.root.len() < 2 || a.root.ends_with('/') {
        let what = format!("--root {}: expected is an absolute folder without a slash at its end", a.root);
        return Err(Error::Usage { what, hint: String::new() }.into());
    }
    let key = a.trust.as_ref().map(|path| std::fs::read_to_string(path).map_err(|e| read(path, e))).transpose()?;
    let options = deploy::Options {
        root: a.root.clone(),
        service: !a.no_service,
        any_board: a.any_board,
        max_ms: a.max_ms,
        settle: a.settle,
        key,
    };
    if let Some(host) = &a.roll_back {
        let ssh = Ssh::new(&a.ssh, host)?;
        let release = deploy::roll_back(&ssh, &a.name, &options)?;
        return out::text(&format!("{host}: release {release} of {} is in use again\n", a.name));
    }
    let (Some(path), Some(host)) = (&a.bundle, &a.host) else { unreachable!("clap requires both") };
    let unpacked = unpack(path)?;
    let folder = unpacked.as_ref().map_or(path.clone(), |(_, folder)| folder.clone());
    let bundle = Bundle::open(&folder)?;
    let ssh = Ssh::new(&a.ssh, host)?;
    let plan = deploy::plan(&ssh, &bundle, &a.profiles.open()?, &options)?;
    plan.lines.iter().for_each(|line| eprintln!("{line}"));
    let m = &bundle.manifest;
    if a.dry_run {
        return out::text(&format!("{host}: {} {} can be deployed; nothing was changed\n", m.name, m.version));
    }
    deploy::carry_out(&ssh, &bundle, &plan, &options)?;
    out::text(&format!("{host}: {} {} is in use\n", m.name, m.version))?;
    if options.service {
        eprintln!("next: ssh {host} journalctl -o cat -f -u {}", m.name);
    }
    Ok(())
}

fn read(path: &Path, source: std::io::Error) -> Error {
    Error::Read { path: path.into(), source }
}

/// An archive's files in a temporary folder; `None` for a folder.
fn unpack(path: &Path) -> Result<Option<(TempDir, PathBuf)>> {
    if path.is_dir() {
        return Ok(None);
    }
    if path.extension().is_some_and(|e| e == "deb") {
        let what = format!("{} is a Debian package, which the board installs itself", path.display());
        return Err(Error::Usage { what, hint: super::bundle::next(path) }.into());
    }
    let file = std::fs::File::open(path).map_err(|e| read(path, e))?;
    let dir = tempfile::tempdir()?;
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(file));
    archive.set_preserve_permissions(true);
    archive.unpack(dir.path()).map_err(|e| {
        // the innermost reason: the others name temporary files
        let mut why: &dyn std::error::Error = &e;
        while let Some(source) = why.source() {
            why = source;
        }
        Error::Usage {
            what: format!("{} is no bundle, or only a part of one: {why}", path.display()),
            hint: "make it again: vedge bundle MODEL --board NAME -o FILE.tar.gz".into(),
        }
    })?;
    let mut folders = std::fs::read_dir(dir.path())?.flatten().map(|e| e.path()).filter(|p| p.is_dir());
    let folder =
        folders.next().with_context(|| format!("{} is no bundle: there is no folder in it", path.display()))?;
    Ok(Some((dir, folder)))
}

//! `vedge bench`

use anyhow::Result;
use std::path::PathBuf;

/// How fast a model runs here.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The model.
    model: PathBuf,
}

/// Runs the command.
pub fn run(_a: &Args) -> Result<()> {
    anyhow::bail!("not here yet: vedge-run bench MODEL does it")
}

//! `vedge-run cameras`: what can be looked through.

use crate::tell::tell;
use anyhow::Result;
use std::fmt::Write;
use std::process::ExitCode;
use vedge_runtime::source::v4l2;

/// List cameras with their formats and sizes
#[derive(clap::Args)]
pub struct Arguments {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Lists.
pub fn run(a: &Arguments) -> Result<ExitCode> {
    let cameras = v4l2::list();
    if a.json {
        super::print_json(&cameras)?;
        return Ok(ExitCode::SUCCESS);
    }
    if cameras.is_empty() {
        tell("no cameras: there is no /dev/video* device that captures");
        tell("\nhint: plug a USB camera in (and see `dmesg`); synthetic:// is a source without one");
        return Ok(ExitCode::SUCCESS);
    }
    let mut text = String::new();
    for c in &cameras {
        let name = if c.name.is_empty() { String::new() } else { format!("  {} ({}, {})", c.name, c.driver, c.bus) };
        writeln!(text, "{}{name}", c.device.display())?;
        for f in &c.formats {
            let note = if f.supported { "" } else { "  (not supported)" };
            writeln!(text, "  {}  {}{note}", f.fourcc, f.sizes.join(" "))?;
        }
        if !c.problem.is_empty() {
            writeln!(text, "  not usable: {}", c.problem)?;
        }
    }
    super::print(&text)?;
    Ok(ExitCode::SUCCESS)
}

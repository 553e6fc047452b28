//! Standard output. A reader that went away (`vedge … | head`) is an error that `main` takes for a normal end.

use anyhow::Result;
use std::io::Write;

/// Prints text as it is.
pub fn text(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Prints indented JSON.
pub fn json(value: &impl serde::Serialize) -> Result<()> {
    text(&(serde_json::to_string_pretty(value)? + "\n"))
}

/// Whether an error says no more than that the reader of standard output went away.
pub fn reader_went_away(e: &anyhow::Error) -> bool {
    e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}

//! One file a subcommand.

pub mod bench;
pub mod cameras;
pub mod doctor;
pub mod infer;
pub mod run;
pub mod verify;

use crate::tell::tell;
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::Path;
use std::process::ExitCode;
use vedge_runtime::{Options, Session};

/// Worker threads: what was asked for, or every CPU that this process may use.
pub fn threads(asked: Option<NonZeroUsize>) -> usize {
    asked.or_else(|| std::thread::available_parallelism().ok()).map_or(1, NonZeroUsize::get)
}

/// Loads a model.
pub fn load(model: &Path, threads: usize) -> anyhow::Result<Session> {
    Ok(Session::load(model, &Options { threads, ..Options::default() })?)
}

/// Prints an error with its hint; a closed standard output is none.
pub fn report(e: &anyhow::Error) -> ExitCode {
    let broken = |e: &std::io::Error| e.kind() == std::io::ErrorKind::BrokenPipe;
    if e.downcast_ref::<std::io::Error>().is_some_and(broken) {
        return ExitCode::SUCCESS;
    }
    let own = e.downcast_ref::<vedge_runtime::Error>();
    let message = match own {
        // its message names the cause already
        Some(own) => own.to_string(),
        None => format!("{e:#}"),
    };
    let hint = own.and_then(vedge_runtime::Error::hint).map(|hint| format!("\n\nhint: {hint}"));
    tell(format_args!("error: {message}{}", hint.unwrap_or_default()));
    ExitCode::from(own.map_or(1, vedge_runtime::Error::exit_status))
}

/// Prints data to standard output; unlike `println!` it does not panic when the reader is gone.
pub fn print(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Prints JSON to standard output.
pub fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    print(&(serde_json::to_string_pretty(value)? + "\n"))
}

//! The `vedge` command: vision transformers made small and fast on a workstation.

use clap::Parser;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::process::ExitCode;
use vedge_converter::cmd::{Cli, exit_code, run};

#[global_allocator]
static ALLOCATOR: vedge_runtime::memory::Recycling = vedge_runtime::memory::Recycling;

fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Err(e) = end_cleanly() {
        eprintln!("warning: Ctrl-C while a file is written may leave a .partial file: {e}");
    }
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let code = exit_code(&e);
            if code != 0 {
                // The library's messages hold their causes already.
                match e.downcast_ref::<vedge_runtime::Error>() {
                    Some(own) => {
                        eprintln!("error: {own}");
                        own.hint().iter().for_each(|hint| eprintln!("\nhint: {hint}"));
                    }
                    None => eprintln!("error: {e:#}"),
                }
            }
            ExitCode::from(code)
        }
    }
}

/// Ctrl-C ends the program at once, but not with half a file left behind.
fn end_cleanly() -> std::io::Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP])?;
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            vedge_runtime::files::remove_partial();
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

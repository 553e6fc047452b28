//! The `vedge` command: vision transformers made small and fast on a workstation.

use clap::Parser;
use std::process::ExitCode;
use vedge_converter::cmd::{Cli, exit_code, run};

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let code = exit_code(&e);
            if code != 0 {
                eprintln!("error: {e:#}");
                if let Some(hint) = e.downcast_ref::<vedge_runtime::Error>().and_then(|e| e.hint()) {
                    eprintln!("\nhint: {hint}");
                }
            }
            ExitCode::from(code)
        }
    }
}

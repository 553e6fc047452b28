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

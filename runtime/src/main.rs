//! `vedge-run`: the board's program.

mod cmd;
mod tell;
mod watch;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: vedge_runtime::memory::Recycling = vedge_runtime::memory::Recycling;

/// Classifies what a camera sees, or pictures, with a model from `vedge convert`: one JSON line a frame.
#[derive(Parser)]
#[command(name = "vedge-run", version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(after_help = "A source is a picture, a folder, a pattern such as 'shots/*.jpg', /dev/videoN, \
    v4l2:///dev/videoN?format=MJPG&size=640x480&fps=30&ctrl.NAME=VALUE, exec:COMMAND, file://PATH?fps=N, \
    or synthetic://[WxH][?fps=N].\n\
    Answers go to standard output, everything else to standard error. \
    Exit status: 0 done, 1 failed, 2 wrong usage.")]
struct Cli {
    #[command(flatten)]
    run: cmd::run::Arguments,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    Infer(cmd::infer::Arguments),
    Bench(cmd::bench::Arguments),
    Doctor(cmd::doctor::Arguments),
    Cameras(cmd::cameras::Arguments),
    Verify(cmd::verify::Arguments),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        None => cmd::run::run(&cli.run),
        Some(Command::Infer(a)) => cmd::infer::run(&a),
        Some(Command::Bench(a)) => cmd::bench::run(&a),
        Some(Command::Doctor(a)) => cmd::doctor::run(&a),
        Some(Command::Cameras(a)) => cmd::cameras::run(&a),
        Some(Command::Verify(a)) => cmd::verify::run(&a),
    };
    match result {
        Ok(code) => code,
        Err(e) => cmd::report(&e),
    }
}

//! The command line, one file a subcommand.

mod bench;
mod boards;
mod build;
mod bundle;
mod convert;
mod demo;
mod deploy;
mod eval;
mod inspect;
mod out;
mod table;

use clap::{Parser, Subcommand};
use std::path::Path;
use vedge_runtime::{Error, Result};

/// Vision transformers at the edge: an ONNX model in, a small and fast one for a board with a camera out.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Inspect(inspect::Args),
    Convert(Box<convert::Args>),
    Eval(eval::Args),
    Bench(bench::Args),
    Demo(demo::Args),
    Boards(boards::Args),
    Build(build::Args),
    Bundle(bundle::Args),
    Deploy(deploy::Args),
}

/// Runs a command.
///
/// # Errors
/// What went wrong; [`exit_code`] tells the exit status.
pub fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Inspect(a) => inspect::run(&a),
        Command::Convert(a) => convert::run(&a),
        Command::Eval(a) => eval::run(&a),
        Command::Bench(a) => bench::run(&a),
        Command::Demo(a) => demo::run(&a),
        Command::Boards(a) => boards::run(&a),
        Command::Build(a) => build::run(&a),
        Command::Bundle(a) => bundle::run(&a),
        Command::Deploy(a) => deploy::run(&a),
    }
}

/// 2 for wrong usage, 0 when only the reader of standard output went away, 1 for everything else.
pub fn exit_code(e: &anyhow::Error) -> u8 {
    match e.downcast_ref::<Error>() {
        _ if out::reader_went_away(e) => 0,
        Some(e) => e.exit_status(),
        None => 1,
    }
}

/// Labels from a file, one a line, in the order of the class indices.
fn read_labels(path: &Path) -> Result<Vec<String>> {
    // Read, not mapped: labels may come through a pipe.
    let bytes = std::fs::read(path).map_err(|source| Error::Read { path: path.into(), source })?;
    let usage = |what: &str| Error::Usage {
        what: format!("{}: {what}", path.display()),
        hint: "expected is a text file with one label a line, in the order of the class indices".into(),
    };
    let text = std::str::from_utf8(&bytes).map_err(|_| usage("is not UTF-8 text"))?;
    let labels: Vec<String> = text.lines().map(|l| l.trim().to_string()).collect();
    match labels.iter().position(String::is_empty) {
        Some(at) => Err(usage(&format!("line {} is empty", at + 1))),
        None if labels.is_empty() => Err(usage("is empty")),
        None => Ok(labels),
    }
}

/// `N` or `HxW` in pixels.
fn parse_size(s: &str) -> Result<(usize, usize), String> {
    let pixels = |p: &str| p.parse::<usize>().ok().filter(|n| (1..=8192).contains(n));
    let size = match s.split_once(['x', 'X']) {
        Some((h, w)) => pixels(h).zip(pixels(w)),
        None => pixels(s).map(|n| (n, n)),
    };
    size.ok_or_else(|| "expected pixels, N or HxW (height first), 1 to 8192".to_string())
}

/// One number for all channels or three, comma between.
fn parse_channels(s: &str) -> Result<[f32; 3], String> {
    let numbers: Option<Vec<f32>> = s.split(',').map(|p| p.trim().parse().ok()).collect();
    match numbers.as_deref() {
        Some([all]) => Ok([*all; 3]),
        Some([r, g, b]) => Ok([*r, *g, *b]),
        _ => Err("expected one number or three with commas between, as 0.485,0.456,0.406".to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_and_channels() {
        assert_eq!(parse_size("224"), Ok((224, 224)));
        assert_eq!(parse_size("192x256"), Ok((192, 256)));
        for bad in ["", "x", "0", "224x", "-1", "9999", "2x2x2"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_channels("0.5"), Ok([0.5; 3]));
        assert_eq!(parse_channels("1, 2,3"), Ok([1.0, 2.0, 3.0]));
        assert!(parse_channels("1,2").is_err());
    }

    #[test]
    fn labels_are_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("l.txt");
        let read = |text: &str| {
            std::fs::write(&path, text).unwrap();
            read_labels(&path)
        };
        assert_eq!(read("cat\n dog\r\n").unwrap(), ["cat", "dog"]);
        assert!(read("cat\n\ndog\n").unwrap_err().to_string().contains("line 2"));
        assert!(read("").unwrap_err().to_string().contains("is empty"));
    }
}

//! `vedge-run MODEL SOURCE`: classify frames.

use anyhow::Result;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use vedge_runtime::pipeline::{self, Model, Summary};
use vedge_runtime::sink::{JsonLines, ResultSink, Text};
use vedge_runtime::source::{self, Uri};

/// Arguments.
#[derive(clap::Args)]
pub struct Arguments {
    /// The model, an ONNX file from `vedge convert`
    #[arg(required = true)]
    model: Option<PathBuf>,
    /// Where frames come from
    #[arg(required = true)]
    source: Option<String>,
    /// How many classes an answer has, best first
    #[arg(long, value_name = "K", default_value = "5")]
    top: NonZeroUsize,
    /// End after so many answers
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max_frames: Option<u64>,
    /// Worker threads [default: as many as there are CPUs]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// How answers are written
    #[arg(long, value_enum, default_value = "json")]
    format: Format,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Format {
    /// One JSON line a frame
    Json,
    /// One line a frame for people
    Text,
}

/// Runs until the source ends, or until it is told to stop.
pub fn run(a: &Arguments) -> Result<ExitCode> {
    let (Some(path), Some(source)) = (&a.model, &a.source) else { unreachable!("clap requires both") };
    let uri: Uri = source.parse()?;
    let session = super::load(path, super::threads(a.threads))?;
    let (kernel, threads) = (session.kernel(), session.threads());
    let mut model = Model::new(session).map_err(|e| e.in_file(path))?;
    let input = (model.card().preprocess.width, model.card().preprocess.height);
    let source = source::open(&uri, input)?;
    let card = model.card();
    let s = if threads == 1 { "" } else { "s" };
    let kind = format!("{}, {}", card.architecture, card.precision);
    eprintln!("model: {} ({kind}), {kernel} kernels, {threads} thread{s}", card.name);
    eprintln!("source: {}", source.describe());

    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // the second one ends the program at once
        signal_hook::flag::register_conditional_shutdown(signal, 1, Arc::clone(&stop))?;
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    let out = std::io::stdout();
    let mut sink: Box<dyn ResultSink> = match a.format {
        Format::Json => Box::new(JsonLines(out)),
        Format::Text => Box::new(Text(out)),
    };
    let options = pipeline::Options { top: a.top.get(), max_frames: a.max_frames };
    let mut warn = |e: &vedge_runtime::Error| eprintln!("warning: skipped: {e}");
    let summary = pipeline::run(&mut model, source, &mut *sink, &options, &stop, &mut warn)?;
    eprintln!("{}", describe(&summary));
    Ok(if summary.failed > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn describe(s: &Summary) -> String {
    let seconds = s.elapsed.as_secs_f64();
    let frames = if s.answers == 1 { "frame" } else { "frames" };
    let mut text = format!("{} {frames}", s.answers);
    if s.answers > 1 && seconds > 0.0 {
        text += &format!(" in {seconds:.1} s ({:.1} a second)", s.answers as f64 / seconds);
    }
    if s.dropped > 0 {
        text += &format!(", {} dropped because newer ones had come", s.dropped);
    }
    if s.failed > 0 {
        let files = if s.failed == 1 { "file" } else { "files" };
        text += &format!(", {} {files} could not be read as pictures", s.failed);
    }
    text
}

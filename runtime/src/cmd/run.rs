//! `vedge-run MODEL SOURCE`: classify frames.

mod outputs;

use crate::tell::tell;
use crate::watch::Watch;
use anyhow::Result;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use vedge_runtime::Error;
use vedge_runtime::decide::Rules;
use vedge_runtime::model::card::Card;
use vedge_runtime::pipeline::{self, Model, Summary, Totals};
use vedge_runtime::preprocess::{Region, View};
use vedge_runtime::sink::{JsonLines, Lines, Outlet, ResultSink, Text};
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
    /// Which JSON lines are written
    #[arg(long, value_enum, default_value = "frames")]
    lines: Which,
    /// What to do when a camera fails while running
    #[arg(long, value_enum, default_value = "retry")]
    on_failure: Failure,
    /// Wait for a camera that cannot be opened, instead of ending: for services that start before it is plugged in
    #[arg(long)]
    wait: bool,
    /// Report latencies every so many seconds, on standard error; 0 for never
    #[arg(long, value_name = "SECONDS", default_value = "0")]
    report: u64,
    #[command(flatten)]
    look: Look,
    #[command(flatten)]
    decide: Decide,
    #[command(flatten)]
    outputs: outputs::Outputs,
}

/// How the camera is mounted.
#[derive(clap::Args)]
#[command(next_help_heading = "Picture")]
struct Look {
    /// Only this part of the picture: LEFT,TOP,WIDTHxHEIGHT in pixels of the source
    #[arg(long, value_name = "PART")]
    region: Option<Region>,
    /// Turn clockwise by so many degrees
    #[arg(long, value_name = "DEGREES", default_value = "0", value_parser = ["0", "90", "180", "270"])]
    rotate: String,
    /// Mirror left to right, after turning
    #[arg(long)]
    flip: bool,
}

/// When a class counts as seen.
#[derive(clap::Args)]
#[command(next_help_heading = "State and events")]
struct Decide {
    /// Smoothed probability from which a class is there; or LABEL=P for one label, may be given several times
    #[arg(long, value_name = "P", value_parser = threshold)]
    threshold: Vec<(Option<String>, f32)>,
    /// How far below its threshold a class that is there may fall
    #[arg(long, value_name = "P", default_value = "0.1")]
    hysteresis: f32,
    /// Time constant of the smoothing in seconds; 0 for none
    #[arg(long, value_name = "SECONDS", default_value = "0.5", value_parser = seconds)]
    smooth: Duration,
    /// When a frame shows none of the classes: auto takes the limits of the model's card, which few of its calibration
    /// pictures exceed; off leaves it to the options below
    #[arg(long, value_enum, default_value = "off")]
    unknown: Unknown,
    /// A frame of higher energy shows none of the classes (`energy` is in the JSON lines)
    #[arg(long, value_name = "E", allow_negative_numbers = true)]
    max_energy: Option<f32>,
    /// A frame whose best class is less likely shows none of the classes
    #[arg(long, value_name = "P")]
    min_confidence: Option<f32>,
    /// A frame that looks farther from the calibration pictures shows none of the classes (`distance` is in the JSON lines)
    #[arg(long, value_name = "D")]
    max_distance: Option<f32>,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Unknown {
    /// By the model's card
    Auto,
    /// By --max-energy, --min-confidence and --max-distance alone
    Off,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Format {
    /// JSON lines
    Json,
    /// One line a frame for people
    Text,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Which {
    /// One a frame
    Frames,
    /// One for each class that comes or goes
    Events,
    /// Both
    Both,
}

#[derive(Clone, Copy, PartialEq, clap::ValueEnum)]
enum Failure {
    /// Start it again, for ever
    Retry,
    /// End with an error
    End,
}

fn threshold(text: &str) -> Result<(Option<String>, f32), String> {
    let (label, value) = text.rsplit_once('=').map_or((None, text), |(label, value)| (Some(label.to_string()), value));
    let p = value.parse().map_err(|_| format!("`{value}` is not a number between 0 and 1"))?;
    Ok((label, p))
}

fn seconds(text: &str) -> Result<Duration, String> {
    let number = text.parse().ok().filter(|s| (0.0..=3600.0).contains(s));
    number.map(Duration::from_secs_f64).ok_or_else(|| format!("`{text}` is not a number between 0 and 3600"))
}

impl Decide {
    fn rules(&self, card: &Card) -> Result<Rules, Error> {
        let mut rules = Rules { smooth: self.smooth, hysteresis: self.hysteresis, ..Rules::default() };
        (rules.max_energy, rules.min_confidence) = (self.max_energy, self.min_confidence);
        rules.max_distance = self.max_distance;
        let limits = card.certainty.as_ref().map(|c| &c.limits);
        if self.max_distance.is_some() && limits.is_none_or(|l| l.looks.is_none()) {
            return Err(Error::Usage {
                what: "--max-distance: the model's card does not tell how its calibration pictures looked".into(),
                hint: "convert it again, with pictures: vedge convert MODEL --calib DIR".into(),
            });
        }
        if self.unknown == Unknown::Auto {
            let limits = limits.ok_or_else(|| Error::Usage {
                what: "--unknown auto: the model's card has no limits".into(),
                hint: "convert it with pictures (vedge convert --calib DIR), or give --min-confidence".into(),
            })?;
            rules.max_energy = rules.max_energy.or(limits.energy);
            rules.min_confidence = rules.min_confidence.or(Some(limits.confidence));
            rules.max_distance = rules.max_distance.or(limits.looks.as_ref().map(|l| l.distance));
        }
        for (label, p) in &self.threshold {
            match label {
                Some(label) => rules.thresholds.push((label.clone(), *p)),
                None => rules.threshold = *p,
            }
        }
        Ok(rules)
    }
}

impl Look {
    fn view(&self) -> View {
        let turns = ["0", "90", "180", "270"].iter().position(|r| *r == self.rotate).unwrap_or(0) as u8;
        View { region: self.region, turns, flip: self.flip }
    }
}

impl Arguments {
    fn options(&self, card: &Card) -> Result<pipeline::Options, Error> {
        Ok(pipeline::Options {
            top: self.top.get(),
            max_frames: self.max_frames,
            retry: self.on_failure == Failure::Retry,
            view: self.look.view(),
            rules: self.decide.rules(card)?,
            report_every: Some(self.report).filter(|&s| s > 0).map(Duration::from_secs),
        })
    }

    fn output(&self) -> Box<dyn ResultSink> {
        let out = std::io::stdout();
        let lines = match self.lines {
            Which::Frames => Lines::Frames,
            Which::Events => Lines::Events,
            Which::Both => Lines::Both,
        };
        match self.format {
            Format::Json => Box::new(JsonLines { out, lines }),
            Format::Text => Box::new(Text(out)),
        }
    }
}

/// Runs until the source ends, or until it is told to stop.
pub fn run(a: &Arguments) -> Result<ExitCode> {
    let (Some(path), Some(source)) = (&a.model, &a.source) else { unreachable!("clap requires both") };
    let uri: Uri = source.parse()?;
    let session = super::load(path, super::threads(a.threads))?;
    let (kernel, threads) = (session.kernel(), session.threads());
    let mut model = Model::new(session).map_err(|e| e.in_file(path))?;
    let options = a.options(model.card())?;
    let input = (model.card().preprocess.width, model.card().preprocess.height);
    let source = if a.wait { source::open_or_wait(&uri, input)? } else { source::open(&uri, input)? };
    let card = model.card();
    let s = if threads == 1 { "" } else { "s" };
    let kind = format!("{}, {}", card.architecture, card.precision);
    tell(format_args!("model: {} ({kind}), {kernel} kernels, {threads} thread{s}", card.name));
    tell(format_args!("source: {}", source.describe()));

    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // the second one ends the program at once
        signal_hook::flag::register_conditional_shutdown(signal, 1, Arc::clone(&stop))?;
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    let totals = Arc::new(Totals::default());
    let mut outlets = vec![Outlet::new("standard output", a.output())?];
    outlets.extend(a.outputs.open(&model, &totals)?);
    let mut watch = Watch::new();
    let summary = pipeline::run(&mut model, source, outlets, &options, &totals, &stop, &mut watch);
    watch.stopping();
    let summary = summary?;
    tell(describe(&summary));
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
    if s.unsent > 0 {
        text += &format!(", {} answers not written because their reader was slow", s.unsent);
    }
    if s.events_lost > 0 {
        text += &format!(", {} events lost: a reader was slow for too long", s.events_lost);
    }
    if s.unkept > 0 {
        text += &format!(", {} frames not kept because they could not be written", s.unkept);
    }
    if s.failed > 0 {
        let files = if s.failed == 1 { "file" } else { "files" };
        text += &format!(", {} {files} could not be read as pictures", s.failed);
    }
    text
}

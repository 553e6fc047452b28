//! `vedge demo`

use super::inspect::{plan_table, ways};
use super::{convert::encode_checked, out, table};
use crate::convert::{Pictures, Settings, convert};
use crate::evaluate::{Score, evaluate, open};
use crate::row;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use vedge_calibration::Dataset;
use vedge_runtime::sink::{JsonLines, Lines, Outlet};
use vedge_runtime::{Error, Options, Session, pipeline, source};

/// The whole way on a shipped model and shipped pictures: quantize, compare with float, classify a folder.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Which shipped model.
    #[arg(long, value_enum, default_value_t)]
    model: Model,
    /// Folder to write to; a temporary one where left out.
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
#[value(rename_all = "snake_case")]
enum Model {
    #[default]
    DeitNano,
    MobilevitNano,
}

impl Model {
    fn name(self) -> &'static str {
        match self {
            Model::DeitNano => "deit_nano",
            Model::MobilevitNano => "mobilevit_nano",
        }
    }
}

/// Runs the command.
pub fn run(a: &Args) -> Result<()> {
    let shipped = shipped()?;
    let name = a.model.name();
    let source = shipped.join(format!("{name}.onnx"));
    let dir = a.output.clone().unwrap_or_else(|| std::env::temp_dir().join("vedge-demo"));
    let camera = dir.join("camera");
    std::fs::create_dir_all(&camera).with_context(|| format!("cannot create {}", camera.display()))?;

    let calibration = shipped.join("fashion/calibration");
    out::text(&format!("1  Quantize {} with pictures of {}\n", shown(&source), shown(&calibration)))?;
    let settings = Settings {
        calibration: Some(Pictures { dir: calibration, count: 128 }),
        preprocess: Some(shipped.join("fashion.json").display().to_string()),
        ..Settings::default()
    };
    let done = convert(&source, &settings)?;
    let int8 = dir.join(format!("{name}.vedge.onnx"));
    vedge_runtime::files::write_atomic(&int8, &encode_checked(&done.graph)?)?;
    out::text(&indent(&format!("{}\nwrote {}\n", done.card.provenance.passes.join("\n"), int8.display())))?;

    let options = Options::default();
    let (mut subjects, labels) = open(&[source.clone(), int8.clone()], None, &options)?;
    let test = Dataset::open(&shipped.join("fashion/test"), labels.as_deref())?;
    out::text(&format!("\n2  Compare on {} pictures that calibration did not see\n", test.items.len()))?;
    let scores = evaluate(&mut subjects, &test.items, &test.labels)?;
    out::text(&indent(&table::format(&comparison(&scores))))?;
    out::text("\n   How the INT8 model runs (number of operators)\n")?;
    out::text(&indent(&table::format(&plan_table(&ways(subjects[1].session.plan())))))?;

    out::text("\n3  Classify a folder as if it were a camera, one JSON line a picture\n")?;
    for (i, item) in test.pick(test.labels.len()).iter().enumerate().take(10) {
        let label = test.labels[item.class].replace(|c: char| !c.is_ascii_alphanumeric(), "_");
        std::fs::copy(&item.path, camera.join(format!("{i:02}_{label}.png")))?;
    }
    stream(&int8, &camera)?;
    out::text(&format!("\nnext: cargo run --release --bin vedge-run -- {} {}\n", int8.display(), camera.display()))?;
    Ok(())
}

/// The repository's `models` folder: where this binary was built, or below the working directory.
fn shipped() -> Result<PathBuf> {
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models");
    let candidates = [built.canonicalize().unwrap_or(built), PathBuf::from("models")];
    match candidates.iter().find(|c| c.join("fashion.json").is_file()) {
        Some(dir) => Ok(dir.clone()),
        None => Err(Error::Usage {
            what: format!("the shipped models are not at {} any more", candidates[0].display()),
            hint: "run vedge demo in the repository's top folder".into(),
        }
        .into()),
    }
}

/// Relative to the working directory where it lies below it.
fn shown(path: &Path) -> String {
    let here = std::env::current_dir().unwrap_or_default();
    path.strip_prefix(here).unwrap_or(path).display().to_string()
}

fn indent(text: &str) -> String {
    text.lines().map(|l| format!("     {l}\n")).collect()
}

/// Float against INT8, a line for each thing a person asks.
fn comparison(scores: &[Score]) -> Vec<Vec<String>> {
    let [float, int8] = scores else { return vec![] };
    let percent = |x: f64| format!("{:.1} %", x * 100.0);
    let mega = |b: u64| format!("{:.2} MB", b as f64 / 1e6);
    let ms = |m: f64| format!("{m:.2} ms");
    vec![
        row!["", "float", "INT8"],
        row!["right answers", percent(float.top1), percent(int8.top1)],
        row!["same answer as float", "", int8.agreement.map_or(String::new(), percent)],
        row!["file size", mega(float.bytes), mega(int8.bytes)],
        row!["one picture, one thread", ms(float.median_ms), ms(int8.median_ms)],
    ]
}

/// Runs a folder through the board's own pipeline.
fn stream(model: &Path, folder: &Path) -> Result<()> {
    let mut model = pipeline::Model::new(Session::load(model, &Options::default())?)?;
    let size = (model.card().preprocess.width, model.card().preprocess.height);
    let files = source::uri::Files { path: folder.into(), fps: None, repeat: false };
    let frames = source::open(&source::Uri::Files(files), size)?;
    let lines = JsonLines { out: std::io::stdout(), lines: Lines::Frames };
    let outlets = vec![Outlet::new("standard output", Box::new(lines))?];
    let how = pipeline::Options { top: 1, ..pipeline::Options::default() };
    let (totals, stop) = (pipeline::Totals::default(), AtomicBool::new(false));
    pipeline::run(&mut model, frames, outlets, &how, &totals, &stop, &mut Warnings)?;
    Ok(())
}

/// Tells about files that are skipped.
struct Warnings;

impl pipeline::Watcher for Warnings {
    fn notice(&mut self, notice: pipeline::Notice) {
        if let pipeline::Notice::Skipped(e) = notice {
            eprintln!("warning: {e}");
        }
    }

    fn alive(&mut self, _: u64) {}
}

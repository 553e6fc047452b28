//! `vedge convert`

use super::{parse_channels, parse_size, read_labels};
use crate::budget::{self, Amount, Budget, Found, Search};
use crate::certainty;
use crate::convert::{Converted, Pictures, Precision, Settings, convert};
use crate::merge::Schedule;
use crate::prune::{Prices, Request};
use crate::quantize::{Preset, Target};
use crate::report::{RUNS, Report, gather, page, time};
use anyhow::Result;
use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use vedge_calibration::{Calibrator, Dataset, Item};
use vedge_runtime::onnx::Graph;
use vedge_runtime::{Error, Options, Session};

/// Make a model small and fast: freeze, fold, quantize, embed what the board must know.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The ONNX model.
    model: PathBuf,
    /// File to write.
    #[arg(short, long, required_unless_present = "dry_run")]
    output: Option<PathBuf>,
    /// Resolution in pixels, N or HxW; the model's own where left out.
    #[arg(long, value_parser = parse_size)]
    size: Option<(usize, usize)>,
    /// Size of a patch in pixels, N or HxW: its kernel is resized (FlexiViT); larger patches are fewer. The model's own where
    /// left out.
    #[arg(long, value_parser = parse_size)]
    patch: Option<(usize, usize)>,
    /// Calibration pictures, DIR/<class>/<picture>.
    #[arg(long, value_name = "DIR")]
    calib: Option<PathBuf>,
    /// At most so many calibration pictures, spread over the classes.
    #[arg(long, value_name = "N", default_value_t = 128)]
    calib_count: usize,
    /// Element types of the layers; auto says whether INT8 pays for the model, and takes float16 where it does not.
    #[arg(long, value_enum, default_value_t)]
    precision: Precision,
    /// Who will run an INT8 file.
    #[arg(long, value_enum, default_value_t)]
    preset: Preset,
    /// How ranges of activations are chosen: min-max, moving-average, percentile, mse or entropy; every way is tried where
    /// left out, and the best taken.
    #[arg(long, value_name = "NAME", value_parser = parse_calibrator)]
    calibrator: Option<Calibrator>,
    /// Run the calibration pictures again even where what they told was kept from another conversion; keep nothing.
    #[arg(long)]
    no_cache: bool,
    /// Leave out hidden neurons: this percentage of the MLPs' work. The layers after them are repaired by least squares.
    #[arg(long, value_name = "PERCENT")]
    prune_mlp: Option<f64>,
    /// Leave out attention heads: this percentage of their work. The layers after them are repaired by least squares.
    #[arg(long, value_name = "PERCENT")]
    prune_heads: Option<f64>,
    /// Merge similar tokens after each block's attention: how many a block, such as 8, or 8,8,4, or 16x3,8x4.
    #[arg(long, value_name = "TOKENS", value_parser = Schedule::parse)]
    merge_tokens: Option<Schedule>,
    /// Search resolution, tokens, neurons, heads and precision for a model that takes at most so long: 0.4x of plain INT8, or 15ms.
    #[arg(long, value_name = "0.4x|15ms", value_parser = Amount::latency)]
    target_latency: Option<Amount>,
    /// The same for the size of the file: 0.5x of plain INT8, or 12MB.
    #[arg(long, value_name = "0.5x|12MB", value_parser = Amount::size)]
    target_size: Option<Amount>,
    /// Where the search keeps the times it measured, or has those of a board from: a file that exists is used as it is, so that
    /// the search decides the same.
    #[arg(long, value_name = "FILE")]
    latency_table: Option<PathBuf>,
    /// Show what a search would try, and stop.
    #[arg(long)]
    dry_run: bool,
    /// Write models there that take as long as what a search would try: `vedge bench --on HOST DIR/*.onnx --json` makes a
    /// latency table of them.
    #[arg(long, value_name = "DIR", requires = "dry_run")]
    plans: Option<PathBuf>,
    /// Do not repair after pruning, for comparison.
    #[arg(long)]
    no_repair: bool,
    /// Points of top-1 that INT8 may lose on the judging pictures: layers stay float16 until it does not lose more.
    #[arg(long, value_name = "POINTS", value_parser = parse_share)]
    max_drop: Option<f64>,
    /// Least share of judging pictures, in percent, with the float model's answer: layers stay float16 until it is met.
    #[arg(long, value_name = "PERCENT", value_parser = parse_share)]
    min_agreement: Option<f64>,
    /// Layers that stay float32 in an INT8 model: an operator such as Conv, or names, in which * stands for anything. Repeatable.
    #[arg(long, value_name = "OPERATOR|NAME")]
    keep_float: Vec<String>,
    /// Labels, one a line in the order of the class indices; else the calibration folders' names.
    #[arg(long, value_name = "FILE")]
    labels: Option<PathBuf>,
    /// How pictures become the input: imagenet, torchvision, deit, timm-vit, half, …, or a JSON file.
    #[arg(long, value_name = "PRESET|FILE.json")]
    preprocess: Option<String>,
    /// Mean in place of the preset's, in units of 0 to 1: one number or three.
    #[arg(long, value_parser = parse_channels)]
    mean: Option<[f32; 3]>,
    /// Standard deviation in place of the preset's, in units of 0 to 1: one number or three.
    #[arg(long, value_parser = parse_channels)]
    std: Option<[f32; 3]>,
    /// Threads of the calibration runs.
    #[arg(long, default_value_t = default_threads())]
    threads: NonZeroUsize,
    /// A page about what the model loses and where, what was tried, size and speed; the same as data where the name ends in
    /// .json.
    #[arg(long, value_name = "FILE.html")]
    report: Option<PathBuf>,
    /// Labelled pictures for the report, DIR/<class>/<picture>, at most 500 of them; else those of the calibration folder that
    /// calibration did not use.
    #[arg(long, value_name = "DIR", requires = "report")]
    report_data: Option<PathBuf>,
    /// What was done as JSON on standard output; with --report all that it measures.
    #[arg(long)]
    json: bool,
}

/// A number from 0 to 100.
fn parse_share(s: &str) -> Result<f64, String> {
    let number = s.parse::<f64>().ok().filter(|n| (0.0..=100.0).contains(n));
    number.ok_or_else(|| "expected a number from 0 to 100".into())
}

fn parse_calibrator(s: &str) -> Result<Calibrator, String> {
    let names = Calibrator::ALL.map(Calibrator::key).join(", ");
    Calibrator::ALL.into_iter().find(|c| c.key() == s).ok_or_else(|| format!("expected one of {names}"))
}

/// Where statistics are kept: `$XDG_CACHE_HOME/vedge`, or `~/.cache/vedge`.
fn cache_folder() -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = || set("HOME").map(|h| h.join(".cache"));
    set("XDG_CACHE_HOME").filter(|p| p.is_absolute()).or_else(home).map(|p| p.join("vedge"))
}

fn default_threads() -> NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

/// Runs the command.
pub fn run(a: &Args) -> Result<()> {
    let output = a.output.as_deref().unwrap_or(Path::new(""));
    if !a.dry_run {
        refuse_overwriting_source(&a.model, output)?;
        vedge_runtime::files::check_output(output)?;
    }
    if !a.precision.tries_int8() && a.preset != Preset::default() {
        return Err(Error::Usage {
            what: "--preset has no meaning without --precision int8".into(),
            hint: "leave --preset out".into(),
        }
        .into());
    }
    if a.calibrator.is_some() && a.preset == Preset::Cpu {
        return Err(Error::Usage {
            what: "--calibrator has no meaning with --preset cpu, whose ranges are found row by row".into(),
            hint: "leave one of them out".into(),
        }
        .into());
    }
    if let Some(path) = &a.report {
        check_report(a, path)?;
    }
    let settings = Settings {
        explain: a.report.is_some(),
        size: a.size,
        patch: a.patch,
        precision: a.precision,
        preset: a.preset,
        target: Target { max_drop: a.max_drop, min_agreement: a.min_agreement.map(|p| p / 100.0) },
        prune: Request { heads: a.prune_heads, neurons: a.prune_mlp, no_repair: a.no_repair },
        prices: Prices::new(),
        merge: a.merge_tokens.clone(),
        calibrator: a.calibrator,
        keep_float: a.keep_float.clone(),
        cache: if a.no_cache { None } else { cache_folder() },
        judges: None,
        calibration: a.calib.as_ref().map(|dir| Pictures { dir: dir.clone(), count: a.calib_count }),
        preprocess: a.preprocess.clone(),
        mean: a.mean,
        std: a.std,
        labels: a.labels.as_ref().map(|p| read_labels(p)).transpose()?,
        options: Options { threads: a.threads.get(), ..Options::default() },
    };
    let (settings, mut found) = match searched(a, settings)? {
        Searched::Shown => return Ok(()),
        Searched::Settings(settings) => (*settings, None),
        Searched::Found(settings, found) => (*settings, Some(found)),
    };
    let mut done = match &mut found {
        Some(found) => budget::take(&a.model, &settings, found)?,
        None => convert(&a.model, &settings)?,
    };
    if let Some(found) = &found {
        eprint!("{}", budget::plot::table(&found.points));
        done.card.provenance.passes.push(found.note.clone());
        done.card.embed(&mut done.graph);
    }
    let bytes = encode_checked(&done.graph)?;
    let written = bytes.len();
    vedge_runtime::files::write_atomic(output, &bytes)?;
    for w in &done.warnings {
        eprintln!("warning: {w}");
    }
    let source = std::fs::metadata(&a.model)?.len();
    let measured = a
        .report
        .as_ref()
        .map(|path| write_report(a, path, &done, found.as_ref(), [source, written as u64], &settings.options));
    let measured = measured.transpose()?;
    if a.json {
        let mut json = report(a, &done, found.as_ref(), source, written as u64);
        json["report"] = serde_json::to_value(&measured)?;
        return super::out::json(&json);
    }
    describe(a, &done, source, written as u64);
    if done.verdict.is_some() {
        eprintln!("{}", measured_here(&done)?);
    }
    Ok(())
}

/// What this machine says to the verdict; it decides nothing, so that the same inputs give the same file.
fn measured_here(done: &Converted) -> Result<String> {
    let items = &done.items[..done.items.len().min(4)];
    let [float, model] = time(&done.subject([0, 0]), items)?;
    let ratio = float.min_ms / model.min_ms;
    let surprise = match (done.card.precision == "int8", ratio < 1.05) {
        (true, true) => ": here it is not faster, fp16 would keep more of the answers",
        _ => "",
    };
    Ok(format!(
        "measured here, one thread, fastest of {RUNS}: float {:.2} ms, {} {:.2} ms{surprise}",
        float.min_ms, done.card.precision, model.min_ms
    ))
}

/// Refuses what would fail after minutes of work.
fn check_report(a: &Args, path: &Path) -> Result<()> {
    vedge_runtime::files::check_output(path)?;
    let usage = |what: String, hint: &str| Err(Error::Usage { what, hint: hint.into() }.into());
    match path.extension().and_then(|e| e.to_str()) {
        Some("html" | "htm" | "json") => {}
        _ => {
            return usage(
                format!("--report {}: is neither .html nor .json", path.display()),
                "name it FILE.html or FILE.json",
            );
        }
    }
    if a.output.as_deref() == Some(path) {
        return usage(format!("--report {}: is the output too", path.display()), "choose another name for the report");
    }
    if a.calib.is_none() && a.report_data.is_none() {
        return usage("--report needs labelled pictures to measure on".into(), "add --calib DIR or --report-data DIR");
    }
    Ok(())
}

/// At most so many pictures are measured for the report, and so many make the unused ones of the calibration folder enough.
const REPORT_PICTURES: (usize, usize) = (500, 50);

fn write_report(
    a: &Args,
    path: &Path,
    done: &Converted,
    found: Option<&Found>,
    bytes: [u64; 2],
    options: &Options,
) -> Result<Report> {
    let (items, what) = report_pictures(a, done)?;
    let commands = commands(a);
    let mut measured = gather(&done.subject(bytes), &items, &what, commands, options)?;
    measured.search = found.map(|f| f.points.clone()).unwrap_or_default();
    let text = match path.extension().and_then(|e| e.to_str()) {
        Some("json") => serde_json::to_string_pretty(&measured)? + "\n",
        _ => page::html(&measured),
    };
    vedge_runtime::files::write_atomic(path, text.as_bytes())?;
    eprintln!("report: {}", path.display());
    Ok(measured)
}

fn report_pictures(a: &Args, done: &Converted) -> Result<(Vec<Item>, String)> {
    let labels = Some(done.card.labels.as_slice()).filter(|l| !l.is_empty());
    let (most, enough) = REPORT_PICTURES;
    if let Some(dir) = &a.report_data {
        let items = Dataset::open(dir, labels)?.pick(most);
        return Ok((items, format!("pictures of {}", dir.display())));
    }
    let dir = a.calib.as_deref().unwrap_or(Path::new("."));
    let used: BTreeSet<&PathBuf> = done.items.iter().map(|i| &i.path).collect();
    let mut others = Dataset::open(dir, labels)?.pick(usize::MAX);
    others.retain(|i| !used.contains(&i.path));
    if others.len() < enough {
        return Ok((done.items.clone(), "the calibration pictures themselves, so expect less on others".into()));
    }
    let count = others.len().min(most);
    let spread = (0..count).map(|i| others[i * others.len() / count].clone()).collect();
    Ok((spread, format!("pictures of {} that calibration did not use", dir.display())))
}

/// What makes this again, as a shell would read it.
fn commands(a: &Args) -> Vec<String> {
    let quoted =
        |s: &str| match s.chars().all(|c| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c)) && !s.is_empty() {
            true => s.to_string(),
            false => format!("'{}'", s.replace('\'', "'\\''")),
        };
    let mut own: Vec<String> = std::env::args().skip(1).map(|s| quoted(&s)).collect();
    own.insert(0, "vedge".into());
    let output = a.output.as_deref().unwrap_or(Path::new(""));
    let [model, output] = [&a.model, output].map(|p| quoted(&p.display().to_string()));
    let data = a.report_data.as_ref().or(a.calib.as_ref()).map_or("DIR".into(), |p| quoted(&p.display().to_string()));
    vec![own.join(" "), format!("vedge eval {model} {output} --data {data}"), format!("vedge bench {output}")]
}

/// What came before the conversion.
enum Searched {
    /// A plan was shown, and that is all.
    Shown,
    /// No search was asked for.
    Settings(Box<Settings>),
    /// The settings, and what was found.
    Found(Box<Settings>, Found),
}

/// Runs the search that was asked for.
fn searched(a: &Args, settings: Settings) -> Result<Searched> {
    let asked = a.target_latency.is_some() || a.target_size.is_some();
    if !asked && (a.dry_run || a.latency_table.is_some()) {
        return Err(Error::Usage {
            what: "--dry-run and --latency-table belong to a search".into(),
            hint: "add --target-latency 0.5x or --target-size 0.5x".into(),
        }
        .into());
    }
    if !asked {
        return Ok(Searched::Settings(Box::new(settings)));
    }
    let budget = Budget {
        latency: a.target_latency,
        size: a.target_size,
        max_drop: a.max_drop.unwrap_or(1.0),
        table: a.latency_table.clone(),
    };
    // A quarter of the pictures judges: few of them could not tell a point of top-1.
    let searching = Settings { judges: Some(usize::MAX), ..settings.clone() };
    let mut search = Search::new(&a.model, &searching, &budget)?;
    if a.dry_run {
        print!("{}", search.dry_run()?);
        if let Some(folder) = &a.plans {
            println!("{} models written to {}", search.write_plans(folder)?, folder.display());
        }
        return Ok(Searched::Shown);
    }
    let found = search.run()?;
    Ok(Searched::Found(Box::new(searching), found))
}

/// The file's bytes, after they went through the board's loader themselves.
///
/// # Errors
/// The board would refuse the file.
pub fn encode_checked(graph: &Graph) -> Result<Vec<u8>> {
    let bytes = graph.encode();
    let again = Graph::decode(bytes.clone().into(), None)?;
    Session::from_graph(again, &Options::default())?;
    Ok(bytes)
}

fn refuse_overwriting_source(source: &Path, output: &Path) -> Result<()> {
    match (source.canonicalize(), output.canonicalize()) {
        (Ok(s), Ok(o)) if s == o => Err(Error::Usage {
            what: format!("the output {} is the source model itself", output.display()),
            hint: "choose another name for the output".into(),
        }
        .into()),
        _ => Ok(()),
    }
}

fn report(a: &Args, c: &Converted, found: Option<&Found>, source: u64, written: u64) -> serde_json::Value {
    serde_json::json!({
        "v": 1,
        "output": a.output,
        "bytes": {"source": source, "output": written},
        "architecture": c.architecture,
        "passes": c.card.provenance.passes,
        "pruned": c.pruned,
        "integer_layers": c.layers.iter().map(|l| &l.name).collect::<Vec<_>>(),
        "float_layers": c.skipped.iter().map(|s| serde_json::json!({"name": s.name, "reason": s.reason})).collect::<Vec<_>>(),
        "calibrators": c.candidates,
        "verdict": c.verdict,
        "search": found,
        "warnings": c.warnings,
        "card": c.card,
    })
}

fn describe(a: &Args, c: &Converted, source: u64, written: u64) {
    for line in &c.card.provenance.passes {
        eprintln!("  {line}");
    }
    for s in &c.skipped {
        eprintln!("  stays float: {} ({})", s.name, s.reason);
    }
    if let Some(certainty) = &c.card.certainty {
        eprintln!("  probabilities: {}", certainty::describe(certainty));
    }
    let mega = |b: u64| b as f64 / 1e6;
    eprintln!(
        "{}: {}, {}, {:.1} MB (source {:.1} MB)",
        a.output.as_deref().unwrap_or(Path::new("")).display(),
        c.card.architecture,
        c.card.precision,
        mega(written),
        mega(source)
    );
    eprintln!(
        "next: vedge eval {} {} --data DIR",
        a.model.display(),
        a.output.as_deref().unwrap_or(Path::new("")).display()
    );
}

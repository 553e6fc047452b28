//! `vedge-run doctor`: is this board fit, and does the model compute here what it should?

use anyhow::Result;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use vedge_runtime::model::card::{Card, SelfTest};
use vedge_runtime::session::{How, Session};
use vedge_runtime::source::v4l2;
use vedge_runtime::{bench, kernels};

/// Check this machine, and a model on it
#[derive(clap::Args)]
pub struct Arguments {
    /// The model, an ONNX file from `vedge convert`
    model: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// One thing that was looked at.
#[derive(Serialize)]
struct Finding {
    check: &'static str,
    verdict: Verdict,
    found: String,
    /// What to do about it; empty when it is fine.
    remedy: String,
}

#[derive(Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Note,
    Bad,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Finding {
        Finding { check, verdict: Verdict::Ok, found: found.into(), remedy: String::new() }
    }

    fn note(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding { check, verdict: Verdict::Note, found: found.into(), remedy: remedy.into() }
    }

    fn bad(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding { check, verdict: Verdict::Bad, found: found.into(), remedy: remedy.into() }
    }
}

/// Looks at everything; status 1 when something is bad.
pub fn run(a: &Arguments) -> Result<ExitCode> {
    let mut findings = machine();
    findings.extend(cameras());
    if let Some(path) = &a.model {
        findings.extend(model(path));
    }
    if a.json {
        super::print_json(&findings)?;
    } else {
        let mut text = String::new();
        for f in &findings {
            let mark = match f.verdict {
                Verdict::Ok => "ok  ",
                Verdict::Note => "note",
                Verdict::Bad => "BAD ",
            };
            text += &format!("{mark}  {:<12} {}\n", f.check, f.found);
            if !f.remedy.is_empty() {
                text += &format!("                   -> {}\n", f.remedy);
            }
        }
        super::print(&text)?;
    }
    let bad = findings.iter().any(|f| f.verdict == Verdict::Bad);
    Ok(if bad { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn machine() -> Vec<Finding> {
    let mut findings = vec![
        Finding::ok("cpu", format!("{} CPUs, {}: {}", super::threads(None), std::env::consts::ARCH, features())),
        match kernels::detect() {
            Ok(k) => Finding::ok("kernels", k.name),
            Err(e) => Finding::bad("kernels", e.to_string(), e.hint().unwrap_or_default()),
        },
    ];
    if let Some(governor) = read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") {
        findings.push(if governor == "performance" {
            Finding::ok("governor", governor)
        } else {
            let remedy =
                "for steady latency: echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor";
            Finding::note("governor", governor, remedy)
        });
    }
    if let Some((available, total)) = memory() {
        let found = format!("{available} MiB of {total} MiB available");
        findings.push(if available < 200 {
            Finding::note("memory", found, "end other programs: loading ViT-S takes some 200 MiB")
        } else {
            Finding::ok("memory", found)
        });
    }
    if let Some(degrees) = temperature() {
        let found = format!("{degrees:.0} °C");
        findings.push(if degrees >= 80.0 {
            Finding::note("temperature", found, "boards slow down from 80 °C: add a heat sink or a fan")
        } else {
            Finding::ok("temperature", found)
        });
    }
    findings
}

/// CPU features that matter for the kernels.
fn features() -> String {
    let mut found: Vec<&str> = vec![];
    macro_rules! detect {
        ($test:ident: $($name:tt)*) => { $( if std::arch::$test!($name) { found.push($name); } )* };
    }
    #[cfg(target_arch = "x86_64")]
    detect!(is_x86_feature_detected: "avx2" "fma" "avx512f" "avx512vnni" "avxvnni");
    #[cfg(target_arch = "aarch64")]
    detect!(is_aarch64_feature_detected: "neon" "fp16" "dotprod" "i8mm" "bf16");
    if found.is_empty() { "no vector features known to vedge".into() } else { found.join(" ") }
}

fn read(path: impl AsRef<Path>) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|s| s.trim().to_string()).filter(|s| !s.is_empty())
}

/// Available and total memory in MiB.
fn memory() -> Option<(u64, u64)> {
    let text = read("/proc/meminfo")?;
    let field = |name: &str| {
        let line = text.lines().find_map(|l| l.strip_prefix(name))?;
        Some(line.split_whitespace().next()?.parse::<u64>().ok()? / 1024)
    };
    Some((field("MemAvailable:")?, field("MemTotal:")?))
}

/// Hottest thermal zone in °C.
fn temperature() -> Option<f64> {
    let zones = std::fs::read_dir("/sys/class/thermal").ok()?.flatten();
    let degrees = zones.filter_map(|z| read(z.path().join("temp"))?.parse::<f64>().ok());
    degrees.map(|d| d / 1000.0).filter(|d| (-50.0..200.0).contains(d)).reduce(f64::max)
}

fn cameras() -> Vec<Finding> {
    let list = v4l2::list();
    if list.is_empty() {
        return vec![Finding::note("camera", "none", "plug a USB camera in; synthetic:// is a source without one")];
    }
    let describe = |c: v4l2::Listed| {
        if c.usable {
            let formats: Vec<String> = c.formats.into_iter().filter(|f| f.supported).map(|f| f.fourcc).collect();
            Finding::ok("camera", format!("{} {} ({})", c.device.display(), c.name, formats.join(", ")))
        } else {
            Finding::note("camera", format!("{} is not usable", c.device.display()), c.problem)
        }
    };
    list.into_iter().map(describe).collect()
}

fn model(path: &Path) -> Vec<Finding> {
    let mut session = match super::load(path, super::threads(None)) {
        Ok(session) => session,
        Err(e) => {
            let hint =
                e.downcast_ref::<vedge_runtime::Error>().and_then(vedge_runtime::Error::hint).unwrap_or_default();
            return vec![Finding::bad("model", e.to_string(), hint)];
        }
    };
    let convert = "convert it: vedge convert MODEL -o OUT";
    let Some(card) = session.card().cloned() else {
        return vec![Finding::note("model", format!("{} loads, but has no card", path.display()), convert)];
    };
    let found = format!("{} ({}, {}), {} labels", card.name, card.architecture, card.precision, card.labels.len());
    let mut findings = vec![Finding::ok("model", found)];
    findings.push(layers(&session));
    match &card.self_test {
        None => findings.push(Finding::note("self-test", "the model carries none", "convert it again")),
        Some(test) => findings.push(self_test(&mut session, &card, test)),
    }
    findings
}

/// How the operators run; those that carry quantization and run in float all the same are named.
fn layers(session: &Session) -> Finding {
    let counts: Vec<String> = bench::counts(session).into_iter().map(|(how, n)| format!("{n} {how}")).collect();
    let counts = if counts.is_empty() { "plain tract".to_string() } else { counts.join(", ") };
    let fallen = |l: &&vedge_runtime::session::PlanLine| !l.note.is_empty() && l.how != How::Integer;
    let fallen: Vec<String> =
        session.plan().iter().filter(fallen).map(|l| format!("{} ({})", l.name, l.note)).collect();
    if fallen.is_empty() {
        return Finding::ok("operators", counts);
    }
    let found = format!("{counts}; quantized but run in float: {}", fallen.join(", "));
    Finding::note("operators", found, "right, but slower than it could be; vedge inspect MODEL tells more")
}

/// The model's own test: cosine similarity with the expected output, and the same first class.
fn self_test(session: &mut Session, card: &Card, test: &SelfTest) -> Finding {
    let index = session.outputs().iter().position(|o| *o == card.output.name).unwrap_or(0);
    let inputs = bench::inputs(session);
    let got: Vec<f32> = match session.run(&inputs) {
        Ok(outputs) => outputs.get(index).map(|o| o.iter().copied().collect()).unwrap_or_default(),
        Err(e) => return Finding::bad("self-test", e.to_string(), "report this with the model"),
    };
    if got.len() != test.logits.len() {
        let found = format!("{} values, {} expected", got.len(), test.logits.len());
        return Finding::bad("self-test", found, "the file is damaged: copy or convert it again");
    }
    let cosine = cosine(&got, &test.logits);
    let same = first(&got) == first(&test.logits);
    let found =
        format!("cosine {cosine:.6} (at least {}), top-1 {}", test.min_cosine, if same { "same" } else { "differs" });
    if cosine >= f64::from(test.min_cosine) && same {
        Finding::ok("self-test", found)
    } else {
        Finding::bad("self-test", found, "this machine computes something else than the workstation: report it")
    }
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

fn first(values: &[f32]) -> Option<usize> {
    (0..values.len()).max_by(|&a, &b| values[a].total_cmp(&values[b]).then(b.cmp(&a)))
}

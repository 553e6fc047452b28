//! `vedge inspect`

use super::{out, table};
use crate::arch::{self, Architecture};
use crate::passes::{self, Prepare};
use crate::row;
use anyhow::Result;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use vedge_runtime::onnx::Graph;
use vedge_runtime::session::{How, PlanLine};
use vedge_runtime::{Card, Options, Session};

/// What a model is made of and how each part of it will run.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The ONNX model, converted or not.
    model: PathBuf,
    /// Resolution in pixels for a model with a free one, N or HxW.
    #[arg(long, value_parser = super::parse_size)]
    size: Option<(usize, usize)>,
    /// Result as JSON on standard output.
    #[arg(long)]
    json: bool,
}

/// How many operators of a class run in which way.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Ways {
    /// Integer arithmetic.
    pub integer: usize,
    /// One of vedge's fused float operators.
    pub fused: usize,
    /// Plain tract operators in float.
    pub tract: usize,
    /// Moves data only.
    pub layout: usize,
}

/// Everything `vedge inspect` says.
#[derive(Serialize)]
struct Report {
    v: u32,
    model: String,
    bytes: u64,
    operator_set: i64,
    inputs: Vec<Tensor>,
    outputs: Vec<Tensor>,
    architecture: Architecture,
    /// By operator class; absent where the model does not run.
    #[serde(skip_serializing_if = "Option::is_none")]
    runs: Option<BTreeMap<String, Ways>>,
    /// Operators that carry quantization but run in float, and why.
    quantized_but_float: Vec<PlanLine>,
    /// Why the model does not run; absent where it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    unsupported: Option<String>,
    /// What converting would change first.
    preparation: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    card: Option<Card>,
}

#[derive(Serialize)]
struct Tensor {
    name: String,
    /// Dimensions; `null` for a free one.
    shape: Option<Vec<Option<usize>>>,
}

/// Runs the command.
pub fn run(a: &Args) -> Result<()> {
    let report = inspect(a)?;
    match a.json {
        true => out::json(&report),
        false => out::text(&text(&report)),
    }
}

fn inspect(a: &Args) -> Result<Report> {
    let mut graph = Graph::read(&a.model)?;
    let card = Card::of(&graph).map_err(|e| e.in_file(&a.model))?;
    let tensors = |list: &[vedge_runtime::onnx::ValueInfoProto]| -> Vec<Tensor> {
        list.iter().map(|i| Tensor { name: i.name().into(), shape: i.dims() }).collect()
    };
    let (inputs, outputs) = (tensors(&graph.inputs), tensors(&graph.outputs));
    let (mut preparation, mut unsupported) = (vec![], None);
    if card.is_none() {
        let mut prepared = graph.clone();
        match passes::prepare(&mut prepared, &Prepare { size: a.size }) {
            Ok(reports) => {
                preparation =
                    reports.iter().filter(|r| r.changes > 0).map(|r| format!("{}: {}", r.pass, r.line)).collect();
                graph = prepared;
            }
            Err(e) => unsupported = Some(with_hint(&e)),
        }
    }
    let operator_set = graph.opset();
    let architecture = arch::recognise(&graph);
    let mut runs = None;
    let mut quantized_but_float = vec![];
    if unsupported.is_none() {
        match Session::from_graph(graph, &Options::default()) {
            Ok(session) => {
                runs = Some(ways(session.plan()));
                quantized_but_float = session.plan().iter().filter(|l| !l.note.is_empty()).cloned().collect();
            }
            Err(e) => unsupported = Some(with_hint(&e)),
        }
    }
    Ok(Report {
        v: 1,
        model: a.model.display().to_string(),
        bytes: std::fs::metadata(&a.model)?.len(),
        operator_set,
        inputs,
        outputs,
        architecture,
        runs,
        quantized_but_float,
        unsupported,
        preparation,
        card,
    })
}

fn with_hint(e: &vedge_runtime::Error) -> String {
    match e.hint() {
        Some(hint) => format!("{e} ({hint})"),
        None => e.to_string(),
    }
}

/// Counts the operators of a plan by class.
pub fn ways(plan: &[PlanLine]) -> BTreeMap<String, Ways> {
    let mut by_class: BTreeMap<String, Ways> = BTreeMap::new();
    for l in plan {
        let w = by_class.entry(l.class.clone()).or_default();
        match l.how {
            How::Integer => w.integer += 1,
            How::Fused => w.fused += 1,
            How::Tract => w.tract += 1,
            How::Layout => w.layout += 1,
        }
    }
    by_class
}

/// The classes of a plan as a table: classes with integer layers first.
pub fn plan_table(by_class: &BTreeMap<String, Ways>) -> Vec<Vec<String>> {
    let mut rows = vec![row!["operator", "integer", "fused float", "tract float", "data only"]];
    let mut classes: Vec<(&String, &Ways)> = by_class.iter().collect();
    classes.sort_by_key(|(name, w)| (w.integer == 0, w.fused == 0, w.tract == 0, name.as_str()));
    let number = |n: usize| if n == 0 { "-".to_string() } else { n.to_string() };
    for (name, w) in classes {
        rows.push(row![name, number(w.integer), number(w.fused), number(w.tract), number(w.layout)]);
    }
    rows
}

fn text(r: &Report) -> String {
    let mut t = String::new();
    let a = &r.architecture;
    let list = |v: &[usize]| match v {
        [] => "-".to_string(),
        v => v.iter().map(usize::to_string).collect::<Vec<_>>().join(", "),
    };
    let shapes = |tensors: &[Tensor]| {
        let one = |t: &Tensor| {
            let dims = t.shape.as_ref().map_or("?".into(), |s| {
                s.iter().map(|d| d.map_or("?".into(), |d| d.to_string())).collect::<Vec<_>>().join("x")
            });
            format!("{} {dims}", t.name)
        };
        tensors.iter().map(one).collect::<Vec<_>>().join(", ")
    };
    t += &format!("{}: {:.1} MB, operator set {}\n", r.model, r.bytes as f64 / 1e6, r.operator_set);
    t += &facts(&[
        ("architecture", a.family.name().to_string()),
        ("input", shapes(&r.inputs)),
        ("output", shapes(&r.outputs)),
        ("attention blocks", a.blocks.to_string()),
        ("heads", list(&a.heads)),
        ("embedding width", list(&a.width)),
        ("tokens", list(&a.tokens)),
        ("MLP width", list(&a.mlp)),
        ("convolutions", a.convolutions.to_string()),
        ("parameters", format!("{:.2} M", a.parameters as f64 / 1e6)),
        ("multiply-accumulates", a.macs.map_or("unknown (free shapes)".into(), |m| format!("{:.1} M", m as f64 / 1e6))),
    ]);
    if let Some(card) = &r.card {
        t += "\ncard\n";
        t += &facts(&card_lines(card));
        t += &section("what was done", card.provenance.passes.iter().cloned());
    }
    t += &section("converting prepares it", r.preparation.iter().cloned());
    match (&r.runs, &r.unsupported) {
        (_, Some(why)) => t += &format!("\nunsupported: {why}\n"),
        (Some(runs), None) => {
            t += &format!("\nhow it runs (number of operators)\n{}", table::format(&plan_table(runs)))
        }
        (None, None) => {}
    }
    let notes = r.quantized_but_float.iter().map(|l| format!("{} ({}): {}", l.name, l.class, l.note));
    t + &section("quantized, but runs in float", notes)
}

/// A headed list; nothing where the list is empty.
fn section(title: &str, lines: impl Iterator<Item = String>) -> String {
    let body: String = lines.map(|l| format!("  {l}\n")).collect();
    if body.is_empty() { body } else { format!("\n{title}\n{body}") }
}

fn facts(lines: &[(&str, String)]) -> String {
    let width = lines.iter().map(|(k, _)| k.len()).max().unwrap_or(0);
    lines.iter().map(|(key, value)| format!("  {key:width$}  {value}\n")).collect()
}

fn card_lines(c: &Card) -> Vec<(&'static str, String)> {
    let p = &c.preprocess;
    let labels = match c.labels.as_slice() {
        [] => "none".to_string(),
        [one] => format!("1: {one}"),
        l => format!("{}: {} … {}", l.len(), l[0], l[l.len() - 1]),
    };
    let mut lines = vec![
        ("name", c.name.clone()),
        ("precision", format!("{}, activations {:?}", c.precision, c.activations).to_lowercase()),
        ("labels", labels),
        ("output", format!("{} ({})", c.output.name, c.output.kind)),
        (
            "pictures",
            format!(
                "{}x{}, {:?}, {:?}, mean {:?}, std {:?}, {:?}",
                p.height, p.width, p.fit, p.filter, p.mean, p.std, p.channels
            )
            .to_lowercase(),
        ),
        (
            "source",
            format!("{} (SHA-256 {}…), {}", c.provenance.source, short(&c.provenance.sha256), c.provenance.tool),
        ),
    ];
    if let Some(k) = &c.provenance.calibration {
        lines.push(("calibrated with", format!("{} pictures (SHA-256 {}…)", k.pictures, short(&k.sha256))));
    }
    lines
}

fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

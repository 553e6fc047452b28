//! `vedge inspect`

use super::{out, table};
use crate::arch::{self, Architecture};
use crate::passes::{self, Prepare};
use crate::{certainty, row, shapes};
use anyhow::Result;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use vedge_runtime::error::counted;
use vedge_runtime::model::qdq;
use vedge_runtime::onnx::{Graph, NodeProto};
use vedge_runtime::session::{How, PlanLine};
use vedge_runtime::{Card, Error, Options, Session};

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
    /// Cannot run.
    pub unsupported: usize,
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
    /// By operator class; where the model does not run, what is known of it all the same.
    runs: BTreeMap<String, Ways>,
    /// Operators that carry quantization but run in float, and why.
    quantized_but_float: Vec<PlanLine>,
    /// Operators that cannot run, and why.
    unsupported: Vec<PlanLine>,
    /// Why the model does not run; absent where it does.
    #[serde(skip_serializing_if = "Option::is_none")]
    refused: Option<String>,
    /// What to do about that.
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
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

/// Runs the command. A model that does not run is shown all the same, then it is an error.
pub fn run(a: &Args) -> Result<()> {
    let report = inspect(a)?;
    match a.json {
        true => out::json(&report)?,
        false => out::text(&text(&report))?,
    }
    match report.refused {
        Some(what) => Err(Error::Unsupported { what, hint: report.hint.unwrap_or_default() }.into()),
        None => Ok(()),
    }
}

fn inspect(a: &Args) -> Result<Report> {
    let mut source = Graph::read(&a.model)?;
    let card = Card::of(&source).map_err(|e| e.in_file(&a.model))?;
    let tensors = |list: &[vedge_runtime::onnx::ValueInfoProto]| -> Vec<Tensor> {
        list.iter().map(|i| Tensor { name: i.name().into(), shape: i.dims() }).collect()
    };
    let (inputs, outputs) = (tensors(&source.inputs), tensors(&source.outputs));
    qdq::normalize(&mut source);
    let unknown = shapes::unknown_operators(&source);
    let Prepared { graph, preparation, refused } = prepared(&source, &unknown, card.is_some(), a);
    let operator_set = source.opset();
    let architecture = arch::recognise(&graph);
    let (mut plan, mut refused) = match refused {
        None => match Session::survey(graph, &Options::default()) {
            Ok(plan) => (plan, None),
            Err(e) => (vec![], Some(e)),
        },
        Some(e) => (vec![], Some(e)),
    };
    for (index, e) in &unknown {
        plan.push(unsupported_line(&source.nodes[*index], e));
    }
    let (mut quantized_but_float, mut unsupported) = (vec![], vec![]);
    for l in plan.iter().filter(|l| !l.note.is_empty()) {
        if l.how == How::Unsupported { &mut unsupported } else { &mut quantized_but_float }.push(l.clone());
    }
    if !unsupported.is_empty() {
        refused = Some(cannot_run(&unsupported, unknown.into_iter().next().map(|u| u.1)));
    }
    Ok(Report {
        v: 1,
        model: a.model.display().to_string(),
        bytes: std::fs::metadata(&a.model)?.len(),
        operator_set,
        inputs,
        outputs,
        architecture,
        runs: ways(&plan),
        quantized_but_float,
        unsupported,
        hint: refused.as_ref().and_then(|e| e.hint()).map(Into::into),
        refused: refused.map(|e| e.to_string()),
        preparation,
        card,
    })
}

/// A graph as converting would prepare it; where that fails, the graph of the file and why.
struct Prepared {
    graph: Graph,
    preparation: Vec<String>,
    refused: Option<Error>,
}

/// Where operators are unknown, what is around them is prepared with each of them passing its first input on, which is
/// the shape that such an operator has most often; it is left out of the plan when the rest does not fit together so.
fn prepared(source: &Graph, unknown: &[(usize, Error)], converted: bool, a: &Args) -> Prepared {
    let mut graph = source.clone();
    for &(index, _) in unknown {
        let n = &mut graph.nodes[index];
        *n = NodeProto::of("Identity", &[n.input_name(0)], &[n.output.first().map_or("", String::as_str)], vec![]);
    }
    if converted && unknown.is_empty() {
        return Prepared { graph, preparation: vec![], refused: None };
    }
    match passes::prepare(&mut graph, &Prepare { size: a.size, ..Prepare::default() }) {
        Ok(reports) => {
            let changes = reports.iter().filter(|r| r.changes > 0);
            let preparation = changes.map(|r| format!("{}: {}", r.pass, r.line)).collect();
            Prepared { graph, preparation, refused: None }
        }
        Err(e) => Prepared { graph: source.clone(), preparation: vec![], refused: Some(e) },
    }
}

fn unsupported_line(n: &NodeProto, e: &Error) -> PlanLine {
    let name = if n.name().is_empty() { n.output.first().map_or("", String::as_str) } else { n.name() };
    let class = [n.domain(), n.op_type()].into_iter().filter(|s| !s.is_empty()).collect::<Vec<_>>().join(".");
    PlanLine { name: name.into(), class, how: How::Unsupported, note: e.to_string() }
}

/// The error that sums up which operators cannot run.
fn cannot_run(unsupported: &[PlanLine], first: Option<Error>) -> Error {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for l in unsupported {
        *counts.entry(&l.class).or_default() += 1;
    }
    let list: Vec<String> = counts.iter().map(|(class, n)| format!("{class} ({n})")).collect();
    let hint = first.as_ref().and_then(Error::hint).unwrap_or("export the model without them");
    let many = counted(unsupported.len(), "unsupported operator");
    Error::Unsupported {
        what: format!("the model does not run, it has {many}: {}", list.join(", ")),
        hint: hint.into(),
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
            How::Unsupported => w.unsupported += 1,
        }
    }
    by_class
}

/// The classes of a plan as a table: what cannot run (a column only where there is such) first, then classes with
/// integer layers.
pub fn plan_table(by_class: &BTreeMap<String, Ways>) -> Vec<Vec<String>> {
    let mut rows = vec![row!["operator", "integer", "fused float", "tract float", "data only", "unsupported"]];
    let mut classes: Vec<(&String, &Ways)> = by_class.iter().collect();
    classes.sort_by_key(|(name, w)| (w.unsupported == 0, w.integer == 0, w.fused == 0, w.tract == 0, name.as_str()));
    let number = |n: usize| if n == 0 { "-".to_string() } else { n.to_string() };
    for (name, w) in &classes {
        let counts = [w.integer, w.fused, w.tract, w.layout, w.unsupported].map(number);
        rows.push(std::iter::once((*name).clone()).chain(counts).collect());
    }
    if classes.iter().all(|(_, w)| w.unsupported == 0) {
        rows.iter_mut().for_each(|row| row.truncate(5));
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
    if !r.runs.is_empty() {
        t += &format!("\nhow it runs (number of operators)\n{}", table::format(&plan_table(&r.runs)));
    }
    let known = r.runs.values().any(|w| w.integer + w.fused + w.tract + w.layout > 0);
    if !known && !r.unsupported.is_empty() {
        t += "how the other operators run cannot be told: their shapes depend on what is unsupported\n";
    }
    let unsupported = r.unsupported.iter().map(|l| l.note.clone());
    t += &section("unsupported", unsupported);
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
        lines.push(("calibrated with", format!("{} (SHA-256 {}…)", counted(k.pictures, "picture"), short(&k.sha256))));
    }
    let known = c.certainty.as_ref();
    lines.push((
        "probabilities",
        known.map_or("as the model gives them: not compared with labels".into(), certainty::describe),
    ));
    if let Some(limits) = known.map(|c| &c.limits) {
        let energy = limits.energy.map_or(String::new(), |e| format!(" or energy above {e:.2}"));
        let share = 100.0 * limits.share;
        let looks = limits.looks.as_ref().map_or(String::new(), |l| {
            format!(", or looking farther than {:.2} from the others ({:.0} %)", l.distance, 100.0 * l.share)
        });
        let line =
            format!("best class below {:.2}{energy} ({share:.0} % of the pictures each){looks}", limits.confidence);
        lines.push(("none of these", line));
    }
    lines
}

fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

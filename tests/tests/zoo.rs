//! Every graph of the zoo through the converter and our runtime, against what ONNX Runtime answered.
//!
//! `tests/zoo/TABLE.md` is the record; `VEDGE_BLESS=1` writes it anew.

use anyhow::Result;
use ndarray::ArrayD;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use vedge_calibration::{Calibrator, Histogram, Partial, Tap, collect};
use vedge_converter::check::check;
use vedge_converter::passes::{Prepare, prepare};
use vedge_converter::quantize::write::{self, Recipe};
use vedge_converter::quantize::{Sqnr, layers};
use vedge_runtime::onnx::Graph;
use vedge_runtime::{Error, Options, Session};
use vedge_tests::zoo::{self, ExpectedOutput};

/// Largest difference, as a part of the largest value.
const TOLERANCE: f64 = 1e-3;

/// What INT8 must keep of the first output. The weights are random: worse than a trained model's.
const INT8_DB: f64 = 15.0;

/// Families that must work: ViT, DeiT (also with a distillation token), MobileViT, Swin.
const MUST: [&str; 9] =
    ["vit_", "deit_", "dinov2_", "hf_vit_", "hf_deit_", "mobilevit_", "hf_mobilevit_", "swin_", "hf_swin_"];

/// How far a graph came.
#[derive(Default)]
struct Row {
    loads: bool,
    freezes: bool,
    runs: bool,
    matches: bool,
    quantizes: bool,
    reason: String,
}

/// Takes a graph as far as it goes; errors end in the row's reason.
fn take(name: &str, row: &mut Row) -> Result<()> {
    let expected = zoo::expected(name)?;
    let mut graph = zoo::load(name)?;
    row.loads = true;
    let [.., height, width] = expected.input.shape[..] else { anyhow::bail!("the input is no picture") };
    prepare(&mut graph, &Prepare { size: Some((height, width)), ..Prepare::default() }).map_err(in_words)?;
    check(&graph)?;
    row.freezes = true;
    let input = zoo::input(&expected.input.shape);
    let mut session = Session::from_graph(graph.clone(), &Options::default()).map_err(in_words)?;
    let outputs = session.run(std::slice::from_ref(&input)).map_err(in_words)?;
    row.runs = true;
    anyhow::ensure!(outputs.len() == expected.outputs.len(), "{} outputs", outputs.len());
    for ((got, want), name) in outputs.iter().zip(&expected.outputs).zip(session.outputs()) {
        anyhow::ensure!(*name == want.name, "output `{name}` where `{}` is expected", want.name);
        anyhow::ensure!(got.shape() == want.shape, "output `{name}`: {:?}, expected {:?}", got.shape(), want.shape);
        let off = difference(got.iter().map(|&v| f64::from(v)), want);
        anyhow::ensure!(off < TOLERANCE, "output `{name}` is off by {off:.0e} of its largest value");
    }
    row.matches = true;
    let noise = quantize(graph, &input, &outputs[0]).map_err(in_words)?;
    anyhow::ensure!(noise > INT8_DB, "INT8 keeps only {noise:.0} dB of `{}`", expected.outputs[0].name);
    row.quantizes = true;
    Ok(())
}

/// Signal-to-noise ratio of the first output in INT8 (static, calibrated on the very input), in dB.
fn quantize(mut graph: Graph, input: &ArrayD<f32>, float: &ArrayD<f32>) -> Result<f64, Error> {
    let layers = layers::find(&graph).0;
    // Layers that share their input name it once.
    let taps: BTreeSet<String> = layers.iter().map(|l| l.activation.clone()).collect();
    let taps: Vec<Tap> = taps.iter().map(|t| Tap::range(t)).collect();
    let once = std::iter::once(Ok(input.clone()));
    let statistics = collect(&graph, &taps, Partial::default(), once, &Options::default(), |_, _| {})?;
    let range = |(value, seen): (&String, &Histogram)| (value.clone(), seen.range(Calibrator::ALL[0]));
    let ranges = statistics.observed.iter().map(range).collect();
    write::write_int8(&mut graph, &layers, &Recipe { ranges, ..Recipe::default() })?;
    check(&graph)?;
    let int8 = Session::from_graph(graph, &Options::default())?.run(std::slice::from_ref(input))?;
    let mut ratio = Sqnr::default();
    ratio.add(float.iter().copied(), int8[0].iter().copied());
    Ok(ratio.db())
}

fn in_words(e: Error) -> anyhow::Error {
    let hint = e.hint().map(|h| format!("; hint: {h}")).unwrap_or_default();
    anyhow::anyhow!("{e}{hint}")
}

/// The largest difference of the first values, the mean, the spread and the largest value.
fn difference(values: impl Iterator<Item = f64>, want: &ExpectedOutput) -> f64 {
    let values: Vec<f64> = values.collect();
    let count = values.len() as f64;
    let sum: f64 = values.iter().sum();
    let largest = values.iter().fold(0f64, |m, v| m.max(v.abs()));
    let spread = (values.iter().map(|v| (v - sum / count).powi(2)).sum::<f64>() / count).sqrt();
    let first = values.iter().zip(&want.first).map(|(a, b)| (a - b).abs());
    let all =
        first.chain([(largest - want.absmax).abs(), (spread - want.std).abs(), (sum - want.sum).abs() / count.sqrt()]);
    // A NaN must not pass for a small difference.
    all.fold(0f64, |m, d| if d.is_nan() { f64::INFINITY } else { m.max(d) }) / want.absmax
}

#[test]
fn the_table_is_true() -> Result<()> {
    let mut table = String::from(
        "# What happens to the graphs of the zoo\n\nWritten by `VEDGE_BLESS=1 cargo test --release -p vedge-tests --test \
         zoo`; the test fails when it is out of date.\nmatches: within 1e-3 of the largest value of ONNX Runtime's \
         output. quantizes: the INT8 model runs \
         and keeps 15 dB of it.\n\n| graph | loads | freezes | runs | matches | quantizes | reason |\n|---|---|---|---|---|---|---|\n",
    );
    let names = zoo::names()?;
    assert_eq!(names.len(), 59);
    let mut broken = vec![];
    for name in names {
        let mut row = Row::default();
        match catch_unwind(AssertUnwindSafe(|| take(&name, &mut row))) {
            Ok(result) => row.reason = result.err().map(|e| e.to_string()).unwrap_or_default(),
            Err(_) => {
                row.reason = "panics".into();
                broken.push(name.clone());
            }
        }
        if !row.quantizes && MUST.iter().any(|m| name.starts_with(m)) {
            broken.push(format!("{name}: {}", row.reason));
        }
        let yes = |b: bool| if b { "yes" } else { "no" };
        let done = [row.loads, row.freezes, row.runs, row.matches, row.quantizes].map(yes).join(" | ");
        writeln!(table, "| {name} | {done} | {} |", row.reason)?;
    }
    assert!(broken.is_empty(), "these must work: {broken:#?}");
    let path = zoo::dir().join("TABLE.md");
    if std::env::var_os("VEDGE_BLESS").is_some() {
        std::fs::write(&path, &table)?;
    }
    let stored = std::fs::read_to_string(&path).unwrap_or_default();
    for (was, is) in stored.lines().zip(table.lines()) {
        assert_eq!(was, is, "tests/zoo/TABLE.md is out of date: run with VEDGE_BLESS=1 and look at what changed");
    }
    assert_eq!(stored, table, "tests/zoo/TABLE.md is out of date");
    Ok(())
}

#[test]
fn the_generator_is_the_documented_one() {
    let documented = [-0.381_641_12, 0.410_511_911, 0.631_722_867, -1.616_658_09f64];
    for (value, documented) in zoo::generate(7, 0.0, 1.0, 4).into_iter().zip(documented) {
        assert!((f64::from(value) - documented).abs() < 1e-8, "{value}, documented {documented}");
    }
}

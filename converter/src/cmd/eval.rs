//! `vedge eval`

use super::{out, table};
use crate::evaluate::{Score, evaluate, open};
use crate::row;
use anyhow::Result;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use vedge_calibration::Dataset;
use vedge_runtime::error::counted;
use vedge_runtime::{Error, Options};

/// Compare models on labelled pictures: accuracy, agreement with the first, latency.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The models.
    #[arg(required = true)]
    models: Vec<PathBuf>,
    /// Labelled pictures, DIR/<class>/<picture>.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// The model that the others are compared with; the first where left out.
    #[arg(long, value_name = "MODEL")]
    baseline: Option<PathBuf>,
    /// At most so many pictures, spread over the classes.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
    /// How pictures become the input of models without a card; else that of another model's card.
    #[arg(long, value_name = "PRESET|FILE.json")]
    preprocess: Option<String>,
    /// Threads a model runs on.
    #[arg(long, default_value = "1")]
    threads: NonZeroUsize,
    /// Result as JSON on standard output.
    #[arg(long)]
    json: bool,
}

/// Runs the command.
pub fn run(a: &Args) -> Result<()> {
    let mut paths = a.models.clone();
    if let Some(b) = &a.baseline {
        paths.retain(|p| p != b);
        paths.insert(0, b.clone());
    }
    if a.limit == Some(0) {
        let what = "--limit 0: nothing to evaluate".into();
        return Err(Error::Usage { what, hint: "leave --limit out for all pictures".into() }.into());
    }
    let options = Options { threads: a.threads.get(), ..Options::default() };
    let (mut subjects, labels) = open(&paths, a.preprocess.as_deref(), &options)?;
    let set = Dataset::open(&a.data, labels.as_deref())?;
    if set.ignored > 0 {
        eprintln!("warning: {} in {} ignored: no picture", counted(set.ignored, "file"), a.data.display());
    }
    let items = set.pick(a.limit.unwrap_or(usize::MAX));
    let scores = evaluate(&mut subjects, &items, &set.labels)?;
    if a.json {
        return out::json(&serde_json::json!({"v": 1, "models": scores}));
    }
    out::text(&format!("{}\n{}", table::format(&summary(&scores)), table::format(&per_class(&scores))))
}

/// One row for each model.
pub fn summary(scores: &[Score]) -> Vec<Vec<String>> {
    let percent = |x: f64| format!("{:.2} %", x * 100.0);
    let or_dash = |x: Option<String>| x.unwrap_or_else(|| "-".into());
    let mut rows =
        vec![row!["model", "top-1", "top-5", "agreement", "mean KL", "logits", "calibration", "median", "size"]];
    for s in scores {
        rows.push(row![
            s.model,
            percent(s.top1),
            or_dash(s.top5.map(percent)),
            or_dash(s.agreement.map(percent)),
            or_dash(s.mean_kl.map(|k| format!("{k:.5}"))),
            or_dash(s.sqnr.map(|d| format!("{d:.1} dB"))),
            percent(s.calibration_error),
            format!("{:.2} ms", s.median_ms),
            format!("{:.2} MB", s.bytes as f64 / 1e6),
        ]);
    }
    rows
}

fn per_class(scores: &[Score]) -> Vec<Vec<String>> {
    let mut rows = vec![row!["class", "pictures"]];
    rows[0].extend(scores.iter().map(|s| s.model.clone()));
    for (i, c) in scores[0].classes.iter().enumerate() {
        let mut row = row![c.label, c.pictures];
        row.extend(scores.iter().map(|s| format!("{:.1} %", s.classes[i].top1 * 100.0)));
        rows.push(row);
    }
    rows
}

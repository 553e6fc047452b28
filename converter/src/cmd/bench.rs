//! `vedge bench`

mod remote;

use super::{out, table};
use crate::row;
use anyhow::Result;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use vedge_runtime::{Options, bench};

/// How fast models run on this machine: the same measurement as `vedge-run bench` on a board.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The models.
    #[arg(required = true)]
    models: Vec<PathBuf>,
    /// Threads a model runs on.
    #[arg(long, default_value = "1")]
    threads: NonZeroUsize,
    /// Timed runs of each model.
    #[arg(long, value_name = "N", default_value = "50")]
    runs: NonZeroUsize,
    /// Runs before them.
    #[arg(long, value_name = "N", default_value_t = 5)]
    warmup: usize,
    /// Result as JSON on standard output.
    #[arg(long)]
    json: bool,
    /// Measure on a board over ssh: program and models are copied to a temporary folder there, which is removed again.
    #[arg(long, value_name = "USER@HOST")]
    on: Option<String>,
    #[command(flatten)]
    remote: remote::Args,
}

/// Runs the command.
pub fn run(a: &Args) -> Result<()> {
    if let Some(host) = &a.on {
        return remote::run(host, a);
    }
    let options = Options { threads: a.threads.get(), ..Options::default() };
    let measure = |path: &PathBuf| bench::bench(path, &options, a.warmup, a.runs.get());
    let mut reports = a.models.iter().map(measure).collect::<Result<Vec<_>, _>>()?;
    if let [_, others @ ..] = reports.as_mut_slice() {
        // The peak belongs to the process: it says nothing about the second model.
        others.iter_mut().for_each(|r| r.peak_memory_mib = None);
    }
    if a.json {
        return out::json(&serde_json::json!({"v": 1, "models": reports}));
    }
    let ms = |x: f64| format!("{x:.2} ms");
    let mut rows = vec![row!["model", "median", "p90", "p99", "load", "peak memory", "operators"]];
    for r in &reports {
        let memory = r.peak_memory_mib.map_or("-".into(), |m| format!("{m:.1} MiB"));
        let plan: Vec<String> = r.plan.iter().map(|(how, n)| format!("{n} {how}")).collect();
        rows.push(row![r.model, ms(r.median_ms), ms(r.p90_ms), ms(r.p99_ms), ms(r.load_ms), memory, plan.join(", ")]);
    }
    out::text(&table::format(&rows))?;
    out::text(&format!("\n{} threads, {} runs, kernels: {}\n", a.threads, a.runs, reports[0].kernels))
}

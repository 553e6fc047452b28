//! `vedge-run bench`: latency and memory.

use crate::tell::tell;
use anyhow::Result;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use vedge_runtime::machine::Machine;
use vedge_runtime::{Options, bench, machine};

/// Measure a model's latency, load time and memory
#[derive(clap::Args)]
pub struct Arguments {
    /// The model, any ONNX file with fixed shapes
    model: PathBuf,
    /// Worker threads [default: as many as there are CPUs]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Timed runs
    #[arg(long, value_name = "N", default_value = "100")]
    runs: NonZeroUsize,
    /// Runs before them
    #[arg(long, value_name = "N", default_value = "10")]
    warmup: usize,
    /// Show where the time goes, by class of operators
    #[arg(long)]
    profile: bool,
    /// Fuse nothing and quantize nothing: what tract alone does, for comparison
    #[arg(long)]
    plain: bool,
    /// Wait before measuring until the hottest sensor is at most at so many °C, ten minutes at most
    #[arg(long, value_name = "CELSIUS")]
    cool_down: Option<f64>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Measures and prints.
pub fn run(a: &Arguments) -> Result<ExitCode> {
    let options = Options { threads: super::threads(a.threads), fuse: !a.plain, profile: true };
    if let Some(celsius) = a.cool_down {
        let seconds = machine::cool_down(Path::new("/"), celsius, Duration::from_secs(600))?;
        tell(format_args!("cooled down to {celsius} °C in {seconds} s"));
    }
    let r = bench::bench(&a.model, &options, a.warmup, a.runs.get())?;
    if !a.plain && !r.plan.keys().any(|how| how == "integer" || how == "fused") {
        tell("note: no operator is fused or runs in integers: this is plain tract; vedge convert makes it faster");
    }
    if a.json {
        super::print_json(&r)?;
        return Ok(ExitCode::SUCCESS);
    }
    let plan: Vec<String> = r.plan.iter().map(|(how, n)| format!("{n} {how}")).collect();
    let memory = r.peak_memory_mib.map_or("unknown".into(), |m| format!("{m:.1} MiB"));
    super::print(&format!(
        "model            {}\n\
         threads          {}\n\
         kernels          {}\n\
         operators        {}\n\
         linear layers    {}\n\
         median           {:.2} ms ({} runs)\n\
         p90              {:.2} ms\n\
         p99              {:.2} ms\n\
         fastest          {:.2} ms\n\
         load             {:.1} ms\n\
         to first result  {:.1} ms\n\
         peak memory      {memory}\n\
         processors       {}\n\
         before           {}\n\
         after            {}\n",
        r.model,
        r.threads,
        r.kernels,
        plan.join(", "),
        linear(r.linear.as_ref()),
        r.median_ms,
        r.runs,
        r.p90_ms,
        r.p99_ms,
        r.min_ms,
        r.load_ms,
        r.first_result_ms,
        r.conditions.cpus,
        conditions(&r.conditions.before),
        conditions(&r.conditions.after),
    ))?;
    if a.profile {
        super::print("\nclass               operators       ms  share  GOP/s\n")?;
        let total: f64 = r.profile.iter().map(|c| c.ms).sum();
        for c in &r.profile {
            let share = 100.0 * c.ms / total;
            let gops = if c.gops > 0.0 { format!("{:6.1}", c.gops) } else { String::new() };
            super::print(&format!("{:<20}{:>9} {:>8.3} {share:>5.1}% {gops}\n", c.class, c.operators, c.ms))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What linear layers reach, beside the peak.
fn linear(share: Option<&bench::Share>) -> String {
    let Some(s) = share else { return "none".into() };
    let (kind, percent) = (if s.integer { "INT8" } else { "float" }, 100.0 * s.gops / s.peak_gops);
    format!(
        "{:.0} GOP/s, {percent:.0} % of this CPU's {kind} peak of {:.0} (measured, operands in L1)",
        s.gops, s.peak_gops
    )
}

/// Governor, clock, temperature and throttling in a line.
fn conditions(m: &Machine) -> String {
    let mut parts = vec![];
    if !m.governors.is_empty() {
        parts.push(format!("governor {}", m.governors.join(", ")));
    }
    parts.extend(m.mhz.map(|mhz| format!("{mhz} MHz")));
    parts.extend(m.hottest().map(|z| format!("{:.0} °C", z.celsius)));
    parts.extend(m.throttled.as_ref().map(|t| match t.now.as_slice() {
        [] => "not throttled".to_string(),
        now => now.join(", "),
    }));
    if parts.is_empty() { "this machine tells neither clock nor temperature".into() } else { parts.join(", ") }
}

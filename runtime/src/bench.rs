//! Latency and memory of a model on this machine.

use crate::error::Result;
use crate::kernels::{self, peak};
use crate::machine::Machine;
use crate::model::card::SelfTest;
use crate::session::{How, Options, Session};
use ndarray::{ArrayD, IxDyn};
use std::path::Path;
use std::time::{Duration, Instant};

/// What was measured; times in milliseconds.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Report {
    /// The model file.
    pub model: String,
    /// Worker threads.
    pub threads: usize,
    /// Timed runs.
    pub runs: usize,
    /// Half of the runs were faster.
    pub median_ms: f64,
    /// 90 % of the runs were faster.
    pub p90_ms: f64,
    /// 99 % of the runs were faster.
    pub p99_ms: f64,
    /// Fastest run.
    pub min_ms: f64,
    /// From file to ready session.
    pub load_ms: f64,
    /// From file to the first result.
    pub first_result_ms: f64,
    /// Largest resident memory of the process so far (VmHWM), in MiB; absent where the system does not tell.
    pub peak_memory_mib: Option<f64>,
    /// The kernels in use.
    pub kernels: String,
    /// Operators by how they run.
    pub plan: std::collections::BTreeMap<String, usize>,
    /// What the times depend on beside the model.
    pub conditions: Conditions,
    /// What linear layers reach, pairs of them included; absent where there are none.
    pub linear: Option<Share>,
    /// Where the time goes: slowest class first, then what runs in plain tract.
    pub profile: Vec<ClassTime>,
}

/// The machine around a measurement.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Conditions {
    /// Processors that this process may use, as `0-3`; threads are not pinned to one of them.
    pub cpus: String,
    /// Clock governor, temperatures, throttling and memory before the first run.
    pub before: Machine,
    /// The same after the last run.
    pub after: Machine,
}

/// Time of one class of operators in one run.
#[derive(Clone, Debug, serde::Serialize)]
pub struct ClassTime {
    /// Operator class.
    pub class: String,
    /// Operators of the class.
    pub operators: usize,
    /// Milliseconds a run, on average.
    pub ms: f64,
    /// Billions of operations a second, two for each multiply-accumulate; 0 where nothing is multiplied.
    pub gops: f64,
}

/// Speed of linear layers beside what this CPU can do.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Share {
    /// Whether most of them multiply integers.
    pub integer: bool,
    /// Billions of operations a second, all that surrounds the products included.
    pub gops: f64,
    /// What the kernel reaches on operands in the first-level cache, times the threads: measured, see [`peak`].
    pub peak_gops: f64,
}

/// The linear layers' share of the peak.
fn linear(session: &Session, profile: &[ClassTime]) -> Result<Option<Share>> {
    let layers = || profile.iter().filter(|c| ["linear", "mlp"].contains(&c.class.as_str()));
    let ms: f64 = layers().map(|c| c.ms).sum();
    if ms <= 0.0 {
        return Ok(None);
    }
    let gops = layers().map(|c| c.gops * c.ms).sum::<f64>() / ms;
    let plan = || session.plan().iter().filter(|l| ["linear", "mlp"].contains(&l.class.as_str()));
    let integer = 2 * plan().filter(|l| l.how == How::Integer).count() > plan().count();
    let kernels = kernels::detect()?;
    let one = if integer { peak::int8(kernels) } else { peak::float(kernels) };
    Ok(Some(Share { integer, gops, peak_gops: one * session.threads() as f64 }))
}

/// Averages a profile over `runs` runs that took `total_ms` each.
fn profile(session: &Session, runs: usize, total_ms: f64) -> Vec<ClassTime> {
    let per_run = |(class, s): (&'static str, crate::exec::Spent)| {
        let ms = milliseconds(s.time) / runs as f64;
        let gops = 2.0 * s.macs as f64 / s.time.as_secs_f64().max(1e-12) / 1e9;
        ClassTime { class: class.into(), operators: s.calls / runs, ms, gops }
    };
    let mut classes: Vec<ClassTime> = session.take_profile().into_iter().map(per_run).collect();
    if classes.is_empty() {
        return classes;
    }
    classes.sort_by(|a, b| b.ms.total_cmp(&a.ms));
    let rest = total_ms - classes.iter().map(|c| c.ms).sum::<f64>();
    let operators = session.plan().iter().filter(|l| matches!(l.how, How::Tract | How::Layout)).count();
    classes.push(ClassTime { class: "tract and overhead".into(), operators, ms: rest, gops: 0.0 });
    classes
}

/// Loads the model and runs it `warmup + runs` times on its self-test input (zeros have no denormals, no outliers and
/// no cache misses: they are no input to measure with).
///
/// # Errors
/// As [`Session::load`] and [`Session::run`].
pub fn bench(path: &Path, options: &Options, warmup: usize, runs: usize) -> Result<Report> {
    let before = Machine::read(Path::new("/"));
    let start = Instant::now();
    let mut session = Session::load(path, options)?;
    let load = start.elapsed();
    let inputs = inputs(&session);
    session.run(&inputs)?;
    let first = start.elapsed();
    for _ in 1..warmup {
        session.run(&inputs)?;
    }
    session.take_profile();
    let mut times = Vec::with_capacity(runs);
    for _ in 0..runs.max(1) {
        let start = Instant::now();
        session.run(&inputs)?;
        times.push(milliseconds(start.elapsed()));
    }
    let mean = times.iter().sum::<f64>() / times.len() as f64;
    times.sort_by(f64::total_cmp);
    let peak_memory_mib = peak_memory();
    let profile = profile(&session, times.len(), mean);
    Ok(Report {
        model: path.display().to_string(),
        threads: session.threads(),
        runs: times.len(),
        median_ms: percentile(&times, 50.0),
        p90_ms: percentile(&times, 90.0),
        p99_ms: percentile(&times, 99.0),
        min_ms: times[0],
        load_ms: milliseconds(load),
        first_result_ms: milliseconds(first),
        peak_memory_mib,
        kernels: session.kernel().into(),
        plan: counts(&session),
        conditions: Conditions { cpus: allowed_cpus(), before, after: Machine::read(Path::new("/")) },
        linear: linear(&session, &profile)?,
        profile,
    })
}

/// The self-test input for each of a session's inputs.
pub fn inputs(session: &Session) -> Vec<ArrayD<f32>> {
    let seed = session.card().and_then(|c| c.self_test.as_ref()).map_or(1, |t| t.seed);
    let make = |info: &crate::session::TensorInfo| {
        let data = SelfTest::input(seed, info.shape.iter().product());
        ArrayD::from_shape_vec(IxDyn(&info.shape), data).expect("as many elements as the shape has")
    };
    session.inputs().iter().map(make).collect()
}

/// How many operators run in integers, fused, in plain tract, or only move data.
pub fn counts(session: &Session) -> std::collections::BTreeMap<String, usize> {
    let mut counts = std::collections::BTreeMap::new();
    for line in session.plan() {
        *counts.entry(format!("{:?}", line.how).to_lowercase()).or_insert(0) += 1;
    }
    counts
}

/// Nearest-rank percentile of sorted values.
pub fn percentile(sorted: &[f64], percent: f64) -> f64 {
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted[rank.clamp(1, sorted.len()) - 1]
}

/// Largest resident memory of this process so far, in MiB.
pub fn peak_memory() -> Option<f64> {
    Some(status("VmHWM:")?.strip_suffix("kB")?.trim().parse::<f64>().ok()? / 1024.0)
}

/// Processors that this process may use; empty where the system does not tell.
fn allowed_cpus() -> String {
    status("Cpus_allowed_list:").unwrap_or_default()
}

/// A line of /proc/self/status.
fn status(key: &str) -> Option<String> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    status.lines().find_map(|l| l.strip_prefix(key)).map(|v| v.trim().to_string())
}

/// A duration in milliseconds.
pub fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_by_nearest_rank() {
        let sorted: Vec<f64> = (1..=10).map(f64::from).collect();
        assert_eq!([50.0, 90.0, 99.0].map(|p| percentile(&sorted, p)), [5.0, 9.0, 10.0]);
        assert_eq!(percentile(&[7.0], 50.0), 7.0);
    }

    #[test]
    fn memory_and_processors_are_told() {
        assert!(peak_memory().unwrap() > 1.0);
        assert!(allowed_cpus().starts_with(|c: char| c.is_ascii_digit()), "{}", allowed_cpus());
    }
}

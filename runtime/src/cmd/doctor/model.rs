//! Findings about a model on this machine: does it load, how does it run, is the answer right, how long does it take?

use super::estimate::{self, Profile};
use super::{Finding, Verdict};
use anyhow::Result;
use std::path::Path;
use std::time::Instant;
use vedge_runtime::model::card::{Card, SelfTest};
use vedge_runtime::session::How;
use vedge_runtime::{Options, Session, bench, selftest};

/// Timed runs.
const RUNS: usize = 10;

/// Loads, tests and times a model.
pub fn findings(path: &Path, profile: Option<&Profile>, max_ms: Option<f64>) -> Vec<Finding> {
    let options = Options { threads: super::super::threads(None), profile: true, ..Options::default() };
    let mut session = match Session::load(path, &options) {
        Ok(session) => session,
        Err(e) => return vec![Finding::of("model", &e.into())],
    };
    let convert = "convert it: vedge convert MODEL -o OUT";
    let Some(card) = session.card().cloned() else {
        return vec![Finding::note("model", format!("{} loads, but has no card", path.display()), convert)];
    };
    let found = format!("{} ({}, {}), {} labels", card.name, card.architecture, card.precision, card.labels.len());
    let mut findings = vec![Finding::ok("model", found), layers(&session)];
    findings.push(match &card.self_test {
        None => Finding::note("self-test", "the model carries none", "convert it again"),
        Some(test) => self_test(&mut session, &card, test),
    });
    if findings.iter().all(|f| f.verdict != Verdict::Bad) {
        findings.push(latency(&mut session, profile, max_ms).unwrap_or_else(|e| Finding::of("latency", &e)));
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

fn self_test(session: &mut Session, card: &Card, test: &SelfTest) -> Finding {
    let outcome = match selftest::run(session, card, test) {
        Ok(outcome) => outcome,
        Err(e) => return Finding::bad("self-test", e.to_string(), "the file is damaged: copy or convert it again"),
    };
    let top1 = if outcome.same_top1 { "same" } else { "differs" };
    let found = format!("cosine {:.6} (at least {}), top-1 {top1}", outcome.cosine, outcome.min_cosine);
    if outcome.passed() {
        Finding::ok("self-test", found)
    } else {
        Finding::bad("self-test", found, "this machine computes something else than the workstation: report it")
    }
}

/// Median of some runs, against what was asked for and what the profile lets expect.
fn latency(session: &mut Session, profile: Option<&Profile>, max_ms: Option<f64>) -> Result<Finding> {
    let inputs = bench::inputs(session);
    session.run(&inputs)?;
    session.take_profile();
    let mut times = vec![];
    for _ in 0..RUNS {
        let start = Instant::now();
        session.run(&inputs)?;
        times.push(bench::milliseconds(start.elapsed()));
    }
    times.sort_by(f64::total_cmp);
    let median = bench::percentile(&times, 50.0);
    let threads = session.threads();
    let macs = session.take_profile().values().map(|s| s.macs).sum::<usize>() / RUNS;
    let mut found = format!("{median:.1} ms measured, {threads} threads");
    let expected = profile.and_then(|p| estimate::milliseconds(p, macs, threads));
    if let Some(expected) = expected {
        found += &format!("; {expected:.1} ms estimated from clock and cores for {} MMAC", macs / 1_000_000);
    }
    let remedy = "look at governor, temperature and throttling above, and whether other programs compute";
    if let Some(most) = max_ms.filter(|most| median > *most) {
        return Ok(Finding::bad("latency", format!("{found}; at most {most} ms are allowed"), remedy));
    }
    // The estimate is rough: only what is far off says something.
    if expected.is_some_and(|e| median > 3.0 * e + 1.0) {
        return Ok(Finding::note("latency", found, remedy));
    }
    Ok(Finding::ok("latency", found))
}

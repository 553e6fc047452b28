//! `vedge-run doctor`: is this board fit, and does the model compute here what it should?

mod estimate;
mod model;
mod report;
mod system;

use crate::tell::tell;
use anyhow::Result;
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;
use vedge_runtime::Error;
use vedge_runtime::machine::Machine;

/// Check this machine, and a model on it
#[derive(clap::Args)]
pub struct Arguments {
    /// The model, an ONNX file from `vedge convert`
    model: Option<PathBuf>,
    /// What is known of this board, `profile.json` of a bundle [default: the file of that name beside the model]
    #[arg(long, value_name = "FILE")]
    profile: Option<PathBuf>,
    /// Fail when the median latency is above so many milliseconds
    #[arg(long, value_name = "MS", requires = "model")]
    max_ms: Option<f64>,
    /// Look at a captured tree of /proc and /sys instead of this machine's; leaves cameras and processor out
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Write everything to a JSON file for a bug report; holds no host names, addresses, serial numbers or home folders
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What to do where nothing better is known.
const REPORT: &str = "report it, with the file that this writes: vedge-run doctor MODEL --report FILE";

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    check: &'static str,
    verdict: Verdict,
    found: String,
    /// What to do about it; empty when it is fine.
    remedy: String,
}

/// How it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Fine.
    Ok,
    /// Works, could be better.
    Note,
    /// Does not work.
    Bad,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Finding {
        Finding { check, verdict: Verdict::Ok, found: found.into(), remedy: String::new() }
    }

    fn note(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding::problem(check, Verdict::Note, found.into(), remedy.into())
    }

    fn bad(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding::problem(check, Verdict::Bad, found.into(), remedy.into())
    }

    /// No problem without a remedy.
    fn problem(check: &'static str, verdict: Verdict, found: String, remedy: String) -> Finding {
        let remedy = if remedy.trim().is_empty() { REPORT.into() } else { remedy };
        Finding { check, verdict, found, remedy }
    }

    fn of(check: &'static str, e: &anyhow::Error) -> Finding {
        let hint = e.downcast_ref::<Error>().and_then(Error::hint).unwrap_or_default();
        Finding::bad(check, e.to_string(), hint)
    }
}

/// Looks at everything; status 1 when something is bad.
pub fn run(a: &Arguments) -> Result<ExitCode> {
    let live = a.root.is_none();
    let root = a.root.clone().unwrap_or_else(|| "/".into());
    let machine = Machine::read(&root);
    let profile = profile(a)?;
    let mut findings = vec![];
    if live {
        findings.extend(system::processor(profile.as_ref()));
    }
    findings.extend(system::state(&machine));
    if live {
        findings.extend(system::cameras());
    }
    if let Some(path) = &a.model {
        findings.extend(model::findings(path, profile.as_ref(), a.max_ms));
    }
    if let Some(path) = &a.report {
        report::write(path, &findings, &machine, a.model.as_deref())?;
        tell(format_args!("wrote {}: read it before you send it", path.display()));
    }
    match a.json {
        true => super::print_json(&findings)?,
        false => super::print(&text(&findings))?,
    }
    let bad = findings.iter().any(|f| f.verdict == Verdict::Bad);
    Ok(if bad { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The board's profile: the file named, else the one beside the model, if there is one.
fn profile(a: &Arguments) -> Result<Option<estimate::Profile>, Error> {
    let beside = a.model.as_ref().map(|m| m.with_file_name("profile.json")).filter(|p| p.is_file());
    let Some(path) = a.profile.clone().or(beside) else { return Ok(None) };
    let bytes = std::fs::read(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
    serde_json::from_slice(&bytes).map(Some).map_err(|e| Error::Usage {
        what: format!("{}: is no board profile in JSON: {e}", path.display()),
        hint: "vedge boards show NAME --json writes one".into(),
    })
}

fn text(findings: &[Finding]) -> String {
    let mut text = String::new();
    for f in findings {
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
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    /// Whether a finding that is not fine says what to do, and nothing else does.
    fn has_its_remedy(f: &Finding) -> bool {
        (f.verdict == Verdict::Ok) == f.remedy.is_empty()
    }

    #[test]
    fn every_problem_has_a_remedy() {
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut found = vec![];
        for tree in std::fs::read_dir(repository.join("boards/trees")).unwrap().flatten() {
            found.extend(system::state(&Machine::read(&tree.path())));
        }
        let starved = Machine { memory_mib: Some(512), available_mib: Some(40), ..Machine::default() };
        found.extend(system::state(&starved));
        let profile = r#"{"title": "another board", "cpu": {"kinds": [], "features": ["no-such-feature"]}}"#;
        found.extend(system::processor(serde_json::from_str(profile).ok().as_ref()));
        found.extend(system::cameras());
        for model in ["models/deit_nano.onnx", "README.md", "no-such-file"] {
            found.extend(model::findings(&repository.join(model), None, None));
        }
        found.push(Finding::of("latency", &anyhow::anyhow!("no hint")));
        for f in &found {
            assert!(has_its_remedy(f), "{f:?}");
        }
        let troubled: std::collections::BTreeSet<&str> =
            found.iter().filter(|f| f.verdict != Verdict::Ok).map(|f| f.check).collect();
        for check in ["governor", "latency", "memory", "model", "profile", "temperature", "throttling"] {
            assert!(troubled.contains(check), "{check} is no problem anywhere: {troubled:?}");
        }
    }
}

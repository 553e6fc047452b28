//! `vedge bench --on USER@HOST`: the same measurement on a board, brought back.

use super::super::{boards::Profiles, bundle, out};
use crate::deploy::{Probe, Ssh, quote};
use anyhow::{Context, Result};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use vedge_runtime::{Error, files};

/// Options for a board.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The program for the board, `vedge-run` [default: what `vedge build` made for the board that is recognised].
    #[arg(long, value_name = "FILE", requires = "on")]
    program: Option<PathBuf>,
    /// Wait there before each model until the hottest sensor is at most at so many °C.
    #[arg(long, value_name = "CELSIUS", requires = "on")]
    cool_down: Option<f64>,
    /// Append the result as a table to a Markdown file, in the form of tests/records/speed.md.
    #[arg(long, value_name = "FILE", requires = "on")]
    record: Option<PathBuf>,
    /// Your ssh with its options, as one word.
    #[arg(long, value_name = "COMMAND", default_value = "ssh", requires = "on")]
    ssh: String,
    #[command(flatten)]
    profiles: Profiles,
}

/// Measures on the board.
pub fn run(host: &str, a: &super::Args) -> Result<()> {
    let r = &a.remote;
    let ssh = Ssh::new(&r.ssh, host)?;
    let probe = Probe::of(&ssh, "/tmp", "none")?;
    let found = r.profiles.open()?.detect(&probe.evidence);
    let program = match (&r.program, &found) {
        (Some(path), _) => path.clone(),
        (None, Some(board)) => {
            let none = || Error::Usage {
                what: format!("{host} is {}, there is no program built for it", board.board),
                hint: format!("build it: vedge build --board {}; or name it: --program FILE", board.board),
            };
            bundle::built(&r.profiles.get(&board.board)?).ok_or_else(none)?.1
        }
        (None, None) => {
            let what = format!("{host} is not recognised");
            return Err(Error::Usage { what, hint: "name the program for it: --program FILE".into() }.into());
        }
    };
    let folder = ssh.text("mktemp -d", b"", "making a temporary folder")?.trim().to_string();
    let reports = measure(&ssh, &folder, &program, a);
    ssh.text(&format!("rm -rf {}", quote(&folder)), b"", "removing the temporary folder")?;
    let reports = reports?;
    let date = ssh.text("date -u +%F", b"", "asking for the date")?.trim().to_string();
    let board = found.map_or(json!(null), |d| json!(d));
    let text = markdown(&reports, &board, &date)?;
    if let Some(path) = &r.record {
        let mut all =
            if path.exists() { String::from_utf8_lossy(&files::map(path)?).into_owned() } else { String::new() };
        all = all.trim_end().to_string() + "\n\n" + &text;
        files::write_atomic(path, all.trim_start().as_bytes())?;
    }
    match a.json {
        true => out::json(&json!({"v": 1, "date": date, "board": board, "models": reports})),
        false => out::text(&text),
    }
}

/// One report a model, as `vedge-run bench --json` prints it.
fn measure(ssh: &Ssh, folder: &str, program: &Path, a: &super::Args) -> Result<Vec<Value>> {
    let tool = format!("{folder}/vedge-run");
    let send = |path: &Path, to: &str| -> Result<()> {
        let script = format!("cat >{0} && chmod 755 {0}", quote(to));
        ssh.text(&script, &files::map(path)?, &format!("copying {}", path.display()))?;
        Ok(())
    };
    send(program, &tool)?;
    let mut reports = vec![];
    for path in &a.models {
        let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let model = format!("{folder}/model.onnx");
        send(path, &model)?;
        let mut line = format!("{} bench {} --json", quote(&tool), quote(&model));
        line += &format!(" --threads {} --runs {} --warmup {}", a.threads, a.runs, a.warmup);
        if let Some(celsius) = a.remote.cool_down {
            line += &format!(" --cool-down {celsius}");
        }
        let text = ssh.text(&line, b"", &format!("measuring {name}"))?;
        let mut report: Value =
            serde_json::from_str(&text).with_context(|| format!("{}: bench printed no JSON", ssh.host()))?;
        report["model"] = json!(name);
        reports.push(report);
    }
    Ok(reports)
}

/// A section as in tests/records/speed.md.
fn markdown(reports: &[Value], board: &Value, date: &str) -> Result<String> {
    let first = reports.first().context("no model was measured")?;
    let before = &first["conditions"]["before"];
    let text = |v: &Value| v.as_str().map(str::to_string);
    let title = text(&board["model"]).filter(|m| !m.is_empty()).or_else(|| text(&board["board"]));
    let title = title.unwrap_or_else(|| "an unknown board".into());
    let governors: Vec<&str> = before["governors"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let governor =
        if governors.is_empty() { "no clock governor".into() } else { format!("governor {}", governors.join(", ")) };
    let mut lines = vec![
        format!("## {title}\n"),
        format!(
            "Measured {date} by `vedge bench --on`, {} CPUs, {} thread(s), batch 1, {} runs, kernels {}, {governor}.\n",
            board["cpus"],
            first["threads"],
            first["runs"],
            first["kernels"].as_str().unwrap_or("?")
        ),
        "| | median ms | fastest ms | load ms | to first result ms | memory MiB | °C before, after | throttled |"
            .into(),
        "|---|---|---|---|---|---|---|---|".into(),
    ];
    for r in reports {
        let number = |key: &str, digits: usize| r[key].as_f64().map_or("-".into(), |x| format!("{x:.digits$}"));
        let heat = |when: &str| {
            let zones = r["conditions"][when]["zones"].as_array().into_iter().flatten();
            zones.filter_map(|z| z["celsius"].as_f64()).reduce(f64::max).map_or("-".into(), |d| format!("{d:.0}"))
        };
        let flags = &r["conditions"]["after"]["throttled"]["now"];
        let flags: Vec<&str> = flags.as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        let flags = if flags.is_empty() { "-".into() } else { flags.join(", ") };
        lines.push(format!(
            "| {} | {} | {} | {} | {} | {} | {}, {} | {flags} |",
            r["model"].as_str().unwrap_or("?"),
            number("median_ms", 2),
            number("min_ms", 2),
            number("load_ms", 0),
            number("first_result_ms", 0),
            number("peak_memory_mib", 0),
            heat("before"),
            heat("after"),
        ));
    }
    Ok(lines.join("\n") + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_in_the_repositorys_form() {
        let report = json!({
            "model": "m.onnx", "threads": 4, "runs": 50, "median_ms": 12.345, "min_ms": 11.0, "load_ms": 99.6,
            "first_result_ms": 120.0, "peak_memory_mib": 38.2, "kernels": "dotprod",
            "conditions": {"before": {"governors": ["ondemand"], "zones": [{"name": "cpu", "celsius": 54.35}]},
                           "after": {"zones": [{"name": "cpu", "celsius": 71.0}], "throttled": {"now": ["throttled"]}}},
        });
        let board = json!({"board": "raspberry-pi-5", "model": "Raspberry Pi 5 Model B Rev 1.0", "cpus": 4});
        let text = markdown(&[report], &board, "2026-11-23").unwrap();
        assert!(text.starts_with(
            "## Raspberry Pi 5 Model B Rev 1.0\n\nMeasured 2026-11-23 by `vedge bench --on`, 4 CPUs, 4 thread(s)"
        ));
        assert!(text.ends_with("| m.onnx | 12.35 | 11.00 | 100 | 120 | 38 | 54, 71 | throttled |\n"), "{text}");
        assert!(markdown(&[], &board, "").is_err());
    }
}

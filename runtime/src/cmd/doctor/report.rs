//! One file for a bug report. What could name a person, a host or a network is left out: only what is listed here goes in.

use super::Finding;
use anyhow::Result;
use serde_json::{Value, json};
use std::path::Path;
use vedge_runtime::files;
use vedge_runtime::machine::Machine;

/// Lines of /proc/cpuinfo that may go out (`Serial` may not).
const CPUINFO: [&str; 8] =
    ["model name", "Features", "flags", "CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Hardware"];

/// Writes the report.
pub fn write(path: &Path, findings: &[Finding], machine: &Machine, model: Option<&Path>) -> Result<()> {
    let report = json!({
        "v": 1,
        "vedge": env!("CARGO_PKG_VERSION"),
        "target": format!("{} {}", std::env::consts::ARCH, std::env::consts::OS),
        "system": system(),
        "kernel": read("/proc/sys/kernel/osrelease"),
        "cpu": cpu(&read("/proc/cpuinfo").unwrap_or_default()),
        "machine": machine,
        "environment": environment(),
        "model": model.and_then(|m| m.file_name()).map(|n| n.to_string_lossy().into_owned()),
        "findings": findings,
    });
    let home = std::env::var("HOME").unwrap_or_default();
    let text = without_home(&(serde_json::to_string_pretty(&report)? + "\n"), &home);
    Ok(files::write_atomic(path, text.as_bytes())?)
}

fn read(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|s| s.trim().to_string())
}

/// Name and version of the distribution.
fn system() -> Option<String> {
    let text = read("/etc/os-release")?;
    text.lines().find_map(|l| l.strip_prefix("PRETTY_NAME=")).map(|name| name.trim_matches('"').to_string())
}

/// The kinds of processors, without repetition.
fn cpu(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = vec![];
    for line in text.lines() {
        let allowed = line.split_once(':').is_some_and(|(key, _)| CPUINFO.contains(&key.trim()));
        let line = line.split_whitespace().collect::<Vec<_>>().join(" ");
        if allowed && !lines.contains(&line) {
            lines.push(line);
        }
    }
    lines
}

/// vedge's own switches.
fn environment() -> Value {
    std::env::vars().filter(|(key, _)| key.starts_with("VEDGE_")).map(|(key, value)| (key, json!(value))).collect()
}

fn without_home(text: &str, home: &str) -> String {
    if home.len() > 1 { text.replace(home, "~") } else { text.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_stay() {
        let text =
            "processor\t: 0\nFeatures\t: fp asimd\nprocessor\t: 1\nFeatures\t: fp asimd\nSerial\t\t: 10000000abcdef\n";
        assert_eq!(cpu(text), ["Features : fp asimd"]);
        assert_eq!(without_home("/home/ann/model.onnx", "/home/ann"), "~/model.onnx");
        assert_eq!(without_home("/model.onnx", "/"), "/model.onnx");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("report.json");
        write(&path, &[Finding::ok("cpu", "one")], &Machine::default(), Some(Path::new("/secret/place/m.onnx")))
            .unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let value: Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&value["model"], &value["findings"][0]["found"]), (&json!("m.onnx"), &json!("one")));
        for secret in ["/secret/place", "Serial", &read("/proc/sys/kernel/hostname").unwrap_or_default()] {
            assert!(secret.len() < 6 || !text.contains(secret), "{secret} in {text}");
        }
    }
}

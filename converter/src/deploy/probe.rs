//! What a board says of itself before anything is copied.

use super::ssh::{Ssh, quote};
use vedge_boards::Evidence;
use vedge_runtime::{Error, Result};

const SCRIPT: &str = include_str!("../../../boards/deploy/probe.sh");

/// The answers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Probe {
    /// What the board is recognised by.
    pub evidence: Evidence,
    /// The user is root.
    pub root: bool,
    /// `sudo` (without a password), `systemctl`, `systemd` (it runs), `rsync`, `video` (the group).
    pub have: Vec<String>,
    /// Free space where installations lie, in KiB.
    pub free_kib: u64,
    /// Release in use.
    pub current: Option<String>,
    /// Release before it.
    pub previous: Option<String>,
    /// Camera devices.
    pub cameras: Vec<String>,
}

impl Probe {
    /// Asks the board.
    ///
    /// # Errors
    /// As [`Ssh::text`]; [`Error::Source`] when the answers are cut off.
    pub fn of(ssh: &Ssh, root: &str, name: &str) -> Result<Probe> {
        let command = format!("sh -s -- {} {}", quote(root), quote(name));
        let text = ssh.text(&command, SCRIPT.as_bytes(), "asking the board what it is")?;
        parse(&text).ok_or_else(|| Error::Source {
            what: format!("{} gave only a part of its answers", ssh.host()),
            hint: "try again; is there a shell (sh) with sed, awk and df on the board?".into(),
        })
    }

    /// Whether the board has something; see [`Probe::have`].
    pub fn has(&self, what: &str) -> bool {
        self.have.iter().any(|h| h == what)
    }
}

/// The answers; `None` when the last line is missing.
fn parse(text: &str) -> Option<Probe> {
    let mut p = Probe::default();
    let mut done = false;
    for (key, value) in text.lines().filter_map(|l| l.split_once('=')) {
        match key {
            "machine" => p.evidence.machine = value.into(),
            "model" => p.evidence.model = value.into(),
            "compatible" => p.evidence.compatible.push(value.into()),
            "cpuinfo" => p.evidence.cpuinfo += &format!("{value}\n"),
            "meminfo" => p.evidence.meminfo += &format!("{value}\n"),
            "uid" => p.root = value == "0",
            "have" => p.have.push(value.into()),
            "free_kib" => p.free_kib = value.parse().ok()?,
            "current" => p.current = Some(value.into()),
            "previous" => p.previous = Some(value.into()),
            "camera" => p.cameras.push(value.into()),
            "probe" => done = value == "done",
            _ => {}
        }
    }
    done.then_some(p)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn the_script_runs_here() {
        let done = Command::new("sh").args(["-c", SCRIPT, "sh", "/nowhere/vedge", "vedge"]).output().unwrap();
        let p = parse(&String::from_utf8(done.stdout).unwrap()).unwrap();
        assert_eq!(p.evidence.machine, std::env::consts::ARCH);
        assert!(p.evidence.cpus() > 0 && p.evidence.memory_mb().unwrap() > 0 && p.free_kib > 0, "{p:?}");
        assert_eq!((p.current, p.previous), (None, None));
    }

    #[test]
    fn half_an_answer_is_none() {
        assert_eq!(parse("machine=aarch64\nuid=0\n"), None);
        assert_eq!(parse("free_kib=x\nprobe=done\n"), None);
        let p = parse("machine=aarch64\nhave=sudo\ncompatible=a,b\ncurrent=1\nprobe=done\n").unwrap();
        assert!(p.has("sudo") && !p.has("rsync"));
        assert_eq!((p.evidence.compatible, p.current.as_deref()), (vec!["a,b".to_string()], Some("1")));
    }
}

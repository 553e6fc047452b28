//! A bundle onto a board over ssh: check, copy beside what runs, test, switch, or leave everything as it was.

mod probe;
mod ssh;

pub use probe::Probe;
pub use ssh::{Ssh, quote};

use std::path::Path;
use vedge_boards::bundle::{MANIFEST, Manifest, SUMS, elf::Elf, unit::Unit};
use vedge_boards::{Catalogue, Evidence};
use vedge_runtime::{Error, Result};

const ACTIVATE: &str = include_str!("../../../boards/deploy/activate.sh");

/// How to deploy.
#[derive(Clone, Debug)]
pub struct Options {
    /// Folder of installations on the board.
    pub root: String,
    /// Whether a systemd service is set up.
    pub service: bool,
    /// Deploy to another board than the one that the bundle was made for, of the same architecture.
    pub any_board: bool,
    /// Most milliseconds that the model may take.
    pub max_ms: Option<f64>,
    /// Seconds that the new service must stay up.
    pub settle: u32,
    /// A minisign public key that the board is to trust from now on.
    pub key: Option<String>,
}

/// A bundle on the workstation, as a folder.
pub struct Bundle<'a> {
    /// The folder.
    pub folder: &'a Path,
    /// What it says of itself.
    pub manifest: Manifest,
    /// Bytes of all files.
    pub bytes: u64,
}

impl Bundle<'_> {
    /// Opens a folder.
    ///
    /// # Errors
    /// [`Error::Usage`] when it is no bundle.
    pub fn open(folder: &Path) -> Result<Bundle<'_>> {
        let usage = |what: String| Error::Usage {
            what: format!("{}: {what}", folder.display()),
            hint: "expected is what this makes: vedge bundle MODEL --board NAME -o DIR".into(),
        };
        let text = std::fs::read(folder.join(MANIFEST)).map_err(|e| usage(format!("{MANIFEST}: {e}")))?;
        let manifest = serde_json::from_slice(&text).map_err(|e| usage(format!("{MANIFEST} is damaged: {e}")))?;
        if !folder.join(SUMS).is_file() {
            return Err(usage(format!("{SUMS} is missing")));
        }
        let sizes = std::fs::read_dir(folder).map_err(|e| usage(e.to_string()))?.flatten();
        let bytes = sizes.filter_map(|e| Some(e.metadata().ok()?.len())).sum();
        Ok(Bundle { folder, manifest, bytes })
    }
}

/// What was found out and will be done, one line each.
pub struct Plan {
    /// For people.
    pub lines: Vec<String>,
    probe: Probe,
    sudo: &'static str,
}

/// Asks the board and refuses what cannot work.
///
/// # Errors
/// [`Error::Source`] naming what is missing, with the remedy.
pub fn plan(ssh: &Ssh, bundle: &Bundle<'_>, catalogue: &Catalogue, o: &Options) -> Result<Plan> {
    let m = &bundle.manifest;
    let p = Probe::of(ssh, &o.root, &m.name)?;
    let mut lines = vec![];
    let refuse = |what: String, hint: &str| Err(Error::Source { what, hint: hint.into() });
    if !same_architecture(&m.target, &p.evidence.machine) {
        let what = format!("{} is a {} machine, the bundle is for {}", ssh.host(), p.evidence.machine, m.target);
        return refuse(what, "make the bundle for this board: vedge bundle MODEL --board NAME -o OUT");
    }
    lines.push(board(ssh, m, catalogue, &p.evidence, o)?);
    let memory = p.evidence.memory_mb().unwrap_or(0);
    if memory > 0 && u64::from(m.peak_memory_mib) > memory {
        let what = format!("the model takes {} MiB at its peak, {} has {memory} MiB", m.peak_memory_mib, ssh.host());
        return refuse(what, "use a smaller model or a larger board");
    }
    // The new release lies beside the old one.
    let needed = bundle.bytes / 1024 + 4096;
    if p.free_kib < needed {
        let what = format!("{needed} KiB are needed at {}, {} KiB are free on {}", o.root, p.free_kib, ssh.host());
        return refuse(what, "make room, or use another place: --root DIR");
    }
    lines.push(format!("space: {} MiB needed, {} MiB free at {}", needed / 1024, p.free_kib / 1024, o.root));
    if o.service && !p.has("systemd") {
        return refuse(format!("{} does not run systemd", ssh.host()), "--no-service installs without a service");
    }
    if o.service && !p.root && !p.has("sudo") {
        let what = format!("the user on {} is not root and has no sudo without a password", ssh.host());
        return refuse(
            what,
            "log in as root, or allow it: echo \"$USER ALL=(ALL) NOPASSWD: ALL\" | sudo tee /etc/sudoers.d/vedge",
        );
    }
    if o.service && !p.has("video") {
        return refuse(format!("{} has no group `video`", ssh.host()), "create it: sudo groupadd --system video");
    }
    let cameras = if p.cameras.is_empty() { "none now".to_string() } else { p.cameras.join(", ") };
    lines.push(format!("cameras: {cameras}; the service is in the group video"));
    lines.push(match &p.current {
        Some(release) if *release == m.version => {
            format!("release {release} is installed already: tested and switched anew")
        }
        Some(release) => format!("release {release} is replaced by {}; it stays as the previous one", m.version),
        None => format!("release {} is the first one", m.version),
    });
    let sudo = if p.root || !o.service { "" } else { "sudo -n " };
    Ok(Plan { lines, probe: p, sudo })
}

fn same_architecture(target: &str, machine: &str) -> bool {
    match Elf::machine_of(target) {
        // A 64-bit kernel runs 32-bit programs as a rule, but which it has is not told: only 32-bit systems are taken.
        "arm" => machine.starts_with("armv7") || machine == "armv8l",
        other => other == machine,
    }
}

/// What board it is; refuses another one than the bundle's.
fn board(ssh: &Ssh, m: &Manifest, catalogue: &Catalogue, evidence: &Evidence, o: &Options) -> Result<String> {
    let found = catalogue.detect(evidence);
    let name = found.as_ref().map_or("unknown", |d| d.board.as_str());
    let generic = m.board.starts_with("generic-");
    let same = name == m.board || generic;
    // Features that the program would use and the board lacks only make it slower: kernels are chosen there.
    if !same && !o.any_board {
        let model = found.as_ref().map_or("", |d| d.model.as_str());
        return Err(Error::Source {
            what: format!("{} is recognised as {name} ({model}), the bundle is for {}", ssh.host(), m.board),
            hint: "make the bundle for this board, or take the risk: --any-board".into(),
        });
    }
    let by = found.as_ref().map_or("", |d| d.by.as_str());
    Ok(format!("board: {name}, by {by}"))
}

/// Carries a plan out. What the board says goes to standard error; standard output stays free.
///
/// # Errors
/// [`Error::Source`]: the link broke (nothing is switched, the same call goes on), the files are not what was packed, the
/// self-test failed or the service did not stay up (the old release runs again then).
pub fn carry_out(ssh: &Ssh, bundle: &Bundle<'_>, plan: &Plan, o: &Options) -> Result<()> {
    let m = &bundle.manifest;
    let home = format!("{}/{}", o.root, m.name);
    let incoming = format!("{home}/incoming/{}", m.version);
    let sudo = plan.sudo;
    let (q_home, q_incoming) = (quote(&home), quote(&incoming));
    let prepare = format!(
        "{sudo}mkdir -p {q_home}/releases {q_incoming} && {sudo}chown -R $(id -u) {q_home}/incoming && \
         find {q_home}/incoming -mindepth 1 -maxdepth 1 ! -path {q_incoming} -exec rm -rf {{}} +"
    );
    ssh.text(&prepare, b"", &format!("making {home}"))?;
    if let Some(key) = &o.key {
        let script = format!("{sudo}mkdir -p /etc/vedge && {sudo}tee /etc/vedge/trusted.pub >/dev/null");
        ssh.text(&script, key.as_bytes(), "storing the trusted key")?;
    }
    copy(ssh, bundle, plan, &incoming)?;

    let unit = Unit { about: &m.model, folder: &format!("{home}/current"), settings: &format!("{home}/vedge.conf") };
    let manager = if o.service { "systemd" } else { "none" };
    let most = o.max_ms.map_or("-".into(), |ms| ms.to_string());
    // The script lies in a file and writes to one: it goes on when the link breaks.
    let script = format!("{home}/incoming/activate.sh");
    ssh.text(&format!("cat >{}", quote(&script)), ACTIVATE.as_bytes(), "sending the script that switches")?;
    let service = quote(&format!("{home}/incoming/{}.service", m.name));
    ssh.text(&format!("cat >{service}"), unit.text().as_bytes(), "sending the service")?;
    let arguments = [&home, &m.name, &m.version, manager, &most, &o.settle.to_string()].map(quote).join(" ");
    let log = quote(&format!("{home}/deploy.log"));
    let command = format!("{sudo}sh {} {arguments}; status=$?; {sudo}cat {log}; exit $status", quote(&script));
    let output = ssh.run(&command, b"")?;
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        eprintln!("  {line}");
    }
    outcome(ssh, output.status.code(), plan.probe.current.as_deref())
}

fn outcome(ssh: &Ssh, status: Option<i32>, old: Option<&str>) -> Result<()> {
    let kept = old.map_or("nothing is installed".to_string(), |o| format!("release {o} is in use as before"));
    let fail = |what: &str, hint: &str| {
        Err(Error::Source { what: format!("{}: {what}; {kept}", ssh.host()), hint: hint.into() })
    };
    match status {
        Some(0) => Ok(()),
        Some(10) => {
            fail("the files are not what was packed, or not signed by the key that the board trusts", "copy again")
        }
        Some(11) => fail("the new release fails its self-test", "the board's own words are above"),
        Some(12) => fail("the new service does not stay up", "journalctl -u NAME on the board says why"),
        _ => fail("switching failed", "the board's own words are above"),
    }
}

/// Copies with rsync where both have it, else file by file, from where an earlier try stopped.
fn copy(ssh: &Ssh, bundle: &Bundle<'_>, plan: &Plan, incoming: &str) -> Result<()> {
    let here = std::process::Command::new("rsync").arg("--version").output().is_ok_and(|o| o.status.success());
    if here && plan.probe.has("rsync") {
        return ssh.rsync(bundle.folder, incoming);
    }
    let listing = format!("cd {} && for f in *; do [ -f \"$f\" ] && wc -c \"$f\"; done; true", quote(incoming));
    let there = ssh.text(&listing, b"", "listing what has arrived")?;
    let arrived = |name: &str| {
        let line = there.lines().find_map(|l| l.trim().strip_suffix(name)?.trim().parse::<usize>().ok());
        line.unwrap_or(0)
    };
    let entries =
        std::fs::read_dir(bundle.folder).map_err(|source| Error::Read { path: bundle.folder.into(), source })?;
    let mut names: Vec<String> = entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    for name in names {
        let path = bundle.folder.join(&name);
        let data = std::fs::read(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
        let begun = arrived(&name);
        let (from, to) = if begun <= data.len() { (begun, ">>") } else { (0, ">") };
        let file = quote(&format!("{incoming}/{name}"));
        let mode = if name == "vedge-run" { "755" } else { "644" };
        let script = format!("cat {to}{file} && chmod {mode} {file}");
        ssh.text(&script, &data[from..], &format!("copying {name}"))?;
    }
    Ok(())
}

/// Makes the previous release the current one again.
///
/// # Errors
/// As [`carry_out`]; [`Error::Source`] when there is no previous release.
pub fn roll_back(ssh: &Ssh, name: &str, o: &Options) -> Result<String> {
    let probe = Probe::of(ssh, &o.root, name)?;
    let Some(previous) = probe.previous.clone() else {
        let what = format!("{} has no previous release of {name} at {}", ssh.host(), o.root);
        return Err(Error::Source { what, hint: "deploy a bundle instead".into() });
    };
    let sudo = if probe.root || !o.service { "" } else { "sudo -n " };
    let home = quote(&format!("{}/{name}", o.root));
    let restart = match o.service {
        true => format!("{sudo}systemctl restart {}", quote(&format!("{name}.service"))),
        false => "true".into(),
    };
    let script = format!(
        "cd {home} && now=$(readlink current) && {sudo}ln -sfn \"$(readlink previous)\" .current.new && \
         {sudo}mv -Tf .current.new current && {sudo}ln -sfn \"$now\" .previous.new && {sudo}mv -Tf .previous.new previous && \
         {restart}"
    );
    ssh.text(&script, b"", "switching back")?;
    Ok(previous)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn architectures() {
        assert!(same_architecture("aarch64-unknown-linux-musl", "aarch64"));
        assert!(same_architecture("armv7-unknown-linux-gnueabihf", "armv7l"));
        assert!(!same_architecture("aarch64-unknown-linux-musl", "x86_64"));
        assert!(!same_architecture("armv7-unknown-linux-gnueabihf", "aarch64"));
    }

    #[test]
    fn what_is_no_bundle_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let message = |d: &Path| Bundle::open(d).err().unwrap().to_string();
        assert!(message(dir.path()).contains("manifest.json: No such file"));
        std::fs::write(dir.path().join(MANIFEST), "{}").unwrap();
        assert!(message(dir.path()).contains("manifest.json is damaged"));
    }
}

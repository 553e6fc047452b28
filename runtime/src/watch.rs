//! Tells people what happens, on standard error, and the service manager that the program is alive.

use crate::tell::tell;
use std::fmt::Display;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};
use vedge_runtime::pipeline::{Notice, Watcher};

/// How often the service manager is told the state.
const STATUS: Duration = Duration::from_secs(10);

/// Follows a run.
pub struct Watch {
    manager: Option<Manager>,
    /// What stands before a warning, so that systemd's journal knows it as one (sd-daemon(3)).
    warning: &'static str,
}

/// systemd's end of `sd_notify(3)`: datagrams to the socket in `NOTIFY_SOCKET`.
struct Manager {
    socket: UnixDatagram,
    address: SocketAddr,
    /// Half of the time after which it takes the program for hung.
    interval: Option<Duration>,
    ready: bool,
    pinged: Instant,
    told: Instant,
    /// Why the source gives no frames.
    lost: Option<String>,
}

impl Watch {
    /// By the environment.
    pub fn new() -> Watch {
        Watch { manager: Manager::from_environment(), warning: if to_journal() { "<4>" } else { "" } }
    }

    /// The run ends.
    pub fn stopping(&self) {
        if let Some(manager) = &self.manager {
            manager.send("STOPPING=1");
        }
    }

    /// The source is lost for this reason, or there again.
    fn source(&mut self, lost: Option<&dyn Display>) {
        if let Some(manager) = &mut self.manager {
            manager.lost = lost.map(|why| why.to_string().replace('\n', " "));
            manager.told = Instant::now();
            manager.status(None);
        }
    }
}

/// Whether standard error is a journal's: `JOURNAL_STREAM` names its device and inode.
fn to_journal() -> bool {
    let stream = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    let ours = std::io::stderr().as_fd().try_clone_to_owned().and_then(|fd| File::from(fd).metadata());
    ours.is_ok_and(|m| format!("{}:{}", m.dev(), m.ino()) == stream)
}

impl Watcher for Watch {
    fn notice(&mut self, notice: Notice) {
        let warning = self.warning;
        match notice {
            Notice::Skipped(e) => tell(format_args!("{warning}warning: skipped: {e}")),
            Notice::Lost(e) => {
                self.source(Some(&e));
                tell(format_args!("{warning}warning: {e}; trying again"));
            }
            Notice::Failing(e) => {
                self.source(Some(&e));
                let hint = e.hint().map(|hint| format!("\nhint: {hint}"));
                tell(format_args!("{warning}warning: still trying: {e}{}", hint.unwrap_or_default()));
            }
            Notice::Back(source) => {
                self.source(None);
                tell(format_args!("source: {source}, again"));
            }
            Notice::Hangs(thread) => tell(format_args!(
                "{warning}warning: the thread {thread} hangs; a service manager that watches is no longer told that all is well"
            )),
            Notice::Report(report) => tell(report),
        }
    }

    fn alive(&mut self, answers: u64) {
        if let Some(manager) = &mut self.manager {
            manager.alive(answers);
        }
    }
}

impl Manager {
    fn from_environment() -> Option<Manager> {
        let path = std::env::var("NOTIFY_SOCKET").ok()?;
        let address = match path.strip_prefix('@') {
            Some(name) => SocketAddr::from_abstract_name(name),
            None => SocketAddr::from_pathname(&path),
        };
        let pid = std::env::var("WATCHDOG_PID").ok().and_then(|p| p.parse::<u32>().ok());
        let ours = pid.is_none_or(|p| p == std::process::id());
        let micros = std::env::var("WATCHDOG_USEC").ok().and_then(|u| u.parse::<u64>().ok()).filter(|_| ours);
        let interval = micros.map(|u| Duration::from_micros(u) / 2);
        let (socket, now) = (UnixDatagram::unbound().ok()?, Instant::now());
        socket.set_nonblocking(true).ok()?;
        Some(Manager { socket, address: address.ok()?, interval, ready: false, pinged: now, told: now, lost: None })
    }

    /// A manager that does not listen is no reason to stop.
    fn send(&self, state: &str) {
        let _ = self.socket.send_to_addr(state.as_bytes(), &self.address);
    }

    fn status(&self, answers: Option<u64>) {
        match (&self.lost, answers) {
            (Some(why), _) => self.send(&format!("STATUS=no frames: {why}")),
            (None, Some(answers)) => self.send(&format!("STATUS={answers} frames")),
            (None, None) => self.send("STATUS=frames again"),
        }
    }

    fn alive(&mut self, answers: u64) {
        // Ready when the model is loaded and the threads run: a board whose camera is plugged in later has started.
        if !self.ready {
            self.ready = true;
            self.send("READY=1");
        }
        if self.interval.is_some_and(|interval| self.pinged.elapsed() >= interval) {
            self.pinged = Instant::now();
            self.send("WATCHDOG=1");
        }
        if self.told.elapsed() >= STATUS {
            self.told = Instant::now();
            self.status(Some(answers));
        }
    }
}

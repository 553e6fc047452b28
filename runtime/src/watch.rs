//! Tells people what happens, on standard error, and the service manager that the program is alive.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};
use vedge_runtime::pipeline::{Notice, Watcher};

/// How often the service manager is told the state.
const STATUS: Duration = Duration::from_secs(10);

/// Follows a run.
pub struct Watch {
    manager: Option<Manager>,
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
}

impl Watch {
    /// By the environment.
    pub fn new() -> Watch {
        Watch { manager: Manager::from_environment() }
    }

    /// The run ends.
    pub fn stopping(&self) {
        if let Some(manager) = &self.manager {
            manager.send("STOPPING=1");
        }
    }
}

impl Watcher for Watch {
    fn notice(&mut self, notice: Notice) {
        match notice {
            Notice::Skipped(e) => eprintln!("warning: skipped: {e}"),
            Notice::Lost(e) => eprintln!("warning: {e}; trying again"),
            Notice::Back(source) => eprintln!("source: {source}, again"),
            Notice::Report(report) => eprintln!("{report}"),
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
        Some(Manager { socket, address: address.ok()?, interval, ready: false, pinged: now, told: now })
    }

    /// A manager that does not listen is no reason to stop.
    fn send(&self, state: &str) {
        let _ = self.socket.send_to_addr(state.as_bytes(), &self.address);
    }

    fn alive(&mut self, answers: u64) {
        // ready with the first answer: a camera that never gives one is a service that does not start
        if answers > 0 && !self.ready {
            self.ready = true;
            self.send("READY=1");
        }
        if self.interval.is_some_and(|interval| self.pinged.elapsed() >= interval) {
            self.pinged = Instant::now();
            self.send("WATCHDOG=1");
        }
        if self.told.elapsed() >= STATUS {
            self.told = Instant::now();
            self.send(&format!("STATUS={answers} frames"));
        }
    }
}

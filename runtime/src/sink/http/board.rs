//! What the page shows: the newest answer, the last changes, counts.

use crate::pipeline::Totals;
use crate::sink::{Answer, json, jsonl::event_lines};
use crate::source::Frame;
use std::collections::VecDeque;
use std::fmt::Write;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Changes that are kept for clients that read late.
const HISTORY: usize = 200;
/// Upper ends of the latency histogram, in seconds.
const BUCKETS: [f64; 10] = [0.005, 0.01, 0.02, 0.033, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0];
/// Without an answer for so long, the service is not healthy.
const STALE: Duration = Duration::from_secs(10);

/// Shared between the sink and all clients.
pub struct Board {
    newest: Mutex<Newest>,
    changed: Condvar,
    jpeg: Mutex<Option<(u64, Arc<Vec<u8>>)>>,
    totals: Arc<Totals>,
    start: Instant,
}

#[derive(Default)]
struct Newest {
    /// Answers so far.
    count: u64,
    line: String,
    frame: Option<Arc<Frame>>,
    at: Option<Instant>,
    events: VecDeque<String>,
    /// Events so far, with those that are forgotten.
    events_count: u64,
    latency: [u64; BUCKETS.len()],
    latency_sum: f64,
    infer_sum: f64,
}

/// What is new for one client.
pub struct News {
    /// The newest answer.
    pub line: String,
    /// Events since the client's last look.
    pub events: Vec<String>,
    /// Events since then that are forgotten: the client was away for too long.
    pub missed: u64,
}

impl Board {
    /// An empty one.
    pub fn new(totals: Arc<Totals>) -> Board {
        let (newest, jpeg) = (Mutex::default(), Mutex::default());
        Board { newest, changed: Condvar::new(), jpeg, totals, start: Instant::now() }
    }

    fn lock(&self) -> MutexGuard<'_, Newest> {
        self.newest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes an answer.
    pub fn show(&self, answer: &Answer) {
        let (line, events): (_, Vec<String>) = (json(answer), event_lines(answer).collect());
        let mut newest = self.lock();
        newest.count += 1;
        (newest.line, newest.frame, newest.at) = (line, answer.frame.clone(), Some(Instant::now()));
        newest.events_count += events.len() as u64;
        newest.events.extend(events);
        let forgotten = newest.events.len().saturating_sub(HISTORY);
        newest.events.drain(..forgotten);
        let seconds = answer.latency.as_secs_f64();
        for (count, _) in newest.latency.iter_mut().zip(BUCKETS).filter(|(_, most)| seconds <= *most) {
            *count += 1;
        }
        newest.latency_sum += seconds;
        newest.infer_sum += answer.infer.as_secs_f64();
        drop(newest);
        self.changed.notify_all();
    }

    /// Waits up to a second for an answer after number `seen`; both counters are set to what is returned.
    pub fn news(&self, seen: &mut u64, events_seen: &mut u64) -> Option<News> {
        let newest = self.wait(*seen)?;
        *seen = newest.count;
        let since = newest.events_count.saturating_sub(*events_seen);
        let new = since.min(newest.events.len() as u64) as usize;
        // a new client has missed nothing
        let missed = if *events_seen == 0 { 0 } else { since - new as u64 };
        *events_seen = newest.events_count;
        let events = newest.events.range(newest.events.len() - new..).cloned().collect();
        Some(News { line: newest.line.clone(), events, missed })
    }

    fn wait(&self, seen: u64) -> Option<MutexGuard<'_, Newest>> {
        let newest = self.lock();
        let wait = self.changed.wait_timeout_while(newest, Duration::from_secs(1), |n| n.count == seen);
        let (newest, _) = wait.unwrap_or_else(PoisonError::into_inner);
        (newest.count != seen).then_some(newest)
    }

    /// The newest frame after number `seen` as JPEG, made once for all clients; waits up to a second.
    pub fn jpeg(&self, seen: &mut u64) -> Option<Arc<Vec<u8>>> {
        let (count, frame) = {
            let newest = self.wait(*seen)?;
            (newest.count, newest.frame.clone()?)
        };
        *seen = count;
        let mut made = self.jpeg.lock().unwrap_or_else(PoisonError::into_inner);
        match &*made {
            Some((of, jpeg)) if *of >= count => Some(Arc::clone(jpeg)),
            _ => {
                let jpeg = Arc::new(frame.jpeg().ok()?);
                *made = Some((count, Arc::clone(&jpeg)));
                Some(jpeg)
            }
        }
    }

    /// Whether answers come, and what to say about it.
    pub fn health(&self) -> (bool, String) {
        let age = self.lock().at.map(|at| at.elapsed());
        match age {
            Some(age) if age <= STALE => (true, "ok\n".into()),
            _ if self.totals.is_lost.load(Relaxed) => (false, "the source is lost and is being started again\n".into()),
            Some(age) => (false, format!("no answer for {} seconds\n", age.as_secs())),
            None if self.start.elapsed() <= STALE => (true, "starting\n".into()),
            None => (false, "no answer yet\n".into()),
        }
    }

    /// Prometheus' text format, version 0.0.4.
    pub fn metrics(&self) -> String {
        let t = &*self.totals;
        let mut out = String::new();
        let mut one = |name: &str, kind: &str, help: &str, value: f64| {
            let _ = write!(out, "# HELP vedge_{name} {help}\n# TYPE vedge_{name} {kind}\nvedge_{name} {value}\n");
        };
        let counters = [
            ("answers_total", "Frames classified.", &t.answers),
            ("frames_dropped_total", "Frames overtaken by newer ones, or damaged.", &t.dropped),
            ("frames_damaged_total", "Frames that could not be decoded.", &t.damaged),
            ("files_failed_total", "Files that could not be read as pictures.", &t.failed),
            ("events_total", "Classes that came or went.", &t.events),
            ("source_lost_total", "Times that the source failed.", &t.lost),
            ("answers_unsent_total", "Answers that a slow sink did not get.", &t.unsent),
            ("events_lost_total", "Events that a sink never got, which was slow for too long.", &t.events_lost),
            ("frames_unkept_total", "Frames to be kept that could not be written.", &t.unkept),
        ];
        for (name, help, value) in counters {
            one(name, "counter", help, value.load(Relaxed) as f64);
        }
        one("source_up", "gauge", "1 while the source gives frames.", f64::from(u8::from(!t.is_lost.load(Relaxed))));
        one("uptime_seconds", "gauge", "Since the start.", self.start.elapsed().as_secs_f64());
        if let Some(bytes) = resident() {
            one("resident_memory_bytes", "gauge", "Memory in use.", bytes as f64);
        }
        let newest = self.lock();
        one("infer_seconds_total", "counter", "Time in the model.", newest.infer_sum);
        let name = "vedge_latency_seconds";
        let _ = write!(out, "# HELP {name} From the driver's timestamp to the answer.\n# TYPE {name} histogram\n");
        for (most, count) in BUCKETS.iter().zip(newest.latency) {
            let _ = writeln!(out, "{name}_bucket{{le=\"{most}\"}} {count}");
        }
        let (count, sum) = (newest.count, newest.latency_sum);
        let _ = write!(out, "{name}_bucket{{le=\"+Inf\"}} {count}\n{name}_sum {sum}\n{name}_count {count}\n");
        out
    }
}

/// Resident memory in bytes.
fn resident() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kb| kb * 1024)
}

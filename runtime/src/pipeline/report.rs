//! Counts and latencies of a run.

use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::Duration;

/// What happened so far; other threads may read along.
#[derive(Debug, Default)]
pub struct Totals {
    /// Answers given.
    pub answers: AtomicU64,
    /// Frames of a live source that newer ones overtook, or that were damaged.
    pub dropped: AtomicU64,
    /// Of those, the damaged ones.
    pub damaged: AtomicU64,
    /// Files that could not be read or decoded.
    pub failed: AtomicU64,
    /// Events told.
    pub events: AtomicU64,
    /// Times that the source was lost.
    pub lost: AtomicU64,
    /// Whether it is lost now.
    pub is_lost: AtomicBool,
    /// Answers that a slow sink did not get.
    pub unsent: AtomicU64,
    /// Events that a sink never got, which was slow for too long.
    pub events_lost: AtomicU64,
    /// Frames to be kept that could not be written.
    pub unkept: AtomicU64,
}

/// Latencies since the last report.
#[derive(Default)]
pub struct Window {
    latencies: Vec<f32>,
    dropped: u64,
}

/// Latency over a time: from the driver's timestamp to the answer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Report {
    /// How long it was.
    pub seconds: f64,
    /// Answers.
    pub frames: usize,
    /// Frames dropped.
    pub dropped: u64,
    /// Median, 90th and 99th percentile in milliseconds; 0 without frames.
    pub ms: [f32; 3],
}

impl Window {
    /// Takes one answer.
    pub fn add(&mut self, latency: Duration, dropped: u64) {
        self.latencies.push(latency.as_secs_f32() * 1e3);
        self.dropped += dropped;
    }

    /// The report, and a new window.
    pub fn report(&mut self, passed: Duration) -> Report {
        let mut ms = std::mem::take(&mut self.latencies);
        ms.sort_unstable_by(f32::total_cmp);
        // nearest rank
        let at = |share: f64| ms.get(((share * ms.len() as f64).ceil() as usize).max(1) - 1).copied().unwrap_or(0.0);
        let dropped = std::mem::take(&mut self.dropped);
        Report { seconds: passed.as_secs_f64(), frames: ms.len(), dropped, ms: [at(0.5), at(0.9), at(0.99)] }
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rate = self.frames as f64 / self.seconds.max(1e-9);
        write!(f, "{} frames in {:.0} s ({rate:.1} a second), {} dropped", self.frames, self.seconds, self.dropped)?;
        if self.frames > 0 {
            let [p50, p90, p99] = self.ms;
            write!(f, "; latency p50 {p50:.1} p90 {p90:.1} p99 {p99:.1} ms")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let mut window = Window::default();
        for ms in (1..=100).rev() {
            window.add(Duration::from_millis(ms), 1);
        }
        let report = window.report(Duration::from_secs(10));
        assert_eq!((report.ms, report.dropped), ([50.0, 90.0, 99.0], 100));
        assert!(report.to_string().contains("10.0 a second"), "{report}");
        assert_eq!(window.report(Duration::from_secs(1)).ms, [0.0; 3]);
    }
}

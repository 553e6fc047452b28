//! Where results go.

mod http;
mod jsonl;
mod mqtt;
mod outlet;
mod record;
mod text;

pub use http::Http;
pub use jsonl::{JsonLines, Lines, json, rfc3339};
pub use mqtt::{Broker, Mqtt};
pub use outlet::Outlet;
pub use record::{Record, When};
pub use text::Text;

use crate::classify::Class;
use crate::decide::Event;
use crate::source::Frame;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// The answer for one frame.
#[derive(Clone)]
pub struct Answer {
    /// Number of the answer, from 0.
    pub seq: u64,
    /// When the frame was captured.
    pub time: SystemTime,
    /// The file, for file sources.
    pub source: Option<String>,
    /// Reading or receiving the frame, without the wait for the camera.
    pub capture: Duration,
    /// Decoding, resizing, normalizing.
    pub preprocess: Duration,
    /// The model.
    pub infer: Duration,
    /// From the end of the capture to the answer, with the waits in between.
    pub total: Duration,
    /// From the driver's timestamp to the answer.
    pub latency: Duration,
    /// Most likely classes of this frame, best first.
    pub top: Vec<Class>,
    /// How unlike the training pictures it is; see [`crate::classify::Scores::energy`].
    pub energy: Option<f32>,
    /// How far it looks from the calibration pictures; see [`crate::classify::Scores::distance`].
    pub distance: Option<f32>,
    /// Whether the frame shows none of the classes; `None` where no rule says when it does.
    pub unknown: Option<bool>,
    /// The class that is there by the frames up to this one; `None` for none of them.
    pub state: Option<String>,
    /// What came and went with this frame.
    pub events: Vec<Event>,
    /// Frames dropped since the answer before: newer ones came while the model was busy.
    pub dropped: u64,
    /// The frame itself, for sinks that want it.
    pub frame: Option<Arc<Frame>>,
}

/// Takes answers.
pub trait ResultSink: Send {
    /// Takes one answer; it is visible to the reader when this returns.
    ///
    /// # Errors
    /// What the writer says; a closed pipe ends the run without an error.
    fn put(&mut self, answer: &Answer) -> std::io::Result<()>;

    /// Called many times a second while there is nothing to take.
    fn idle(&mut self) {}

    /// Answers that may wait for it.
    fn capacity(&self) -> usize {
        256
    }

    /// Whether it wants the frames too; those are large.
    fn wants_frames(&self) -> bool {
        false
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::time::UNIX_EPOCH;

    /// An answer with made-up times.
    pub fn answer() -> Answer {
        let ms = Duration::from_micros(1500);
        Answer {
            seq: 17,
            time: UNIX_EPOCH,
            source: None,
            capture: ms,
            preprocess: ms * 2,
            infer: ms * 4,
            total: ms * 8,
            latency: ms * 10,
            top: vec![Class { label: "a \"b\"".into(), index: 3, p: 0.5 }],
            energy: Some(-2.5),
            distance: Some(1.25),
            unknown: None,
            state: None,
            events: vec![],
            dropped: 2,
            frame: None,
        }
    }
}

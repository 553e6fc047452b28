//! Where results go.

mod jsonl;
mod text;

pub use jsonl::JsonLines;
pub use text::Text;

use crate::classify::Class;
use std::time::{Duration, SystemTime};

/// The answer for one frame.
#[derive(Clone, Debug)]
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
    /// From the end of the capture to the answer, with the wait in the mailbox.
    pub total: Duration,
    /// Most likely classes, best first.
    pub top: Vec<Class>,
    /// Frames dropped since the answer before: newer ones came while the model was busy.
    pub dropped: u64,
}

/// Takes answers.
pub trait ResultSink {
    /// Takes one answer; it is visible to the reader when this returns.
    ///
    /// # Errors
    /// What the writer says; a closed pipe ends the run without an error.
    fn put(&mut self, answer: &Answer) -> std::io::Result<()>;
}

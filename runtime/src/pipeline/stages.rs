//! The threads before the model: capture, and from frames to tensors.

use super::Notice;
use super::mailbox::{Item, Mailbox};
use crate::error::{Error, Result};
use crate::guard::caught;
use crate::preprocess::Preprocessor;
use crate::source::{Frame, FrameSource};
use ndarray::ArrayD;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Waits between attempts to start a lost source: the first, and the longest.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(5));

/// A frame and its tensor.
pub struct Prepared {
    /// The frame.
    pub frame: Arc<Frame>,
    /// The model's input.
    pub tensor: ArrayD<f32>,
    /// When the frame was there.
    pub captured: Instant,
    /// Decoding, resizing, normalizing.
    pub preprocess: Duration,
}

/// A frame and when it was there.
pub type Arrived = (Arc<Frame>, Instant);

/// Ends a mailbox whichever way its giver is left, so that no taker waits for ever, and no giver before it either.
struct Ends<'a, A, B>(&'a Mailbox<A>, Option<&'a Mailbox<B>>);

impl<A, B> Drop for Ends<'_, A, B> {
    fn drop(&mut self) {
        self.0.end(None);
        if let Some(before) = self.1 {
            before.close();
        }
    }
}

/// What the capture thread waits for: its source, or nothing that could hang.
#[derive(Default)]
pub struct Pulse(Mutex<Option<(Instant, Duration)>>);

impl Pulse {
    /// Runs `f`, which is expected to take no longer than `patience`.
    fn during<T>(&self, patience: Duration, f: impl FnOnce() -> T) -> T {
        self.set(Some((Instant::now(), patience)));
        let result = f();
        self.set(None);
        result
    }

    fn set(&self, waiting: Option<(Instant, Duration)>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = waiting;
    }

    /// Whether the source has not come back for longer than it may take.
    pub fn is_stuck(&self) -> bool {
        let waiting = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.is_some_and(|(since, patience)| since.elapsed() > patience)
    }
}

/// Moves frames from the source into the mailbox until either side ends. A live source that fails is started again where
/// `retry` says so.
pub fn capture(
    mut source: Box<dyn FrameSource>,
    retry: bool,
    out: &Mailbox<Arrived>,
    notices: &Sender<Notice>,
    pulse: &Pulse,
) {
    let _ends = Ends::<_, Arrived>(out, None);
    loop {
        let item = match pulse.during(source.patience(), || source.next()) {
            Ok(None) => return,
            Ok(Some(frame)) => {
                let dropped = frame.skipped;
                Item { value: Ok((Arc::new(frame), Instant::now())), dropped }
            }
            Err(e) if !source.is_live() => Item { value: Err(e), dropped: 0 },
            Err(e) if !retry => return out.end(Some(e)),
            Err(e) => {
                let why = e.to_string();
                let _ = notices.send(Notice::Lost(e));
                match start_again(&mut *source, why, out, notices, pulse) {
                    Some(()) => {
                        let _ = notices.send(Notice::Back(source.describe()));
                        continue;
                    }
                    None => return,
                }
            }
        };
        if !out.put(item) {
            return;
        }
    }
}

/// Tries until it succeeds or nobody waits any more; a reason is told once.
fn start_again(
    source: &mut dyn FrameSource,
    mut why: String,
    out: &Mailbox<Arrived>,
    notices: &Sender<Notice>,
    pulse: &Pulse,
) -> Option<()> {
    let mut wait = RETRY.0;
    loop {
        std::thread::sleep(wait);
        if out.is_closed() {
            return None;
        }
        match pulse.during(source.patience(), || source.reopen()) {
            Ok(()) => return Some(()),
            Err(e) if e.to_string() == why => {}
            Err(e) => {
                why = e.to_string();
                let _ = notices.send(Notice::Failing(e));
            }
        }
        wait = (wait * 2).min(RETRY.1);
    }
}

/// Makes tensors of frames.
pub fn prepare(mut how: Preprocessor, from: &Mailbox<Arrived>, out: &Mailbox<Prepared>) {
    let _ends = Ends(out, Some(from));
    let never = AtomicBool::new(false);
    loop {
        let Item { value, dropped } = match from.wait_for(&never) {
            Ok(item) => item,
            Err(error) => return out.end(error),
        };
        let prepared = value.and_then(|(frame, captured)| tensor(&mut how, frame, captured));
        if !out.put(Item { value: prepared, dropped }) {
            return;
        }
    }
}

fn tensor(how: &mut Preprocessor, frame: Arc<Frame>, captured: Instant) -> Result<Prepared> {
    let start = Instant::now();
    // a decoder's panic on bytes that it never met is that frame's loss
    let attempt = caught("decoding a frame", || frame.tensor(how));
    let tensor = attempt.unwrap_or_else(|_| Err(Error::Picture("the decoder failed on this frame".into())))?;
    Ok(Prepared { frame, tensor, captured, preprocess: start.elapsed() })
}

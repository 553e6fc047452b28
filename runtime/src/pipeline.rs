//! Capture → preprocess → infer → sinks; the newest frame wins.
//!
//! A thread captures into a mailbox with one slot. A live source overwrites what nobody took (and counts it), a file
//! source waits until the slot is free: files are never dropped.

use crate::classify::Classifier;
use crate::error::{Error, Result};
use crate::model::card::Card;
use crate::preprocess::to_tensor;
use crate::session::Session;
use crate::sink::{Answer, ResultSink};
use crate::source::{Frame, FrameSource};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Damaged frames in a row that end a live source.
const MOST_DAMAGED: u64 = 30;

/// How often a waiting pipeline looks whether it is to stop.
const LOOK: Duration = Duration::from_millis(50);

/// Session, preprocessing and classes of one model.
pub struct Model {
    session: Session,
    classifier: Classifier,
    card: Card,
}

impl Model {
    /// A classifier from a session.
    ///
    /// # Errors
    /// As [`Classifier::of`], and [`Error::Shape`] when the model's input is not what its card makes of a picture.
    pub fn new(session: Session) -> Result<Model> {
        let (classifier, card) = Classifier::of(&session)?;
        let p = &card.preprocess;
        let shape = [1, 3, p.height, p.width];
        match session.inputs() {
            [input] if input.shape == shape => Ok(Model { session, classifier, card }),
            inputs => {
                let has: Vec<String> = inputs.iter().map(|i| format!("`{}` {:?}", i.name, i.shape)).collect();
                let has = has.join(", ");
                Err(Error::Shape(format!("the card makes pictures into {shape:?}, the model's input is {has}")))
            }
        }
    }

    /// The model's card.
    pub fn card(&self) -> &Card {
        &self.card
    }

    /// Classifies one frame; `seq`, `dropped` and `total` are left for the caller.
    ///
    /// # Errors
    /// [`Error::Picture`] when the frame is damaged; as [`Session::run`] and [`Classifier::top`].
    pub fn classify(&mut self, frame: Frame, k: usize) -> Result<Answer> {
        let (time, capture) = (frame.time, frame.capture);
        let source = frame.file.as_ref().map(|f| f.display().to_string());
        let start = Instant::now();
        let tensor = to_tensor(&frame.picture()?, &self.card.preprocess)?;
        let preprocess = start.elapsed();
        let outputs = self.session.run(&[tensor])?;
        let top = self.classifier.top(&outputs, k)?;
        let total = start.elapsed();
        let infer = total - preprocess;
        Ok(Answer { seq: 0, time, source, capture, preprocess, infer, total, top, dropped: 0 })
    }
}

/// When to end, and how much to tell.
#[derive(Clone, Debug)]
pub struct Options {
    /// Classes in an answer.
    pub top: usize,
    /// End after so many answers.
    pub max_frames: Option<u64>,
}

/// What happened.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    /// Answers given.
    pub answers: u64,
    /// Frames of a live source that were overwritten by newer ones, or damaged.
    pub dropped: u64,
    /// Files that could not be read or decoded.
    pub failed: u64,
    /// From the first frame to the end.
    pub elapsed: Duration,
}

/// Runs until the source ends, `max_frames` answers are given, `stop` is set or the sink's reader goes away.
/// `warn` is told about files and frames that are skipped.
///
/// # Errors
/// When a live source fails, the model fails, or the sink cannot be written.
pub fn run(
    model: &mut Model,
    source: Box<dyn FrameSource>,
    sink: &mut dyn ResultSink,
    options: &Options,
    stop: &AtomicBool,
    warn: &mut dyn FnMut(&Error),
) -> Result<Summary> {
    let (live, single) = (source.is_live(), source.frames() == Some(1));
    let mailbox = Arc::new(Mailbox::default());
    let capture = Arc::clone(&mailbox);
    std::thread::Builder::new()
        .name("capture".into())
        .spawn(move || capture.fill(source))
        .map_err(|e| Error::Source { what: format!("cannot start the capture thread: {e}"), hint: String::new() })?;
    // tells the capture thread to end, whichever way this function is left
    let _close = Close(&mailbox);

    let mut summary = Summary::default();
    let mut start = None;
    let (mut dropped, mut damaged) = (0, 0);
    while options.max_frames.is_none_or(|most| summary.answers < most) {
        let Some(taken) = mailbox.take(stop) else { break };
        let begin = *start.get_or_insert_with(Instant::now);
        dropped += taken.dropped;
        summary.dropped += taken.dropped;
        let answer = taken.frame.and_then(|frame| {
            dropped += frame.skipped;
            summary.dropped += frame.skipped;
            model.classify(frame, options.top)
        });
        match answer {
            Ok(answer) => {
                damaged = 0;
                let total = taken.at.elapsed();
                let answer = Answer { seq: summary.answers, dropped: std::mem::take(&mut dropped), total, ..answer };
                match sink.put(&answer) {
                    Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => break,
                    Err(source) => return Err(Error::Write { path: "standard output".into(), source }),
                    Ok(()) => summary.answers += 1,
                }
            }
            // one damaged frame, or file among others, is no reason to stop
            Err(e) if is_picture_error(&e) && !single && (!live || damaged < MOST_DAMAGED) => {
                if live {
                    (damaged, dropped, summary.dropped) = (damaged + 1, dropped + 1, summary.dropped + 1);
                } else {
                    summary.failed += 1;
                }
                if !live || damaged == 1 {
                    warn(&e);
                }
            }
            Err(e) => return Err(e),
        }
        summary.elapsed = begin.elapsed();
    }
    Ok(summary)
}

/// Whether only this frame is lost.
fn is_picture_error(e: &Error) -> bool {
    match e {
        Error::Picture(_) | Error::Read { .. } => true,
        Error::InFile { error, .. } => is_picture_error(error),
        _ => false,
    }
}

/// One slot between the capture thread and the pipeline.
#[derive(Default)]
struct Mailbox {
    slot: Mutex<Slot>,
    changed: Condvar,
}

#[derive(Default)]
struct Slot {
    frame: Option<(Result<Frame>, Instant)>,
    /// Frames overwritten since the last one taken.
    dropped: u64,
    /// No more frames will come.
    ended: bool,
    /// No more frames will be taken.
    closed: bool,
}

struct Taken {
    frame: Result<Frame>,
    at: Instant,
    dropped: u64,
}

impl Mailbox {
    fn lock(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, slot: MutexGuard<'a, Slot>) -> MutexGuard<'a, Slot> {
        self.changed.wait_timeout(slot, LOOK).unwrap_or_else(PoisonError::into_inner).0
    }

    /// The capture thread: moves frames from the source into the slot until either side ends.
    fn fill(&self, mut source: Box<dyn FrameSource>) {
        // the pipeline must not wait for ever, even should the source panic
        let _end = End(self);
        loop {
            let frame = match source.next() {
                Ok(Some(frame)) => Ok(frame),
                Ok(None) => return,
                Err(e) => Err(e),
            };
            // a live source is over after an error; a file source goes on with the next file
            let last = frame.is_err() && source.is_live();
            let mut slot = self.lock();
            while !source.is_live() && slot.frame.is_some() && !slot.closed {
                slot = self.wait(slot);
            }
            if slot.closed {
                return;
            }
            if let Some((Ok(old), _)) = slot.frame.replace((frame, Instant::now())) {
                slot.dropped += 1 + old.skipped;
            }
            drop(slot);
            self.changed.notify_all();
            if last {
                return;
            }
        }
    }

    /// The next frame; `None` when there will be none, or `stop` is set.
    fn take(&self, stop: &AtomicBool) -> Option<Taken> {
        let mut slot = self.lock();
        loop {
            if stop.load(Ordering::Relaxed) {
                return None;
            }
            if let Some((frame, at)) = slot.frame.take() {
                let dropped = std::mem::take(&mut slot.dropped);
                drop(slot);
                self.changed.notify_all();
                return Some(Taken { frame, at, dropped });
            }
            if slot.ended {
                return None;
            }
            slot = self.wait(slot);
        }
    }
}

struct End<'a>(&'a Mailbox);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.lock().ended = true;
        self.0.changed.notify_all();
    }
}

struct Close<'a>(&'a Mailbox);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preprocess::Picture;
    use crate::source::Pixels;
    use std::time::SystemTime;

    /// `n` frames, one every millisecond; then the end.
    struct Counter {
        next: u8,
        n: u8,
        live: bool,
    }

    impl FrameSource for Counter {
        fn next(&mut self) -> Result<Option<Frame>> {
            if self.next == self.n {
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(1));
            let pixels = Pixels::Picture(Picture { width: 1, height: 1, rgb: vec![self.next; 3] });
            self.next += 1;
            Ok(Some(Frame { pixels, file: None, time: SystemTime::now(), capture: Duration::ZERO, skipped: 0 }))
        }

        fn describe(&self) -> String {
            "counter".into()
        }

        fn is_live(&self) -> bool {
            self.live
        }
    }

    /// Numbers of the frames taken by a slow reader, and how many were dropped.
    fn read(live: bool) -> (Vec<u8>, u64) {
        let mailbox = Arc::new(Mailbox::default());
        let capture = Arc::clone(&mailbox);
        let thread = std::thread::spawn(move || capture.fill(Box::new(Counter { next: 0, n: 60, live })));
        let (mut seen, mut dropped) = (vec![], 0);
        while let Some(taken) = mailbox.take(&AtomicBool::new(false)) {
            seen.push(taken.frame.unwrap().picture().unwrap().rgb[0]);
            dropped += taken.dropped;
            std::thread::sleep(Duration::from_millis(10));
        }
        thread.join().unwrap();
        (seen, dropped)
    }

    #[test]
    fn files_are_never_dropped() {
        assert_eq!(read(false), ((0..60).collect(), 0));
    }

    #[test]
    fn the_newest_live_frame_wins_and_the_others_are_counted() {
        let (seen, dropped) = read(true);
        assert!(seen.len() < 40 && seen.last() == Some(&59), "{seen:?}");
        assert!(seen.windows(2).all(|w| w[0] < w[1]), "{seen:?}");
        assert_eq!(seen.len() as u64 + dropped, 60);
    }

    #[test]
    fn stop_ends_the_wait() {
        let mailbox = Mailbox::default();
        assert!(mailbox.take(&AtomicBool::new(true)).is_none());
    }
}

//! A sink on a thread of its own, behind a bounded queue: a slow one never slows the model.

use super::{Answer, ResultSink};
use crate::decide::Event;
use crate::error::{Error, Result};
use crate::pipeline::Totals;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long the end of a run waits for a sink that does not take what it was given.
const PATIENCE: Duration = Duration::from_secs(2);
/// Events of answers that a slow sink did not get, kept for it.
const MOST_EVENTS: usize = 1000;

/// The way to one sink.
pub struct Outlet {
    shared: Arc<Shared>,
    name: String,
    capacity: usize,
    with_frames: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    answers: VecDeque<Arc<Answer>>,
    /// The thread is writing one.
    busy: bool,
    /// No more will be given.
    finished: bool,
    /// Why the thread ended, until it is told.
    failed: Option<std::io::Error>,
    /// The thread has ended.
    ended: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, queue: MutexGuard<'a, Queue>) -> MutexGuard<'a, Queue> {
        self.changed.wait_timeout(queue, Duration::from_millis(50)).unwrap_or_else(PoisonError::into_inner).0
    }

    /// The thread: writes what it is given until either side ends.
    fn work(&self, sink: &mut dyn ResultSink) {
        loop {
            let mut queue = self.lock();
            queue.busy = false;
            self.changed.notify_all();
            let answer = loop {
                if let Some(answer) = queue.answers.pop_front() {
                    break answer;
                }
                if queue.finished {
                    return;
                }
                drop(queue);
                sink.idle();
                queue = self.wait(self.lock());
            };
            queue.busy = true;
            drop(queue);
            self.changed.notify_all();
            if let Err(e) = sink.put(&answer) {
                self.lock().failed = Some(e);
                return;
            }
        }
    }
}

impl Outlet {
    /// Starts the sink's thread; `name` is for messages.
    ///
    /// # Errors
    /// [`Error::Write`] when no thread can be started.
    pub fn new(name: &str, mut sink: Box<dyn ResultSink>) -> Result<Outlet> {
        let shared = Arc::new(Shared { queue: Mutex::default(), changed: Condvar::new() });
        let (capacity, with_frames) = (sink.capacity(), sink.wants_frames());
        let thread = Arc::clone(&shared);
        let work = move || {
            thread.work(&mut *sink);
            drop(sink); // it may have last words
            let mut queue = thread.lock();
            (queue.ended, queue.busy) = (true, false);
            drop(queue);
            thread.changed.notify_all();
        };
        let failed = |source| Error::Write { path: name.into(), source };
        std::thread::Builder::new().name(name.into()).spawn(work).map_err(failed)?;
        Ok(Outlet { shared, name: name.into(), capacity, with_frames })
    }

    /// Gives an answer; false when the reader is gone. When the queue is full it waits (`wait`, for files), or drops the
    /// oldest answer, counts it, and keeps its events for the next one.
    ///
    /// # Errors
    /// [`Error::Write`] when the sink failed.
    pub fn give(&self, answer: &Arc<Answer>, wait: bool, stop: &AtomicBool, totals: &Totals) -> Result<bool> {
        let answer = match &answer.frame {
            Some(_) if !self.with_frames => Arc::new(Answer { frame: None, ..(**answer).clone() }),
            _ => Arc::clone(answer),
        };
        let mut queue = self.shared.lock();
        while wait && queue.answers.len() >= self.capacity && !queue.ended && !stop.load(Relaxed) {
            queue = self.shared.wait(queue);
        }
        if queue.ended {
            return self.ending(queue);
        }
        queue.answers.push_back(answer);
        let overflow = queue.answers.len() > self.capacity;
        if let Some(old) = overflow.then(|| queue.answers.pop_front()).flatten() {
            totals.unsent.fetch_add(1, Relaxed);
            if let Some(next) = queue.answers.front_mut() {
                totals.events_lost.fetch_add(keep_events(&old.events, next), Relaxed);
            }
        }
        drop(queue);
        self.shared.changed.notify_all();
        Ok(true)
    }

    fn ending(&self, mut queue: MutexGuard<'_, Queue>) -> Result<bool> {
        match queue.failed.take() {
            Some(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
                Err(Error::Write { path: self.name.clone().into(), source: e })
            }
            _ => Ok(false),
        }
    }

    /// Waits until everything is written, but not for ever.
    ///
    /// # Errors
    /// [`Error::Write`] when the sink failed.
    pub fn finish(self, totals: &Totals) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let mut queue = self.shared.lock();
        queue.finished = true;
        self.shared.changed.notify_all();
        while !queue.ended && Instant::now() < deadline {
            queue = self.shared.wait(queue);
        }
        totals.unsent.fetch_add(queue.answers.len() as u64 + u64::from(queue.busy), Relaxed);
        self.ending(queue).map(drop)
    }
}

/// Puts the events of a dropped answer before those of the next; how many of the oldest are too many to keep.
fn keep_events(events: &[Event], next: &mut Arc<Answer>) -> u64 {
    if events.is_empty() {
        0
    } else {
        let next = Arc::make_mut(next);
        next.events.splice(0..0, events.iter().cloned());
        let too_many = next.events.len().saturating_sub(MOST_EVENTS);
        next.events.drain(..too_many);
        too_many as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decide::Change;
    use crate::sink::tests::answer;

    /// Takes a while for each answer.
    struct Slow(Arc<Mutex<Vec<(u64, usize)>>>, Duration);

    impl ResultSink for Slow {
        fn put(&mut self, answer: &Answer) -> std::io::Result<()> {
            std::thread::sleep(self.1);
            self.0.lock().unwrap().push((answer.seq, answer.events.len()));
            Ok(())
        }

        fn capacity(&self) -> usize {
            2
        }
    }

    /// What a slow sink gets of 20 answers with an event each, how many it does not get, and how long giving took.
    fn given(wait: bool) -> (Vec<(u64, usize)>, u64, Duration) {
        let (got, totals) = (Arc::default(), Totals::default());
        let outlet = Outlet::new("test", Box::new(Slow(Arc::clone(&got), Duration::from_millis(20)))).unwrap();
        let start = Instant::now();
        for seq in 0..20 {
            let events = vec![Event::new(Change::Entered, "x", 1.0)];
            let answer = Arc::new(Answer { seq, events, ..answer() });
            assert!(outlet.give(&answer, wait, &AtomicBool::new(false), &totals).unwrap());
        }
        let elapsed = start.elapsed();
        outlet.finish(&totals).unwrap();
        let got = got.lock().unwrap().clone();
        (got, totals.unsent.load(Relaxed), elapsed)
    }

    #[test]
    fn a_slow_sink_slows_nothing_and_gets_every_event() {
        let (got, unsent, elapsed) = given(false);
        assert!(elapsed < Duration::from_millis(200), "{elapsed:?}");
        assert!(got.len() < 20 && got.last().unwrap().0 == 19, "{got:?}");
        assert_eq!(got.len() as u64 + unsent, 20);
        assert_eq!(got.iter().map(|g| g.1).sum::<usize>(), 20, "every event: {got:?}");
    }

    #[test]
    fn events_that_are_too_many_to_keep_are_counted() {
        let event = || Event::new(Change::Entered, "x", 1.0);
        let mut next = Arc::new(Answer { events: vec![event(); 10], ..answer() });
        assert_eq!(keep_events(&vec![event(); MOST_EVENTS - 10], &mut next), 0);
        assert_eq!(keep_events(&[event(), event()], &mut next), 2);
        assert_eq!(next.events.len(), MOST_EVENTS);
    }

    #[test]
    fn files_wait_for_their_sink() {
        let (got, unsent, _) = given(true);
        assert_eq!((got.len(), unsent), (20, 0));
    }
}

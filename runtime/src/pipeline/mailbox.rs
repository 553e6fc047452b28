//! One slot between two stages.
//!
//! For a live source the newest item wins: it overwrites what nobody took, and carries the count of what it overwrote.
//! For files the giver waits until the slot is free: they are never dropped.

use crate::error::{Error, Result};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often a waiting taker looks whether it is to stop.
pub const LOOK: Duration = Duration::from_millis(50);

/// Something on its way, or why it was lost.
pub struct Item<T> {
    /// The thing.
    pub value: Result<T>,
    /// Frames dropped before it.
    pub dropped: u64,
}

/// What a taker finds.
pub enum Taken<T> {
    /// The next item.
    Item(Item<T>),
    /// Nothing yet.
    Nothing,
    /// Nothing any more.
    End(Option<Error>),
}

/// The slot.
pub struct Mailbox<T> {
    slot: Mutex<Slot<T>>,
    changed: Condvar,
    live: bool,
}

struct Slot<T> {
    item: Option<Item<T>>,
    /// Since when there is one, newer or older.
    since: Instant,
    ended: Option<Option<Error>>,
    /// Nothing more will be taken.
    closed: bool,
}

impl<T> Mailbox<T> {
    /// An empty one.
    pub fn new(live: bool) -> Mailbox<T> {
        let slot = Mutex::new(Slot { item: None, since: Instant::now(), ended: None, closed: false });
        Mailbox { slot, changed: Condvar::new(), live }
    }

    fn lock(&self) -> MutexGuard<'_, Slot<T>> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, slot: MutexGuard<'a, Slot<T>>) -> MutexGuard<'a, Slot<T>> {
        self.changed.wait_timeout(slot, LOOK).unwrap_or_else(PoisonError::into_inner).0
    }

    /// Puts an item in; false when nobody will take it.
    pub fn put(&self, mut item: Item<T>) -> bool {
        let mut slot = self.lock();
        while !self.live && slot.item.is_some() && !slot.closed {
            slot = self.wait(slot);
        }
        if slot.closed {
            return false;
        }
        if let Some(old) = slot.item.take() {
            item.dropped += old.dropped + 1;
        } else {
            slot.since = Instant::now();
        }
        slot.item = Some(item);
        drop(slot);
        self.changed.notify_all();
        true
    }

    /// The next item, or nothing after a short wait.
    pub fn take(&self) -> Taken<T> {
        let mut slot = self.lock();
        if slot.item.is_none() && slot.ended.is_none() {
            slot = self.wait(slot);
        }
        if let Some(item) = slot.item.take() {
            drop(slot);
            self.changed.notify_all();
            return Taken::Item(item);
        }
        slot.ended.as_mut().map_or(Taken::Nothing, |error| Taken::End(error.take()))
    }

    /// The next item when it comes; `Err` at the end, or when it is told to stop.
    pub fn wait_for(&self, stop: &AtomicBool) -> Result<Item<T>, Option<Error>> {
        loop {
            match self.take() {
                Taken::Item(item) => return Ok(item),
                Taken::End(error) => return Err(error),
                Taken::Nothing if stop.load(Ordering::Relaxed) || self.is_closed() => return Err(None),
                Taken::Nothing => {}
            }
        }
    }

    /// Whether something has been waiting so long that its taker must hang.
    pub fn is_stuck(&self, longer_than: Duration) -> bool {
        let slot = self.lock();
        slot.item.is_some() && slot.since.elapsed() > longer_than
    }

    /// Nothing more will be put in, for this reason.
    pub fn end(&self, error: Option<Error>) {
        self.lock().ended.get_or_insert(error);
        self.changed.notify_all();
    }

    /// Nothing more will be taken.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Whether nothing more will be taken.
    pub fn is_closed(&self) -> bool {
        self.lock().closed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    /// What a slow reader takes of 60 numbers, one a millisecond, and how many were dropped.
    fn read(live: bool) -> (Vec<u64>, u64) {
        let mailbox = Arc::new(Mailbox::new(live));
        let giver = Arc::clone(&mailbox);
        let thread = std::thread::spawn(move || {
            for n in 0..60 {
                std::thread::sleep(Duration::from_millis(1));
                assert!(giver.put(Item { value: Ok(n), dropped: 0 }));
            }
            giver.end(None);
        });
        let (mut seen, mut dropped) = (vec![], 0);
        while let Ok(item) = mailbox.wait_for(&AtomicBool::new(false)) {
            seen.push(item.value.unwrap());
            dropped += item.dropped;
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
    fn a_taker_that_hangs_is_seen_although_newer_frames_come() {
        let mailbox = Mailbox::<u8>::new(true);
        let put = |n| assert!(mailbox.put(Item { value: Ok(n), dropped: 0 }));
        assert!(!mailbox.is_stuck(Duration::ZERO));
        put(1);
        std::thread::sleep(Duration::from_millis(30));
        put(2);
        assert!(mailbox.is_stuck(Duration::from_millis(20)));
        assert!(matches!(mailbox.take(), Taken::Item(_)));
        assert!(!mailbox.is_stuck(Duration::ZERO));
        put(3);
        assert!(!mailbox.is_stuck(Duration::from_secs(60)));
    }

    #[test]
    fn either_side_can_end_it() {
        let mailbox = Mailbox::<u8>::new(false);
        assert!(mailbox.wait_for(&AtomicBool::new(true)).is_err());
        mailbox.end(Some(Error::Picture("x".into())));
        assert!(matches!(mailbox.wait_for(&AtomicBool::new(false)), Err(Some(_))));
        mailbox.close();
        assert!(!mailbox.put(Item { value: Ok(1), dropped: 0 }));
    }
}

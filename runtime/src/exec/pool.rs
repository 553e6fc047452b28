//! Threads that share the work of one operator after another.
//!
//! An inference is some fifty short parallel loops with almost nothing between them. A general pool puts its idle threads
//! to sleep in those gaps, and waking one takes longer than the gap; here they look for work a while before they sleep.
//! A thread that is late is not waited for: only those that took part in a loop are.

use std::any::Any;
use std::hint::spin_loop;
use std::io;
use std::mem::transmute;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long an idle thread looks for work before it sleeps: longer than what lies between two operators, short beside what
/// lies between two pictures.
const AWAKE: Duration = Duration::from_micros(200);
/// Looks at the state between two looks at the clock.
const LOOKS: usize = 64;

/// State: the number of threads that take part in the loop in the lower half, above it whether more may join, above that
/// the number of the loop.
const OPEN: u64 = 1 << 32;
const TAKING_PART: u64 = OPEN - 1;
const NEXT_LOOP: u64 = OPEN << 1;

/// The threads beside the caller's.
pub struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// Held while a loop runs.
    turn: Mutex<()>,
}

struct Shared {
    state: AtomicU64,
    /// A share of the indices for each thread, the caller's first: from loop to loop a thread takes the same rows, as
    /// long as it keeps up, and finds them in its cache.
    shares: Box<[Share]>,
    work: Mutex<Work>,
    /// What a thread panicked with.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    asleep: AtomicUsize,
    ended: Mutex<bool>,
    wake: Condvar,
}

/// Indices that a thread takes first, and others when theirs are done.
#[derive(Default)]
#[repr(align(64))]
struct Share {
    next: AtomicUsize,
    end: AtomicUsize,
}

/// What to call for each index; valid while more may join or somebody takes part.
#[derive(Clone, Copy)]
struct Work {
    body: *const (dyn Fn(usize) + Sync),
}

// SAFETY: what it points to may be called from any thread.
unsafe impl Send for Work {}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    /// With this many threads beside the caller's.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn new(threads: usize) -> io::Result<Pool> {
        let nothing: &'static (dyn Fn(usize) + Sync) = &|_| ();
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            shares: (0..=threads).map(|_| Share::default()).collect(),
            work: Mutex::new(Work { body: nothing }),
            panic: Mutex::default(),
            asleep: AtomicUsize::new(0),
            ended: Mutex::new(false),
            wake: Condvar::new(),
        });
        let mut pool = Pool { shared, threads: vec![], turn: Mutex::default() };
        for i in 0..threads {
            let shared = pool.shared.clone();
            let name = format!("vedge-{}", i + 1);
            pool.threads.push(thread::Builder::new().name(name).spawn(move || shared.serve(i + 1))?);
        }
        Ok(pool)
    }

    /// Calls `body` for each index below `count`, on the caller's thread and those of the pool. While a loop runs, another
    /// one (inside it, or of another caller) runs on its caller's thread alone.
    ///
    /// # Panics
    /// When `body` does, after all threads have left it.
    pub fn run(&self, count: usize, body: &(dyn Fn(usize) + Sync)) {
        let turn = match self.turn.try_lock() {
            // A loop that panicked has ended all the same.
            Err(TryLockError::Poisoned(turn)) => Some(turn.into_inner()),
            turn => turn.ok(),
        };
        let Some(_turn) = turn.filter(|_| count > 1) else { return (0..count).for_each(body) };
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; `run` returns when nobody can reach it any more.
        let body = unsafe { transmute::<&(dyn Fn(usize) + Sync), *const (dyn Fn(usize) + Sync)>(body) };
        *lock(&shared.work) = Work { body };
        let share = |i: usize| i * count / shared.shares.len();
        for (i, s) in shared.shares.iter().enumerate() {
            s.next.store(share(i), Ordering::Relaxed);
            s.end.store(share(i + 1), Ordering::Relaxed);
        }
        let state = shared.state.load(Ordering::Relaxed);
        shared.state.store(state.wrapping_add(NEXT_LOOP) | OPEN, Ordering::Release);
        // Either this sees who sleeps, or who is about to sleep sees the new state.
        fence(Ordering::SeqCst);
        if shared.asleep.load(Ordering::Relaxed) > 0 {
            drop(lock(&shared.ended));
            shared.wake.notify_all();
        }
        shared.take_part(0);
        shared.state.fetch_and(!OPEN, Ordering::AcqRel);
        let mut looks = 0;
        while shared.state.load(Ordering::Acquire) & TAKING_PART != 0 {
            looks += 1;
            if looks % LOOKS == 0 { thread::yield_now() } else { spin_loop() }
        }
        if let Some(panic) = lock(&shared.panic).take() {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        *lock(&self.shared.ended) = true;
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            // What it panicked with was handed to a caller.
            let _ = thread.join();
        }
    }
}

impl Shared {
    /// Takes the indices of share `me`, then those that are left of others, until one panics.
    fn take_part(&self, me: usize) {
        let Work { body } = *lock(&self.work);
        let (before, from) = self.shares.split_at(me);
        let all = || {
            for share in from.iter().chain(before) {
                let end = share.end.load(Ordering::Relaxed);
                loop {
                    let i = share.next.fetch_add(1, Ordering::Relaxed);
                    if i >= end {
                        break;
                    }
                    // SAFETY: the loop does not end while this thread takes part.
                    unsafe { (*body)(i) };
                }
            }
        };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(all)) {
            self.shares.iter().for_each(|s| s.next.store(usize::MAX / 2, Ordering::Relaxed));
            *lock(&self.panic) = Some(panic);
        }
    }

    /// What a thread of the pool does: joins each loop it sees.
    fn serve(&self, me: usize) {
        let mut last = 0;
        while let Some(state) = self.await_loop(last) {
            if self.state.compare_exchange(state, state + 1, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                last = state / NEXT_LOOP;
                self.take_part(me);
                self.state.fetch_sub(1, Ordering::Release);
            }
        }
    }

    /// A state that is open to join and not of loop `last`; nothing when the pool has ended.
    fn await_loop(&self, last: u64) -> Option<u64> {
        let open = || {
            let state = self.state.load(Ordering::Acquire);
            (state & OPEN != 0 && state / NEXT_LOOP != last).then_some(state)
        };
        let start = Instant::now();
        while start.elapsed() < AWAKE {
            for _ in 0..LOOKS {
                if let Some(state) = open() {
                    return Some(state);
                }
                spin_loop();
            }
            thread::yield_now();
        }
        let mut ended = lock(&self.ended);
        self.asleep.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let found = loop {
            let found = open();
            if found.is_some() || *ended {
                break found;
            }
            ended = self.wake.wait(ended).unwrap_or_else(PoisonError::into_inner);
        };
        self.asleep.fetch_sub(1, Ordering::Relaxed);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn each_index_is_taken_once() {
        let pool = Pool::new(3).unwrap();
        for round in 0..2000 {
            let count = round % 17;
            let taken: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
            pool.run(count, &|i| {
                taken[i].fetch_add(1, Ordering::Relaxed);
            });
            assert!(taken.iter().all(|n| n.load(Ordering::Relaxed) == 1), "round {round}");
            if round % 500 == 0 {
                // Long enough for them to fall asleep.
                thread::sleep(3 * AWAKE);
            }
        }
    }

    #[test]
    fn loops_inside_loops_and_of_several_callers_end() {
        let pool = Pool::new(2).unwrap();
        let sum = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for _ in 0..100 {
                        pool.run(5, &|i| {
                            pool.run(4, &|j| {
                                sum.fetch_add(i * j, Ordering::Relaxed);
                            });
                        });
                    }
                });
            }
        });
        assert_eq!(sum.into_inner(), 300 * 10 * 6);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Pool::new(2).unwrap();
        for bad in [0, 7] {
            let result = catch_unwind(AssertUnwindSafe(|| pool.run(8, &|i| assert_ne!(i, bad))));
            assert!(result.is_err());
            let threads = Mutex::new(HashSet::new());
            pool.run(8, &|_| {
                lock(&threads).insert(thread::current().id());
                // Long enough for the others to wake and join.
                thread::sleep(Duration::from_millis(20));
            });
            assert!(lock(&threads).len() > 1, "the pool's threads no longer take part");
        }
    }
}

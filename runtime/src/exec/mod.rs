//! What executes a plan: the kernels in use and the threads.

mod pool;

use crate::error::{Error, Result};
use crate::kernels::{self, Activation, Kernels};
use pool::Pool;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Kernels and worker threads of a session.
pub struct Exec {
    /// The functions for this CPU.
    pub kernels: &'static Kernels,
    pool: Option<Pool>,
    threads: usize,
    profile: Option<Mutex<Profile>>,
}

/// Time spent in vedge's operators, by class.
pub type Profile = BTreeMap<&'static str, Spent>;

/// Time and work of a class of operators.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spent {
    /// Calls.
    pub calls: usize,
    /// Time.
    pub time: Duration,
    /// Multiply-accumulates.
    pub macs: usize,
}

impl Exec {
    /// With this many threads; 1 runs on the caller's thread alone.
    ///
    /// # Errors
    /// [`Error::Usage`] for 0 threads or an unknown kernel, [`Error::Engine`] when threads cannot be started.
    pub fn new(threads: usize) -> Result<Exec> {
        if threads == 0 {
            return Err(Error::Usage { what: "0 threads asked for".into(), hint: "use --threads 1 or more".into() });
        }
        let pool = (threads > 1).then(|| Pool::new(threads - 1)).transpose();
        let pool = pool.map_err(|e| Error::Engine(format!("{threads} threads cannot be started: {e}")))?;
        Ok(Exec { kernels: kernels::detect()?, pool, threads, profile: None })
    }

    /// Starts to measure operators.
    #[must_use]
    pub fn profiled(self) -> Exec {
        Exec { profile: Some(Mutex::default()), ..self }
    }

    /// Runs an operator, measured if that was asked for.
    pub fn measure(&self, class: &'static str, macs: usize, f: impl FnOnce()) {
        let Some(profile) = &self.profile else { return f() };
        let start = Instant::now();
        f();
        let time = start.elapsed();
        let mut profile = profile.lock().unwrap_or_else(PoisonError::into_inner);
        let spent = profile.entry(class).or_default();
        *spent = Spent { calls: spent.calls + 1, time: spent.time + time, macs: spent.macs + macs };
    }

    /// What was measured since the last call.
    pub fn take_profile(&self) -> Profile {
        self.profile
            .as_ref()
            .map_or_else(Profile::new, |p| std::mem::take(&mut p.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    /// Applies an element-wise function in place.
    pub fn activate(&self, activation: Activation, x: &mut [f32]) {
        self.kernels.activate(activation, x);
    }

    /// How many threads.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Rows a task should take: at most `most`, a multiple of `step`, so that the thread with most to do has as little as
    /// possible. Of sizes that are within 3 % of the best the largest: fewer tasks read the weights less often.
    pub fn block(&self, rows: usize, most: usize, step: usize) -> usize {
        let longest = |size: usize| {
            let (rounds, left) = (rows / size / self.threads, rows % (size * self.threads));
            rounds * size + left.min(size)
        };
        let sizes = || (1..=(most / step).max(1)).map(|n| n * step);
        let best = sizes().map(longest).min().unwrap_or(rows);
        sizes().rfind(|&size| longest(size) <= best + best / 32).unwrap_or(step)
    }

    /// Calls `f` for each index below `count`, side by side where there are threads.
    pub fn each(&self, count: usize, f: &(dyn Fn(usize) + Sync)) {
        match &self.pool {
            Some(pool) => pool.run(count, f),
            None => (0..count).for_each(f),
        }
    }

    /// Calls `f(index, chunk)` for consecutive chunks of `data`, side by side where there are threads.
    pub fn chunks<T: Send>(&self, data: &mut [T], size: usize, f: &(dyn Fn(usize, &mut [T]) + Sync)) {
        let (len, data) = (data.len(), Scattered(data.as_mut_ptr()));
        self.each(len.div_ceil(size), &|i| {
            let start = i * size;
            // SAFETY: inside `data`, which is borrowed until all is done; each index, and so each chunk, is taken once.
            f(i, unsafe { std::slice::from_raw_parts_mut(data.at(start), size.min(len - start)) });
        });
    }
}

/// Elements that threads share out among themselves: who writes through it takes care that each is one thread's.
pub(crate) struct Scattered<T>(pub *mut T);

// SAFETY: each thread takes its own elements, which may go to another thread.
unsafe impl<T: Send> Sync for Scattered<T> {}

impl<T> Scattered<T> {
    /// Address of an element that must exist.
    pub fn at(&self, index: usize) -> *mut T {
        self.0.wrapping_add(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_keep_threads_busy() -> Result<()> {
        let block = |threads, rows| Exec::new(threads).map(|e| e.block(rows, 48, 4));
        // One thread: as few tasks as may be.
        assert_eq!(block(1, 197)?, 48);
        assert_eq!(block(1, 3)?, 48);
        // Two threads: twice 48 rows each and 5 more.
        assert_eq!(block(2, 197)?, 48);
        // Twice 36 rows each and 6 more, where 48 would leave one of them with 96.
        assert_eq!(block(2, 150)?, 36);
        assert_eq!(block(2, 8)?, 4);
        Ok(())
    }
}

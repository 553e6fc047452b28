//! What executes a plan: the kernels in use and the threads.

use crate::error::{Error, Result};
use crate::kernels::{self, Activation, Kernels, Norm};
use rayon::prelude::*;

/// Kernels and worker threads of a session.
pub struct Exec {
    /// The functions for this CPU.
    pub kernels: &'static Kernels,
    pool: Option<rayon::ThreadPool>,
    threads: usize,
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
        let build = || rayon::ThreadPoolBuilder::new().num_threads(threads).build();
        let pool = (threads > 1).then(build).transpose().map_err(|e| Error::Engine(e.to_string()))?;
        Ok(Exec { kernels: kernels::detect()?, pool, threads })
    }

    /// LayerNorm of one row.
    pub fn layer_norm(&self, norm: &Norm, x: &[f32], out: &mut [f32]) {
        self.kernels.layer_norm(norm, x, out);
    }

    /// Applies an element-wise function in place.
    pub fn activate(&self, activation: Activation, x: &mut [f32]) {
        self.kernels.activate(activation, x);
    }

    /// How many threads.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `f` on the workers, so that [`Exec::chunks`] inside it need not change threads.
    pub fn install<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        match &self.pool {
            Some(pool) => pool.install(f),
            None => f(),
        }
    }

    /// Rows a task should take: at most `most`, a multiple of `step`, and all threads busy to the end.
    pub fn block(&self, rows: usize, most: usize, step: usize) -> usize {
        let rounds = rows.div_ceil(most * self.threads).max(1);
        rows.div_ceil(rounds * self.threads).next_multiple_of(step).clamp(step, most.max(step))
    }

    /// Calls `f(index, chunk)` for consecutive chunks of `data`, side by side where there are threads.
    pub fn chunks<T: Send>(&self, data: &mut [T], size: usize, f: &(dyn Fn(usize, &mut [T]) + Sync)) {
        if self.pool.is_some() && data.len() > size {
            data.par_chunks_mut(size).enumerate().for_each(|(i, c)| f(i, c));
        } else {
            data.chunks_mut(size).enumerate().for_each(|(i, c)| f(i, c));
        }
    }
}

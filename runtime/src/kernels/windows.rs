//! Attention within windows, with the linear layer that makes its queries, keys and values: a few windows at a time, so that
//! what lies between stays in the cache.

use super::attention::{Attention, Step};
use super::linear::{BLOCK, Linear};
use super::room;
use crate::exec::{Exec, Scattered};
use std::cell::RefCell;

/// `attention(linear(x))`, where each element of the batch is made of rows of its own: `x` is `[batch][tokens][k]`.
#[derive(Clone, Debug)]
pub struct Windows {
    /// Makes queries, keys and values, side by side in its rows. It must not [read its rows as a
    /// whole](Linear::reads_whole).
    pub linear: Linear,
    /// All three read the layer's output, each element of the batch the rows of its window alone.
    pub attention: Attention,
}

thread_local! {
    static HIDDEN: RefCell<Vec<f32>> = RefCell::default();
}

impl Windows {
    /// Whether every window finds all that it reads in rows of its own.
    pub fn fit(linear: &Linear, a: &Attention) -> bool {
        let adds_input = a.steps.iter().any(|s| matches!(s, Step::AddInput(_)));
        let Some(window) = a.queries.checked_mul(linear.n()).filter(|_| a.queries == a.keys && !adds_input) else {
            return false;
        };
        [(&a.q, a.dim), (&a.k, a.dim), (&a.v, a.dim_v)].into_iter().all(|(v, dim)| {
            let [batch, strides @ ..] = v.strides;
            let steps = [a.heads, a.queries, dim].into_iter().zip(strides);
            let last = steps.fold(v.offset as u128, |at, (n, s)| {
                at.saturating_add((n as u128).saturating_sub(1).saturating_mul(s as u128))
            });
            batch == window && last < window as u128
        })
    }

    /// Rows of a window.
    pub fn tokens(&self) -> usize {
        self.attention.queries
    }

    /// Multiply-accumulates.
    pub fn macs(&self) -> usize {
        let a = &self.attention;
        a.macs() + a.batch * self.tokens() * self.linear.k() * self.linear.n()
    }

    /// Runs on rows `[batch · tokens][k]`.
    ///
    /// # Panics
    /// When the lengths do not match.
    pub fn run(&self, exec: &Exec, x: &[f32], out: &mut [f32]) {
        let (a, tokens, n) = (&self.attention, self.tokens(), self.linear.n());
        assert_eq!(x.len(), a.batch * tokens * self.linear.k());
        if a.batch < exec.threads() {
            return HIDDEN.with_borrow_mut(|hidden| {
                let hidden = room(hidden, a.batch * tokens * n);
                self.linear.run(exec, x, None, hidden);
                a.run(exec, &[hidden], out);
            });
        }
        a.check_output(out);
        let out = Scattered(out.as_mut_ptr());
        let few = (BLOCK / tokens).clamp(1, a.batch.div_ceil(exec.threads()));
        exec.each(a.batch.div_ceil(few), &|i| {
            let windows = i * few..a.batch.min((i + 1) * few);
            HIDDEN.with_borrow_mut(|hidden| {
                let hidden = room(hidden, windows.len() * tokens * n);
                self.linear.run_here(exec.kernels, x, windows.start * tokens, None, hidden);
                a.run_here(exec.kernels, &[hidden], windows, &out);
            });
        });
    }
}

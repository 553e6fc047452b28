//! Scaled dot-product attention, one head at a time: no matrix of all tokens × all tokens is ever stored.

use super::{MR_F32, NR};
use crate::exec::Exec;
use std::cell::RefCell;

/// A tensor `[batch][head][token][dim]` inside a larger one: element offset and strides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadView {
    /// Which input holds it.
    pub input: usize,
    /// Element offset of the first value.
    pub offset: usize,
    /// Strides of batch, head, token and dim, in elements.
    pub strides: [usize; 4],
}

/// A constant added to the scores, `[batch or 1][head or 1][query][key]`.
#[derive(Clone, Debug, PartialEq)]
pub struct ScoreBias {
    /// 1 or the batch size.
    pub batch: usize,
    /// 1 or the number of heads.
    pub heads: usize,
    /// Values.
    pub values: Vec<f32>,
}

/// `softmax(scale · q kᵀ + biases) v`.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// Batch (windows, patches).
    pub batch: usize,
    /// Heads.
    pub heads: usize,
    /// Query tokens.
    pub queries: usize,
    /// Key and value tokens.
    pub keys: usize,
    /// Width of a head of q and k.
    pub dim: usize,
    /// Width of a head of v.
    pub dim_v: usize,
    /// Queries.
    pub q: HeadView,
    /// Keys.
    pub k: HeadView,
    /// Values.
    pub v: HeadView,
    /// Multiplies q·k.
    pub scale: f32,
    /// Added to the scaled scores.
    pub biases: Vec<ScoreBias>,
    /// Strides of batch, head, query and dim in the output.
    pub out: [usize; 4],
}

#[derive(Default)]
struct Scratch {
    keys: Vec<f32>,
    values: Vec<f32>,
    queries: Vec<f32>,
    scores: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Attention {
    /// Elements of the output.
    pub fn output_len(&self) -> usize {
        self.batch * self.heads * self.queries * self.dim_v
    }

    /// Multiply-accumulates.
    pub fn macs(&self) -> usize {
        self.batch * self.heads * self.queries * self.keys * (self.dim + self.dim_v)
    }

    /// Runs over the input tensors that the views name.
    pub fn run(&self, exec: &Exec, inputs: &[&[f32]], out: &mut [f32]) {
        let one = self.queries * self.dim_v;
        let mut heads = vec![0.; self.output_len()];
        exec.chunks(&mut heads, one, &|i, out| {
            SCRATCH.with_borrow_mut(|s| self.head(exec, inputs, i / self.heads, i % self.heads, out, s));
        });
        // Back to the output's layout.
        for (i, head) in heads.chunks_exact(one).enumerate() {
            let at = i / self.heads * self.out[0] + i % self.heads * self.out[1];
            for (t, row) in head.chunks_exact(self.dim_v).enumerate() {
                let at = at + t * self.out[2];
                if self.out[3] == 1 {
                    out[at..at + self.dim_v].copy_from_slice(row);
                } else {
                    row.iter().enumerate().for_each(|(d, &v)| out[at + d * self.out[3]] = v);
                }
            }
        }
    }

    fn head(&self, exec: &Exec, inputs: &[&[f32]], b: usize, h: usize, out: &mut [f32], s: &mut Scratch) {
        let kernels = exec.kernels;
        let (nq, nk, d, dv) = (self.queries, self.keys, self.dim, self.dim_v);
        let view = |v: &HeadView| (inputs[v.input], v.offset + b * v.strides[0] + h * v.strides[1], v.strides);
        // k as the weights of a linear layer q → scores, v as those of scores → output.
        let (x, at, st) = view(&self.k);
        pack(&mut s.keys, nk, d, |token, dim| x[at + token * st[2] + dim * st[3]]);
        let (x, at, st) = view(&self.v);
        pack_transposed(&mut s.values, dv, nk, x, at, st[3], st[2]);
        let (x, at, st) = view(&self.q);
        let direct = st[3] == 1;
        let padded = nk.next_multiple_of(NR);
        s.scores.resize(MR_F32 * padded, 0.);
        for m in (0..nq).step_by(MR_F32) {
            let row = |i: usize| (m + i).min(nq - 1);
            if !direct {
                s.queries.clear();
                for i in 0..MR_F32 {
                    s.queries.extend((0..d).map(|k| x[at + row(i) * st[2] + k * st[3]]));
                }
            }
            let q: [*const f32; MR_F32] = std::array::from_fn(|i| match direct {
                true => x[at + row(i) * st[2]..][..d].as_ptr(),
                false => s.queries[i * d..].as_ptr(),
            });
            for (p, panel) in s.keys.chunks_exact(d * NR).enumerate() {
                let mut tile = [[0.; NR]; MR_F32];
                // SAFETY: `kernels` came from `available`; rows hold d floats, the panel d·NR.
                unsafe { (kernels.tile_f32)(&q, d, panel.as_ptr(), &mut tile) };
                for (i, t) in tile.iter().enumerate() {
                    s.scores[i * padded + p * NR..][..NR].copy_from_slice(t);
                }
            }
            for i in 0..MR_F32.min(nq - m) {
                self.normalize(exec, b, h, m + i, &mut s.scores[i * padded..][..nk]);
            }
            let p: [*const f32; MR_F32] = std::array::from_fn(|i| s.scores[i * padded..].as_ptr());
            for (c, panel) in s.values.chunks_exact(nk * NR).enumerate() {
                let mut tile = [[0.; NR]; MR_F32];
                // SAFETY: as above; rows hold at least nk floats.
                unsafe { (kernels.tile_f32)(&p, nk, panel.as_ptr(), &mut tile) };
                let columns = NR.min(dv - c * NR);
                for (i, t) in tile.iter().enumerate().take(nq - m) {
                    out[(m + i) * dv + c * NR..][..columns].copy_from_slice(&t[..columns]);
                }
            }
        }
    }

    fn normalize(&self, exec: &Exec, b: usize, h: usize, query: usize, scores: &mut [f32]) {
        let rows = &exec.kernels.rows;
        let mut scale = self.scale;
        if !self.biases.is_empty() {
            scores.iter_mut().for_each(|v| *v *= self.scale);
            scale = 1.;
        }
        for bias in &self.biases {
            let at = ((b % bias.batch * bias.heads + h % bias.heads) * self.queries + query) * self.keys;
            // SAFETY: `kernels` came from `available`.
            unsafe { (rows.add)(scores, &bias.values[at..at + self.keys]) };
        }
        // SAFETY: as above.
        unsafe { (rows.softmax)(scores, scale) };
    }
}

/// Packs `n` outputs of `k` inputs into panels `[k][NR]`, reusing the buffer.
fn pack(into: &mut Vec<f32>, n: usize, k: usize, weight: impl Fn(usize, usize) -> f32) {
    into.resize(n.div_ceil(NR) * k * NR, 0.);
    for (p, panel) in into.chunks_exact_mut(k * NR).enumerate() {
        let columns = NR.min(n - p * NR);
        for i in 0..k {
            let row = &mut panel[i * NR..][..NR];
            for (c, v) in row.iter_mut().enumerate().take(columns) {
                *v = weight(p * NR + c, i);
            }
            row[columns..].fill(0.);
        }
    }
}

/// As [`pack`] for values `x[at + n·n_stride + k·k_stride]`; copies whole rows where `n_stride` is 1.
fn pack_transposed(into: &mut Vec<f32>, n: usize, k: usize, x: &[f32], at: usize, n_stride: usize, k_stride: usize) {
    if n_stride != 1 {
        return pack(into, n, k, |c, i| x[at + c * n_stride + i * k_stride]);
    }
    into.resize(n.div_ceil(NR) * k * NR, 0.);
    for (p, panel) in into.chunks_exact_mut(k * NR).enumerate() {
        let columns = NR.min(n - p * NR);
        for i in 0..k {
            let row = &mut panel[i * NR..][..NR];
            row[..columns].copy_from_slice(&x[at + i * k_stride + p * NR..][..columns]);
            row[columns..].fill(0.);
        }
    }
}

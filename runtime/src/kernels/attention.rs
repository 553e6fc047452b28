//! Scaled dot-product attention, one head at a time: no matrix of all tokens × all tokens is ever stored.

use super::rows::LANES;
use super::{Kernels, MR_F32, NR};
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

/// Where heads write their parts of the output, which do not overlap.
struct Output(*mut f32);

// SAFETY: each head writes its own elements.
unsafe impl Sync for Output {}

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
    ///
    /// # Panics
    /// When `out` is not [`Attention::output_len`] long or an input ends before its view. The output's strides must
    /// give each element one place, as the plan's check of operators makes sure.
    pub fn run(&self, exec: &Exec, inputs: &[&[f32]], out: &mut [f32]) {
        let sizes = [self.batch, self.heads, self.queries, self.dim_v];
        let last: usize = sizes.iter().zip(self.out).map(|(n, stride)| (n - 1) * stride).sum();
        assert!(out.len() == self.output_len() && last < out.len());
        let out = Output(out.as_mut_ptr());
        exec.each(self.batch * self.heads, &|i| {
            SCRATCH.with_borrow_mut(|s| self.head(exec.kernels, inputs, i / self.heads, i % self.heads, &out, s));
        });
    }

    fn head(&self, kernels: &Kernels, inputs: &[&[f32]], b: usize, h: usize, out: &Output, s: &mut Scratch) {
        let (nq, nk, d, dv) = (self.queries, self.keys, self.dim, self.dim_v);
        let view = |v: &HeadView| (&inputs[v.input][v.offset + b * v.strides[0] + h * v.strides[1]..], v.strides);
        // k as the weights of a linear layer q → scores, v as those of scores → output.
        let (x, st) = view(&self.k);
        pack(&mut s.keys, nk, d, x, st[2], st[3]);
        let (x, st) = view(&self.v);
        pack(&mut s.values, dv, nk, x, st[3], st[2]);
        let (x, st) = view(&self.q);
        let direct = st[3] == 1;
        let padded = nk.next_multiple_of(NR);
        s.scores.resize(MR_F32 * padded, 0.);
        for m in (0..nq).step_by(MR_F32) {
            // Past the end, the last row again.
            let row = |i: usize| (m + i).min(nq - 1) * st[2];
            if !direct {
                s.queries.clear();
                for i in 0..MR_F32 {
                    s.queries.extend((0..d).map(|k| x[row(i) + k * st[3]]));
                }
            }
            let q: [*const f32; MR_F32] = std::array::from_fn(|i| match direct {
                true => x[row(i)..][..d].as_ptr(),
                false => s.queries[i * d..].as_ptr(),
            });
            for (p, panel) in s.keys.chunks_exact(d * NR).enumerate() {
                // SAFETY: `kernels` came from `available`; rows hold d floats, the panel d·NR; each row of scores has
                // room for all panels.
                unsafe { (kernels.tile_f32)(&q, d, panel.as_ptr(), s.scores.as_mut_ptr().add(p * NR), padded) };
            }
            let mut factor = [0.; MR_F32];
            for (i, (factor, scores)) in
                factor.iter_mut().zip(s.scores.chunks_exact_mut(padded)).enumerate().take(nq - m)
            {
                *factor = self.exponentials(kernels, b, h, m + i, scores);
            }
            let p: [*const f32; MR_F32] = std::array::from_fn(|i| s.scores[i * padded..].as_ptr());
            for (c, panel) in s.values.chunks_exact(nk * NR).enumerate() {
                let mut tile = [[0.; NR]; MR_F32];
                // SAFETY: as above; rows hold at least nk floats.
                unsafe { (kernels.tile_f32)(&p, nk, panel.as_ptr(), tile.as_flattened_mut().as_mut_ptr(), NR) };
                let columns = NR.min(dv - c * NR);
                for (i, (tile, factor)) in tile.iter().zip(factor).enumerate().take(nq - m) {
                    let at = b * self.out[0] + h * self.out[1] + (m + i) * self.out[2] + c * NR * self.out[3];
                    // SAFETY: `run` has checked the last element of the output.
                    unsafe {
                        let out = out.0.add(at);
                        if self.out[3] == 1 && columns == NR {
                            *out.cast::<[f32; NR]>() = tile.map(|v| v * factor);
                        } else {
                            (0..columns).for_each(|n| *out.add(n * self.out[3]) = tile[n] * factor);
                        }
                    }
                }
            }
        }
    }

    /// Turns the scores of a query into exponentials; returns the factor that makes them sum to 1.
    fn exponentials(&self, kernels: &Kernels, b: usize, h: usize, query: usize, scores: &mut [f32]) -> f32 {
        let mut scale = self.scale;
        if !self.biases.is_empty() {
            scores.iter_mut().for_each(|v| *v *= self.scale);
            scale = 1.;
        }
        for bias in &self.biases {
            let at = ((b % bias.batch * bias.heads + h % bias.heads) * self.queries + query) * self.keys;
            // SAFETY: `kernels` came from `available`.
            unsafe { (kernels.rows.add)(scores, &bias.values[at..at + self.keys]) };
        }
        // SAFETY: as above.
        unsafe { (kernels.rows.exponentials)(scores, self.keys, scale) }
    }
}

const _: () = assert!(NR.is_multiple_of(LANES), "rows of scores are whole vectors");

/// Packs `n` outputs of `k` inputs, `x[n · n_stride + k · k_stride]`, into panels `[k][NR]`, reusing the buffer.
fn pack(into: &mut Vec<f32>, n: usize, k: usize, x: &[f32], n_stride: usize, k_stride: usize) {
    into.resize(n.div_ceil(NR) * k * NR, 0.);
    for (p, panel) in into.as_chunks_mut::<NR>().0.chunks_exact_mut(k).enumerate() {
        let columns = NR.min(n - p * NR);
        let x = &x[p * NR * n_stride..];
        if columns < NR {
            panel.as_flattened_mut().fill(0.);
        }
        match (n_stride, k_stride) {
            (1, _) if columns == NR => {
                for (i, row) in panel.iter_mut().enumerate() {
                    *row = *x[i * k_stride..].first_chunk().expect("NR values");
                }
            }
            // Column by column: reads run along the rows of x.
            (_, 1) => {
                for c in 0..columns {
                    let x = &x[c * n_stride..][..k];
                    panel.iter_mut().zip(x).for_each(|(row, v)| row[c] = *v);
                }
            }
            _ => {
                for (i, row) in panel.iter_mut().enumerate() {
                    (0..columns).for_each(|c| row[c] = x[c * n_stride + i * k_stride]);
                }
            }
        }
    }
}

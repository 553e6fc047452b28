//! Scaled dot-product attention, one head at a time: no matrix of all tokens × all tokens is ever stored.

mod bytes;
mod float;
mod words;

use super::requantize::Grid;
use super::rows::LANES;
use super::{Kernels, NR};
use crate::exec::{Exec, Scattered};
use std::cell::RefCell;
use std::ops::Range;

pub use bytes::Bytes;

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

/// What happens to scores on their way to the softmax.
#[derive(Clone, Debug, PartialEq)]
pub enum Step {
    /// A factor.
    Times(f32),
    /// Rounding to a grid.
    Round(Grid),
    /// A constant is added.
    Add(ScoreBias),
    /// An input `[keys]` is added for every query and head.
    AddInput(usize),
}

/// `softmax(steps(q kᵀ)) v`.
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
    /// From q·k to what enters the softmax, in this order.
    pub steps: Vec<Step>,
    /// Strides of batch, head, query and dim in the output.
    pub out: [usize; 4],
    /// Where a file rounds to 8-bit integers on the way.
    pub grids: Grids,
    /// What it computes in.
    pub arithmetic: Arithmetic,
}

/// What the two products are computed in.
#[derive(Clone, Debug, PartialEq)]
pub enum Arithmetic {
    /// 32-bit floats.
    Float,
    /// 16-bit integers where the CPU has [such a tile](Kernels::tile_i16); q and k are rounded to 12 bits or more of their
    /// largest value in the head, v to 11, probabilities to steps of 2²¹/keys in the largest of the row.
    Words,
    /// 8-bit integers, to which the file rounds on the way.
    Bytes(Box<Bytes>),
}

/// Rounding between the operators that attention is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Grids {
    /// What q, k and v are multiples of as they come.
    pub inputs: [Option<Grid>; 3],
    /// Of queries times a factor.
    pub q: Option<(f32, Grid)>,
    /// Of keys times a factor.
    pub k: Option<(f32, Grid)>,
    /// Of what leaves the softmax.
    pub probabilities: Option<Grid>,
}

#[derive(Default)]
struct Scratch {
    bytes: bytes::Scratch,
    float: float::Scratch,
    words: words::Scratch,
    scores: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Where heads write their parts of the output, which do not overlap.
pub(super) type Output = Scattered<f32>;

impl Attention {
    /// Elements of the output.
    pub fn output_len(&self) -> usize {
        self.batch * self.heads * self.queries * self.dim_v
    }

    /// Leaves out the queries beside a range.
    pub fn keep_queries(&mut self, range: Range<usize>) {
        self.q.offset += range.start * self.q.strides[2];
        let biases = self.steps.iter_mut().filter_map(|s| if let Step::Add(bias) = s { Some(bias) } else { None });
        for bias in biases {
            let planes = bias.values.chunks_exact(self.queries * self.keys);
            let kept = range.start * self.keys..range.end * self.keys;
            bias.values = planes.flat_map(|plane| &plane[kept.clone()]).copied().collect();
        }
        self.queries = range.len();
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
        self.check_output(out);
        let out = Scattered(out.as_mut_ptr());
        exec.each(self.batch * self.heads, &|i| {
            let (b, h) = (i / self.heads, i % self.heads);
            let head = Head { attention: self, kernels: exec.kernels, inputs, first: 0, b, h };
            SCRATCH.with_borrow_mut(|s| head.run(&out, s));
        });
    }

    /// Runs a part of the batch on the caller's thread; the inputs hold that part alone.
    ///
    /// # Panics
    /// As [`Attention::run`]; the output must have been [checked](Attention::check_output).
    pub(super) fn run_here(&self, kernels: &Kernels, inputs: &[&[f32]], part: Range<usize>, out: &Output) {
        let first = part.start;
        SCRATCH.with_borrow_mut(|s| {
            for b in part {
                for h in 0..self.heads {
                    Head { attention: self, kernels, inputs, first, b, h }.run(out, s);
                }
            }
        });
    }

    /// Makes sure that heads write inside the output.
    ///
    /// # Panics
    /// When they would not.
    pub(super) fn check_output(&self, out: &[f32]) {
        let sizes = [self.batch, self.heads, self.queries, self.dim_v];
        let last: usize = sizes.iter().zip(self.out).map(|(n, stride)| (n - 1) * stride).sum();
        assert!(out.len() == self.output_len() && last < out.len());
    }
}

/// One head of one element of the batch.
struct Head<'a> {
    attention: &'a Attention,
    kernels: &'a Kernels,
    inputs: &'a [&'a [f32]],
    /// Element of the batch that the inputs begin with.
    first: usize,
    b: usize,
    h: usize,
}

impl Head<'_> {
    fn run(&self, out: &Output, s: &mut Scratch) {
        if let Arithmetic::Bytes(bytes) = &self.attention.arithmetic {
            return bytes.run(self, out, &mut s.bytes);
        }
        let words = self.attention.arithmetic == Arithmetic::Words;
        let done = words && words::run(self, out, &mut s.words, &mut s.scores);
        if !done {
            float::run(self, out, &mut s.float, &mut s.scores);
        }
    }

    /// Where a tensor's part for this head begins, and the strides of token and dim.
    fn view(&self, v: &HeadView) -> (&[f32], [usize; 2]) {
        let [batch, head, token, dim] = v.strides;
        (&self.inputs[v.input][v.offset + (self.b - self.first) * batch + self.h * head..], [token, dim])
    }

    /// Turns products of a query with all keys, in units of `step`, into scores but for a factor, which is returned.
    fn scores(&self, query: usize, step: f32, products: &mut [f32]) -> f32 {
        let (a, scores, rows) = (self.attention, products, &self.kernels.rows);
        let mut factor = step;
        for step in &a.steps {
            if matches!(step, Step::Add(_) | Step::AddInput(_)) && factor != 1. {
                scores.iter_mut().for_each(|v| *v *= factor);
                factor = 1.;
            }
            match step {
                Step::Times(by) => factor *= by,
                Step::Round(grid) => {
                    grid.round_product(self.kernels, scores, factor);
                    factor = 1.;
                }
                // SAFETY: `kernels` came from `available`, here and below.
                Step::AddInput(input) => unsafe { (rows.add)(scores, &self.inputs[*input][..a.keys]) },
                Step::Add(bias) => {
                    let plane = self.b % bias.batch * bias.heads + self.h % bias.heads;
                    let at = (plane * a.queries + query) * a.keys;
                    // SAFETY: as above.
                    unsafe { (rows.add)(scores, &bias.values[at..at + a.keys]) };
                }
            }
        }
        factor
    }

    /// Turns scores, which `scale` multiplies, into a row of the softmax but for a factor, which is returned.
    fn exponentials(&self, scale: f32, scores: &mut [f32]) -> f32 {
        let (a, kernels) = (self.attention, self.kernels);
        // SAFETY: `kernels` came from `available`.
        let factor = unsafe { (kernels.rows.exponentials)(scores, a.keys, scale) };
        let Some(grid) = a.grids.probabilities else { return factor };
        grid.round_product(kernels, scores, factor);
        1.
    }

    /// Writes the output of the queries from `m` on, columns of v from `column` on, each row times its factor: [`NR`] sums a
    /// row, `stride` apart.
    fn write(&self, out: &Output, m: usize, column: usize, (sums, stride): (&[f32], usize), factors: &[f32]) {
        let a = self.attention;
        let columns = NR.min(a.dim_v - column);
        for (i, (sums, factor)) in sums.chunks(stride).zip(factors).enumerate().take(a.queries - m) {
            let tile: &[f32; NR] = sums.first_chunk().expect("a panel's sums");
            let at = self.b * a.out[0] + self.h * a.out[1] + (m + i) * a.out[2] + column * a.out[3];
            // SAFETY: `run` has checked the last element of the output.
            unsafe {
                let out = out.at(at);
                if a.out[3] == 1 && columns == NR {
                    *out.cast::<[f32; NR]>() = tile.map(|v| v * factor);
                } else {
                    (0..columns).for_each(|n| *out.add(n * a.out[3]) = tile[n] * factor);
                }
            }
        }
    }
}

const _: () = assert!(NR.is_multiple_of(LANES), "rows of scores are whole vectors");

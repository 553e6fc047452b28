//! A head in 8-bit integers, for files that round all that is multiplied, the scores and the probabilities to 8 bits: the
//! products are exact, and where a row of scores has 256 values at most, so has its softmax.

use super::super::requantize::Grid;
use super::super::rows::Products;
use super::super::{I8Weights, Kernels, MR_I8, NR, TileI8, room};
use super::{Attention, Head, HeadView, Output, Step};

/// How a file rounds the parts of an attention.
#[derive(Clone, Debug, PartialEq)]
pub struct Bytes {
    q: Codes,
    k: Codes,
    v: Codes,
    /// Of sums of products of q and k.
    scores: Codes,
    /// `exp(−i · step)` for a score that is i steps below the largest of its row, in units of 1/[`ONE`].
    exponentials: Box<[f32; 256]>,
    /// Their three bytes, lowest first.
    planes: Box<[[u8; 256]; 3]>,
    probabilities: Codes,
}

/// Numbers as codes 0…255: a number x has the code `clamp(round(x · inverse) + zero, 0, 255)`, a code stands for
/// `(code − zero) · scale`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Codes {
    scale: f32,
    inverse: f32,
    zero: i32,
}

impl Codes {
    /// Of `x · factor` on a grid of 256 steps.
    fn of((factor, grid): (f32, Grid)) -> Codes {
        Codes { scale: grid.scale, inverse: factor / grid.scale, zero: -grid.low as i32 }
    }
}

/// What the largest exponential, 1, is stored as: three bytes.
const ONE: f64 = 16_777_215.;
/// With more inputs, a sum of 8-bit products may leave 32 bits.
const MOST_INPUTS: usize = (i32::MAX / (255 * 255)) as usize;

#[derive(Default)]
pub struct Scratch {
    gathered: Vec<f32>,
    queries: Vec<u8>,
    rows: Vec<u8>,
    sums: Vec<TileI8>,
    /// Scores, then probabilities of four queries.
    codes: Vec<u8>,
}

impl Bytes {
    /// Where the file rounds all of it and adds nothing to the scores.
    pub fn of(a: &Attention) -> Option<Bytes> {
        let side = |rounded: Option<(f32, Grid)>, input: usize| {
            rounded.or(a.grids.inputs[input].map(|grid| (1., grid))).map(Codes::of)
        };
        let (q, k, v) = (side(a.grids.q, 0)?, side(a.grids.k, 1)?, side(None, 2)?);
        let (mut rounded, mut scale) = (None, 1.);
        for step in &a.steps {
            match step {
                Step::Times(by) => scale *= by,
                Step::Round(grid) if rounded.is_none() => {
                    rounded = Some((scale, *grid));
                    scale = 1.;
                }
                _ => return None,
            }
        }
        let (factor, grid) = rounded?;
        let probabilities = Codes::of((1., a.grids.probabilities?));
        if scale <= 0. || a.dim.max(a.keys) > MOST_INPUTS {
            return None;
        }
        let step = f64::from(grid.scale) * f64::from(scale);
        let exponential = |i: usize| ((-step * i as f64).exp() * ONE).round() as u32;
        Some(Bytes {
            q,
            k,
            v,
            scores: Codes::of((q.scale * k.scale * factor, grid)),
            exponentials: Box::new(std::array::from_fn(|i| exponential(i) as f32)),
            planes: Box::new(std::array::from_fn(|p| std::array::from_fn(|i| exponential(i).to_le_bytes()[p]))),
            probabilities,
        })
    }

    /// Computes the head.
    pub(super) fn run(&self, head: &Head, out: &Output, s: &mut Scratch) {
        let (a, kernels) = (head.attention, head.kernels);
        let (nq, nk) = (a.queries, a.keys);
        quantize(head, &a.k, self.k, [nk, a.dim, a.dim], SIGNED, &mut s.gathered, &mut s.rows);
        let keys = Columns::of(kernels, [nk, a.dim], &s.rows, [a.dim, 1], [self.q, self.k]);
        quantize(head, &a.v, self.v, [nk, a.dim_v, a.dim_v], SIGNED, &mut s.gathered, &mut s.rows);
        let values = Columns::of(kernels, [a.dim_v, nk], &s.rows, [1, a.dim_v], [self.probabilities, self.v]);
        let stride = keys.weights.row_bytes();
        let queries = quantize(head, &a.q, self.q, [nq, a.dim, stride], kernels.flip, &mut s.gathered, &mut s.queries);
        let padded = nk.next_multiple_of(NR);
        let codes = room(&mut s.codes, MR_I8 * padded);
        for m in (0..nq).step_by(MR_I8) {
            // Past the end, the last row again.
            let rows = std::array::from_fn(|i| &queries[(m + i).min(nq - 1) * stride..][..stride]);
            let products = keys.multiply(kernels, rows, &mut s.sums);
            // SAFETY: `kernels` came from `available`.
            unsafe { (kernels.rows.codes)(&products, self.scores.inverse, self.scores.zero as f32, codes) };
            codes.chunks_exact_mut(padded).for_each(|codes| self.softmax(kernels, codes, nk));
            let rows = std::array::from_fn(|i| &codes[i * padded..][..padded]);
            let products = values.multiply(kernels, rows, &mut s.sums);
            let scale = self.probabilities.scale * self.v.scale;
            for (p, (sums, columns)) in products.tiles.iter().zip(products.columns).enumerate() {
                let exact = |i: usize, n: usize| sums[i][n].wrapping_add(products.rows[i]).wrapping_add(columns[n]);
                let tile: [[f32; NR]; MR_I8] = std::array::from_fn(|i| std::array::from_fn(|n| exact(i, n) as f32));
                head.write(out, m, p * NR, (tile.as_flattened(), NR), &[scale; MR_I8]);
            }
        }
    }

    /// Turns the codes of a row's `n` scores, padded to [`NR`], into those of its probabilities, as tiles read them.
    fn softmax(&self, kernels: &Kernels, codes: &mut [u8], n: usize) {
        let padding = (codes.len() - n) as u32;
        codes[n..].fill(0);
        let largest = codes.iter().fold(0, |a, &c| a.max(c));
        codes.iter_mut().for_each(|c| *c = largest - *c);
        // Of integers, so that it is the same in any order.
        let mut sum = 0.;
        for (p, plane) in self.planes.iter().enumerate() {
            // SAFETY: `kernels` came from `available`.
            let with_padding = unsafe { (kernels.rows.lookup_sum)(plane, codes) };
            sum += f64::from(with_padding - padding * u32::from(plane[usize::from(largest)])) * 256f64.powi(p as i32);
        }
        let mut places = [0; 256];
        let factor = (1. / (sum * f64::from(self.probabilities.scale))) as f32;
        // SAFETY: as above.
        unsafe {
            let zero = self.probabilities.zero as f32;
            (kernels.rows.quantize)(&self.exponentials[..], factor, zero, kernels.flip, &mut places);
            (kernels.rows.lookup)(&places, codes);
        }
    }
}

/// What makes a code an i8.
const SIGNED: u8 = 0x80;

/// One side of a product, packed like weights.
struct Columns {
    weights: I8Weights,
    /// What the zero points of rows add to each column's sums, negative.
    corrections: Vec<[i32; NR]>,
    /// Zero point of the rows, of the columns as i8.
    zeros: [i32; 2],
}

impl Columns {
    fn of(
        kernels: &Kernels,
        shape: [usize; 2],
        codes: &[u8],
        strides: [usize; 2],
        [rows, columns]: [Codes; 2],
    ) -> Columns {
        let codes = &codes[..shape[0] * shape[1]];
        // SAFETY: the same bytes.
        let codes = unsafe { std::slice::from_raw_parts(codes.as_ptr().cast::<i8>(), codes.len()) };
        let weights = I8Weights::pack_strided(kernels, shape, codes, strides, &vec![1.; shape[0]]);
        let stored = rows.zero - i32::from(kernels.flip);
        let corrections = weights.panels.iter().map(|p| p.sum.map(|sum| -stored * sum)).collect();
        Columns { weights, corrections, zeros: [rows.zero, columns.zero - i32::from(SIGNED)] }
    }

    /// Multiplies four rows of codes, which hold what fills up the last group too. With p and v codes, y and z their zero
    /// points: Σ (p − y)(v − z) is Σ pv − y Σ v − z Σ (p − y).
    fn multiply<'a>(&'a self, kernels: &Kernels, rows: [&[u8]; MR_I8], sums: &'a mut Vec<TileI8>) -> Products<'a> {
        let w = &self.weights;
        assert!(rows.iter().all(|row| row.len() >= w.row_bytes()));
        let sums = room(sums, w.panels.len());
        for (panel, sums) in w.panels.iter().zip(sums.iter_mut()) {
            // SAFETY: `kernels` came from `available`; rows are long enough.
            unsafe { (kernels.tile_i8)(&rows.map(<[u8]>::as_ptr), panel, sums) };
        }
        let [zero, of_columns] = self.zeros;
        let rows = rows.map(|row| of_columns * (w.k as i32 * zero - sum(&row[..w.k], kernels.flip)));
        Products { tiles: sums, rows, columns: &self.corrections }
    }
}

/// The sum of codes that are stored exclusive-or `flip`.
fn sum(codes: &[u8], flip: u8) -> i32 {
    codes.iter().map(|c| i32::from(c ^ flip)).sum()
}

/// Quantizes a head's `[n][width]` values into rows of codes, `stride` apart, stored exclusive-or `flip`.
fn quantize<'a>(
    head: &Head,
    view: &HeadView,
    codes: Codes,
    [n, width, stride]: [usize; 3],
    flip: u8,
    gathered: &mut Vec<f32>,
    out: &'a mut Vec<u8>,
) -> &'a [u8] {
    let (x, [token, dim]) = head.view(view);
    let out = room(out, n * stride);
    for (t, out) in out.chunks_exact_mut(stride).enumerate() {
        let mut x = &x[t * token..];
        if dim != 1 && width != 1 {
            gathered.clear();
            gathered.extend((0..width).map(|d| x[d * dim]));
            x = gathered;
        }
        // SAFETY: `kernels` came from `available`.
        unsafe { (head.kernels.rows.quantize)(&x[..width], codes.inverse, codes.zero as f32, flip, &mut out[..width]) };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::{Arithmetic, Grids};
    use super::*;
    use crate::exec::Exec;
    use crate::kernels::{Layout, available};
    use crate::model::card::SelfTest;

    const HEADS: usize = 2;

    /// Queries and values token by token, keys dim by dim; zero points off the middle, signed probabilities.
    fn attention([queries, keys, dim, dim_v]: [usize; 4]) -> Attention {
        let grid = Grid::of_bytes;
        let rows = |input, n, width| {
            let strides = [n * HEADS * width, width, HEADS * width, 1];
            HeadView { input, offset: 0, strides }
        };
        let grids = Grids {
            inputs: [None, Some(grid(0.011, 117.)), Some(grid(0.0074, 131.))],
            q: Some((0.7, grid(0.006, 129.))),
            k: None,
            probabilities: Some(grid(1. / 256., 0.)),
        };
        Attention {
            batch: 2,
            heads: HEADS,
            queries,
            keys,
            dim,
            dim_v,
            q: rows(0, queries, dim),
            k: HeadView { input: 1, offset: 0, strides: [HEADS * dim * keys, dim * keys, 1, keys] },
            v: rows(2, keys, dim_v),
            steps: vec![Step::Times(1.3), Step::Round(grid(0.02, 120.)), Step::Times(1.7)],
            out: [HEADS * queries * dim_v, queries * dim_v, dim_v, 1],
            grids,
            arithmetic: Arithmetic::Float,
        }
    }

    /// What the file says, operator by operator.
    fn reference(a: &Attention, inputs: &[&[f32]]) -> Vec<f64> {
        let rounded = |x: f64, grid: Grid| {
            let [scale, low, high] = [grid.scale, grid.low, grid.high].map(f64::from);
            (x / scale).round_ties_even().clamp(low, high) * scale
        };
        let (factor, of_q) = a.grids.q.expect("a grid");
        let [Step::Times(of_product), Step::Round(products), Step::Times(scale)] = a.steps[..] else {
            panic!("other steps")
        };
        let mut out = vec![];
        for (b, h) in (0..a.batch).flat_map(|b| (0..a.heads).map(move |h| (b, h))) {
            let at = |v: &HeadView, t: usize, d: usize| {
                let [batch, head, token, dim] = v.strides;
                f64::from(inputs[v.input][b * batch + h * head + t * token + d * dim])
            };
            for m in 0..a.queries {
                let scores: Vec<f64> = (0..a.keys)
                    .map(|n| {
                        let q = |d| rounded(at(&a.q, m, d) * f64::from(factor), of_q);
                        let k = |d| rounded(at(&a.k, n, d), a.grids.inputs[1].expect("a grid"));
                        let product: f64 = (0..a.dim).map(|d| q(d) * k(d)).sum();
                        rounded(product * f64::from(of_product), products) * f64::from(scale)
                    })
                    .collect();
                let sum: f64 = scores.iter().map(|s| s.exp()).sum();
                let p: Vec<f64> =
                    scores.iter().map(|s| rounded(s.exp() / sum, a.grids.probabilities.expect("a grid"))).collect();
                let v = |n, d| rounded(at(&a.v, n, d), a.grids.inputs[2].expect("a grid"));
                out.extend((0..a.dim_v).map(|d| (0..a.keys).map(|n| p[n] * v(n, d)).sum::<f64>()));
            }
        }
        out
    }

    #[test]
    fn every_kernel_computes_what_the_file_says() {
        for shape in [[5, 19, 10, 7], [4, 16, 64, 16], [1, 1, 3, 1], [7, 33, 8, 40]] {
            let [queries, keys, dim, dim_v] = shape;
            let mut a = attention(shape);
            a.arithmetic = Arithmetic::Bytes(Box::new(Bytes::of(&a).expect("all of it is rounded")));
            let sizes = [queries * dim, keys * dim, keys * dim_v].map(|n| 2 * HEADS * n);
            let [q, k, v] = std::array::from_fn(|i| SelfTest::input(i as u64 + 20, sizes[i]));
            let inputs: [&[f32]; 3] = [&q, &k, &v];
            let want = reference(&a, &inputs);
            let mut first: Option<Vec<f32>> = None;
            for kernels in available().into_iter().filter(|k| k.layout != Layout::Paired) {
                let mut exec = Exec::new(1).unwrap();
                exec.kernels = kernels;
                let mut out = vec![f32::NAN; a.output_len()];
                a.run(&exec, &inputs, &mut out);
                // A probability that falls on the edge between two steps may be rounded to the other.
                let off: Vec<f64> = out.iter().zip(&want).map(|(y, want)| (f64::from(*y) - want).abs()).collect();
                let equal = off.iter().filter(|e| **e < 1e-5).count();
                assert!(equal * 100 >= off.len() * 95 && off.iter().all(|e| *e < 0.01), "{} {shape:?}", kernels.name);
                assert_eq!(first.get_or_insert(out.clone()), &out, "{} {shape:?}", kernels.name);
            }
        }
    }

    #[test]
    fn what_is_not_rounded_is_not_computed_in_bytes() {
        let whole = attention([5, 19, 10, 7]);
        assert!(Bytes::of(&whole).is_some());
        let missing: [fn(&mut Attention); 5] = [
            |a| a.grids.inputs[2] = None,
            |a| drop(a.steps.remove(1)),
            |a| a.grids.probabilities = None,
            |a| a.steps.push(Step::AddInput(0)),
            |a| a.steps.push(Step::Times(-1.)),
        ];
        for (i, take) in missing.into_iter().enumerate() {
            let mut a = whole.clone();
            take(&mut a);
            assert_eq!(Bytes::of(&a), None, "{i}");
        }
    }
}

//! A head in 16-bit integers, for CPUs that multiply pairs of them and add to 32 bits faster than they multiply floats.
//!
//! q, k and v are rounded to a common step for the head, a row of the softmax to one in its largest value. The steps are as fine as
//! they may be without a sum ever leaving 32 bits.

use super::super::requantize::Grid;
use super::super::rows::{PairsI16, RowsOf};
use super::super::{MR_F32, TileFnI16, room};
use super::{Head, HeadView, NR, Output};

#[derive(Default)]
pub struct Scratch {
    queries: Vec<i16>,
    /// Panels `[pairs of dims][NR keys]`.
    keys: Vec<PairsI16>,
    /// Panels `[pairs of keys][NR dims]`.
    values: Vec<PairsI16>,
    probabilities: Vec<i16>,
    gathered: Vec<f32>,
}

/// Largest magnitude of v: 11 bits with the sign. Small probabilities need their bits more than values do.
const LARGEST_V: f32 = 1023.;
/// With as many keys, probabilities of 8 bits times such values still fit a sum.
const MOST_KEYS: usize = 8192;

/// Returns false, having written nothing, where the CPU has no such tile or a value is not finite.
pub fn run(head: &Head, out: &Output, s: &mut Scratch, scores: &mut Vec<f32>) -> bool {
    let a = head.attention;
    let Some(tile_i16) = head.kernels.tile_i16.filter(|_| a.keys <= MOST_KEYS) else {
        return false;
    };
    let rows = &head.kernels.rows;
    let (nq, nk, pairs) = (a.queries, a.keys, a.dim.div_ceil(2));
    // A sum of `dim` products stays below 2³¹.
    let largest = (2f32.powi(31) / (2 * pairs) as f32).sqrt().floor().min(32767.) - 1.;
    // The largest of a row's softmax: no sum of so many products with v leaves 32 bits.
    let largest_weight = (2f32.powi(31) / (LARGEST_V * nk as f32)).floor().min(32767.) - 1.;
    let padded = nk.next_multiple_of(NR);
    let [q_on, k_on, v_on] = a.grids.inputs;
    let Some(k) = Side::of(head, (&a.k, a.grids.k), k_on, [nk, a.dim], largest, &mut s.gathered) else {
        return false;
    };
    let keys = room(&mut s.keys, padded / NR * pairs);
    // SAFETY: `kernels` came from `available`, here and below.
    unsafe { (rows.pack_keys)(&k.rows, 1. / k.step, keys) };
    let k_step = k.step;
    let Some(v) = Side::of(head, (&a.v, None), v_on, [nk, a.dim_v], LARGEST_V, &mut s.gathered) else {
        return false;
    };
    let values = room(&mut s.values, a.dim_v.div_ceil(NR) * nk.div_ceil(2));
    // SAFETY: as above.
    unsafe { (rows.pack_values)(&v.rows, 1. / v.step, values) };
    let v_step = v.step;
    let Some(q) = Side::of(head, (&a.q, a.grids.q), q_on, [nq, a.dim], largest, &mut s.gathered) else {
        return false;
    };
    let q_step = q.step;
    for (i, words) in room(&mut s.queries, nq * 2 * pairs).chunks_exact_mut(2 * pairs).enumerate() {
        // A row of an odd width ends with a zero.
        words[2 * pairs - 1] = 0;
        // SAFETY: as above.
        unsafe { (rows.round_i16)(q.rows.row(i).expect("a query"), 1. / q_step, words) };
    }
    let scores = room(scores, MR_F32 * padded);
    s.probabilities.resize(MR_F32 * padded, 0);
    let mut tile = [[0.; NR]; MR_F32];
    for m in (0..nq).step_by(MR_F32) {
        // Past the end, the last row again.
        let q = std::array::from_fn(|i| s.queries[(m + i).min(nq - 1) * 2 * pairs..].as_ptr());
        multiply(tile_i16, &q, pairs, keys, scores, padded);
        let (mut factors, mut scale) = ([v_step; MR_F32], 1.);
        for (i, scores) in scores.chunks_exact_mut(padded).enumerate() {
            scale = head.scores((m + i).min(nq - 1), q_step * k_step, scores);
        }
        match a.grids.probabilities {
            None => {
                // SAFETY: `kernels` came from `available`.
                unsafe { (rows.softmax_i16)(scores, nk, scale, largest_weight, &mut s.probabilities, &mut factors) };
                factors.iter_mut().for_each(|f| *f *= v_step);
            }
            Some(grid) => {
                for (p, scores) in s.probabilities.chunks_exact_mut(padded).zip(scores.chunks_exact_mut(padded)) {
                    head.exponentials(scale, scores);
                    // SAFETY: as above. What comes after the row's end meets zeros in the values.
                    unsafe { (rows.round_i16)(scores, 1. / grid.scale, p) };
                }
                factors = [v_step * grid.scale; MR_F32];
            }
        }
        let p = std::array::from_fn(|i| s.probabilities[i * padded..].as_ptr());
        let steps = nk.div_ceil(2);
        for (c, panel) in values.chunks_exact(steps).enumerate() {
            multiply(tile_i16, &p, steps, panel, tile.as_flattened_mut(), NR);
            head.write(out, m, c * NR, (tile.as_flattened(), NR), &factors);
        }
    }
    true
}

/// Multiplies rows with each panel of `pairs` steps into rows of sums, `stride` floats apart.
fn multiply(
    tile: TileFnI16,
    rows: &[*const i16; MR_F32],
    pairs: usize,
    panels: &[PairsI16],
    sums: &mut [f32],
    stride: usize,
) {
    let count = panels.len() / pairs;
    assert!(sums.len() >= MR_F32 * stride && stride >= count * NR);
    // SAFETY: the tile came from `available`; rows hold 2·pairs values, the panels count·pairs·NR pairs; there is room for
    // the sums.
    unsafe { tile(rows, pairs, panels.as_ptr().cast(), count, sums.as_mut_ptr(), stride) };
}

/// A side of a product as it is rounded: rows of values, and the step that they become multiples of.
struct Side<'a> {
    rows: RowsOf<'a>,
    step: f32,
}

impl Side<'_> {
    /// A head's `[n][width]` values, to be rounded to at most `largest` steps. Where the file rounds them to a grid, or they
    /// are `on` one as they come, its step is taken. Nothing where a value is not finite.
    fn of<'a>(
        head: &'a Head,
        (view, grid): (&HeadView, Option<(f32, Grid)>),
        on: Option<Grid>,
        [n, width]: [usize; 2],
        largest: f32,
        gathered: &'a mut Vec<f32>,
    ) -> Option<Side<'a>> {
        let (mut x, [mut stride, dim]) = head.view(view);
        if grid.is_some() || (dim != 1 && width != 1) {
            gathered.clear();
            gathered.extend((0..n).flat_map(|t| (0..width).map(move |d| x[t * stride + d * dim])));
            if let Some((factor, grid)) = grid {
                grid.round_product(head.kernels, gathered, factor);
            }
            (x, stride) = (gathered, width);
        }
        let rows = RowsOf { x, n, width, stride };
        // SAFETY: `kernels` came from `available`.
        let magnitude = unsafe { (head.kernels.rows.magnitude)(&rows) };
        let step = match grid.map(|(_, grid)| grid).or(on) {
            Some(grid) => grid.scale,
            None if magnitude > 1e-30 => magnitude / largest,
            None => 1.,
        };
        magnitude.is_finite().then_some(Side { rows, step })
    }
}

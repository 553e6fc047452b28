//! A head in 16-bit integers, for CPUs that multiply pairs of them and add to 32 bits faster than they multiply floats.
//!
//! q, k and v are rounded to a common step for the head, a row of the softmax to one in its largest value. The steps are as fine as
//! they may be without a sum ever leaving 32 bits.

use super::super::requantize::Grid;
use super::super::{TileFnI16, room};
use super::{Head, HeadView, MR_F32, NR, Output};

#[derive(Default)]
pub struct Scratch {
    queries: Vec<i16>,
    /// Panels `[pairs of dims][NR keys][2]`.
    keys: Vec<[[i16; 2]; NR]>,
    /// Panels `[pairs of keys][NR dims][2]`.
    values: Vec<[[i16; 2]; NR]>,
    probabilities: Vec<i16>,
    rows: Vec<i16>,
    gathered: Vec<f32>,
}

/// Largest magnitude of v: 11 bits with the sign. Small probabilities need their bits more than values do.
const LARGEST_V: f32 = 1023.;
/// With as many keys, probabilities of 8 bits times such values still fit a sum.
const MOST_KEYS: usize = 8192;

/// Returns false, having written nothing, where the CPU has no such tile or a value is not finite.
pub fn run(head: &Head, out: &Output, s: &mut Scratch, scores: &mut [f32]) -> bool {
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
    let [q, k, v] = [(&a.q, a.grids.q), (&a.k, a.grids.k), (&a.v, None)];
    let [q_on, k_on, v_on] = a.grids.inputs;
    let Some(q_step) = integers(head, q, q_on, [nq, a.dim], largest, &mut s.gathered, &mut s.queries) else {
        return false;
    };
    let Some(k_step) = integers(head, k, k_on, [nk, a.dim], largest, &mut s.gathered, &mut s.rows) else {
        return false;
    };
    pack_keys(&s.rows, nk, pairs, &mut s.keys);
    let Some(v_step) = integers(head, v, v_on, [nk, a.dim_v], LARGEST_V, &mut s.gathered, &mut s.rows) else {
        return false;
    };
    pack_values(&s.rows, nk, a.dim_v, &mut s.values);
    s.probabilities.resize(MR_F32 * padded, 0);
    let mut tile = [[0.; NR]; MR_F32];
    for m in (0..nq).step_by(MR_F32) {
        // Past the end, the last row again.
        let q = std::array::from_fn(|i| s.queries[(m + i).min(nq - 1) * 2 * pairs..].as_ptr());
        multiply(tile_i16, &q, pairs, &s.keys, scores, padded);
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
        for (c, panel) in s.values.chunks_exact(steps).enumerate() {
            multiply(tile_i16, &p, steps, panel, tile.as_flattened_mut(), NR);
            head.write(out, m, c * NR, &tile, &factors);
        }
    }
    true
}

/// Multiplies rows with each panel of `pairs` steps into rows of sums, `stride` floats apart.
fn multiply(
    tile: TileFnI16,
    rows: &[*const i16; MR_F32],
    pairs: usize,
    panels: &[[[i16; 2]; NR]],
    sums: &mut [f32],
    stride: usize,
) {
    let count = panels.len() / pairs;
    assert!(sums.len() >= MR_F32 * stride && stride >= count * NR);
    // SAFETY: the tile came from `available`; rows hold 2·pairs values, the panels count·pairs·NR pairs; there is room for
    // the sums.
    unsafe { tile(rows, pairs, panels.as_ptr().cast(), count, sums.as_mut_ptr(), stride) };
}

/// Rounds a head's `[n][width]` values to multiples of a step, at most `largest` of them; rows are padded with a zero to
/// an even width. Where the file rounds them to a grid, or they are `on` one as they come, its step is taken. Returns the
/// step, or nothing where a value is not finite.
fn integers(
    head: &Head,
    (view, grid): (&HeadView, Option<(f32, Grid)>),
    on: Option<Grid>,
    [n, width]: [usize; 2],
    largest: f32,
    gathered: &mut Vec<f32>,
    out: &mut Vec<i16>,
) -> Option<f32> {
    let (mut x, [mut token, dim]) = head.view(view);
    if grid.is_some() || (dim != 1 && width != 1) {
        gathered.clear();
        gathered.extend((0..n).flat_map(|t| (0..width).map(move |d| x[t * token + d * dim])));
        if let Some((factor, grid)) = grid {
            grid.round_product(head.kernels, gathered, factor);
        }
        (x, token) = (gathered, width);
    }
    let rows = &head.kernels.rows;
    // SAFETY: `kernels` came from `available`.
    let magnitude = unsafe { (rows.magnitude)(x, n, width, token) };
    if !magnitude.is_finite() {
        return None;
    }
    let step = match grid.map(|(_, grid)| grid).or(on) {
        Some(grid) => grid.scale,
        None if magnitude > 1e-30 => magnitude / largest,
        None => 1.,
    };
    let stride = width.next_multiple_of(2);
    for (t, out) in room(out, n * stride).chunks_exact_mut(stride).enumerate() {
        // SAFETY: as above.
        unsafe { (rows.round_i16)(&x[t * token..][..width], 1. / step, &mut out[..width]) };
        if width % 2 == 1 {
            out[width] = 0;
        }
    }
    Some(step)
}

fn pack_keys(rows: &[i16], n: usize, pairs: usize, into: &mut Vec<[[i16; 2]; NR]>) {
    into.resize(n.div_ceil(NR) * pairs, [[0; 2]; NR]);
    for (keys, panel) in rows.chunks(NR * 2 * pairs).zip(into.chunks_exact_mut(pairs)) {
        for (c, key) in keys.chunks_exact(2 * pairs).enumerate() {
            for (step, pair) in panel.iter_mut().zip(key.as_chunks().0) {
                step[c] = *pair;
            }
        }
    }
}

fn pack_values(rows: &[i16], n: usize, width: usize, into: &mut Vec<[[i16; 2]; NR]>) {
    let (stride, steps) = (width.next_multiple_of(2), n.div_ceil(2));
    into.resize(width.div_ceil(NR) * steps, [[0; 2]; NR]);
    for (p, panel) in into.chunks_exact_mut(steps).enumerate() {
        let columns = NR.min(width - p * NR);
        for (step, pair) in panel.iter_mut().zip(rows.chunks(2 * stride)) {
            let (even, odd) = pair.split_at(stride);
            let (even, odd) = (&even[p * NR..][..columns], odd.get(p * NR..).unwrap_or(&[]));
            // Sizes known to the compiler, so that it vectorizes.
            if let (Some(even), Some(odd)) = (even.first_chunk::<NR>(), odd.first_chunk::<NR>()) {
                *step = std::array::from_fn(|c| [even[c], odd[c]]);
                continue;
            }
            for (c, (value, even)) in step.iter_mut().zip(even).enumerate() {
                *value = [*even, odd.get(c).copied().unwrap_or(0)];
            }
        }
    }
}

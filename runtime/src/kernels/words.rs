//! Floats to 16-bit integers, for attention that multiplies those. Generic source, as in [`super::rows`].

use super::NR;
use super::rows::{LANES, PairsI16, RowsOf, exponentials, larger, smaller};

#[inline(always)]
pub fn magnitude(rows: &RowsOf) -> f32 {
    // Without their sign, floats lie in the order of their bits, what is no number above all.
    let (mut lanes, mut last) = ([0; 2 * LANES], 0);
    let bits = |v: &f32| v.abs().to_bits();
    for row in (0..rows.n).filter_map(|i| rows.row(i)) {
        let (pairs, rest) = row.as_chunks::<{ 2 * LANES }>();
        for pair in pairs {
            for (lane, v) in lanes.iter_mut().zip(pair) {
                *lane = bits(v).max(*lane);
            }
        }
        let (some, rest) = rest.as_chunks::<LANES>();
        for (lane, v) in lanes.iter_mut().zip(some.as_flattened()) {
            *lane = bits(v).max(*lane);
        }
        last = rest.iter().map(bits).fold(last, u32::max);
    }
    f32::from_bits(lanes.into_iter().fold(last, u32::max))
}

#[inline(always)]
fn word(v: f32) -> i32 {
    // Not a number becomes 0, what is too large the largest, as in a saturating cast; written so that it vectorizes.
    let v = smaller(larger(-32768., v), 32767.).round_ties_even();
    // SAFETY: v lies within i16.
    unsafe { v.to_int_unchecked::<i32>() }
}

#[inline(always)]
pub fn round_i16(x: &[f32], scale: f32, out: &mut [i16]) {
    for (o, v) in out.iter_mut().zip(x) {
        *o = word(v * scale) as i16;
    }
}

#[inline(always)]
pub fn pack_keys(rows: &RowsOf, scale: f32, panels: &mut [PairsI16]) {
    let pairs = rows.width.div_ceil(2);
    for (p, panel) in panels.chunks_exact_mut(pairs).enumerate() {
        for c in 0..NR {
            let key = rows.row(p * NR + c).unwrap_or(&[]);
            // Rounded some at a time, which vectorizes, then scattered.
            for (i, steps) in panel.chunks_mut(NR).enumerate() {
                let mut words = [0; 2 * NR];
                round_i16(key.get(i * 2 * NR..).unwrap_or(&[]), scale, &mut words);
                steps.iter_mut().zip(words.as_chunks().0).for_each(|(step, pair)| step[c] = *pair);
            }
        }
    }
}

#[inline(always)]
pub fn pack_values(rows: &RowsOf, scale: f32, panels: &mut [PairsI16]) {
    let steps = rows.n.div_ceil(2);
    for (p, panel) in panels.chunks_exact_mut(steps).enumerate() {
        for (i, step) in panel.iter_mut().enumerate() {
            let part = |row: usize| rows.row(row).map_or(&[][..], |v| &v[p * NR..]);
            let (even, odd) = (part(2 * i), part(2 * i + 1));
            // Sizes known to the compiler, so that it vectorizes.
            if let (Some(even), Some(odd)) = (even.first_chunk::<NR>(), odd.first_chunk::<NR>()) {
                let mut words = [0u32; NR];
                for c in 0..NR {
                    words[c] = (word(odd[c] * scale) << 16) as u32 | (word(even[c] * scale) & 0xffff) as u32;
                }
                *step = words.map(|w| [w as i16, (w >> 16) as i16]);
                continue;
            }
            let at = |v: &[f32], c: usize| v.get(c).map_or(0, |v| word(v * scale) as i16);
            *step = std::array::from_fn(|c| [at(even, c), at(odd, c)]);
        }
    }
}

#[inline(always)]
pub fn softmax_i16<const FMA: bool>(
    x: &mut [f32],
    n: usize,
    scale: f32,
    largest: f32,
    out: &mut [i16],
    factors: &mut [f32],
) {
    let width = x.len() / factors.len();
    let rows = x.chunks_exact_mut(width).zip(out.chunks_exact_mut(width));
    for ((x, out), factor) in rows.zip(factors) {
        *factor = exponentials::<FMA>(x, n, scale);
        round_i16(x, largest, out);
        if !factor.is_nan() {
            *factor = 1. / out.iter().map(|w| i32::from(*w)).sum::<i32>() as f32;
        }
    }
}

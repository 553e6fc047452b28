//! Integer tiles without dot products: i8 × i8 into i16, added pairwise into i32.
//!
//! Adding two products in i16 before widening (`smull`, `smlal`, `sadalp`) takes three instructions for what would take
//! four. It is exact while no weight is −128: stored activations reach −128, and 2 · 128 · 127 fits i16, 2 · 128 · 128 does
//! not. Panels with such a weight widen each product.

use super::*;
use crate::kernels::{Body, GROUP, I8Panel};

/// Rows at once: 2 × 16 columns × 2 partial sums fill 16 of the 32 registers.
const ROWS: usize = 2;

/// Sums of two rows with the panel. A group's four products of one column lie side by side: an accumulator holds
/// `[c0 c0 c1 c1]`, and one more pairwise addition at the end gives the dot products.
///
/// # Safety
/// Each row holds the panel's activations.
#[inline(always)]
unsafe fn two_rows<const PAIRED: bool>(rows: [*const u8; ROWS], panel: &I8Panel) -> Sums<ROWS> {
    let Body::Plain(groups) = &panel.body else { unreachable!("packed for another kernel") };
    let weights = groups.as_ptr().cast::<i8>();
    // SAFETY: rows hold GROUP bytes for each group, a group is four vectors of 16 weights.
    unsafe {
        let mut acc = [[vdupq_n_s32(0); 2 * VECTORS]; ROWS];
        let mut one = |g: usize, a: [int8x16_t; ROWS]| {
            for n in 0..VECTORS {
                let b = vld1q_s8(weights.add(g * 64 + n * 16));
                for m in 0..ROWS {
                    let low = vmull_s8(vget_low_s8(a[m]), vget_low_s8(b));
                    acc[m][2 * n] = vpadalq_s16(acc[m][2 * n], low);
                    acc[m][2 * n + 1] = vpadalq_s16(acc[m][2 * n + 1], vmull_high_s8(a[m], b));
                }
            }
        };
        let single =
            |g: usize| rows.map(|r| vreinterpretq_s8_s32(vdupq_n_s32(r.add(g * GROUP).cast::<i32>().read_unaligned())));
        if !PAIRED {
            (0..groups.len()).for_each(|g| one(g, single(g)));
        } else {
            if groups.len() % 2 == 1 {
                one(groups.len() - 1, single(groups.len() - 1));
            }
            for g in (0..groups.len() / 2 * 2).step_by(2) {
                let a = rows.map(|r| vreinterpret_s32_s8(vld1_s8(r.add(g * GROUP).cast())));
                let first = a.map(|a| vreinterpretq_s8_s32(vdupq_lane_s32::<0>(a)));
                let second = a.map(|a| vreinterpretq_s8_s32(vdupq_lane_s32::<1>(a)));
                for n in 0..VECTORS {
                    let b = vld1q_s8(weights.add(g * 64 + n * 16));
                    let c = vld1q_s8(weights.add((g + 1) * 64 + n * 16));
                    for m in 0..ROWS {
                        let low = vmull_s8(vget_low_s8(first[m]), vget_low_s8(b));
                        let low = vmlal_s8(low, vget_low_s8(second[m]), vget_low_s8(c));
                        let high = vmlal_high_s8(vmull_high_s8(first[m], b), second[m], c);
                        acc[m][2 * n] = vpadalq_s16(acc[m][2 * n], low);
                        acc[m][2 * n + 1] = vpadalq_s16(acc[m][2 * n + 1], high);
                    }
                }
            }
        }
        acc.map(|acc| std::array::from_fn(|n| vpaddq_s32(acc[2 * n], acc[2 * n + 1])))
    }
}

/// # Safety
/// As of [`two_rows`].
unsafe fn sums(rows: [*const u8; ROWS], panel: &I8Panel) -> Sums<ROWS> {
    // SAFETY: the caller's contract.
    unsafe { if panel.lowest { two_rows::<false>(rows, panel) } else { two_rows::<true>(rows, panel) } }
}

/// # Safety
/// See [`Kernels::tile_i8`].
pub unsafe fn tile(rows: &[*const u8; MR_I8], panel: &I8Panel, tile: &mut TileI8) {
    let [a, b, c, d] = *rows;
    // SAFETY: the caller's contract.
    let ([a, b], [c, d]) = unsafe { (sums([a, b], panel), sums([c, d], panel)) };
    store(&[a, b, c, d], tile);
}

/// # Safety
/// See [`Kernels::panel_i8`].
pub unsafe fn panel(job: &PanelJob) {
    for m in (0..job.target.rows).step_by(ROWS) {
        let (rows, target) = job.block::<ROWS>(m);
        // SAFETY: the caller's contract.
        unsafe { finish(&sums(rows, job.panel), m, job, &target) };
    }
}

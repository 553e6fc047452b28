//! NEON, with SDOT where the CPU has it.

use super::conv::DepthwiseRow;
use super::generic::{panel_i8_of, row_fns, tile_f32_of};
use super::rows::{self, Activation, ChannelScale, Norm, RowFns, Target};
use super::{Body, GROUP, I8Panel, Kernels, Layout, MR_F32, MR_I8, NR, PanelJob, TileF32, TileI8};
use std::arch::aarch64::*;
use std::arch::asm;

static NEON: Kernels = Kernels {
    name: "neon",
    layout: Layout::Plain,
    flip: 0x80,
    tile_i8: tile_i8_mull,
    panel_i8: panel_i8_mull,
    tile_f32,
    rows: ROWS,
};
static DOTPROD: Kernels = Kernels {
    name: "neon-dotprod",
    layout: Layout::Plain,
    flip: 0x80,
    tile_i8: tile_i8_sdot,
    panel_i8: panel_i8_sdot,
    tile_f32,
    rows: ROWS,
};

/// The kernels this CPU can run, best first.
pub fn kernels() -> Vec<&'static Kernels> {
    let mut all = vec![];
    if std::arch::is_aarch64_feature_detected!("dotprod") {
        all.push(&DOTPROD);
    }
    all.push(&NEON);
    all
}

row_fns!(true);

/// # Safety
/// See [`Kernels::tile_f32`].
unsafe fn tile_f32(rows: &[*const f32; MR_F32], k: usize, b: *const f32, sums: *mut f32, stride: usize) {
    // SAFETY: the caller's contract.
    unsafe { tile_f32_of::<true>(rows, k, b, sums, stride) }
}

/// # Safety
/// See [`Kernels::panel_i8`].
unsafe fn panel_i8_mull(job: &PanelJob) {
    // SAFETY: the caller's contract.
    unsafe { panel_i8_of::<true>(job, tile_i8_mull) }
}

/// # Safety
/// See [`Kernels::panel_i8`].
unsafe fn panel_i8_sdot(job: &PanelJob) {
    // SAFETY: the caller's contract.
    unsafe { panel_i8_of::<true>(job, tile_i8_sdot) }
}

/// acc.4s += four dot products of four bytes: weights `b.16b` with the four activation bytes of lane `LANE` of `a`.
/// Written as assembly because the intrinsic is not stable in Rust yet.
macro_rules! sdot {
    ($acc:expr, $b:expr, $a:expr, $lane:literal) => {
        asm!(
            ".arch_extension dotprod",
            concat!("sdot {acc:v}.4s, {b:v}.16b, {a:v}.4b[", $lane, "]"),
            acc = inout(vreg) $acc, b = in(vreg) $b, a = in(vreg) $a,
            options(pure, nomem, nostack, preserves_flags)
        )
    };
}

/// # Safety
/// See [`Kernels::tile_i8`]; the CPU must have `dotprod`.
unsafe fn tile_i8_sdot(rows: &[*const u8; MR_I8], panel: &I8Panel, sums: &mut TileI8) {
    let Body::Plain(panel_groups) = &panel.body else { unreachable!("packed for another kernel") };
    // SAFETY: rows hold GROUP bytes for each group, a group is four vectors of 16 weights.
    unsafe {
        let mut acc = [[vdupq_n_s32(0); NR / 4]; MR_I8];
        let groups = panel_groups.len();
        let weights = panel_groups.as_ptr().cast::<i8>();
        let mut g = 0;
        while g + 4 <= groups {
            let a = rows.map(|r| vld1q_s8(r.add(g * GROUP).cast()));
            macro_rules! group {
                ($lane:literal) => {
                    for n in 0..NR / 4 {
                        let b = vld1q_s8(weights.add((g + $lane) * 64 + n * 16));
                        for m in 0..MR_I8 {
                            sdot!(acc[m][n], b, a[m], $lane);
                        }
                    }
                };
            }
            group!(0);
            group!(1);
            group!(2);
            group!(3);
            g += 4;
        }
        while g < groups {
            let a = rows.map(|r| vreinterpretq_s8_s32(vdupq_n_s32(r.add(g * GROUP).cast::<i32>().read_unaligned())));
            for n in 0..NR / 4 {
                let b = vld1q_s8(weights.add(g * 64 + n * 16));
                for m in 0..MR_I8 {
                    sdot!(acc[m][n], b, a[m], 0);
                }
            }
            g += 1;
        }
        for m in 0..MR_I8 {
            for n in 0..NR / 4 {
                vst1q_s32(sums[m].as_mut_ptr().add(n * 4), acc[m][n]);
            }
        }
    }
}

/// Without dot products: i8 × i8 into i16 pairs of columns' partial sums, added pairwise into i32. A group's four
/// products of one column lie side by side, so two pairwise additions give its dot product.
///
/// # Safety
/// See [`Kernels::tile_i8`].
unsafe fn tile_i8_mull(rows: &[*const u8; MR_I8], panel: &I8Panel, sums: &mut TileI8) {
    let Body::Plain(groups) = &panel.body else { unreachable!("packed for another kernel") };
    // SAFETY: as above.
    unsafe {
        for (m, row) in rows.iter().enumerate() {
            // Pairs of products of one column in neighbouring lanes: [c0 c0 c1 c1] for each vector of four columns.
            let mut acc = [[vdupq_n_s32(0); 2]; NR / 4];
            for (g, weights) in groups.iter().enumerate() {
                let a = vreinterpretq_s8_s32(vdupq_n_s32(row.add(g * GROUP).cast::<i32>().read_unaligned()));
                for n in 0..NR / 4 {
                    let b = vld1q_s8(weights.0.as_ptr().add(n * 16));
                    let low = vmull_s8(vget_low_s8(a), vget_low_s8(b));
                    let high = vmull_high_s8(a, b);
                    acc[n][0] = vpadalq_s16(acc[n][0], low);
                    acc[n][1] = vpadalq_s16(acc[n][1], high);
                }
            }
            for n in 0..NR / 4 {
                vst1q_s32(sums[m].as_mut_ptr().add(n * 4), vpaddq_s32(acc[n][0], acc[n][1]));
            }
        }
    }
}

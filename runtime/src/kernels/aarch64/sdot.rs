//! Integer tiles by `sdot`: four dot products of four bytes in one instruction (Armv8.2 `dotprod`).

use super::*;
use crate::kernels::{Body, GROUP, I8Panel};
use std::arch::asm;

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

/// Sums of `M` rows with the panel.
///
/// # Safety
/// The CPU must have `dotprod`; each row holds the panel's activations.
#[inline(always)]
unsafe fn sums<const M: usize>(rows: &[*const u8; M], panel: &I8Panel) -> Sums<M> {
    let Body::Plain(groups) = &panel.body else { unreachable!("packed for another kernel") };
    let mut weights = groups.as_ptr().cast::<i8>();
    // SAFETY: rows hold GROUP bytes for each group, a group is four vectors of 16 weights.
    unsafe {
        let mut acc = [[vdupq_n_s32(0); VECTORS]; M];
        macro_rules! group {
            ($a:expr, $lane:literal) => {
                for n in 0..VECTORS {
                    let b = vld1q_s8(weights.add($lane * 64 + n * 16));
                    for m in 0..M {
                        sdot!(acc[m][n], b, $a[m], $lane);
                    }
                }
            };
        }
        let mut rows = *rows;
        for _ in 0..groups.len() / 4 {
            let a = rows.map(|r| vld1q_s8(r.cast()));
            rows = rows.map(|r| opaque(r.add(4 * GROUP)));
            group!(a, 0);
            group!(a, 1);
            group!(a, 2);
            group!(a, 3);
            weights = weights.add(4 * 64);
        }
        for _ in 0..groups.len() % 4 {
            let a = rows.map(|r| vreinterpretq_s8_s32(vdupq_n_s32(r.cast::<i32>().read_unaligned())));
            rows = rows.map(|r| r.add(GROUP));
            group!(a, 0);
            weights = weights.add(64);
        }
        acc
    }
}

/// # Safety
/// See [`Kernels::tile_i8`]; the CPU must have `dotprod`.
pub unsafe fn tile(rows: &[*const u8; MR_I8], panel: &I8Panel, tile: &mut TileI8) {
    // SAFETY: the caller's contract.
    store(&unsafe { sums(rows, panel) }, tile);
}

/// # Safety
/// See [`Kernels::panel_i8`]; the CPU must have `dotprod`.
pub unsafe fn panel(job: &PanelJob) {
    // SAFETY: the caller's contract.
    unsafe { panel_of!(job, sums) }
}

//! Integer tiles by `smmla`: a matrix of 2 rows × 8 bytes times one of 8 bytes × 2 columns in one instruction
//! (Armv8.6 `i8mm`).

use super::*;
use crate::kernels::{Body, I8Panel};
use std::arch::asm;

/// Activations that a step takes from each row.
const STEP: usize = 8;

/// acc.4s += the 2 × 2 products of two rows of eight bytes in `a` with two columns of eight bytes in `b`.
/// Written as assembly because the intrinsic is not stable in Rust yet.
macro_rules! smmla {
    ($acc:expr, $a:expr, $b:expr) => {
        asm!(
            ".arch_extension i8mm",
            "smmla {acc:v}.4s, {a:v}.16b, {b:v}.16b",
            acc = inout(vreg) $acc, a = in(vreg) $a, b = in(vreg) $b,
            options(pure, nomem, nostack, preserves_flags)
        )
    };
}

/// Sums of `M` rows, an even number, with the panel.
///
/// # Safety
/// The CPU must have `i8mm`; each row holds the panel's activations.
#[inline(always)]
unsafe fn sums<const M: usize>(rows: &[*const u8; M], panel: &I8Panel) -> Sums<M> {
    let Body::Octets(octets) = &panel.body else { unreachable!("packed for another kernel") };
    // SAFETY: rows hold STEP bytes for each octet, which is eight vectors of two columns.
    unsafe {
        // Of rows 2i and 2i + 1 and columns 2n and 2n + 1, at [2i + n / 4][n % 4].
        let mut acc = [[vdupq_n_s32(0); VECTORS]; M];
        let mut rows = *rows;
        for octet in octets {
            let row = rows.map(|r| r.cast::<i64>().read_unaligned());
            rows = rows.map(|r| opaque(r.add(STEP)));
            // Two rows a vector; those of the second half of the array are not used.
            let a: [_; M] = std::array::from_fn(|i| {
                let i = i % (M / 2);
                vreinterpretq_s8_s64(vsetq_lane_s64::<1>(row[2 * i + 1], vdupq_n_s64(row[2 * i])))
            });
            for n in 0..2 * VECTORS {
                let b = vld1q_s8(octet.0.as_ptr().add(n * 16));
                for i in 0..M / 2 {
                    smmla!(acc[2 * i + n / VECTORS][n % VECTORS], a[i], b);
                }
            }
        }
        let mut sums = acc;
        for i in 0..M / 2 {
            for n in 0..VECTORS {
                let pair = |n: usize| vreinterpretq_s64_s32(acc[2 * i + n / VECTORS][n % VECTORS]);
                sums[2 * i][n] = vreinterpretq_s32_s64(vzip1q_s64(pair(2 * n), pair(2 * n + 1)));
                sums[2 * i + 1][n] = vreinterpretq_s32_s64(vzip2q_s64(pair(2 * n), pair(2 * n + 1)));
            }
        }
        sums
    }
}

/// # Safety
/// See [`Kernels::tile_i8`]; the CPU must have `i8mm`.
pub unsafe fn tile(rows: &[*const u8; MR_I8], panel: &I8Panel, tile: &mut TileI8) {
    // SAFETY: the caller's contract.
    store(&unsafe { sums(rows, panel) }, tile);
}

/// # Safety
/// See [`Kernels::panel_i8`]; the CPU must have `i8mm`.
pub unsafe fn panel(job: &PanelJob) {
    // SAFETY: the caller's contract.
    unsafe { panel_of!(job, sums) }
}

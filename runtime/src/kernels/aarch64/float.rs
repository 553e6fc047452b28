//! The float tile: multiply-add by lane, so that four inputs of a row cost one load.

use super::*;
use crate::kernels::generic::float_tiles;
use crate::kernels::{FloatJob, MR_F32};

/// # Safety
/// See [`Kernels::panels_f32`].
pub unsafe fn panels(job: &FloatJob) {
    // SAFETY: the caller's contract.
    unsafe { float_tiles::<true>(job, |rows, b, sums, stride| tile(rows, b, sums, stride)) }
}

/// Sums of row × column over a panel `[k][NR]`; each row of sums starts `stride` floats after the one before it.
///
/// # Safety
/// Each row must hold k floats, and [`NR`] floats must be writable at each row of sums.
// Not inlined: its sums take all the registers, and what is around it would lose its own.
#[inline(never)]
unsafe fn tile(rows: &[*const f32; MR_F32], b: &[f32], sums: *mut f32, stride: usize) {
    let (b, k) = (b.as_ptr(), b.len() / NR);
    // SAFETY: each row holds k floats; the sums by contract.
    unsafe {
        let mut acc = [[vdupq_n_f32(0.); VECTORS]; MR_F32];
        let mut i = 0;
        while i + 4 <= k {
            let a = rows.map(|r| vld1q_f32(r.add(i)));
            macro_rules! lane {
                ($lane:literal) => {
                    for n in 0..VECTORS {
                        let b = vld1q_f32(b.add((i + $lane) * NR + n * 4));
                        for m in 0..MR_F32 {
                            acc[m][n] = vfmaq_laneq_f32::<$lane>(acc[m][n], b, a[m]);
                        }
                    }
                };
            }
            lane!(0);
            lane!(1);
            lane!(2);
            lane!(3);
            i += 4;
        }
        while i < k {
            for n in 0..VECTORS {
                let b = vld1q_f32(b.add(i * NR + n * 4));
                for m in 0..MR_F32 {
                    acc[m][n] = vfmaq_n_f32(acc[m][n], b, *rows[m].add(i));
                }
            }
            i += 1;
        }
        for (m, row) in acc.iter().enumerate() {
            for (n, v) in row.iter().enumerate() {
                vst1q_f32(sums.add(m * stride + n * 4), *v);
            }
        }
    }
}

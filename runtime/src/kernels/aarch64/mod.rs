//! NEON: integer tiles by widening multiplication (Cortex-A53, A72), by dot product (A55, A76, A78) and by matrix product
//! (`i8mm`: A510, A710, Neoverse N2), whichever the CPU has. The instructions that intrinsics do not reach on stable Rust
//! are assembly that names its extension: an assembler that cannot make them fails the build.

mod bytes;
mod float;
mod matrix;
mod sdot;
mod widening;

use super::depthwise::DepthwiseRow;
use super::generic::row_fns;
use super::rows::{self, Activation, ChannelScale, Norm, RowFns, Target};
use super::{Kernels, Layout, MR_I8, NR, PanelJob, Quants, RowQuant, TileI8};
use std::arch::aarch64::*;

const PLAIN: Kernels = Kernels {
    name: "neon",
    layout: Layout::Plain,
    flip: 0x80,
    tile_i8: widening::tile,
    panel_i8: widening::panel,
    pairs: false,
    panels_f32: float::panels,
    tile_i16: None,
    rows: RowFns {
        quantize: bytes::quantize,
        codes: bytes::codes,
        lookup: bytes::lookup,
        lookup_sum: bytes::lookup_sum,
        round: bytes::round,
        ..ROWS
    },
};
static NEON: Kernels = PLAIN;
static DOTPROD: Kernels = Kernels { name: "neon-dotprod", tile_i8: sdot::tile, panel_i8: sdot::panel, ..PLAIN };
static I8MM: Kernels =
    Kernels { name: "neon-i8mm", layout: Layout::Octets, tile_i8: matrix::tile, panel_i8: matrix::panel, ..PLAIN };

/// The kernels this CPU can run, best first.
pub fn kernels() -> Vec<&'static Kernels> {
    let mut all = vec![];
    if std::arch::is_aarch64_feature_detected!("i8mm") {
        all.push(&I8MM);
    }
    if std::arch::is_aarch64_feature_detected!("dotprod") {
        all.push(&DOTPROD);
    }
    all.push(&NEON);
    all
}

row_fns!(true);

/// Vectors of four columns in a panel.
const VECTORS: usize = NR / 4;
/// Rows that the dot and matrix products take at once: 6 × 16 sums fill 24 of the 32 registers.
const TALL: usize = 6;
/// Sums of `M` rows.
type Sums<const M: usize> = [[int32x4_t; VECTORS]; M];

/// The same pointer, of which the compiler knows nothing: a load then steps it along, where it would compute each row's address
/// from the first one's.
#[inline(always)]
fn opaque(p: *const u8) -> *const u8 {
    let mut p = p;
    // SAFETY: does nothing.
    unsafe { std::arch::asm!("// {0}", inout(reg) p, options(pure, nomem, nostack, preserves_flags)) };
    p
}

/// Stores the sums of a tile.
fn store(sums: &Sums<MR_I8>, tile: &mut TileI8) {
    for (sums, row) in sums.iter().zip(tile) {
        for (sum, row) in sums.iter().zip(row.as_chunks_mut::<4>().0) {
            // SAFETY: four integers.
            unsafe { vst1q_s32(row.as_mut_ptr(), *sum) };
        }
    }
}

/// Turns the sums of `M` rows from row `m` on into outputs: takes off the zero point's share, scales, adds the bias, applies
/// the activation, adds the residual.
///
/// # Safety
/// See [`Kernels::panel_i8`]; there must be `M` padded rows from `m` on.
#[inline(always)]
unsafe fn finish<const M: usize>(sums: &Sums<M>, m: usize, job: &PanelJob, target: &Target) {
    // Where nothing is left to do but to store.
    let direct = job.activation == Activation::None && target.rows >= M && target.columns == NR;
    let mut out;
    let stored = if direct {
        *target
    } else {
        out = [[0f32; NR]; M];
        Target { out: out.as_mut_ptr().cast(), residual: std::ptr::null(), stride: NR, ..*target }
    };
    // Two vectors at a time, so that what all rows need fits beside the sums.
    // SAFETY: the caller's contract; the array holds M rows.
    unsafe {
        rescale::<M, 0>(sums, m, job, &stored);
        rescale::<M, 2>(sums, m, job, &stored);
    }
    if !direct {
        // SAFETY: it is the array of M rows; the caller's contract.
        unsafe {
            let out = std::slice::from_raw_parts_mut(stored.out.cast::<[f32; NR]>(), M);
            rows::activate_integers::<true>(job.activation, out.as_flattened_mut());
            rows::write(out, target);
        }
    }
}

/// The part of [`finish`] before the activation, for vectors `N` and `N + 1` of each row.
///
/// # Safety
/// As of [`finish`].
#[inline(always)]
unsafe fn rescale<const M: usize, const N: usize>(sums: &Sums<M>, m: usize, job: &PanelJob, t: &Target) {
    // SAFETY: the panel, the bias and rows of the target hold NR columns.
    unsafe {
        let at = [4 * N, 4 * N + 4];
        let sum = at.map(|c| vld1q_s32(job.panel.sum.as_ptr().add(c)));
        let weight = at.map(|c| vld1q_f32(job.panel.scale.as_ptr().add(c)));
        let bias = at.map(|c| vld1q_f32(job.bias.as_ptr().add(c)));
        let store = |i: usize, mut y: [float32x4_t; 2]| {
            let row = i * t.stride;
            if !t.residual.is_null() {
                let residual = at.map(|c| vld1q_f32(t.residual.add(row).add(c)));
                y = [0, 1].map(|v| vaddq_f32(y[v], residual[v]));
            }
            let out = t.out.add(row);
            at.into_iter().zip(y).for_each(|(c, y)| vst1q_f32(out.add(c), y));
        };
        match job.quants {
            Quants::Shared(RowQuant { scale, zero }) => {
                let share = sum.map(|s| vmulq_n_s32(s, zero));
                let factor = weight.map(|w| vmulq_n_f32(w, scale));
                for (i, sums) in sums.iter().enumerate() {
                    let exact = |v: usize| vcvtq_f32_s32(vsubq_s32(sums[N + v], share[v]));
                    store(i, [0, 1].map(|v| vfmaq_f32(bias[v], exact(v), factor[v])));
                }
            }
            Quants::Each(quants) => {
                for (i, sums) in sums.iter().enumerate() {
                    let RowQuant { scale, zero } = quants[m + i];
                    let exact = |v: usize| vcvtq_f32_s32(vmlsq_n_s32(sums[N + v], sum[v], zero));
                    let factor = weight.map(|w| vmulq_n_f32(w, scale));
                    store(i, [0, 1].map(|v| vfmaq_f32(bias[v], exact(v), factor[v])));
                }
            }
        }
    }
}

/// The body of a [`Kernels::panel_i8`]: blocks of six rows, and of four until the rows, padded to fours, are a multiple of
/// six; `$block` computes the sums of its rows.
macro_rules! panel_of {
    ($job:ident, $block:ident) => {{
        let (mut m, padded) = (0, $job.target.rows.next_multiple_of(MR_I8));
        while m < padded {
            if (padded - m) % TALL == 0 {
                let (rows, target) = $job.block::<TALL>(m);
                finish(&$block(&rows, $job.panel), m, $job, &target);
                m += TALL;
            } else {
                let (rows, target) = $job.block::<MR_I8>(m);
                finish(&$block(&rows, $job.panel), m, $job, &target);
                m += MR_I8;
            }
        }
    }};
}
use panel_of;

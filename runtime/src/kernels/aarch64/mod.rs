//! NEON: integer tiles by widening multiplication (Cortex-A53, A72), by dot product (A55, A76, A78) and by matrix product
//! (`i8mm`: A510, A710, Neoverse N2), whichever the CPU has. The instructions that intrinsics do not reach on stable Rust
//! are assembly that names its extension: an assembler that cannot make them fails the build.

mod float;
mod matrix;
mod sdot;
mod widening;

use super::depthwise::DepthwiseRow;
use super::generic::row_fns;
use super::rows::{self, Activation, ChannelScale, Norm, RowFns, Target};
use super::{Kernels, Layout, MR_I8, NR, PanelJob, RowQuant, TileF32, TileI8};
use std::arch::aarch64::*;

const PLAIN: Kernels = Kernels {
    name: "neon",
    layout: Layout::Plain,
    flip: 0x80,
    tile_i8: widening::tile,
    panel_i8: widening::panel,
    pairs: false,
    tile_f32: float::tile,
    tile_i16: None,
    rows: ROWS,
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

/// Stores the sums of a tile.
fn store(sums: &Sums<MR_I8>, tile: &mut TileI8) {
    for (sums, row) in sums.iter().zip(tile) {
        for (sum, row) in sums.iter().zip(row.as_chunks_mut::<4>().0) {
            // SAFETY: four integers.
            unsafe { vst1q_s32(row.as_mut_ptr(), *sum) };
        }
    }
}

/// Turns the sums of rows into outputs: takes off the zero point's share, scales, adds the bias, applies the activation,
/// adds the residual.
///
/// # Safety
/// See [`Kernels::panel_i8`].
#[inline(always)]
unsafe fn finish<const M: usize>(sums: &Sums<M>, quants: &[RowQuant; M], job: &PanelJob, target: &Target) {
    let mut out = [[0f32; NR]; M];
    for n in 0..VECTORS {
        // SAFETY: the panel, the bias and the rows hold NR columns.
        unsafe {
            let sum = vld1q_s32(job.panel.sum.as_ptr().add(4 * n));
            let weight = vld1q_f32(job.panel.scale.as_ptr().add(4 * n));
            let bias = vld1q_f32(job.bias.as_ptr().add(4 * n));
            for m in 0..M {
                let RowQuant { scale, zero } = quants[m];
                let exact = vcvtq_f32_s32(vmlsq_n_s32(sums[m][n], sum, zero));
                vst1q_f32(out[m].as_mut_ptr().add(4 * n), vfmaq_f32(bias, exact, vmulq_n_f32(weight, scale)));
            }
        }
    }
    if job.activation != Activation::None {
        rows::activate_integers::<true>(job.activation, out.as_flattened_mut());
    }
    // SAFETY: the caller's contract.
    unsafe { rows::write(&out, target) };
}

/// The body of a [`Kernels::panel_i8`]: blocks of six rows, and of four until the rows, padded to fours, are a multiple of
/// six; `$block` computes the sums of its rows.
macro_rules! panel_of {
    ($job:ident, $block:ident) => {{
        let (mut m, padded) = (0, $job.target.rows.next_multiple_of(MR_I8));
        while m < padded {
            if (padded - m) % TALL == 0 {
                let (rows, target) = $job.block::<TALL>(m);
                finish(&$block(&rows, $job.panel), &$job.quants(m), $job, &target);
                m += TALL;
            } else {
                let (rows, target) = $job.block::<MR_I8>(m);
                finish(&$block(&rows, $job.panel), &$job.quants(m), $job, &target);
                m += MR_I8;
            }
        }
    }};
}
use panel_of;

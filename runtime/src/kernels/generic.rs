//! Scalar kernels: the reference that every other kernel is tested against, and the fallback.

use super::depthwise::DepthwiseRow;
use super::rows::{self, Activation, ChannelScale, Norm, RowFns};
use super::{Body, FloatJob, GROUP, I8Panel, Kernels, Layout, MR_F32, MR_I8, NR, PanelJob, TileI8};

/// Reads u8 activations.
pub static KERNELS: Kernels = Kernels {
    name: "generic",
    layout: Layout::Plain,
    flip: 0,
    tile_i8,
    panel_i8,
    pairs: false,
    panels_f32,
    tile_i16: None,
    rows: ROWS,
};

/// # Safety
/// See [`Kernels::tile_i8`].
unsafe fn tile_i8(rows: &[*const u8; MR_I8], panel: &I8Panel, sums: &mut TileI8) {
    *sums = [[0; NR]; MR_I8];
    let Body::Plain(groups) = &panel.body else { unreachable!("packed for another kernel") };
    for (g, weights) in groups.iter().enumerate() {
        for (row, sums) in rows.iter().zip(sums.iter_mut()) {
            for i in 0..GROUP {
                // SAFETY: the caller's rows hold `groups * GROUP` bytes.
                let x = i32::from(unsafe { *row.add(g * GROUP + i) });
                for (n, sum) in sums.iter_mut().enumerate() {
                    *sum += x * i32::from(weights.0[n * GROUP + i]);
                }
            }
        }
    }
}

/// # Safety
/// See [`Kernels::panel_i8`].
unsafe fn panel_i8(job: &PanelJob) {
    // SAFETY: the caller's contract.
    unsafe { panel_i8_of::<false>(job, tile_i8) }
}

/// A panel by an integer tile, for any target.
///
/// # Safety
/// See [`Kernels::panel_i8`]; the CPU must have what `tile` needs.
#[inline(always)]
pub unsafe fn panel_i8_of<const FMA: bool>(
    job: &PanelJob,
    tile: unsafe fn(&[*const u8; MR_I8], &I8Panel, &mut TileI8),
) {
    for m in (0..job.target.rows).step_by(MR_I8) {
        let (pointers, target) = job.block::<MR_I8>(m);
        let (mut sums, mut out) = ([[0; NR]; MR_I8], [[0.; NR]; MR_I8]);
        // SAFETY: the caller's contract.
        unsafe { tile(&pointers, job.panel, &mut sums) };
        rows::rescale::<FMA>(&sums, &job.quants(m), job, &mut out);
        rows::activate_integers::<FMA>(job.activation, out.as_flattened_mut());
        // SAFETY: the caller's contract.
        unsafe { rows::write(&out, &target) };
    }
}

/// # Safety
/// See [`Kernels::panels_f32`].
unsafe fn panels_f32(job: &FloatJob) {
    // SAFETY: the caller's contract.
    unsafe { float_tiles::<false>(job, |rows, b, sums, stride| tile_f32(rows, b, sums, stride)) }
}

/// Sums of row × column over a panel `[k][NR]`; each row of sums starts `stride` floats after the one before it.
///
/// # Safety
/// Each row must hold k floats, and [`NR`] floats must be writable at each row of sums.
unsafe fn tile_f32(rows: &[*const f32; MR_F32], b: &[f32], sums: *mut f32, stride: usize) {
    let mut acc = [[0f32; NR]; MR_F32];
    for (i, column) in b.as_chunks::<NR>().0.iter().enumerate() {
        for m in 0..MR_F32 {
            // SAFETY: each row holds k floats.
            let x = unsafe { *rows[m].add(i) };
            for n in 0..NR {
                acc[m][n] += x * column[n];
            }
        }
    }
    for (m, row) in acc.into_iter().enumerate() {
        // SAFETY: the caller's contract.
        unsafe { *sums.add(m * stride).cast::<[f32; NR]>() = row };
    }
}

/// A float job by tiles of [`MR_F32`] rows and one panel, as [`tile_f32`] computes them.
///
/// # Safety
/// See [`Kernels::panels_f32`].
#[inline(always)]
pub unsafe fn float_tiles<const FMA: bool>(
    job: &FloatJob,
    tile: impl Fn(&[*const f32; MR_F32], &[f32], *mut f32, usize),
) {
    let plain = job.bias.is_empty() && job.activation == Activation::None && job.target.residual.is_null();
    for p in 0..job.panels() {
        let (panel, bias) = job.panel(p);
        for m in (0..job.target.rows).step_by(MR_F32) {
            let (first, left) = (job.rows.wrapping_add(m * job.stride), job.target.rows - m);
            if plain && left >= MR_F32 && job.target.columns >= (p + 1) * NR {
                let rows = std::array::from_fn(|i| first.wrapping_add(i * job.stride));
                let out = job.target.out.wrapping_add(m * job.target.stride + p * NR);
                tile(&rows, panel, out, job.target.stride);
                continue;
            }
            // Past the end, the last row again.
            let rows = std::array::from_fn(|i| first.wrapping_add(i.min(left - 1) * job.stride));
            let target = job.target.from(m, p * NR, MR_F32, NR);
            let mut y = [[0.; NR]; MR_F32];
            tile(&rows, panel, y.as_flattened_mut().as_mut_ptr(), NR);
            // SAFETY: the caller's contract.
            unsafe { rows::finish_f32::<FMA>(&mut y, bias, job.activation, &target) };
        }
    }
}

/// Wrappers of the generic row routines, compiled for a set of target features.
macro_rules! row_fns {
    ($fma:literal $(, $feature:literal)?) => {
        pub(super) const ROWS: RowFns = RowFns {
            range, quantize, codes, lookup, lookup_sum, magnitude, round_i16, pack_keys,
            pack_values, layer_norm, activate, round, add, times, exponentials,
            softmax_i16, depthwise_i8, depthwise_f32,
        };
        $(#[target_feature(enable = $feature)])?
        fn range(x: &[f32]) -> (f32, f32) {
            rows::range(x)
        }
        $(#[target_feature(enable = $feature)])?
        fn quantize(x: &[f32], inverse: f32, zero: f32, flip: u8, out: &mut [u8]) {
            rows::quantize(x, inverse, zero, flip, out);
        }
        $(#[target_feature(enable = $feature)])?
        fn codes(sums: &$crate::kernels::rows::Products, factor: f32, zero: f32, out: &mut [u8]) {
            rows::codes(sums, factor, zero, out);
        }
        $(#[target_feature(enable = $feature)])?
        fn lookup(table: &[u8; 256], x: &mut [u8]) {
            rows::lookup(table, x);
        }
        $(#[target_feature(enable = $feature)])?
        fn lookup_sum(table: &[u8; 256], x: &[u8]) -> u32 {
            rows::lookup_sum(table, x)
        }
        $(#[target_feature(enable = $feature)])?
        fn magnitude(rows: &$crate::kernels::rows::RowsOf) -> f32 {
            $crate::kernels::words::magnitude(rows)
        }
        $(#[target_feature(enable = $feature)])?
        fn pack_keys(
            keys: &$crate::kernels::rows::RowsOf,
            scale: f32,
            panels: &mut [$crate::kernels::rows::PairsI16],
        ) {
            $crate::kernels::words::pack_keys(keys, scale, panels);
        }
        $(#[target_feature(enable = $feature)])?
        fn pack_values(
            values: &$crate::kernels::rows::RowsOf,
            scale: f32,
            panels: &mut [$crate::kernels::rows::PairsI16],
        ) {
            $crate::kernels::words::pack_values(values, scale, panels);
        }
        $(#[target_feature(enable = $feature)])?
        fn round_i16(x: &[f32], scale: f32, out: &mut [i16]) {
            $crate::kernels::words::round_i16(x, scale, out);
        }
        $(#[target_feature(enable = $feature)])?
        fn layer_norm(rows: &[&[f32]], norm: &Norm, out: &mut [f32], ranges: &mut [(f32, f32)]) {
            rows::layer_norm::<$fma>(rows, norm, out, ranges);
        }
        $(#[target_feature(enable = $feature)])?
        fn activate(activation: Activation, x: &mut [f32]) {
            rows::activate::<$fma>(activation, x);
        }
        $(#[target_feature(enable = $feature)])?
        fn round(x: &mut [f32], factor: f32, grid: $crate::kernels::requantize::Grid) {
            rows::round(x, factor, grid);
        }
        $(#[target_feature(enable = $feature)])?
        fn add(x: &mut [f32], y: &[f32]) {
            rows::add(x, y);
        }
        $(#[target_feature(enable = $feature)])?
        fn times(x: &[f32], y: &[f32], out: &mut [f32]) {
            rows::times(x, y, out);
        }
        $(#[target_feature(enable = $feature)])?
        fn exponentials(x: &mut [f32], n: usize, scale: f32) -> f32 {
            rows::exponentials::<$fma>(x, n, scale)
        }
        $(#[target_feature(enable = $feature)])?
        fn softmax_i16(x: &mut [f32], n: usize, scale: f32, largest: f32, out: &mut [i16], factors: &mut [f32]) {
            $crate::kernels::words::softmax_i16::<$fma>(x, n, scale, largest, out, factors);
        }
        $(#[target_feature(enable = $feature)])?
        fn depthwise_i8(row: &DepthwiseRow<u8, i8>, finish: &ChannelScale, out: &mut [f32]) {
            rows::depthwise_i8::<$fma>(row, finish, out);
        }
        $(#[target_feature(enable = $feature)])?
        fn depthwise_f32(row: &DepthwiseRow<f32, f32>, bias: &[f32], out: &mut [f32]) {
            rows::depthwise_f32::<$fma>(row, bias, out);
        }
    };
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub(super) use row_fns;

row_fns!(false);

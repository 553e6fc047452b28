//! AVX2 with FMA.

use super::super::depthwise::DepthwiseRow;
use super::super::generic::{float_tiles, row_fns};
use super::super::pack::{Group, WidePair};
use super::super::rows::{self, Activation, ChannelScale, Norm, RowFns, RowQuant};
use super::super::{Body, FloatJob, I8Panel, Kernels, Layout, MR_F32, MR_I8, NR, PanelJob, TileI8};
use std::arch::x86_64::*;

pub static KERNELS: Kernels = Kernels {
    name: "avx2",
    layout: Layout::Paired,
    flip: 0,
    tile_i8,
    panel_i8,
    pairs: false,
    panels_f32,
    tile_i16: Some(tile_i16),
    rows: ROWS,
};

row_fns!(true, "avx2,fma");

/// # Safety
/// See [`Kernels::tile_i8`].
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_i8(rows: &[*const u8; MR_I8], panel: &I8Panel, sums: &mut TileI8) {
    // SAFETY: the caller's contract.
    let acc = unsafe { multiply(rows, panel) };
    for m in 0..MR_I8 {
        let out = sums[m].as_mut_ptr().cast::<__m256i>();
        // SAFETY: a row of sums holds NR = 16 integers.
        unsafe {
            _mm256_storeu_si256(out, acc[m][0]);
            _mm256_storeu_si256(out.add(1), acc[m][1]);
        }
    }
}

/// # Safety
/// See [`Kernels::panel_i8`].
#[target_feature(enable = "avx2,fma")]
unsafe fn panel_i8(job: &PanelJob) {
    for m in (0..job.target.rows).step_by(MR_I8) {
        let (pointers, target) = job.block::<MR_I8>(m);
        // SAFETY: the caller's contract.
        unsafe {
            let acc = multiply(&pointers, job.panel);
            let mut out = rescale(&acc, &job.quants(m), job);
            if job.activation != Activation::None {
                rows::activate_integers::<true>(job.activation, out.as_flattened_mut());
            }
            rows::write(&out, &target);
        }
    }
}

/// As [`rows::rescale`], from registers.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn rescale(acc: &Acc, quants: &[RowQuant; MR_I8], job: &PanelJob) -> [[f32; NR]; MR_I8] {
    let mut out = [[0.; NR]; MR_I8];
    for half in 0..2 {
        // SAFETY: scale, sum, bias and a row of the output hold NR = 16 values.
        unsafe {
            let weight = _mm256_loadu_ps(job.panel.scale.as_ptr().add(half * 8));
            let sum = _mm256_loadu_si256(job.panel.sum.as_ptr().add(half * 8).cast());
            let bias = _mm256_loadu_ps(job.bias.as_ptr().add(half * 8));
            for ((acc, quant), out) in acc.iter().zip(quants).zip(&mut out) {
                let correction = _mm256_mullo_epi32(_mm256_set1_epi32(quant.zero), sum);
                let exact = _mm256_cvtepi32_ps(_mm256_sub_epi32(acc[half], correction));
                let scale = _mm256_mul_ps(_mm256_set1_ps(quant.scale), weight);
                _mm256_storeu_ps(out.as_mut_ptr().add(half * 8), _mm256_fmadd_ps(exact, scale, bias));
            }
        }
    }
    out
}

/// The sums of a tile.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn multiply(rows: &[*const u8; MR_I8], panel: &I8Panel) -> Acc {
    // SAFETY: the caller's contract.
    unsafe {
        match &panel.body {
            Body::Paired { groups, offsets, singles } => paired(rows, groups, offsets, *singles),
            Body::Wide(pairs) => wide(&rows.map(<*const u8>::cast), pairs),
            Body::Plain(_) | Body::Octets(_) => unreachable!("packed for another kernel"),
        }
    }
}

type Acc = [[__m256i; 2]; MR_I8];

/// Two groups of four inputs a step: four products meet in an i16 lane (the packing guarantees that they fit), then
/// are widened to i32 once. Groups without a partner follow.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn paired(rows: &[*const u8; MR_I8], groups: &[Group], offsets: &[u32], singles: usize) -> Acc {
    let ones = _mm256_set1_epi16(1);
    let mut acc = [[_mm256_setzero_si256(); 2]; MR_I8];
    let [r0, r1, r2, r3] = *rows;
    let (mut w, mut o) = (groups.as_ptr().cast::<__m256i>(), offsets.as_ptr());
    for _ in 0..singles / 2 {
        // SAFETY: a step has two groups of two vectors each and two offsets; offsets lie inside the rows.
        unsafe {
            let (o0, o1) = (*o as usize, *o.add(1) as usize);
            let b00 = _mm256_load_si256(w);
            let b01 = _mm256_load_si256(w.add(1));
            let b10 = _mm256_load_si256(w.add(2));
            let b11 = _mm256_load_si256(w.add(3));
            for (m, row) in [r0, r1, r2, r3].into_iter().enumerate() {
                let a0 = _mm256_set1_epi32(row.add(o0).cast::<i32>().read_unaligned());
                let a1 = _mm256_set1_epi32(row.add(o1).cast::<i32>().read_unaligned());
                let left = _mm256_add_epi16(_mm256_maddubs_epi16(a0, b00), _mm256_maddubs_epi16(a1, b10));
                let right = _mm256_add_epi16(_mm256_maddubs_epi16(a0, b01), _mm256_maddubs_epi16(a1, b11));
                acc[m][0] = _mm256_add_epi32(acc[m][0], _mm256_madd_epi16(left, ones));
                acc[m][1] = _mm256_add_epi32(acc[m][1], _mm256_madd_epi16(right, ones));
            }
            w = w.add(4);
            o = o.add(2);
        }
    }
    for _ in singles..groups.len() {
        // SAFETY: one group of two vectors and one offset each.
        unsafe {
            let o0 = *o as usize;
            let (b0, b1) = (_mm256_load_si256(w), _mm256_load_si256(w.add(1)));
            for (m, row) in [r0, r1, r2, r3].into_iter().enumerate() {
                let a = _mm256_set1_epi32(row.add(o0).cast::<i32>().read_unaligned());
                let (left, right) = (_mm256_maddubs_epi16(a, b0), _mm256_maddubs_epi16(a, b1));
                acc[m][0] = _mm256_add_epi32(acc[m][0], _mm256_madd_epi16(left, ones));
                acc[m][1] = _mm256_add_epi32(acc[m][1], _mm256_madd_epi16(right, ones));
            }
            w = w.add(2);
            o = o.add(1);
        }
    }
    acc
}

/// 16-bit activations and weights: exact for any i8 weight.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn wide(rows: &[*const i16; MR_I8], pairs: &[WidePair]) -> Acc {
    let mut acc = [[_mm256_setzero_si256(); 2]; MR_I8];
    let [r0, r1, r2, r3] = *rows;
    let mut w = pairs.as_ptr().cast::<__m256i>();
    for i in 0..pairs.len() {
        // SAFETY: a pair is two vectors; rows hold two activations for each pair.
        unsafe {
            let (b0, b1) = (_mm256_load_si256(w), _mm256_load_si256(w.add(1)));
            for (m, row) in [r0, r1, r2, r3].into_iter().enumerate() {
                let a = _mm256_set1_epi32(row.add(2 * i).cast::<i32>().read_unaligned());
                acc[m][0] = _mm256_add_epi32(acc[m][0], _mm256_madd_epi16(a, b0));
                acc[m][1] = _mm256_add_epi32(acc[m][1], _mm256_madd_epi16(a, b1));
            }
            w = w.add(2);
        }
    }
    acc
}

/// # Safety
/// See [`Kernels::panels_f32`].
#[target_feature(enable = "avx2,fma")]
unsafe fn panels_f32(job: &FloatJob) {
    // SAFETY: the caller's contract.
    unsafe { float_tiles::<true>(job, |rows, b, sums, stride| tile_f32(rows, b, sums, stride)) }
}

/// Sums of row × column over a panel `[k][NR]`; each row of sums starts `stride` floats after the one before it.
///
/// # Safety
/// Each row must hold k floats, and [`NR`] floats must be writable at each row of sums.
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_f32(rows: &[*const f32; MR_F32], b: &[f32], sums: *mut f32, stride: usize) {
    let (b, k) = (b.as_ptr(), b.len() / NR);
    let mut acc = [[_mm256_setzero_ps(); 2]; MR_F32];
    for i in 0..k {
        // SAFETY: `b` holds k·NR floats and each row k, by contract.
        unsafe {
            let b0 = _mm256_loadu_ps(b.add(i * NR));
            let b1 = _mm256_loadu_ps(b.add(i * NR + 8));
            for m in 0..MR_F32 {
                let a = _mm256_broadcast_ss(&*rows[m].add(i));
                acc[m][0] = _mm256_fmadd_ps(a, b0, acc[m][0]);
                acc[m][1] = _mm256_fmadd_ps(a, b1, acc[m][1]);
            }
        }
    }
    for (m, acc) in acc.iter().enumerate() {
        // SAFETY: a row of sums holds NR = 16 floats, by contract.
        unsafe {
            _mm256_storeu_ps(sums.add(m * stride), acc[0]);
            _mm256_storeu_ps(sums.add(m * stride + 8), acc[1]);
        }
    }
}

/// # Safety
/// See [`Kernels::tile_i16`].
#[target_feature(enable = "avx2,fma")]
unsafe fn tile_i16(
    rows: &[*const i16; MR_F32],
    pairs: usize,
    b: *const i16,
    panels: usize,
    sums: *mut f32,
    stride: usize,
) {
    for p in 0..panels {
        // SAFETY: the caller's contract.
        unsafe { panel_i16(rows, pairs, b.add(p * pairs * NR * 2), sums.add(p * NR), stride) };
    }
}

/// # Safety
/// As of [`tile_i16`] with one panel.
#[inline]
#[target_feature(enable = "avx2,fma")]
unsafe fn panel_i16(rows: &[*const i16; MR_F32], pairs: usize, b: *const i16, sums: *mut f32, stride: usize) {
    let mut acc = [[_mm256_setzero_si256(); 2]; MR_F32];
    for i in 0..pairs {
        // SAFETY: `b` holds pairs·NR pairs and each row `pairs`, by contract.
        unsafe {
            let b0 = _mm256_loadu_si256(b.add(i * NR * 2).cast());
            let b1 = _mm256_loadu_si256(b.add(i * NR * 2 + NR).cast());
            for m in 0..MR_F32 {
                let x = _mm256_set1_epi32(rows[m].add(i * 2).cast::<i32>().read_unaligned());
                acc[m][0] = _mm256_add_epi32(acc[m][0], _mm256_madd_epi16(x, b0));
                acc[m][1] = _mm256_add_epi32(acc[m][1], _mm256_madd_epi16(x, b1));
            }
        }
    }
    for (m, acc) in acc.iter().enumerate() {
        // SAFETY: a row of sums holds NR = 16 floats, by contract.
        unsafe {
            _mm256_storeu_ps(sums.add(m * stride), _mm256_cvtepi32_ps(acc[0]));
            _mm256_storeu_ps(sums.add(m * stride + 8), _mm256_cvtepi32_ps(acc[1]));
        }
    }
}

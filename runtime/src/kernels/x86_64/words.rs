//! Attention in 16-bit integers, with AVX-512.

use super::super::rows::{PairsI16, RowsOf};
use super::super::{MR_F32, NR, words};
use super::functions::coarse_power;
use std::arch::x86_64::*;

/// As [`words::pack_keys`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub fn pack_keys(rows: &RowsOf, scale: f32, panels: &mut [PairsI16]) {
    let pairs = rows.width.div_ceil(2);
    let scale = _mm512_set1_ps(scale);
    for (p, panel) in panels.chunks_exact_mut(pairs).enumerate() {
        // Sixteen pairs of elements at a time.
        for (i, steps) in panel.chunks_mut(NR).enumerate() {
            let first = i * 2 * NR;
            let wanted = (1u64 << (rows.width - first).min(2 * NR)).wrapping_sub(1);
            let keys = std::array::from_fn(|c| {
                let Some(key) = rows.row(p * NR + c) else { return _mm512_setzero_si512() };
                let words = |from: usize| {
                    let wanted = (wanted >> from) as __mmask16;
                    // SAFETY: the mask keeps to the key's elements.
                    let x = unsafe { _mm512_maskz_loadu_ps(wanted, key.as_ptr().wrapping_add(first + from)) };
                    _mm512_cvtps_epi32(_mm512_mul_ps(x, scale))
                };
                in_words(words(0), words(NR))
            });
            for (step, row) in steps.iter_mut().zip(transposed(keys)) {
                // SAFETY: a step is one vector.
                unsafe { _mm512_storeu_si512(step.as_mut_ptr().cast(), row) };
            }
        }
    }
}

/// The elements of one vector after those of another, saturated to 16 bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn in_words(a: __m512i, b: __m512i) -> __m512i {
    _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), _mm512_packs_epi32(a, b))
}

/// Columns of a square of 32-bit elements as rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn transposed(rows: [__m512i; 16]) -> [__m512i; 16] {
    // Squares of 2 × 2, then of 4 × 4 within each 128 bits, then those among each other.
    let twos: [__m512i; 16] = std::array::from_fn(|i| {
        let (a, b) = (rows[i & !1], rows[i | 1]);
        if i % 2 == 0 { _mm512_unpacklo_epi32(a, b) } else { _mm512_unpackhi_epi32(a, b) }
    });
    let fours: [__m512i; 16] = std::array::from_fn(|i| {
        let (a, b) = (twos[i & !3 | (i & 2) >> 1], twos[i & !3 | (i & 2) >> 1 | 2]);
        if i % 2 == 0 { _mm512_unpacklo_epi64(a, b) } else { _mm512_unpackhi_epi64(a, b) }
    });
    // `fours[4 · r + c]` holds columns c, 4 + c, 8 + c, 12 + c of rows 4 · r and on.
    let halves: [__m512i; 16] = std::array::from_fn(|i| {
        let (c, half, odd) = (i % 4, i / 8, i / 4 % 2);
        let (a, b) = (fours[8 * half + c], fours[8 * half + 4 + c]);
        if odd == 0 { _mm512_shuffle_i32x4::<0x88>(a, b) } else { _mm512_shuffle_i32x4::<0xdd>(a, b) }
    });
    // `halves[8 · half + 4 · odd + c]` holds columns c and 8 + c (odd: 4 + c and 12 + c) of rows 8 · half and on.
    std::array::from_fn(|column| {
        let from = column / 4 % 2 * 4 + column % 4;
        let (a, b) = (halves[from], halves[8 + from]);
        if column < 8 { _mm512_shuffle_i32x4::<0x88>(a, b) } else { _mm512_shuffle_i32x4::<0xdd>(a, b) }
    })
}

/// As [`words::softmax_i16`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
pub unsafe fn softmax_i16(x: &mut [f32], n: usize, scale: f32, largest: f32, out: &mut [i16], factors: &mut [f32]) {
    if scale <= 0. || factors.len() > MR_F32 {
        return words::softmax_i16::<true>(x, n, scale, largest, out, factors);
    }
    let width = x.len() / factors.len();
    // In units of log 2. The largest of all rows first: finding one is a chain of instructions that wait for each other.
    let scale = scale * std::f32::consts::LOG2_E;
    let mut tops = [0.; MR_F32];
    for (x, top) in x.chunks_exact_mut(width).zip(&mut tops) {
        x[n..].fill(f32::NEG_INFINITY);
        let mut most = _mm512_set1_ps(f32::NEG_INFINITY);
        for c in x.as_chunks::<NR>().0 {
            // SAFETY: a chunk holds 16 values.
            most = _mm512_max_ps(unsafe { _mm512_loadu_ps(c.as_ptr()) }, most);
        }
        *top = _mm512_reduce_max_ps(most) * scale;
    }
    let scale = _mm512_set1_ps(scale);
    let largest = largest.log2();
    let rows = x.chunks_exact(width).zip(out.chunks_exact_mut(width));
    for (((x, out), top), factor) in rows.zip(tops).zip(factors) {
        let offset = _mm512_set1_ps(largest - top);
        let weights = |x: *const f32| {
            // SAFETY: there are 16 values. What is far above −100 rounds to 0.
            let y = unsafe { _mm512_fmadd_ps(_mm512_loadu_ps(x), scale, offset) };
            _mm512_cvtps_epi32(coarse_power(_mm512_max_ps(_mm512_set1_ps(-100.), y)))
        };
        let (mut sum, mut signs) = (_mm512_setzero_si512(), _mm512_setzero_si512());
        let (x, out) = (x.as_chunks::<{ 2 * NR }>(), out.as_chunks_mut::<{ 2 * NR }>());
        for (x, out) in x.0.iter().zip(out.0) {
            let (a, b) = (weights(x.as_ptr()), weights(x[NR..].as_ptr()));
            sum = _mm512_add_epi32(sum, _mm512_add_epi32(a, b));
            signs = _mm512_or_si512(signs, _mm512_or_si512(a, b));
            // SAFETY: two chunks of 16 values.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), in_words(a, b)) };
        }
        for (x, out) in x.1.as_chunks::<NR>().0.iter().zip(out.1.as_chunks_mut::<NR>().0) {
            let a = weights(x.as_ptr());
            sum = _mm512_add_epi32(sum, a);
            signs = _mm512_or_si512(signs, a);
            // SAFETY: a chunk of 16 values.
            unsafe { _mm256_storeu_si256(out.as_mut_ptr().cast(), _mm512_cvtepi32_epi16(a)) };
        }
        // What is no number becomes the smallest integer.
        let numbers = _mm512_movepi32_mask(signs) == 0;
        *factor = if numbers { 1. / _mm512_reduce_add_epi32(sum) as f32 } else { f32::NAN };
    }
}

/// # Safety
/// See [`super::super::Kernels::tile_i16`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
pub unsafe fn tile_i16(
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
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
unsafe fn panel_i16(rows: &[*const i16; MR_F32], pairs: usize, b: *const i16, sums: *mut f32, stride: usize) {
    let mut acc = [_mm512_setzero_si512(); MR_F32];
    for i in 0..pairs {
        // SAFETY: `b` holds pairs·NR pairs and each row `pairs`, by contract.
        unsafe {
            let column = _mm512_loadu_si512(b.add(i * NR * 2).cast());
            for m in 0..MR_F32 {
                let x = _mm512_set1_epi32(rows[m].add(i * 2).cast::<i32>().read_unaligned());
                acc[m] = _mm512_dpwssd_epi32(acc[m], x, column);
            }
        }
    }
    for (m, acc) in acc.into_iter().enumerate() {
        // SAFETY: a row of sums holds NR = 16 floats, by contract.
        unsafe { _mm512_storeu_ps(sums.add(m * stride), _mm512_cvtepi32_ps(acc)) };
    }
}

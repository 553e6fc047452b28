//! Keys as panels of 16-bit pairs, with AVX-512.

use super::super::NR;
use super::super::rows::{PairsI16, RowsOf};
use std::arch::x86_64::*;

/// As [`super::super::rows::pack_keys`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
pub fn pack_keys(rows: &RowsOf, scale: f32, panels: &mut [PairsI16]) {
    let pairs = rows.width.div_ceil(2);
    let scale = _mm512_set1_ps(scale);
    let order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
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
                _mm512_permutexvar_epi64(order, _mm512_packs_epi32(words(0), words(NR)))
            });
            for (step, row) in steps.iter_mut().zip(transposed(keys)) {
                // SAFETY: a step is one vector.
                unsafe { _mm512_storeu_si512(step.as_mut_ptr().cast(), row) };
            }
        }
    }
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

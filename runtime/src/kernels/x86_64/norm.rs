//! LayerNorm by AVX-512, four rows at once: none waits for the sums of another, and they share the loads of gamma and beta.

use super::super::NR;
use super::super::rows::Norm;
use std::arch::x86_64::*;

/// Rows at once.
const ROWS: usize = 4;

/// As [`rows::layer_norm`](super::super::rows::layer_norm).
///
/// # Panics
/// When the lengths do not match.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
pub fn layer_norm(rows: &[&[f32]], norm: &Norm, out: &mut [f32], ranges: &mut [(f32, f32)]) {
    let k = norm.gamma.len();
    assert!(norm.beta.len() == k && rows.iter().all(|x| x.len() == k) && out.len() == rows.len() * k);
    for (i, rows) in rows.chunks(ROWS).enumerate() {
        // Where fewer are left, the last one again.
        let row = |j: usize| j.min(rows.len() - 1);
        let x = std::array::from_fn(|j| rows[row(j)].as_ptr());
        let y = std::array::from_fn(|j| out[(i * ROWS + row(j)) * k..].as_mut_ptr());
        // SAFETY: each holds k values.
        let found = unsafe { normalize(x, norm, y) };
        ranges.iter_mut().skip(i * ROWS).zip(found).for_each(|(range, found)| *range = found);
    }
}

/// Normalizes rows `x` into `y`; returns the smallest and the largest result of each, 0 included.
///
/// # Safety
/// Each pointer must be valid for as many values as the norm has.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
unsafe fn normalize(x: [*const f32; ROWS], norm: &Norm, y: [*mut f32; ROWS]) -> [(f32, f32); ROWS] {
    let k = norm.gamma.len();
    let share = _mm_set1_ps(1. / k as f32);
    // SAFETY: the masks keep to the k values that are there.
    unsafe {
        let load = |p: *const f32, at: usize, wanted| _mm512_maskz_loadu_ps(wanted, p.add(at));
        let mut sums = [_mm512_setzero_ps(); ROWS];
        vectors(k, |at, wanted| {
            for i in 0..ROWS {
                sums[i] = _mm512_add_ps(sums[i], load(x[i], at, wanted));
            }
        });
        let means = spread(_mm_mul_ps(joined(sums, |a, b| _mm512_add_ps(a, b)), share));
        let mut squares = [_mm512_setzero_ps(); ROWS];
        vectors(k, |at, wanted| {
            for i in 0..ROWS {
                let d = _mm512_maskz_sub_ps(wanted, load(x[i], at, wanted), means[i]);
                squares[i] = _mm512_fmadd_ps(d, d, squares[i]);
            }
        });
        let variance = _mm_mul_ps(joined(squares, |a, b| _mm512_add_ps(a, b)), share);
        let deviation = _mm_sqrt_ps(_mm_add_ps(variance, _mm_set1_ps(norm.epsilon)));
        let factors = spread(_mm_div_ps(_mm_set1_ps(1.), deviation));
        let (mut low, mut high) = ([_mm512_setzero_ps(); ROWS], [_mm512_setzero_ps(); ROWS]);
        vectors(k, |at, wanted| {
            let gamma = load(norm.gamma.as_ptr(), at, wanted);
            let beta = load(norm.beta.as_ptr(), at, wanted);
            for i in 0..ROWS {
                let d = _mm512_sub_ps(load(x[i], at, wanted), means[i]);
                let v = _mm512_maskz_fmadd_ps(wanted, _mm512_mul_ps(d, factors[i]), gamma, beta);
                // Where one is no number, the second is taken.
                (low[i], high[i]) = (_mm512_min_ps(v, low[i]), _mm512_max_ps(v, high[i]));
                _mm512_mask_storeu_ps(y[i].add(at), wanted, v);
            }
        });
        let (mut lowest, mut highest) = ([0.; ROWS], [0.; ROWS]);
        _mm_storeu_ps(lowest.as_mut_ptr(), joined(low, |a, b| _mm512_min_ps(a, b)));
        _mm_storeu_ps(highest.as_mut_ptr(), joined(high, |a, b| _mm512_max_ps(a, b)));
        std::array::from_fn(|i| (lowest[i], highest[i]))
    }
}

/// Calls `f` with the start of each vector of `k` values, and which of its lanes are there.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
fn vectors(k: usize, mut f: impl FnMut(usize, __mmask16)) {
    let whole = k / NR * NR;
    for at in (0..whole).step_by(NR) {
        f(at, !0);
    }
    if whole < k {
        f(whole, (1 << (k - whole)) - 1);
    }
}

/// Each value in all lanes.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
fn spread(v: __m128) -> [__m512; ROWS] {
    [0, 1, 2, 3].map(|i| _mm512_permutexvar_ps(_mm512_set1_epi32(i), _mm512_castps128_ps512(v)))
}

/// The lanes of each vector joined to one value.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
fn joined([a, b, c, d]: [__m512; ROWS], f: impl Fn(__m512, __m512) -> __m512) -> __m128 {
    let pair = |a, b| _mm512_castps_pd(f(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    let (ab, cd) = (pair(a, b), pair(c, d));
    // Each quarter of the register then has a value of each vector.
    let v = f(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
    let v = f(v, _mm512_shuffle_f32x4::<0b01_00_11_10>(v, v));
    _mm512_castps512_ps128(f(v, _mm512_shuffle_f32x4::<0b10_11_00_01>(v, v)))
}

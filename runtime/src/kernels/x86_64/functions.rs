//! Functions of vectors of floats: exact ones for float layers, and coarse ones for what leaves integer layers, where few
//! instructions that need the units that multiply count for more.

use super::super::{NR, math};
use std::arch::x86_64::*;

/// Adding 1.5·2^23 rounds to an integer in the low mantissa bits.
const ROUND: f32 = 12_582_912.0;

/// |x|·Φ(−|x|) by the distance from the next multiple of 1/15.5 of [`GELU_END`] to |x|, fitted at Chebyshev's nodes around each; the
/// highest power first. To 4e-7.
const GELU: [[f32; NR]; 5] = [
    [
        0.065_156_795,
        0.048_032_08,
        0.008_000_437,
        -0.025_946_284,
        -0.036_345_03,
        -0.026_574_742,
        -0.010_875_51,
        -5.860_282e-7,
        0.003_853_080_8,
        0.003_501_663_5,
        0.002_025_911_4,
        0.000_890_592_05,
        0.000_315_295,
        9.238_719e-5,
        2.275_388_8e-5,
        6.980_081_7e-6,
    ],
    [
        0.000_280_680_48,
        0.086_323_62,
        0.127_759_38,
        0.112_632_58,
        0.064_686_276,
        0.017_654_637,
        -0.009_289_438,
        -0.016_295_461,
        -0.012_814_311,
        -0.007_219_699_7,
        -0.003_216_049_6,
        -0.001_177_599_8,
        -0.000_361_531_13,
        -9.415_122e-5,
        -2.095_585_1e-5,
        -3.431_162_2e-6,
    ],
    [
        -0.398_962_65,
        -0.349_341,
        -0.227_061_26,
        -0.091_489_45,
        0.006_209_31,
        0.049_289_96,
        0.051_369_995,
        0.035_816_025,
        0.019_449_068,
        0.008_652_163,
        0.003_227_866_5,
        0.001_022_983_3,
        0.000_277_602_17,
        6.484_208e-5,
        1.308_474_75e-5,
        2.315_89e-6,
    ],
    [
        0.500_000_5,
        0.223_919_94,
        0.012_942_767,
        -0.101_103_76,
        -0.128_710_03,
        -0.105_548_956,
        -0.067_426_02,
        -0.035_491_217,
        -0.015_769_565,
        -0.005_989_173_4,
        -0.001_958_567_6,
        -0.000_554_044_5,
        -0.000_135_998_72,
        -2.903_071_6e-5,
        -5.397_65e-6,
        -8.759_834_6e-7,
    ],
    [
        -1.842_931_9e-9,
        0.129_681_97,
        0.169_783_89,
        0.150_886_77,
        0.107_240_066,
        0.063_991_584,
        0.032_709_412,
        0.014_463_219,
        0.005_561_654_5,
        0.001_865_648_2,
        0.000_546_971_5,
        0.000_140_325_21,
        3.152_77e-5,
        6.206_882_5e-6,
        1.071_141_8e-6,
        1.620_802_4e-7,
    ],
];

/// What counts as infinite there: |x|·Φ(−|x|) is below 7e-8.
const GELU_END: f32 = 5.6;

/// Of each row of a table the element that the four lowest bits of each lane name: those of what [`ROUND`] rounded.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
fn pick<const N: usize>(table: &[[f32; NR]; N], place: __m512) -> [__m512; N] {
    table.each_ref().map(|row| {
        // SAFETY: a row is one vector.
        _mm512_permutexvar_ps(_mm512_castps_si512(place), unsafe { _mm512_loadu_ps(row.as_ptr()) })
    })
}

/// GELU with erf, absolute error below 1e-6.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
pub fn gelu(x: __m512) -> __m512 {
    let a = _mm512_min_ps(_mm512_set1_ps(GELU_END), _mm512_abs_ps(x));
    let place = _mm512_fmadd_ps(a, _mm512_set1_ps(15.5 / GELU_END), _mm512_set1_ps(ROUND));
    let multiple = _mm512_sub_ps(place, _mm512_set1_ps(ROUND));
    let r = _mm512_fmadd_ps(multiple, _mm512_set1_ps(-GELU_END / 15.5), a);
    let [first, rest @ ..] = pick(&GELU, place);
    let less = rest.into_iter().fold(first, |less, c| _mm512_fmadd_ps(less, r, c));
    _mm512_sub_ps(_mm512_max_ps(_mm512_setzero_ps(), x), less)
}

/// 2^y, relative error below 2e-7; 0 for −∞.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
pub fn power(y: __m512) -> __m512 {
    let y = _mm512_max_ps(_mm512_set1_ps(-200.), y);
    let n = _mm512_roundscale_ps::<0>(y);
    let r = _mm512_sub_ps(y, n);
    let [first, rest @ ..] = POWER;
    let mut p = _mm512_set1_ps(first);
    for c in rest {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    _mm512_scalef_ps(p, n)
}

/// x·σ(x), relative error below 2e-6.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
pub fn silu(x: __m512) -> __m512 {
    let one = _mm512_set1_ps(1.);
    let e = power(_mm512_mul_ps(x, _mm512_set1_ps(-std::f32::consts::LOG2_E)));
    _mm512_div_ps(x, _mm512_add_ps(one, e))
}

/// 2^r for |r| ≤ 1/2, relative error below 1e-7; the highest power first.
const POWER: [f32; 6] = [1.327_647e-3, 9.675_542e-3, 5.550_713e-2, 2.402_212e-1, 6.931_469e-1, 1.000_000_1];

/// |x|·Φ(−|x|) as a parabola of |x| in each sixteenth of 0…[`math::GELU_END`], fitted at Chebyshev's nodes; the highest power
/// first. What GELU with erf is less than max(x, 0), to 8e-5.
const COARSE_GELU: [[f32; NR]; 3] = [
    [
        -0.396_936_8,
        -0.370_346_7,
        -0.295_697_9,
        -0.195_749_9,
        -0.096_232_29,
        -0.017_408_51,
        0.031_419_14,
        0.051_783_65,
        0.051_909_39,
        0.041_606_14,
        0.028_648_39,
        0.017_461_38,
        9.567_996e-3,
        4.756_502e-3,
        2.157_849e-3,
        8.969_292e-4,
    ],
    [
        0.499_870_8,
        0.490_615,
        0.429_282_6,
        0.295_038_4,
        0.108_969_4,
        -0.079_970_26,
        -0.222_653,
        -0.292_624_5,
        -0.292_578_3,
        -0.245_466_1,
        -0.179_555_6,
        -0.116_763_5,
        -0.068_278_7,
        -0.036_170_31,
        -0.017_447_66,
        -7.692_385e-3,
    ],
    [
        9.979_495e-7,
        8.009_013e-4,
        0.013_503_02,
        0.058_727_97,
        0.145_848_9,
        0.259_184_6,
        0.363_487,
        0.423_612_4,
        0.423_013_2,
        0.369_143_3,
        0.285_309_6,
        0.197_181_1,
        0.122_715_7,
        0.069_142_02,
        0.035_415_49,
        0.016_545_58,
    ],
];

/// GELU with erf, absolute error below 1e-4, as of [`math::gelu_coarse`]: by a table of one vector, since the polynomial is
/// computed by the units that multiply integers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
pub fn coarse_gelu(x: __m512) -> __m512 {
    let a = _mm512_min_ps(_mm512_set1_ps(math::GELU_END), _mm512_abs_ps(x));
    let place = _mm512_fmadd_ps(a, _mm512_set1_ps(15.5 / math::GELU_END), _mm512_set1_ps(ROUND));
    let [square, linear, constant] = pick(&COARSE_GELU, place);
    let less = _mm512_fmadd_ps(_mm512_fmadd_ps(square, a, linear), a, constant);
    _mm512_sub_ps(_mm512_max_ps(_mm512_setzero_ps(), x), less)
}

/// 2^y for −126 < y < 128, relative error below 8e-5. Few of its instructions need the units that multiply: rounding by an
/// addition, 2^n by adding to the exponent's bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
pub fn coarse_power(y: __m512) -> __m512 {
    let shifted = _mm512_add_ps(y, _mm512_set1_ps(ROUND));
    let r = _mm512_sub_ps(y, _mm512_sub_ps(shifted, _mm512_set1_ps(ROUND)));
    let p = _mm512_fmadd_ps(r, _mm512_set1_ps(COARSE_POWER[0]), _mm512_set1_ps(COARSE_POWER[1]));
    let p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(COARSE_POWER[2]));
    let p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(COARSE_POWER[3]));
    let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted));
    _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), exponent))
}

/// 2^r for |r| ≤ 1/2, relative error below 8e-5; the highest power first.
const COARSE_POWER: [f32; 4] = [5.517_165e-2, 2.426_111_5e-1, 6.932_609_7e-1, 9.999_280_6e-1];

/// x·σ(x), relative error below 2e-4: 2^r by a polynomial of degree 3, the reciprocal by the CPU's approximation.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
pub fn coarse_silu(x: __m512) -> __m512 {
    let y = _mm512_mul_ps(x, _mm512_set1_ps(-std::f32::consts::LOG2_E));
    let y = _mm512_min_ps(_mm512_set1_ps(100.), _mm512_max_ps(_mm512_set1_ps(-100.), y));
    let e = coarse_power(y);
    _mm512_mul_ps(x, _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1.), e)))
}

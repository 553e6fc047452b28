//! AVX-512 with VNNI: `vpdpbusd` adds four u8 × i8 products to an i32 lane, exactly.

use super::super::depthwise::DepthwiseRow;
use super::super::generic::row_fns;
use super::super::math;
use super::super::pack::Group;
use super::super::rows::{self, Activation, ChannelScale, Norm, Quants, RowFns, Target};
use super::super::{Body, GROUP, I8Panel, Kernels, Layout, MR_F32, MR_I8, NR, PanelJob, TileF32, TileI8};
use super::{norm, words};
use std::arch::x86_64::*;

pub static KERNELS: Kernels = Kernels {
    name: "avx512-vnni",
    layout: Layout::Plain,
    flip: 0,
    tile_i8,
    panel_i8,
    pairs: true,
    tile_f32,
    tile_i16: Some(words::tile_i16),
    rows: FUNCTIONS,
};

/// Whether this CPU has what the functions here are compiled for.
pub fn is_available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni")
}

row_fns!(true, "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma");

/// The generic row functions, with what the compiler makes a poor job of written out.
const FUNCTIONS: RowFns = RowFns {
    quantize: quantize_row,
    layer_norm: norm::layer_norm,
    finish_f32: finish_floats,
    exponentials: scaled_exponentials,
    softmax_i16: words::softmax_i16,
    activate: activate_row,
    depthwise_i8: depthwise_row,
    pack_keys: words::pack_keys,
    ..ROWS
};

/// Rows multiplied at once: enough sums in flight to hide the latency of `vpdpbusd`, few enough to stay in registers.
const BLOCK: usize = 12;

/// # Safety
/// See [`Kernels::tile_i8`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
unsafe fn tile_i8(rows: &[*const u8; MR_I8], panel: &I8Panel, sums: &mut TileI8) {
    // SAFETY: the caller's contract; a row of sums holds NR = 16 integers.
    unsafe {
        let stride = rows[1].offset_from_unsigned(rows[0]);
        let acc: [_; MR_I8] = multiply(rows[0], stride, [groups(panel)], [_mm512_setzero_si512()]);
        for (sums, [acc]) in sums.iter_mut().zip(acc) {
            _mm512_storeu_si512(sums.as_mut_ptr().cast(), acc);
        }
    }
}

fn groups(panel: &I8Panel) -> &[Group] {
    let Body::Plain(groups) = &panel.body else { unreachable!("packed for another kernel") };
    groups
}

/// # Safety
/// See [`Kernels::panel_i8`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
unsafe fn panel_i8(job: &PanelJob) {
    // A loop for each function, so that it is inlined there.
    // SAFETY: the caller's contract; NR = 16 values are a vector.
    unsafe {
        match job.activation {
            Activation::None => any(job, |x| x),
            Activation::Gelu => any(job, |x| gelu(x)),
            Activation::Silu => any(job, |x| silu(x)),
            Activation::Relu => any(job, |x| _mm512_max_ps(x, _mm512_setzero_ps())),
            other => any(job, |x| {
                let mut y = [0.; NR];
                _mm512_storeu_ps(y.as_mut_ptr(), x);
                rows::activate_integers::<true>(other, &mut y);
                _mm512_loadu_ps(y.as_ptr())
            }),
        }
    }
}

/// Multiplies all rows with the job's one or two panels and applies `activate` to what comes out.
///
/// # Safety
/// See [`Kernels::panel_i8`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
unsafe fn any(job: &PanelJob, activate: impl Fn(__m512) -> __m512 + Copy) {
    // SAFETY: the caller's contract.
    unsafe {
        match job.second {
            None => finished(job, [(job.panel, job.bias)], activate),
            Some(second) => finished(job, [(job.panel, job.bias), second], activate),
        }
    }
}

/// As [`any`], for `P` panels.
///
/// # Safety
/// See [`Kernels::panel_i8`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
unsafe fn finished<const P: usize>(
    job: &PanelJob,
    panels: [(&I8Panel, &[f32; NR]); P],
    activate: impl Fn(__m512) -> __m512 + Copy,
) {
    let weights = panels.map(|(panel, _)| groups(panel));
    // SAFETY: the caller's contract; scale, sum and bias hold NR = 16 values.
    unsafe {
        let scale = panels.map(|(panel, _)| _mm512_loadu_ps(panel.scale.as_ptr()));
        let sum = panels.map(|(panel, _)| _mm512_loadu_si512(panel.sum.as_ptr().cast()));
        let bias = panels.map(|(_, bias)| _mm512_loadu_ps(bias.as_ptr()));
        match job.quants {
            Quants::Shared(quant) => {
                let start = sum.map(|sum| _mm512_mullo_epi32(_mm512_set1_epi32(-quant.zero), sum));
                let scale = scale.map(|scale| _mm512_mul_ps(_mm512_set1_ps(quant.scale), scale));
                let finish = |_, p: usize, acc| activate(_mm512_fmadd_ps(_mm512_cvtepi32_ps(acc), scale[p], bias[p]));
                blocks(job, weights, start, finish);
            }
            Quants::Each(quants) => {
                assert!(quants.len() >= job.target.rows);
                let finish = |row: usize, p: usize, acc| {
                    let quant = *quants.get_unchecked(row);
                    let correction = _mm512_mullo_epi32(_mm512_set1_epi32(quant.zero), sum[p]);
                    let exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(acc, correction));
                    activate(_mm512_fmadd_ps(exact, _mm512_mul_ps(_mm512_set1_ps(quant.scale), scale[p]), bias[p]))
                };
                blocks(job, weights, [_mm512_setzero_si512(); P], finish);
            }
        }
    }
}

/// Multiplies all rows, sums beginning at `start`; `finish` turns the sums of a wanted row and a panel into outputs.
///
/// # Safety
/// See [`Kernels::panel_i8`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
unsafe fn blocks<const P: usize>(
    job: &PanelJob,
    weights: [&[Group]; P],
    start: [__m512i; P],
    finish: impl Fn(usize, usize, __m512i) -> __m512 + Copy,
) {
    let rows = job.target.rows;
    let mut m = 0;
    // SAFETY: the caller's contract; no block reaches past the rows.
    unsafe {
        while m + BLOCK <= rows {
            fetch(job.next, m, rows);
            block::<BLOCK, P>(job, m, weights, start, finish);
            m += BLOCK;
        }
        if m + 8 <= rows {
            block::<8, P>(job, m, weights, start, finish);
            m += 8;
        }
        if m + 4 <= rows {
            block::<4, P>(job, m, weights, start, finish);
            m += 4;
        }
        match rows - m {
            3 => block::<3, P>(job, m, weights, start, finish),
            2 => block::<2, P>(job, m, weights, start, finish),
            1 => block::<1, P>(job, m, weights, start, finish),
            _ => {}
        }
    }
}

/// Brings the part of the next panels that falls to the rows from `m` on of `rows` into the second-level cache.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
fn fetch(next: &[I8Panel], m: usize, rows: usize) {
    for panel in next {
        let all = groups(panel);
        for group in &all[all.len() * m / rows..(all.len() * (m + BLOCK) / rows).min(all.len())] {
            _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(group).cast());
        }
    }
}

/// `M` rows from row `m` on.
///
/// # Safety
/// See [`Kernels::panel_i8`]; there must be so many rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
unsafe fn block<const M: usize, const P: usize>(
    job: &PanelJob,
    m: usize,
    weights: [&[Group]; P],
    start: [__m512i; P],
    finish: impl Fn(usize, usize, __m512i) -> __m512 + Copy,
) {
    let (pointers, target) = job.block::<M>(m);
    let wanted = (1u32 << target.columns).wrapping_sub(1) as __mmask16;
    // SAFETY: the caller's contract; the mask keeps to the target's columns.
    unsafe {
        let acc: [[_; P]; M] = multiply(pointers[0], job.stride, weights, start);
        // Row by row in the source, so that the sums stay in their registers: a loop would index them in memory.
        macro_rules! rows {
            ($($i:literal)*) => { $(if $i < M {
                for p in 0..P {
                    let mut y = finish(m + $i, p, acc[$i % M][p]);
                    let at = $i * target.stride + p * NR;
                    if !target.residual.is_null() {
                        y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(wanted, target.residual.add(at)));
                    }
                    if target.columns == NR {
                        _mm512_storeu_ps(target.out.add(at), y);
                    } else {
                        _mm512_mask_storeu_ps(target.out.add(at), wanted, y);
                    }
                }
            })* };
        }
        rows!(0 1 2 3 4 5 6 7 8 9 10 11);
    }
}

/// |x|·Φ(−|x|) as a parabola of |x| in each sixteenth of 0…[`math::GELU_END`], fitted at Chebyshev's nodes; the highest power
/// first. What GELU with erf is less than max(x, 0), to 8e-5.
const GELU: [[f32; NR]; 3] = [
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

/// Adding 1.5·2^23 rounds to an integer in the low mantissa bits.
const ROUND: f32 = 12_582_912.0;

/// GELU with erf, absolute error below 1e-4, as of [`math::gelu_coarse`]: by a table of one vector, since the polynomial is
/// computed by the units that multiply integers.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
fn gelu(x: __m512) -> __m512 {
    // The permutation takes the four lowest bits of what is rounded.
    let a = _mm512_min_ps(_mm512_set1_ps(math::GELU_END), _mm512_abs_ps(x));
    let place = _mm512_fmadd_ps(a, _mm512_set1_ps(15.5 / math::GELU_END), _mm512_set1_ps(ROUND));
    let [square, linear, constant] = GELU.map(|row| {
        // SAFETY: a row is one vector.
        _mm512_permutexvar_ps(_mm512_castps_si512(place), unsafe { _mm512_loadu_ps(row.as_ptr()) })
    });
    let less = _mm512_fmadd_ps(_mm512_fmadd_ps(square, a, linear), a, constant);
    _mm512_sub_ps(_mm512_max_ps(_mm512_setzero_ps(), x), less)
}

/// As [`rows::finish_f32`].
///
/// # Safety
/// The target's pointers must be valid for its rows and columns.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
unsafe fn finish_floats(sums: &mut TileF32, bias: &[f32; NR], activation: Activation, target: &Target) {
    if target.columns < NR || !matches!(activation, Activation::None | Activation::Relu | Activation::Silu) {
        // SAFETY: the caller's contract.
        return unsafe { rows::finish_f32::<true>(sums, bias, activation, target) };
    }
    // SAFETY: the caller's contract; a row of sums, the bias and a full row of the target hold NR = 16 values.
    unsafe {
        let bias = _mm512_loadu_ps(bias.as_ptr());
        for (i, sums) in sums.iter().enumerate().take(target.rows) {
            let x = _mm512_add_ps(_mm512_loadu_ps(sums.as_ptr()), bias);
            let mut y = match activation {
                Activation::Silu => exact_silu(x),
                Activation::Relu => _mm512_max_ps(x, _mm512_setzero_ps()),
                _ => x,
            };
            let at = i * target.stride;
            if !target.residual.is_null() {
                y = _mm512_add_ps(y, _mm512_loadu_ps(target.residual.add(at)));
            }
            _mm512_storeu_ps(target.out.add(at), y);
        }
    }
}

/// As [`rows::quantize`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
fn quantize_row(x: &[f32], inverse: f32, zero: f32, flip: u8, out: &mut [u8]) {
    let (inverse, zero) = (_mm512_set1_ps(inverse), _mm512_set1_epi32(zero as i32));
    let flip = _mm512_set1_epi8(flip.cast_signed());
    // Far above what a byte holds; what is no number stays so, becomes the smallest integer, then 0.
    let most = _mm512_set1_ps(1024.);
    let steps = |x: __m512| {
        let q = _mm512_min_ps(most, _mm512_mul_ps(x, inverse));
        _mm512_add_epi32(_mm512_cvtps_epi32(q), zero)
    };
    let order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    let n = x.len().min(out.len());
    let (x, out) = (x[..n].as_chunks::<{ 4 * NR }>(), out[..n].as_chunks_mut::<{ 4 * NR }>());
    for (x, out) in x.0.iter().zip(out.0) {
        // SAFETY: four vectors of floats, one of bytes.
        unsafe {
            let [a, b, c, d] = std::array::from_fn(|i| steps(_mm512_loadu_ps(x.as_ptr().add(i * NR))));
            let bytes = _mm512_packus_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
            let bytes = _mm512_permutexvar_epi32(order, bytes);
            _mm512_storeu_si512(out.as_mut_ptr().cast(), _mm512_xor_si512(bytes, flip));
        }
    }
    for (x, out) in x.1.chunks(NR).zip(out.1.chunks_mut(NR)) {
        let wanted = (1u32 << x.len()).wrapping_sub(1) as __mmask16;
        // SAFETY: the mask keeps to what is there.
        unsafe {
            let q = steps(_mm512_maskz_loadu_ps(wanted, x.as_ptr()));
            let bytes = _mm512_cvtusepi32_epi8(_mm512_max_epi32(q, _mm512_setzero_si512()));
            let bytes = _mm_xor_si128(bytes, _mm512_castsi512_si128(flip));
            _mm_mask_storeu_epi8(out.as_mut_ptr().cast(), wanted, bytes);
        }
    }
}

/// As [`rows::depthwise_i8`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
fn depthwise_row(row: &DepthwiseRow<u8, i8>, finish: &ChannelScale, out: &mut [f32]) {
    let c = row.geometry.input[2];
    if c < NR {
        return rows::depthwise_i8::<true>(row, finish, out);
    }
    row.check(out.len() / c);
    assert!(finish.offset.len() == c && finish.factor.len() == c && finish.bias.len() == c);
    // SAFETY: checked.
    unsafe {
        match finish.activation {
            Activation::None => depthwise_channels(row, finish, out, |x| x),
            Activation::Silu => depthwise_channels(row, finish, out, |x| silu(x)),
            Activation::Relu => depthwise_channels(row, finish, out, |x| _mm512_max_ps(x, _mm512_setzero_ps())),
            other => {
                depthwise_channels(row, finish, out, |x| x);
                rows::activate_integers::<true>(other, out);
            }
        }
    }
}

/// Every output of a row, 64 channels at a time, then 16, the last of them overlapping those before.
///
/// # Safety
/// As of [`depthwise_vectors`], for every output.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
unsafe fn depthwise_channels(
    row: &DepthwiseRow<u8, i8>,
    finish: &ChannelScale,
    out: &mut [f32],
    activate: impl Fn(__m512) -> __m512 + Copy,
) {
    let c = row.geometry.input[2];
    for (x, out) in out.chunks_exact_mut(c).enumerate() {
        let mut channel = 0;
        // SAFETY: the caller's contract; there are at least NR channels.
        unsafe {
            while channel + 4 * NR <= c {
                depthwise_vectors::<4>(row, finish, x, channel, out, activate);
                channel += 4 * NR;
            }
            while channel < c {
                depthwise_vectors::<1>(row, finish, x, channel.min(c - NR), out, activate);
                channel += NR;
            }
        }
    }
}

/// `16 · V` channels of output `x` from `channel` on.
///
/// # Safety
/// [`DepthwiseRow::check`] must have passed for more outputs than `x`, and there must be so many channels.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
unsafe fn depthwise_vectors<const V: usize>(
    row: &DepthwiseRow<u8, i8>,
    finish: &ChannelScale,
    x: usize,
    channel: usize,
    out: &mut [f32],
    activate: impl Fn(__m512) -> __m512,
) {
    let c = row.geometry.input[2];
    let first = x * row.geometry.stride[1] * c + channel;
    let mut acc = [_mm512_setzero_si512(); V];
    // SAFETY: the caller's contract.
    unsafe {
        for (tap, offset) in row.offsets.iter().enumerate() {
            let values = row.canvas.as_ptr().add(first + offset);
            let weights = row.taps.as_ptr().add(tap * c + channel);
            for (v, acc) in acc.iter_mut().enumerate() {
                // Both fit the lower half of a lane, the upper half of the activation is 0.
                let value = _mm512_cvtepu8_epi32(_mm_loadu_si128(values.add(v * NR).cast()));
                let weight = _mm512_cvtepi8_epi32(_mm_loadu_si128(weights.add(v * NR).cast()));
                *acc = _mm512_dpwssd_epi32(*acc, value, weight);
            }
        }
        for (v, acc) in acc.into_iter().enumerate() {
            let at = channel + v * NR;
            let exact = _mm512_add_epi32(acc, _mm512_loadu_si512(finish.offset.as_ptr().add(at).cast()));
            let factor = _mm512_loadu_ps(finish.factor.as_ptr().add(at));
            let bias = _mm512_loadu_ps(finish.bias.as_ptr().add(at));
            let y = activate(_mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), factor, bias));
            _mm512_storeu_ps(out.as_mut_ptr().add(at), y);
        }
    }
}

/// As [`rows::activate`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
unsafe fn activate_row(activation: Activation, x: &mut [f32]) {
    if activation != Activation::Silu {
        return rows::activate::<true>(activation, x);
    }
    let (chunks, rest) = x.as_chunks_mut::<NR>();
    for c in chunks {
        // SAFETY: a chunk holds 16 values.
        unsafe { _mm512_storeu_ps(c.as_mut_ptr(), exact_silu(_mm512_loadu_ps(c.as_ptr()))) };
    }
    rows::activate::<true>(activation, rest);
}

/// As [`rows::exponentials`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
unsafe fn scaled_exponentials(x: &mut [f32], n: usize, scale: f32) -> f32 {
    if scale <= 0. {
        return rows::exponentials::<true>(x, n, scale);
    }
    x[n..].fill(f32::NEG_INFINITY);
    // SAFETY: a chunk holds 16 values.
    unsafe {
        let mut largest = _mm512_set1_ps(f32::NEG_INFINITY);
        for c in x.as_chunks::<NR>().0 {
            largest = _mm512_max_ps(_mm512_loadu_ps(c.as_ptr()), largest);
        }
        // In units of log 2; see the generic function about rows that are all −∞.
        let scale = scale * std::f32::consts::LOG2_E;
        let offset = _mm512_set1_ps(-_mm512_reduce_max_ps(largest) * scale);
        let scale = _mm512_set1_ps(scale);
        let mut sum = _mm512_setzero_ps();
        for c in x.as_chunks_mut::<NR>().0 {
            let e = power(_mm512_fmadd_ps(_mm512_loadu_ps(c.as_ptr()), scale, offset));
            sum = _mm512_add_ps(sum, e);
            _mm512_storeu_ps(c.as_mut_ptr(), e);
        }
        1. / _mm512_reduce_add_ps(sum)
    }
}

/// 2^y for −126 < y < 128, relative error below 8e-5. Few of its instructions need the units that multiply: rounding by an
/// addition, 2^n by adding to the exponent's bits.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
pub fn coarse_power(y: __m512) -> __m512 {
    let shifted = _mm512_add_ps(y, _mm512_set1_ps(ROUND));
    let r = _mm512_sub_ps(y, _mm512_sub_ps(shifted, _mm512_set1_ps(ROUND)));
    let p = _mm512_fmadd_ps(r, _mm512_set1_ps(POWER[0]), _mm512_set1_ps(POWER[1]));
    let p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(POWER[2]));
    let p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(POWER[3]));
    let exponent = _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted));
    _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), exponent))
}

/// 2^y, relative error below 2e-7; 0 for −∞.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
fn power(y: __m512) -> __m512 {
    let y = _mm512_max_ps(_mm512_set1_ps(-200.), y);
    let n = _mm512_roundscale_ps::<0>(y);
    let r = _mm512_sub_ps(y, n);
    let [first, rest @ ..] = FINE_POWER;
    let mut p = _mm512_set1_ps(first);
    for c in rest {
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    }
    _mm512_scalef_ps(p, n)
}

/// x·σ(x), relative error below 2e-6.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
fn exact_silu(x: __m512) -> __m512 {
    let one = _mm512_set1_ps(1.);
    let e = power(_mm512_mul_ps(x, _mm512_set1_ps(-std::f32::consts::LOG2_E)));
    _mm512_div_ps(x, _mm512_add_ps(one, e))
}

/// 2^r for |r| ≤ 1/2, relative error below 1e-7; the highest power first.
const FINE_POWER: [f32; 6] = [1.327_647e-3, 9.675_542e-3, 5.550_713e-2, 2.402_212e-1, 6.931_469e-1, 1.000_000_1];

/// 2^r for |r| ≤ 1/2, relative error below 8e-5; the highest power first.
const POWER: [f32; 4] = [5.517_165e-2, 2.426_111_5e-1, 6.932_609_7e-1, 9.999_280_6e-1];

/// x·σ(x), relative error below 2e-4: 2^r by a polynomial of degree 3, the reciprocal by the CPU's approximation.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
fn silu(x: __m512) -> __m512 {
    let y = _mm512_mul_ps(x, _mm512_set1_ps(-std::f32::consts::LOG2_E));
    let y = _mm512_min_ps(_mm512_set1_ps(100.), _mm512_max_ps(_mm512_set1_ps(-100.), y));
    let e = coarse_power(y);
    _mm512_mul_ps(x, _mm512_rcp14_ps(_mm512_add_ps(_mm512_set1_ps(1.), e)))
}

/// `start` and the sums of `M` rows, `stride` bytes apart, with `P` panels. Two panels at once load each activation once
/// for both: with one, the load port is busier than the multipliers.
///
/// # Safety
/// Each row must hold [`GROUP`] bytes for each group, of which each panel has as many.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
unsafe fn multiply<const M: usize, const P: usize>(
    rows: *const u8,
    stride: usize,
    panels: [&[Group]; P],
    start: [__m512i; P],
) -> [[__m512i; P]; M] {
    let mut acc = [start; M];
    for g in 0..panels[0].len() {
        // SAFETY: the caller's contract; a group is one vector.
        unsafe {
            let weights = panels.map(|groups| _mm512_load_si512(groups.as_ptr().add(g).cast()));
            for (m, acc) in acc.iter_mut().enumerate() {
                let x = _mm512_set1_epi32(rows.add(m * stride + g * GROUP).cast::<i32>().read_unaligned());
                for p in 0..P {
                    acc[p] = _mm512_dpbusd_epi32(acc[p], x, weights[p]);
                }
            }
        }
    }
    acc
}

/// # Safety
/// See [`Kernels::tile_f32`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
unsafe fn tile_f32(rows: &[*const f32; MR_F32], k: usize, b: *const f32, sums: *mut f32, stride: usize) {
    let mut acc = [_mm512_setzero_ps(); MR_F32];
    for i in 0..k {
        // SAFETY: `b` holds k·NR floats and each row k, by contract.
        unsafe {
            let column = _mm512_loadu_ps(b.add(i * NR));
            for m in 0..MR_F32 {
                acc[m] = _mm512_fmadd_ps(_mm512_set1_ps(*rows[m].add(i)), column, acc[m]);
            }
        }
    }
    for (m, acc) in acc.into_iter().enumerate() {
        // SAFETY: a row of sums holds NR = 16 floats, by contract.
        unsafe { _mm512_storeu_ps(sums.add(m * stride), acc) };
    }
}

//! AVX-512 with VNNI: `vpdpbusd` adds four u8 × i8 products to an i32 lane, exactly.

use super::super::depthwise::DepthwiseRow;
use super::super::generic::row_fns;
use super::super::pack::Group;
use super::super::rows::{self, Activation, ChannelScale, Norm, Quants, RowFns, Target};
use super::super::{Body, GROUP, I8Panel, Kernels, Layout, MR_I8, NR, PanelJob, TileI8};
use super::functions::{coarse_gelu, coarse_silu};
use super::{float, norm, words};
use std::arch::x86_64::*;

pub static KERNELS: Kernels = Kernels {
    name: "avx512-vnni",
    layout: Layout::Plain,
    flip: 0,
    tile_i8,
    panel_i8,
    pairs: true,
    panels_f32: float::panels,
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
    lookup: lookup_bytes,
    layer_norm: norm::layer_norm,
    exponentials: float::exponentials,
    softmax_i16: words::softmax_i16,
    activate: float::activate,
    depthwise_i8: depthwise_row,
    pack_keys: words::pack_keys,
    ..ROWS
};

/// Rows multiplied at once: enough sums in flight to hide the latency of `vpdpbusd`, few enough to stay in registers.
pub const BLOCK: usize = 12;

/// Does something for `M` rows from row `m` on, [`BLOCK`] of them while there are so many, then fewer.
macro_rules! in_blocks {
    (@some $height:expr, |$M:ident, $m:ident| $body:block) => {{
        const $M: usize = $height;
        $body
        $m += $M;
    }};
    ($rows:expr, |$M:ident, $m:ident| $body:block) => {{
        let rows = $rows;
        let mut $m = 0;
        // One or two rows alone would take as long as four: they go with those before them.
        while $m + BLOCK + 2 < rows || $m + BLOCK == rows {
            in_blocks!(@some BLOCK, |$M, $m| $body);
        }
        match rows - $m {
            13 => in_blocks!(@some 13, |$M, $m| $body),
            14 => in_blocks!(@some 14, |$M, $m| $body),
            _ => {}
        }
        if $m + 8 <= rows {
            in_blocks!(@some 8, |$M, $m| $body);
        }
        if $m + 4 <= rows {
            in_blocks!(@some 4, |$M, $m| $body);
        }
        match rows - $m {
            3 => in_blocks!(@some 3, |$M, $m| $body),
            2 => in_blocks!(@some 2, |$M, $m| $body),
            1 => in_blocks!(@some 1, |$M, $m| $body),
            _ => {}
        }
        _ = $m;
    }};
}
pub(super) use in_blocks;

/// # Safety
/// See [`Kernels::tile_i8`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
unsafe fn tile_i8(rows: &[*const u8; MR_I8], panel: &I8Panel, sums: &mut TileI8) {
    // SAFETY: the caller's contract; a row of sums holds NR = 16 integers.
    unsafe {
        let stride = rows[1].offset_from_unsigned(rows[0]);
        let acc: [_; MR_I8] = multiply(rows[0], stride, [groups(panel)], [_mm512_setzero_si512()], (rows[0], 0));
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
            Activation::Gelu => any(job, |x| coarse_gelu(x)),
            Activation::Silu => any(job, |x| coarse_silu(x)),
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
    // SAFETY: the caller's contract; no block reaches past the rows.
    unsafe {
        in_blocks!(job.target.rows, |M, m| {
            let (pointers, target) = job.block::<M>(m);
            let ahead = share(job, m);
            let acc: [[_; P]; M] = multiply(pointers[0], job.stride, weights, start, ahead);
            store(&target, acc, |i, p, acc| finish(m + i, p, acc));
        });
    }
}

/// Where the part of the next panels begins that falls to the rows from `m` on, and bytes from one group's part to the next.
fn share(job: &PanelJob, m: usize) -> (*const u8, usize) {
    // Half a group: two blocks of rows fetch a panel.
    const STEP: usize = size_of::<Group>() / 2;
    let block = m / BLOCK;
    match job.next.get(block / 2) {
        Some(panel) => {
            let groups = groups(panel);
            (groups.as_ptr().cast::<u8>().wrapping_add(block % 2 * groups.len() * STEP), STEP)
        }
        None => (job.rows, 0),
    }
}

/// Writes the sums of `M` rows and `P` panels, which `finish` turns into outputs, to the target, of whose columns there are as
/// many for each panel.
///
/// # Safety
/// The target's pointers must be valid for its `M` rows and its columns of each panel.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
pub unsafe fn store<const M: usize, const P: usize, Sum: Copy>(
    target: &Target,
    acc: [[Sum; P]; M],
    finish: impl Fn(usize, usize, Sum) -> __m512,
) {
    let wanted = (1u32 << target.columns).wrapping_sub(1) as __mmask16;
    // SAFETY: the caller's contract; the mask keeps to the target's columns.
    unsafe {
        // Row by row in the source, so that the sums stay in their registers: a loop would index them in memory.
        macro_rules! rows {
            ($($i:literal)*) => { $(if $i < M {
                for p in 0..P {
                    let mut y = finish($i, p, acc[$i % M][p]);
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
        rows!(0 1 2 3 4 5 6 7 8 9 10 11 12 13);
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

/// As [`rows::lookup`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
fn lookup_bytes(table: &[u8; 256], x: &mut [u8]) {
    if !is_x86_feature_detected!("avx512vbmi") {
        return rows::lookup(table, x);
    }
    // SAFETY: detected.
    unsafe { permute_bytes(table, x) };
}

/// As [`rows::lookup`]: two permutations pick from a half of the table each, the highest bit says which counts.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn permute_bytes(table: &[u8; 256], x: &mut [u8]) {
    const BYTES: usize = size_of::<__m512i>();
    // SAFETY: four vectors.
    let [a, b, c, d] = std::array::from_fn(|i| unsafe { _mm512_loadu_si512(table.as_ptr().add(i * BYTES).cast()) });
    for x in x.chunks_mut(BYTES) {
        let wanted = u64::MAX >> (BYTES - x.len());
        // SAFETY: the mask keeps to what is there.
        unsafe {
            let places = _mm512_maskz_loadu_epi8(wanted, x.as_ptr().cast());
            let (low, high) = (_mm512_permutex2var_epi8(a, places, b), _mm512_permutex2var_epi8(c, places, d));
            let found = _mm512_mask_blend_epi8(_mm512_movepi8_mask(places), low, high);
            _mm512_mask_storeu_epi8(x.as_mut_ptr().cast(), wanted, found);
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
            Activation::Silu => depthwise_channels(row, finish, out, |x| coarse_silu(x)),
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

/// `start` and the sums of `M` rows, `stride` bytes apart, with `P` panels. Two panels at once load each activation once
/// for both: with one, the load port is busier than the multipliers.
///
/// On the way, what lies `ahead` is brought into the second-level cache, a step for each group: many lines at once would hold up
/// the loads.
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
    (ahead, step): (*const u8, usize),
) -> [[__m512i; P]; M] {
    let mut acc = [start; M];
    for g in 0..panels[0].len() {
        // SAFETY: the caller's contract; a group is one vector.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(g * step).cast());
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

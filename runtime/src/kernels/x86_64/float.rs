//! Products and functions of floats.

use super::super::rows::{self, Activation};
use super::super::{FloatJob, NR};
use super::functions::{gelu, power, silu};
use super::vnni::{BLOCK, in_blocks, store};
use std::arch::x86_64::*;

/// # Safety
/// See [`super::super::Kernels::panels_f32`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
pub unsafe fn panels(job: &FloatJob) {
    // A loop for each function, so that it is inlined there.
    // SAFETY: the caller's contract; NR = 16 values are a vector.
    unsafe {
        match job.activation {
            Activation::None => any(job, |x| x),
            Activation::Silu => any(job, |x| silu(x)),
            Activation::Relu => any(job, |x| _mm512_max_ps(x, _mm512_setzero_ps())),
            Activation::Gelu => any(job, |x| gelu(x)),
            other => any(job, |x| {
                let mut y = [0.; NR];
                _mm512_storeu_ps(y.as_mut_ptr(), x);
                rows::activate::<true>(other, &mut y);
                _mm512_loadu_ps(y.as_ptr())
            }),
        }
    }
}

/// Multiplies all rows with all panels and applies `activate` to what comes out.
///
/// # Safety
/// See [`super::super::Kernels::panels_f32`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
unsafe fn any(job: &FloatJob, activate: impl Fn(__m512) -> __m512 + Copy) {
    let full = job.target.columns / NR;
    let mut p = 0;
    // SAFETY: the caller's contract.
    unsafe {
        while p + 2 <= full {
            some::<2>(job, p, activate);
            p += 2;
        }
        while p < job.panels() {
            some::<1>(job, p, activate);
            p += 1;
        }
    }
}

/// `P` panels from panel `p` on, all of them full if there are several. Two at once load each input of a row once for both.
///
/// # Safety
/// See [`super::super::Kernels::panels_f32`].
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
unsafe fn some<const P: usize>(job: &FloatJob, p: usize, activate: impl Fn(__m512) -> __m512 + Copy) {
    let (mut panels, mut bias) = ([&[][..]; P], [_mm512_setzero_ps(); P]);
    for i in 0..P {
        let (panel, values) = job.panel(p + i);
        panels[i] = panel;
        // SAFETY: NR = 16 values are a vector.
        bias[i] = unsafe { _mm512_loadu_ps(values.as_ptr()) };
    }
    let target = job.target.from(0, p * NR, job.target.rows, NR);
    let next = &job.panels.as_chunks::<NR>().0[(p + P) * job.k..];
    let next = &next[..next.len().min(P * job.k)];
    // SAFETY: the caller's contract; no block reaches past the rows.
    unsafe {
        in_blocks!(target.rows, |M, m| {
            let ahead = share(next, m, job.k);
            let acc: [[_; P]; M] = multiply(job.rows.add(m * job.stride), job.stride, panels, ahead);
            let finish = |_, p: usize, acc| activate(_mm512_add_ps(acc, bias[p]));
            store(&target.from(m, 0, M, NR), acc, finish);
        });
    }
}

/// Where the part of the next panels begins that falls to the rows from `m` on, and floats from one input's part to the next.
fn share(next: &[[f32; NR]], m: usize, k: usize) -> (*const f32, usize) {
    // Half a line: four blocks of rows fetch two panels.
    const STEP: usize = NR / 2;
    match next.as_flattened().get(m / BLOCK * k * STEP..) {
        Some(rest) if !rest.is_empty() => (rest.as_ptr(), STEP),
        _ => (next.as_ptr().cast(), 0),
    }
}

/// Sums of `M` rows, `stride` floats apart, with `P` panels. On the way, what lies `ahead` is brought into the second-level
/// cache, a step for each input: many lines at once would hold up the loads.
///
/// # Safety
/// Each row must hold as many floats as a panel has rows.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
unsafe fn multiply<const M: usize, const P: usize>(
    rows: *const f32,
    stride: usize,
    panels: [&[f32]; P],
    (ahead, step): (*const f32, usize),
) -> [[__m512; P]; M] {
    let mut acc = [[_mm512_setzero_ps(); P]; M];
    for i in 0..panels[0].len() / NR {
        // SAFETY: the caller's contract; a row of a panel is one vector. What is fetched may lie anywhere.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add(i * step).cast());
            let weights = panels.map(|panel| _mm512_loadu_ps(panel.as_ptr().add(i * NR)));
            for (m, acc) in acc.iter_mut().enumerate() {
                let x = _mm512_set1_ps(*rows.add(m * stride + i));
                for p in 0..P {
                    acc[p] = _mm512_fmadd_ps(x, weights[p], acc[p]);
                }
            }
        }
    }
    acc
}

/// As [`rows::activate`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
pub fn activate(activation: Activation, x: &mut [f32]) {
    let (chunks, rest) = x.as_chunks_mut::<NR>();
    match activation {
        Activation::Silu => each(chunks, |x| silu(x)),
        Activation::Gelu => each(chunks, |x| gelu(x)),
        other => rows::activate::<true>(other, chunks.as_flattened_mut()),
    }
    rows::activate::<true>(activation, rest);
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
fn each(chunks: &mut [[f32; NR]], f: impl Fn(__m512) -> __m512) {
    for c in chunks {
        // SAFETY: a chunk holds 16 values.
        unsafe { _mm512_storeu_ps(c.as_mut_ptr(), f(_mm512_loadu_ps(c.as_ptr()))) };
    }
}

/// As [`rows::exponentials`].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")]
pub fn exponentials(x: &mut [f32], n: usize, scale: f32) -> f32 {
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

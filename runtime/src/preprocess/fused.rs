//! One pass from a camera's bytes to the model's tensor: resized, converted to RGB, normalized.
//!
//! Resizing is linear and so is the conversion from luma and chroma, so the order can be the cheap one: rows of raw bytes
//! are first weighted downwards, whatever they mean, eight output rows at a time; their components are weighted across,
//! for all eight at once; and only the pixels that the model sees become RGB, are rounded to 8 bits as a resized picture
//! would be, and normalized. There is no fused multiply-add: the same tensor, bit for bit, on every CPU.

use super::fit::{Placed, View, place};
use super::pixels::{Matrix, PixelFormat, Yuv};
use super::taps::Taps;
use crate::error::Result;
use crate::model::card::{Channels, Preprocess};
use std::ops::Range;

/// Output rows made at once.
const LANES: usize = 8;
/// Bytes of a row weighted at once.
const CHUNK: usize = 32;

/// One value for each of the rows made at once.
type Lanes = [f32; LANES];

/// What is needed for frames of one format and size.
pub(super) struct Plan {
    placed: Placed,
    planes: Vec<Plane>,
    components: Vec<Samples>,
    yuv: Option<Yuv>,
    mean: [f32; 3],
    std: [f32; 3],
    /// Plane of the output for red, green and blue.
    order: [usize; 3],
    area: usize,
}

/// A plane's bytes that are read, and how its rows are weighted.
struct Plane {
    bytes: Range<usize>,
    down: Taps,
}

/// Where a component's samples are among its plane's bytes, and how they are weighted.
struct Samples {
    plane: usize,
    offset: usize,
    step: usize,
    across: Taps,
}

impl Plan {
    /// A plan for frames of that format and size.
    ///
    /// # Errors
    /// As [`place`].
    pub fn new(
        format: PixelFormat,
        (width, height): (usize, usize),
        matrix: Matrix,
        how: &Preprocess,
        view: View,
    ) -> Result<Plan> {
        let placed = place(width, height, how, view)?;
        let mut planes: Vec<Plane> = vec![];
        let mut components = vec![];
        for c in format.components() {
            let across = Taps::new(placed.across, placed.region.left, c.sub.0, how.filter);
            let read = across.range();
            let bytes = c.offset + read.start * c.step..c.offset + (read.end - 1) * c.step + 1;
            match planes.get_mut(c.plane) {
                Some(plane) => {
                    plane.bytes = plane.bytes.start.min(bytes.start)..plane.bytes.end.max(bytes.end);
                }
                None => {
                    let down = Taps::new(placed.down, placed.region.top, c.sub.1, how.filter);
                    planes.push(Plane { bytes, down });
                }
            }
            components.push(Samples { plane: c.plane, offset: c.offset, step: c.step, across });
        }
        let yuv = (!format.is_rgb()).then(|| Yuv::new(matrix));
        let order = if how.channels == Channels::Rgb { [0, 1, 2] } else { [2, 1, 0] };
        let (mean, std, area) = (how.mean, how.std, how.height * how.width);
        Ok(Plan { placed, planes, components, yuv, mean, std, order, area })
    }

    /// Fills `out`, three planes of the model's height × width; what a letterbox leaves free stays as it is. `places`
    /// has the first byte and the stride of each plane in `bytes`, which must hold every sample.
    pub fn run(&self, bytes: &[u8], places: &[(usize, usize)], out: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has AVX2.
            return unsafe { self.run_avx2(bytes, places, out) };
        }
        self.run_here(bytes, places, out);
    }

    /// [`Self::run_here`], compiled for AVX2.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn run_avx2(&self, bytes: &[u8], places: &[(usize, usize)], out: &mut [f32]) {
        self.run_here(bytes, places, out);
    }

    #[inline(always)]
    fn run_here(&self, bytes: &[u8], places: &[(usize, usize)], out: &mut [f32]) {
        let (rows, columns) = (self.placed.down.kept, self.placed.across.kept);
        let mut weighted: Vec<Vec<Lanes>> = self.planes.iter().map(|p| vec![[0.0; LANES]; p.bytes.len()]).collect();
        let mut samples = vec![vec![[0.0; LANES]; columns]; 3];
        for first in (0..rows).step_by(LANES) {
            let lanes = LANES.min(rows - first);
            for ((plane, &(start, stride)), weighted) in self.planes.iter().zip(places).zip(&mut weighted) {
                for lane in 0..lanes {
                    let (row, weights) = plane.down.of(first + lane);
                    let rows = bytes.get(start + row * stride + plane.bytes.start..).unwrap_or(&[]);
                    down(rows, stride, weights, weighted, lane);
                }
            }
            for (component, samples) in self.components.iter().zip(&mut samples) {
                let plane = &self.planes[component.plane];
                let offset = component.offset as isize - plane.bytes.start as isize;
                across(&weighted[component.plane], offset, component.step, &component.across, samples);
            }
            let [a, b, c] = samples.as_mut_slice() else { unreachable!("three components") };
            self.finish(a, b, c);
            for (colour, samples) in samples.iter().enumerate() {
                let plane = &mut out[self.order[colour] * self.area..][..self.area];
                for lane in 0..lanes {
                    let mut at = self.placed.origin + (first + lane) as isize * self.placed.step_down;
                    for sample in samples {
                        plane[at as usize] = sample[lane];
                        at += self.placed.step_across;
                    }
                }
            }
        }
    }

    /// Components to normalized red, green and blue, in place.
    #[inline(always)]
    fn finish(&self, a: &mut [Lanes], b: &mut [Lanes], c: &mut [Lanes]) {
        if let Some(f) = &self.yuv {
            let grey = self.components.len() == 1;
            for ((a, b), c) in a.iter_mut().zip(&mut *b).zip(&mut *c) {
                let (u, v) = if grey { ([128.0; LANES], [128.0; LANES]) } else { (*b, *c) };
                for i in 0..LANES {
                    let (y, u, v) = ((a[i] - f.black) * f.luma, u[i] - 128.0, v[i] - 128.0);
                    a[i] = y + f.red_v * v;
                    b[i] = y + (f.green_u * u + f.green_v * v);
                    c[i] = y + f.blue_u * u;
                }
            }
        }
        for (colour, samples) in [a, b, c].into_iter().enumerate() {
            let (mean, std) = (self.mean[colour], self.std[colour]);
            for value in samples.as_flattened_mut() {
                *value = (rounded(*value) / 255.0 - mean) / std;
            }
        }
    }
}

/// To a whole number of 0…255. Adding 1.5 · 2²³ leaves no bits for fractions.
#[inline(always)]
fn rounded(x: f32) -> f32 {
    const WHOLE: f32 = 12_582_912.0;
    let x = x + WHOLE - WHOLE;
    let x = if x < 0.0 { 0.0 } else { x };
    if x > 255.0 { 255.0 } else { x }
}

/// One lane of `weighted`: the sum of rows, `stride` bytes apart, times their weights.
#[inline(always)]
fn down(rows: &[u8], stride: usize, weights: &[f32], weighted: &mut [Lanes], lane: usize) {
    let width = weighted.len();
    let mut at = 0;
    while at < width && width >= CHUNK {
        at = at.min(width - CHUNK); // the last chunk overlaps the one before
        let mut sums = [0.0f32; CHUNK];
        for (k, &w) in weights.iter().enumerate() {
            let row: &[u8; CHUNK] = rows[k * stride + at..][..CHUNK].try_into().expect("CHUNK bytes");
            for i in 0..CHUNK {
                sums[i] += w * f32::from(row[i]);
            }
        }
        for (to, sum) in weighted[at..at + CHUNK].iter_mut().zip(sums) {
            to[lane] = sum;
        }
        at += CHUNK;
    }
    if width < CHUNK {
        for (i, to) in weighted.iter_mut().enumerate() {
            to[lane] = weights.iter().enumerate().map(|(k, w)| w * f32::from(rows[k * stride + i])).sum();
        }
    }
}

/// Each output sample: weighted source samples, `step` apart, from `offset` on; all lanes at once.
#[inline(always)]
fn across(weighted: &[Lanes], offset: isize, step: usize, taps: &Taps, samples: &mut [Lanes]) {
    for (i, sample) in samples.iter_mut().enumerate() {
        let (start, weights) = taps.of(i);
        let first = (offset + (start * step) as isize) as usize;
        let mut sums = [0.0; LANES];
        for (&w, source) in weights.iter().zip(weighted[first..].iter().step_by(step)) {
            for (sum, value) in sums.iter_mut().zip(source) {
                *sum += w * value;
            }
        }
        *sample = sums;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::card::{Filter, Fit};

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let how = Preprocess {
            height: 21,
            width: 19,
            fit: Fit::Crop { crop: 0.9 },
            filter: Filter::Bicubic,
            mean: [0.4, 0.5, 0.6],
            std: [0.2, 0.25, 0.3],
            channels: Channels::Bgr,
        };
        for format in PixelFormat::ALL.into_iter().filter(|f| !f.components().is_empty()) {
            let (width, height) = (61, 43);
            let mut state = 7u32;
            let mut byte = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            };
            let bytes = (0..format.frame_bytes(width, height)).map(|_| byte()).collect();
            let frame = super::super::RawFrame::new(format, (width, height), 0, Matrix::default(), bytes);
            let plan = Plan::new(format, (width, height), Matrix::default(), &how, View::default()).unwrap();
            let (mut best, mut plain) = (vec![0.0; 3 * 21 * 19], vec![0.0; 3 * 21 * 19]);
            plan.run(&frame.bytes, &frame.planes, &mut best);
            plan.run_here(&frame.bytes, &frame.planes, &mut plain);
            assert_eq!(best, plain, "{format:?}");
        }
    }
}

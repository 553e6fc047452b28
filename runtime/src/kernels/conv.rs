//! Convolutions on pictures with channels last, `[y][x][channel]`: the picture is copied (and quantized) once into a
//! padded canvas; a dense convolution then is a linear layer over gathered rows, a depthwise one runs directly.

use super::depthwise::{Depthwise, Taps};
use super::linear::{InputQuant, Linear, Rows, Weights, widen};
use super::requantize::Quantizer;
use super::rows::{Quants, RowQuant};
use super::{MR_I8, ROWS_F32, room};
use crate::exec::Exec;
use std::cell::RefCell;

/// Sizes of a convolution with batch 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Input height, width, channels.
    pub input: [usize; 3],
    /// Output height, width, channels.
    pub output: [usize; 3],
    /// Kernel height and width.
    pub kernel: [usize; 2],
    /// Stride down and right.
    pub stride: [usize; 2],
    /// Distance of kernel taps down and right.
    pub dilation: [usize; 2],
    /// Padding: top, left, bottom, right.
    pub pads: [usize; 4],
}

/// What a convolution computes at each place.
#[derive(Clone, Debug)]
pub enum Filter {
    /// All input channels to all output channels: a linear layer over rows of `[kernel y][kernel x][input channel]`.
    /// With integer weights, `PerRow` means one range for the whole picture.
    Dense(Linear),
    /// As `Dense` without padding and dilation, of a picture with its channels first, `[channel][y][x]`, as models are given
    /// them: rows of `[input channel][kernel y][kernel x]`.
    Patches(Linear),
    /// One filter a channel.
    Depthwise(Depthwise),
}

/// `activation(conv(x) + bias)`, float in and out, channels last.
#[derive(Clone, Debug)]
pub struct Conv {
    /// Sizes.
    pub geometry: Geometry,
    /// Weights and what follows them.
    pub filter: Filter,
}

/// The canvases are kept from run to run; rows are those of a thread.
#[derive(Default)]
struct Scratch {
    bytes: Vec<u8>,
    floats: Vec<f32>,
}

#[derive(Default)]
struct Gathered {
    bytes: Vec<u8>,
    wide: Vec<i16>,
    floats: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    static GATHERED: RefCell<Gathered> = RefCell::default();
}

/// Output pixels whose inputs are gathered at once, so that they stay in the cache.
const PIXELS: usize = 48;

impl Geometry {
    /// Whether each output pixel is made of the same input pixel alone.
    pub fn is_pointwise(&self) -> bool {
        self.kernel == [1, 1] && self.stride == [1, 1] && self.pads == [0; 4]
    }

    /// Kernel taps.
    pub fn taps(&self) -> usize {
        self.kernel[0] * self.kernel[1]
    }

    /// Elements of a canvas line: a padded row of the picture.
    pub(super) fn line(&self) -> usize {
        (self.input[1] + self.pads[1] + self.pads[3]) * self.input[2]
    }

    pub(super) fn lines(&self) -> usize {
        self.input[0] + self.pads[0] + self.pads[2]
    }

    /// Element of the canvas where the first tap of an output lies.
    pub(super) fn first_tap(&self, y: usize, x: usize) -> usize {
        y * self.stride[0] * self.line() + x * self.stride[1] * self.input[2]
    }

    /// Distance of each tap from the first.
    pub(super) fn tap_offsets(&self) -> Vec<usize> {
        let of = |tap: usize| {
            tap / self.kernel[1] * self.dilation[0] * self.line()
                + tap % self.kernel[1] * self.dilation[1] * self.input[2]
        };
        (0..self.taps()).map(of).collect()
    }

    /// Writes canvas lines from line `first` on: rows of the picture, converted, and `zero` around them.
    pub(super) fn fill_lines<'a, T: Copy>(
        &self,
        row: &dyn Fn(usize) -> &'a [f32],
        first: usize,
        lines: &mut [T],
        zero: T,
        convert: &(dyn Fn(&[f32], &mut [T]) + Sync),
    ) {
        let [h, w, c] = self.input;
        for (j, line) in lines.chunks_exact_mut(self.line()).enumerate() {
            match (first + j).checked_sub(self.pads[0]).filter(|&y| y < h) {
                None => line.fill(zero),
                Some(y) => {
                    let (left, rest) = line.split_at_mut(self.pads[1] * c);
                    let (inner, right) = rest.split_at_mut(w * c);
                    left.fill(zero);
                    convert(row(y), inner);
                    right.fill(zero);
                }
            }
        }
    }

    /// Copies the inputs of `rows.len() / stride` outputs from output `first` on, one row each.
    fn gather<T: Copy>(&self, canvas: &[T], first: usize, rows: &mut [T], stride: usize) {
        let ([_, width, _], c, line) = (self.output, self.input[2], self.line());
        for (p, row) in rows.chunks_exact_mut(stride).enumerate() {
            let at = self.first_tap((first + p) / width, (first + p) % width);
            for (ky, taps) in row.chunks_mut(self.kernel[1] * c).take(self.kernel[0]).enumerate() {
                let at = at + ky * self.dilation[0] * line;
                if self.dilation[1] == 1 {
                    copy_known(&canvas[at..at + taps.len()], taps);
                    continue;
                }
                for (kx, tap) in taps.chunks_exact_mut(c).enumerate() {
                    tap.copy_from_slice(&canvas[at + kx * self.dilation[1] * c..][..c]);
                }
            }
        }
    }

    /// As [`Geometry::gather`], of planes `[channel][y][x]`.
    fn gather_patches<T: Copy>(&self, planes: &[T], first: usize, rows: &mut [T], stride: usize) {
        let ([h, w, _], [_, width, _], [kh, kw]) = (self.input, self.output, self.kernel);
        for (p, row) in rows.chunks_exact_mut(stride).enumerate() {
            let corner = (first + p) / width * self.stride[0] * w + (first + p) % width * self.stride[1];
            for (i, taps) in row[..self.input[2] * kh * kw].chunks_exact_mut(kw).enumerate() {
                let from = &planes[i / kh * h * w + i % kh * w + corner..][..kw];
                copy_known(from, taps);
            }
        }
    }
}

/// Copies elements; lengths of the usual patches and of a first convolution are known to the compiler, which spares a call.
fn copy_known<T: Copy>(from: &[T], to: &mut [T]) {
    fn copy<T: Copy, const N: usize>(from: &[T], to: &mut [T]) {
        *to.first_chunk_mut::<N>().expect("as long") = *from.first_chunk().expect("as long");
    }
    match to.len() {
        4 => copy::<T, 4>(from, to),
        8 => copy::<T, 8>(from, to),
        // Three pixels of three channels.
        9 => copy::<T, 9>(from, to),
        16 => copy::<T, 16>(from, to),
        _ => to.copy_from_slice(from),
    }
}

impl Conv {
    /// Multiply-accumulates.
    pub fn macs(&self) -> usize {
        let g = &self.geometry;
        let inputs = if matches!(self.filter, Filter::Depthwise(_)) { 1 } else { g.input[2] };
        g.output.iter().product::<usize>() * g.taps() * inputs
    }

    /// Whether it computes in integers.
    pub fn is_integer(&self) -> bool {
        match &self.filter {
            Filter::Dense(l) | Filter::Patches(l) => matches!(l.weights, Weights::I8(..)),
            Filter::Depthwise(d) => matches!(d.taps, Taps::I8 { .. }),
        }
    }

    /// Runs on one picture `[h][w][c]`, or `[c][h][w]` in [`Filter::Patches`].
    pub fn run(&self, exec: &Exec, x: &[f32], out: &mut [f32]) {
        SCRATCH.with_borrow_mut(|s| match &self.filter {
            Filter::Dense(linear) | Filter::Patches(linear) => match &linear.weights {
                Weights::I8(_, quant) => {
                    let quant = self.quantize(exec, x, linear, *quant, &mut s.bytes);
                    self.dense_i8(exec, linear, quant, &s.bytes, out);
                }
                Weights::F32(_) => self.dense_f32(exec, linear, self.pad(exec, x, &mut s.floats), out),
            },
            Filter::Depthwise(d) => d.run(&self.geometry, exec, x, out),
        });
    }

    /// Quantizes the picture into the canvas; returns the scale and the stored zero.
    fn quantize(&self, exec: &Exec, x: &[f32], linear: &Linear, quant: InputQuant, canvas: &mut Vec<u8>) -> RowQuant {
        let (scale, inverse, zero) = quant.parameters(exec.kernels, x);
        let flip = exec.kernels.flip;
        let quantizer = Quantizer { table: linear.table.as_ref(), inverse, zero, flip };
        self.fill(exec, x, canvas, zero as u8 ^ flip, &|x, line| quantizer.quantize(exec.kernels, x, line));
        RowQuant { scale, zero: zero as i32 - i32::from(flip) }
    }

    /// The picture with zeros around it; itself where there is no padding.
    fn pad<'a>(&self, exec: &Exec, x: &'a [f32], canvas: &'a mut Vec<f32>) -> &'a [f32] {
        if self.geometry.pads == [0; 4] {
            return x;
        }
        self.fill(exec, x, canvas, 0., &|x, line| line.copy_from_slice(x));
        canvas
    }

    fn fill<T: Copy + Send + Sync>(
        &self,
        exec: &Exec,
        x: &[f32],
        canvas: &mut Vec<T>,
        zero: T,
        convert: &(dyn Fn(&[f32], &mut [T]) + Sync),
    ) {
        let g = &self.geometry;
        canvas.resize(g.lines() * g.line(), zero);
        let (lines, size) = (g.lines().div_ceil(4 * exec.threads()), g.input[1] * g.input[2]);
        exec.chunks(canvas, lines * g.line(), &|i, part| {
            g.fill_lines(&|y| &x[y * size..][..size], i * lines, part, zero, convert)
        });
    }

    /// Copies the inputs of `rows.len() / stride` outputs from output `first` on, one row each.
    fn gather<T: Copy>(&self, canvas: &[T], first: usize, rows: &mut [T], stride: usize) {
        match self.filter {
            Filter::Patches(_) => self.geometry.gather_patches(canvas, first, rows, stride),
            _ => self.geometry.gather(canvas, first, rows, stride),
        }
    }

    fn dense_i8(&self, exec: &Exec, linear: &Linear, quant: RowQuant, canvas: &[u8], out: &mut [f32]) {
        let Weights::I8(weights, _) = &linear.weights else { unreachable!("integer weights") };
        let (n, stride) = (linear.n(), weights.row_bytes());
        let block = exec.block(out.len() / n, PIXELS, MR_I8);
        exec.chunks(out, block * n, &|b, out| {
            GATHERED.with_borrow_mut(|s| {
                let pixels = out.len() / n;
                let padded = pixels.next_multiple_of(MR_I8);
                let bytes = room(&mut s.bytes, padded * stride);
                self.gather(canvas, b * block, &mut bytes[..pixels * stride], stride);
                widen(weights, bytes, &mut s.wide);
                let rows = Rows { bytes, wide: &s.wide, quants: Quants::Shared(quant) };
                linear.integer_block(exec.kernels, weights, &rows, None, out);
                linear.follow(exec.kernels, None, out);
            });
        });
    }

    fn dense_f32(&self, exec: &Exec, linear: &Linear, canvas: &[f32], out: &mut [f32]) {
        let (k, n) = (linear.k(), linear.n());
        let block = exec.block(out.len() / n, PIXELS, ROWS_F32);
        exec.chunks(out, block * n, &|b, out| {
            GATHERED.with_borrow_mut(|s| {
                let floats = room(&mut s.floats, out.len() / n * k);
                self.gather(canvas, b * block, floats, k);
                linear.float_block(exec.kernels, floats, None, out);
                linear.follow(exec.kernels, None, out);
            });
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Activation, F32Weights, I8Weights};
    use super::*;
    use crate::model::card::SelfTest;

    /// The convolution by its definition, in f64: `weight(output channel, ky, kx, input channel)`, one group or as many as
    /// channels.
    fn reference(
        g: &Geometry,
        x: &[f32],
        bias: &[f32],
        depthwise: bool,
        weight: &dyn Fn(usize, usize, usize) -> f64,
    ) -> Vec<f64> {
        let ([h, w, c], [oh, ow, oc]) = (g.input, g.output);
        let mut out = vec![];
        for (y, x0, o) in (0..oh * ow * oc).map(|i| (i / oc / ow, i / oc % ow, i % oc)) {
            let mut sum = f64::from(bias[o]);
            for (ky, kx) in (0..g.taps()).map(|t| (t / g.kernel[1], t % g.kernel[1])) {
                let at = |o: usize, k: usize, s: usize, d: usize, p: usize| (o * s + k * d).checked_sub(p);
                let iy = at(y, ky, g.stride[0], g.dilation[0], g.pads[0]).filter(|&y| y < h);
                let ix = at(x0, kx, g.stride[1], g.dilation[1], g.pads[1]).filter(|&x| x < w);
                let (Some(iy), Some(ix)) = (iy, ix) else { continue };
                let tap = ky * g.kernel[1] + kx;
                for i in if depthwise { o..o + 1 } else { 0..c } {
                    sum += f64::from(x[(iy * w + ix) * c + i]) * weight(o, tap, i);
                }
            }
            out.push(sum);
        }
        out
    }

    fn geometries(depthwise: bool) -> Vec<Geometry> {
        let mut all = vec![];
        for (h, w, c, oc) in [(7, 9, 24, 20), (6, 5, 3, 17), (5, 5, 16, 32), (4, 6, 40, 5)] {
            for (kernel, stride, dilation, pads) in [
                ([3, 3], [1, 1], [1, 1], [1, 1, 1, 1]),
                ([3, 3], [2, 2], [1, 1], [1, 0, 1, 2]),
                ([2, 3], [1, 2], [2, 1], [0, 2, 1, 0]),
                ([1, 1], [2, 2], [1, 1], [0; 4]),
                ([3, 3], [1, 1], [1, 2], [1, 2, 1, 2]),
            ] {
                let size = |n: usize, a: usize| {
                    (n + pads[a] + pads[a + 2] - dilation[a] * (kernel[a] - 1) - 1) / stride[a] + 1
                };
                let output = [size(h, 0), size(w, 1), if depthwise { c } else { oc }];
                all.push(Geometry { input: [h, w, c], output, kernel, stride, dilation, pads });
            }
        }
        all
    }

    /// Every kernel and thread count, dense and depthwise, integer and float, against the definition.
    #[test]
    fn convolutions_are_those_of_the_definition() {
        let quant = InputQuant::Static { scale: 1. / 64., zero: 77 };
        for threads in [1, 2] {
            let exec = Exec::new(threads).expect("threads");
            for (depthwise, integer) in [(false, false), (false, true), (true, false), (true, true)] {
                for g in geometries(depthwise) {
                    let ([_, _, c], [_, _, oc]) = (g.input, g.output);
                    let inputs = if depthwise { 1 } else { c };
                    // On the grid of the quantization, so that only the arithmetic is tested.
                    let x: Vec<f32> = SelfTest::input(3, g.input.iter().product());
                    let x: Vec<f32> = x.iter().map(|v| (v * 64.).round().clamp(-77., 178.) / 64.).collect();
                    let bias = SelfTest::input(4, oc);
                    let weights = SelfTest::input(5, oc * g.taps() * inputs);
                    let q: Vec<i8> = weights.iter().map(|v| (v * 127.) as i8).collect();
                    let scale: Vec<f32> = (0..oc).map(|o| 0.01 + o as f32 * 1e-3).collect();
                    let index = |o: usize, tap: usize, i: usize| match depthwise {
                        true => tap * c + o,
                        false => (o * g.taps() + tap) * c + i,
                    };
                    let weight = |o: usize, tap: usize, i: usize| match integer {
                        true => f64::from(q[index(o, tap, i)]) * f64::from(scale[o]),
                        false => f64::from(weights[index(o, tap, i)]),
                    };
                    let (activation, k) = (Activation::Relu, g.taps() * inputs);
                    let filter = if depthwise {
                        let taps = match integer {
                            true => Taps::i8(q.clone(), scale.clone(), quant),
                            false => Taps::F32(weights.clone()),
                        };
                        Filter::Depthwise(Depthwise { table: None, taps, bias: bias.clone(), activation })
                    } else {
                        let weights = match integer {
                            true => Weights::I8(I8Weights::pack(exec.kernels, oc, k, &q, &scale), quant),
                            false => Weights::F32(F32Weights::pack(oc, k, |row, i| weights[row * k + i])),
                        };
                        Filter::Dense(Linear::new(weights, &bias, activation))
                    };
                    let mut out = vec![f32::NAN; g.output.iter().product()];
                    Conv { geometry: g, filter }.run(&exec, &x, &mut out);
                    let want = reference(&g, &x, &bias, depthwise, &weight);
                    for (i, (&got, want)) in out.iter().zip(want).enumerate() {
                        let want = want.max(0.);
                        let near = (f64::from(got) - want).abs() < 1e-4 * want.abs().max(1.);
                        assert!(near, "{g:?} depthwise {depthwise} integer {integer}: {i}: {got} for {want}");
                    }
                }
            }
        }
    }

    /// A picture with its channels first gives what the same picture with its channels last gives.
    #[test]
    fn patches_of_planes_are_those_of_pictures() {
        let exec = Exec::new(1).expect("a thread");
        for ([kh, kw], [rows, columns], c) in [([16, 16], [3, 2], 3), ([4, 4], [2, 5], 3), ([2, 7], [3, 3], 5)] {
            let ([h, w], oc, k) = ([rows * kh + 1, columns * kw + 1], 20, c * kh * kw);
            let (kernel, pads) = ([kh, kw], [0; 4]);
            let (input, output) = ([h, w, c], [rows, columns, oc]);
            let geometry = Geometry { input, output, kernel, stride: kernel, dilation: [1, 1], pads };
            let planes = SelfTest::input(3, h * w * c);
            let picture: Vec<f32> = (0..h * w * c).map(|i| planes[i % c * h * w + i / c]).collect();
            let weights = SelfTest::input(5, oc * k);
            let last = |row: usize, i: usize| weights[row * k + i % c * kh * kw + i / c];
            let run = |integer: bool, patches: bool, x: &[f32]| {
                let at = |row: usize, i: usize| if patches { weights[row * k + i] } else { last(row, i) };
                let q: Vec<i8> = (0..oc * k).map(|i| (at(i / k, i % k) * 127.) as i8).collect();
                let weights = match integer {
                    true => Weights::I8(I8Weights::pack(exec.kernels, oc, k, &q, &[0.01; 20]), InputQuant::Whole),
                    false => Weights::F32(F32Weights::pack(oc, k, at)),
                };
                let linear = Linear::new(weights, &SelfTest::input(4, oc), Activation::None);
                let filter = if patches { Filter::Patches(linear) } else { Filter::Dense(linear) };
                let mut out = vec![f32::NAN; rows * columns * oc];
                Conv { geometry, filter }.run(&exec, x, &mut out);
                out
            };
            assert_eq!(run(true, true, &planes), run(true, false, &picture));
            for (a, b) in run(false, true, &planes).iter().zip(run(false, false, &picture)) {
                assert!((a - b).abs() < 1e-3, "{a} for {b}");
            }
        }
    }
}

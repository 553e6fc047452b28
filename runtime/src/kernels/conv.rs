//! Convolutions on pictures with channels last, `[y][x][channel]`: the picture is copied (and quantized) once into a
//! padded canvas; a dense convolution then is a linear layer over gathered rows, a depthwise one runs directly.

use super::MR_I8;
use super::linear::{InputQuant, Linear, Rows, Weights, widen};
use super::rows::{Activation, ChannelScale, RowQuant};
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
    /// One filter a channel.
    Depthwise(Depthwise),
}

/// One filter a channel.
#[derive(Clone, Debug)]
pub struct Depthwise {
    /// Weights.
    pub taps: Taps,
    /// Bias, one a channel.
    pub bias: Vec<f32>,
    /// Function after the bias.
    pub activation: Activation,
}

/// Weights of a depthwise convolution, `[tap][channel]`.
#[derive(Clone, Debug)]
pub enum Taps {
    /// Integer arithmetic.
    I8 {
        /// Weights.
        values: Vec<i8>,
        /// Sum of each channel's weights.
        sums: Vec<i32>,
        /// Scale of each channel.
        scale: Vec<f32>,
        /// Quantization of the input; `PerRow` means one range for the whole picture.
        quant: InputQuant,
    },
    /// Float arithmetic.
    F32(Vec<f32>),
}

impl Taps {
    /// Integer weights `[tap][channel]` with a scale for each channel.
    pub fn i8(values: Vec<i8>, scale: Vec<f32>, quant: InputQuant) -> Taps {
        let mut sums = vec![0; scale.len()];
        values.iter().enumerate().for_each(|(i, &w)| sums[i % scale.len()] += i32::from(w));
        Taps::I8 { values, sums, scale, quant }
    }
}

/// `activation(conv(x) + bias)`, float in and out, channels last.
#[derive(Clone, Debug)]
pub struct Conv {
    /// Sizes.
    pub geometry: Geometry,
    /// Weights and what follows them.
    pub filter: Filter,
}

/// One row of outputs of a depthwise convolution, for the row routines.
pub struct DepthwiseRow<'a, A, W> {
    /// The canvas from the first tap of the first output on.
    pub canvas: &'a [A],
    /// Where each tap of the first output lies in the canvas, ascending.
    pub offsets: &'a [usize],
    /// Weights, `[tap][channel]`.
    pub taps: &'a [W],
    /// Sizes.
    pub geometry: &'a Geometry,
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
    quants: Vec<RowQuant>,
    floats: Vec<f32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    static GATHERED: RefCell<Gathered> = RefCell::default();
}

/// Output pixels whose inputs are gathered at once, so that they stay in the cache.
const PIXELS: usize = 48;
/// Canvas of a depthwise convolution that is made at once: a part of the second-level cache.
const STRIP_BYTES: usize = 128 << 10;

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
    fn line(&self) -> usize {
        (self.input[1] + self.pads[1] + self.pads[3]) * self.input[2]
    }

    fn lines(&self) -> usize {
        self.input[0] + self.pads[0] + self.pads[2]
    }

    /// Element of the canvas where the first tap of an output lies.
    fn first_tap(&self, y: usize, x: usize) -> usize {
        y * self.stride[0] * self.line() + x * self.stride[1] * self.input[2]
    }

    /// Distance of each tap from the first.
    fn tap_offsets(&self) -> Vec<usize> {
        let of = |tap: usize| {
            tap / self.kernel[1] * self.dilation[0] * self.line()
                + tap % self.kernel[1] * self.dilation[1] * self.input[2]
        };
        (0..self.taps()).map(of).collect()
    }

    /// Writes canvas lines from line `first` on: rows of the picture, converted, and `zero` around them.
    fn fill_lines<T: Copy>(
        &self,
        x: &[f32],
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
                    convert(&x[y * w * c..][..w * c], inner);
                    right.fill(zero);
                }
            }
        }
    }

    /// Canvas lines that `rows` output rows are made of.
    fn lines_of(&self, rows: usize) -> usize {
        (rows - 1) * self.stride[0] + (self.kernel[0] - 1) * self.dilation[0] + 1
    }

    /// Output rows to make at once from a strip of canvas with elements of `bytes`, so that the strip stays in the cache.
    fn strip(&self, exec: &Exec, bytes: usize) -> usize {
        let most = self.output[0].div_ceil(exec.threads());
        (1..=most).rfind(|&rows| self.lines_of(rows) * self.line() * bytes <= STRIP_BYTES).unwrap_or(1)
    }

    /// Copies the inputs of `rows.len() / stride` outputs from output `first` on, one row each.
    fn gather<T: Copy>(&self, canvas: &[T], first: usize, rows: &mut [T], stride: usize) {
        let ([_, width, _], c, line) = (self.output, self.input[2], self.line());
        for (p, row) in rows.chunks_exact_mut(stride).enumerate() {
            let at = self.first_tap((first + p) / width, (first + p) % width);
            for (ky, taps) in row.chunks_mut(self.kernel[1] * c).take(self.kernel[0]).enumerate() {
                let at = at + ky * self.dilation[0] * line;
                if self.dilation[1] == 1 {
                    taps.copy_from_slice(&canvas[at..at + taps.len()]);
                    continue;
                }
                for (kx, tap) in taps.chunks_exact_mut(c).enumerate() {
                    tap.copy_from_slice(&canvas[at + kx * self.dilation[1] * c..][..c]);
                }
            }
        }
    }
}

impl Conv {
    /// Multiply-accumulates.
    pub fn macs(&self) -> usize {
        let g = &self.geometry;
        let inputs = if matches!(self.filter, Filter::Dense(_)) { g.input[2] } else { 1 };
        g.output.iter().product::<usize>() * g.taps() * inputs
    }

    /// Whether it computes in integers.
    pub fn is_integer(&self) -> bool {
        match &self.filter {
            Filter::Dense(l) => matches!(l.weights, Weights::I8(..)),
            Filter::Depthwise(d) => matches!(d.taps, Taps::I8 { .. }),
        }
    }

    /// Runs on one picture `[h][w][c]`.
    pub fn run(&self, exec: &Exec, x: &[f32], out: &mut [f32]) {
        SCRATCH.with_borrow_mut(|s| match &self.filter {
            Filter::Dense(linear) => match &linear.weights {
                Weights::I8(_, quant) => {
                    let quant = self.quantize(exec, x, *quant, exec.kernels.flip, &mut s.bytes);
                    self.dense_i8(exec, linear, quant, &s.bytes, out);
                }
                Weights::F32(_) => self.dense_f32(exec, linear, self.pad(exec, x, &mut s.floats), out),
            },
            Filter::Depthwise(d) => match &d.taps {
                Taps::I8 { quant, .. } => self.depthwise_i8(exec, d, *quant, x, out),
                Taps::F32(taps) => self.depthwise_f32(exec, d, taps, x, out),
            },
        });
    }

    /// Quantizes the picture into the canvas; returns the scale and the stored zero.
    fn quantize(&self, exec: &Exec, x: &[f32], quant: InputQuant, flip: u8, canvas: &mut Vec<u8>) -> RowQuant {
        let (scale, inverse, zero) = quant.parameters(exec.kernels, x);
        self.fill(exec, x, canvas, zero as u8 ^ flip, &|x, line| {
            // SAFETY: the kernels came from `available`.
            unsafe { (exec.kernels.rows.quantize)(x, inverse, zero, flip, line) };
        });
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
        let lines = g.lines().div_ceil(4 * exec.threads());
        exec.chunks(canvas, lines * g.line(), &|i, part| g.fill_lines(x, i * lines, part, zero, convert));
    }

    fn dense_i8(&self, exec: &Exec, linear: &Linear, quant: RowQuant, canvas: &[u8], out: &mut [f32]) {
        let g = &self.geometry;
        let Weights::I8(weights, _) = &linear.weights else { unreachable!("integer weights") };
        let (n, stride) = (linear.n(), weights.row_bytes());
        let block = exec.block(out.len() / n, PIXELS, MR_I8);
        exec.chunks(out, block * n, &|b, out| {
            GATHERED.with_borrow_mut(|s| {
                let pixels = out.len() / n;
                let padded = pixels.next_multiple_of(MR_I8);
                s.bytes.resize(padded * stride, 0);
                g.gather(canvas, b * block, &mut s.bytes[..pixels * stride], stride);
                widen(weights, &s.bytes, &mut s.wide);
                s.quants.clear();
                s.quants.resize(padded, quant);
                let rows = Rows { bytes: &s.bytes, wide: &s.wide, quants: &s.quants };
                linear.integer_block(exec.kernels, weights, &rows, None, out);
            });
        });
    }

    fn dense_f32(&self, exec: &Exec, linear: &Linear, canvas: &[f32], out: &mut [f32]) {
        let (g, k, n) = (&self.geometry, linear.k(), linear.n());
        let block = exec.block(out.len() / n, PIXELS, 12);
        exec.chunks(out, block * n, &|b, out| {
            GATHERED.with_borrow_mut(|s| {
                s.floats.resize(out.len() / n * k, 0.);
                g.gather(canvas, b * block, &mut s.floats, k);
                linear.float_block(exec.kernels, &s.floats, None, out);
            });
        });
    }

    fn depthwise_i8(&self, exec: &Exec, d: &Depthwise, quant: InputQuant, x: &[f32], out: &mut [f32]) {
        let g = &self.geometry;
        let Taps::I8 { values: taps, sums, scale, .. } = &d.taps else { unreachable!("integer weights") };
        let (step, inverse, zero) = quant.parameters(exec.kernels, x);
        let factor: Vec<f32> = scale.iter().map(|s| s * step).collect();
        let offset: Vec<i32> = sums.iter().map(|sum| -(zero as i32) * sum).collect();
        let finish = ChannelScale { offset: &offset, factor: &factor, bias: &d.bias };
        let offsets = g.tap_offsets();
        let rows = &exec.kernels.rows;
        let strip = g.strip(exec, 1);
        exec.chunks(out, strip * g.output[1] * g.input[2], &|i, out| {
            GATHERED.with_borrow_mut(|s| {
                // SAFETY: the kernels came from `available`, here and below.
                let quantize = |x: &[f32], line: &mut [u8]| unsafe { (rows.quantize)(x, inverse, zero, 0, line) };
                let canvas = g.strip_canvas(x, i * strip, out.len(), &mut s.bytes, zero as u8, &quantize);
                g.each_row(canvas, out, &|canvas, out| {
                    let row = DepthwiseRow { canvas, offsets: &offsets, taps, geometry: g };
                    // SAFETY: as above.
                    unsafe {
                        (rows.depthwise_i8)(&row, &finish, out);
                        (rows.activate)(d.activation, out);
                    }
                });
            });
        });
    }

    fn depthwise_f32(&self, exec: &Exec, d: &Depthwise, taps: &[f32], x: &[f32], out: &mut [f32]) {
        let g = &self.geometry;
        let rows = &exec.kernels.rows;
        let offsets = g.tap_offsets();
        let strip = g.strip(exec, size_of::<f32>());
        exec.chunks(out, strip * g.output[1] * g.input[2], &|i, out| {
            GATHERED.with_borrow_mut(|s| {
                let copy = |x: &[f32], line: &mut [f32]| line.copy_from_slice(x);
                let canvas = g.strip_canvas(x, i * strip, out.len(), &mut s.floats, 0., &copy);
                g.each_row(canvas, out, &|canvas, out| {
                    let row = DepthwiseRow { canvas, offsets: &offsets, taps, geometry: g };
                    // SAFETY: the kernels came from `available`.
                    unsafe {
                        (rows.depthwise_f32)(&row, &d.bias, out);
                        (rows.activate)(d.activation, out);
                    }
                });
            });
        });
    }
}

impl Geometry {
    /// The canvas for `len` outputs of a depthwise convolution from output row `first` on.
    fn strip_canvas<'a, T: Copy>(
        &self,
        x: &[f32],
        first: usize,
        len: usize,
        canvas: &'a mut Vec<T>,
        zero: T,
        convert: &(dyn Fn(&[f32], &mut [T]) + Sync),
    ) -> &'a [T] {
        let rows = len / (self.output[1] * self.input[2]);
        canvas.resize(self.lines_of(rows) * self.line(), zero);
        self.fill_lines(x, first * self.stride[0], canvas, zero, convert);
        canvas
    }

    /// Calls `f` with each output row of a depthwise convolution and the canvas from its first tap on.
    fn each_row<T>(&self, canvas: &[T], out: &mut [f32], f: &dyn Fn(&[T], &mut [f32])) {
        for (y, out) in out.chunks_exact_mut(self.output[1] * self.input[2]).enumerate() {
            f(&canvas[self.first_tap(y, 0)..], out);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::linear::bias_panels;
    use super::super::{F32Weights, I8Weights};
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
                        Filter::Depthwise(Depthwise { taps, bias: bias.clone(), activation })
                    } else {
                        let weights = match integer {
                            true => Weights::I8(I8Weights::pack(exec.kernels, oc, k, &q, &scale), quant),
                            false => Weights::F32(F32Weights::pack(oc, k, |row, i| weights[row * k + i])),
                        };
                        Filter::Dense(Linear { norm: None, weights, bias: bias_panels(&bias), activation })
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
}

//! Depthwise convolutions, one filter a channel, on pictures with channels last; alone, or between the two pointwise
//! layers of an inverted bottleneck (MobileNetV2, Sandler et al. 2018), strip by strip.
//!
//! Between the layers of a bottleneck a picture has several times as many channels as before and after. Only a strip of it
//! exists at a time, in the cache.

use super::conv::Geometry;
use super::linear::{InputQuant, Linear};
use super::requantize::{ByteTable, Quantizer};
use super::rows::{Activation, ChannelScale};
use super::{Kernels, room};
use crate::exec::Exec;
use std::cell::RefCell;
use std::thread::LocalKey;

/// One filter a channel.
#[derive(Clone, Debug)]
pub struct Depthwise {
    /// Function of the input, which integer weights quantize with a static scale, if fused.
    pub table: Option<ByteTable>,
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

/// `project(depthwise(expand(x))) + residual`.
#[derive(Clone, Debug)]
pub struct Bottleneck {
    /// Pointwise layer before the convolution.
    pub expand: Linear,
    /// Sizes of the convolution.
    pub geometry: Geometry,
    /// The convolution; its input has a [known quantization](Depthwise::is_static).
    pub depthwise: Depthwise,
    /// Pointwise layer after the convolution.
    pub project: Linear,
}

/// A convolution on one picture: how values enter the canvas, and how a row of outputs is made of it.
struct Pass<'a, A: 'static> {
    geometry: &'a Geometry,
    zero: A,
    convert: &'a (dyn Fn(&[f32], &mut [A]) + Sync),
    /// From the canvas at the first tap on.
    row: &'a (dyn Fn(&[A], &mut [f32]) + Sync),
    canvas: &'static LocalKey<RefCell<Vec<A>>>,
}

/// What lies between the layers of a bottleneck.
#[derive(Default)]
struct Between {
    expanded: Vec<f32>,
    filtered: Vec<f32>,
}

thread_local! {
    static BYTES: RefCell<Vec<u8>> = RefCell::default();
    static FLOATS: RefCell<Vec<f32>> = RefCell::default();
    static BETWEEN: RefCell<Between> = RefCell::default();
}

/// What is made at once of a canvas, and of what lies around it in a bottleneck: a part of the second-level cache.
const STRIP_BYTES: usize = 128 << 10;

impl Depthwise {
    /// Whether the quantization of its input does not depend on the input.
    pub fn is_static(&self) -> bool {
        match self.taps {
            Taps::I8 { quant, .. } => matches!(quant, InputQuant::Static { .. }),
            Taps::F32(_) => true,
        }
    }

    /// Runs on one picture `[h][w][c]`.
    pub fn run(&self, g: &Geometry, exec: &Exec, x: &[f32], out: &mut [f32]) {
        match &self.taps {
            Taps::I8 { quant, .. } => {
                let parameters = quant.parameters(exec.kernels, x);
                self.with_bytes(g, exec.kernels, parameters, |pass| pass.picture(exec, x, out));
            }
            Taps::F32(taps) => self.with_floats(g, exec.kernels, taps, |pass| pass.picture(exec, x, out)),
        }
    }

    /// Calls `f` with the convolution in integers, its input quantized by scale, inverse scale and zero point.
    fn with_bytes(
        &self,
        g: &Geometry,
        kernels: &Kernels,
        (step, inverse, zero): (f32, f32, f32),
        f: impl FnOnce(&Pass<u8>),
    ) {
        let Taps::I8 { values: taps, sums, scale, .. } = &self.taps else { unreachable!("integer weights") };
        let rows = &kernels.rows;
        let factor: Vec<f32> = scale.iter().map(|s| s * step).collect();
        let offset: Vec<i32> = sums.iter().map(|sum| -(zero as i32) * sum).collect();
        let activation = self.activation;
        let finish = ChannelScale { offset: &offset, factor: &factor, bias: &self.bias, activation };
        let offsets = g.tap_offsets();
        let quantizer = Quantizer { table: self.table.as_ref(), inverse, zero, flip: 0 };
        f(&Pass {
            geometry: g,
            zero: zero as u8,
            convert: &|x, line| quantizer.quantize(kernels, x, line),
            row: &|canvas, out| {
                let row = DepthwiseRow { canvas, offsets: &offsets, taps, geometry: g };
                // SAFETY: the kernels came from `available`.
                unsafe { (rows.depthwise_i8)(&row, &finish, out) };
            },
            canvas: &BYTES,
        });
    }

    fn with_floats(&self, g: &Geometry, kernels: &Kernels, taps: &[f32], f: impl FnOnce(&Pass<f32>)) {
        let rows = &kernels.rows;
        let offsets = g.tap_offsets();
        f(&Pass {
            geometry: g,
            zero: 0.,
            convert: &|x, line| line.copy_from_slice(x),
            row: &|canvas, out| {
                let row = DepthwiseRow { canvas, offsets: &offsets, taps, geometry: g };
                // SAFETY: the kernels came from `available`.
                unsafe {
                    (rows.depthwise_f32)(&row, &self.bias, out);
                    (rows.activate)(self.activation, out);
                }
            },
            canvas: &FLOATS,
        });
    }
}

impl<A: Copy + Default + Sync> Pass<'_, A> {
    /// Runs on a whole picture.
    fn picture(&self, exec: &Exec, x: &[f32], out: &mut [f32]) {
        let g = self.geometry;
        let (line, size) = (g.input[1] * g.input[2], g.output[1] * g.output[2]);
        let most = g.output[0].div_ceil(exec.threads());
        let fits = |rows: &usize| g.lines_of(*rows) * g.line() * size_of::<A>() <= STRIP_BYTES;
        let strip = (1..=most).rfind(fits).unwrap_or(1);
        exec.chunks(out, strip * size, &|i, out| {
            self.canvas.with_borrow_mut(|canvas| {
                let first = i * strip * g.stride[0];
                let canvas = room(canvas, g.lines_of(out.len() / size) * g.line());
                g.fill_lines(&|y| &x[y * line..][..line], first, canvas, self.zero, self.convert);
                self.rows(canvas, out);
            });
        });
    }

    /// Output rows from a canvas that begins with the first one's taps.
    fn rows(&self, canvas: &[A], out: &mut [f32]) {
        let g = self.geometry;
        for (y, out) in out.chunks_exact_mut(g.output[1] * g.output[2]).enumerate() {
            (self.row)(&canvas[g.first_tap(y, 0)..], out);
        }
    }
}

impl Geometry {
    /// Canvas lines that `rows` output rows are made of.
    fn lines_of(&self, rows: usize) -> usize {
        (rows - 1) * self.stride[0] + (self.kernel[0] - 1) * self.dilation[0] + 1
    }
}

impl Bottleneck {
    /// Multiply-accumulates.
    pub fn macs(&self) -> usize {
        let ([h, w, c], [oh, ow, _]) = (self.geometry.input, self.geometry.output);
        h * w * self.expand.k() * c + oh * ow * c * (self.geometry.taps() + self.project.n())
    }

    /// Runs on one picture `[h][w][channel]`; `residual` is added to the output.
    ///
    /// # Panics
    /// When the lengths do not match.
    pub fn run(&self, exec: &Exec, x: &[f32], residual: Option<&[f32]>, out: &mut [f32]) {
        let g = &self.geometry;
        match &self.depthwise.taps {
            Taps::I8 { quant, .. } => {
                let parameters = quant.parameters(exec.kernels, &[]);
                let run = |pass: &Pass<u8>| self.strips(pass, exec, x, residual, out);
                self.depthwise.with_bytes(g, exec.kernels, parameters, run);
            }
            Taps::F32(taps) => {
                let run = |pass: &Pass<f32>| self.strips(pass, exec, x, residual, out);
                self.depthwise.with_floats(g, exec.kernels, taps, run);
            }
        }
    }

    /// Each thread makes its share of the output rows, strip after strip from top to bottom.
    fn strips<A: Copy + Default + Sync>(
        &self,
        pass: &Pass<A>,
        exec: &Exec,
        x: &[f32],
        residual: Option<&[f32]>,
        out: &mut [f32],
    ) {
        let g = &self.geometry;
        let row = g.output[1] * self.project.n();
        let share = g.output[0].div_ceil(exec.threads());
        let bytes = |rows: usize| {
            let floats = rows * (g.stride[0] * g.input[1] + g.output[1]) * g.input[2];
            g.lines_of(rows) * g.line() * size_of::<A>() + floats * size_of::<f32>()
        };
        let strip = (1..=share).rfind(|&rows| bytes(rows) <= 2 * STRIP_BYTES).unwrap_or(1);
        exec.chunks(out, share * row, &|i, out| {
            pass.canvas.with_borrow_mut(|canvas| {
                BETWEEN.with_borrow_mut(|between| {
                    let mut kept = 0;
                    for (s, out) in out.chunks_mut(strip * row).enumerate() {
                        let first = i * share + s * strip;
                        let residual = residual.map(|r| &r[first * row..][..out.len()]);
                        kept = self.strip(pass, exec.kernels, x, residual, out, first, kept, canvas, between);
                    }
                });
            });
        });
    }

    /// Output rows from row `first` on. The canvas holds so many `kept` lines already; returns how many it holds of those
    /// that the next strip begins with.
    #[allow(clippy::too_many_arguments)]
    fn strip<A: Copy + Default + Sync>(
        &self,
        pass: &Pass<A>,
        kernels: &Kernels,
        x: &[f32],
        residual: Option<&[f32]>,
        out: &mut [f32],
        first: usize,
        kept: usize,
        canvas: &mut Vec<A>,
        between: &mut Between,
    ) -> usize {
        let g = &self.geometry;
        let ([h, w, c], line) = (g.input, g.line());
        let rows = out.len() / (g.output[1] * self.project.n());
        let lines = g.lines_of(rows);
        let canvas = room(canvas, lines * line);
        // Lines of the picture that the new lines of the canvas show.
        let top = first * g.stride[0];
        let (from, to) = (top + kept, top + lines);
        let [from_row, to_row] = [from, to].map(|l| l.saturating_sub(g.pads[0]).min(h));
        let expanded = room(&mut between.expanded, (to_row - from_row) * w * c);
        self.expand.run_here(kernels, x, from_row * w, None, expanded);
        let expanded = |y: usize| &expanded[(y - from_row) * w * c..][..w * c];
        g.fill_lines(&expanded, from, &mut canvas[kept * line..], pass.zero, pass.convert);
        let filtered = room(&mut between.filtered, rows * g.output[1] * c);
        pass.rows(canvas, filtered);
        self.project.run_here(kernels, filtered, 0, residual, out);
        let used = (rows * g.stride[0]).min(lines);
        canvas.copy_within(used * line.., 0);
        lines - used
    }
}

#[cfg(test)]
mod tests {
    use super::super::conv::{Conv, Filter};
    use super::super::linear::Weights;
    use super::super::{F32Weights, I8Weights};
    use super::*;
    use crate::model::card::SelfTest;

    fn integer(values: &[f32]) -> Vec<i8> {
        values.iter().map(|v| (v * 100.) as i8).collect()
    }

    /// In strips or one layer after the other: the same to the last bit, for each thread count, stride, padding and kind of
    /// weights.
    #[test]
    fn a_bottleneck_is_its_three_layers() {
        let quant = InputQuant::Static { scale: 1. / 32., zero: 99 };
        for (threads, integers, stride, pads) in
            [(1, true, 1, [1; 4]), (2, true, 1, [1; 4]), (1, true, 2, [0, 1, 1, 0]), (2, false, 2, [1; 4])]
        {
            let exec = Exec::new(threads).expect("threads");
            // Tall enough for several strips.
            let (h, w, k, c, n) = (61, 40, 9, 70, 18);
            let size = |n: usize, pad: usize| (n + pad - 3) / stride + 1;
            let [oh, ow] = [size(h, pads[0] + pads[2]), size(w, pads[1] + pads[3])];
            let (input, output, kernel) = ([h, w, c], [oh, ow, c], [3, 3]);
            let geometry = Geometry { input, output, kernel, stride: [stride; 2], dilation: [1; 2], pads };
            let linear = |seed, n: usize, k: usize, quant, activation| {
                let values = SelfTest::input(seed, n * k);
                let weights = match integers {
                    true => Weights::I8(I8Weights::pack(exec.kernels, n, k, &integer(&values), &vec![0.004; n]), quant),
                    false => Weights::F32(F32Weights::pack(n, k, |row, i| values[row * k + i])),
                };
                Linear::new(weights, &SelfTest::input(seed + 1, n), activation)
            };
            let values = SelfTest::input(5, 9 * c);
            let taps = match integers {
                true => Taps::i8(integer(&values), vec![0.01; c], quant),
                false => Taps::F32(values),
            };
            let bottleneck = Bottleneck {
                expand: linear(1, c, k, InputQuant::PerRow, Activation::Silu),
                geometry,
                depthwise: Depthwise { table: None, taps, bias: SelfTest::input(6, c), activation: Activation::Silu },
                project: linear(7, n, c, quant, Activation::None),
            };
            let (x, residual) = (SelfTest::input(8, h * w * k), SelfTest::input(9, oh * ow * n));
            let mut got = vec![f32::NAN; residual.len()];
            bottleneck.run(&exec, &x, Some(&residual), &mut got);

            let mut expanded = vec![0.; h * w * c];
            bottleneck.expand.run(&exec, &x, None, &mut expanded);
            let mut filtered = vec![0.; oh * ow * c];
            let filter = Filter::Depthwise(bottleneck.depthwise.clone());
            Conv { geometry, filter }.run(&exec, &expanded, &mut filtered);
            let mut want = vec![0.; residual.len()];
            bottleneck.project.run(&exec, &filtered, Some(&residual), &mut want);
            assert!(got == want, "{threads} threads, integers {integers}, stride {stride}");
        }
    }
}

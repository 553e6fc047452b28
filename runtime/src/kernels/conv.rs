//! Integer convolutions: the picture is quantized once into a padded canvas `[y][x][channel]`; a dense convolution
//! then is a linear layer over gathered rows, a depthwise one runs directly.

use super::linear::{InputQuant, Rows, integer_panel, row_quant, widen};
use super::rows::{Activation, RowQuant, Target};
use super::{I8Weights, Kernels, MR_I8, NR};
use crate::exec::Exec;
use std::cell::RefCell;

/// Sizes of a convolution with batch 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Input channels, height, width.
    pub input: [usize; 3],
    /// Output channels, height, width.
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

/// Weights of an integer convolution.
#[derive(Clone, Debug)]
pub enum ConvWeights {
    /// Rows of `[kernel y][kernel x][input channel]`, one an output channel.
    Dense(I8Weights),
    /// One filter a channel: `[tap][channel]` and a scale for each channel.
    Depthwise(Vec<i16>, Vec<f32>),
}

/// `activation(conv(x) + bias)`, NCHW float in and out.
#[derive(Clone, Debug)]
pub struct Conv {
    /// Sizes.
    pub geometry: Geometry,
    /// Quantization of the input; `PerRow` here means one range for the whole picture.
    pub quant: InputQuant,
    /// Weights.
    pub weights: ConvWeights,
    /// Bias, one array for [`NR`] output channels, zero-padded.
    pub bias: Vec<[f32; NR]>,
    /// Function after the bias.
    pub activation: Activation,
}

#[derive(Default)]
struct Scratch {
    plane: Vec<u8>,
    canvas: Vec<u8>,
    rows: Vec<u8>,
    wide: Vec<i16>,
    quants: Vec<RowQuant>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

impl Conv {
    /// Multiply-accumulates.
    pub fn macs(&self) -> usize {
        let g = &self.geometry;
        let taps = g.kernel[0] * g.kernel[1];
        let inputs = if matches!(self.weights, ConvWeights::Dense(_)) { g.input[0] } else { 1 };
        g.output.iter().product::<usize>() * taps * inputs
    }

    /// Runs on one picture `[c][h][w]`.
    pub fn run(&self, exec: &Exec, x: &[f32], out: &mut [f32]) {
        SCRATCH.with_borrow_mut(|s| {
            let quant = self.fill_canvas(exec.kernels, x, s);
            match &self.weights {
                ConvWeights::Dense(weights) => self.dense(exec, weights, quant, s, out),
                ConvWeights::Depthwise(weights, scale) => self.depthwise(exec, weights, scale, quant, s, out),
            }
        });
    }

    fn canvas_width(&self) -> usize {
        self.geometry.input[2] + self.geometry.pads[1] + self.geometry.pads[3]
    }

    /// Quantizes `[c][h][w]` into the canvas; returns the scale and the stored zero.
    fn fill_canvas(&self, kernels: &Kernels, x: &[f32], s: &mut Scratch) -> RowQuant {
        const PIXELS: usize = 64;
        let g = &self.geometry;
        let ([c, h, w], width) = (g.input, self.canvas_width());
        let (scale, inverse, zero) = match self.quant {
            InputQuant::Static { scale, zero } => (scale, 1. / scale, f32::from(zero)),
            InputQuant::PerRow => {
                // SAFETY: `kernels` came from `available`.
                let (low, high) = unsafe { (kernels.rows.range)(x) };
                row_quant(low, high)
            }
        };
        let stored_zero = zero as u8 ^ kernels.flip;
        s.canvas.clear();
        // Tiles may read up to a group past the last pixel.
        s.canvas.resize(((h + g.pads[0] + g.pads[2]) * width + MR_I8) * c + 4, stored_zero);
        s.plane.resize(PIXELS, 0);
        for y in 0..h {
            let row = ((y + g.pads[0]) * width + g.pads[1]) * c;
            for x0 in (0..w).step_by(PIXELS) {
                let n = PIXELS.min(w - x0);
                for ch in 0..c {
                    let plane = &mut s.plane[..n];
                    // SAFETY: as above.
                    unsafe {
                        (kernels.rows.quantize)(&x[(ch * h + y) * w + x0..][..n], inverse, zero, kernels.flip, plane)
                    };
                    let pixels = s.canvas[row + x0 * c + ch..].iter_mut().step_by(c);
                    pixels.zip(plane).for_each(|(o, q)| *o = *q);
                }
            }
        }
        RowQuant { scale, zero: zero as i32 - i32::from(kernels.flip) }
    }

    fn dense(&self, exec: &Exec, weights: &I8Weights, quant: RowQuant, s: &mut Scratch, out: &mut [f32]) {
        let g = &self.geometry;
        let (c, width) = (g.input[0], self.canvas_width());
        let [_, oh, ow] = g.output;
        let (pixels, stride) = (oh * ow, weights.row_bytes());
        let padded = pixels.next_multiple_of(MR_I8);
        let pointwise = g.kernel == [1, 1] && g.stride == [1, 1] && g.pads == [0; 4] && stride == c;
        if !pointwise {
            s.rows.resize(padded * stride, 0);
            for (p, row) in s.rows.chunks_exact_mut(stride).take(pixels).enumerate() {
                let (y, x) = (p / ow * g.stride[0], p % ow * g.stride[1]);
                let contiguous = g.dilation[1] == 1;
                for ky in 0..g.kernel[0] {
                    let at = ((y + ky * g.dilation[0]) * width + x) * c;
                    let line = &mut row[ky * g.kernel[1] * c..][..g.kernel[1] * c];
                    if contiguous {
                        line.copy_from_slice(&s.canvas[at..at + line.len()]);
                    } else {
                        for (kx, tap) in line.chunks_exact_mut(c).enumerate() {
                            tap.copy_from_slice(&s.canvas[at + kx * g.dilation[1] * c..][..c]);
                        }
                    }
                }
            }
        }
        let rows = if pointwise { &s.canvas[..padded * stride] } else { &s.rows[..] };
        widen(weights, rows, &mut s.wide);
        s.quants.clear();
        s.quants.resize(pixels, quant);
        s.quants.resize(padded, RowQuant::default());
        let wide = if weights.needs_wide_rows() { &s.wide[..] } else { &[] };
        let quants = &s.quants[..];
        exec.chunks(out, NR * pixels, &|p, planes| {
            // Pixels at once: their outputs stay in the cache until they are laid out by channel.
            const PIXELS: usize = 64;
            let mut y = [[0.; NR]; PIXELS];
            for m in (0..pixels).step_by(PIXELS) {
                let valid = PIXELS.min(pixels - m);
                let wide = if wide.is_empty() { wide } else { &wide[m * stride..] };
                let part = Rows { bytes: &rows[m * stride..], wide, quants: &quants[m..] };
                let out = y.as_flattened_mut().as_mut_ptr();
                let target = Target { out, residual: std::ptr::null(), stride: NR, rows: valid, columns: NR };
                // SAFETY: the target is the array above.
                unsafe {
                    integer_panel(exec.kernels, weights, p, &part, (&self.bias[p], self.activation), target);
                }
                for (ch, plane) in planes.chunks_exact_mut(pixels).enumerate() {
                    for (o, row) in plane[m..m + valid].iter_mut().zip(&y) {
                        *o = row[ch];
                    }
                }
            }
        });
    }

    fn depthwise(&self, exec: &Exec, weights: &[i16], scale: &[f32], quant: RowQuant, s: &Scratch, out: &mut [f32]) {
        let g = &self.geometry;
        let (c, width) = (g.input[0], self.canvas_width());
        let [_, oh, ow] = g.output;
        let signed = exec.kernels.flip != 0;
        let canvas = &s.canvas[..];
        exec.chunks(out, NR * oh * ow, &|p, planes| {
            let (first, channels) = (p * NR, NR.min(c - p * NR));
            let mut y16 = [[0f32; NR]; 1];
            for pixel in 0..oh * ow {
                let (y, x) = (pixel / ow * g.stride[0], pixel % ow * g.stride[1]);
                let mut sums = [0i32; NR];
                for ky in 0..g.kernel[0] {
                    for kx in 0..g.kernel[1] {
                        let at = ((y + ky * g.dilation[0]) * width + x + kx * g.dilation[1]) * c + first;
                        let taps = &weights[(ky * g.kernel[1] + kx) * c + first..][..channels];
                        let values = &canvas[at..at + channels];
                        for i in 0..channels {
                            let v = if signed { i32::from(values[i] as i8) } else { i32::from(values[i]) };
                            sums[i] += (v - quant.zero) * i32::from(taps[i]);
                        }
                    }
                }
                for i in 0..channels {
                    y16[0][i] = sums[i] as f32 * (quant.scale * scale[first + i]) + self.bias[p][i];
                }
                // SAFETY: `kernels` came from `available`.
                unsafe { (exec.kernels.rows.activate)(self.activation, &mut y16[0]) };
                for i in 0..channels {
                    planes[i * oh * ow + pixel] = y16[0][i];
                }
            }
        });
    }
}

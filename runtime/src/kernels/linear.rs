//! A linear layer over rows: normalize, quantize, multiply, finish, in one pass over blocks of rows.

use super::rows::{Activation, Finish, Norm, RowQuant};
use super::{F32Weights, I8Weights, Kernels, MR_F32, MR_I8, NR};
use crate::exec::Exec;
use std::cell::RefCell;

/// How the rows that enter an integer layer are quantized.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum InputQuant {
    /// One scale and zero point for all rows: x ≈ scale · (q − zero), q in 0…255.
    Static {
        /// Step.
        scale: f32,
        /// Zero point, 0…255 (that of an int8 tensor plus 128).
        zero: u8,
    },
    /// A scale and zero point for each row, from its range.
    PerRow,
}

/// Weights of a linear layer, packed for the kernel in use.
#[derive(Clone, Debug)]
pub enum Weights {
    /// Integer arithmetic.
    I8(I8Weights, InputQuant),
    /// Float arithmetic.
    F32(F32Weights),
}

/// `activation(norm(x) · Wᵀ + bias) + residual` for rows x.
#[derive(Clone, Debug)]
pub struct Linear {
    /// LayerNorm of the input, if fused.
    pub norm: Option<Norm>,
    /// Weights `[n][k]`.
    pub weights: Weights,
    /// Bias, one array a panel, zero-padded.
    pub bias: Vec<[f32; NR]>,
    /// Function after the bias.
    pub activation: Activation,
}

/// Rows handled at once: their quantized form stays in the L1 or L2 cache; a multiple of both tile heights.
const BLOCK: usize = 48;

#[derive(Default)]
struct Scratch {
    normed: Vec<f32>,
    bytes: Vec<u8>,
    wide: Vec<i16>,
    quants: Vec<RowQuant>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Bias in panels of [`NR`].
pub fn bias_panels(bias: &[f32]) -> Vec<[f32; NR]> {
    bias.chunks(NR).map(|c| std::array::from_fn(|i| c.get(i).copied().unwrap_or(0.))).collect()
}

impl Linear {
    /// Inputs.
    pub fn k(&self) -> usize {
        match &self.weights {
            Weights::I8(w, _) => w.k,
            Weights::F32(w) => w.k,
        }
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        match &self.weights {
            Weights::I8(w, _) => w.n,
            Weights::F32(w) => w.n,
        }
    }

    /// Computes rows `x` `[m][k]` into `out` `[m][n]`; `residual` `[m][n]` is added last.
    ///
    /// # Panics
    /// When the lengths do not match.
    pub fn run(&self, exec: &Exec, x: &[f32], residual: Option<&[f32]>, out: &mut [f32]) {
        let (k, n) = (self.k(), self.n());
        assert_eq!(x.len() / k, out.len() / n);
        assert!(residual.is_none_or(|r| r.len() == out.len()));
        let block = exec.block(x.len() / k, BLOCK, 12);
        exec.chunks(out, block * n, &|b, out| {
            let rows = out.len() / n;
            let x = &x[b * block * k..][..rows * k];
            let residual = residual.map(|r| &r[b * block * n..][..rows * n]);
            SCRATCH.with_borrow_mut(|scratch| self.block(exec.kernels, x, residual, out, scratch));
        });
    }

    fn block(&self, kernels: &Kernels, x: &[f32], residual: Option<&[f32]>, out: &mut [f32], s: &mut Scratch) {
        let (k, n) = (self.k(), self.n());
        let x = match &self.norm {
            None => x,
            Some(norm) => {
                s.normed.resize(x.len(), 0.);
                for (x, y) in x.chunks_exact(k).zip(s.normed.chunks_exact_mut(k)) {
                    // SAFETY: `kernels` came from `available`.
                    unsafe { (kernels.rows.layer_norm)(x, norm, y) };
                }
                &s.normed[..]
            }
        };
        match &self.weights {
            Weights::I8(weights, quant) => {
                quantize_rows(kernels, x, k, *quant, weights, &mut s.bytes, &mut s.wide, &mut s.quants);
                integer_block(
                    kernels,
                    weights,
                    &s.bytes,
                    &s.wide,
                    &s.quants,
                    |p, m, y| {
                        store(kernels, y, m, p, n, residual, out);
                    },
                    &self.bias,
                    self.activation,
                );
            }
            Weights::F32(weights) => self.float_block(kernels, weights, x, residual, out),
        }
    }

    fn float_block(&self, kernels: &Kernels, w: &F32Weights, x: &[f32], residual: Option<&[f32]>, out: &mut [f32]) {
        let (k, n) = (w.k, w.n);
        let rows = x.len() / k;
        for p in 0..n.div_ceil(NR) {
            let panel = w.panel(p);
            for m in (0..rows).step_by(MR_F32) {
                // Past the end, the last row again.
                let pointers = std::array::from_fn(|i| x[(m + i).min(rows - 1) * k..].as_ptr());
                let mut y = [[0.; NR]; MR_F32];
                // SAFETY: `kernels` came from `available`; each row holds k floats, the panel k·NR.
                unsafe { (kernels.tile_f32)(&pointers, k, panel.as_ptr(), &mut y) };
                for row in &mut y {
                    // SAFETY: as above.
                    unsafe { (kernels.rows.add)(row, &self.bias[p]) };
                }
                if self.activation != Activation::None {
                    // SAFETY: as above.
                    unsafe { (kernels.rows.activate)(self.activation, y.as_flattened_mut()) };
                }
                let valid = MR_F32.min(rows - m);
                store(kernels, &mut y[..valid], m, p, n, residual, out);
            }
        }
    }
}

/// Writes a tile's rows from row `m`, panel `p` into `out` `[rows][n]`, adding the residual.
fn store(
    kernels: &Kernels,
    tile: &mut [[f32; NR]],
    m: usize,
    p: usize,
    n: usize,
    residual: Option<&[f32]>,
    out: &mut [f32],
) {
    let columns = NR.min(n - p * NR);
    for (i, row) in tile.iter_mut().enumerate() {
        let at = (m + i) * n + p * NR;
        if let Some(r) = residual {
            // SAFETY: `kernels` came from `available`.
            unsafe { (kernels.rows.add)(&mut row[..columns], &r[at..at + columns]) };
        }
        out[at..at + columns].copy_from_slice(&row[..columns]);
    }
}

/// Scale and zero point of a row with values in `low..=high` (0 included), and the inverse scale.
pub fn row_quant(low: f32, high: f32) -> (f32, f32, f32) {
    let width = high - low;
    if width < 1e-30 || !width.is_finite() {
        return (1., 1., 0.);
    }
    let scale = width / 255.;
    (scale, 255. / width, (-low / scale).round())
}

/// Quantizes rows `[m][k]` into bytes and, where the weights want it, 16-bit values; `m` is rounded up to the tile.
#[allow(clippy::too_many_arguments)]
pub fn quantize_rows(
    kernels: &Kernels,
    x: &[f32],
    k: usize,
    quant: InputQuant,
    weights: &I8Weights,
    bytes: &mut Vec<u8>,
    wide: &mut Vec<i16>,
    quants: &mut Vec<RowQuant>,
) {
    let rows = x.len() / k;
    let stride = weights.row_bytes();
    let padded = rows.next_multiple_of(MR_I8);
    let offset = i32::from(kernels.flip);
    bytes.resize(padded * stride, 0);
    quants.clear();
    for (x, q) in x.chunks_exact(k).zip(bytes.chunks_exact_mut(stride)) {
        let (scale, inverse, zero) = match quant {
            InputQuant::Static { scale, zero } => (scale, 1. / scale, f32::from(zero)),
            InputQuant::PerRow => {
                // SAFETY: `kernels` came from `available`.
                let (low, high) = unsafe { (kernels.rows.range)(x) };
                row_quant(low, high)
            }
        };
        // SAFETY: as above.
        unsafe { (kernels.rows.quantize)(x, inverse, zero, kernels.flip, &mut q[..k]) };
        quants.push(RowQuant { scale, zero: zero as i32 - offset });
    }
    quants.resize(padded, RowQuant::default());
    widen(weights, bytes, wide);
}

/// Copies bytes to 16 bits where the weights want it.
pub fn widen(weights: &I8Weights, bytes: &[u8], wide: &mut Vec<i16>) {
    if weights.needs_wide_rows() {
        wide.clear();
        wide.extend(bytes.iter().map(|&b| i16::from(b)));
    }
}

/// Multiplies quantized rows with all panels; `store(panel, row, tile rows)` takes the finished values.
#[allow(clippy::too_many_arguments)]
pub fn integer_block(
    kernels: &Kernels,
    weights: &I8Weights,
    bytes: &[u8],
    wide: &[i16],
    quants: &[RowQuant],
    mut store: impl FnMut(usize, usize, &mut [[f32; NR]]),
    bias: &[[f32; NR]],
    activation: Activation,
) {
    for (p, bias) in bias.iter().enumerate() {
        integer_panel(kernels, weights, p, bytes, wide, quants, &mut |m, y| store(p, m, y), bias, activation);
    }
}

/// One panel of [`integer_block`].
#[allow(clippy::too_many_arguments)]
pub fn integer_panel(
    kernels: &Kernels,
    weights: &I8Weights,
    p: usize,
    bytes: &[u8],
    wide: &[i16],
    quants: &[RowQuant],
    store: &mut dyn FnMut(usize, &mut [[f32; NR]]),
    bias: &[f32; NR],
    activation: Activation,
) {
    let stride = weights.row_bytes();
    let panel = &weights.panels[p];
    let finish = Finish { scale: &panel.scale, sum: &panel.sum, bias, activation };
    // Rows added to fill the last tile have no scale.
    let rows = quants.iter().rposition(|q| q.scale != 0.).map_or(0, |r| r + 1);
    for m in (0..rows).step_by(MR_I8) {
        let pointers: [*const u8; MR_I8] = std::array::from_fn(|i| match panel.is_wide() {
            true => wide[(m + i) * stride..].as_ptr().cast(),
            false => bytes[(m + i) * stride..].as_ptr(),
        });
        let mut sums = [[0; NR]; MR_I8];
        let mut y = [[0.; NR]; MR_I8];
        let row_quants = quants[m..m + MR_I8].try_into().expect("padded to the tile");
        // SAFETY: `kernels` came from `available`; rows hold `row_bytes` activations of the panel's kind.
        unsafe {
            (kernels.tile_i8)(&pointers, panel, &mut sums);
            (kernels.rows.finish_i8)(&sums, row_quants, &finish, &mut y);
        }
        store(m, &mut y[..MR_I8.min(rows - m)]);
    }
}

//! A linear layer over rows: normalize, quantize, multiply, finish, in one pass over blocks of rows.

use super::requantize::{ByteTable, Grid, Quantizer, Table};
use super::rows::{Activation, Norm, Quants, RowQuant, Target};
use super::{F32Weights, FloatJob, I8Weights, Kernels, MR_F32, MR_I8, NR, PanelJob, room};
use crate::exec::Exec;
use std::cell::RefCell;
use std::ops::Range;

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
    /// A scale and zero point for all rows, from their range.
    Whole,
}

impl InputQuant {
    /// Scale, inverse scale and zero point for values that share a range.
    pub fn parameters(self, kernels: &Kernels, x: &[f32]) -> (f32, f32, f32) {
        match self {
            InputQuant::Static { scale, zero } => (scale, 1. / scale, f32::from(zero)),
            // SAFETY: `kernels` came from `available`.
            InputQuant::PerRow | InputQuant::Whole => row_quant(unsafe { (kernels.rows.range)(x) }),
        }
    }
}

/// Weights of a linear layer, packed for the kernel in use.
#[derive(Clone, Debug)]
pub enum Weights {
    /// Integer arithmetic.
    I8(I8Weights, InputQuant),
    /// Float arithmetic.
    F32(F32Weights),
}

/// `activation(factors · norm(x) · Wᵀ + bias) + residual` for rows x.
#[derive(Clone, Debug)]
pub struct Linear {
    /// LayerNorm of the input, if fused.
    pub norm: Option<Norm>,
    /// Factor of each input before it is quantized, if there are any: they even out what a static scale must reach.
    pub factors: Option<Vec<f32>>,
    /// Function of the input, which integer weights quantize with a static scale, if fused.
    pub table: Option<ByteTable>,
    /// Weights `[n][k]`.
    pub weights: Weights,
    /// Bias, one array a panel, zero-padded.
    pub bias: Vec<[f32; NR]>,
    /// Function after the bias.
    pub activation: Activation,
    /// What follows, in this order; where there is something, the residual is added by its [`Step::Residual`].
    pub then: Vec<Step>,
    /// Which row of the input each output row is made of; none where they lie in the same order.
    pub order: Vec<u32>,
}

/// What happens to finished rows, in files that round to integers between operators.
#[derive(Clone, Debug)]
pub enum Step {
    /// Rounding.
    Round(Grid),
    /// Rounding and an element-wise function.
    Table(Table),
    /// Adding the residual.
    Residual,
}

/// Rows handled at once, at most: half of the 197 tokens of a ViT in whole tiles, so that each of two threads reads the weights
/// once (15.9 instead of 16.6 ms for DeiT-Small, measured); with all of them what lies between two layers would leave the cache.
pub(super) const BLOCK: usize = 102;

/// Rows whose ranges are found before the first of them is quantized.
const TOGETHER: usize = 8;

/// Rows that a block is made of: `rows` of them from `first` on, in the layer's order.
#[derive(Clone, Copy)]
struct Source<'a> {
    x: &'a [f32],
    first: usize,
    rows: usize,
}

#[derive(Default)]
struct Scratch {
    /// Rows as they are quantized.
    prepared: Vec<f32>,
    rows: Quantized,
}

/// Quantized rows, padded to whole tiles.
#[derive(Default)]
struct Quantized {
    bytes: Vec<u8>,
    wide: Vec<i16>,
    quants: Vec<RowQuant>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
    static HIDDEN: RefCell<Vec<f32>> = RefCell::default();
}

/// Bias in panels of [`NR`].
fn bias_panels(bias: &[f32]) -> Vec<[f32; NR]> {
    bias.chunks(NR).map(|c| std::array::from_fn(|i| c.get(i).copied().unwrap_or(0.))).collect()
}

impl Linear {
    /// Weights and what every layer has; nothing else before or after.
    pub fn new(weights: Weights, bias: &[f32], activation: Activation) -> Linear {
        let bias = bias_panels(bias);
        Linear { norm: None, factors: None, table: None, weights, bias, activation, then: vec![], order: vec![] }
    }

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

    fn tile_rows(&self) -> usize {
        match self.weights {
            Weights::I8(..) => MR_I8,
            Weights::F32(_) => MR_F32,
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
        let block = exec.block(x.len() / k, BLOCK, self.tile_rows());
        let quant = self.quant(exec.kernels, x);
        exec.chunks(out, block * n, &|b, out| {
            let (first, rows) = (b * block, out.len() / n);
            let residual = residual.map(|r| &r[first * n..][..rows * n]);
            let x = Source { x, first, rows };
            SCRATCH.with_borrow_mut(|scratch| self.block(exec.kernels, x, quant, residual, out, scratch));
        });
    }

    /// Computes `second(self(x))` block by block, so that what lies between stays in the cache; `residual` is added to
    /// the second layer's output. The second must not [read its rows as a whole](Linear::reads_whole).
    ///
    /// # Panics
    /// When the lengths do not match.
    pub fn run_with(&self, second: &Linear, exec: &Exec, x: &[f32], residual: Option<&[f32]>, out: &mut [f32]) {
        let (k, n) = (self.k(), second.n());
        assert_eq!(self.n(), second.k());
        assert_eq!(x.len() / k, out.len() / n);
        let block = exec.block(x.len() / k, BLOCK, self.tile_rows());
        let (quant, then) = (self.quant(exec.kernels, x), second.quant(exec.kernels, &[]));
        exec.chunks(out, block * n, &|b, out| {
            let (first, rows) = (b * block, out.len() / n);
            let residual = residual.map(|r| &r[first * n..][..rows * n]);
            HIDDEN.with_borrow_mut(|hidden| {
                let hidden = room(hidden, rows * self.n());
                SCRATCH.with_borrow_mut(|scratch| {
                    self.block(exec.kernels, Source { x, first, rows }, quant, None, hidden, scratch);
                    let hidden = Source { x: hidden, first: 0, rows };
                    second.block(exec.kernels, hidden, then, residual, out, scratch);
                });
            });
        });
    }

    /// As [`Linear::run`] for rows from `start` on, on the caller's thread alone. The layer must not [read its rows as a
    /// whole](Linear::reads_whole).
    ///
    /// # Panics
    /// When the lengths do not match.
    pub fn run_here(&self, kernels: &Kernels, x: &[f32], start: usize, residual: Option<&[f32]>, out: &mut [f32]) {
        let n = self.n();
        assert!(start + out.len() / n <= x.len() / self.k());
        assert!(residual.is_none_or(|r| r.len() == out.len()));
        let quant = self.quant(kernels, &[]);
        SCRATCH.with_borrow_mut(|scratch| {
            for (b, out) in out.chunks_mut(BLOCK * n).enumerate() {
                let (first, rows) = (start + b * BLOCK, out.len() / n);
                let residual = residual.map(|r| &r[b * BLOCK * n..][..rows * n]);
                self.block(kernels, Source { x, first, rows }, quant, residual, out, scratch);
            }
        });
    }

    /// Whether its rows share a range, so that all of them must be there before the first is quantized.
    pub fn reads_whole(&self) -> bool {
        matches!(self.weights, Weights::I8(_, InputQuant::Whole))
    }

    /// How its rows `x` are quantized, a range that they share already found.
    fn quant(&self, kernels: &Kernels, x: &[f32]) -> InputQuant {
        match self.weights {
            Weights::I8(_, InputQuant::Whole) => {
                let (scale, _, zero) = InputQuant::Whole.parameters(kernels, x);
                InputQuant::Static { scale, zero: zero as u8 }
            }
            Weights::I8(_, quant) => quant,
            Weights::F32(_) => InputQuant::PerRow,
        }
    }

    fn block(
        &self,
        kernels: &Kernels,
        source: Source,
        quant: InputQuant,
        residual: Option<&[f32]>,
        out: &mut [f32],
        s: &mut Scratch,
    ) {
        let added = residual.filter(|_| self.then.is_empty());
        match &self.weights {
            Weights::I8(weights, _) => {
                self.quantize_rows(kernels, source, quant, weights, s);
                let Quantized { bytes, wide, quants } = &s.rows;
                let quants = match quant {
                    InputQuant::Static { .. } => Quants::Shared(quants[0]),
                    _ => Quants::Each(quants),
                };
                let rows = Rows { bytes, wide, quants };
                self.integer_block(kernels, weights, &rows, added, out);
            }
            Weights::F32(_) => {
                let x = self.prepared(kernels, source, &mut s.prepared, &mut []);
                self.float_block(kernels, x, added, out);
            }
        }
        self.follow(kernels, residual, out);
    }

    /// What [follows](Linear::then) finished rows.
    pub fn follow(&self, kernels: &Kernels, residual: Option<&[f32]>, out: &mut [f32]) {
        for step in &self.then {
            match step {
                Step::Round(grid) => grid.round(kernels, out),
                Step::Table(table) => table.apply(kernels, out),
                Step::Residual => {
                    let residual = residual.expect("a residual for its step");
                    // SAFETY: `kernels` came from `available`.
                    unsafe { (kernels.rows.add)(out, residual) };
                }
            }
        }
    }

    /// Rows in the layer's order, normalized and multiplied by the factors, in `buffer` where they are not so already; and
    /// the range of each if `ranges` has as many.
    fn prepared<'a>(
        &self,
        kernels: &Kernels,
        Source { x, first, rows }: Source<'a>,
        buffer: &'a mut Vec<f32>,
        ranges: &mut [(f32, f32)],
    ) -> &'a [f32] {
        let k = self.k();
        let row = |i: usize| &x[self.order.get(first + i).map_or(first + i, |&row| row as usize) * k..][..k];
        let prepared = match (&self.norm, &self.factors) {
            (None, None) if self.order.is_empty() => &x[first * k..][..rows * k],
            (Some(norm), None) => {
                let prepared = room(buffer, rows * k);
                kernels.layer_norm(norm, row, prepared, ranges);
                return prepared;
            }
            (Some(norm), Some(factors)) => {
                let prepared = room(buffer, rows * k);
                kernels.layer_norm(norm, row, prepared, &mut []);
                for y in prepared.chunks_exact_mut(k) {
                    y.iter_mut().zip(factors).for_each(|(y, f)| *y *= f);
                }
                prepared
            }
            (None, factors) => {
                let prepared = room(buffer, rows * k);
                for (i, y) in prepared.chunks_exact_mut(k).enumerate() {
                    match factors {
                        // SAFETY: `kernels` came from `available`.
                        Some(factors) => unsafe { (kernels.rows.times)(row(i), factors, y) },
                        None => y.copy_from_slice(row(i)),
                    }
                }
                prepared
            }
        };
        for (range, x) in ranges.iter_mut().zip(prepared.chunks_exact(k)) {
            // SAFETY: as above.
            *range = unsafe { (kernels.rows.range)(x) };
        }
        prepared
    }

    /// Quantizes rows into bytes and, where the weights want it, 16-bit values, rounded up to whole tiles.
    fn quantize_rows(
        &self,
        kernels: &Kernels,
        source: Source,
        quant: InputQuant,
        weights: &I8Weights,
        Scratch { prepared, rows }: &mut Scratch,
    ) {
        let (k, stride) = (weights.k, weights.row_bytes());
        let padded = source.rows.next_multiple_of(MR_I8);
        let offset = i32::from(kernels.flip);
        let bytes = room(&mut rows.bytes, padded * stride);
        rows.quants.clear();
        // A few rows at a time stay in the first-level cache. Their parameters first: each waits for divisions, which those
        // of the others do not.
        for (i, bytes) in bytes[..source.rows * stride].chunks_mut(TOGETHER * stride).enumerate() {
            let few = Source { first: source.first + i * TOGETHER, rows: bytes.len() / stride, ..source };
            let mut ranges = [(0., 0.); TOGETHER];
            let wanted = if quant == InputQuant::PerRow { few.rows } else { 0 };
            let x = self.prepared(kernels, few, prepared, &mut ranges[..wanted]);
            let parameters = match quant {
                InputQuant::PerRow => ranges.map(row_quant),
                _ => [quant.parameters(kernels, &[]); TOGETHER],
            };
            let each = x.chunks_exact(k).zip(bytes.chunks_exact_mut(stride));
            for ((x, q), (scale, inverse, zero)) in each.zip(parameters) {
                let quantizer = Quantizer { table: self.table.as_ref(), inverse, zero, flip: kernels.flip };
                quantizer.quantize(kernels, x, &mut q[..k]);
                rows.quants.push(RowQuant { scale, zero: zero as i32 - offset });
            }
        }
        rows.quants.resize(padded, RowQuant::default());
        widen(weights, bytes, &mut rows.wide);
    }

    /// Multiplies quantized rows with all panels; `out` `[m][n]` says how many of the (padded) rows there are.
    ///
    /// # Panics
    /// When there are fewer rows than `out` has.
    pub fn integer_block(
        &self,
        kernels: &Kernels,
        weights: &I8Weights,
        rows: &Rows,
        residual: Option<&[f32]>,
        out: &mut [f32],
    ) {
        let target = output(self.n(), residual, out);
        let full = self.n() / NR;
        let mut p = 0;
        while p < self.bias.len() {
            let next = if kernels.pairs && p + 2 <= full { p + 2 } else { p + 1 };
            let target = target.from(0, p * NR, target.rows, NR);
            // SAFETY: the target lies inside `out` and `residual`.
            unsafe { integer_panels(kernels, weights, p..next, rows, (&self.bias, self.activation), target) };
            p = next;
        }
    }

    /// Multiplies rows `x` `[m][k]` with all panels of float weights.
    ///
    /// # Panics
    /// When the weights are integers or the lengths do not match.
    pub fn float_block(&self, kernels: &Kernels, x: &[f32], residual: Option<&[f32]>, out: &mut [f32]) {
        let Weights::F32(w) = &self.weights else { panic!("integer weights") };
        let k = w.k;
        let rows = x.len() / k;
        assert_eq!(rows * self.n(), out.len());
        let target = output(self.n(), residual, out);
        let (bias, activation) = (&self.bias, self.activation);
        let job = FloatJob { rows: x.as_ptr(), stride: k, k, panels: &w.panels, bias, activation, target };
        // SAFETY: `kernels` came from `available`; there are as many rows of k floats as the target has, which lies inside
        // `out` and `residual`.
        unsafe { (kernels.panels_f32)(&job) };
    }
}

/// Rows `[rows][n]` to fill, and what to add to them.
fn output(n: usize, residual: Option<&[f32]>, out: &mut [f32]) -> Target {
    assert!(residual.is_none_or(|r| r.len() == out.len()));
    let residual = residual.map_or(std::ptr::null(), <[f32]>::as_ptr);
    Target { out: out.as_mut_ptr(), residual, stride: n, rows: out.len() / n, columns: n }
}

/// Scale and zero point of a row with values in `low..=high` (0 included), and the inverse scale.
#[inline(always)]
pub fn row_quant((low, high): (f32, f32)) -> (f32, f32, f32) {
    let width = high - low;
    // Without a branch, so that several are computed at once.
    let usable = (1e-30..f32::INFINITY).contains(&width);
    let (low, width) = if usable { (low, width) } else { (0., 255.) };
    let scale = width / 255.;
    // Half up, for a number that is not negative.
    // SAFETY: −low is in 0…width.
    (scale, 255. / width, unsafe { (-low / scale + 0.5).to_int_unchecked::<i32>() } as f32)
}

/// Copies bytes to 16 bits where the weights want it.
pub fn widen(weights: &I8Weights, bytes: &[u8], wide: &mut Vec<i16>) {
    if weights.needs_wide_rows() {
        wide.clear();
        wide.extend(bytes.iter().map(|&b| i16::from(b)));
    }
}

/// Quantized rows, padded to whole tiles.
pub struct Rows<'a> {
    /// As bytes.
    pub bytes: &'a [u8],
    /// As i16, where the weights want it.
    pub wide: &'a [i16],
    /// How they were quantized.
    pub quants: Quants<'a>,
}

/// Multiplies quantized rows with one panel into the target, or with two if the kernel takes pairs.
///
/// # Safety
/// The target's pointers must be valid for its rows and columns, of each panel.
///
/// # Panics
/// When there are fewer rows than the target wants, rounded up to the tile.
unsafe fn integer_panels(
    kernels: &Kernels,
    weights: &I8Weights,
    panels: Range<usize>,
    rows: &Rows,
    (bias, activation): (&[[f32; NR]], Activation),
    target: Target,
) {
    let panel = &weights.panels[panels.start];
    let stride = weights.row_bytes();
    let needed = target.rows.next_multiple_of(MR_I8);
    let (first, stride) = if panel.is_wide() {
        assert!(rows.wide.len() >= needed * stride);
        (rows.wide.as_ptr().cast(), stride * 2)
    } else {
        assert!(rows.bytes.len() >= needed * stride);
        (rows.bytes.as_ptr(), stride)
    };
    assert!(!matches!(rows.quants, Quants::Each(quants) if quants.len() < needed));
    let job = PanelJob {
        rows: first,
        stride,
        quants: rows.quants,
        panel,
        bias: &bias[panels.start],
        next: &weights.panels[panels.end..weights.panels.len().min(panels.end + panels.len())],
        second: (panels.len() == 2).then(|| (&weights.panels[panels.start + 1], &bias[panels.start + 1])),
        activation,
        target,
    };
    // SAFETY: `kernels` came from `available`; there are enough rows of the panel's kind; the target by contract.
    unsafe { (kernels.panel_i8)(&job) };
}

//! What happens to a row before and after a matrix tile: normalize, quantize, rescale, activate. Generic source; the
//! instruction-set modules compile it with their features.

use super::depthwise::DepthwiseRow;
use super::math::{self, fma};
use super::requantize::Grid;
use super::{MR_I8, NR, PanelJob, TileF32, TileI8};

/// LayerNorm's parameters, `[k]` each.
#[derive(Clone, Debug, PartialEq)]
pub struct Norm {
    /// Multiplier.
    pub gamma: Vec<f32>,
    /// Addend.
    pub beta: Vec<f32>,
    /// Added to the variance.
    pub epsilon: f32,
}

/// Element-wise function after a linear layer or a convolution.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Activation {
    /// Identity.
    #[default]
    None,
    /// max(x, 0).
    Relu,
    /// x·Φ(x) by erf.
    Gelu,
    /// x·Φ(x) by tanh.
    GeluTanh,
    /// x·σ(x), also called swish.
    Silu,
    /// min(max(x, 0), 6).
    Relu6,
    /// x·clamp(x/6 + 1/2, 0, 1).
    HardSwish,
    /// σ(x).
    Sigmoid,
}

/// How a row was quantized: x ≈ scale · (stored − zero), where `stored` is what the integer tile reads.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RowQuant {
    /// Step.
    pub scale: f32,
    /// Stored value of 0.
    pub zero: i32,
}

/// How the rows of a job were quantized.
#[derive(Clone, Copy, Debug)]
pub enum Quants<'a> {
    /// All alike: the zero point's share and the scale are the same for each row of a panel, found once.
    Shared(RowQuant),
    /// Each by itself; [`MR_I8`] a tile.
    Each(&'a [RowQuant]),
}

/// Where a tile's finished rows go: `out[row · stride + column]`, after adding the same element of the residual.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// First element of the tile in the output.
    pub out: *mut f32,
    /// First element of the tile in the residual, or null.
    pub residual: *const f32,
    /// Elements from one row to the next, in both.
    pub stride: usize,
    /// Rows to write.
    pub rows: usize,
    /// Columns to write: at most [`NR`], but where several panels are multiplied at once.
    pub columns: usize,
}

impl Target {
    /// The part of at most `rows` rows from row `m` and `columns` columns from column `n` on.
    #[inline(always)]
    pub fn from(&self, m: usize, n: usize, rows: usize, columns: usize) -> Target {
        let at = m * self.stride + n;
        let residual = if self.residual.is_null() { self.residual } else { self.residual.wrapping_add(at) };
        let (rows, columns) = (rows.min(self.rows - m), columns.min(self.columns - n));
        Target { out: self.out.wrapping_add(at), residual, stride: self.stride, rows, columns }
    }
}

/// Turns integer sums of channels into floats: `(sum + offset) · factor + bias`, each one a channel.
pub struct ChannelScale<'a> {
    /// What takes off the zero point's share.
    pub offset: &'a [i32],
    /// Scale of the input times that of the weights.
    pub factor: &'a [f32],
    /// Bias.
    pub bias: &'a [f32],
    /// Function after that, as coarse as [`activate_integers`] is.
    pub activation: Activation,
}

/// Integer products of four rows with columns of weights: `tiles[panel][row][column] + rows[row] + columns[panel][column]`,
/// where the last two take off what zero points add; it fits 32 bits, what is between may wrap.
pub struct Products<'a> {
    /// As tiles leave them.
    pub tiles: &'a [TileI8],
    /// Of each row.
    pub rows: [i32; MR_I8],
    /// Of each column.
    pub columns: &'a [[i32; NR]],
}

/// `n` rows of `width` values, `stride` apart.
pub struct RowsOf<'a> {
    /// Values.
    pub x: &'a [f32],
    /// How many.
    pub n: usize,
    /// Values of a row.
    pub width: usize,
    /// From one row to the next.
    pub stride: usize,
}

impl RowsOf<'_> {
    /// A row, if it is there.
    #[inline(always)]
    pub fn row(&self, i: usize) -> Option<&[f32]> {
        (i < self.n).then(|| &self.x[i * self.stride..][..self.width])
    }
}

/// Two factors of each column of a panel, as tiles of 16-bit products read them.
pub type PairsI16 = [[i16; 2]; NR];

/// The row routines of one instruction set. They are safe to call only on a CPU that has it, which
/// [`super::available`] checks.
pub struct RowFns {
    /// Smallest and largest value of a row, 0 included.
    pub range: unsafe fn(x: &[f32]) -> (f32, f32),
    /// Quantizes: `stored = clamp(round(x · inverse) + zero, 0, 255) ^ flip`, ties to even.
    pub quantize: unsafe fn(x: &[f32], inverse: f32, zero: f32, flip: u8, out: &mut [u8]),
    /// Quantizes four rows of products: `clamp(round(product · factor) + zero, 0, 255)`, ties to even, into `out` `[row][column]`.
    pub codes: unsafe fn(products: &Products, factor: f32, zero: f32, out: &mut [u8]),
    /// `x = table[x]` in place.
    pub lookup: unsafe fn(table: &[u8; 256], x: &mut [u8]),
    /// The sum of `table[x]`, for at most 2²⁴ values.
    pub lookup_sum: unsafe fn(table: &[u8; 256], x: &[u8]) -> u32,
    /// Largest magnitude in rows; not a number where a value is none.
    pub magnitude: unsafe fn(rows: &RowsOf) -> f32,
    /// Rounds `x · scale`, which must lie within i16, ties to even.
    pub round_i16: unsafe fn(x: &[f32], scale: f32, out: &mut [i16]),
    /// Rounds keys times `scale` into panels of [`NR`] of them, `[pairs of elements][NR]`; zeros where there is none.
    pub pack_keys: unsafe fn(keys: &RowsOf, scale: f32, panels: &mut [PairsI16]),
    /// Rounds values times `scale` into panels of [`NR`] of their elements, `[pairs of values][NR]`; zeros where there is none.
    pub pack_values: unsafe fn(values: &RowsOf, scale: f32, panels: &mut [PairsI16]),
    /// LayerNorm of rows into `out` `[row][k]`, and the [range](RowFns::range) of each result where `ranges` has room.
    pub layer_norm: LayerNorm,
    /// Applies an activation in place.
    pub activate: unsafe fn(activation: Activation, x: &mut [f32]),
    /// `scale · clamp(round(x · factor / scale), low, high)` in place, ties to even; NaN becomes the lowest.
    pub round: unsafe fn(x: &mut [f32], factor: f32, grid: Grid),
    /// x[i] = x[i] + y[i].
    pub add: unsafe fn(x: &mut [f32], y: &[f32]),
    /// out[i] = x[i] · y[i].
    pub times: unsafe fn(x: &[f32], y: &[f32], out: &mut [f32]),
    /// `exp(scale · x − largest)` of the first `n` values in place, those after them any value; returns the factor
    /// that makes the `n` sum to 1: a softmax before its last step. `x` is a multiple of [`LANES`] long.
    pub exponentials: unsafe fn(x: &mut [f32], n: usize, scale: f32) -> f32,
    /// The same in integers, for as many rows as there are factors: `round(largest · exp(scale · x − largest of the row))` of
    /// the first `n` values, those after them 0, relative error below 1e-4 before it is rounded; a factor makes its row's `n` sum to
    /// 1, and is not a number where a softmax is none. Rows are a multiple of [`LANES`] long and left with any values.
    pub softmax_i16: SoftmaxI16,
    /// A row of outputs of an integer depthwise convolution, finished.
    pub depthwise_i8: unsafe fn(row: &DepthwiseRow<u8, i8>, finish: &ChannelScale, out: &mut [f32]),
    /// A row of outputs of a float depthwise convolution: `sum + bias`.
    pub depthwise_f32: unsafe fn(row: &DepthwiseRow<f32, f32>, bias: &[f32], out: &mut [f32]),
}

/// See [`RowFns::softmax_i16`].
pub type SoftmaxI16 =
    unsafe fn(x: &mut [f32], n: usize, scale: f32, largest: f32, out: &mut [i16], factors: &mut [f32]);

/// See [`RowFns::layer_norm`].
pub type LayerNorm = unsafe fn(rows: &[&[f32]], norm: &Norm, out: &mut [f32], ranges: &mut [(f32, f32)]);

/// Lanes that reductions keep apart, so that they vectorize.
pub const LANES: usize = 16;

#[inline(always)]
fn reduce(x: &[f32], init: f32, f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut acc = [init; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for c in chunks {
        for i in 0..LANES {
            acc[i] = f(acc[i], c[i]);
        }
    }
    for (a, &v) in acc.iter_mut().zip(rest) {
        *a = f(*a, v);
    }
    fold(acc, f)
}

/// Joins the lanes half by half: a chain of sixteen would wait for each step.
#[inline(always)]
fn fold(mut acc: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            acc[i] = f(acc[i], acc[i + half]);
        }
        half /= 2;
    }
    acc[0]
}

#[inline(always)]
pub fn larger(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

#[inline(always)]
pub fn smaller(a: f32, b: f32) -> f32 {
    if b < a { b } else { a }
}

#[inline(always)]
pub fn range(x: &[f32]) -> (f32, f32) {
    let (mut low, mut high) = ([0f32; LANES], [0f32; LANES]);
    let (chunks, rest) = x.as_chunks::<LANES>();
    for c in chunks {
        for i in 0..LANES {
            low[i] = smaller(low[i], c[i]);
            high[i] = larger(high[i], c[i]);
        }
    }
    for ((low, high), &v) in low.iter_mut().zip(&mut high).zip(rest) {
        *low = smaller(*low, v);
        *high = larger(*high, v);
    }
    (fold(low, smaller), fold(high, larger))
}

/// The code of a value that is `steps` steps from 0.
#[inline(always)]
fn code(steps: f32, zero: f32) -> u8 {
    let q = steps.round_ties_even() + zero;
    // NaN becomes 0, as in a saturating cast.
    let q = if q > 0. { q } else { 0. };
    let q = if q < 255. { q } else { 255. };
    // SAFETY: q is in 0…255.
    (unsafe { q.to_int_unchecked::<i32>() }) as u8
}

#[inline(always)]
pub fn quantize(x: &[f32], inverse: f32, zero: f32, flip: u8, out: &mut [u8]) {
    for (o, &v) in out.iter_mut().zip(x) {
        *o = code(v * inverse, zero) ^ flip;
    }
}

#[inline(always)]
pub fn codes(products: &Products, factor: f32, zero: f32, out: &mut [u8]) {
    let width = products.tiles.len() * NR;
    for (p, (tile, columns)) in products.tiles.iter().zip(products.columns).enumerate() {
        for (m, (sums, row)) in tile.iter().zip(products.rows).enumerate() {
            let out: &mut [u8; NR] = out[m * width + p * NR..].first_chunk_mut().expect("room for a tile");
            for n in 0..NR {
                out[n] = code(sums[n].wrapping_add(row).wrapping_add(columns[n]) as f32 * factor, zero);
            }
        }
    }
}

#[inline(always)]
pub fn lookup(table: &[u8; 256], x: &mut [u8]) {
    x.iter_mut().for_each(|v| *v = table[usize::from(*v)]);
}

#[inline(always)]
pub fn lookup_sum(table: &[u8; 256], x: &[u8]) -> u32 {
    x.iter().map(|v| u32::from(table[usize::from(*v)])).sum()
}

#[inline(always)]
pub fn layer_norm<const FMA: bool>(rows: &[&[f32]], norm: &Norm, out: &mut [f32], ranges: &mut [(f32, f32)]) {
    for (i, (x, out)) in rows.iter().zip(out.chunks_exact_mut(norm.gamma.len())).enumerate() {
        normalize::<FMA>(x, norm, out);
        if let Some(r) = ranges.get_mut(i) {
            *r = range(out);
        }
    }
}

#[inline(always)]
fn normalize<const FMA: bool>(x: &[f32], norm: &Norm, out: &mut [f32]) {
    let n = x.len() as f32;
    let mean = reduce(x, 0., |a, v| a + v) / n;
    let mut acc = [0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for c in chunks {
        for i in 0..LANES {
            let d = c[i] - mean;
            acc[i] = fma::<FMA>(d, d, acc[i]);
        }
    }
    for (a, &v) in acc.iter_mut().zip(rest) {
        *a += (v - mean) * (v - mean);
    }
    let variance = fold(acc, |a, v| a + v) / n;
    let r = 1.0 / (variance + norm.epsilon).sqrt();
    let (gamma, beta) = (&norm.gamma[..x.len()], &norm.beta[..x.len()]);
    let out = &mut out[..x.len()];
    for i in 0..x.len() {
        out[i] = fma::<FMA>((x[i] - mean) * r, gamma[i], beta[i]);
    }
}

/// Applies `f` to [`LANES`] values at a time: with more at once the compiler runs out of registers.
#[inline(always)]
fn each(x: &mut [f32], f: impl Fn(f32) -> f32) {
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    for c in chunks {
        for v in c {
            *v = f(*v);
        }
        // SAFETY: does nothing. The compiler must not vectorize across chunks: with AVX-512 it would gather and scatter.
        unsafe { std::arch::asm!("", options(nomem, nostack, preserves_flags)) };
    }
    for v in rest {
        *v = f(*v);
    }
}

#[inline(always)]
pub fn activate<const FMA: bool>(activation: Activation, x: &mut [f32]) {
    match activation {
        Activation::None => {}
        Activation::Relu => each(x, |v| larger(0., v)),
        Activation::Relu6 => each(x, |v| smaller(6., larger(0., v))),
        Activation::Gelu => each(x, math::gelu::<FMA>),
        Activation::GeluTanh => each(x, math::gelu_tanh::<FMA>),
        Activation::Silu => each(x, math::silu::<FMA>),
        Activation::Sigmoid => each(x, math::sigmoid::<FMA>),
        Activation::HardSwish => each(x, |v| v * smaller(1., larger(0., fma::<FMA>(v, 1. / 6., 0.5)))),
    }
}

/// As [`activate`] for the outputs of an integer layer, where an absolute error of 1e-4 is far below the step.
#[inline(always)]
pub fn activate_integers<const FMA: bool>(activation: Activation, x: &mut [f32]) {
    match activation {
        Activation::Gelu => each(x, math::gelu_coarse::<FMA>),
        other => activate::<FMA>(other, x),
    }
}

/// Turns integer sums into floats: `(sum − zero·Σw) · row scale · column scale + bias`.
#[inline(always)]
pub fn rescale<const FMA: bool>(sums: &TileI8, rows: &[RowQuant; MR_I8], job: &PanelJob, out: &mut [[f32; NR]; MR_I8]) {
    // Not the constant NR: the compiler would unroll the loop before it could vectorize it.
    let columns = job.target.columns.min(NR);
    for m in 0..MR_I8 {
        let RowQuant { scale, zero } = rows[m];
        let (sums, out) = (&sums[m][..columns], &mut out[m][..columns]);
        let (weight, sum) = (&job.panel.scale[..columns], &job.panel.sum[..columns]);
        let bias = &job.bias[..columns];
        for n in 0..columns {
            let exact = sums[n].wrapping_sub(zero.wrapping_mul(sum[n]));
            out[n] = fma::<FMA>(exact as f32, scale * weight[n], bias[n]);
        }
    }
}

/// Adds bias, applies the activation, adds the residual.
///
/// # Safety
/// The target's pointers must be valid for its rows and columns.
#[inline(always)]
pub unsafe fn finish_f32<const FMA: bool>(
    sums: &mut TileF32,
    bias: &[f32; NR],
    activation: Activation,
    target: &Target,
) {
    for row in sums.iter_mut() {
        for n in 0..NR {
            row[n] += bias[n];
        }
    }
    activate::<FMA>(activation, sums.as_flattened_mut());
    // SAFETY: the caller's contract.
    unsafe { write(sums, target) };
}

/// # Safety
/// The target's pointers must be valid for its rows and columns.
#[inline(always)]
pub unsafe fn write(tile: &[[f32; NR]], t: &Target) {
    for (m, row) in tile.iter().enumerate().take(t.rows) {
        let at = m * t.stride;
        // SAFETY: the caller's contract; a full row is NR elements.
        unsafe {
            if t.columns == NR {
                let mut row = *row;
                if !t.residual.is_null() {
                    let residual = &*t.residual.add(at).cast::<[f32; NR]>();
                    for n in 0..NR {
                        row[n] += residual[n];
                    }
                }
                *t.out.add(at).cast::<[f32; NR]>() = row;
            } else {
                for (n, &v) in row.iter().enumerate().take(t.columns) {
                    let residual = if t.residual.is_null() { 0. } else { *t.residual.add(at + n) };
                    *t.out.add(at + n) = v + residual;
                }
            }
        }
    }
}

/// Adding and taking it off again rounds numbers below 2²² to integers.
const ROUND: f32 = 12_582_912.;

#[inline(always)]
pub fn round(x: &mut [f32], factor: f32, grid: Grid) {
    let steps = factor / grid.scale;
    for v in x {
        let q = smaller(larger(grid.low, *v * steps), grid.high);
        *v = ((q + ROUND) - ROUND) * grid.scale;
    }
}

#[inline(always)]
pub fn add(x: &mut [f32], y: &[f32]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x += y;
    }
}

#[inline(always)]
pub fn times(x: &[f32], y: &[f32], out: &mut [f32]) {
    for ((x, y), out) in x.iter().zip(y).zip(out) {
        *out = x * y;
    }
}

#[inline(always)]
pub fn exponentials<const FMA: bool>(x: &mut [f32], n: usize, scale: f32) -> f32 {
    let mut scale = scale;
    if scale <= 0. {
        each(x, |v| v * scale);
        scale = 1.;
    }
    x[n..].fill(f32::NEG_INFINITY);
    // A row that is all −∞ (fully masked) has no softmax; exp(−∞ + ∞) = NaN says so, as in the reference.
    let offset = -reduce(x, f32::NEG_INFINITY, larger) * scale;
    let mut acc = [0f32; LANES];
    for c in x.as_chunks_mut::<LANES>().0 {
        for i in 0..LANES {
            c[i] = math::exp::<FMA>(fma::<FMA>(c[i], scale, offset));
            acc[i] += c[i];
        }
    }
    1.0 / fold(acc, |a, v| a + v)
}

impl<A: Copy, W: Copy> DepthwiseRow<'_, A, W> {
    /// Checks that `outputs` lie inside the canvas and the weights, so that [`DepthwiseRow::sums`] may be called.
    #[inline(always)]
    pub fn check(&self, outputs: usize) {
        let g = self.geometry;
        let last = self.offsets.last().expect("a tap") + (outputs - 1) * g.stride[1] * g.input[2];
        assert!(last + g.input[2] <= self.canvas.len() && self.taps.len() == self.offsets.len() * g.input[2]);
        assert!(self.offsets.is_sorted());
    }

    /// The sums over the taps of `N` channels from `channel` on of output `x`.
    ///
    /// # Safety
    /// [`DepthwiseRow::check`] must have passed for more outputs than `x`; `channel + N` must not exceed the channels.
    #[inline(always)]
    unsafe fn sums<S: Copy, const N: usize>(
        &self,
        x: usize,
        channel: usize,
        zero: S,
        multiply_add: impl Fn(S, A, W) -> S,
    ) -> [S; N] {
        let c = self.geometry.input[2];
        let mut sums = [zero; N];
        let first = x * self.geometry.stride[1] * c + channel;
        for (tap, offset) in self.offsets.iter().enumerate() {
            // SAFETY: the caller's contract.
            let (values, weights) = unsafe {
                let values = &*self.canvas.as_ptr().add(first + offset).cast::<[A; N]>();
                (values, &*self.taps.as_ptr().add(tap * c + channel).cast::<[W; N]>())
            };
            for i in 0..N {
                sums[i] = multiply_add(sums[i], values[i], weights[i]);
            }
        }
        sums
    }
}

/// Sums up [`LANES`] channels at a time, the last run overlapping the one before it where the channels are no multiple;
/// `finish` turns the sums of the channels from one on into outputs.
#[inline(always)]
fn depthwise<A: Copy, W: Copy, S: Copy>(
    row: &DepthwiseRow<A, W>,
    out: &mut [f32],
    zero: S,
    multiply_add: impl Fn(S, A, W) -> S + Copy,
    finish: impl Fn(&[S], usize, &mut [f32]),
) {
    let c = row.geometry.input[2];
    row.check(out.len() / c);
    for (x, out) in out.chunks_exact_mut(c).enumerate() {
        if c < LANES {
            for channel in 0..c {
                // SAFETY: checked.
                let sums: [S; 1] = unsafe { row.sums(x, channel, zero, multiply_add) };
                finish(&sums, channel, &mut out[channel..=channel]);
            }
            continue;
        }
        for run in 0..c.div_ceil(LANES) {
            let channel = (run * LANES).min(c - LANES);
            // SAFETY: checked.
            let sums: [S; LANES] = unsafe { row.sums(x, channel, zero, multiply_add) };
            finish(&sums, channel, &mut out[channel..channel + LANES]);
        }
    }
}

#[inline(always)]
pub fn depthwise_i8<const FMA: bool>(row: &DepthwiseRow<u8, i8>, scale: &ChannelScale, out: &mut [f32]) {
    let multiply_add = |sum: i32, a: u8, w: i8| sum + i32::from(a) * i32::from(w);
    depthwise(row, out, 0, multiply_add, |sums, channel, out| {
        let n = out.len();
        let (offset, factor) = (&scale.offset[channel..][..n], &scale.factor[channel..][..n]);
        let (sums, bias) = (&sums[..n], &scale.bias[channel..][..n]);
        for i in 0..n {
            out[i] = fma::<FMA>((sums[i] + offset[i]) as f32, factor[i], bias[i]);
        }
    });
    activate_integers::<FMA>(scale.activation, out);
}

#[inline(always)]
pub fn depthwise_f32<const FMA: bool>(row: &DepthwiseRow<f32, f32>, bias: &[f32], out: &mut [f32]) {
    let multiply_add = |sum: f32, a: f32, w: f32| fma::<FMA>(a, w, sum);
    depthwise(row, out, 0., multiply_add, |sums, channel, out| {
        let n = out.len();
        let (sums, bias) = (&sums[..n], &bias[channel..][..n]);
        for i in 0..n {
            out[i] = sums[i] + bias[i];
        }
    });
}

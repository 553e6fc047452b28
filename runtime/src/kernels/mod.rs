//! The arithmetic: integer and float matrix tiles, and the row routines around them.
//!
//! One table of functions for each instruction set. [`detect`] picks the best one the CPU has, or the one named in
//! the environment variable `VEDGE_KERNEL`. Integer tiles give the same i32 sums on every CPU; the float routines
//! are one generic source, compiled for each instruction set.

#[cfg(target_arch = "aarch64")]
mod aarch64;
pub mod attention;
pub mod conv;
pub mod copy;
pub mod depthwise;
mod generic;
pub mod linear;
mod math;
pub mod merge;
mod pack;
pub mod peak;
pub mod requantize;
mod rows;
#[cfg(test)]
mod tests;
pub mod windows;
mod words;
#[cfg(target_arch = "x86_64")]
mod x86_64;

pub use pack::{Body, F32Weights, I8Panel, I8Weights};
pub use rows::{Activation, Norm, Quants, RowQuant, RowsOf, Target};

use crate::error::{Error, Result};

/// Columns of a tile: output features.
pub const NR: usize = 16;
/// Rows of an integer tile: tokens or pixels.
pub const MR_I8: usize = 4;
/// Rows of a float tile.
pub const MR_F32: usize = 6;
/// Rows that float products take at once where there are so many: whole tiles on every CPU.
const ROWS_F32: usize = 12;
/// Inputs of one integer group: what a 4-way dot product takes at once.
pub const GROUP: usize = 4;

/// Sums of an integer tile.
pub type TileI8 = [[i32; NR]; MR_I8];
/// Sums of a float tile.
type TileF32 = [[f32; NR]; MR_F32];

/// See [`Kernels::tile_i16`].
pub type TileFnI16 =
    unsafe fn(rows: &[*const i16; MR_F32], pairs: usize, b: *const i16, panels: usize, sums: *mut f32, stride: usize);

/// How an integer kernel wants its weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Groups in order.
    Plain,
    /// Groups in pairs whose products cannot overflow 16 bits together; see [`pack`].
    Paired,
    /// Groups two by two, `[NR][2 * GROUP]`, for products of matrices of eight inputs.
    Octets,
}

impl Layout {
    /// Inputs that a kernel takes at once.
    fn step(self) -> usize {
        match self {
            Layout::Plain | Layout::Paired => GROUP,
            Layout::Octets => 2 * GROUP,
        }
    }
}

/// The functions of one instruction set.
pub struct Kernels {
    /// Name, as for `VEDGE_KERNEL`.
    pub name: &'static str,
    /// Layout of the packed weights.
    pub layout: Layout,
    /// Quantized activations are stored exclusive-or this: 0 for kernels that read u8, 0x80 for i8.
    pub flip: u8,
    /// Integer tile: sums over K of stored activation × weight.
    ///
    /// # Safety
    /// The CPU must have the instruction set; each row must hold the panel's K activations, rounded up as
    /// [`I8Weights::row_bytes`] says: bytes, or i16 where the panel [is wide](I8Panel::is_wide).
    pub tile_i8: unsafe fn(rows: &[*const u8; MR_I8], panel: &I8Panel, sums: &mut TileI8),
    /// Multiplies quantized rows with one panel, tile after tile, and finishes them into the target.
    ///
    /// # Safety
    /// The CPU must have the instruction set; see [`PanelJob`].
    pub panel_i8: unsafe fn(job: &PanelJob),
    /// Whether [`Kernels::panel_i8`] takes two panels at once.
    pub pairs: bool,
    /// Multiplies rows of floats with panels and finishes them into the target.
    ///
    /// # Safety
    /// The CPU must have the instruction set; the job must have as many rows of `k` floats as its target, whose pointers must
    /// be valid.
    pub panels_f32: unsafe fn(job: &FloatJob),
    /// 16-bit tiles, where that is faster than floats: sums over `2 * pairs` values of row × column; `b` is
    /// `[panels][pairs][NR][2]`. Each row of sums starts `stride` floats after the one before it; the sums of each panel
    /// stand beside those of the one before it. They are exact while they fit i32, then converted.
    ///
    /// # Safety
    /// The CPU must have the instruction set; each row must hold `2 * pairs` values, `b` as many as said, and [`NR`] floats a
    /// panel must be writable at each of [`MR_F32`] rows of `sums`.
    pub tile_i16: Option<TileFnI16>,
    /// Row routines.
    pub rows: rows::RowFns,
}

/// Rows to multiply with a panel. Rows are padded to whole tiles; the target has as many as are wanted.
pub struct PanelJob<'a> {
    /// Quantized rows: bytes, or i16 where the panel [is wide](I8Panel::is_wide).
    pub rows: *const u8,
    /// Bytes from one row to the next.
    pub stride: usize,
    /// How the rows were quantized.
    pub quants: Quants<'a>,
    /// The weights.
    pub panel: &'a I8Panel,
    /// Bias of the panel's columns.
    pub bias: &'a [f32; NR],
    /// For kernels that take [pairs](Kernels::pairs): the panel and bias of the next [`NR`] columns; the target then has as
    /// many for each of them.
    pub second: Option<(&'a I8Panel, &'a [f32; NR])>,
    /// The panels that come after: a kernel may fetch them while it computes.
    pub next: &'a [I8Panel],
    /// Function after the bias.
    pub activation: Activation,
    /// Where finished rows go.
    pub target: Target,
}

/// Rows of floats to multiply with panels: `activation(rows · panels + bias) + residual`.
pub struct FloatJob<'a> {
    /// First of the target's rows.
    pub rows: *const f32,
    /// Floats from one row to the next.
    pub stride: usize,
    /// Inputs: floats that are read of each row.
    pub k: usize,
    /// `[panels][k][NR]`.
    pub panels: &'a [f32],
    /// Bias of each panel; none where it is empty.
    pub bias: &'a [[f32; NR]],
    /// Function after the bias.
    pub activation: Activation,
    /// Where finished rows go; its columns are those of all panels.
    pub target: Target,
}

impl FloatJob<'_> {
    /// How many panels there are.
    #[inline(always)]
    fn panels(&self) -> usize {
        self.target.columns.div_ceil(NR)
    }

    /// A panel, and its bias.
    #[inline(always)]
    fn panel(&self, p: usize) -> (&[f32], &[f32; NR]) {
        (&self.panels[p * self.k * NR..][..self.k * NR], self.bias.get(p).unwrap_or(&[0.; NR]))
    }
}

/// The first `n` elements of a buffer that only grows; they hold whatever they held.
fn room<T: Copy + Default>(buffer: &mut Vec<T>, n: usize) -> &mut [T] {
    if buffer.len() < n {
        buffer.resize(n, T::default());
    }
    &mut buffer[..n]
}

impl PanelJob<'_> {
    /// How `M` rows from row `m` on were quantized.
    #[inline(always)]
    fn quants<const M: usize>(&self, m: usize) -> [RowQuant; M] {
        match self.quants {
            Quants::Shared(quant) => [quant; M],
            Quants::Each(quants) => *quants[m..].first_chunk().expect("rows are padded to whole tiles"),
        }
    }

    /// First activation of each of `M` rows from row `m` on, and the part of the target that they fill.
    #[inline(always)]
    fn block<const M: usize>(&self, m: usize) -> ([*const u8; M], Target) {
        let rows = std::array::from_fn(|i| self.rows.wrapping_add((m + i) * self.stride));
        (rows, self.target.from(m, 0, M, self.target.columns))
    }
}

/// erf(x), absolute error below 5e-7.
pub fn erf(x: f32) -> f32 {
    math::erf::<false>(x)
}

impl Kernels {
    /// LayerNorm of as many rows as `out` has room for, and the range of each result (0 included) if `ranges` has as many.
    pub fn layer_norm<'a>(
        &self,
        norm: &Norm,
        row: impl Fn(usize) -> &'a [f32],
        out: &mut [f32],
        ranges: &mut [(f32, f32)],
    ) {
        const FEW: usize = 8;
        let k = norm.gamma.len();
        for (i, out) in out.chunks_mut(FEW * k).enumerate() {
            let n = out.len() / k;
            let rows: [_; FEW] = std::array::from_fn(|j| row(i * FEW + j.min(n - 1)));
            let ranges = ranges.get_mut(i * FEW..).unwrap_or_default();
            // SAFETY: tables are handed out by `available` only, for this CPU.
            unsafe { (self.rows.layer_norm)(&rows[..n], norm, out, ranges) }
        }
    }

    /// Products of rows with panels `[panels][width of a row][NR]`, into rows of `out` that are `stride` floats apart.
    ///
    /// # Panics
    /// When a row, a panel or the room for a row's products ends early.
    pub fn multiply(&self, rows: &RowsOf, panels: &[f32], out: &mut [f32], stride: usize) {
        let (k, columns) = (rows.width, panels.len() / rows.width);
        let last = rows.n.checked_sub(1).expect("rows");
        assert!(rows.x.len() >= last * rows.stride + k && columns.is_multiple_of(NR) && columns <= stride);
        assert!(out.len() >= last * stride + columns);
        let target = Target { out: out.as_mut_ptr(), residual: std::ptr::null(), stride, rows: rows.n, columns };
        let (rows, stride, activation) = (rows.x.as_ptr(), rows.stride, Activation::None);
        let job = FloatJob { rows, stride, k, panels, bias: &[], activation, target };
        // SAFETY: tables are handed out by `available` only, for this CPU; the lengths are checked.
        unsafe { (self.panels_f32)(&job) }
    }

    /// Applies an element-wise function in place.
    pub fn activate(&self, activation: Activation, x: &mut [f32]) {
        // SAFETY: as above.
        unsafe { (self.rows.activate)(activation, x) }
    }
}

/// Every kernel this CPU can run, best first; the last is `generic`.
pub fn available() -> Vec<&'static Kernels> {
    let mut all: Vec<&'static Kernels> = vec![];
    #[cfg(target_arch = "x86_64")]
    all.extend(x86_64::kernels());
    #[cfg(target_arch = "aarch64")]
    all.extend(aarch64::kernels());
    all.push(&generic::KERNELS);
    all
}

/// The kernel to use: the one `VEDGE_KERNEL` names, else the best.
///
/// # Errors
/// [`Error::Usage`] when the named kernel does not exist or the CPU lacks its instructions.
pub fn detect() -> Result<&'static Kernels> {
    let all = available();
    let Ok(wanted) = std::env::var("VEDGE_KERNEL") else { return Ok(all[0]) };
    all.iter().find(|k| k.name == wanted).copied().ok_or_else(|| Error::Usage {
        what: format!("VEDGE_KERNEL={wanted} is not a kernel of this CPU"),
        hint: format!("use one of: {}", all.iter().map(|k| k.name).collect::<Vec<_>>().join(", ")),
    })
}

//! Rounding to a grid of integers, in float, and functions of what was rounded.

use super::Kernels;
use super::linear::InputQuant;

/// The grid.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Requantize {
    /// Known before.
    Static(Grid),
    /// 256 steps over the range of all values.
    Whole,
}

/// Multiples of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid {
    /// Step; positive.
    pub scale: f32,
    /// Smallest multiple.
    pub low: f32,
    /// Largest multiple.
    pub high: f32,
}

impl Requantize {
    /// The grid for these values.
    pub fn grid(self, kernels: &Kernels, x: &[f32]) -> Grid {
        match self {
            Requantize::Static(grid) => grid,
            Requantize::Whole => {
                let (scale, _, zero) = InputQuant::Whole.parameters(kernels, x);
                Grid::of_bytes(scale, zero)
            }
        }
    }
}

impl Grid {
    /// What bytes with this step and zero point stand for.
    pub fn of_bytes(scale: f32, zero: f32) -> Grid {
        Grid { scale, low: -zero, high: 255. - zero }
    }

    /// `scale · clamp(round(x / scale), low, high)` in place, ties to even. NaN becomes the lowest.
    pub fn round(self, kernels: &Kernels, x: &mut [f32]) {
        self.round_product(kernels, x, 1.);
    }

    /// As [`Grid::round`] for `x · factor`.
    pub fn round_product(self, kernels: &Kernels, x: &mut [f32], factor: f32) {
        // SAFETY: `kernels` came from `available`.
        unsafe { (kernels.rows.round)(x, factor, self) };
    }
}

/// An element-wise function of a value that is rounded to 256 steps first: looked up instead of computed.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    /// Step.
    pub scale: f32,
    /// Which of the 256 stands for zero.
    pub zero: u8,
    /// Result for each.
    pub values: Box<[f32; 256]>,
}

/// Values looked up at once: their places stay in the first-level cache.
const PLACES: usize = 512;

impl Table {
    /// What it rounds to first.
    pub fn grid(&self) -> Grid {
        Grid::of_bytes(self.scale, f32::from(self.zero))
    }

    /// Rounds and looks up, in place.
    pub fn apply(&self, kernels: &Kernels, x: &mut [f32]) {
        let mut places = [0; PLACES];
        for x in x.chunks_mut(PLACES) {
            let places = &mut places[..x.len()];
            // SAFETY: `kernels` came from `available`.
            unsafe { (kernels.rows.quantize)(x, 1. / self.scale, f32::from(self.zero), 0, places) };
            x.iter_mut().zip(places).for_each(|(v, place)| *v = self.values[usize::from(*place)]);
        }
    }
}

/// A [`Table`] whose results a layer quantizes: the bytes are looked up at once.
#[derive(Clone, Debug, PartialEq)]
pub struct ByteTable {
    scale: f32,
    zero: u8,
    /// As the layer stores them.
    bytes: Box<[u8; 256]>,
}

impl ByteTable {
    /// For a layer that quantizes its input with this step and zero point and stores it exclusive-or `flip`.
    pub fn of(table: &Table, kernels: &Kernels, (scale, zero): (f32, u8), flip: u8) -> ByteTable {
        let mut bytes = Box::new([0; 256]);
        // SAFETY: `kernels` came from `available`.
        unsafe { (kernels.rows.quantize)(&table.values[..], 1. / scale, f32::from(zero), flip, &mut bytes[..]) };
        ByteTable { scale: table.scale, zero: table.zero, bytes }
    }

    /// Rounds and looks up.
    fn quantize(&self, kernels: &Kernels, x: &[f32], out: &mut [u8]) {
        // SAFETY: `kernels` came from `available`.
        unsafe {
            (kernels.rows.quantize)(x, 1. / self.scale, f32::from(self.zero), 0, out);
            (kernels.rows.lookup)(&self.bytes, out);
        }
    }
}

/// How a layer's input becomes bytes.
pub struct Quantizer<'a> {
    /// Function of the input, if there is one; its bytes are made for the same zero point and `flip`.
    pub table: Option<&'a ByteTable>,
    /// Inverse of the step.
    pub inverse: f32,
    /// Zero point, 0…255.
    pub zero: f32,
    /// Bytes are stored exclusive-or this.
    pub flip: u8,
}

impl Quantizer<'_> {
    /// Quantizes values.
    pub fn quantize(&self, kernels: &Kernels, x: &[f32], out: &mut [u8]) {
        match self.table {
            Some(table) => table.quantize(kernels, x, out),
            // SAFETY: `kernels` came from `available`.
            None => unsafe { (kernels.rows.quantize)(x, self.inverse, self.zero, self.flip, out) },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::available;

    #[test]
    fn as_quantize_and_dequantize_say() {
        let grid = Grid { scale: 0.5, low: -3., high: 252. };
        for kernels in available() {
            let mut x = [0.1, 0.25, 0.75, -0.24, -9., 1000., 126., f32::NAN, f32::INFINITY];
            grid.round(kernels, &mut x);
            assert_eq!(x, [0., 0., 1., 0., -1.5, 126., 126., -1.5, 126.], "{}", kernels.name);
        }
    }

    #[test]
    fn a_table_is_the_function_of_the_rounded_value() {
        let (scale, zero) = (0.25, 100u8);
        let value = |place: usize| (place as f32 - f32::from(zero)) * scale;
        let table = Table { scale, zero, values: Box::new(std::array::from_fn(|p| value(p).powi(2))) };
        for kernels in available() {
            let mut x: Vec<f32> = (0..1000).map(|i| i as f32 * 0.09 - 40.).collect();
            let want: Vec<f32> =
                x.iter().map(|v| ((v / scale).round_ties_even().clamp(-100., 155.) * scale).powi(2)).collect();
            table.apply(kernels, &mut x);
            assert_eq!(x, want, "{}", kernels.name);
        }
    }

    #[test]
    fn a_range_of_its_own_reaches_both_ends() {
        let kernels = crate::kernels::detect().unwrap();
        let x = [-1., 0., 0.3, 1.55];
        let mut y = x;
        Requantize::Whole.grid(kernels, &x).round(kernels, &mut y);
        assert!(x.iter().zip(y).all(|(x, y)| (x - y).abs() < 0.0051), "{y:?}");
    }
}

//! Rounding to a grid of integers, in float.

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
                Grid { scale, low: -zero, high: 255. - zero }
            }
        }
    }
}

/// Adding and taking it off again rounds numbers below 2²² to integers.
const ROUND: f32 = 12_582_912.;

impl Grid {
    /// `scale · clamp(round(x / scale), low, high)`, ties to even, into `out` of the same length. NaN becomes the lowest.
    pub fn round(self, x: &[f32], out: &mut [f32]) {
        for (x, y) in x.iter().zip(out) {
            let steps = (x / self.scale).max(self.low).min(self.high);
            *y = ((steps + ROUND) - ROUND) * self.scale;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_quantize_and_dequantize_say() {
        let grid = Grid { scale: 0.5, low: -3., high: 252. };
        let x = [0.1, 0.25, 0.75, -0.24, -9., 1000., 126., f32::NAN, f32::INFINITY];
        let mut y = [0.; 9];
        grid.round(&x, &mut y);
        assert_eq!(y, [0., 0., 1., 0., -1.5, 126., 126., -1.5, 126.]);
    }

    #[test]
    fn a_range_of_its_own_reaches_both_ends() {
        let kernels = crate::kernels::detect().unwrap();
        let x = [-1., 0., 0.3, 1.55];
        let mut y = [0.; 4];
        Requantize::Whole.grid(kernels, &x).round(&x, &mut y);
        assert!(x.iter().zip(y).all(|(x, y)| (x - y).abs() < 0.0051), "{y:?}");
    }
}

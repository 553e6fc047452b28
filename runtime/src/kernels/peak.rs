//! How fast the kernels multiply at best: operands in the first-level cache and nothing around the products. What a layer
//! reaches is judged against this.

use super::linear::{InputQuant, Linear, Rows, Weights};
use super::{Activation, F32Weights, I8Weights, Kernels, NR, Quants, RowQuant};
use std::time::Instant;

/// Rows and inputs: with one panel of weights they fill two thirds of a first-level cache of 32 KiB.
const ROWS: usize = 12;
const INPUTS: [usize; 2] = [768, 192];
/// Calls that are timed together, and how often; the fastest counts.
const CALLS: usize = 40;
const ROUNDS: usize = 100;

/// Billions of 8-bit operations a second on one thread, two for each multiply-accumulate.
pub fn int8(kernels: &Kernels) -> f64 {
    let k = INPUTS[0];
    // Weights of a common size: what is narrow enough for 16-bit lanes counts.
    let values: Vec<i8> = (0..NR * k).map(|i| (i * 37 % 41) as i8 - 20).collect();
    let weights = I8Weights::pack(kernels, NR, k, &values, &[1.; NR]);
    let bytes = vec![7; ROWS * weights.row_bytes()];
    let wide = vec![7; bytes.len()];
    let layer = layer(Weights::I8(weights.clone(), InputQuant::PerRow));
    let rows = Rows { bytes: &bytes, wide: &wide, quants: Quants::Each(&[RowQuant { scale: 1., zero: 0 }; ROWS]) };
    let mut out = [0.; ROWS * NR];
    best(k, || layer.integer_block(kernels, &weights, &rows, None, &mut out))
}

/// Billions of 32-bit float operations a second on one thread.
pub fn float(kernels: &Kernels) -> f64 {
    let k = INPUTS[1];
    let layer = layer(Weights::F32(F32Weights::pack(NR, k, |row, i| (row + i) as f32)));
    let x = vec![0.5; ROWS * k];
    let mut out = [0.; ROWS * NR];
    best(k, || layer.float_block(kernels, &x, None, &mut out))
}

fn layer(weights: Weights) -> Linear {
    Linear::new(weights, &[0.; NR], Activation::None)
}

fn best(k: usize, mut f: impl FnMut()) -> f64 {
    let time = |_| {
        let start = Instant::now();
        (0..CALLS).for_each(|_| f());
        start.elapsed().as_secs_f64()
    };
    let fastest = (0..ROUNDS).map(time).fold(f64::INFINITY, f64::min);
    2. * (CALLS * ROWS * NR * k) as f64 / fastest / 1e9
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_peak_is_positive() {
        for kernels in super::super::available() {
            let [int8, float] = [super::int8(kernels), super::float(kernels)];
            assert!(int8 > 0. && float > 0. && int8.is_finite() && float.is_finite(), "{}", kernels.name);
        }
    }
}

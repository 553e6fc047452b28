//! The arithmetic: ranges to scale and zero point, weights to int8.

use vedge_runtime::onnx::elements;

/// Step of an int8 activation with zero point 0 that reaches both ends of a range; 1 for an empty range.
pub fn symmetric((low, high): (f32, f32)) -> f32 {
    match high.max(-low) / 127.0 {
        s if s < f32::MIN_POSITIVE => 1.0,
        s => s,
    }
}

/// Scale and zero point of a uint8 activation: `real = scale · (q − zero_point)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Affine {
    /// Size of a step; positive.
    pub scale: f32,
    /// The integer that stands for zero.
    pub zero_point: u8,
}

impl Affine {
    /// Spreads 0…255 over a range that includes zero. An empty range gets scale 1.
    pub fn over((low, high): (f32, f32)) -> Affine {
        let (low, high) = (low.min(0.0), high.max(0.0));
        let scale = ((f64::from(high) - f64::from(low)) / 255.0) as f32;
        if scale < f32::MIN_POSITIVE {
            return Affine { scale: 1.0, zero_point: 0 };
        }
        let zero_point = (-low / scale).round_ties_even().clamp(0.0, 255.0) as u8;
        Affine { scale, zero_point }
    }
}

/// A weight as int8 with one scale for each output channel; symmetric, −127…127.
#[derive(Clone)]
pub struct Weight {
    /// Integers, in the order of the float weight.
    pub values: Vec<i8>,
    /// Scale of each output channel; 1 for a channel of zeros.
    pub scales: Vec<f32>,
}

/// Output channel of each element of a weight, in memory order.
pub fn channels(shape: &[usize], out_axis: usize) -> impl Iterator<Item = usize> + use<> {
    let inner = elements(&shape[out_axis + 1..]).max(1);
    let count = shape[out_axis];
    (0..elements(shape)).map(move |i| i / inner % count)
}

/// Root mean square, in steps, that the integers of a [`Grid::Narrow`] channel have at most.
///
/// A lane of the exact AVX2 kernel holds the products of four weights and is in range while the positive ones and the
/// negative ones among them sum to at most 128 each (`vedge_runtime::kernels`, packing). With weights of 30 steps most
/// groups of inputs find a partner for their lanes and a panel runs at full speed; the int8 grid up to the largest
/// weight gives 30 to 73 steps and the slow path. Rounding noise at 30 steps is 40 dB below the weights.
pub const NARROW_RMS: f64 = 30.0;

/// How far the integers of a weight reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grid {
    /// The largest weight of a channel becomes 127.
    Full,
    /// As `Full`, but with wider steps where the root mean square would be above [`NARROW_RMS`] steps: for layers that
    /// run as matrix products.
    Narrow,
}

/// Size of a step for each output channel; 1 for a channel of zeros.
pub fn weight_scales(weight: &[f32], shape: &[usize], out_axis: usize, grid: Grid) -> Vec<f32> {
    let count = shape[out_axis];
    let (mut largest, mut squares) = (vec![0f32; count], vec![0f64; count]);
    for (w, c) in weight.iter().zip(channels(shape, out_axis)) {
        largest[c] = largest[c].max(w.abs());
        squares[c] += f64::from(*w).powi(2);
    }
    let inputs = (weight.len() / count.max(1)).max(1) as f64;
    let scale = |(largest, squares): (f32, f64)| {
        let narrow = match grid {
            Grid::Full => 0.0,
            Grid::Narrow => ((squares / inputs).sqrt() / NARROW_RMS) as f32,
        };
        match (largest / 127.0).max(narrow) {
            s if s < f32::MIN_POSITIVE => 1.0,
            s => s,
        }
    };
    largest.into_iter().zip(squares).map(scale).collect()
}

/// Shares of a channel's largest weight that its integers may reach.
const REACHES: [f32; 11] = [1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5];

/// As [`weight_scales`], but where few weights of a channel are much larger than the others they are clipped, as far as the
/// squared error of the outputs falls by it: `importance` is the variance of each input, `at` where the weight of an output and an
/// input lies. Steps do not become narrower than the grid's.
pub fn clipped_scales(
    weight: &[f32],
    scales: &[f32],
    narrow: &[f32],
    importance: &[f64],
    at: impl Fn(usize, usize) -> usize,
) -> Vec<f32> {
    let best = |(output, scale): (usize, &f32)| {
        let error = |s: f32| -> f64 {
            let of = |(i, h): (usize, &f64)| {
                let w = weight[at(output, i)];
                h * f64::from(w - (w / s).round_ties_even().clamp(-127.0, 127.0) * s).powi(2)
            };
            importance.iter().enumerate().map(of).sum()
        };
        let tried = REACHES.map(|r| (scale * r).max(narrow[output])).map(|s| (error(s), s));
        tried.into_iter().reduce(|a, b| if b.0 < a.0 { b } else { a }).map_or(*scale, |(_, s)| s)
    };
    scales.iter().enumerate().map(best).collect()
}

/// The smallest step that a grid allows each output channel.
pub fn narrowest(weight: &[f32], shape: &[usize], out_axis: usize, grid: Grid) -> Vec<f32> {
    let count = shape[out_axis];
    let mut squares = vec![0f64; count];
    for (w, c) in weight.iter().zip(channels(shape, out_axis)) {
        squares[c] += f64::from(*w).powi(2);
    }
    let inputs = (weight.len() / count.max(1)).max(1) as f64;
    let least = |s: f64| if grid == Grid::Narrow { ((s / inputs).sqrt() / NARROW_RMS) as f32 } else { 0.0 };
    squares.into_iter().map(|s| least(s).max(f32::MIN_POSITIVE)).collect()
}

/// Rounds a weight to the nearest step of each output channel's scale.
pub fn quantize_weight(weight: &[f32], shape: &[usize], out_axis: usize, grid: Grid) -> Weight {
    let scales = weight_scales(weight, shape, out_axis, grid);
    let values = weight
        .iter()
        .zip(channels(shape, out_axis))
        .map(|(w, c)| (w / scales[c]).round_ties_even().clamp(-127.0, 127.0) as i8)
        .collect();
    Weight { values, scales }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_is_exact_and_the_ends_are_within_half_a_step() {
        for range in [(-1.0, 3.0), (0.0, 0.001), (-128.0, 5.5), (-7.0, 0.0), (-0.17, 14.6), (2.0, 9.0)] {
            let a = Affine::over(range);
            let real = |q: u8| a.scale * (f32::from(q) - f32::from(a.zero_point));
            assert_eq!(real(a.zero_point), 0.0);
            assert!((real(0) - range.0.min(0.0)).abs() <= a.scale * 0.5001, "{range:?} {a:?}");
            assert!((real(255) - range.1.max(0.0)).abs() <= a.scale * 0.5001, "{range:?} {a:?}");
        }
        assert_eq!(Affine::over((0.0, 0.0)), Affine { scale: 1.0, zero_point: 0 });
        assert!((127..=128).contains(&Affine::over((-1.0, 1.0)).zero_point));
    }

    #[test]
    fn weights_are_rounded_for_each_output_channel() {
        // [in 2, out 3], out axis 1: columns are channels.
        let w = [0.5, -127.0, 0.0, -1.0, 63.4, 0.0];
        let q = quantize_weight(&w, &[2, 3], 1, Grid::Full);
        assert_eq!(q.scales, [1.0 / 127.0, 1.0, 1.0]);
        assert_eq!(q.values, [64, -127, 0, -127, 63, 0]);
        // The same numbers, out axis 0: rows are channels.
        let q = quantize_weight(&w, &[2, 3], 0, Grid::Full);
        assert_eq!(q.values, [0, -127, 0, -2, 127, 0]);
    }

    #[test]
    fn every_weight_is_within_half_a_step() {
        let shape = [5, 3, 2, 2];
        let w: Vec<f32> = (0..60).map(|i| ((i * 37 % 101) as f32 - 50.0) * 0.013 * (1 + i / 12) as f32).collect();
        let q = quantize_weight(&w, &shape, 0, Grid::Full);
        for (i, (w, v)) in w.iter().zip(&q.values).enumerate() {
            let s = q.scales[i / 12];
            assert!((w - f32::from(*v) * s).abs() <= s * 0.5001, "{i}");
        }
        assert!((0..5).all(|c| q.values[c * 12..(c + 1) * 12].iter().any(|v| v.abs() == 127)));
    }

    #[test]
    fn the_narrow_grid_widens_only_channels_that_are_dense() {
        // A channel of equal weights would lie at 127 everywhere; one of a single large weight stays as it is.
        let mut w = vec![1.0f32; 64];
        w[32..].fill(0.01);
        w[40] = 1.0;
        let [full, narrow] = [Grid::Full, Grid::Narrow].map(|g| quantize_weight(&w, &[2, 32], 0, g));
        assert_eq!((full.values[0], narrow.values[0]), (127, 30));
        assert_eq!(full.values[32..], narrow.values[32..]);
        assert_eq!(full.scales[1], narrow.scales[1]);
        assert!((narrow.scales[0] * 30.0 - 1.0).abs() < 1e-6);
    }
}

//! How a picture looks, in a few numbers: its brightness, and its contrast in each octave of detail.
//!
//! What the classes are is for the model; but a picture of noise, of a covered lens or of another kind than it knows is one
//! that it is often sure about, so that its answer does not tell (measured: tests/records/unknown.md). The numbers do, by their
//! Mahalanobis distance from those of the calibration pictures.

use crate::model::card::{Looks, Preprocess};
use ndarray::ArrayD;

/// Added to squared contrasts, whose range from black to white is 1: what stays below 0.01 is none.
const FLOOR: f32 = 1e-4;

/// How many numbers [`of`] gives for pictures of this size.
pub fn count(height: usize, width: usize) -> usize {
    1 + height.min(width).max(1).ilog2() as usize
}

/// Brightness, 0…1, then the logarithm of the mean squared contrast inside blocks of 2x2 pixels, of the picture and of its
/// halves down to one block: a Haar pyramid of the mean of the channels. `tensor` is `[1, 3, height, width]`, made as `how`
/// says.
pub fn of(tensor: &ArrayD<f32>, how: &Preprocess) -> Vec<f32> {
    let (mut height, mut width) = (how.height, how.width);
    let mut grey = vec![0.0; height * width];
    let tensor = tensor.as_standard_layout();
    let values = tensor.as_slice().unwrap_or_default();
    for ((channel, mean), std) in values.chunks_exact(height * width).zip(how.mean).zip(how.std) {
        let (mean, std) = (mean / 3.0, std / 3.0);
        grey.iter_mut().zip(channel).for_each(|(g, v)| *g += v * std + mean);
    }
    let mut found = vec![grey.iter().sum::<f32>() / grey.len().max(1) as f32];
    while height.min(width) >= 2 {
        let contrast = halve(&mut grey, height, width);
        (height, width) = (height / 2, width / 2);
        found.push((contrast + FLOOR).ln());
    }
    found
}

/// Replaces each block of 2x2 pixels by its mean; the mean squared difference from these. An odd row or column at the end
/// is left out.
fn halve(grey: &mut Vec<f32>, height: usize, width: usize) -> f32 {
    let (rows, columns) = (height / 2, width / 2);
    let mut sum = 0.0;
    for y in 0..rows {
        for x in 0..columns {
            let at = 2 * y * width + 2 * x;
            let block = [grey[at], grey[at + 1], grey[at + width], grey[at + width + 1]];
            let mean = block.iter().sum::<f32>() / 4.0;
            sum += block.iter().map(|v| (v - mean) * (v - mean)).sum::<f32>() / 4.0;
            // not yet read: blocks are behind where they are put
            grey[y * columns + x] = mean;
        }
    }
    grey.truncate(rows * columns);
    sum / (rows * columns) as f32
}

/// Mahalanobis distance of a picture's numbers from those of the calibration pictures.
pub fn distance(looks: &Looks, found: &[f32]) -> f32 {
    let off: Vec<f64> = found.iter().zip(&looks.mean).map(|(f, m)| f64::from(f - m)).collect();
    let row = |row: &Vec<f32>| row.iter().zip(&off).map(|(v, o)| f64::from(*v) * o).sum::<f64>();
    let squared: f64 = looks.inverse.iter().zip(&off).map(|(r, o)| row(r) * o).sum();
    squared.max(0.0).sqrt() as f32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::card::{Channels, Filter, Fit};

    fn how(height: usize, width: usize) -> Preprocess {
        let (mean, std) = ([0.5, 0.4, 0.3], [0.25, 0.2, 0.1]);
        Preprocess { height, width, fit: Fit::Squash, filter: Filter::Bilinear, mean, std, channels: Channels::Rgb }
    }

    /// Numbers of a grey picture of these values, 0…1.
    fn seen(height: usize, width: usize, grey: impl Fn(usize, usize) -> f32) -> Vec<f32> {
        let how = how(height, width);
        let value = |i: ndarray::IxDyn| (grey(i[2], i[3]) - how.mean[i[1]]) / how.std[i[1]];
        of(&ArrayD::from_shape_fn(ndarray::IxDyn(&[1, 3, height, width]), value), &how)
    }

    fn near(found: &[f32], contrasts: &[f32]) {
        assert_eq!(found.len(), contrasts.len() + 1);
        for (f, c) in found[1..].iter().zip(contrasts) {
            assert!((f - (c + FLOOR).ln()).abs() < 0.01, "{found:?}, expected {contrasts:?}");
        }
    }

    #[test]
    fn each_octave_by_hand() {
        let uniform = seen(8, 8, |_, _| 0.7);
        assert!((uniform[0] - 0.7).abs() < 1e-6);
        near(&uniform, &[0.0; 3]);
        // a chessboard of single pixels is all in the first octave, one of 2x2 in the second, halves in the last
        near(&seen(8, 8, |y, x| ((x + y) % 2) as f32), &[0.25, 0.0, 0.0]);
        near(&seen(8, 8, |y, x| ((x / 2 + y / 2) % 2) as f32), &[0.0, 0.25, 0.0]);
        near(&seen(8, 8, |_, x| (x / 4) as f32), &[0.0, 0.0, 0.25]);
    }

    #[test]
    fn sizes_that_are_no_powers_of_two() {
        for (height, width) in [(1, 1), (2, 3), (7, 5), (64, 48), (224, 224), (9, 300)] {
            assert_eq!(seen(height, width, |y, x| (y * x % 7) as f32 / 7.0).len(), count(height, width));
        }
        // the fifth column and row are no part of any block
        near(&seen(5, 5, |y, x| if x == 4 || y == 4 { 1.0 } else { (x % 2) as f32 }), &[0.25, 0.0]);
    }

    #[test]
    fn distance_by_hand() {
        let looks =
            Looks { share: 0.1, mean: vec![1.0, 2.0], inverse: vec![vec![4.0, 1.0], vec![1.0, 1.0]], distance: 9.0 };
        // 4·1 + 2·1·3 + 9
        assert!((distance(&looks, &[2.0, 5.0]) - 19f32.sqrt()).abs() < 1e-6);
        assert_eq!(distance(&looks, &[1.0, 2.0]), 0.0);
    }
}

//! Positional embeddings on another grid.
//!
//! The filter is that of timm's `resample_abs_pos_embed` (PyTorch's bicubic interpolation with antialiasing, which is
//! Pillow's): Keys' cubic with a = −0.5, half-pixel centres, widened by the scale when shrinking, its weights summing
//! to one, rows outside the grid left out. (Without antialiasing PyTorch uses a = −0.75, which is not what timm does.)

use ndarray::Array2;

/// Interpolates position embeddings from one patch grid to another.
///
/// `values` holds `prefix + old.0 * old.1` tokens of `width` floats, row-major; the first `prefix` tokens (class and
/// distillation token) have no place on the grid and are kept. Returns `prefix + new.0 * new.1` tokens.
///
/// # Panics
/// When `values` has another length, or a grid is empty.
pub fn resample(values: &[f32], prefix: usize, width: usize, old: (usize, usize), new: (usize, usize)) -> Vec<f32> {
    assert_eq!(values.len(), (prefix + old.0 * old.1) * width, "tokens of the old grid");
    assert!(old.0 * old.1 * new.0 * new.1 > 0, "a grid without patches");
    let (kept, grid) = values.split_at(prefix * width);
    // Columns first, then rows, as PyTorch and Pillow do.
    let columns = taps(old.1, new.1);
    let mut wide = vec![0f32; old.0 * new.1 * width];
    for y in 0..old.0 {
        for (x, taps) in columns.iter().enumerate() {
            let source = |k: usize| (y * old.1 + k) * width;
            blend(&mut wide[(y * new.1 + x) * width..][..width], grid, taps, source);
        }
    }
    let mut out = kept.to_vec();
    out.resize(kept.len() + new.0 * new.1 * width, 0.0);
    let placed = &mut out[kept.len()..];
    for (y, taps) in taps(old.0, new.0).iter().enumerate() {
        for x in 0..new.1 {
            let source = |k: usize| (k * new.1 + x) * width;
            blend(&mut placed[(y * new.1 + x) * width..][..width], &wide, taps, source);
        }
    }
    out
}

/// The first source index and the weights of one target index.
struct Taps {
    first: usize,
    weights: Vec<f64>,
}

fn blend(to: &mut [f32], from: &[f32], taps: &Taps, source: impl Fn(usize) -> usize) {
    for (c, value) in to.iter_mut().enumerate() {
        let sum: f64 =
            taps.weights.iter().enumerate().map(|(k, w)| w * f64::from(from[source(taps.first + k) + c])).sum();
        *value = sum as f32;
    }
}

/// The filter as a matrix, new × old places of one axis.
pub(super) fn interpolation(old: usize, new: usize) -> Array2<f64> {
    let mut matrix = Array2::zeros((new, old));
    for (taps, mut row) in taps(old, new).iter().zip(matrix.rows_mut()) {
        taps.weights.iter().enumerate().for_each(|(k, w)| row[taps.first + k] = *w);
    }
    matrix
}

fn taps(old: usize, new: usize) -> Vec<Taps> {
    let scale = old as f64 / new as f64;
    let stretch = scale.max(1.0);
    let support = 2.0 * stretch;
    (0..new)
        .map(|i| {
            let centre = scale * (i as f64 + 0.5);
            let first = (centre - support + 0.5).max(0.0) as usize;
            let end = ((centre + support + 0.5) as usize).min(old);
            let mut weights: Vec<f64> = (first..end).map(|k| cubic((k as f64 - centre + 0.5) / stretch)).collect();
            let total: f64 = weights.iter().sum();
            weights.iter_mut().for_each(|w| *w /= total);
            Taps { first, weights }
        })
        .collect()
}

/// Keys' cubic convolution kernel, a = −0.5.
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// At its own centres the cubic is 1, at its neighbours' 0: the filter itself gives every value back.
    #[test]
    fn the_same_grid_gives_the_same_positions() {
        for (prefix, grid) in [(0, (1, 1)), (1, (7, 5)), (2, (16, 16))] {
            let width = 3;
            let count = (prefix + grid.0 * grid.1) * width;
            let values: Vec<f32> = (0..count).map(|i| (i as f32 * 0.7).sin()).collect();
            assert_eq!(resample(&values, prefix, width, grid, grid), values, "{grid:?}");
        }
    }
}

//! Pillow's resampling filters as weights.

use super::fit::Axis;
use crate::model::card::Filter;

/// For each sample made: the first source sample it reads, and the weights of those from there on.
#[derive(Clone, Debug)]
pub(super) struct Taps {
    rows: Vec<(usize, usize)>,
    weights: Vec<f32>,
}

impl Taps {
    /// Weights along an axis whose source samples stand for `sub` pixels each (1 for luma, 2 for shared chroma: a pixel
    /// has its nearest chroma sample, so the weights of both pixels of a sample add up). `first` is the axis's first
    /// pixel in the frame.
    ///
    /// As Pillow's `precompute_coeffs`: the filter is as wide as the shrinking asks for, cut at the edges and normalized.
    pub fn new(axis: Axis, first: usize, sub: usize, filter: Filter) -> Taps {
        let scale = axis.length as f64 / axis.resized as f64;
        let stretch = scale.max(1.0);
        let (support, f): (f64, fn(f64) -> f64) = match filter {
            Filter::Bilinear => (1.0, triangle),
            Filter::Bicubic => (2.0, catmull_rom),
        };
        let support = support * stretch;
        let (mut rows, mut weights) = (Vec::with_capacity(axis.kept), vec![]);
        let mut pixels: Vec<f64> = vec![];
        for i in axis.skip..axis.skip + axis.kept {
            let centre = (i as f64 + 0.5) * scale;
            let from = (centre - support + 0.5).max(0.0) as usize;
            let to = ((centre + support + 0.5) as usize).min(axis.length);
            pixels.clear();
            pixels.extend((from..to).map(|x| f((x as f64 - centre + 0.5) / stretch)));
            let sum: f64 = pixels.iter().sum();
            let (from, to) = (first + from, first + to);
            let samples = from / sub..to.div_ceil(sub);
            rows.push((samples.start, weights.len()));
            let weight = |s: usize| {
                let shared = (s * sub).max(from)..((s + 1) * sub).min(to);
                (shared.map(|x| pixels[x - from]).sum::<f64>() / sum) as f32
            };
            weights.extend(samples.map(weight));
        }
        rows.push((0, weights.len()));
        Taps { rows, weights }
    }

    /// First source sample and weights of sample `i`.
    #[inline(always)]
    pub fn of(&self, i: usize) -> (usize, &[f32]) {
        (self.rows[i].0, &self.weights[self.rows[i].1..self.rows[i + 1].1])
    }

    pub fn len(&self) -> usize {
        self.rows.len() - 1
    }

    /// The source samples that are read at all.
    pub fn range(&self) -> std::ops::Range<usize> {
        let ends = (0..self.len()).map(|i| self.of(i)).map(|(start, weights)| (start, start + weights.len()));
        ends.map(|(start, end)| start..end).reduce(|a, b| a.start.min(b.start)..a.end.max(b.end)).unwrap_or_default()
    }
}

fn triangle(x: f64) -> f64 {
    (1.0 - x.abs()).max(0.0)
}

/// Keys' cubic with a = −0.5.
fn catmull_rom(x: f64) -> f64 {
    let x = x.abs();
    match x {
        x if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
        x if x < 2.0 => ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0,
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_sum_to_one_and_stay_inside() {
        for filter in [Filter::Bilinear, Filter::Bicubic] {
            for (length, resized, first, sub) in [(640, 224, 0, 1), (480, 224, 7, 2), (3, 50, 1, 2), (9, 9, 0, 1)] {
                let taps = Taps::new(Axis { length, resized, skip: 0, kept: resized }, first, sub, filter);
                assert_eq!(taps.len(), resized);
                for i in 0..resized {
                    let sum: f32 = taps.of(i).1.iter().sum();
                    assert!((sum - 1.0).abs() < 1e-5, "{filter:?} {length} to {resized}: {sum}");
                }
                assert_eq!(taps.range(), first / sub..(first + length).div_ceil(sub));
            }
        }
    }

    #[test]
    fn the_same_size_changes_nothing() {
        let taps = Taps::new(Axis { length: 5, resized: 5, skip: 1, kept: 3 }, 0, 1, Filter::Bicubic);
        for i in 0..3 {
            let (start, weights) = taps.of(i);
            let one = weights.iter().position(|&w| w == 1.0).unwrap();
            assert_eq!(start + one, i + 1);
            assert!(weights.iter().enumerate().all(|(k, &w)| k == one || w == 0.0));
        }
    }
}

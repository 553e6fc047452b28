//! Token merging (Bolya et al., "Token Merging: Your ViT But Faster", 2023): tokens whose keys are alike become one.
//!
//! The tokens after the protected ones are dealt out in turn to two sides. Each token of the first side is matched with
//! the most similar one of the second (cosine of the keys, summed over the heads); the most similar pairs are merged. What
//! is left keeps this order: protected tokens, the first side's, the second side's. Only half times half of the tokens are
//! compared, so that this costs next to nothing beside a block.

use super::attention::HeadView;
use super::{NR, ROWS_F32, RowsOf};
use crate::exec::Exec;

/// Decides which tokens are merged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Match {
    /// Keys `[1][heads][tokens][dim]`.
    pub keys: HeadView,
    /// Heads.
    pub heads: usize,
    /// Tokens.
    pub tokens: usize,
    /// Width of a head.
    pub dim: usize,
    /// Tokens at the start that are never merged.
    pub prefix: usize,
    /// How many tokens go.
    pub merged: usize,
}

/// Added to the squared length of a key before the root, so that a key of zeros is like no other.
pub const EPSILON: f32 = 1e-12;

impl Match {
    /// Tokens of the first side, which may go, and of the second.
    pub fn sides(&self) -> [usize; 2] {
        let rest = self.tokens.saturating_sub(self.prefix);
        [rest.div_ceil(2), rest / 2]
    }

    /// Multiply-accumulates.
    pub fn macs(&self) -> usize {
        let [a, b] = self.sides();
        a * b * self.dim
    }

    /// Writes the place of each token among those that are left, `[tokens]`, as whole numbers.
    ///
    /// # Panics
    /// When `x` ends before the keys, `out` is not `tokens` long, or there are fewer than `merged` on the first side.
    pub fn run(&self, exec: &Exec, x: &[f32], out: &mut [f32]) {
        assert_eq!(out.len(), self.tokens);
        let (p, [na, nb]) = (self.prefix, self.sides());
        let units = self.units(x);
        let unit = |token: usize| &units[token * self.dim..][..self.dim];
        let mut panels = vec![0.; nb.div_ceil(NR) * self.dim * NR];
        for j in 0..nb {
            let panel = &mut panels[j / NR * self.dim * NR..];
            unit(p + 2 * j + 1).iter().enumerate().for_each(|(k, v)| panel[k * NR + j % NR] = *v);
        }
        let stride = nb.next_multiple_of(NR);
        let mut scores = vec![0.; ROWS_F32 * stride];
        let mut best = Vec::with_capacity(na);
        for first in (0..na).step_by(ROWS_F32) {
            let (x, n) = (&units[(p + 2 * first) * self.dim..], ROWS_F32.min(na - first));
            let rows = RowsOf { x, n, width: self.dim, stride: 2 * self.dim };
            exec.kernels.multiply(&rows, &panels, &mut scores, stride);
            best.extend(scores.chunks_exact(stride).take(n).map(|row| largest(&row[..nb])));
        }
        self.places(&best, out);
    }

    /// The keys of each token, summed over the heads, at length 1.
    fn units(&self, x: &[f32]) -> Vec<f32> {
        let [_, head, token, dim] = self.keys.strides;
        let mut units = vec![0.; self.tokens * self.dim];
        for (t, unit) in units.chunks_exact_mut(self.dim).enumerate() {
            for h in 0..self.heads {
                let x = &x[self.keys.offset + h * head + t * token..];
                match dim {
                    1 => unit.iter_mut().zip(&x[..self.dim]).for_each(|(u, v)| *u += v),
                    _ => unit.iter_mut().enumerate().for_each(|(k, u)| *u += x[k * dim]),
                }
            }
            let length = (unit.iter().map(|v| v * v).sum::<f32>() + EPSILON).sqrt();
            unit.iter_mut().for_each(|v| *v /= length);
        }
        units
    }

    /// From the best partner of each token of the first side, and how alike they are.
    fn places(&self, best: &[(usize, f32)], out: &mut [f32]) {
        let (p, [na, _]) = (self.prefix, self.sides());
        let mut order: Vec<usize> = (0..na).collect();
        // Stable: of equals, the first token goes.
        order.sort_by(|&i, &j| best[j].1.total_cmp(&best[i].1));
        let mut gone = vec![false; na];
        order[..self.merged].iter().for_each(|&i| gone[i] = true);
        let left = p + na - self.merged;
        out[..p].iter_mut().enumerate().for_each(|(i, o)| *o = i as f32);
        let mut place = p;
        for (pair, (gone, best)) in out[p..].chunks_mut(2).zip(gone.iter().zip(best)) {
            pair[0] = if *gone { left + best.0 } else { place } as f32;
            place += usize::from(!gone);
        }
        out[p..].iter_mut().skip(1).step_by(2).enumerate().for_each(|(j, o)| *o = (left + j) as f32);
    }
}

/// The largest value and where it is first.
fn largest(row: &[f32]) -> (usize, f32) {
    let mut found = (0, f32::NEG_INFINITY);
    for (i, &v) in row.iter().enumerate() {
        if v > found.1 {
            found = (i, v);
        }
    }
    found
}

/// What tokens that go to one place become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Their sum: sizes.
    Sum,
    /// Their mean by a third input, the sizes `[tokens]`, or where there is none, their mean.
    Mean,
}

/// Merges tokens by the places that [`Match`] gave them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Merge {
    /// Tokens before.
    pub tokens: usize,
    /// Tokens after.
    pub left: usize,
    /// Values of one token.
    pub width: usize,
    /// What becomes of them.
    pub how: How,
}

impl Merge {
    /// Makes `[left][width]` of `values` `[tokens][width]`; `places` are whole numbers below `left`, each taken by one
    /// token or more.
    ///
    /// # Panics
    /// When a length is not as stated or a place is none.
    pub fn run(&self, values: &[f32], places: &[f32], sizes: Option<&[f32]>, out: &mut [f32]) {
        assert!(values.len() == self.tokens * self.width && out.len() == self.left * self.width);
        assert!(places.len() == self.tokens && sizes.is_none_or(|s| s.len() == self.tokens));
        out.fill(0.);
        let mut totals = vec![0.; self.left];
        for (t, (x, place)) in values.chunks_exact(self.width).zip(places).enumerate() {
            let place = *place as usize;
            let size = sizes.map_or(1., |s| s[t]);
            totals[place] += size;
            let out = &mut out[place * self.width..][..self.width];
            out.iter_mut().zip(x).for_each(|(o, v)| *o += v * size);
        }
        if self.how == How::Mean {
            for (row, total) in out.chunks_exact_mut(self.width).zip(totals) {
                row.iter_mut().for_each(|v| *v /= total);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matching(tokens: usize, prefix: usize, merged: usize, dim: usize) -> Match {
        let keys = HeadView { input: 0, offset: 0, strides: [0, dim, 2 * dim, 1] };
        Match { keys, heads: 2, tokens, dim, prefix, merged }
    }

    fn places(m: &Match, x: &[f32]) -> Vec<usize> {
        let mut out = vec![f32::NAN; m.tokens];
        m.run(&Exec::new(1).expect("one thread"), x, &mut out);
        out.into_iter().map(|v| v as usize).collect()
    }

    /// Keys of two heads that point the way of their token's number on the circle.
    fn circle(angles: &[f32]) -> Vec<f32> {
        angles.iter().flat_map(|a| [a.cos(), a.sin(), 0.5 * a.cos(), 0.5 * a.sin()]).collect()
    }

    #[test]
    fn the_most_similar_pairs_become_one() {
        // A protected token, then the sides a, b, a, b, a.
        let x = circle(&[0.0, 1.0, 3.0, 2.9, 1.1, 0.2]);
        // Nearest pairs: a0 (1.0) with b1 (1.1); a1 (2.9) with b0 (3.0), equally near; a2 (0.2) with b1.
        assert_eq!(places(&matching(6, 1, 0, 2), &x), [0, 1, 4, 2, 5, 3]);
        assert_eq!(places(&matching(6, 1, 2, 2), &x), [0, 3, 2, 2, 3, 1]);
        assert_eq!(places(&matching(6, 1, 3, 2), &x), [0, 2, 1, 1, 2, 2]);
    }

    #[test]
    fn ties_go_to_the_first() {
        let x = circle(&[1.0; 7]);
        assert_eq!(places(&matching(7, 0, 2, 2), &x), [2, 2, 2, 3, 0, 4, 1]);
        // Zeros are like nothing, and that is not an error.
        assert_eq!(places(&matching(4, 0, 1, 2), &[0.; 16]), [1, 1, 0, 2]);
    }

    #[test]
    fn matches_plain_loops_at_odd_sizes() {
        for (tokens, prefix, merged, dim) in [(37, 1, 8, 9), (66, 2, 31, 32), (64, 0, 32, 5), (5, 1, 2, 1)] {
            let m = matching(tokens, prefix, merged, dim);
            let x = crate::model::card::SelfTest::input(tokens as u64, tokens * 2 * dim);
            let key = |t: usize| -> Vec<f64> {
                let k: Vec<f64> =
                    (0..dim).map(|d| f64::from(x[t * 2 * dim + d]) + f64::from(x[t * 2 * dim + dim + d])).collect();
                let length = k.iter().map(|v| v * v).sum::<f64>().sqrt();
                k.iter().map(|v| v / length).collect()
            };
            let like = |a: usize, b: usize| key(a).iter().zip(key(b)).map(|(x, y)| x * y).sum::<f64>();
            let got = places(&m, &x);
            let a: Vec<usize> = (prefix..tokens).step_by(2).collect();
            let b: Vec<usize> = (prefix + 1..tokens).step_by(2).collect();
            let best: Vec<f64> = a.iter().map(|&i| b.iter().map(|&j| like(i, j)).fold(-2., f64::max)).collect();
            let left = prefix + a.len() - merged;
            let gone: Vec<usize> = (0..a.len()).filter(|&i| got[a[i]] >= left).collect();
            assert_eq!(gone.len(), merged);
            let least = gone.iter().map(|&i| best[i]).fold(2., f64::min);
            for (i, &token) in a.iter().enumerate() {
                match gone.contains(&i) {
                    true => assert!(like(token, b[got[token] - left]) > best[i] - 1e-6),
                    false => assert!(best[i] < least + 1e-6),
                }
            }
            let mut kept: Vec<usize> =
                (0..prefix).chain(a.iter().copied().filter(|t| got[*t] < left)).map(|t| got[t]).collect();
            kept.extend(b.iter().map(|&t| got[t]));
            assert_eq!(kept, (0..tokens - merged).collect::<Vec<_>>());
        }
    }

    #[test]
    fn tokens_are_weighted_by_their_sizes() {
        let merge = |how, width| Merge { tokens: 3, left: 2, width, how };
        let (values, places, sizes) = ([1., 2., 3., 4., 6., 9.], [1., 0., 1.], [1., 5., 3.]);
        let run = |m: Merge, values: &[f32], sizes: Option<&[f32]>| {
            let mut out = vec![f32::NAN; m.left * m.width];
            m.run(values, &places, sizes, &mut out);
            out
        };
        assert_eq!(run(merge(How::Mean, 2), &values, Some(&sizes)), [3., 4., 19. / 4., 29. / 4.]);
        assert_eq!(run(merge(How::Mean, 2), &values, None), [3., 4., 3.5, 5.5]);
        assert_eq!(run(merge(How::Sum, 1), &sizes, None), [5., 4.]);
    }
}

//! A strided copy: what is left of a chain of reshapes, transposes and slices.

use crate::exec::Exec;

/// Copies the elements of a view to a contiguous output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copy {
    /// Element of the input where the view starts.
    pub offset: usize,
    /// Size and input stride (in elements) of each axis, outermost first.
    pub axes: Vec<(usize, usize)>,
}

/// Elements of a row that are handled at once when rows must be transposed.
const BLOCK: usize = 16;

impl Copy {
    /// Merges axes that run through each other and drops those of one element.
    pub fn new(offset: usize, axes: impl IntoIterator<Item = (usize, usize)>) -> Copy {
        let mut merged: Vec<(usize, usize)> = vec![];
        for (size, stride) in axes.into_iter().filter(|a| a.0 != 1) {
            match merged.last_mut() {
                Some(outer) if outer.1 == size * stride => *outer = (outer.0 * size, stride),
                _ => merged.push((size, stride)),
            }
        }
        Copy { offset, axes: merged }
    }

    /// Whether the view is a run of elements in order.
    pub fn is_contiguous(&self) -> bool {
        matches!(self.axes.as_slice(), [] | [(_, 1)])
    }

    /// Elements copied.
    pub fn elements(&self) -> usize {
        self.axes.iter().map(|a| a.0).product()
    }

    /// Which rows of `width` elements of the input the rows of the output are; `None` where rows do not stay whole.
    pub fn rows(&self, width: usize) -> Option<Vec<usize>> {
        let (&(run, 1), outer) = self.axes.split_last()? else { return None };
        let whole = outer.iter().map(|a| a.1).chain([run, self.offset]).all(|n| n.is_multiple_of(width));
        let mut rows = vec![self.offset / width];
        for (n, stride) in outer.iter().map(|&(n, s)| (n, s / width)).chain([(run / width, 1)]) {
            rows = rows.iter().flat_map(|row| (0..n).map(move |i| row + i * stride)).collect();
        }
        whole.then_some(rows)
    }

    /// One past the last element read.
    pub fn end(&self) -> usize {
        self.axes.iter().fold(self.offset, |at, &(n, s)| at.saturating_add((n - 1).saturating_mul(s))) + 1
    }

    /// Fills `out`.
    ///
    /// # Panics
    /// When `x` ends before [`Copy::end`] or `out` is not [`Copy::elements`] long.
    pub fn run(&self, exec: &Exec, x: &[f32], out: &mut [f32]) {
        assert!(self.end() <= x.len() && out.len() == self.elements());
        match self.axes.as_slice() {
            [] => out[0] = x[self.offset],
            [(_, stride)] => strided(&x[self.offset..], *stride, out),
            [(_, stride), inner @ ..] => {
                let one: usize = inner.iter().map(|a| a.0).product();
                let few = out.len().div_ceil(one * exec.threads()).max(1);
                exec.chunks(out, few * one, &|i, out| {
                    let axes = [&[(out.len() / one, *stride)], inner].concat();
                    nested(&x[self.offset + i * few * stride..], &axes, out);
                });
            }
        }
    }
}

fn strided(x: &[f32], stride: usize, out: &mut [f32]) {
    match stride {
        1 => out.copy_from_slice(&x[..out.len()]),
        _ => out.iter_mut().zip(x.iter().step_by(stride.max(1))).for_each(|(o, x)| *o = *x),
    }
}

fn nested(x: &[f32], axes: &[(usize, usize)], out: &mut [f32]) {
    match *axes {
        [] => out[0] = x[0],
        [(_, stride)] => strided(x, stride, out),
        // Rows that lie one element apart: block by block, so that both sides stay in the cache.
        [(rows, 1), (columns, stride)] => {
            for first in (0..rows).step_by(BLOCK) {
                let rows = first..rows.min(first + BLOCK);
                for c in 0..columns {
                    let x = &x[c * stride..];
                    for r in rows.clone() {
                        out[r * columns + c] = x[r];
                    }
                }
            }
        }
        [(_, stride), ref inner @ ..] => {
            let one: usize = inner.iter().map(|a| a.0).product();
            for (i, out) in out.chunks_exact_mut(one).enumerate() {
                nested(&x[i * stride..], inner, out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_like_plain_loops() {
        let exec = Exec::new(1).expect("one thread");
        let x: Vec<f32> = (0..2 * 3 * 40 * 5).map(|i| i as f32).collect();
        // [2, 3, 40, 5] with its axes in other orders.
        let axes = [(2, 600), (3, 200), (40, 5), (5, 1)];
        for order in [[0, 1, 2, 3], [0, 3, 1, 2], [3, 2, 1, 0], [1, 3, 2, 0], [0, 1, 3, 2]] {
            let [a, b, c, d] = order.map(|i| axes[i]);
            let copy = Copy::new(0, [a, b, c, d]);
            let mut out = vec![0.; x.len()];
            copy.run(&exec, &x, &mut out);
            let mut want = vec![];
            for i in 0..a.0 {
                for j in 0..b.0 {
                    for k in 0..c.0 {
                        want.extend((0..d.0).map(|l| x[i * a.1 + j * b.1 + k * c.1 + l * d.1]));
                    }
                }
            }
            assert_eq!(out, want, "{order:?}");
        }
        assert!(Copy::new(0, axes).is_contiguous());
        assert_eq!(Copy::new(7, [(3, 200), (5, 1)]).end(), 7 + 400 + 4 + 1);
    }
}

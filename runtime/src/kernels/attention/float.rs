//! A head in float32.

use super::super::{ROWS_F32, RowsOf, room};
use super::{Head, NR, Output};

#[derive(Default)]
pub struct Scratch {
    keys: Vec<f32>,
    values: Vec<f32>,
    queries: Vec<f32>,
    sums: Vec<f32>,
}

pub fn run(head: &Head, out: &Output, s: &mut Scratch, scores: &mut Vec<f32>) {
    let a = head.attention;
    let (nq, nk, d) = (a.queries, a.keys, a.dim);
    let padded = nk.next_multiple_of(NR);
    // k as the weights of a linear layer q → scores, v as those of scores → output.
    let (x, [token, dim]) = head.view(&a.k);
    pack(&mut s.keys, nk, d, x, token, dim);
    if let Some((factor, grid)) = a.grids.k {
        grid.round_product(head.kernels, &mut s.keys, factor);
    }
    let (x, [token, dim]) = head.view(&a.v);
    pack(&mut s.values, a.dim_v, nk, x, dim, token);
    let (x, [token, dim]) = head.view(&a.q);
    let direct = dim == 1 && a.grids.q.is_none();
    let (scores, width) = (room(scores, ROWS_F32 * padded), a.dim_v.next_multiple_of(NR));
    let sums = room(&mut s.sums, ROWS_F32 * width);
    for m in (0..nq).step_by(ROWS_F32) {
        let n = ROWS_F32.min(nq - m);
        let x = &x[m * token..];
        if !direct {
            s.queries.clear();
            s.queries.extend((0..n).flat_map(|i| (0..d).map(move |k| x[i * token + k * dim])));
            if let Some((factor, grid)) = a.grids.q {
                grid.round_product(head.kernels, &mut s.queries, factor);
            }
        }
        let (x, stride) = if direct { (x, token) } else { (&s.queries[..], d) };
        head.kernels.multiply(&RowsOf { x, n, width: d, stride }, &s.keys, scores, padded);
        let mut factors = [0.; ROWS_F32];
        for (i, (scores, factor)) in scores.chunks_exact_mut(padded).zip(&mut factors).enumerate().take(n) {
            let scale = head.scores(m + i, 1., scores);
            *factor = head.exponentials(scale, scores);
        }
        let probabilities = RowsOf { x: scores, n, width: nk, stride: padded };
        head.kernels.multiply(&probabilities, &s.values, sums, width);
        for column in (0..a.dim_v).step_by(NR) {
            head.write(out, m, column, (&sums[column..], width), &factors);
        }
    }
}

/// Packs `n` outputs of `k` inputs, `x[n · n_stride + k · k_stride]`, into panels `[k][NR]`, reusing the buffer.
fn pack(into: &mut Vec<f32>, n: usize, k: usize, x: &[f32], n_stride: usize, k_stride: usize) {
    into.resize(n.div_ceil(NR) * k * NR, 0.);
    for (p, panel) in into.as_chunks_mut::<NR>().0.chunks_exact_mut(k).enumerate() {
        let columns = NR.min(n - p * NR);
        let x = &x[p * NR * n_stride..];
        if columns < NR {
            panel.as_flattened_mut().fill(0.);
        }
        match (n_stride, k_stride) {
            (1, _) if columns == NR => {
                for (i, row) in panel.iter_mut().enumerate() {
                    *row = *x[i * k_stride..].first_chunk().expect("NR values");
                }
            }
            // Column by column: reads run along the rows of x.
            (_, 1) => {
                for c in 0..columns {
                    let x = &x[c * n_stride..][..k];
                    panel.iter_mut().zip(x).for_each(|(row, v)| row[c] = *v);
                }
            }
            _ => {
                for (i, row) in panel.iter_mut().enumerate() {
                    (0..columns).for_each(|c| row[c] = x[c * n_stride + i * k_stride]);
                }
            }
        }
    }
}

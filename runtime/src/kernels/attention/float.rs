//! A head in float32.

use super::{Head, MR_F32, NR, Output};

#[derive(Default)]
pub struct Scratch {
    keys: Vec<f32>,
    values: Vec<f32>,
    queries: Vec<f32>,
}

pub fn run(head: &Head, out: &Output, s: &mut Scratch, scores: &mut [f32]) {
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
    for m in (0..nq).step_by(MR_F32) {
        // Past the end, the last row again.
        let row = |i: usize| (m + i).min(nq - 1) * token;
        if !direct {
            s.queries.clear();
            for i in 0..MR_F32 {
                s.queries.extend((0..d).map(|k| x[row(i) + k * dim]));
            }
            if let Some((factor, grid)) = a.grids.q {
                grid.round_product(head.kernels, &mut s.queries, factor);
            }
        }
        let q: [*const f32; MR_F32] = std::array::from_fn(|i| match direct {
            true => x[row(i)..][..d].as_ptr(),
            false => s.queries[i * d..].as_ptr(),
        });
        for (p, panel) in s.keys.chunks_exact(d * NR).enumerate() {
            // SAFETY: `kernels` came from `available`; rows hold d floats, the panel d·NR; each row of scores has
            // room for all panels.
            unsafe { (head.kernels.tile_f32)(&q, d, panel.as_ptr(), scores.as_mut_ptr().add(p * NR), padded) };
        }
        let mut factors = [0.; MR_F32];
        for (i, (scores, factor)) in scores.chunks_exact_mut(padded).zip(&mut factors).enumerate().take(nq - m) {
            let scale = head.scores(m + i, 1., scores);
            *factor = head.exponentials(scale, scores);
        }
        let p: [*const f32; MR_F32] = std::array::from_fn(|i| scores[i * padded..].as_ptr());
        for (c, panel) in s.values.chunks_exact(nk * NR).enumerate() {
            let mut tile = [[0.; NR]; MR_F32];
            // SAFETY: as above; rows hold at least nk floats.
            unsafe { (head.kernels.tile_f32)(&p, nk, panel.as_ptr(), tile.as_flattened_mut().as_mut_ptr(), NR) };
            head.write(out, m, c * NR, &tile, &factors);
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

//! Every kernel this CPU has, against plain loops: fixed seeds, odd sizes, extreme values.

use super::*;
use crate::model::card::SelfTest;

fn bytes(seed: u64, n: usize) -> Vec<u8> {
    SelfTest::input(seed, n).iter().map(|v| (v * 128.0 + 128.0) as u8).collect()
}

fn check_i8(kernels: &Kernels, n: usize, k: usize, x: &[u8], w: &[i8]) {
    let packed = I8Weights::pack(kernels, n, k, w, &vec![1.; n]);
    let stride = packed.row_bytes();
    // Padding bytes hold anything: their weights are 0.
    let mut stored = vec![77u8; MR_I8 * stride];
    for m in 0..MR_I8 {
        for i in 0..k {
            stored[m * stride + i] = x[m * k + i] ^ kernels.flip;
        }
    }
    let wide: Vec<i16> = stored.iter().map(|&v| i16::from(v)).collect();
    let offset = if kernels.flip == 0 { 0 } else { 128 };
    for (p, panel) in packed.panels.iter().enumerate() {
        let mut sums = [[0; NR]; MR_I8];
        let rows: [*const u8; MR_I8] = std::array::from_fn(|m| match panel.is_wide() {
            true => wide[m * stride..].as_ptr().cast(),
            false => stored[m * stride..].as_ptr(),
        });
        // SAFETY: `available` returned the kernel; rows hold `row_bytes` activations.
        unsafe { (kernels.tile_i8)(&rows, panel, &mut sums) };
        for m in 0..MR_I8 {
            for c in 0..NR.min(n - p * NR) {
                let row = &w[(p * NR + c) * k..][..k];
                let want: i32 = (0..k).map(|i| i32::from(x[m * k + i]) * i32::from(row[i])).sum();
                let got = sums[m][c] + offset * panel.sum[c];
                assert_eq!(got, want, "{} n={n} k={k} row {m} column {c}", kernels.name);
            }
        }
    }
}

#[test]
fn integer_tiles_are_exact() {
    for kernels in available() {
        for (n, k) in [(16, 4), (16, 8), (17, 3), (5, 1), (31, 67), (48, 192), (16, 1023)] {
            let x = bytes(1, MR_I8 * k);
            let w: Vec<i8> = bytes(2, n * k).iter().map(|&v| (v ^ 0x80) as i8).collect();
            check_i8(kernels, n, k, &x, &w);
            // Narrow, as paired groups like them, and in between.
            for shift in [1, 2, 3] {
                let w: Vec<i8> = w.iter().map(|v| v >> shift).collect();
                check_i8(kernels, n, k, &x, &w);
            }
        }
    }
}

#[test]
fn integer_tiles_are_exact_at_the_extremes() {
    for kernels in available() {
        for w in [-127i8, -128, 127, 0] {
            for x in [0u8, 255] {
                check_i8(kernels, 20, 37, &[x; 4 * 37], &[w; 20 * 37]);
            }
        }
        // Alternating signs: lanes cancel in the sum but not on the way.
        let w: Vec<i8> = (0..16 * 64).map(|i| if i % 2 == 0 { 127 } else { -127 }).collect();
        check_i8(kernels, 16, 64, &[255; 4 * 64], &w);
    }
}

#[test]
fn float_tiles_match() {
    for kernels in available() {
        for (k, panels) in [(1, 1), (3, 2), (64, 3), (197, 5)] {
            for n in (1..=16).chain([24, 31]) {
                let (stride, columns) = (k + 5, panels * NR);
                let x = SelfTest::input(3, n * stride);
                let w = SelfTest::input(4, columns * k);
                let packed = F32Weights::pack(columns, k, |n, i| w[n * k + i]);
                let mut sums = vec![7.; n * (columns + 1)];
                let rows = RowsOf { x: &x, n, width: k, stride };
                kernels.multiply(&rows, &packed.panels, &mut sums[..n * (columns + 1) - 1], columns + 1);
                for (m, sums) in sums.chunks_exact(columns + 1).enumerate() {
                    for (c, sum) in sums[..columns].iter().enumerate() {
                        let want: f64 = (0..k).map(|i| f64::from(x[m * stride + i]) * f64::from(w[c * k + i])).sum();
                        assert!((f64::from(*sum) - want).abs() < 1e-4, "{} {k} row {m} column {c}", kernels.name);
                    }
                    assert_eq!(sums[columns], 7., "{} wrote beside the panels", kernels.name);
                }
            }
        }
    }
}

fn erf64(x: f64) -> f64 {
    // Series for small arguments, 1 − continued fraction for large ones.
    if x.abs() < 3.0 {
        let (mut term, mut sum) = (x, x);
        for n in 1..200 {
            term *= -x * x / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        return sum * 2.0 / std::f64::consts::PI.sqrt();
    }
    let mut f = 0.0;
    for n in (1..60).rev() {
        f = f64::from(n) / 2.0 / (x.abs() + f);
    }
    (1.0 - (-x * x).exp() / std::f64::consts::PI.sqrt() / (x.abs() + f)).copysign(x)
}

#[test]
fn functions_keep_their_error_bounds() {
    let xs: Vec<f32> = (-2000..2000).map(|i| i as f32 * 0.0101).collect();
    for kernels in available() {
        for (activation, reference, bound) in [
            (Activation::Gelu, (|x: f64| 0.5 * x * (1.0 + erf64(x / 2f64.sqrt()))) as fn(f64) -> f64, 2e-6),
            (Activation::Silu, |x: f64| x / (1.0 + (-x).exp()), 2e-6),
            (Activation::Sigmoid, |x: f64| 1.0 / (1.0 + (-x).exp()), 3e-7),
            (
                Activation::GeluTanh,
                |x: f64| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh()),
                2e-6,
            ),
        ] {
            let mut y = xs.clone();
            // SAFETY: `available` returned the kernel.
            unsafe { (kernels.rows.activate)(activation, &mut y) };
            for (x, y) in xs.iter().zip(&y) {
                let error = (f64::from(*y) - reference(f64::from(*x))).abs() / f64::from(x.abs()).max(1.0);
                assert!(error < bound, "{} {activation:?} at {x}: {y}, error {error:e}", kernels.name);
            }
        }
    }
}

#[test]
fn panels_finish_their_rows() {
    // One input with weight 1 and a scale: each row's output is a chosen value, then biased, activated and added.
    let gelu = |x: f64| 0.5 * x * (1.0 + erf64(x / 2f64.sqrt()));
    for kernels in available() {
        let one = I8Weights::pack(kernels, NR, 1, &[1; NR], &[1.; NR]);
        for rows in [1usize, 4, 7, 12, 31] {
            let padded = rows.next_multiple_of(MR_I8);
            let mut stored = vec![0; padded * one.row_bytes()];
            let value = |m: usize| (m * 37 % 256) as i32 - 100;
            for m in 0..rows {
                stored[m * one.row_bytes()] = (value(m) + 100) as u8 ^ kernels.flip;
            }
            let zero = if kernels.flip == 0 { 100 } else { 100 - 128 };
            let quant = RowQuant { scale: 0.05, zero };
            let each = vec![quant; padded];
            for quants in [Quants::Shared(quant), Quants::Each(&each)] {
                for (activation, reference, bound) in [
                    (Activation::None, (|x| x) as fn(f64) -> f64, 1e-5),
                    (Activation::Relu, |x: f64| x.max(0.), 1e-5),
                    (Activation::Gelu, gelu, 1e-4),
                    (Activation::Silu, |x: f64| x / (1.0 + (-x).exp()), 1e-3),
                ] {
                    let mut out = vec![f32::NAN; rows * 20];
                    let residual: Vec<f32> = (0..out.len()).map(|i| i as f32).collect();
                    let job = PanelJob {
                        rows: stored.as_ptr(),
                        stride: one.row_bytes(),
                        quants,
                        panel: &one.panels[0],
                        bias: &[0.25; NR],
                        next: &[],
                        second: None,
                        activation,
                        target: Target {
                            out: out.as_mut_ptr(),
                            residual: residual.as_ptr(),
                            stride: 20,
                            rows,
                            columns: NR,
                        },
                    };
                    // SAFETY: `available` returned the kernel; the target lies inside `out` and `residual`.
                    unsafe { (kernels.panel_i8)(&job) };
                    for m in 0..rows {
                        for n in 0..20 {
                            let (got, at) = (f64::from(out[m * 20 + n]), m * 20 + n);
                            if n >= NR {
                                assert!(got.is_nan(), "{} wrote past column {NR}", kernels.name);
                                continue;
                            }
                            let x = f64::from(value(m)) * 0.05 + 0.25;
                            let error = (got - at as f64 - reference(x)).abs() / x.abs().max(1.0);
                            // The residual is added in float32.
                            assert!(
                                error < bound + at as f64 * 1e-7,
                                "{} {activation:?} of {x}: {error:e}",
                                kernels.name
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn sixteen_bit_tiles_are_exact() {
    for kernels in available() {
        let Some(tile) = kernels.tile_i16 else { continue };
        for pairs in [1, 3, 32, 99] {
            // Sums stay below 2²⁴, which float32 holds exactly.
            let value = |i: usize| ((i * 7919 + 13) % 401) as i16 - 200;
            let x: Vec<i16> = (0..MR_F32 * 2 * pairs).map(value).collect();
            let w: Vec<i16> = (0..pairs * NR * 2).map(|i| value(i + 5)).collect();
            let mut sums = [[0.; NR]; MR_F32];
            let rows = std::array::from_fn(|m| x[m * 2 * pairs..].as_ptr());
            // SAFETY: `available` returned the kernel; rows hold 2·pairs values, the panel pairs·NR pairs.
            unsafe { tile(&rows, pairs, w.as_ptr(), 1, sums.as_flattened_mut().as_mut_ptr(), NR) };
            for (m, sums) in sums.iter().enumerate() {
                for (n, &got) in sums.iter().enumerate() {
                    let product =
                        |i: usize| i32::from(x[m * 2 * pairs + i]) * i32::from(w[(i / 2 * NR + n) * 2 + i % 2]);
                    let want: i32 = (0..2 * pairs).map(product).sum();
                    assert_eq!(got, want as f32, "{} {pairs} pairs, row {m}, column {n}", kernels.name);
                }
            }
        }
    }
}

#[test]
fn tables_and_codes_match_plain_loops() {
    let table: [u8; 256] = std::array::from_fn(|i| (i * 151 + 7) as u8);
    for kernels in available() {
        for n in [1, 15, 16, 197, 2 * 128 * 16 + 3] {
            let x = bytes(12, n);
            let mut y = x.clone();
            // SAFETY: `available` returned the kernel, here and below.
            let sum = unsafe {
                (kernels.rows.lookup)(&table, &mut y);
                (kernels.rows.lookup_sum)(&table, &x)
            };
            let want: Vec<u8> = x.iter().map(|&v| table[usize::from(v)]).collect();
            assert_eq!(y, want, "{} {n}", kernels.name);
            assert_eq!(sum, want.iter().map(|&v| u32::from(v)).sum::<u32>(), "{} {n}", kernels.name);
        }
        let tiles: [TileI8; 3] = std::array::from_fn(|p| {
            std::array::from_fn(|m| std::array::from_fn(|n| ((p * 64 + m * 16 + n) as i32 - 90) * 997))
        });
        let columns: [[i32; NR]; 3] = std::array::from_fn(|p| std::array::from_fn(|n| (p * n) as i32 - 9));
        let products = rows::Products { tiles: &tiles, rows: [0, -500, 12_345, 7], columns: &columns };
        let mut out = vec![0; MR_I8 * 3 * NR];
        // SAFETY: as above.
        unsafe { (kernels.rows.codes)(&products, 0.0025, 131., &mut out) };
        for (i, &got) in out.iter().enumerate() {
            let (m, p, n) = (i / (3 * NR), i / NR % 3, i % NR);
            let product = (tiles[p][m][n] + products.rows[m] + columns[p][n]) as f32;
            assert_eq!(
                f32::from(got),
                ((product * 0.0025).round_ties_even() + 131.).clamp(0., 255.),
                "{} {i}",
                kernels.name
            );
        }
    }
}

#[test]
fn rows_match_plain_loops() {
    for kernels in available() {
        for k in [1, 7, 16, 197, 384] {
            let x: Vec<f32> = SelfTest::input(9, k).iter().map(|v| v * 5.0 + 1.0).collect();
            // SAFETY: `available` returned the kernel, here and below.
            let (low, high) = unsafe { (kernels.rows.range)(&x) };
            assert_eq!(low, x.iter().copied().fold(0., f32::min));
            assert_eq!(high, x.iter().copied().fold(0., f32::max));
            let mut q = vec![0; k];
            // SAFETY: as above.
            unsafe { (kernels.rows.quantize)(&x, 20.0, 30.0, kernels.flip, &mut q) };
            for (q, x) in q.iter().zip(&x) {
                let want = ((x * 20.0).round_ties_even() + 30.0).clamp(0., 255.) as u8;
                assert_eq!(q ^ kernels.flip, want);
            }
            let norm = Norm { gamma: SelfTest::input(10, k), beta: SelfTest::input(11, k), epsilon: 1e-6 };
            // Five rows, each with its own mean and deviation.
            let wide: Vec<Vec<f32>> =
                (0..5).map(|m| x.iter().map(|v| v * (m + 1) as f32 - m as f32).collect()).collect();
            let (mut y, mut ranges) = (vec![0.; 5 * k], [(9., 9.); 5]);
            kernels.layer_norm(&norm, |m| &wide[m], &mut y, &mut ranges);
            for ((x, y), range) in wide.iter().zip(y.chunks_exact(k)).zip(ranges) {
                let mean = x.iter().map(|&v| f64::from(v)).sum::<f64>() / k as f64;
                let var = x.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / k as f64;
                for i in 0..k {
                    let want = (f64::from(x[i]) - mean) / (var + 1e-6).sqrt() * f64::from(norm.gamma[i])
                        + f64::from(norm.beta[i]);
                    assert!((f64::from(y[i]) - want).abs() < 2e-5, "{} {} {want}", kernels.name, y[i]);
                }
                assert_eq!(range, (y.iter().copied().fold(0., f32::min), y.iter().copied().fold(0., f32::max)));
            }
            for scale in [0.7, 0., -0.3] {
                let mut p = x.clone();
                p.resize(k.next_multiple_of(rows::LANES), 99.);
                // SAFETY: as above.
                let factor = unsafe { (kernels.rows.exponentials)(&mut p, k, scale) };
                let sum: f64 = x.iter().map(|&v| f64::from(scale * v).exp()).sum();
                for i in 0..k {
                    assert!((f64::from(p[i] * factor) - f64::from(scale * x[i]).exp() / sum).abs() < 1e-6);
                }
                let most = x.iter().map(|&v| f64::from(scale * v)).fold(f64::NEG_INFINITY, f64::max);
                let (largest, padded) = (9000., k.next_multiple_of(rows::LANES));
                for count in [1, 3] {
                    let mut rows: Vec<f32> =
                        x.iter().copied().chain(vec![99.; padded - k]).cycle().take(count * padded).collect();
                    let (mut words, mut factors) = (vec![7i16; count * padded], vec![0.; count]);
                    // SAFETY: as above.
                    unsafe { (kernels.rows.softmax_i16)(&mut rows, k, scale, largest, &mut words, &mut factors) };
                    for (words, factor) in words.chunks_exact(padded).zip(factors) {
                        for (w, x) in words.iter().zip(&x) {
                            let want = (f64::from(scale * x) - most).exp() * f64::from(largest);
                            assert!((f64::from(*w) - want).abs() <= 0.5 + 1e-4 * want, "{} {w} {want}", kernels.name);
                        }
                        assert!(words[k..].iter().all(|w| *w == 0));
                        let sum: i32 = words.iter().map(|w| i32::from(*w)).sum();
                        assert!((sum as f32 * factor - 1.).abs() < 1e-6);
                    }
                }
            }
        }
    }
}

#[test]
fn special_values_do_not_trap() {
    for kernels in available() {
        let x = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3.4e38, -3.4e38];
        let mut q = [9u8; 5];
        // SAFETY: `available` returned the kernel.
        unsafe { (kernels.rows.quantize)(&x, 1.0, 10.0, 0, &mut q) };
        assert_eq!(q, [0, 255, 0, 255, 0], "{}", kernels.name);
        // Where a softmax is no number it says so; elsewhere −∞ has no share of it.
        let masked = f32::NEG_INFINITY;
        for (x, is_number) in
            [([1., masked], true), ([masked; 2], false), ([1., f32::NAN], false), ([1., f32::INFINITY], false)]
        {
            let mut row = [0.; rows::LANES];
            row[..2].copy_from_slice(&x);
            let (mut words, mut factor) = ([9; rows::LANES], [0.]);
            // SAFETY: as above.
            unsafe { (kernels.rows.softmax_i16)(&mut row, 2, 1., 100., &mut words, &mut factor) };
            assert_eq!(!factor[0].is_nan(), is_number, "{} {x:?}", kernels.name);
            assert!(!is_number || words[..3] == [100, 0, 0]);
        }
    }
}

#[test]
fn pairs_are_packed_alike() {
    for kernels in available() {
        for (n, width) in [(1, 1), (5, 7), (16, 32), (17, 48), (33, 20), (40, 64), (197, 65)] {
            let stride = width + 3;
            let x: Vec<f32> = SelfTest::input(13, n * stride).iter().map(|v| v * 900.).collect();
            let rows = rows::RowsOf { x: &x, n, width, stride };
            let at = |row: usize, i: usize| match row < n && i < width {
                true => (x[row * stride + i] * 0.5).round_ties_even() as i16,
                false => 0,
            };
            let (pairs, steps) = (width.div_ceil(2), n.div_ceil(2));
            let mut keys = vec![[[9; 2]; NR]; n.div_ceil(NR) * pairs];
            let mut values = vec![[[9; 2]; NR]; width.div_ceil(NR) * steps];
            // SAFETY: `available` returned the kernel.
            let magnitude = unsafe {
                (kernels.rows.pack_keys)(&rows, 0.5, &mut keys);
                (kernels.rows.pack_values)(&rows, 0.5, &mut values);
                (kernels.rows.magnitude)(&rows)
            };
            for (i, pair) in keys.as_flattened().iter().enumerate() {
                let (panel, d, c) = (i / NR / pairs, i / NR % pairs, i % NR);
                let want = [2 * d, 2 * d + 1].map(|d| at(panel * NR + c, d));
                assert_eq!(*pair, want, "{} {n} {width} {i}", kernels.name);
            }
            for (i, pair) in values.as_flattened().iter().enumerate() {
                let (panel, row, c) = (i / NR / steps, i / NR % steps, i % NR);
                let want = [2 * row, 2 * row + 1].map(|row| at(row, panel * NR + c));
                assert_eq!(*pair, want, "{} {n} {width} {i}", kernels.name);
            }
            let all = (0..n).flat_map(|row| &x[row * stride..][..width]);
            assert_eq!(magnitude, all.map(|v| v.abs()).fold(0., f32::max));
        }
        for odd in [f32::NAN, -f32::NAN, f32::NEG_INFINITY] {
            for place in [0, 40, 66] {
                let mut x = [1.; 67];
                x[place] = odd;
                // SAFETY: as above.
                let magnitude =
                    unsafe { (kernels.rows.magnitude)(&rows::RowsOf { x: &x, n: 1, width: 67, stride: 67 }) };
                assert!(!magnitude.is_finite(), "{} {odd} {place}", kernels.name);
            }
        }
    }
}

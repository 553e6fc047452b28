//! Rounding that looks at the inputs: a weight's rounding error is made up for by the weights that are rounded after
//! it, as far as their inputs vary together (Frantar and others, GPTQ; Chee and others, QuIP), and what is left of it
//! on the mean input goes into the bias.

use super::layers::Layer;
use super::number::{Weight, clipped_scales, narrowest, weight_scales};
use ndarray::linalg::general_mat_mul;
use ndarray::{Array1, Array2, Axis, s};
use vedge_calibration::InputMoments;

/// Share of the mean variance that is added to every input's: what few pictures do not show must not be trusted.
const DAMPING: f64 = 0.01;
/// Inputs rounded before their errors are passed on to all later ones at once.
const BLOCK: usize = 64;

/// Integers for a layer and the bias that goes with them.
#[derive(Clone)]
pub struct Rounded {
    /// The weight.
    pub weight: Weight,
    /// To be added to each output channel's bias.
    pub bias: Vec<f32>,
}

/// What may be done before weights are rounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Before {
    /// Large weights of a channel are clipped as far as that lowers the squared error of the outputs.
    pub clip: bool,
    /// Weights are fitted anew to the noisy inputs, by ridge regression with the noise as the ridge (ERQ): those of inputs that
    /// vary less than the noise shrink.
    pub ridge: bool,
}

/// Rounds the weights of a layer, given as in the file, so that its outputs stay near on inputs of these moments.
/// `noise` is the variance that quantization adds to every input. `None` where no input varies or the numbers break down.
pub fn compensated(
    layer: &Layer,
    values: &[f32],
    moments: &InputMoments,
    noise: f64,
    before: Before,
) -> Option<Rounded> {
    let mut scales = weight_scales(values, &layer.shape, layer.out_axis, layer.grid());
    let outputs = layer.shape[layer.out_axis];
    let inputs = values.len() / outputs.max(1);
    let groups = moments.groups();
    // A group has its own inputs and outputs: all of them, or one channel of a depthwise convolution.
    if values.is_empty() || !outputs.is_multiple_of(groups) || moments.mean(0).len() != inputs {
        return None;
    }
    let at = |output: usize, input: usize| match layer.out_axis {
        0 => output * inputs + input,
        _ => input * outputs + output,
    };
    let per_group = outputs / groups;
    if before.clip {
        let narrow = narrowest(values, &layer.shape, layer.out_axis, layer.grid());
        for group in 0..groups {
            let of = group * per_group..(group + 1) * per_group;
            let importance: Vec<f64> = moments.covariance(group).diag().iter().map(|v| v + noise).collect();
            let clipped = clipped_scales(values, &scales[of.clone()], &narrow[of.clone()], &importance, |o, i| {
                at(of.start + o, i)
            });
            scales[of].copy_from_slice(&clipped);
        }
    }
    let mut integers = vec![0i8; values.len()];
    let mut bias = vec![0f32; outputs];
    for group in 0..groups {
        let first = group * per_group;
        let w = Array2::from_shape_fn((inputs, per_group), |(i, o)| f64::from(values[at(first + o, i)]));
        let scale: Vec<f64> = scales[first..first + per_group].iter().map(|s| f64::from(*s)).collect();
        let (q, shift) = solve(&w, &scale, &moments.covariance(group), &moments.mean(group), noise, before.ridge)?;
        for ((i, o), q) in q.indexed_iter() {
            integers[at(first + o, i)] = *q as i8;
        }
        for (o, s) in shift.iter().enumerate() {
            bias[first + o] = *s as f32;
        }
    }
    Some(Rounded { weight: Weight { values: integers, scales }, bias })
}

/// Integers `[inputs][outputs]` and shifts of the outputs for weights `[inputs][outputs]`.
fn solve(
    w: &Array2<f64>,
    scale: &[f64],
    covariance: &Array2<f64>,
    mean: &Array1<f64>,
    noise: f64,
    ridge: bool,
) -> Option<(Array2<f64>, Array1<f64>)> {
    let inputs = w.nrows();
    let variance = covariance.diag().sum() / inputs as f64 + noise;
    if !(variance.is_finite() && variance > 0.0) {
        return None;
    }
    // The input that varies most is rounded first: its error is passed on to all others.
    let mut order: Vec<usize> = (0..inputs).collect();
    order.sort_by(|a, b| covariance[(*b, *b)].total_cmp(&covariance[(*a, *a)]).then(a.cmp(b)));
    let mut h = covariance.select(Axis(0), &order).select(Axis(1), &order);
    for i in 0..inputs {
        h[(i, i)] += noise + DAMPING * variance;
    }
    let (feedback, diagonal) = feedback(h)?;
    let float = w.select(Axis(0), &order);
    // The weights that do best on noisy inputs: (C + λ + noise)⁻¹ (C + λ) W, with λ for what few pictures do not show.
    let original = match ridge {
        true => &float - &(inverse(&feedback, &diagonal, &float) * noise),
        false => float.clone(),
    };
    let mut rounded = Array2::zeros(w.raw_dim());
    // What is still owed: (weight − rounded weight) of the inputs that are done.
    let mut error: Array2<f64> = Array2::zeros(w.raw_dim());
    for start in (0..inputs).step_by(BLOCK) {
        let end = (start + BLOCK).min(inputs);
        let owed = feedback.slice(s![..start, start..end]).t().dot(&error.slice(s![..start, ..]));
        for i in start..end {
            let mut target = &original.row(i) + &owed.row(i - start);
            for j in start..i {
                target.scaled_add(feedback[(j, i)], &error.row(j));
            }
            for (o, t) in target.iter().enumerate() {
                let q = (t / scale[o]).round_ties_even().clamp(-127.0, 127.0);
                rounded[(i, o)] = q;
                error[(i, o)] = original[(i, o)] - q * scale[o];
            }
        }
    }
    let mut integers = Array2::zeros(w.raw_dim());
    for (i, &input) in order.iter().enumerate() {
        integers.row_mut(input).assign(&rounded.row(i));
    }
    let mut left = float;
    left.zip_mut_with(&(&rounded * &Array1::from_vec(scale.to_vec())), |w, q| *w -= q);
    let shift = mean.select(Axis(0), &order).dot(&left);
    let finite = shift.iter().all(|v| v.is_finite());
    finite.then_some((integers, shift))
}

/// `U` with `H = (U + 1) D (U + 1)ᵀ`, strictly upper triangular; column i says what the errors of the inputs before i ask
/// of input i; and `D`. `None` when `H` is not positive definite.
fn feedback(mut h: Array2<f64>) -> Option<(Array2<f64>, Array1<f64>)> {
    // H = R Rᵀ with R upper triangular, from the last columns on, in place, a block of columns at a time: what the
    // columns after a block say about it is one matrix product.
    let n = h.nrows();
    for start in (0..n).step_by(BLOCK).rev() {
        let end = (start + BLOCK).min(n);
        let (before, after) = h.slice_mut(s![..end, ..]).split_at(Axis(1), end);
        let mut block = before.slice_move(s![.., start..]);
        general_mat_mul(-1.0, &after, &after.slice(s![start.., ..]).t(), 1.0, &mut block);
        for i in (0..end - start).rev() {
            let tail = block.slice(s![start + i, i + 1..]).to_owned();
            let pivot = block[(start + i, i)] - tail.dot(&tail);
            if !(pivot.is_finite() && pivot > 0.0) {
                return None;
            }
            let diagonal = pivot.sqrt();
            for mut row in block.rows_mut().into_iter().take(start + i) {
                row[i] = (row[i] - row.slice(s![i + 1..]).dot(&tail)) / diagonal;
            }
            block[(start + i, i)] = diagonal;
        }
    }
    // Each column over its diagonal.
    let diagonal = h.diag().to_owned();
    for ((i, j), v) in h.indexed_iter_mut() {
        *v = if i < j { *v / diagonal[j] } else { 0.0 };
    }
    Some((h, diagonal.mapv(|v| v * v)))
}

/// `H⁻¹ W` with `H = (U + 1) D (U + 1)ᵀ`.
fn inverse(u: &Array2<f64>, d: &Array1<f64>, w: &Array2<f64>) -> Array2<f64> {
    let n = u.nrows();
    let mut x = w.clone();
    let blocks: Vec<usize> = (0..n).step_by(BLOCK).collect();
    for &start in blocks.iter().rev() {
        let end = (start + BLOCK).min(n);
        for i in (start..end).rev() {
            let (mut above, row) = x.view_mut().split_at(Axis(0), i);
            for j in start..i {
                above.row_mut(j).scaled_add(-u[(j, i)], &row.row(0));
            }
        }
        let (mut above, done) = x.view_mut().split_at(Axis(0), start);
        general_mat_mul(-1.0, &u.slice(s![..start, start..end]), &done.slice(s![..end - start, ..]), 1.0, &mut above);
    }
    x.rows_mut().into_iter().zip(d).for_each(|(mut row, d)| row /= *d);
    for &start in &blocks {
        let end = (start + BLOCK).min(n);
        for i in start..end {
            let (row, mut below) = x.view_mut().split_at(Axis(0), i + 1);
            for j in i + 1..end {
                below.row_mut(j - i - 1).scaled_add(-u[(i, j)], &row.row(i));
            }
        }
        let (done, mut below) = x.view_mut().split_at(Axis(0), end);
        general_mat_mul(-1.0, &u.slice(s![start..end, end..]).t(), &done.slice(s![start.., ..]), 1.0, &mut below);
    }
    x
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::number::quantize_weight;
    use ndarray::ArrayD;
    use vedge_calibration::View;

    fn noise(seed: u64, n: usize) -> Vec<f32> {
        vedge_runtime::model::card::SelfTest::input(seed, n)
    }

    fn layer(inputs: usize, outputs: usize) -> Layer {
        Layer {
            name: "l".into(),
            node: 0,
            activation: "x".into(),
            weight: "w".into(),
            out_axis: 1,
            shape: vec![inputs, outputs],
            class: "linear",
            view: Some(View::Rows),
        }
    }

    /// Rows that lie near a space of `rank` dimensions, off zero by `mean`.
    fn rows(count: usize, inputs: usize, rank: usize, mean: f32) -> ArrayD<f32> {
        let basis = Array2::from_shape_vec((rank, inputs), noise(1, rank * inputs)).unwrap();
        let at = Array2::from_shape_vec((count, rank), noise(2, count * rank)).unwrap();
        let own = Array2::from_shape_vec((count, inputs), noise(3, count * inputs)).unwrap();
        (at.dot(&basis) + own * 0.05 + mean).into_dyn()
    }

    /// Mean squared error of the outputs with integers and a bias.
    fn error(x: &ArrayD<f32>, w: &[f32], q: &Weight, bias: &[f32]) -> f64 {
        let outputs = bias.len();
        let x = x.view().into_dimensionality::<ndarray::Ix2>().unwrap();
        let w = Array2::from_shape_vec((x.ncols(), outputs), w.to_vec()).unwrap();
        let q = Array2::from_shape_fn(w.raw_dim(), |(i, o)| f32::from(q.values[i * outputs + o]) * q.scales[o]);
        let bias = Array1::from_vec(bias.to_vec());
        (x.dot(&(&w - &q)) - bias).mapv(|e| f64::from(e).powi(2)).mean().unwrap()
    }

    fn compare(x: &ArrayD<f32>, inputs: usize, outputs: usize) -> (f64, f64) {
        let l = layer(inputs, outputs);
        let w = noise(7, inputs * outputs);
        let mut m = InputMoments::new(x.shape(), View::Rows).unwrap();
        for row in x.axis_chunks_iter(Axis(0), 32) {
            m.add(&row.to_owned());
        }
        let plain = quantize_weight(&w, &l.shape, 1, l.grid());
        let better = compensated(&l, &w, &m, 0.0, Before::default()).unwrap();
        (error(x, &w, &plain, &vec![0.0; outputs]), error(x, &w, &better.weight, &better.bias))
    }

    #[test]
    fn inputs_that_vary_together_make_up_for_each_others_rounding() {
        let (nearest, compensated) = compare(&rows(2048, 96, 8, 0.0), 96, 40);
        assert!(compensated < nearest / 10.0, "{nearest} {compensated}");
    }

    #[test]
    fn the_error_on_the_mean_input_goes_into_the_bias() {
        let (nearest, compensated) = compare(&rows(2048, 96, 1, 3.0), 96, 40);
        assert!(compensated < nearest / 50.0, "{nearest} {compensated}");
    }

    #[test]
    fn inputs_without_relation_are_rounded_to_the_nearest() {
        let l = layer(8, 3);
        let w = noise(7, 24);
        let covariance = Array2::eye(8);
        let scales = weight_scales(&w, &l.shape, 1, l.grid());
        let scale: Vec<f64> = scales.iter().map(|s| f64::from(*s)).collect();
        let w64 = Array2::from_shape_fn((8, 3), |(i, o)| f64::from(w[i * 3 + o]));
        let (q, shift) = solve(&w64, &scale, &covariance, &Array1::zeros(8), 0.0, false).unwrap();
        let nearest = quantize_weight(&w, &l.shape, 1, l.grid());
        assert!(q.iter().zip(&nearest.values).all(|(q, n)| *q == f64::from(*n)));
        assert!(shift.iter().all(|s| *s == 0.0));
    }

    #[test]
    fn the_feedback_is_the_factor_of_the_matrix() {
        let b = Array2::from_shape_vec((9, 6), noise(4, 54)).unwrap().mapv(f64::from);
        let h = b.t().dot(&b);
        let u = feedback(h.clone()).unwrap().0 + Array2::<f64>::eye(6);
        // (U + 1)⁻¹ H (U + 1)⁻ᵀ must be diagonal: solve by hand, from the last row up.
        let mut d = h;
        for _ in 0..2 {
            for i in (0..6).rev() {
                for j in i + 1..6 {
                    let row = d.row(j).to_owned();
                    d.row_mut(i).scaled_add(-u[(i, j)], &row);
                }
            }
            d = d.reversed_axes();
        }
        for ((i, j), v) in d.indexed_iter() {
            assert!(if i == j { *v > 0.0 } else { v.abs() < 1e-9 }, "{i} {j} {v}");
        }
        assert!(feedback(Array2::from_elem((3, 3), 1.0)).is_none());
    }

    #[test]
    fn the_feedback_of_many_inputs_is_the_factor_too() {
        let n = 2 * BLOCK + 5;
        let b = Array2::from_shape_vec((n + 9, n), noise(4, (n + 9) * n)).unwrap().mapv(f64::from);
        let h = b.t().dot(&b);
        let u = feedback(h.clone()).unwrap().0 + Array2::<f64>::eye(n);
        // D follows from the last column on; with it the product must be H.
        let mut d = Array1::zeros(n);
        for i in (0..n).rev() {
            d[i] = h[(i, i)] - (i + 1..n).map(|j| u[(i, j)] * u[(i, j)] * d[j]).sum::<f64>();
        }
        let product = (&u * &d).dot(&u.t());
        assert!((product - &h).iter().all(|e| e.abs() < 1e-9 * h[(0, 0)]));
    }

    #[test]
    fn nothing_seen_is_nothing_to_compensate() {
        let m = InputMoments::new(&[1, 4, 8], View::Rows).unwrap();
        assert!(compensated(&layer(8, 3), &noise(7, 24), &m, 0.0, Before::default()).is_none());
        // InputMoments of another value do not fit.
        assert!(compensated(&layer(9, 3), &noise(7, 27), &m, 1.0, Before::default()).is_none());
    }

    #[test]
    fn the_inverse_is_one() {
        let n = 2 * BLOCK + 5;
        let b = Array2::from_shape_vec((n + 9, n), noise(4, (n + 9) * n)).unwrap().mapv(f64::from);
        let h = b.t().dot(&b) + Array2::<f64>::eye(n);
        let (u, d) = feedback(h.clone()).unwrap();
        let w = Array2::from_shape_vec((n, 7), noise(5, n * 7)).unwrap().mapv(f64::from);
        assert!((h.dot(&inverse(&u, &d, &w)) - &w).iter().all(|e| e.abs() < 1e-9));
    }

    /// Mean squared error of the outputs on inputs with noise of that variance, without and with what may be done before.
    fn with_noise(x: &ArrayD<f32>, w: &[f32], variance: f64, before: Before) -> [f64; 2] {
        let inputs = x.shape()[1];
        let l = layer(inputs, w.len() / inputs);
        let mut m = InputMoments::new(x.shape(), View::Rows).unwrap();
        x.axis_chunks_iter(Axis(0), 32).for_each(|rows| m.add(&rows.to_owned()));
        let jitter = ArrayD::from_shape_vec(x.shape(), noise(11, x.len())).unwrap() * (3.0 * variance).sqrt() as f32;
        [Before::default(), before].map(|b| {
            let r = compensated(&l, w, &m, variance, b).unwrap();
            let outputs = r.bias.len();
            let w = Array2::from_shape_vec((inputs, outputs), w.to_vec()).unwrap();
            let q = Array2::from_shape_fn(w.raw_dim(), |(i, o)| {
                f32::from(r.weight.values[i * outputs + o]) * r.weight.scales[o]
            });
            let [clean, noisy] = [x.clone(), x + &jitter].map(|x| x.into_dimensionality::<ndarray::Ix2>().unwrap());
            (noisy.dot(&q) + Array1::from_vec(r.bias) - clean.dot(&w)).mapv(|e| f64::from(e).powi(2)).mean().unwrap()
        })
    }

    #[test]
    fn ridge_helps_where_the_noise_is_as_large_as_what_an_input_tells() {
        let before = Before { ridge: true, clip: false };
        let w = noise(7, 64 * 32);
        let [without, with] = with_noise(&rows(2048, 64, 6, 0.0), &w, 0.05, before);
        assert!(with < 0.5 * without, "{without} {with}");
        // Hardly any noise: nothing to gain, nothing lost.
        let [without, with] = with_noise(&rows(2048, 64, 6, 0.0), &w, 1e-7, before);
        assert!((with / without - 1.0).abs() < 0.05, "{without} {with}");
    }

    #[test]
    fn clipping_helps_where_a_large_weight_has_an_input_that_hardly_varies() {
        let before = Before { ridge: false, clip: true };
        let mut x = rows(2048, 64, 60, 0.0);
        x.index_axis_mut(Axis(1), 5).mapv_inplace(|v| v * 0.001);
        let mut w = noise(7, 64 * 32);
        w[5 * 32..6 * 32].fill(20.0);
        let [without, with] = with_noise(&x, &w, 1e-9, before);
        assert!(with < 0.5 * without, "{without} {with}");
        // Weights alike: every one keeps its place.
        let even = noise(7, 64 * 32);
        let [without, with] = with_noise(&rows(2048, 64, 60, 0.0), &even, 1e-9, before);
        assert!(with <= 1.02 * without, "{without} {with}");
    }
}

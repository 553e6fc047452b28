//! The algebra of leaving inputs of a linear layer out: which one hurts least, and how the others make up for it.
//!
//! For y = x·W + b with the covariance C and the mean μ of x, dropping the inputs P and keeping S, the least-squares
//! repair is W_S + (C_SS + λI)⁻¹C_SP·W_P, with b chosen so that the mean of y stays. With A = (C + λI)⁻¹ one group is
//! dropped at a time: its cost is tr(W_Gᵀ·A_GG⁻¹·W_G), the expected squared error of y, and A and W are brought up to
//! date by the block-inverse identity. Dropping one by one gives the same as solving for all at once.

use ndarray::{Array1, Array2, ArrayView2, Axis, s};
use std::collections::HashSet;

/// λ relative to the mean variance.
pub const RIDGE: f64 = 1e-3;

/// A linear layer whose inputs are dropped group by group.
#[derive(Clone)]
pub struct Elimination {
    /// (C + λI)⁻¹ of the inputs that are left; rows and columns of dropped ones are zero.
    inverse: Array2<f64>,
    /// Inputs × outputs; rows of dropped inputs are zero.
    weights: Array2<f64>,
}

impl Elimination {
    /// `covariance` is inputs × inputs, `weights` inputs × outputs. `None` when the covariance is not a finite one.
    pub fn new(covariance: &Array2<f64>, weights: Array2<f64>, ridge: f64) -> Option<Elimination> {
        let inverse = spd_inverse(&ridged(covariance, ridge)?)?;
        inverse.iter().all(|v| v.is_finite()).then_some(Elimination { inverse, weights })
    }

    /// Expected squared error of the output when these inputs go, the others making up for them.
    pub fn cost(&self, group: &[usize]) -> f64 {
        match group {
            [j] => self.weights.row(*j).mapv(|w| w * w).sum() / self.inverse[[*j, *j]],
            _ => {
                let w = self.weights.select(Axis(0), group);
                let block = self.inverse.select(Axis(0), group).select(Axis(1), group);
                spd_inverse(&block).map_or(f64::INFINITY, |m| (&m.dot(&w) * &w).sum())
            }
        }
    }

    /// Drops inputs and repairs the weights of those that are left. False (and nothing done) where that is singular.
    pub fn drop(&mut self, group: &[usize]) -> bool {
        let rows = self.inverse.select(Axis(0), group);
        let block = rows.select(Axis(1), group);
        let Some(m) = spd_inverse(&block) else { return false };
        let w = self.weights.select(Axis(0), group);
        let back = rows.t().dot(&m);
        // The group's own rows become zero by the same formula; rounding is wiped out below.
        self.weights -= &back.dot(&w);
        self.inverse -= &back.dot(&rows);
        for &j in group {
            self.weights.row_mut(j).fill(0.0);
            self.inverse.row_mut(j).fill(0.0);
            self.inverse.column_mut(j).fill(0.0);
        }
        true
    }

    /// The weights as they are now: inputs × outputs, zero rows for dropped inputs.
    pub fn weights(&self) -> &Array2<f64> {
        &self.weights
    }
}

/// The least-squares repair for dropping these inputs, solved at once: weights (inputs × outputs, zero rows for dropped
/// inputs) and what to add to the bias so that the mean of the output stays. `None` where the covariance is not one.
pub fn repair(
    covariance: &Array2<f64>,
    mean: &Array1<f64>,
    weights: &Array2<f64>,
    dropped: &[usize],
    ridge: f64,
) -> Option<(Array2<f64>, Array1<f64>)> {
    let c = ridged(covariance, ridge)?;
    let gone: HashSet<usize> = dropped.iter().copied().collect();
    let kept: Vec<usize> = (0..c.nrows()).filter(|i| !gone.contains(i)).collect();
    let rows = c.select(Axis(0), &kept);
    let inverse = spd_inverse(&rows.select(Axis(1), &kept))?;
    let lost = rows.select(Axis(1), dropped).dot(&weights.select(Axis(0), dropped));
    let change = inverse.dot(&lost);
    let mut repaired = Array2::zeros(weights.raw_dim());
    for (row, &i) in change.rows().into_iter().zip(&kept) {
        repaired.row_mut(i).assign(&(&row + &weights.row(i)));
    }
    let bias = mean.dot(weights) - mean.dot(&repaired);
    bias.iter().chain(&repaired).all(|v| v.is_finite()).then_some((repaired, bias))
}

/// C + λI.
fn ridged(covariance: &Array2<f64>, ridge: f64) -> Option<Array2<f64>> {
    let mut c = covariance.clone();
    let mean = c.diag().mean().filter(|m| m.is_finite() && *m >= 0.0)?;
    // An input that never moved has no variance: dropping it must cost nothing but be possible.
    c.diag_mut().mapv_inplace(|v| v + (ridge * mean).max(1e-12));
    Some(c)
}

/// Inverse of a symmetric positive definite matrix. `None` where it is singular.
pub fn spd_inverse(a: &Array2<f64>) -> Option<Array2<f64>> {
    let (_, inverse) = cholesky(a.view())?;
    Some(inverse.t().dot(&inverse))
}

/// L with L·Lᵀ = A, and L⁻¹; by halves, so that almost all of the work is in matrix products.
fn cholesky(a: ArrayView2<f64>) -> Option<(Array2<f64>, Array2<f64>)> {
    let n = a.nrows();
    if n <= 24 {
        return small_cholesky(a);
    }
    let h = n / 2;
    let (l11, i11) = cholesky(a.slice(s![..h, ..h]))?;
    let l21 = a.slice(s![h.., ..h]).dot(&i11.t());
    let rest = &a.slice(s![h.., h..]) - &l21.dot(&l21.t());
    let (l22, i22) = cholesky(rest.view())?;
    let i21 = -i22.dot(&l21).dot(&i11);
    let join = |top: Array2<f64>, low: Array2<f64>, left: Array2<f64>| {
        let mut whole = Array2::zeros((n, n));
        whole.slice_mut(s![..h, ..h]).assign(&top);
        whole.slice_mut(s![h.., ..h]).assign(&left);
        whole.slice_mut(s![h.., h..]).assign(&low);
        whole
    };
    Some((join(l11, l22, l21), join(i11, i22, i21)))
}

fn small_cholesky(a: ArrayView2<f64>) -> Option<(Array2<f64>, Array2<f64>)> {
    let n = a.nrows();
    let (mut l, mut inverse) = (Array2::<f64>::zeros((n, n)), Array2::<f64>::zeros((n, n)));
    for i in 0..n {
        for j in 0..=i {
            let sum = a[[i, j]] - (0..j).map(|k| l[[i, k]] * l[[j, k]]).sum::<f64>();
            if i == j && (sum.is_nan() || sum <= 0.0) {
                return None;
            }
            l[[i, j]] = if i == j { sum.sqrt() } else { sum / l[[j, j]] };
        }
        // Row i of L·L⁻¹ = I.
        for j in 0..=i {
            let sum = f64::from(i == j) - (j..i).map(|k| l[[i, k]] * inverse[[k, j]]).sum::<f64>();
            inverse[[i, j]] = sum / l[[i, i]];
        }
    }
    Some((l, inverse))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(rows: usize, columns: usize, seed: u64) -> Array2<f64> {
        let mut state = seed;
        Array2::from_shape_simple_fn((rows, columns), || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as f64 / f64::from(1u32 << 30) - 1.0
        })
    }

    /// 200 rows of 40 dependent inputs.
    fn inputs() -> Array2<f64> {
        let mixed = random(200, 25, 1).dot(&random(25, 40, 2));
        mixed + 0.05 * random(200, 40, 3) + 1.5
    }

    fn moments(x: &Array2<f64>) -> (Array1<f64>, Array2<f64>) {
        let mean = x.mean_axis(Axis(0)).unwrap();
        let centred = x - &mean;
        (mean, centred.t().dot(&centred) / x.nrows() as f64)
    }

    #[test]
    fn the_inverse_is_one() {
        for n in [1, 5, 24, 25, 90] {
            let a = random(n, n, n as u64);
            let c = a.dot(&a.t()) + Array2::<f64>::eye(n);
            let unit = c.dot(&spd_inverse(&c).unwrap());
            assert!((unit - Array2::<f64>::eye(n)).iter().all(|d| d.abs() < 1e-9), "{n}");
        }
        assert!(spd_inverse(&Array2::zeros((2, 2))).is_none());
        // Of rank 20 but for a ridge: halves whose inverses were multiplied would lose it.
        let low = random(300, 20, 1);
        let c = low.dot(&low.t()) + 1e-4 * Array2::<f64>::eye(300);
        let unit = c.dot(&spd_inverse(&c).unwrap());
        assert!((unit - Array2::<f64>::eye(300)).iter().all(|d| d.abs() < 1e-6));
    }

    /// An independent solution: gradient descent on the squared error of the outputs over the rows themselves.
    #[test]
    fn the_repair_is_the_least_squares_solution() {
        let (x, w) = (inputs(), random(40, 3, 4));
        let (mean, covariance) = moments(&x);
        let dropped = [3, 4, 17, 31];
        let kept: Vec<usize> = (0..40).filter(|i| !dropped.contains(i)).collect();
        let mut e = Elimination::new(&covariance, w.clone(), 1e-12).unwrap();
        let mut cost = 0.0;
        for j in dropped {
            cost += e.cost(&[j]);
            assert!(e.drop(&[j]));
        }
        let (all, change) = repair(&covariance, &mean, &w, &dropped, 1e-12).unwrap();
        assert!((e.weights() - &all).iter().all(|d| d.abs() < 1e-7));
        let repaired = all.select(Axis(0), &kept);
        let error =
            |weights: &Array2<f64>, bias: &Array1<f64>| x.select(Axis(1), &kept).dot(weights) + bias - x.dot(&w);
        // The normal equations hold: what is left is orthogonal to every kept input and to the constant.
        let left = error(&repaired, &change);
        let mean_left = left.mean_axis(Axis(0)).unwrap();
        assert!(mean_left.iter().all(|v| v.abs() < 1e-9), "{mean_left}");
        let slope = x.select(Axis(1), &kept).t().dot(&left) / 200.0;
        assert!(slope.iter().all(|v| v.abs() < 1e-7), "{slope}");
        // The predicted cost is the error.
        let squared = left.mapv(|v| v * v).sum() / 200.0;
        assert!((squared - cost).abs() < 1e-6 * squared, "{squared} against {cost}");
        // A step of descent away from it in any direction only hurts.
        for seed in 10..14 {
            let other = &repaired + &(1e-3 * random(kept.len(), 3, seed));
            assert!(error(&other, &change).mapv(|v| v * v).sum() > left.mapv(|v| v * v).sum());
        }
    }

    #[test]
    fn one_by_one_equals_all_at_once() {
        let (x, w) = (inputs(), random(40, 3, 4));
        let (mean, covariance) = moments(&x);
        let group = [5, 6, 20];
        let mut single = Elimination::new(&covariance, w.clone(), RIDGE).unwrap();
        let mut whole = single.clone();
        let cost: f64 = group
            .iter()
            .map(|&j| {
                let cost = single.cost(&[j]);
                assert!(single.drop(&[j]));
                cost
            })
            .sum();
        assert!((cost - whole.cost(&group)).abs() < 1e-9 * cost);
        assert!(whole.drop(&group));
        let (at_once, _) = repair(&covariance, &mean, &w, &group, RIDGE).unwrap();
        assert!((single.weights() - whole.weights()).iter().all(|d| d.abs() < 1e-9));
        assert!((single.weights() - &at_once).iter().all(|d| d.abs() < 1e-9));
    }

    #[test]
    fn a_constant_group_costs_nothing_and_moves_into_the_bias() {
        let mut x = inputs();
        for j in [7, 8] {
            x.column_mut(j).fill(j as f64);
        }
        let w = random(40, 3, 4);
        let (mean, covariance) = moments(&x);
        let total: f64 = x.dot(&w).mapv(|v| v * v).sum() / 200.0;
        let (repaired, change) = repair(&covariance, &mean, &w, &[7, 8], RIDGE).unwrap();
        let y = x.dot(&repaired) + change;
        let error = (y - x.dot(&w)).mapv(|v| v * v).sum() / 200.0;
        assert!(error < 1e-12 * total, "{error} of {total}");
    }

    /// Gaussian elimination with row pivoting on [A | B], which shares nothing with the Cholesky factors above.
    fn gauss(a: &Array2<f64>, b: &Array2<f64>) -> Array2<f64> {
        let n = a.nrows();
        let mut m = ndarray::concatenate(Axis(1), &[a.view(), b.view()]).unwrap();
        for i in 0..n {
            let pivot = (i..n).max_by(|&p, &q| m[[p, i]].abs().total_cmp(&m[[q, i]].abs())).unwrap();
            for k in 0..m.ncols() {
                m.swap([i, k], [pivot, k]);
            }
            let row = &m.row(i) / m[[i, i]];
            for r in (0..n).filter(|&r| r != i) {
                let factor = m[[r, i]];
                m.row_mut(r).scaled_add(-factor, &row);
            }
            m.row_mut(i).assign(&row);
        }
        m.slice(s![.., n..]).to_owned()
    }

    /// Least squares on the samples themselves, [X_S 1]·[V; c] ≈ X·W, by its normal equations.
    #[test]
    fn the_repair_is_the_least_squares_fit_of_the_samples() {
        let (x, dropped) = (inputs(), [3, 4, 5, 20, 39]);
        let w = random(40, 6, 20);
        let (mean, c) = moments(&x);
        let (repaired, bias) = repair(&c, &mean, &w, &dropped, 0.0).unwrap();
        let kept: Vec<usize> = (0..40).filter(|i| !dropped.contains(i)).collect();
        let ones = Array2::ones((200, 1));
        let design = ndarray::concatenate(Axis(1), &[x.select(Axis(1), &kept).view(), ones.view()]).unwrap();
        let fit = gauss(&design.t().dot(&design), &design.t().dot(&x.dot(&w)));
        for (k, &i) in kept.iter().enumerate() {
            assert!((&repaired.row(i) - &fit.row(k)).iter().all(|d| d.abs() < 1e-7), "input {i}");
        }
        assert!((&bias - &fit.row(kept.len())).iter().all(|d| d.abs() < 1e-7), "{bias} {fit}");
        assert!(dropped.iter().all(|&i| repaired.row(i).iter().all(|v| *v == 0.0)));
    }

    /// A head whose output never changes: the bias takes it over, and no weight that stays moves.
    #[test]
    fn a_head_with_constant_output_leaves_nothing_behind() {
        let (mut x, head) = (inputs(), [8, 9, 10, 11, 12, 13, 14, 15]);
        head.iter().for_each(|&j| x.column_mut(j).fill(0.25 * j as f64 - 2.0));
        let w = random(40, 5, 21);
        let (mean, c) = moments(&x);
        let (repaired, bias) = repair(&c, &mean, &w, &head, RIDGE).unwrap();
        let difference = x.dot(&w) - (x.dot(&repaired) + &bias);
        assert!(difference.iter().all(|d| d.abs() < 1e-9), "{difference}");
    }
}

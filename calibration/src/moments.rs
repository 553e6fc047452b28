//! Means and covariances of inner values: what the least-squares repair of a pruned layer needs.

use crate::statistics::{not_finite, watch};
use ndarray::linalg::general_mat_mul;
use ndarray::{Array1, Array2, ArrayD, ArrayView2, Axis};
use std::collections::BTreeMap;
use vedge_runtime::onnx::Graph;
use vedge_runtime::{Error, Options, Result};

/// First and second moments of rows (the last axis of a value), summed in f64; size does not grow with their number.
#[derive(Clone, Debug)]
pub struct Moments {
    rows: f64,
    sum: Array1<f64>,
    products: Array2<f64>,
}

impl Moments {
    /// Of rows of `width` values, none seen yet.
    pub fn new(width: usize) -> Moments {
        Moments { rows: 0.0, sum: Array1::zeros(width), products: Array2::zeros((width, width)) }
    }

    /// Adds rows (rows × width).
    pub fn add(&mut self, rows: ArrayView2<f32>) {
        // In f64: rounded sums of f32 would leave covariances of many dependent columns indefinite.
        for block in rows.axis_chunks_iter(Axis(0), 512) {
            let block = block.mapv(f64::from);
            general_mat_mul(1.0, &block.t(), &block, 1.0, &mut self.products);
            self.sum += &block.sum_axis(Axis(0));
            self.rows += block.nrows() as f64;
        }
    }

    /// Mean of each column.
    pub fn mean(&self) -> Array1<f64> {
        &self.sum / self.rows.max(1.0)
    }

    /// Covariance of the columns (width × width), divided by the number of rows.
    pub fn covariance(&self) -> Array2<f64> {
        let mean = self.mean();
        let column = mean.view().insert_axis(Axis(1));
        &self.products / self.rows.max(1.0) - column.dot(&mean.view().insert_axis(Axis(0)))
    }

    /// How many rows were seen.
    pub fn rows(&self) -> usize {
        self.rows as usize
    }
}

/// Runs `graph` (float, input shapes fixed) on `inputs` and sums up the moments of the values named `taps`; `done`
/// hears of each picture's outputs.
///
/// # Errors
/// Those of [`Session`](vedge_runtime::Session) and of `inputs`; [`Error::Shape`] for a tap that the graph does not have; [`Error::BadModel`]
/// when a value is infinite or NaN.
pub fn moments(
    graph: &Graph,
    taps: &[String],
    inputs: impl Iterator<Item = Result<ArrayD<f32>>>,
    options: &Options,
    mut done: impl FnMut(usize, &[ArrayD<f32>]),
) -> Result<BTreeMap<String, Moments>> {
    let mut all = vec![];
    for t in taps {
        let width = graph.shape(t).and_then(|s| s.last().copied());
        let width = width.ok_or_else(|| Error::Shape(format!("value `{t}` has no fixed shape in the graph")))?;
        all.push((width, None));
    }
    let values: Vec<&str> = taps.iter().map(String::as_str).collect();
    let mut picture = 0;
    let see = |values: &[(usize, &ArrayD<f32>)], outputs: &[ArrayD<f32>]| {
        for &(at, value) in values {
            if value.iter().any(|v| !v.is_finite()) {
                return Err(not_finite(&taps[at], picture));
            }
            let (width, moments) = &mut all[at];
            let value = value.as_standard_layout();
            let rows = value.view().into_shape_with_order((value.len() / *width, *width));
            let rows = rows.map_err(|e| Error::Shape(format!("value `{}`: {e}", taps[at])))?;
            moments.get_or_insert_with(|| Moments::new(*width)).add(rows);
        }
        done(picture, outputs);
        picture += 1;
        Ok(())
    };
    watch(graph, &values, inputs, options, see)?;
    Ok(taps.iter().cloned().zip(all.into_iter().map(|(width, m)| m.unwrap_or_else(|| Moments::new(width)))).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn equal_to_the_textbook_in_any_portions() {
        let rows = Array2::from_shape_fn((1300, 3), |(i, j)| ((i * (j + 3) * 7 + j) % 11) as f32 / 3.0 - 1.0);
        let mut whole = Moments::new(3);
        whole.add(rows.view());
        let mut parts = Moments::new(3);
        rows.axis_chunks_iter(Axis(0), 77).for_each(|r| parts.add(r));
        let rows = rows.mapv(f64::from);
        let mean = rows.mean_axis(Axis(0)).unwrap();
        let centred = &rows - &mean;
        let covariance = centred.t().dot(&centred) / 1300.0;
        for m in [whole, parts] {
            assert_eq!(m.rows(), 1300);
            assert!((m.mean() - &mean).iter().all(|d| d.abs() < 1e-6));
            assert!((m.covariance() - &covariance).iter().all(|d| d.abs() < 1e-5));
        }
    }

    #[test]
    fn a_constant_column_has_no_variance() {
        let mut m = Moments::new(2);
        m.add(array![[5.0, 1.0], [5.0, 3.0]].view());
        assert_eq!(m.covariance(), array![[0.0, 0.0], [0.0, 1.0]]);
    }
}

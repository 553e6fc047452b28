//! The classifier at the end of a shrunk model, fitted again in closed form: ridge regression from its features to what
//! the whole model said of the same pictures. No labels, no training. The ridge pulls towards the weights as they are,
//! and how strongly is chosen by the error on pictures left out one at a time, which has a closed form too; where
//! changing nothing is best, nothing is changed.

use crate::progress;
use crate::prune::eliminate::spd_inverse;
use ndarray::{Array1, Array2, ArrayD, Axis};
use std::collections::BTreeMap;
use vedge_runtime::onnx::{Graph, NodeProto, Uses, elements, f32_tensor, shape_of, value_info};
use vedge_runtime::{Error, Options, Result, Session};

/// Ridges that are tried, relative to the mean squared length of the features.
const RIDGES: [f64; 9] = [1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 10.0];
/// Fewer pictures tell nothing.
const LEAST: usize = 16;

/// What was done.
#[derive(Clone, Debug, PartialEq)]
pub struct Refit {
    /// Mean squared error of the logits against the whole model's before, and on pictures left out, after.
    pub error: [f64; 2],
    /// For the card.
    pub note: String,
}

/// A linear layer whose output reaches the logits through sums and scalar factors alone.
#[derive(Clone, Debug, PartialEq)]
struct Head {
    node: usize,
    /// Value that it takes in, `[1][features]`.
    input: String,
    /// Factor between its output and the logits.
    scale: f64,
    /// Whether its weight is stored outputs × inputs.
    by_output: bool,
}

/// Fits the classifier of a shrunk float graph to `answers`, the logits of the whole model, one row for each of `inputs`.
/// `None` where the output does not come from linear layers or nothing is gained.
///
/// # Errors
/// Those of running the graph and of `inputs`.
pub fn refit(
    graph: &mut Graph,
    output: usize,
    inputs: impl Iterator<Item = Result<ArrayD<f32>>>,
    answers: &[Vec<f32>],
    options: &Options,
) -> Result<Option<Refit>> {
    let heads = heads(graph, graph.outputs[output].name()).filter(|_| answers.len() >= LEAST);
    let Some(heads) = heads else { return Ok(None) };
    let mut tapped = graph.clone();
    let mut taps: BTreeMap<&str, usize> = BTreeMap::new();
    for h in &heads {
        let Some((dtype, shape)) = graph.fact(&h.input) else { return Ok(None) };
        taps.entry(&h.input).or_insert_with(|| {
            tapped.outputs.push(value_info(&h.input, dtype, &shape));
            tapped.outputs.len() - 1
        });
    }
    let mut session = Session::from_graph(tapped, options)?;
    let bar = progress::bar("fitting the classifier", answers.len());
    let (mut features, mut residual) = (vec![], vec![]);
    for (x, want) in inputs.zip(answers) {
        let y = session.run(&[x?])?;
        for h in &heads {
            features.extend(y[taps[h.input.as_str()]].iter().map(|v| h.scale * f64::from(*v)));
        }
        if y[output].len() != want.len() {
            let (have, want) = (y[output].len(), want.len());
            return Err(Error::Shape(format!("the classifier has {have} outputs, the whole model's {want}")));
        }
        residual.extend(want.iter().zip(&y[output]).map(|(a, b)| f64::from(*a) - f64::from(*b)));
        bar.inc(1);
    }
    bar.finish_and_clear();
    let rows = answers.len();
    let matrix = |v: Vec<f64>| {
        let columns = v.len() / rows;
        Array2::from_shape_vec((rows, columns), v).map_err(|e| Error::Shape(e.to_string()))
    };
    let (features, residual) = (matrix(features)?, matrix(residual)?);
    let Some(fit) = fit(&features, &residual) else { return Ok(None) };
    apply(graph, &heads, &fit);
    let [before, after] = fit.error;
    let share = 100.0 * (1.0 - after / before);
    let note = format!(
        "refit: classifier fitted to the whole model's logits on {rows} pictures, {share:.0} % less error on those left out"
    );
    Ok(Some(Refit { error: fit.error, note }))
}

/// The linear layers that add up to a value.
fn heads(g: &Graph, output: &str) -> Option<Vec<Head>> {
    let uses = Uses::of(g);
    let mut open = vec![(output.to_string(), 1.0)];
    let mut found = vec![];
    while let Some((value, scale)) = open.pop() {
        let node = uses.producer(&value)?;
        let n = &g.nodes[node];
        let constant = |i: &str| g.initializers.contains_key(i);
        // What else uses the value would change with it.
        if value != output && uses.only_consumer(&value).is_none() {
            return None;
        }
        match (n.op_type(), n.input.as_slice()) {
            ("Add", [a, b]) => open.extend([a, b].into_iter().filter(|i| !constant(i)).map(|i| (i.clone(), scale))),
            ("Identity", [a]) => open.push((a.clone(), scale)),
            ("Mul", [a, b]) | ("Div", [a, b]) => {
                let divides = n.op_type() == "Div";
                let (variable, factor) = match (g.const_scalar(a), g.const_scalar(b)) {
                    (None, Some(f)) => (a, f64::from(f)),
                    (Some(f), None) if !divides => (b, f64::from(f)),
                    _ => return None,
                };
                let factor = if divides { 1.0 / factor } else { factor };
                open.push((variable.clone(), scale * factor));
            }
            ("MatMul" | "Gemm", [input, weight, ..]) => {
                let plain = n.int("transA", 0) == 0 && n.float("alpha", 1.0) == 1.0 && n.float("beta", 1.0) == 1.0;
                let matrix = g.initializers.get(weight).is_some_and(|t| shape_of(t).len() == 2);
                let row = g.shape(input).is_some_and(|s| s.len() == 2 && s[0] == 1);
                if !plain || !matrix || !row || constant(input) || !scale.is_finite() || scale == 0.0 {
                    return None;
                }
                let by_output = n.op_type() == "Gemm" && n.int("transB", 0) != 0;
                found.push(Head { node, input: input.clone(), scale, by_output });
            }
            _ => return None,
        }
    }
    found.sort_by_key(|h| h.node);
    (!found.is_empty()).then_some(found)
}

/// A change of weights and bias that brings features nearer to their targets.
#[derive(Debug)]
struct Fit {
    /// Features × outputs.
    weights: Array2<f64>,
    /// Of the outputs.
    bias: Array1<f64>,
    /// Mean squared residual before, and with each row left out, after.
    error: [f64; 2],
}

/// Ridge regression of residuals (rows × outputs) on features (rows × features), its strength chosen by the error on
/// rows left out; `None` where no change is best.
fn fit(features: &Array2<f64>, residual: &Array2<f64>) -> Option<Fit> {
    let n = features.nrows() as f64;
    let (mean, bias) = (features.mean_axis(Axis(0))?, residual.mean_axis(Axis(0))?);
    let (f, r) = (features - &mean, residual - &bias);
    let gram = f.dot(&f.t());
    let scale = gram.diag().mean()?;
    let size = residual.len() as f64;
    let before = residual.mapv(|v| v * v).sum() / size;
    // The bias alone; the mean without a row is further from it.
    let alone = r.mapv(|v| (v * n / (n - 1.0)).powi(2)).sum() / size;
    let mut best = Fit { weights: Array2::zeros((f.ncols(), r.ncols())), bias: bias.clone(), error: [before, alone] };
    for ridge in RIDGES {
        let mut k = gram.clone();
        k.diag_mut().mapv_inplace(|v| v + ridge * scale);
        let Some(inverse) = spd_inverse(&k) else { continue };
        let dual = inverse.dot(&r);
        // What is left of row i without itself: e/(1 − h), where h is its leverage, the mean's share included.
        let left = &r - &gram.dot(&dual);
        let leverage = (&gram * &inverse).sum_axis(Axis(1)) + 1.0 / n;
        let error = left.rows().into_iter().zip(&leverage).map(|(e, h)| e.mapv(|v| (v / (1.0 - h)).powi(2)).sum());
        let error = error.sum::<f64>() / size;
        if error < best.error[1] {
            let weights = f.t().dot(&dual);
            best = Fit { bias: &bias - &mean.dot(&weights), weights, error: [before, error] };
        }
    }
    let finite = best.weights.iter().chain(&best.bias).all(|v| v.is_finite());
    (finite && best.error[1] < before).then_some(best)
}

/// Adds the change to the weights, and to the bias of the last of the heads.
fn apply(g: &mut Graph, heads: &[Head], fit: &Fit) {
    let mut row = 0;
    for h in heads {
        let name = g.nodes[h.node].input[1].clone();
        let shape = shape_of(&g.initializers[&name]);
        let mut values = g.const_f32(&name).expect("a float weight");
        let (inputs, outputs) = if h.by_output { (shape[1], shape[0]) } else { (shape[0], shape[1]) };
        for i in 0..inputs {
            for o in 0..outputs {
                let at = if h.by_output { o * inputs + i } else { i * outputs + o };
                // The features were scaled as the output is.
                values[at] += fit.weights[[row + i, o]] as f32;
            }
        }
        row += inputs;
        let new = g.fresh(&format!("{name}_refit"));
        g.initializers.insert(new.clone(), f32_tensor(&new, &shape, &values));
        g.nodes[h.node].input[1] = new;
    }
    let last = heads.last().expect("there is a head");
    let change: Vec<f32> = fit.bias.iter().map(|b| (b / last.scale) as f32).collect();
    let n = g.nodes[last.node].clone();
    let bias = (n.op_type() == "Gemm").then(|| n.input_name(2).to_string()).filter(|b| !b.is_empty());
    let known = bias.and_then(|b| g.const_f32(&b).filter(|v| v.len() == change.len()).map(|v| (b, v)));
    if let Some((name, values)) = known {
        let shape = shape_of(&g.initializers[&name]);
        debug_assert_eq!(elements(&shape), values.len());
        let values: Vec<f32> = values.iter().zip(&change).map(|(a, b)| a + b).collect();
        let new = g.fresh(&format!("{name}_refit"));
        g.initializers.insert(new.clone(), f32_tensor(&new, &shape, &values));
        g.nodes[last.node].input[2] = new;
        return;
    }
    let output = n.output[0].clone();
    let (product, bias) = (g.fresh(&format!("{output}_product")), g.fresh(&format!("{output}_refit_bias")));
    g.initializers.insert(bias.clone(), f32_tensor(&bias, &[1, change.len()], &change));
    if let Some((dtype, shape)) = g.fact(&output) {
        g.value_info.insert(product.clone(), value_info(&product, dtype, &shape));
    }
    g.nodes[last.node].output[0] = product.clone();
    g.nodes.insert(last.node + 1, NodeProto::of("Add", &[&product, &bias], &[&output], vec![]));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passes::{Prepare, prepare};
    use std::path::Path;
    use vedge_runtime::model::card::SelfTest;

    fn random(rows: usize, columns: usize, seed: u64) -> Array2<f64> {
        let values = SelfTest::input(seed * 10_000, rows * columns);
        Array2::from_shape_vec((rows, columns), values.into_iter().map(f64::from).collect()).unwrap()
    }

    /// Leaving rows out for real, one after the other, gives the error that the formula does.
    #[test]
    fn the_error_is_that_of_rows_left_out() {
        let (f, noise) = (random(40, 6, 1), random(40, 2, 2));
        let r = f.dot(&random(6, 2, 3)) + 0.5 * noise + 0.3;
        let whole = fit(&f, &r).unwrap();
        let scale = {
            let c = &f - &f.mean_axis(Axis(0)).unwrap();
            (&c * &c).sum() / 40.0
        };
        let error = |ridge: f64| {
            let mut sum = 0.0;
            for i in 0..40 {
                let rest: Vec<usize> = (0..40).filter(|j| *j != i).collect();
                let (a, b) = (f.select(Axis(0), &rest), r.select(Axis(0), &rest));
                let (ma, mb) = (a.mean_axis(Axis(0)).unwrap(), b.mean_axis(Axis(0)).unwrap());
                let (ca, cb) = (&a - &ma, &b - &mb);
                let mut normal = ca.t().dot(&ca);
                normal.diag_mut().mapv_inplace(|v| v + ridge * scale);
                let w = spd_inverse(&normal).unwrap().dot(&ca.t().dot(&cb));
                let said = (&f.row(i) - &ma).dot(&w) + mb;
                sum += (&r.row(i) - &said).mapv(|v| v * v).sum();
            }
            sum / 80.0
        };
        let best = RIDGES.into_iter().map(error).fold(f64::INFINITY, f64::min);
        assert!((best - whole.error[1]).abs() < 1e-9 * best, "{best} {:?}", whole.error);
        assert!(whole.error[1] < whole.error[0] / 2.0);
    }

    #[test]
    fn where_nothing_is_to_be_gained_nothing_changes() {
        let f = random(40, 60, 1);
        // Residuals that have nothing to do with the features, and no mean.
        let mut r = random(40, 2, 9);
        let mean = r.mean_axis(Axis(0)).unwrap();
        r -= &mean;
        assert!(fit(&f, &r).is_none());
        assert!(fit(&f, &Array2::zeros((40, 2))).is_none());
    }

    /// A classifier that was spoilt is restored by the answers of the one that was not, for one head and for two.
    #[test]
    fn a_spoilt_classifier_is_restored() {
        for file in ["models/deit_nano.onnx", "models/mobilevit_nano.onnx"] {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file);
            let mut whole = Graph::read(&path).unwrap();
            prepare(&mut whole, &Prepare::default()).unwrap();
            let inputs: Vec<ArrayD<f32>> = (0..24)
                .map(|i| ArrayD::from_shape_vec(vec![1, 3, 64, 64], SelfTest::input(i * 20_000, 3 * 64 * 64)).unwrap())
                .collect();
            let answers = |g: &Graph| -> Vec<Vec<f32>> {
                let mut session = Session::from_graph(g.clone(), &Options::default()).unwrap();
                inputs
                    .iter()
                    .map(|x| session.run(std::slice::from_ref(x)).unwrap()[0].iter().copied().collect())
                    .collect()
            };
            let want = answers(&whole);
            let mut spoilt = whole.clone();
            for h in heads(&whole, "logits").unwrap() {
                let name = whole.nodes[h.node].input[1].clone();
                let t = &whole.initializers[&name];
                let values: Vec<f32> = whole.const_f32(&name).unwrap().iter().map(|v| v * 0.5 + 0.01).collect();
                spoilt.initializers.insert(name.clone(), f32_tensor(&name, &shape_of(t), &values));
            }
            let error = |got: &[Vec<f32>]| -> f32 {
                got.iter().flatten().zip(want.iter().flatten()).map(|(a, b)| (a - b).powi(2)).sum()
            };
            let before = error(&answers(&spoilt));
            let options = Options::default();
            let done = refit(&mut spoilt, 0, inputs.iter().cloned().map(Ok), &want, &options).unwrap().unwrap();
            let after = error(&answers(&spoilt));
            assert!(after < 0.1 * before, "{file}: {after} of {before}, {done:?}");
            crate::check::check(&spoilt).unwrap();
        }
    }
}

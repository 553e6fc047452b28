//! Full bias correction of depthwise convolutions: what quantization adds to the mean of a channel there, with everything before it
//! quantized too, is taken back from its bias, one layer after the other (Nagel and others, "Data-Free Quantization Through Weight
//! Equalization and Bias Correction"). Elsewhere the rounding's own correction on the float inputs is enough.

use super::search::{Attempt, Search};
use super::write::Recipe;
use crate::progress;
use ndarray::ArrayD;
use std::collections::BTreeMap;
use vedge_runtime::onnx::{Graph, value_info};
use vedge_runtime::{Options, Result, Session};

/// Shifts of the biases of an attempt's depthwise convolutions, by index of the node; empty where it has none in integers.
///
/// # Errors
/// Those of running parts of the model.
pub fn depthwise(search: &Search<'_>, a: &Attempt, pictures: &[ArrayD<f32>]) -> Result<BTreeMap<usize, Vec<f32>>> {
    let layers: Vec<usize> =
        (0..a.layers.len()).filter(|i| a.layers[*i].class == "depthwise conv" && !a.spared.contains(i)).collect();
    let mut shifts = BTreeMap::new();
    if pictures.is_empty() {
        return Ok(shifts);
    }
    let bar = progress::bar("correcting biases", layers.len());
    for i in layers {
        let node = a.layers[i].node;
        let output = &a.float.nodes[node].output[0];
        // Shifts found so far are in the model that is corrected next.
        let recipe = Recipe { shifts: shifts.clone(), ..a.recipe.clone() };
        let quantized = search.partly_with(a, &recipe, |l| !a.spared.contains(&l))?;
        let [want, got] = [&a.float, &quantized].map(|g| means(g, output, pictures, search.options));
        let shift = want?.iter().zip(got?).map(|(w, g)| (w - g) as f32).collect();
        shifts.insert(node, shift);
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(shifts)
}

/// Mean of each channel of a value `[1, channels, height, width]` over pictures.
fn means(graph: &Graph, value: &str, pictures: &[ArrayD<f32>], options: &Options) -> Result<Vec<f64>> {
    let mut part = graph.clone();
    let Some((dtype, shape)) = graph.fact(value) else { return Ok(vec![]) };
    part.outputs = vec![value_info(value, dtype, &shape)];
    part.prune_unused();
    let mut session = Session::from_graph(part, options)?;
    let channels = shape.get(1).copied().unwrap_or(1);
    let mut sums = vec![0.0; channels];
    for x in pictures {
        let y = session.run(std::slice::from_ref(x))?.swap_remove(0);
        let each = (y.len() / channels.max(1)).max(1);
        y.iter().enumerate().for_each(|(i, v)| sums[i / each] += f64::from(*v) / (each * pictures.len()) as f64);
    }
    Ok(sums)
}

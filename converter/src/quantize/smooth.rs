//! Channels of a layer's input that are much larger than the others make its steps coarse for all. Where what produces
//! the input can be divided channel by channel (a LayerNorm's gain and bias, the value projection of attention: SmoothQuant,
//! RepQ-ViT; another convolution or linear layer: cross-layer equalization), the weights that use it are multiplied
//! instead: the float model stays the same, the input becomes even. Elsewhere (behind GELU) a product with a constant row
//! divides it. How much is searched for each place, and nothing is a possible answer.

use super::layers::Layer;
use super::number::{Affine, NARROW_RMS};
use ndarray::{Array2, ArrayD, ArrayView1, Axis, s};
use std::collections::{BTreeMap, BTreeSet};
use vedge_calibration::{InputMoments, Statistics, View};
use vedge_runtime::model::card::Activations;
use vedge_runtime::onnx::{DType, Graph, NodeProto, Uses, elements, f32_tensor, shape_of, to_f32, value_info};
use vedge_runtime::{Options, Result, Session};

/// A value whose channels can be divided, and what has to change for it.
#[derive(Clone, Debug)]
pub struct Site {
    /// The value: input of `layers`.
    pub value: String,
    /// What can be divided.
    pub by: By,
    divide: Vec<Divide>,
    /// Indices of the layers that use it.
    layers: Vec<usize>,
}

/// What divides the channels of a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum By {
    /// Constants of a LayerNorm or of attention's value projection.
    Constants,
    /// A product that is put before the layers; it costs a little time.
    Product,
    /// Constants of another layer, with nothing but what scales with its input in between.
    Layer,
}

/// A constant that is divided along an axis.
#[derive(Clone, Debug)]
struct Divide {
    node: usize,
    slot: usize,
    axis: usize,
    /// For each element of the axis the channel of the value that it becomes.
    channels: Vec<Option<usize>>,
}

/// Predicted noise must fall below this share of what it is without.
const WORTH_IT: f64 = 0.9;
/// The same where that takes a product of its own.
const WORTH_A_PRODUCT: f64 = 0.5;
/// So many rows for each channel tell how far it reaches. A classifier behind pooling sees one row of each picture.
const ROWS: usize = 2;

/// Finds the places of a graph.
///
/// # Errors
/// Those of running parts of the graph.
pub fn sites(g: &Graph, layers: &[Layer]) -> Result<Vec<Site>> {
    let uses = Uses::of(g);
    let mut by_value: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (i, l) in layers.iter().enumerate().filter(|(_, l)| l.view.is_some()) {
        by_value.entry(&l.activation).or_default().push(i);
    }
    let mut found = vec![];
    for (value, users) in by_value {
        let nodes: BTreeSet<usize> = users.iter().map(|u| layers[*u].node).collect();
        let all_layers = uses.consumers(value).iter().all(|c| nodes.contains(c)) && !uses.is_output(value);
        let rows = layers[users[0]].view == Some(View::Rows);
        let alike = users.iter().all(|u| (layers[*u].view == Some(View::Rows)) == rows);
        let width = g.shape(value).and_then(|s| if rows { s.last().copied() } else { s.get(1).copied() });
        let (Some(at), Some(width), true) = (uses.producer(value), width, alike) else { continue };
        let constants = match g.nodes[at].op_type() {
            _ if !all_layers || !rows => None,
            "LayerNormalization" => of_norm(g, at, width),
            _ => of_attention(g, &uses, layers, value, width)?,
        };
        let layer = || of_layer(g, &uses, layers, value, rows, width).filter(|_| all_layers);
        let how = constants.map(|d| (By::Constants, d)).or_else(|| layer().map(|d| (By::Layer, d)));
        let how = how.or_else(|| rows.then(|| (By::Product, vec![])));
        found.extend(how.map(|(by, divide)| Site { value: value.into(), by, divide, layers: users }));
    }
    Ok(found)
}

/// Operators whose output grows as their input does, channel by channel, whatever the (positive) factor.
const SCALING: [&str; 7] = ["Relu", "LeakyRelu", "PRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Identity"];

/// The layer that a value comes from (Nagel and others, 2019).
fn of_layer(g: &Graph, uses: &Uses, layers: &[Layer], value: &str, rows: bool, width: usize) -> Option<Vec<Divide>> {
    let divide = |node, slot, axis| Divide { node, slot, axis, channels: (0..width).map(Some).collect() };
    // Axis of a constant that has one value for each channel.
    let axis = |name: &str| {
        let shape = shape_of(g.initializers.get(name)?);
        let axis = shape.len().checked_sub(if rows { 1 } else { 3 })?;
        (shape[axis] == width && elements(&shape) == width).then_some(axis)
    };
    let (mut value, mut found) = (value, vec![]);
    loop {
        let at = uses.producer(value)?;
        let n = &g.nodes[at];
        if let Some(l) = layers.iter().find(|l| l.node == at) {
            if (l.class == "linear") != rows || l.shape[l.out_axis] != width {
                return None;
            }
            found.push(divide(at, 1, l.out_axis));
            if !n.input_name(2).is_empty() {
                // A convolution's bias is a row, too.
                let shape = shape_of(g.initializers.get(n.input_name(2))?);
                (shape.last() == Some(&width) && elements(&shape) == width).then_some(())?;
                found.push(divide(at, 2, shape.len() - 1));
            }
            return Some(found);
        }
        value = match n.op_type() {
            op if SCALING.contains(&op) => n.input_name(0),
            "Add" => {
                let (slot, axis) = (0..2).find_map(|i| Some((i, axis(n.input_name(i))?)))?;
                found.push(divide(at, slot, axis));
                n.input_name(1 - slot)
            }
            _ => return None,
        };
        // What else uses it would change with it.
        uses.only_consumer(value)?;
    }
}

fn of_norm(g: &Graph, at: usize, width: usize) -> Option<Vec<Divide>> {
    let n = &g.nodes[at];
    let last = [-1, g.shape(n.input_name(0))?.len() as i64 - 1].contains(&n.int("axis", -1));
    let slots = if n.input_name(2).is_empty() { 1..2 } else { 1..3 };
    let constant = slots.clone().all(|s| g.const_f32(n.input_name(s)).is_some_and(|v| v.len() == width));
    let divide = |slot| Divide { node: at, slot, axis: 0, channels: (0..width).map(Some).collect() };
    (last && constant).then(|| slots.map(divide).collect())
}

/// Operators that only move elements.
const MOVES: [&str; 9] =
    ["Reshape", "Transpose", "Squeeze", "Unsqueeze", "Split", "Slice", "Gather", "Identity", "Flatten"];

/// The value projection behind a context, if that is what `value` is.
fn of_attention(g: &Graph, uses: &Uses, layers: &[Layer], value: &str, width: usize) -> Result<Option<Vec<Divide>>> {
    let up = |mut value: String| -> Option<usize> {
        loop {
            let at = uses.producer(&value)?;
            if !MOVES.contains(&g.nodes[at].op_type()) {
                return Some(at);
            }
            value = g.nodes[at].input_name(0).into();
        }
    };
    let product = |at: &usize| {
        let n = &g.nodes[*at];
        n.op_type() == "MatMul" && !n.input.iter().any(|i| g.initializers.contains_key(i))
    };
    let Some(mut at) = up(value.into()).filter(product).and_then(|p| up(g.nodes[p].input_name(1).into())) else {
        return Ok(None);
    };
    let cut = g.nodes[at].output[0].clone();
    let mut divide = vec![];
    let columns = g.shape(&cut).and_then(|s| s.last().copied()).unwrap_or(0);
    let of = |node: usize, slot: usize, axis: usize| Divide { node, slot, axis, channels: vec![] };
    let is_constant_row = |name: &str| g.const_f32(name).is_some_and(|v| v.len() == columns);
    if g.nodes[at].op_type() == "Add" {
        let n = &g.nodes[at];
        let Some(slot) = n.input.iter().position(|i| is_constant_row(i)) else { return Ok(None) };
        divide.push(of(at, slot, shape_of(&g.initializers[n.input_name(slot)]).len() - 1));
        let Some(before) = uses.producer(n.input_name(1 - slot)) else { return Ok(None) };
        at = before;
    }
    let Some(source) = layers.iter().find(|l| l.node == at && l.view == Some(View::Rows)) else { return Ok(None) };
    divide.push(of(at, 1, source.out_axis));
    let n = &g.nodes[at];
    if n.op_type() == "Gemm" && !n.input_name(2).is_empty() {
        if !is_constant_row(n.input_name(2)) {
            return Ok(None);
        }
        divide.push(of(at, 2, shape_of(&g.initializers[n.input_name(2)]).len() - 1));
    }
    let Some(from) = trace(g, &cut, value, columns, width)? else { return Ok(None) };
    let mut channels = vec![None; columns];
    for (channel, column) in from.into_iter().enumerate() {
        if channels[column].replace(channel).is_some() {
            return Ok(None);
        }
    }
    divide.iter_mut().for_each(|d| d.channels.clone_from(&channels));
    Ok(Some(divide))
}

/// Which column of `cut` becomes each channel of `value`: every token gets the columns' numbers, and whatever the
/// attention's weights are, they sum to one. `None` where that is not so.
fn trace(g: &Graph, cut: &str, value: &str, columns: usize, width: usize) -> Result<Option<Vec<usize>>> {
    let (Some(from), Some(to)) = (g.shape(cut), g.shape(value)) else { return Ok(None) };
    let mut part = g.clone();
    part.header.metadata_props.clear();
    part.nodes.retain(|n| !n.output.iter().any(|o| o == cut));
    part.outputs = vec![value_info(value, DType::Float, &to)];
    part.prune_unused();
    let needed: BTreeSet<&String> = part.nodes.iter().flat_map(|n| &n.input).collect();
    let mut inputs: Vec<_> = g.inputs.iter().filter(|i| needed.contains(&i.name().to_string())).cloned().collect();
    let mut values: Vec<ArrayD<f32>> =
        inputs.iter().filter_map(|i| i.fixed()).map(|(_, shape)| ArrayD::zeros(shape)).collect();
    inputs.push(value_info(cut, DType::Float, &from));
    let count = from.iter().product::<usize>();
    let numbers = (0..count).map(|i| (i % columns + 1) as f32).collect();
    values.push(ArrayD::from_shape_vec(from, numbers).expect("as many as the shape has"));
    part.inputs = inputs;
    let Ok(mut session) = Session::from_graph(part, &Options::default()) else { return Ok(None) };
    let out = session.run(&values)?.swap_remove(0);
    let out: Vec<f32> = out.iter().copied().collect();
    let near = |v: f32| (v - v.round()).abs() < 0.05 && v > 0.5 && v < columns as f32 + 0.5;
    let same = out.iter().zip(out.iter().take(width).cycle()).all(|(a, b)| near(*a) && a.round() == b.round());
    Ok(same.then(|| out[..width].iter().map(|v| v.round() as usize - 1).collect()))
}

/// Factors for the channels of a site that make quantization's noise behind it least; `None` where none is worth it or
/// not enough was observed.
///
/// # Errors
/// Damaged weights.
pub fn factors(
    g: &Graph,
    layers: &[Layer],
    site: &Site,
    statistics: &Statistics,
    kind: Activations,
) -> Result<Option<Vec<f32>>> {
    let (mut parts, mut seen) = (vec![], None);
    for l in site.layers.iter().map(|i| &layers[*i]) {
        let Some(m) = l.view.and_then(|v| statistics.moments.get(&(site.value.clone(), v))) else { return Ok(None) };
        let Some(of) = Part::of(g, l, m)? else { return Ok(None) };
        parts.extend(of);
        seen = Some(m);
    }
    let Some(seen) = seen.filter(|m| m.rows() > 0) else { return Ok(None) };
    let width = seen.extremes().len();
    if site.by == By::Product && seen.rows() < ROWS * width {
        return Ok(None);
    }
    let noise = Noise::new(seen, &parts, kind);
    let reach: Vec<f32> = seen.extremes().iter().map(|(low, high)| high.max(-low)).collect();
    let mut largest = vec![0f32; width];
    for (j, w) in parts.iter().flat_map(Part::by_channel) {
        largest[j] = w.iter().fold(largest[j], |m, v| m.max(v.abs()));
    }
    let mut sorted = reach.clone();
    sorted.sort_by(f32::total_cmp);
    let middle = sorted[width / 2];
    let powers = [0.25, 0.5, 0.75, 1.0].map(|p: f32| (0..width).map(|j| reach[j].powf(p)).collect::<Vec<_>>());
    let shared = [0.25, 0.35, 0.5].map(|p: f32| (0..width).map(|j| (reach[j] / largest[j]).powf(p)).collect());
    let outliers = [1.0, 2.0, 4.0, 8.0].map(|t: f32| (0..width).map(|j| (reach[j] / (t * middle)).max(1.0)).collect());
    let off = noise.of(&vec![1.0; width]);
    let least = if site.by == By::Product { WORTH_A_PRODUCT } else { WORTH_IT };
    let mut best = (off * least, None);
    for mut by in powers.into_iter().chain(shared).chain(outliers) {
        normalise(&mut by);
        let n = noise.of(&by);
        if n < best.0 {
            best = (n, Some(by));
        }
    }
    Ok(best.1)
}

/// A layer behind a site, or one channel of a depthwise convolution.
struct Part {
    /// `[outputs][inputs]`.
    weight: Array2<f32>,
    /// Of each input.
    variance: Vec<f64>,
    /// Channel of the first input, and how many inputs are of one channel.
    first: usize,
    taps: usize,
}

impl Part {
    /// The parts of a layer; `None` where its weight and its inputs do not fit together.
    fn of(g: &Graph, l: &Layer, m: &InputMoments) -> Result<Option<Vec<Part>>> {
        let (outputs, groups) = (l.shape[l.out_axis], m.groups());
        let inputs = elements(&l.shape) / outputs.max(1);
        let channels = m.extremes().len();
        let whole = outputs.is_multiple_of(groups) && (inputs * groups).is_multiple_of(channels);
        let fits = m.mean(0).len() == inputs && whole;
        if !fits || channels == 0 {
            return Ok(None);
        }
        let whole = to_f32(&g.initializers[&l.weight])?;
        let shape = if l.out_axis == 0 { (outputs, inputs) } else { (inputs, outputs) };
        let w = Array2::from_shape_vec(shape, whole).map_err(|e| vedge_runtime::Error::BadModel(e.to_string()))?;
        let w = if l.out_axis == 0 { w } else { w.reversed_axes().as_standard_layout().into_owned() };
        let (taps, each) = (inputs * groups / channels, outputs / groups);
        let part = |group: usize| Part {
            weight: w.slice(s![group * each..(group + 1) * each, ..]).to_owned(),
            variance: m.covariance(group).diag().to_vec(),
            first: group * inputs / taps,
            taps,
        };
        Ok(Some((0..groups).map(part).collect()))
    }

    fn channel(&self, input: usize) -> usize {
        self.first + input / self.taps
    }

    /// The weights of each input, with its channel.
    fn by_channel(&self) -> impl Iterator<Item = (usize, ArrayView1<'_, f32>)> {
        self.weight.axis_iter(Axis(1)).enumerate().map(|(i, w)| (self.channel(i), w))
    }
}

/// Makes the geometric mean one; channels without a usable factor stay as they are.
fn normalise(by: &mut [f32]) {
    by.iter_mut().filter(|f| !(f.is_finite() && **f > 0.0)).for_each(|f| *f = 1.0);
    let mean = (by.iter().map(|f| f64::from(*f).ln()).sum::<f64>() / by.len() as f64).exp() as f32;
    by.iter_mut().for_each(|f| *f = (*f / mean).clamp(1e-3, 1e3));
}

/// Predicts the noise of the outputs of the layers behind a site.
struct Noise<'a> {
    extremes: &'a [(f32, f32)],
    /// Rows that get a range of their own each; none where one range is for all.
    rows: Array2<f32>,
    parts: &'a [Part],
    /// Sum of squares of each channel's weights.
    squares: Vec<f64>,
}

impl Noise<'_> {
    fn new<'a>(seen: &'a InputMoments, parts: &'a [Part], kind: Activations) -> Noise<'a> {
        let width = seen.extremes().len();
        let mut squares = vec![0.0; width];
        for (j, w) in parts.iter().flat_map(Part::by_channel) {
            squares[j] += w.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
        }
        // A convolution's input has one range for the whole picture.
        let rows = match kind {
            Activations::PerToken if seen.view() == View::Rows => seen.kept(),
            _ => Array2::zeros((0, width)),
        };
        Noise { extremes: seen.extremes(), rows, parts, squares }
    }

    fn of(&self, by: &[f32]) -> f64 {
        let step = |range: (f32, f32)| f64::from(Affine::over(range).scale).powi(2) / 12.0;
        let divided =
            |range: (f32, f32), (low, high): (f32, f32), f: &f32| (range.0.min(low / f), range.1.max(high / f));
        let input = match self.rows.nrows() {
            0 => step(self.extremes.iter().zip(by).fold((0.0, 0.0), |r, (e, f)| divided(r, *e, f))),
            rows => {
                let of = |row: ArrayView1<'_, f32>| {
                    step(row.iter().zip(by).fold((0.0, 0.0), |r, (v, f)| divided(r, (*v, *v), f)))
                };
                self.rows.axis_iter(Axis(0)).map(of).sum::<f64>() / rows as f64
            }
        };
        let from_input: f64 = self.squares.iter().zip(by).map(|(s, f)| s * f64::from(*f).powi(2)).sum::<f64>() * input;
        from_input + self.parts.iter().map(|p| p.rounding(by)).sum::<f64>()
    }
}

impl Part {
    /// Noise from the rounding of the weights.
    fn rounding(&self, by: &[f32]) -> f64 {
        let factors: Vec<f32> = (0..self.weight.ncols()).map(|i| by[self.channel(i)]).collect();
        let spread: f64 = self.variance.iter().zip(&factors).map(|(v, f)| v / f64::from(*f).powi(2)).sum();
        let step = |row: ArrayView1<'_, f32>| {
            let (mut largest, mut squares) = (0f64, 0f64);
            for (w, f) in row.iter().zip(&factors) {
                let w = f64::from(w * f);
                largest = largest.max(w.abs());
                squares += w * w;
            }
            (largest / 127.0).max((squares / factors.len() as f64).sqrt() / NARROW_RMS).powi(2) / 12.0
        };
        spread * self.weight.rows().into_iter().map(step).sum::<f64>()
    }
}

/// Divides the channels of sites by their factors, in the graph and in the statistics. The float model stays the same.
///
/// # Errors
/// Damaged constants.
pub fn apply(
    g: &Graph,
    statistics: &Statistics,
    layers: &[Layer],
    chosen: &[(&Site, Vec<f32>)],
) -> Result<(Graph, Statistics)> {
    let (mut g, mut statistics) = (g.clone(), statistics.clone());
    let mut products = vec![];
    for (site, by) in chosen {
        for d in &site.divide {
            rescale(&mut g, d.node, d.slot, d.axis, |c| d.channels[c].map_or(1.0, |j| 1.0 / by[j]))?;
        }
        for l in site.layers.iter().map(|i| &layers[*i]) {
            rescale(&mut g, l.node, 1, l.in_axis(), |j| by[j])?;
        }
        let mut value = site.value.clone();
        if site.by == By::Product {
            let (node, at) = product(&mut g, site, layers, by);
            value.clone_from(&node.output[0]);
            products.push((at, node));
        }
        statistics.observed.remove(&site.value);
        let views = statistics.moments.keys().filter(|(v, _)| *v == site.value).map(|(_, view)| *view);
        for view in views.collect::<Vec<_>>() {
            let Some(m) = statistics.moments.remove(&(site.value.clone(), view)) else { continue };
            let m = m.divided(by);
            let mut seen = vedge_calibration::Histogram::default();
            seen.add(m.kept().iter().copied());
            seen.add(m.extremes().iter().flat_map(|(low, high)| [*low, *high]));
            statistics.observed.insert(value.clone(), seen);
            statistics.moments.insert((value.clone(), view), m);
        }
    }
    // The last first, so that the places of the others stay.
    products.sort_by_key(|(at, _)| std::cmp::Reverse(*at));
    products.into_iter().for_each(|(at, node)| g.nodes.insert(at, node));
    g.prune_unused();
    Ok((g, statistics))
}

/// A product that divides a value for the layers of its site, and where it belongs: before the first of them.
fn product(g: &mut Graph, site: &Site, layers: &[Layer], by: &[f32]) -> (NodeProto, usize) {
    let [even, row] = ["even", "factors"].map(|s| g.fresh(&format!("{}.{s}", site.value)));
    let factors: Vec<f32> = by.iter().map(|f| 1.0 / f).collect();
    g.initializers.insert(row.clone(), f32_tensor(&row, &[by.len()], &factors));
    let shape = g.shape(&site.value).unwrap_or_default();
    g.value_info.insert(even.clone(), value_info(&even, DType::Float, &shape));
    let nodes: Vec<usize> = site.layers.iter().map(|i| layers[*i].node).collect();
    nodes.iter().for_each(|at| g.nodes[*at].input[0].clone_from(&even));
    let first = nodes.into_iter().min().expect("a site has layers");
    (NodeProto::of("Mul", &[&site.value, &row], &[&even], vec![]), first)
}

/// Multiplies a node's constant along an axis, under a name of its own.
fn rescale(g: &mut Graph, node: usize, slot: usize, axis: usize, factor: impl Fn(usize) -> f32) -> Result<()> {
    let name = g.nodes[node].input_name(slot).to_string();
    let t = &g.initializers[&name];
    let (mut values, shape) = (to_f32(t)?, shape_of(t));
    let channels = super::number::channels(&shape, axis);
    values.iter_mut().zip(channels).for_each(|(v, c)| *v *= factor(c));
    let new = g.fresh(&format!("{name}.smoothed"));
    g.initializers.insert(new.clone(), f32_tensor(&new, &shape, &values));
    let input: &mut NodeProto = &mut g.nodes[node];
    input.input[slot] = new;
    Ok(())
}

#[cfg(test)]
#[path = "smooth_tests.rs"]
pub(super) mod tests;

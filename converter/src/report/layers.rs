//! What quantization does to each layer: the values going in, what its range clips, the noise it makes, the channels and
//! tokens that stand out.

use super::numbers::quantile;
use crate::quantize::{Layer, Sqnr};
use ndarray::ArrayD;
use serde::Serialize;
use std::collections::BTreeMap;
use vedge_calibration::{Histogram, View};
use vedge_runtime::onnx::{DType, Graph, to_i64, value_info};
use vedge_runtime::{Error, Options, Result, Session};

/// Bars of a layer's distribution.
const BARS: usize = 42;
/// Reach, against that of the middle channel or token, from which on one stands out.
const OUTLIER: f64 = 6.0;
/// Outliers named for each layer.
const NAMED: usize = 3;

/// A quantized layer.
#[derive(Clone, Debug, Serialize)]
pub struct LayerReport {
    /// Name of the node.
    pub name: String,
    /// `linear`, `conv` or `depthwise conv`.
    pub class: &'static str,
    /// Name of the value that goes in.
    pub input: String,
    /// Lowest and highest value seen going in.
    pub seen: (f64, f64),
    /// Range of its integers; absent where every row has its own.
    pub range: Option<(f64, f64)>,
    /// Whether the range's integers are symmetric about zero.
    pub symmetric: bool,
    /// Share of values outside of the range, 0…1.
    pub clipped: f64,
    /// Shares of values in equal parts of `seen`.
    pub shares: Vec<f64>,
    /// Signal-to-noise ratio of the rounded and clipped input, nothing else being quantized before, dB.
    pub input_sqnr: f64,
    /// Signal-to-noise ratio of the layer's output in the quantized model, everything before it included, dB.
    pub output_sqnr: f64,
    /// The same of the logits when this layer alone is quantized, dB; absent where it was not measured.
    pub alone_sqnr: Option<f64>,
    /// Mean Kullback-Leibler divergence of the answers when this layer alone is quantized, nats; absent where it was not measured.
    pub alone_kl: Option<f64>,
    /// Channels of the input that are much larger than the middle one, largest first.
    pub channels: Vec<Outlier>,
    /// Tokens (rows of the input) that are much larger than the middle one, largest first.
    pub tokens: Vec<Outlier>,
}

/// A channel or token that stands out.
#[derive(Clone, Debug, Serialize)]
pub struct Outlier {
    /// Its index.
    pub index: usize,
    /// Largest absolute value.
    pub reach: f64,
    /// That over the middle one's.
    pub times: f64,
}

#[derive(Default)]
struct Seen {
    histogram: Histogram,
    clipped: usize,
    count: usize,
    rounded: Sqnr,
    channels: Vec<f32>,
    tokens: Vec<f32>,
}

/// Measures layers on some pictures. `float` is the model that was quantized to `model`, `layers` those in integers, by their
/// nodes in `float`; `per_token` tells that inputs without a range are quantized row by row.
///
/// # Errors
/// Those of running the models.
pub fn measure(
    float: &Graph,
    model: &Graph,
    layers: &[Layer],
    per_token: bool,
    pictures: &[ArrayD<f32>],
    options: &Options,
) -> Result<Vec<LayerReport>> {
    let output = |l: &Layer| float.nodes[l.node].output[0].clone();
    let mut watched: Vec<String> = layers.iter().flat_map(|l| [l.activation.clone(), output(l)]).collect();
    watched.sort();
    watched.dedup();
    let (mut before, mut after) = (Watch::new(float, &watched, options)?, Watch::new(model, &watched, options)?);
    let ranges: BTreeMap<&str, Range> =
        layers.iter().filter_map(|l| Some((l.activation.as_str(), Range::of(model, &l.activation)?))).collect();
    let mut seen: BTreeMap<&str, Seen> = BTreeMap::new();
    let mut outputs = vec![Sqnr::default(); layers.len()];
    for x in pictures {
        let (float_values, values) = (before.run(x)?, after.run(x)?);
        let mut done = vec![];
        for (l, ratio) in layers.iter().zip(&mut outputs) {
            let name = output(l);
            ratio.add(float_values[&name].iter().copied(), values[&name].iter().copied());
            if !done.contains(&l.activation.as_str()) {
                done.push(&l.activation);
                let of = seen.entry(&l.activation).or_default();
                of.add(&float_values[&l.activation], l, ranges.get(l.activation.as_str()), per_token);
            }
        }
    }
    let report = |(l, ratio): (&Layer, Sqnr)| {
        let of = &seen[l.activation.as_str()];
        let range = ranges.get(l.activation.as_str());
        let (low, high) = of.histogram.extremes();
        LayerReport {
            name: l.name.clone(),
            class: l.class,
            input: l.activation.clone(),
            seen: (f64::from(low), f64::from(high)),
            range: range.map(|r| r.ends),
            symmetric: range.is_some_and(|r| r.symmetric),
            clipped: of.clipped as f64 / of.count.max(1) as f64,
            shares: of.histogram.shares(BARS),
            input_sqnr: of.rounded.db(),
            output_sqnr: ratio.db(),
            alone_sqnr: None,
            alone_kl: None,
            channels: outliers(&of.channels),
            tokens: outliers(&of.tokens),
        }
    };
    Ok(layers.iter().zip(outputs).map(report).collect())
}

/// The static range of a value.
struct Range {
    scale: f32,
    zero: f32,
    integers: (f32, f32),
    ends: (f64, f64),
    symmetric: bool,
}

impl Range {
    /// As the graph's QuantizeLinear of that value has it.
    fn of(g: &Graph, value: &str) -> Option<Range> {
        let n = g.nodes.iter().find(|n| n.op_type() == "QuantizeLinear" && n.input_name(0) == value)?;
        let scale = *g.const_f32(n.input_name(1))?.first()?;
        let zero = g.initializers.get(n.input_name(2))?;
        let signed = zero.dtype() == DType::Int8;
        let integers = if signed { (-128.0, 127.0) } else { (0.0, 255.0) };
        let point = *to_i64(zero).ok()?.first()? as f32;
        let end = |q: f32| f64::from(scale) * f64::from(q - point);
        Some(Range {
            scale,
            zero: point,
            integers,
            ends: (end(integers.0), end(integers.1)),
            symmetric: signed && point == 0.0,
        })
    }

    fn round(&self, v: f32) -> f32 {
        let q = ((v / self.scale).round_ties_even() + self.zero).clamp(self.integers.0, self.integers.1);
        (q - self.zero) * self.scale
    }
}

impl Seen {
    fn add(&mut self, value: &ArrayD<f32>, l: &Layer, range: Option<&Range>, per_token: bool) {
        let value = value.as_standard_layout();
        let values = value.as_slice().expect("standard layout");
        self.histogram.add(values.iter().copied());
        self.count += values.len();
        // Rows of a picture's convolution are its positions, but one range serves them all.
        let rows = matches!(l.view, Some(View::Rows));
        let width = if rows { *value.shape().last().unwrap_or(&1) } else { values.len() }.max(1);
        match range {
            Some(r) => {
                let outside = |v: &&f32| {
                    f64::from(**v) < r.ends.0 - f64::from(r.scale) / 2.0
                        || f64::from(**v) > r.ends.1 + f64::from(r.scale) / 2.0
                };
                self.clipped += values.iter().filter(outside).count();
                self.rounded.add(values.iter().copied(), values.iter().map(|v| r.round(*v)));
            }
            None if per_token => {
                for row in values.chunks(width) {
                    let ends = row.iter().fold((0f32, 0f32), |(a, b), v| (a.min(*v), b.max(*v)));
                    let scale = ((ends.1 - ends.0) / 255.0).max(f32::MIN_POSITIVE);
                    self.rounded.add(row.iter().copied(), row.iter().map(|v| (v / scale).round_ties_even() * scale));
                }
            }
            None => {}
        }
        let reach = |to: &mut Vec<f32>, at: usize, v: f32| {
            if to.len() <= at {
                to.resize(at + 1, 0.0);
            }
            to[at] = to[at].max(v.abs());
        };
        match value.shape() {
            [1, channels, _, _] if !rows => {
                let each = (values.len() / channels.max(&1)).max(1);
                values.iter().enumerate().for_each(|(i, v)| reach(&mut self.channels, i / each, *v));
            }
            _ => {
                for (token, row) in values.chunks(width).enumerate() {
                    row.iter().enumerate().for_each(|(c, v)| reach(&mut self.channels, c, *v));
                    reach(&mut self.tokens, token, row.iter().fold(0f32, |m, v| m.max(v.abs())));
                }
            }
        }
    }
}

/// Those that reach much farther than the middle one.
fn outliers(reach: &[f32]) -> Vec<Outlier> {
    let mut sorted: Vec<f64> = reach.iter().map(|v| f64::from(*v)).collect();
    sorted.sort_by(f64::total_cmp);
    let middle = quantile(&sorted, 0.5);
    let mut all: Vec<Outlier> = reach
        .iter()
        .enumerate()
        .map(|(index, v)| Outlier { index, reach: f64::from(*v), times: f64::from(*v) / middle })
        .filter(|o| middle > 0.0 && o.times >= OUTLIER)
        .collect();
    all.sort_by(|a, b| b.times.total_cmp(&a.times).then(a.index.cmp(&b.index)));
    all.truncate(NAMED);
    all
}

/// A model whose inner values are outputs too.
struct Watch {
    session: Session,
    input: String,
    names: Vec<String>,
    own: usize,
}

impl Watch {
    fn new(graph: &Graph, values: &[String], options: &Options) -> Result<Watch> {
        let input = graph.inputs.first().map(|i| i.name().to_string()).unwrap_or_default();
        let mut g = graph.clone();
        let own = g.outputs.len();
        let mut names = vec![];
        for v in values.iter().filter(|v| **v != input) {
            let (dtype, shape) =
                graph.fact(v).ok_or_else(|| Error::Shape(format!("value `{v}` has no fixed shape in the graph")))?;
            g.outputs.push(value_info(v, dtype, &shape));
            names.push(v.clone());
        }
        Ok(Watch { session: Session::from_graph(g, options)?, input, names, own })
    }

    fn run(&mut self, x: &ArrayD<f32>) -> Result<BTreeMap<String, ArrayD<f32>>> {
        let mut outputs = self.session.run(std::slice::from_ref(x))?;
        let inner = outputs.split_off(self.own);
        let mut all: BTreeMap<String, ArrayD<f32>> = self.names.iter().cloned().zip(inner).collect();
        all.insert(self.input.clone(), x.clone());
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_channel_that_stands_out_is_named() {
        let mut reach = vec![1.0; 20];
        reach[7] = 21.0;
        reach[3] = 5.9;
        let found = outliers(&reach);
        assert_eq!(found.iter().map(|o| (o.index, o.times)).collect::<Vec<_>>(), [(7, 21.0)]);
        assert!(outliers(&[0.0; 4]).is_empty() && outliers(&[]).is_empty());
    }
}

//! INT8: which layers, in which range, and how it is written.
//!
//! Conv, Gemm and MatMul with a constant weight get int8 weights (symmetric, a scale for each output channel) and,
//! in the `portable` preset, calibrated uint8 activations (one scale and zero point for each value). Everything else
//! stays float: the residual stream, LayerNorm, GELU, softmax and both products of attention.

pub mod layers;
pub mod number;
pub mod write;

pub use layers::{Layer, Skipped};
pub use write::{Halved, write_f16};

use ndarray::ArrayD;
use std::collections::BTreeMap;
use vedge_calibration::{Calibrator, Statistics};
use vedge_runtime::onnx::Graph;
use vedge_runtime::{Options, Result, Session};

/// Who will run the quantized file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Preset {
    /// Any engine: weights and calibrated activations are quantized in the graph (static QDQ).
    #[default]
    Portable,
    /// vedge-run on a CPU: weights are int8, activations are quantized row by row while the model runs.
    Cpu,
}

/// Some calibration pictures and what the float model says to them, to judge candidates by.
pub struct Probes<'a> {
    /// Input tensors.
    pub inputs: &'a [ArrayD<f32>],
    /// The float model's output for each.
    pub reference: &'a [Vec<f32>],
    /// Which output of the graph that is.
    pub output: usize,
}

/// A way to choose ranges and how close the logits stay with it.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Candidate {
    /// How ranges were chosen.
    pub calibrator: Calibrator,
    /// Signal-to-noise ratio of the logits on the probes, dB.
    pub sqnr: f64,
}

/// What quantization did.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// The new graph.
    pub graph: Graph,
    /// Layers that are integers now.
    pub layers: Vec<Layer>,
    /// Weighted nodes that stay float.
    pub skipped: Vec<Skipped>,
    /// What was tried, best first; empty in the `cpu` preset.
    pub candidates: Vec<Candidate>,
}

/// Quantizes weights and activations; the calibrator is the one whose logits are closest to the float model's.
///
/// # Errors
/// Those of writing the graph and of running the candidates.
pub fn portable(graph: &Graph, statistics: &Statistics, probes: &Probes<'_>, options: &Options) -> Result<Quantized> {
    let (layers, skipped) = layers::find(graph);
    let mut best: Option<Graph> = None;
    let mut candidates: Vec<Candidate> = vec![];
    for calibrator in Calibrator::ALL {
        let ranges: BTreeMap<String, (f32, f32)> =
            statistics.observed.iter().map(|(value, o)| (value.clone(), o.range(calibrator))).collect();
        let mut candidate = graph.clone();
        write::write_int8(&mut candidate, &layers.iter().collect::<Vec<_>>(), &ranges)?;
        let sqnr = sqnr_of(&candidate, probes, options)?;
        // Strictly better only: on a tie the first, which clips nothing, stays.
        if candidates.iter().all(|c| sqnr > c.sqnr) {
            best = Some(candidate);
        }
        candidates.push(Candidate { calibrator, sqnr });
    }
    candidates.sort_by(|a, b| b.sqnr.total_cmp(&a.sqnr));
    Ok(Quantized { graph: best.expect("there are calibrators"), layers, skipped, candidates })
}

/// Quantizes weights only.
///
/// # Errors
/// Those of writing the graph.
pub fn weights_only(graph: &Graph) -> Result<Quantized> {
    let (layers, skipped) = layers::find(graph);
    let mut graph = graph.clone();
    write::write_int8(&mut graph, &layers.iter().collect::<Vec<_>>(), &BTreeMap::new())?;
    Ok(Quantized { graph, layers, skipped, candidates: vec![] })
}

fn sqnr_of(graph: &Graph, probes: &Probes<'_>, options: &Options) -> Result<f64> {
    let mut session = Session::from_graph(graph.clone(), options)?;
    let mut ratio = Sqnr::default();
    for (x, want) in probes.inputs.iter().zip(probes.reference) {
        let got = session.run(std::slice::from_ref(x))?;
        ratio.add(want.iter().copied(), got[probes.output].iter().copied());
    }
    Ok(ratio.db())
}

/// Signal-to-quantization-noise ratio, summed over pictures.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sqnr {
    signal: f64,
    noise: f64,
}

impl Sqnr {
    /// Adds one picture's values.
    pub fn add(&mut self, reference: impl Iterator<Item = f32>, got: impl Iterator<Item = f32>) {
        for (r, g) in reference.zip(got) {
            self.signal += f64::from(r).powi(2);
            self.noise += (f64::from(r) - f64::from(g)).powi(2);
        }
    }

    /// In dB, at most 200 (equal values); −200 where the result is NaN.
    pub fn db(&self) -> f64 {
        match self.signal / self.noise {
            r if self.noise == 0.0 && r.is_nan() | r.is_infinite() => 200.0,
            r if r.is_nan() => -200.0,
            r => (10.0 * r.log10()).clamp(-200.0, 200.0),
        }
    }
}

#[cfg(test)]
mod tests;

//! INT8: which layers, in which range, and how it is written.
//!
//! Conv, Gemm and MatMul with a constant weight get int8 weights (symmetric, a scale for each output channel) and,
//! in the `portable` preset, calibrated uint8 activations (one scale and zero point for each value). Everything else
//! stays float: the residual stream, LayerNorm, GELU, softmax and both products of attention. What is done beyond that
//! is chosen by its effect on the logits, on pictures that calibration did not see.

mod bias;
pub mod judge;
pub mod keep;
pub mod layers;
pub mod mix;
pub mod number;
pub mod pays;
pub mod round;
mod search;
pub mod smooth;
mod spare;
pub mod write;

pub use layers::{Layer, Skipped};
pub use mix::Target;
pub use write::{Halved, write_f16};

pub use judge::{Effect, Probes, Sqnr};

use search::{Attempt, Ground, Search};
use write::Recipe;

use ndarray::ArrayD;
use std::collections::BTreeSet;
use std::sync::Arc;
use vedge_calibration::{Calibrator, Statistics};
use vedge_runtime::error::counted;
use vedge_runtime::model::card::Activations;
use vedge_runtime::onnx::Graph;
use vedge_runtime::{Card, Error, Options, Result};

/// Who will run the quantized file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Preset {
    /// `portable` where it is good, else `portable` or `cpu`, whose logits are nearer to the float model's on calibration pictures.
    #[default]
    Auto,
    /// Any engine: weights and calibrated activations are quantized in the graph (static QDQ).
    Portable,
    /// vedge-run on a CPU: weights are int8, activations are quantized row by row while the model runs.
    Cpu,
}

impl Preset {
    /// Whether this kind of activations is to be tried.
    fn tries(self, a: Activations) -> bool {
        match self {
            Preset::Auto => true,
            Preset::Portable => a == Activations::Static,
            Preset::Cpu => a == Activations::PerToken,
        }
    }
}

/// Less than this many dB between the presets is no reason to leave the portable one, which every engine runs in integers.
const MEANINGFUL_DB: f64 = 1.0;

/// Likeness of the logits from which on a picture in several hundred changes its label: portable models at 44 to 47 dB have the
/// float model's answer on 99.5 to 99.9 % of the pictures. More than that buys nothing that is seen, but ranges that are found
/// row by row cost a transformer 3 to 7 % of its speed.
const GOOD_DB: f64 = 40.0;

/// The same for a hybrid, where row by row costs 13 to 27 %: ViT-S/14 at 36.7 dB has the float model's answer on 99.7 % of a
/// thousand photographs.
const GOOD_HYBRID_DB: f64 = 35.0;

/// How weights become integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rounding {
    /// Each to the nearest step.
    Nearest,
    /// So that the outputs stay near on inputs like those of the calibration pictures.
    Compensated,
}

/// A way to quantize and how near the logits stay with it.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Candidate {
    /// How activations are quantized.
    pub activations: Activations,
    /// How ranges were chosen, row by row those of convolutions' inputs alone; none where all are found at run time.
    pub calibrator: Option<Calibrator>,
    /// How weights were rounded.
    pub rounding: Rounding,
    /// Values whose channels were evened out.
    pub smoothed: usize,
    /// Values with a calibrated range.
    pub ranges: usize,
    /// Those of them that are int8 with zero point 0.
    pub symmetric: usize,
    /// Whether large weights were clipped by the squared error of the outputs.
    pub clipped: bool,
    /// Whether weights were fitted anew to the quantized inputs.
    pub ridge: bool,
    /// Whether biases of depthwise convolutions were corrected in the quantized model.
    pub corrected: bool,
    /// Small layers left in float that would make much of the noise.
    pub spared: usize,
    /// The effect on the probes.
    pub effect: Effect,
}

impl Candidate {
    /// What is done, in words, and how near that is.
    pub fn describe(&self) -> String {
        format!("{} ({:.1} dB)", self.what(), self.effect.sqnr)
    }

    /// What is done, in words.
    pub fn what(&self) -> String {
        let by = |what: &str| self.calibrator.map_or(String::new(), |c| format!("{what} by {}", c.name()));
        let how = match self.activations {
            Activations::Static => by("static activations"),
            Activations::PerToken => {
                let calibrated = by(&format!(", {}", counted(self.ranges, "convolution input")));
                format!("activations row by row at run time{calibrated}")
            }
        };
        let rounding = match self.rounding {
            Rounding::Nearest => "",
            Rounding::Compensated => ", weights rounded by their effect",
        };
        let smoothed = match self.smoothed {
            0 => String::new(),
            n => format!(", channels of {} evened out", counted(n, "value")),
        };
        let spared = match self.spared {
            0 => String::new(),
            n => format!(", {} in float16", counted(n, "small layer")),
        };
        let symmetric = match self.symmetric {
            0 => String::new(),
            n if n == self.ranges => ", symmetric".into(),
            n => format!(", {n} of {} symmetric", self.ranges),
        };
        let extra = [
            (self.clipped, ", large weights clipped"),
            (self.ridge, ", weights fitted to noisy inputs"),
            (self.corrected, ", biases of depthwise convolutions corrected"),
        ];
        let extra: String = extra.into_iter().filter(|(is, _)| *is).map(|(_, what)| what).collect();
        format!("{how}{symmetric}{smoothed}{rounding}{extra}{spared}")
    }
}

/// The error for INT8 without pictures.
pub fn no_pictures() -> Error {
    Error::Usage {
        what: "INT8 needs calibration pictures".into(),
        hint:
            "add --calib DIR (DIR/<class>/<picture>, 32 to 128 pictures), or choose --preset cpu or --precision fp16, \
               which need none"
                .into(),
    }
}

/// What quantization did.
#[derive(Clone, Debug)]
pub struct Quantized {
    /// The new graph.
    pub graph: Graph,
    /// How its activations are quantized.
    pub activations: Activations,
    /// Layers that are integers now.
    pub layers: Vec<Layer>,
    /// Weighted nodes that stay float.
    pub skipped: Vec<Skipped>,
    /// What was tried, the chosen one first; empty where there were no pictures to judge by.
    pub candidates: Vec<Candidate>,
    /// The effect of what was done in the end.
    pub effect: Option<Effect>,
    /// The float model that was quantized: the source, or the same with channels evened out.
    pub ground: Graph,
    /// Layers with the effect of quantizing nothing else, where that was asked for or needed; the worst first.
    pub alone: Vec<(String, Effect)>,
}

/// What is asked of quantization.
#[derive(Clone, Debug, Default)]
pub struct Wish {
    /// Who will run the file.
    pub preset: Preset,
    /// How ranges are chosen; `None` tries every way.
    pub calibrator: Option<Calibrator>,
    /// What the model must keep.
    pub target: Target,
    /// Whether to measure the effect of each layer alone.
    pub explain: bool,
    /// Names of layers that stay as they are.
    pub keep: BTreeSet<String>,
}

/// What the pictures told: ranges of activations, and probes to judge candidates by.
pub struct Evidence {
    /// Ranges.
    pub statistics: Arc<Statistics>,
    /// Some of the pictures that were calibrated with, to correct biases.
    pub pictures: Vec<ArrayD<f32>>,
    /// Judges.
    pub probes: Probes,
}

/// Quantizes weights and, but for the `cpu` preset, activations. With pictures every way that the preset allows is
/// tried, and the one whose logits are nearest to the float model's is taken, or one that is good and faster; where
/// it misses the target, the layers that cost most stay float.
///
/// `card` is any card of this model: candidates are run with it.
///
/// # Errors
/// Those of writing the graph and of running the candidates; [`Error::Usage`] when the preset needs pictures and there are none.
pub fn quantize(
    graph: &Graph,
    wish: &Wish,
    evidence: Option<&Evidence>,
    card: &Card,
    options: &Options,
) -> Result<Quantized> {
    let Wish { preset, calibrator, target, explain, keep: kept } = wish;
    let (mut layers, mut skipped) = layers::find(graph);
    let asked = layers.extract_if(.., |l| kept.contains(&l.name));
    skipped.extend(asked.map(|l| Skipped { name: l.name, reason: keep::REASON.into() }));
    let Some(evidence) = evidence else {
        if *preset != Preset::Cpu {
            return Err(no_pictures());
        }
        return Ok(Quantized {
            graph: write(graph, &layers, &Recipe::default())?,
            ground: graph.clone(),
            alone: vec![],
            activations: Activations::PerToken,
            layers,
            skipped,
            candidates: vec![],
            effect: None,
        });
    };
    let search = Search { probes: &evidence.probes, calibrator: *calibrator, card, options };
    let ground = Ground::plain(graph, &layers, &evidence.statistics);
    let sites = smooth::sites(graph, &layers)?;
    let mut tried = vec![];
    if preset.tries(Activations::Static) {
        tried.extend(search.portable(&ground, &sites)?);
    }
    if preset.tries(Activations::PerToken) {
        tried.extend(search.cpu(&ground, &sites)?);
    }
    search.spare_best(&mut tried)?;
    rank(&mut tried);
    let mut candidates: Vec<Candidate> = tried.iter().skip(1).map(|a| a.candidate.clone()).collect();
    let chosen = search.refine(tried.swap_remove(0), &evidence.pictures, &mut candidates)?;
    drop(tried);
    candidates.sort_by(|a, b| b.effect.sqnr.total_cmp(&a.effect.sqnr));
    candidates.insert(0, chosen.candidate.clone());
    let (activations, mut effect) = (chosen.candidate.activations, chosen.candidate.effect);
    let met = target.met(&effect, evidence.probes.float_top1());
    let alone = if *explain || !met { search.sensitivity(&chosen)? } else { vec![] };
    let mixed = if met { None } else { Some(search.mix(&chosen, target, &alone)?) };
    let alone = alone.into_iter().map(|(l, e)| (chosen.layers[l].name.clone(), e)).collect();
    let reason = "float16 weights: little work, but much of the noise".to_string();
    skipped.extend(chosen.spared.iter().map(|l| Skipped { name: layers[*l].name.clone(), reason: reason.clone() }));
    let (graph, float) = match mixed {
        Some(m) => {
            skipped.extend(m.skipped);
            effect = m.effect;
            (m.graph, m.float)
        }
        None => (search.graph_of(&chosen)?, chosen.spared),
    };
    // By their nodes in the model that was quantized.
    let layers = chosen.layers.into_iter().enumerate().filter(|(i, _)| !float.contains(i)).map(|(_, l)| l).collect();
    Ok(Quantized { graph, activations, layers, skipped, candidates, effect: Some(effect), ground: chosen.float, alone })
}

impl Attempt {
    fn is_static(&self) -> bool {
        self.candidate.activations == Activations::Static
    }

    /// Whether it has static activations and its answers are nearly those of the float model.
    fn is_good(&self) -> bool {
        let hybrid = self.layers.iter().any(|l| l.class == "depthwise conv");
        self.is_static() && self.candidate.effect.sqnr >= if hybrid { GOOD_HYBRID_DB } else { GOOD_DB }
    }
}

/// Best first; on a tie the first tried, which does less, stays first. A portable one that is good comes before all, since static
/// activations are faster and run everywhere, rather one with nothing in float: of a hybrid with depthwise convolutions the
/// bottlenecks then run as one operator. Else a portable one that is hardly worse than the best, and of those one with
/// symmetric ranges, which every engine takes.
fn rank(tried: &mut [Attempt]) {
    let sqnr = |a: &Attempt| a.candidate.effect.sqnr;
    tried.sort_by(|a, b| sqnr(b).total_cmp(&sqnr(a)));
    let least = sqnr(&tried[0]) - MEANINGFUL_DB;
    let whole = |a: &Attempt| a.is_good() && a.spared.is_empty();
    let portable = |a: &Attempt| a.is_static() && sqnr(a) >= least;
    let everywhere = |a: &Attempt| portable(a) && a.candidate.symmetric == a.candidate.ranges;
    let first = |which: &dyn Fn(&Attempt) -> bool| tried.iter().position(which);
    let ways: [&dyn Fn(&Attempt) -> bool; 4] = [&whole, &Attempt::is_good, &everywhere, &portable];
    if let Some(at) = ways.into_iter().find_map(first) {
        tried[..=at].rotate_right(1);
    }
}

fn write(graph: &Graph, layers: &[Layer], recipe: &Recipe) -> Result<Graph> {
    let mut graph = graph.clone();
    write::write_int8(&mut graph, layers, recipe)?;
    Ok(graph)
}

#[cfg(test)]
pub(crate) mod tests;

//! How near a quantized model's logits are to the float model's, on pictures kept for that.

use crate::evaluate::{best, divergence};
use indicatif::ProgressBar;
use ndarray::ArrayD;
use vedge_runtime::onnx::Graph;
use vedge_runtime::{Options, Result, Session};

/// Some calibration pictures and what the float model says to them, to judge candidates by.
pub struct Probes {
    /// Input tensors.
    pub inputs: Vec<ArrayD<f32>>,
    /// The float model's output for each.
    pub reference: Vec<Vec<f32>>,
    /// The right class of each.
    pub classes: Vec<usize>,
    /// Which output of the graph that is.
    pub output: usize,
    /// Whether that output holds probabilities already.
    pub probabilities: bool,
    /// Whether the ranges of activations were calibrated without these pictures.
    pub held_out: bool,
}

/// So many pictures tell that a candidate is hopeless.
const ENOUGH_TO_REFUSE: usize = 8;

/// How near a model's outputs are to the float model's on some pictures.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Effect {
    /// Signal-to-noise ratio of the logits, dB.
    pub sqnr: f64,
    /// Share of pictures with the same first answer, 0…1.
    pub agreement: f64,
    /// Share of right first answers, 0…1.
    pub top1: f64,
    /// Mean Kullback-Leibler divergence from the float model's answers, nats.
    pub mean_kl: f64,
    /// On how many pictures; fewer than others where it was hopeless.
    pub pictures: usize,
}

impl Probes {
    /// What these pictures are, for reports.
    pub fn measured_on(&self) -> &'static str {
        match self.held_out {
            true => "calibration pictures held out",
            false => "calibration pictures themselves",
        }
    }

    /// The first of them.
    pub fn first(&self, count: usize) -> Probes {
        let count = count.min(self.inputs.len());
        Probes {
            inputs: self.inputs[..count].to_vec(),
            reference: self.reference[..count].to_vec(),
            classes: self.classes[..count].to_vec(),
            ..*self
        }
    }

    /// Share of right first answers of the float model, 0…1.
    pub fn float_top1(&self) -> f64 {
        share(self.reference.iter().zip(&self.classes).map(|(y, c)| best(y) == *c))
    }

    /// Runs a candidate on every picture; on a few only, where the logits are less than `least` dB near by then.
    ///
    /// # Errors
    /// Those of loading and running it.
    pub fn judge(&self, graph: &Graph, options: &Options, bar: &ProgressBar, least: f64) -> Result<Effect> {
        let mut session = Session::from_graph(graph.clone(), options)?;
        let mut ratio = Sqnr::default();
        let (mut answers, mut kl) = (vec![], 0.0);
        for (x, want) in self.inputs.iter().zip(&self.reference) {
            let got = session.run(std::slice::from_ref(x))?;
            let got: Vec<f32> = got[self.output].iter().copied().collect();
            ratio.add(want.iter().copied(), got.iter().copied());
            answers.push(best(&got));
            kl += divergence(want, &got, self.probabilities);
            bar.inc(1);
            if answers.len() == ENOUGH_TO_REFUSE && ratio.db() < least {
                break;
            }
        }
        let count = answers.len();
        Ok(Effect {
            sqnr: ratio.db(),
            agreement: share(answers.iter().zip(&self.reference).map(|(a, y)| *a == best(y))),
            top1: share(answers.iter().zip(&self.classes).map(|(a, c)| a == c)),
            pictures: count,
            mean_kl: kl / count.max(1) as f64,
        })
    }
}

fn share(of: impl ExactSizeIterator<Item = bool>) -> f64 {
    let count = of.len().max(1) as f64;
    of.filter(|yes| *yes).count() as f64 / count
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

//! Mixed precision: where INT8 misses what is asked of it, the layers that cost most keep float16 weights and float
//! arithmetic, as few as will do.

use super::Candidate;
use super::judge::Effect;
use super::layers::{Layer, Skipped};
use super::search::{Attempt, Search};
use super::write::{self, Recipe, write_f16_of};
use crate::progress;
use indicatif::ProgressBar;
use std::collections::BTreeSet;
use vedge_runtime::onnx::Graph;
use vedge_runtime::{Card, Error, Result};

/// What a quantized model must keep on the judging pictures.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Target {
    /// Points of top-1 it may lose.
    pub max_drop: Option<f64>,
    /// Least share of pictures with the float model's first answer, 0…1.
    pub min_agreement: Option<f64>,
}

impl Target {
    /// Whether anything is asked.
    pub fn is_some(&self) -> bool {
        *self != Target::default()
    }

    /// Whether that is kept.
    pub fn met(&self, e: &Effect, float_top1: f64) -> bool {
        // A hair of room: shares are ratios of small whole numbers.
        self.max_drop.is_none_or(|d| 100.0 * (float_top1 - e.top1) <= d + 1e-9)
            && self.min_agreement.is_none_or(|a| e.agreement >= a - 1e-9)
    }
}

/// So many judging pictures measure the effect of a single layer.
const SENSITIVITY: usize = 8;

/// A mixed model.
pub struct Mixed {
    /// The graph.
    pub graph: Graph,
    /// Indices of the layers that stay float.
    pub float: BTreeSet<usize>,
    /// The same with reasons.
    pub skipped: Vec<Skipped>,
    /// The effect on the probes.
    pub effect: Effect,
}

impl Search<'_> {
    /// Keeps the fewest layers in float so that the target is met; `order` is what [`Self::sensitivity`] told.
    ///
    /// # Errors
    /// [`Error::Usage`] when even a model without integer layers misses the target.
    pub fn mix(&self, a: &Attempt, target: &Target, order: &[(usize, Effect)]) -> Result<Mixed> {
        let float_top1 = self.probes.float_top1();
        let bar =
            progress::bar("keeping layers in float", self.probes.inputs.len() * (order.len().ilog2() as usize + 2));
        let judged = |count: usize| {
            let float = order[..count].iter().map(|(l, _)| *l).chain(a.spared.iter().copied()).collect();
            let mixed = self.leaving(a, float, &bar)?;
            Ok::<_, Error>(mixed)
        };
        // The fewest: with more layers in float the effect does not get worse, but for luck on single pictures.
        let (mut low, mut high) = (0, order.len());
        let mut best = judged(high)?;
        if !target.met(&best.candidate.effect, float_top1) {
            return Err(Error::Usage {
                what: format!(
                    "the target is missed even with every layer in float: agreement {:.1} %, {:+.1} points",
                    100.0 * best.candidate.effect.agreement,
                    100.0 * (best.candidate.effect.top1 - float_top1)
                ),
                hint: "leave --max-drop and --min-agreement out, or ask for less".into(),
            });
        }
        while high - low > 1 {
            let middle = low.midpoint(high);
            let tried = judged(middle)?;
            if target.met(&tried.candidate.effect, float_top1) {
                (high, best) = (middle, tried);
            } else {
                low = middle;
            }
        }
        bar.finish_and_clear();
        let skipped = order[..high].iter().map(|(l, alone)| Skipped {
            name: a.layers[*l].name.clone(),
            reason: format!(
                "float16 weights to meet the target: alone in int8 it moves the answers by {:.1e} nats",
                alone.mean_kl
            ),
        });
        let (graph, effect) = (self.graph_of(&best)?, best.candidate.effect);
        Ok(Mixed { graph, skipped: skipped.collect(), float: best.spared, effect })
    }

    /// Layers with what they do to the answers when nothing but them is quantized, the largest divergence first.
    ///
    /// # Errors
    /// Those of running candidates.
    pub fn sensitivity(&self, a: &Attempt) -> Result<Vec<(usize, Effect)>> {
        let few = self.probes.first(SENSITIVITY);
        let bar = progress::bar("measuring each layer", a.layers.len() * few.inputs.len());
        let mut order = vec![];
        for i in (0..a.layers.len()).filter(|i| !a.spared.contains(i)) {
            let graph = self.partly(a, |l| l == i)?;
            order.push((i, few.judge(&graph, self.options, &bar, f64::NEG_INFINITY)?));
        }
        bar.finish_and_clear();
        order.sort_by(|x, y| y.1.mean_kl.total_cmp(&x.1.mean_kl).then(x.0.cmp(&y.0)));
        Ok(order)
    }

    /// The attempt with these layers in float instead of those it has there.
    pub fn leaving(&self, a: &Attempt, float: BTreeSet<usize>, bar: &ProgressBar) -> Result<Attempt> {
        let graph = self.partly(a, |l| !float.contains(&l))?;
        let effect = self.probes.judge(&graph, self.options, bar, f64::NEG_INFINITY)?;
        let candidate = Candidate { spared: float.len(), effect, ..a.candidate.clone() };
        Ok(Attempt { candidate, spared: float, ..a.clone() })
    }

    /// The quantized graph of an attempt.
    ///
    /// # Errors
    /// Those of writing it.
    pub fn graph_of(&self, a: &Attempt) -> Result<Graph> {
        self.partly(a, |l| !a.spared.contains(&l))
    }

    /// The attempt with only some layers in integers, the other weights in float16.
    ///
    /// # Errors
    /// Those of writing it.
    pub fn partly(&self, a: &Attempt, integer: impl Fn(usize) -> bool) -> Result<Graph> {
        self.partly_with(a, &a.recipe, integer)
    }

    /// As [`Self::partly`], by another recipe.
    ///
    /// # Errors
    /// Those of writing it.
    pub fn partly_with(&self, a: &Attempt, recipe: &Recipe, integer: impl Fn(usize) -> bool) -> Result<Graph> {
        let (mut inside, mut outside) = (vec![], vec![]);
        for (i, l) in a.layers.iter().enumerate() {
            if integer(i) { inside.push(l.clone()) } else { outside.push(l) }
        }
        let mut graph = a.float.clone();
        write::write_int8(&mut graph, &inside, recipe)?;
        write_f16_of(&mut graph, |name| outside.iter().any(|l: &&Layer| l.weight == name))?;
        Card { activations: a.candidate.activations, ..self.card.clone() }.embed(&mut graph);
        Ok(graph)
    }
}

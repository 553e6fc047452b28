//! Tries ways to quantize, one decision after the other, and judges each by the logits.

use super::bias;
use super::layers::Layer;
use super::number::{Affine, symmetric};
use super::round::{Before, Rounded, compensated};
use super::smooth::{self, By, Site};
use super::write::Recipe;
use super::{Candidate, Probes, Rounding, Sqnr, write};
use crate::progress;
use ndarray::{ArrayD, ArrayView1};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use vedge_calibration::{Calibrator, Histogram, InputMoments, Statistics, View};
use vedge_runtime::model::card::Activations;
use vedge_runtime::onnx::{Graph, to_f32};
use vedge_runtime::{Card, Options, Result, Session};

/// A symmetric range is taken for free where its steps are at most so many times as wide.
const FREE: f32 = 1.05;
/// Gain below which a refinement is not kept, dB.
const WORTH_DB: f64 = 0.1;
/// Likeness of the float model after its channels were evened out, dB; rounding alone leaves more than 80.
const SAME_DB: f64 = 50.0;

/// What a search works on.
pub struct Search<'a> {
    /// Judges.
    pub probes: &'a Probes,
    /// How ranges are chosen; `None` tries every way.
    pub calibrator: Option<Calibrator>,
    /// Any card of the model.
    pub card: &'a Card,
    /// How candidates are run.
    pub options: &'a Options,
}

/// A float model, the same as the source or with its channels evened out, and what was observed of it.
pub struct Ground<'a> {
    graph: Cow<'a, Graph>,
    layers: Cow<'a, [Layer]>,
    statistics: Arc<Statistics>,
    smoothed: usize,
}

impl<'a> Ground<'a> {
    /// The model as it is.
    pub fn plain(graph: &'a Graph, layers: &'a [Layer], statistics: &Arc<Statistics>) -> Ground<'a> {
        Ground {
            graph: Cow::Borrowed(graph),
            layers: Cow::Borrowed(layers),
            statistics: statistics.clone(),
            smoothed: 0,
        }
    }

    fn moments(&self, l: &Layer) -> Option<&InputMoments> {
        l.view.and_then(|v| self.statistics.moments.get(&(l.activation.clone(), v)))
    }

    fn ranges(&self, c: Calibrator) -> BTreeMap<String, (f32, f32)> {
        let range = |(value, o): (&String, &Histogram)| (value.clone(), o.range(c));
        self.statistics.observed.iter().map(range).collect()
    }
}

/// A candidate and what it was made of: the quantized graph itself is written again when it is needed, for there are many
/// attempts and each would hold all weights.
#[derive(Clone)]
pub struct Attempt {
    /// What was done and how it went.
    pub candidate: Candidate,
    /// The float model that was quantized.
    pub float: Graph,
    /// Its layers.
    pub layers: Vec<Layer>,
    /// How they were quantized.
    pub recipe: Recipe,
    /// Indices of the layers left in float for the sake of accuracy.
    pub spared: BTreeSet<usize>,
    /// What was observed of the float model.
    pub statistics: Arc<Statistics>,
}

impl Search<'_> {
    /// Static activations: the calibrator first, then how weights are rounded, then whether channels are evened out.
    pub fn portable(&self, ground: &Ground<'_>, sites: &[Site]) -> Result<Vec<Attempt>> {
        let mut tried = vec![];
        for c in self.calibrators() {
            let recipe = Recipe { ranges: ground.ranges(c), ..Recipe::default() };
            tried.push(self.judged(ground, Activations::Static, Some(c), recipe, &tried)?);
        }
        let best = best(&tried).candidate.calibrator.expect("static candidates have one");
        let even = self.evened(ground, sites, Activations::Static)?;
        for ground in std::iter::once(ground).chain(&even) {
            // Clipping may have been best for the sake of what is evened out now.
            let evened = (ground.smoothed > 0 && self.calibrator.is_none()).then_some(Calibrator::MinMax);
            for c in BTreeSet::from_iter(evened.into_iter().chain([best])) {
                let ranges = ground.ranges(c);
                let noise = |l: &Layer| ranges.get(&l.activation).map_or(0.0, |r| rounding_noise(*r));
                let rounded = self.round(ground, noise, Before::default())?;
                let recipe = Recipe { ranges, rounded, ..Recipe::default() };
                tried.push(self.judged(ground, Activations::Static, Some(c), recipe, &tried)?);
            }
        }
        // Of every ground: which of them is best may change by it.
        for ground in std::iter::once(ground).chain(&even) {
            let of = |a: &&Attempt| a.candidate.smoothed == ground.smoothed;
            let Some(Attempt { candidate, recipe, .. }) = tried.iter().filter(of).reduce(better).cloned() else {
                continue;
            };
            for symmetric in symmetries(&recipe.ranges) {
                let recipe = Recipe { symmetric, ..recipe.clone() };
                tried.push(self.judged(ground, Activations::Static, candidate.calibrator, recipe, &tried)?);
            }
        }
        Ok(tried)
    }

    /// What else may bring a chosen attempt nearer, one after the other, each kept only where it does: large weights clipped,
    /// weights fitted to noisy inputs, biases of depthwise convolutions corrected in the quantized model.
    ///
    /// # Errors
    /// Those of running candidates.
    pub fn refine(&self, mut a: Attempt, pictures: &[ArrayD<f32>], tried: &mut Vec<Candidate>) -> Result<Attempt> {
        let mut before = Before::default();
        for next in [Before { clip: true, ..before }, Before { ridge: true, ..before }] {
            if a.recipe.rounded.is_empty() {
                break;
            }
            let wanted = Before { clip: before.clip || next.clip, ridge: next.ridge };
            let ground = Ground {
                graph: Cow::Borrowed(&a.float),
                layers: Cow::Borrowed(&a.layers),
                statistics: a.statistics.clone(),
                smoothed: a.candidate.smoothed,
            };
            let noise = |l: &Layer| match a.recipe.ranges.get(&l.activation) {
                Some(r) if a.recipe.symmetric.contains(&l.activation) => f64::from(symmetric(*r)).powi(2) / 12.0,
                Some(r) => rounding_noise(*r),
                None => row_noise(&ground, l),
            };
            let rounded = self.round(&ground, noise, wanted)?;
            let other = self.instead(&a, Recipe { rounded, ..a.recipe.clone() })?;
            if self.keep(&mut a, other, tried, |c| if next.clip { c.clipped = true } else { c.ridge = true }) {
                before = wanted;
            }
        }
        let shifts = bias::depthwise(self, &a, pictures)?;
        if !shifts.is_empty() {
            let other = self.instead(&a, Recipe { shifts, ..a.recipe.clone() })?;
            self.keep(&mut a, other, tried, |c| c.corrected = true);
        }
        Ok(a)
    }

    /// An attempt with another recipe.
    fn instead(&self, a: &Attempt, recipe: Recipe) -> Result<Attempt> {
        let other = Attempt { recipe, ..a.clone() };
        let bar = progress::bar("judging by the logits", self.probes.inputs.len());
        let done = self.leaving(&other, a.spared.clone(), &bar);
        bar.finish_and_clear();
        done
    }

    /// Takes the other attempt where it is better by more than luck; what is not taken is noted.
    fn keep(
        &self,
        a: &mut Attempt,
        mut other: Attempt,
        tried: &mut Vec<Candidate>,
        mark: impl Fn(&mut Candidate),
    ) -> bool {
        mark(&mut other.candidate);
        let better = other.candidate.effect.sqnr >= a.candidate.effect.sqnr + WORTH_DB;
        if better {
            std::mem::swap(a, &mut other);
        }
        tried.push(other.candidate);
        better
    }

    fn calibrators(&self) -> Vec<Calibrator> {
        self.calibrator.map_or(Calibrator::ALL.to_vec(), |c| vec![c])
    }

    /// Activations quantized row by row: how weights are rounded, then whether channels are evened out, then whether
    /// convolutions, whose input has one range for the whole picture, do better with a calibrated one.
    pub fn cpu(&self, ground: &Ground<'_>, sites: &[Site]) -> Result<Vec<Attempt>> {
        let mut tried = vec![self.judged(ground, Activations::PerToken, None, Recipe::default(), &[])?];
        let even = self.evened(ground, sites, Activations::PerToken)?;
        for ground in std::iter::once(ground).chain(&even) {
            let rounded = self.round(ground, |l| row_noise(ground, l), Before::default())?;
            tried.push(self.judged(
                ground,
                Activations::PerToken,
                None,
                Recipe { rounded, ..Recipe::default() },
                &tried,
            )?);
        }
        let so_far = best(&tried);
        let ground = ground_of(so_far, ground, &even);
        let convolutions: BTreeSet<&String> =
            ground.layers.iter().filter(|l| l.class != "linear").map(|l| &l.activation).collect();
        let rounded = so_far.recipe.rounded.clone();
        let mut some = vec![];
        // What pictures can be is known, and black is best an integer of its own.
        let input = convolutions.iter().find(|v| ground.graph.inputs.iter().any(|i| i.name() == v.as_str()));
        some.extend(input.map(|v| (self.calibrator.unwrap_or(Calibrator::MinMax), BTreeSet::from([*v]))));
        if convolutions.len() > 1 {
            some.extend(self.calibrators().into_iter().map(|c| (c, convolutions.clone())));
        }
        for (c, values) in some {
            let mut ranges = ground.ranges(c);
            ranges.retain(|value, _| values.contains(value));
            let symmetric = free(&ranges);
            let recipe = Recipe { ranges, symmetric, rounded: rounded.clone(), ..Recipe::default() };
            tried.push(self.judged(ground, Activations::PerToken, Some(c), recipe, &tried)?);
        }
        Ok(tried)
    }

    /// The model with channels evened out where that is predicted to help: by constants; with products, too; between layers,
    /// too. Nothing where it is nowhere, or where the float model would answer otherwise.
    fn evened(&self, ground: &Ground<'_>, sites: &[Site], kind: Activations) -> Result<Vec<Ground<'static>>> {
        // Where every row has a range of its own, a product is not worth its time.
        let sites = sites.iter().filter(|s| kind == Activations::Static || s.by != By::Product);
        let mut chosen = vec![];
        for site in sites {
            let factors = smooth::factors(&ground.graph, &ground.layers, site, &ground.statistics, kind)?;
            chosen.extend(factors.map(|f| (site, f)));
        }
        chosen.sort_by_key(|(site, _)| site.by);
        let up_to = |by: By| chosen.partition_point(|(site, _)| site.by <= by);
        let counts = BTreeSet::from([By::Constants, By::Product, By::Layer].map(up_to));
        let mut even = vec![];
        for count in counts.into_iter().filter(|n| *n > 0) {
            even.extend(self.evened_at(ground, &chosen[..count])?);
        }
        Ok(even)
    }

    fn evened_at(&self, ground: &Ground<'_>, chosen: &[(&Site, Vec<f32>)]) -> Result<Option<Ground<'static>>> {
        let (graph, statistics) = smooth::apply(&ground.graph, &ground.statistics, &ground.layers, chosen)?;
        // Those that the model had before, in another order of nodes.
        let mut layers = super::layers::find(&graph).0;
        layers.retain(|l| ground.layers.iter().any(|k| k.name == l.name));
        let mut session = Session::from_graph(graph.clone(), self.options)?;
        let mut same = Sqnr::default();
        for (x, want) in self.probes.inputs.iter().zip(&self.probes.reference).take(2) {
            let got = session.run(std::slice::from_ref(x))?;
            same.add(want.iter().copied(), got[self.probes.output].iter().copied());
        }
        let ground = Ground {
            graph: Cow::Owned(graph),
            layers: Cow::Owned(layers),
            statistics: Arc::new(statistics),
            smoothed: chosen.len(),
        };
        Ok((same.db() > SAME_DB).then_some(ground))
    }

    fn judged(
        &self,
        ground: &Ground<'_>,
        activations: Activations,
        calibrator: Option<Calibrator>,
        recipe: Recipe,
        others: &[Attempt],
    ) -> Result<Attempt> {
        let mut graph = write(&ground.graph, &ground.layers, &recipe)?;
        Card { activations, ..self.card.clone() }.embed(&mut graph);
        let bar = progress::bar("judging by the logits", self.probes.inputs.len());
        let effect = self.probes.judge(&graph, self.options, &bar, hopeless(others))?;
        bar.finish_and_clear();
        let rounding = if recipe.rounded.is_empty() { Rounding::Nearest } else { Rounding::Compensated };
        let candidate = Candidate {
            activations,
            calibrator,
            rounding,
            smoothed: ground.smoothed,
            ranges: recipe.ranges.len(),
            symmetric: recipe.symmetric.len(),
            clipped: false,
            ridge: false,
            corrected: false,
            spared: 0,
            effect,
        };
        let (float, layers) = (ground.graph.clone().into_owned(), ground.layers.to_vec());
        let statistics = ground.statistics.clone();
        Ok(Attempt { candidate, float, layers, recipe, spared: BTreeSet::new(), statistics })
    }

    /// Compensated integers of every layer whose inputs are known and whose weight it has for itself. `noise` is the
    /// variance that quantization adds to each input.
    fn round(
        &self,
        ground: &Ground<'_>,
        noise: impl Fn(&Layer) -> f64 + Sync,
        before: Before,
    ) -> Result<Arc<BTreeMap<usize, Rounded>>> {
        let mut uses: BTreeMap<&str, usize> = BTreeMap::new();
        let layers = &ground.layers;
        layers.iter().for_each(|l| *uses.entry(&l.weight).or_default() += 1);
        let bar = progress::bar("rounding weights", layers.len());
        let next = AtomicUsize::new(0);
        let done = Mutex::new(vec![]);
        let work = || {
            while let Some(l) = layers.get(next.fetch_add(1, Ordering::Relaxed)) {
                if let Some(m) = ground.moments(l).filter(|_| uses[l.weight.as_str()] == 1) {
                    let rounded =
                        to_f32(&ground.graph.initializers[&l.weight]).map(|w| compensated(l, &w, m, noise(l), before));
                    done.lock().expect("no worker panics").push((l.node, rounded));
                }
                bar.inc(1);
            }
        };
        std::thread::scope(|s| (0..self.options.threads).for_each(|_| drop(s.spawn(work))));
        bar.finish_and_clear();
        let done = done.into_inner().expect("no worker panicked").into_iter();
        let rounded = done.filter_map(|(node, r)| r.map(|r| r.map(|r| (node, r))).transpose());
        Ok(Arc::new(rounded.collect::<Result<_>>()?))
    }
}

/// Values to be int8 with zero point 0: all, as TensorRT wants it; and those whose steps hardly become wider by it.
fn symmetries(ranges: &BTreeMap<String, (f32, f32)>) -> Vec<BTreeSet<String>> {
    let all: BTreeSet<String> = ranges.keys().cloned().collect();
    let some = free(ranges);
    let two = !some.is_empty() && some != all;
    std::iter::once(all).chain(two.then_some(some)).collect()
}

/// Values whose steps hardly become wider when they are int8 with zero point 0.
fn free(ranges: &BTreeMap<String, (f32, f32)>) -> BTreeSet<String> {
    let free = |(value, range): (&String, &(f32, f32))| {
        (symmetric(*range) <= FREE * Affine::over(*range).scale).then(|| value.clone())
    };
    ranges.iter().filter_map(free).collect()
}

/// What an attempt was made of.
fn ground_of<'g, 'm>(a: &Attempt, plain: &'g Ground<'m>, even: &'g [Ground<'m>]) -> &'g Ground<'m> {
    even.iter().find(|g| g.smoothed == a.candidate.smoothed).unwrap_or(plain)
}

/// Variance of the rounding when every row of a layer's input has its own range; a convolution's is the picture's.
fn row_noise(ground: &Ground<'_>, l: &Layer) -> f64 {
    let rows = ground.moments(l).filter(|m| m.view() == View::Rows).map(InputMoments::kept);
    match rows.filter(|k| k.nrows() > 0) {
        Some(rows) => {
            let range = |r: ArrayView1<'_, f32>| r.iter().fold((0f32, 0f32), |(a, b), v| (a.min(*v), b.max(*v)));
            rows.rows().into_iter().map(|r| rounding_noise(range(r))).sum::<f64>() / rows.nrows() as f64
        }
        None => ground.statistics.observed.get(&l.activation).map_or(0.0, |o| rounding_noise(o.extremes())),
    }
}

/// So many dB below the best of the others nothing can be made up for.
const HOPELESS_DB: f64 = 6.0;

/// What an attempt must reach to be of interest beside others.
pub fn hopeless(others: &[Attempt]) -> f64 {
    others.iter().map(|a| a.candidate.effect.sqnr - HOPELESS_DB).fold(f64::NEG_INFINITY, f64::max)
}

/// The attempt with the best logits; the first among equals.
pub fn best(tried: &[Attempt]) -> &Attempt {
    tried.iter().reduce(better).expect("something was tried")
}

/// Of two attempts the one with the better logits; the first where they are equal.
pub fn better<'a>(a: &'a Attempt, b: &'a Attempt) -> &'a Attempt {
    if b.candidate.effect.sqnr > a.candidate.effect.sqnr { b } else { a }
}

/// Variance of the error of a value rounded to 256 steps of a range.
fn rounding_noise(range: (f32, f32)) -> f64 {
    f64::from(Affine::over(range).scale).powi(2) / 12.0
}

#[cfg(test)]
#[path = "refine_tests.rs"]
mod tests;

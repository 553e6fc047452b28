//! Whole heads and MLP neurons leave the graph: matrices get smaller, nothing is masked. The layer that took them in is
//! repaired by least squares with the covariance of its input, so no training is needed.

pub mod eliminate;
pub mod unit;
pub mod walk;

pub use unit::{Kind, Unit};

use crate::evaluate::divergence;
use crate::{progress, shapes};
use eliminate::{Elimination, RIDGE};
use ndarray::{Array1, Array2, ArrayD};
use std::collections::BTreeMap;
use vedge_calibration::{Moments, moments};
use vedge_runtime::error::counted;
use vedge_runtime::onnx::Graph;
use vedge_runtime::{Error, Options, Result, Session};

/// What to prune.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Request {
    /// Percent of the heads.
    pub heads: Option<f64>,
    /// Percent of the MLP neurons.
    pub neurons: Option<f64>,
    /// Leave the weights that stay as they are; for comparison.
    pub no_repair: bool,
}

impl Request {
    /// Checks that it makes sense.
    ///
    /// # Errors
    /// [`Error::Usage`].
    pub fn check(&self, pictures: bool) -> Result<()> {
        let shares = [self.heads, self.neurons];
        let usage = |what: &str, hint: &str| Err(Error::Usage { what: what.into(), hint: hint.into() });
        if shares.iter().flatten().any(|p| !(0.0..=90.0).contains(p)) {
            return usage("pruning takes 0 to 90 percent", "start with --prune-mlp 20 or --prune-heads 10");
        }
        let asked = shares.iter().any(Option::is_some);
        if asked && !pictures {
            let what = "pruning needs calibration pictures: they tell what can be left out and how to make up for it";
            return usage(what, "add --calib DIR (DIR/<class>/<picture>, 64 pictures or more)");
        }
        if self.no_repair && !asked {
            return usage("--no-repair has no meaning without pruning", "add --prune-mlp or --prune-heads");
        }
        Ok(())
    }
}

/// Milliseconds that one head or neuron takes, by the name of the layer that takes them in.
pub type Prices = BTreeMap<String, f64>;

/// The pictures that decide: their tensors one after the other, how many there are, and which output is judged.
pub struct Pictures<'a> {
    /// Loads the tensor of a picture.
    pub load: &'a dyn Fn(usize) -> Result<ArrayD<f32>>,
    /// How many.
    pub count: usize,
    /// Index of the output that is the classifier's.
    pub output: usize,
}

/// What was pruned of one layer.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Line {
    /// The layer that took the heads or neurons in.
    pub layer: String,
    /// Heads or neurons.
    pub kind: Kind,
    /// How many there were.
    pub before: usize,
    /// How many stay.
    pub after: usize,
}

/// What was done.
#[derive(Clone, Debug, Default)]
pub struct Pruned {
    /// Layer by layer.
    pub lines: Vec<Line>,
    /// For the card.
    pub notes: Vec<String>,
    /// Blocks that could not be pruned, and why.
    pub warnings: Vec<String>,
}

/// Pictures on which the effect of a removal on the logits is measured.
const PROBES: usize = 16;
/// No layer loses more than this share, or a little more than was asked for.
const MOST: f64 = 0.85;

/// Prunes a prepared float graph: heads first, then neurons of what is left. Layers lose most where it costs least for the
/// milliseconds that it saves, if `prices` has those of all of them, else for the multiply-accumulates.
///
/// # Errors
/// [`Error::Usage`] when nothing can be pruned as asked, else those of running the model.
pub fn prune(
    graph: &mut Graph,
    request: &Request,
    prices: &Prices,
    pictures: &Pictures<'_>,
    options: &Options,
) -> Result<Pruned> {
    let mut done = Pruned::default();
    let mut reference = None;
    for (kind, share) in [(Kind::Heads, request.heads), (Kind::Neurons, request.neurons)] {
        let Some(share) = share.filter(|&p| p > 0.0).map(|p| p / 100.0) else { continue };
        let (mut units, not) = unit::find(graph, kind);
        if units.iter().all(|u| prices.contains_key(&u.name)) {
            units.iter_mut().for_each(|u| u.price = prices[&u.name]);
        }
        done.warnings.extend(not.into_iter().map(|n| format!("no {} pruned: {n}", kind.name())));
        let ranking = Ranking::new(graph, &units, share, pictures, options, &mut reference)?;
        let lines = ranking.prune(graph, share, !request.no_repair)?;
        let before: usize = units.iter().map(|u| u.groups).sum();
        let gone: usize = lines.iter().map(|l| l.before - l.after).sum();
        let repair = if request.no_repair { "no repair" } else { "the rest repaired by least squares" };
        done.notes.push(format!(
            "prune: {} {before} to {} ({:.1} % left the graph), {repair} on {}",
            kind.name(),
            before - gone,
            100.0 * gone as f64 / before as f64,
            counted(pictures.count, "picture")
        ));
        done.lines.extend(lines);
    }
    shapes::annotate(graph)?;
    graph.prune_unused();
    Ok(done)
}

/// Removes a share (0…1) of each unit, whichever come first: a graph that takes as long as one that was pruned with care.
/// Returns how many heads and neurons left.
///
/// # Errors
/// [`Error::Unsupported`] with the layer that cannot follow.
pub fn first(graph: &mut Graph, shares: impl Iterator<Item = (Unit, f64)>) -> Result<usize> {
    let mut gone = 0;
    for (u, share) in shares {
        let dropped: Vec<usize> = (0..u.part(share)).collect();
        if dropped.is_empty() {
            continue;
        }
        gone += dropped.len();
        u.remove(graph, &dropped, None).map_err(|why| {
            let what = format!("layer `{}` cannot be pruned: {why}", u.name);
            Error::Unsupported { what, hint: "leave the option out".into() }
        })?;
    }
    Ok(gone)
}

/// The units of a graph, and what each loses first.
pub struct Ranking<'a> {
    ranked: Vec<Ranked<'a>>,
}

impl<'a> Ranking<'a> {
    /// Runs the pictures through the graph and ranks the groups of each unit, and the units against each other by what
    /// losing `share` of one does to the logits. `reference` holds the answers that everything is compared with; the
    /// graph's own where there are none yet.
    ///
    /// # Errors
    /// [`Error::Usage`] when there are no units, else those of running the model.
    pub fn new(
        graph: &Graph,
        units: &'a [Unit],
        share: f64,
        pictures: &Pictures<'_>,
        options: &Options,
        reference: &mut Option<Vec<ArrayD<f32>>>,
    ) -> Result<Ranking<'a>> {
        let Some(kind) = units.first().map(|u| u.kind) else {
            return Err(Error::Usage {
                what: "the model has no heads or neurons that can leave it".into(),
                hint: "leave --prune-heads or --prune-mlp out; vedge inspect MODEL shows what it is made of".into(),
            });
        };
        let bar = progress::bar("covariances", pictures.count);
        let taps: Vec<String> = units.iter().map(|u| u.input.clone()).collect();
        let (mut probes, mut answers) = (vec![], vec![]);
        let inputs = (0..pictures.count).map(|i| {
            let x = (pictures.load)(i)?;
            if probes.len() < PROBES {
                probes.push(x.clone());
            }
            Ok(x)
        });
        let seen = moments(graph, &taps, inputs, options, |_, outputs| {
            if answers.len() < PROBES {
                answers.push(outputs[pictures.output].clone());
            }
            bar.inc(1);
        })?;
        bar.finish_and_clear();
        let answers = reference.get_or_insert(answers);
        let bar = progress::bar(&format!("ranking {}", kind.name()), units.len());
        let mut ranked = vec![];
        for u in units {
            let mut r = Ranked::new(graph, u, &seen[&u.input], share)?;
            let trial = r.trial(share);
            let mut without = graph.clone();
            r.remove(&mut without, trial, true)?;
            let effect = effect(&without, &probes, answers, pictures.output, options)?;
            r.weight = effect.max(1e-9) / r.cost(trial).max(f64::MIN_POSITIVE);
            ranked.push(r);
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(Ranking { ranked })
    }

    /// Removes a share (0…1, at most three times the one that the ranking was made for) from the graph that was ranked.
    ///
    /// # Errors
    /// [`Error::Unsupported`] with the layer that cannot follow.
    pub fn prune(&self, graph: &mut Graph, share: f64, repair: bool) -> Result<Vec<Line>> {
        let mut lines = vec![];
        for (r, steps) in self.ranked.iter().zip(self.allocate(share)) {
            r.remove(graph, steps, repair)?;
            let (before, gone) = (r.unit.groups, r.dropped(steps).len());
            if gone > 0 {
                lines.push(Line { layer: r.unit.name.clone(), kind: r.unit.kind, before, after: before - gone });
            }
        }
        Ok(lines)
    }

    /// How many steps each unit takes: always the one whose effect is smallest for what it saves, until the share of all is
    /// saved.
    fn allocate(&self, share: f64) -> Vec<usize> {
        let price = |r: &Ranked<'_>, groups: usize| r.unit.price * groups as f64;
        let total: f64 = self.ranked.iter().map(|r| price(r, r.unit.groups)).sum();
        let mut steps = vec![0; self.ranked.len()];
        let mut saved = 0.0;
        loop {
            let next = self.ranked.iter().enumerate().filter_map(|(i, r)| {
                let (groups, cost) = r.order.get(steps[i])?;
                let saves = price(r, groups.len());
                Some((r.weight * cost / saves, i, saves))
            });
            let Some((_, i, saves)) = next.min_by(|a, b| a.0.total_cmp(&b.0)) else { return steps };
            // The nearest to the share, not the first beyond it.
            if saved + saves / 2.0 > share * total {
                return steps;
            }
            steps[i] += 1;
            saved += saves;
        }
    }
}

/// A unit with its groups in the order in which they leave.
struct Ranked<'a> {
    unit: &'a Unit,
    covariance: Array2<f64>,
    mean: Array1<f64>,
    /// Weights of the last layer, inputs × outputs.
    before: Array2<f64>,
    /// Groups that leave together, and the expected squared error that adds.
    order: Vec<(Vec<usize>, f64)>,
    /// Effect on the logits of one unit of that error.
    weight: f64,
}

impl<'a> Ranked<'a> {
    fn new(graph: &Graph, unit: &'a Unit, moments: &Moments, share: f64) -> Result<Ranked<'a>> {
        let before = unit
            .weights(graph)
            .ok_or_else(|| Error::BadModel(format!("layer `{}`: its weight is not constant", unit.name)))?;
        let (covariance, mean) = (moments.covariance(), moments.mean());
        let mut e = Elimination::new(&covariance, before.clone(), RIDGE).ok_or_else(|| singular(unit))?;
        // Rows of a panel are computed together: a few neurons less than a panel would save nothing.
        let together = match unit.groups {
            _ if unit.kind == Kind::Heads => 1,
            0..64 => 1,
            64..256 => 4,
            _ => 16,
        };
        let most = (share * 3.0).min(MOST.max(share + 0.05)) * unit.groups as f64;
        let mut left: Vec<usize> = (0..unit.groups).collect();
        let mut order = vec![];
        while left.len() > together && (order.len() * together) as f64 + together as f64 <= most.max(together as f64) {
            left.sort_by_cached_key(|&i| std::cmp::Reverse(ordered(e.cost(&unit.rows(i)))));
            let groups = left.split_off(left.len() - together);
            let rows: Vec<usize> = groups.iter().flat_map(|&i| unit.rows(i)).collect();
            let cost = e.cost(&rows);
            if !e.drop(&rows) {
                break;
            }
            order.push((groups, cost));
        }
        Ok(Ranked { unit, covariance, mean, before, order, weight: 1.0 })
    }

    /// Steps that make up a share of the unit.
    fn trial(&self, share: f64) -> usize {
        let each = self.order.first().map_or(1, |o| o.0.len());
        ((share * self.unit.groups as f64 / each as f64).round() as usize).clamp(1, self.order.len().max(1))
    }

    fn dropped(&self, steps: usize) -> Vec<usize> {
        self.order.iter().take(steps).flat_map(|o| o.0.iter().copied()).collect()
    }

    fn cost(&self, steps: usize) -> f64 {
        self.order.iter().take(steps).map(|o| o.1).sum()
    }

    fn remove(&self, graph: &mut Graph, steps: usize, repair: bool) -> Result<()> {
        let dropped = self.dropped(steps);
        if dropped.is_empty() {
            return Ok(());
        }
        let rows: Vec<usize> = dropped.iter().flat_map(|&i| self.unit.rows(i)).collect();
        let solved = match repair {
            true => Some(
                eliminate::repair(&self.covariance, &self.mean, &self.before, &rows, RIDGE)
                    .ok_or_else(|| singular(self.unit))?,
            ),
            false => None,
        };
        let repaired = solved.as_ref().map(|(weights, bias)| (weights, bias));
        self.unit.remove(graph, &dropped, repaired).map_err(|why| {
            let hint = "leave the option out, or convert the float model that the exporter wrote".into();
            Error::Unsupported { what: format!("layer `{}` cannot be pruned: {why}", self.unit.name), hint }
        })
    }
}

fn singular(unit: &Unit) -> Error {
    Error::BadModel(format!("layer `{}`: the covariance of its input is singular", unit.name))
}

fn ordered(v: f64) -> u64 {
    // Costs are not negative, so their bits sort as they do.
    v.max(0.0).to_bits()
}

/// How far the answers of a changed model are from the reference: mean KL divergence of the classes.
fn effect(
    graph: &Graph,
    probes: &[ArrayD<f32>],
    reference: &[ArrayD<f32>],
    output: usize,
    options: &Options,
) -> Result<f64> {
    let mut session = Session::from_graph(graph.clone(), options)?;
    let mut sum = 0.0;
    for (x, want) in probes.iter().zip(reference) {
        let got = session.run(std::slice::from_ref(x))?;
        sum += divergence(&logits(want), &logits(&got[output]), false);
    }
    Ok(sum / probes.len().max(1) as f64)
}

fn logits(y: &ArrayD<f32>) -> Vec<f32> {
    y.iter().copied().collect()
}

#[cfg(test)]
mod tests;

//! Candidates: what can be tried on a model, and models that take as long as what is tried.

use super::plan::{Plan, Space};
use crate::arch::{self, Family};
use crate::convert::{Precision, Settings, bare_card, picture_size};
use crate::passes::{self, Prepare};
use crate::prune::unit::{self, Kind, Unit};
use crate::quantize::write::Recipe;
use crate::{merge, prune, quantize, shapes};
use std::collections::BTreeMap;
use std::path::Path;
use vedge_runtime::model::card::Activations;
use vedge_runtime::onnx::Graph;
use vedge_runtime::{Card, Result, Session};

/// A float graph in a precision, without a search for the best way: INT8 by nearest rounding, activations row by row.
pub(super) fn quick(graph: &Graph, card: &Card, precision: Precision) -> Result<Graph> {
    let mut graph = graph.clone();
    match precision {
        Precision::Int8 | Precision::Auto => {
            let layers = quantize::layers::find(&graph).0;
            quantize::write::write_int8(&mut graph, &layers, &Recipe::default())?;
        }
        Precision::Fp16 => drop(quantize::write_f16(&mut graph)?),
        Precision::Fp32 => {}
    }
    let precision = precision.name().into();
    Card { activations: Activations::PerToken, precision, ..card.clone() }.embed(&mut graph);
    Ok(graph)
}

/// A model that takes as long as a plan's: the first heads and neurons leave, whichever they are.
pub(super) fn stand_in(source: &Path, settings: &Settings, plan: &Plan) -> Result<Graph> {
    let share = |kind| match kind {
        Kind::Heads => f64::from(plan.heads) / 100.0,
        Kind::Neurons => f64::from(plan.neurons) / 100.0,
    };
    made(source, settings, plan, |graph| {
        let units = |kind| unit::find(graph, kind).0.into_iter().map(move |u| (u, share(kind)));
        let (heads, neurons) = (units(Kind::Heads).collect::<Vec<_>>(), units(Kind::Neurons).collect::<Vec<_>>());
        prune::first(graph, heads.into_iter().chain(neurons))
    })
}

/// Plain INT8 without half of the heads or neurons of a class of layers.
pub(super) fn without_half(source: &Path, settings: &Settings, units: &[Unit]) -> Result<Graph> {
    made(source, settings, &Plan::default(), |graph| prune::first(graph, units.iter().map(|u| (u.clone(), 0.5))))
}

fn made(
    source: &Path,
    settings: &Settings,
    plan: &Plan,
    prune: impl FnOnce(&mut Graph) -> Result<usize>,
) -> Result<Graph> {
    let settings = Settings { size: plan.size.or(settings.size), calibration: None, ..settings.clone() };
    let mut graph = Graph::read(source)?;
    passes::prepare(&mut graph, &settings.prepare()).map_err(|e| e.in_file(source))?;
    let architecture = arch::recognise(&graph);
    if prune(&mut graph)? > 0 {
        shapes::annotate(&mut graph)?;
        graph.prune_unused();
    }
    if let Some(schedule) = plan.schedule() {
        merge::merge(&mut graph, &schedule, &architecture)?;
    }
    let card = bare_card(source, &graph, &settings)?;
    let graph = quick(&graph, &card, plan.precision)?;
    // What cannot run is found here.
    Session::from_graph(graph.clone(), &settings.options)?;
    Ok(graph)
}

/// Layers whose heads or neurons cost the same, by a key for tables; only where there are several such classes of a kind,
/// for else what leaves first does not depend on times.
pub(super) fn classes(graph: &Graph) -> BTreeMap<String, Vec<Unit>> {
    let mut all = BTreeMap::new();
    for kind in [Kind::Heads, Kind::Neurons] {
        let mut classes: BTreeMap<String, Vec<Unit>> = BTreeMap::new();
        for u in unit::find(graph, kind).0 {
            let key = format!("int8-half-{}-{}x{}-{}macs", kind.name(), u.groups, u.width, u.macs);
            classes.entry(key).or_default().push(u);
        }
        if classes.len() > 1 {
            all.extend(classes);
        }
    }
    all
}

/// Resolutions that are tried at most.
const SIZES: usize = 8;
/// Pixels between the sizes that are looked at where no patches say so.
const STEP: usize = 8;

/// What can be tried on a model.
pub(super) fn space(source: &Path, graph: &Graph, settings: &Settings) -> Result<Space> {
    let architecture = arch::recognise(graph);
    let mut space = Space { precisions: vec![Precision::Fp16, Precision::Fp32], ..Space::default() };
    if settings.size.is_none() {
        let step = passes::patch::find(graph).map_or((STEP, STEP), |p| p.1);
        space.sizes = smaller(picture_size(graph)?, step, |size| {
            let fits = |mut graph: Graph| {
                let prepare = Prepare { size: Some(size), ..settings.prepare() };
                passes::prepare(&mut graph, &prepare).is_ok() && Session::from_graph(graph, &settings.options).is_ok()
            };
            Graph::read(source).is_ok_and(fits)
        });
    }
    if matches!(architecture.family, Family::Vit | Family::Deit) {
        let (tokens, blocks) = (architecture.tokens.iter().copied().max().unwrap_or(0), architecture.blocks.max(1));
        // From a fifth to three fifths of the tokens gone at the end.
        space.merges = [5, 3, 2].map(|part| (tokens / part / blocks).max(1)).to_vec();
        space.merges.dedup();
    }
    // Small models, whose MLPs are wider than what they learnt, lose most of them without harm.
    for (kind, percent, shares) in
        [(Kind::Neurons, &[10, 20, 40, 80][..], &mut space.neurons), (Kind::Heads, &[10, 20, 30], &mut space.heads)]
    {
        if !unit::find(graph, kind).0.is_empty() {
            *shares = percent.to_vec();
        }
    }
    Ok(space)
}

/// Sizes down to half of each side that a model can take, evenly spread, in steps of which the smallest is `step`.
fn smaller((h, w): (usize, usize), step: (usize, usize), fits: impl Fn((usize, usize)) -> bool) -> Vec<(usize, usize)> {
    let sizes = (1..).map(|k| (h.saturating_sub(k * step.0), w.saturating_sub(k * step.1)));
    let sizes: Vec<_> = sizes.take_while(|s| 2 * s.0 >= h && 2 * s.1 >= w).filter(|&s| fits(s)).collect();
    // The smallest is the last: every so many of them.
    let every = sizes.len().div_ceil(SIZES).max(1);
    sizes.into_iter().rev().step_by(every).collect::<Vec<_>>().into_iter().rev().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_spread_over_what_fits() {
        assert_eq!(smaller((64, 64), (8, 8), |_| true), [(56, 56), (48, 48), (40, 40), (32, 32)]);
        assert_eq!(smaller((64, 32), (8, 8), |_| true), [(56, 24), (48, 16)]);
        assert_eq!(smaller((64, 64), (8, 8), |s| s.0 % 32 == 0), [(32, 32)]);
        let many = smaller((224, 224), (4, 4), |_| true);
        assert!(
            many.len() <= SIZES && many.first() == Some(&(208, 208)) && many.last() == Some(&(112, 112)),
            "{many:?}"
        );
        assert!(smaller((8, 8), (8, 8), |_| true).is_empty());
    }
}

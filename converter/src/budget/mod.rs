//! One budget, one search: resolution, tokens, neurons and heads of an INT8 model that is to be so fast or so small.
//!
//! Each thing is tried alone first: how long it then takes (or how large it is), and how far its answers on pictures held
//! out diverge from the whole model's. Factors of time multiply and divergences add up well enough to say which
//! combinations are worth a try; those are then made and judged themselves. What is chosen is the one that diverges least
//! within the budget; where none keeps to `max_drop`, it is plain INT8.

mod latency;
mod plan;
pub mod plot;

pub use latency::{Latency, Table};
pub use plan::{Plan, Space};

use crate::arch::Family;
use crate::convert::{Float, Precision, Settings, float, held_out, load_picture, sha256, whole_answers};
use crate::passes::{self, Prepare};
use crate::quantize::write::Recipe;
use crate::quantize::{self, Effect, Probes};
use crate::{arch, merge, progress, prune, shapes};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use vedge_calibration::dataset;
use vedge_runtime::model::card::Activations;
use vedge_runtime::onnx::Graph;
use vedge_runtime::{Card, Error, Result, Session, files};

/// A number, or a share of what plain INT8 has.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Amount {
    /// Of plain INT8.
    Share(f64),
    /// Milliseconds, or bytes.
    Absolute(f64),
}

impl Amount {
    /// Reads `0.4x` or a number with one of the units, each with what it stands for.
    ///
    /// # Errors
    /// What was expected, in words.
    fn parse(s: &str, units: &[(&str, f64)], example: &str) -> Result<Amount, String> {
        let number = |s: &str| s.trim().parse::<f64>().ok().filter(|n| n.is_finite() && *n > 0.0);
        let share = s.strip_suffix('x').and_then(number).map(Amount::Share);
        let unit =
            || units.iter().find_map(|(u, f)| s.strip_suffix(u).and_then(number).map(|n| Amount::Absolute(n * f)));
        share.or_else(unit).ok_or_else(|| format!("expected a share of plain INT8 such as 0.4x, or {example}"))
    }

    /// A latency: `0.4x` or `15ms`.
    ///
    /// # Errors
    /// What was expected, in words.
    pub fn latency(s: &str) -> Result<Amount, String> {
        Amount::parse(s, &[("ms", 1.0)], "milliseconds such as 15ms")
    }

    /// A size: `0.5x` or `12MB`.
    ///
    /// # Errors
    /// What was expected, in words.
    pub fn size(s: &str) -> Result<Amount, String> {
        Amount::parse(s, &[("MB", 1e6), ("kB", 1e3)], "megabytes such as 12MB")
    }

    fn of(self, plain: f64) -> f64 {
        match self {
            Amount::Share(s) => s * plain,
            Amount::Absolute(a) => a,
        }
    }
}

/// What is asked for.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Budget {
    /// At most so long.
    pub latency: Option<Amount>,
    /// At most so large.
    pub size: Option<Amount>,
    /// Points of top-1 that may be lost against the whole float model on the judging pictures.
    pub max_drop: f64,
    /// Where the latency table is kept.
    pub table: Option<PathBuf>,
}

/// Something that was tried.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Point {
    /// What was done.
    pub plan: Plan,
    /// Median milliseconds of one inference.
    pub ms: f64,
    /// Bytes of the file.
    pub bytes: usize,
    /// Against the whole float model, on pictures held out.
    pub effect: Effect,
    /// Whether this is the one.
    pub chosen: bool,
}

/// What a search found.
#[derive(Clone, Debug, Serialize)]
pub struct Found {
    /// Everything that was tried, plain INT8 first.
    pub points: Vec<Point>,
    /// The whole float model's share of right answers on the judging pictures.
    pub float_top1: f64,
    /// One line for the card and the user.
    pub note: String,
    /// What the times are of.
    pub target: String,
}

impl Found {
    /// The plan that was chosen.
    pub fn plan(&self) -> &Plan {
        let chosen = self.points.iter().find(|p| p.chosen);
        &chosen.unwrap_or(&self.points[0]).plan
    }
}

/// Combinations that are made and judged.
const COMBINATIONS: usize = 5;
/// A prediction may be so much above the budget and still be tried.
const TOLERANCE: f64 = 1.04;

/// What is known of a plan's answers; kept between searches.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Judged {
    bytes: usize,
    sqnr: f64,
    agreement: f64,
    top1: f64,
    mean_kl: f64,
    pictures: usize,
}

/// The settings of a plan.
pub fn settings_of(plan: &Plan, settings: &Settings) -> Settings {
    let share = |p: u32| (p > 0).then_some(f64::from(p));
    Settings {
        size: plan.size.or(settings.size),
        merge: plan.schedule(),
        prune: prune::Request { heads: share(plan.heads), neurons: share(plan.neurons), no_repair: false },
        ..settings.clone()
    }
}

/// A search under way.
pub struct Search<'a> {
    source: &'a Path,
    settings: &'a Settings,
    budget: &'a Budget,
    space: Space,
    latency: Latency,
}

impl<'a> Search<'a> {
    /// Looks at the model: what can be tried.
    ///
    /// # Errors
    /// [`Error::Usage`] for settings that leave nothing to search, else those of reading the model.
    pub fn new(source: &'a Path, settings: &'a Settings, budget: &'a Budget) -> Result<Search<'a>> {
        let usage = |what: &str, hint: &str| Err(Error::Usage { what: what.into(), hint: hint.into() });
        if settings.precision != Precision::Int8 {
            return usage("--target-latency and --target-size search among INT8 models", "leave --precision out");
        }
        if settings.merge.is_some() || settings.prune != prune::Request::default() {
            return usage(
                "--target-latency and --target-size choose what is merged and pruned themselves",
                "leave --merge-tokens, --prune-mlp, --prune-heads and --no-repair out",
            );
        }
        let mut graph = Graph::read(source)?;
        passes::prepare(&mut graph, &Prepare { size: settings.size }).map_err(|e| e.in_file(source))?;
        let space = space(source, &graph, settings)?;
        let kernels = vedge_runtime::kernels::detect()?.name;
        let model = sha256(&files::map(source)?);
        let latency = Latency::open(budget.table.as_deref(), &model, kernels, &settings.options)?;
        Ok(Search { source, settings, budget, space, latency })
    }

    /// What would be done, in words: nothing but plain INT8 is measured.
    ///
    /// # Errors
    /// Those of making and running it.
    pub fn dry_run(&mut self) -> Result<String> {
        let plain = self.ms(&Plan::default())?;
        let list = |what: &str, v: Vec<String>| {
            format!("  {what}: {}\n", if v.is_empty() { "-".into() } else { v.join(", ") })
        };
        let s = &self.space;
        let mut out = format!("plain INT8: {plain:.2} ms ({})\n", self.latency.target());
        if let Some(t) = self.budget.latency {
            out += &format!("target: {:.2} ms\n", t.of(plain));
        }
        out += "to be tried one by one, then together:\n";
        out += &list("resolution", s.sizes.iter().map(|(h, w)| format!("{h}x{w}")).collect());
        out += &list("tokens merged in each block", s.merges.iter().map(usize::to_string).collect());
        out += &list("percent of the neurons", s.neurons.iter().map(u32::to_string).collect());
        out += &list("percent of the heads", s.heads.iter().map(u32::to_string).collect());
        let (single, all) = (s.single().len(), s.all().len());
        out += &format!("{single} alone, then up to {COMBINATIONS} of {all} combinations\n");
        Ok(out)
    }

    /// Milliseconds of a plan. Times do not depend on which heads and neurons leave, so that no pictures are needed.
    fn ms(&mut self, plan: &Plan) -> Result<f64> {
        let (source, settings) = (self.source, self.settings);
        self.latency.of(&plan.key(), || stand_in(source, settings, plan))
    }

    /// Runs the search.
    ///
    /// # Errors
    /// Those of making and running candidates; [`Error::Usage`] without pictures.
    pub fn run(self) -> Result<Found> {
        let Some(_) = &self.settings.calibration else {
            return Err(Error::Usage {
                what: "a search needs calibration pictures: they tell what each step costs".into(),
                hint: "add --calib DIR (DIR/<class>/<picture>; --calib-count 500 judges by more of them)".into(),
            });
        };
        let plain = Plan::default();
        let base = float(self.source, self.settings, None)?;
        let items = base.items.clone().unwrap_or_default();
        let judges = held_out(items.len(), self.settings);
        let judges = if judges == 0 { items.len() } else { judges };
        let whole = whole_answers(
            self.source,
            &base.graph,
            &items,
            &base.card.preprocess,
            base.output,
            &self.settings.options,
        )?;
        let mut known = Known::open(self, &items, &base.card)?;
        let s = &mut known;
        let reference = whole[items.len() - judges..].to_vec();
        let classes: Vec<usize> = items[items.len() - judges..].iter().map(|i| i.class).collect();
        let float_top1 = {
            let right = reference.iter().zip(&classes).filter(|(y, c)| crate::evaluate::best(y) == **c).count();
            right as f64 / classes.len().max(1) as f64
        };
        let judge = Judge { whole: &whole, reference, classes, items: &items };
        let singles = s.search.space.single();
        let bar = progress::bar("searching", 1 + singles.len() + COMBINATIONS);
        let mut points = vec![];
        for plan in std::iter::once(plain.clone()).chain(singles) {
            points.extend(s.point(&plan, &judge)?);
            bar.inc(1);
        }
        let first = points.first().filter(|p| p.plan == plain).cloned();
        let Some(first) = first else {
            return Err(Error::Unsupported {
                what: "plain INT8 could not be made".into(),
                hint: "vedge inspect MODEL".into(),
            });
        };
        let limits = Limits {
            ms: s.search.budget.latency.map_or(f64::INFINITY, |t| t.of(first.ms)),
            bytes: s.search.budget.size.map_or(f64::INFINITY, |t| t.of(first.bytes as f64)),
            top1: float_top1 - s.search.budget.max_drop / 100.0,
        };
        let promising = promising(&s.search.space, &points, &first, &limits);
        for plan in promising {
            points.extend(s.point(&plan, &judge)?);
            bar.inc(1);
        }
        bar.finish_and_clear();
        let chosen = choose(&points, &limits);
        points[chosen.unwrap_or(0)].chosen = true;
        let p = &points[chosen.unwrap_or(0)];
        let lost = 100.0 * (float_top1 - p.effect.top1);
        let asked = limits.describe();
        let note = match chosen {
            Some(_) => format!(
                "budget: {asked}: {}, {:.2} ms where plain INT8 takes {:.2}, {lost:.1} points lost on {} pictures, {} candidates tried",
                p.plan.describe(),
                p.ms,
                first.ms,
                p.effect.pictures,
                points.len()
            ),
            None => format!(
                "budget: {asked} is not met with a loss of at most {} points by any of {} candidates: plain INT8, {:.2} ms",
                s.search.budget.max_drop,
                points.len(),
                first.ms
            ),
        };
        Ok(Found { float_top1, note, target: s.search.latency.target().into(), points })
    }
}

/// What a candidate must keep to.
struct Limits {
    ms: f64,
    bytes: f64,
    top1: f64,
}

impl Limits {
    fn hold(&self, p: &Point) -> bool {
        p.ms <= self.ms && p.bytes as f64 <= self.bytes && p.effect.top1 >= self.top1 - 1e-9
    }

    fn describe(&self) -> String {
        let mut parts = vec![];
        parts.extend(self.ms.is_finite().then(|| format!("{:.2} ms", self.ms)));
        parts.extend(self.bytes.is_finite().then(|| format!("{:.1} MB", self.bytes / 1e6)));
        parts.join(" and ")
    }
}

/// The point within the limits that diverges least; the first among equals.
fn choose(points: &[Point], limits: &Limits) -> Option<usize> {
    let within = points.iter().enumerate().filter(|(_, p)| limits.hold(p));
    within.min_by(|a, b| a.1.effect.mean_kl.total_cmp(&b.1.effect.mean_kl)).map(|(i, _)| i)
}

/// Combinations that should meet the limits, those that should diverge least first.
fn promising(space: &Space, points: &[Point], plain: &Point, limits: &Limits) -> Vec<Plan> {
    let known = |p: &Plan| points.iter().find(|q| q.plan == *p);
    let mut open: Vec<(f64, Plan)> = vec![];
    for plan in space.all() {
        let parts: Option<Vec<&Point>> = plan.parts().iter().map(known).collect();
        let Some(parts) = parts.filter(|p| p.len() > 1) else { continue };
        let factor = |of: &dyn Fn(&Point) -> f64| parts.iter().map(|p| of(p) / of(plain)).product::<f64>() * of(plain);
        let fits =
            factor(&|p| p.ms) <= limits.ms * TOLERANCE && factor(&|p| p.bytes as f64) <= limits.bytes * TOLERANCE;
        let kl: f64 = parts.iter().map(|p| (p.effect.mean_kl - plain.effect.mean_kl).max(0.0)).sum();
        if fits {
            open.push((kl, plan));
        }
    }
    open.sort_by(|a, b| a.0.total_cmp(&b.0));
    open.into_iter().take(COMBINATIONS).map(|(_, plan)| plan).collect()
}

/// What judges candidates.
struct Judge<'a> {
    /// The whole model's answers to all pictures.
    whole: &'a [Vec<f32>],
    /// Those to the judging ones, the last.
    reference: Vec<Vec<f32>>,
    classes: Vec<usize>,
    items: &'a [vedge_calibration::Item],
}

/// A search and what it knows from before.
struct Known<'a> {
    search: Search<'a>,
    judged: BTreeMap<String, Judged>,
    path: Option<PathBuf>,
}

impl<'a> Known<'a> {
    /// The file that keeps what was judged of this model with these pictures.
    fn open(search: Search<'a>, items: &[vedge_calibration::Item], card: &Card) -> Result<Known<'a>> {
        let pictures = dataset::fingerprint(items)?;
        let how = format!("{:?} {} {}", card.preprocess, card.provenance.sha256, env!("CARGO_PKG_VERSION"));
        let name = sha256(format!("budget 2 {pictures} {how}").as_bytes());
        let path = search.settings.cache.as_ref().map(|dir| dir.join(format!("{name}.budget")));
        let read = path.as_ref().and_then(|p| std::fs::read(p).ok());
        let judged = read.and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default();
        Ok(Known { search, judged, path })
    }

    /// Measures and judges a plan; nothing where the model cannot be shrunk so.
    fn point(&mut self, plan: &Plan, judge: &Judge<'_>) -> Result<Option<Point>> {
        let ms = match self.search.ms(plan) {
            Err(Error::Unsupported { .. }) if *plan != Plan::default() => return Ok(None),
            other => other?,
        };
        let key = plan.key();
        let j = match self.judged.get(&key) {
            Some(j) => *j,
            None => {
                let j = self.judge(plan, judge)?;
                self.judged.insert(key, j);
                // What cannot be kept is found out again.
                if let Some(path) = &self.path
                    && let Some(dir) = path.parent()
                    && std::fs::create_dir_all(dir).is_ok()
                {
                    let json = serde_json::to_vec(&self.judged).expect("plain data");
                    let _ = files::write_atomic(path, &json);
                }
                j
            }
        };
        let Judged { bytes, sqnr, agreement, top1, mean_kl, pictures } = j;
        let effect = Effect { sqnr, agreement, top1, mean_kl, pictures };
        Ok(Some(Point { plan: plan.clone(), ms, bytes, effect, chosen: false }))
    }

    fn judge(&self, plan: &Plan, judge: &Judge<'_>) -> Result<Judged> {
        let settings = settings_of(plan, self.search.settings);
        let Float { graph, card, output, .. } = float(self.search.source, &settings, Some(judge.whole))?;
        let graph = quick(&graph, &card)?;
        let from = judge.items.len() - judge.reference.len();
        let load = |i: &vedge_calibration::Item| load_picture(&i.path, &card.preprocess);
        let probes = Probes {
            inputs: judge.items[from..].iter().map(load).collect::<Result<_>>()?,
            reference: judge.reference.clone(),
            classes: judge.classes.clone(),
            output,
            probabilities: card.output.kind == "probabilities",
            held_out: from > 0,
        };
        let bar = progress::bar(&plan.describe(), probes.inputs.len());
        let e = probes.judge(&graph, &self.search.settings.options, &bar, f64::NEG_INFINITY)?;
        bar.finish_and_clear();
        let Effect { sqnr, agreement, top1, mean_kl, pictures } = e;
        Ok(Judged { bytes: graph.encode().len(), sqnr, agreement, top1, mean_kl, pictures })
    }
}

/// INT8 without a search: nearest rounding, activations row by row.
fn quick(graph: &Graph, card: &Card) -> Result<Graph> {
    let mut graph = graph.clone();
    let layers = quantize::layers::find(&graph).0;
    quantize::write::write_int8(&mut graph, &layers, &Recipe::default())?;
    Card { activations: Activations::PerToken, ..card.clone() }.embed(&mut graph);
    Ok(graph)
}

/// A model that takes as long as a plan's: the first heads and neurons leave, whichever they are.
fn stand_in(source: &Path, settings: &Settings, plan: &Plan) -> Result<Graph> {
    let mut graph = Graph::read(source)?;
    passes::prepare(&mut graph, &Prepare { size: plan.size.or(settings.size) }).map_err(|e| e.in_file(source))?;
    let architecture = arch::recognise(&graph);
    for (kind, percent) in [(prune::Kind::Heads, plan.heads), (prune::Kind::Neurons, plan.neurons)] {
        prune::first(&mut graph, kind, f64::from(percent) / 100.0)?;
    }
    if plan.heads + plan.neurons > 0 {
        shapes::annotate(&mut graph)?;
        graph.prune_unused();
    }
    if let Some(schedule) = plan.schedule() {
        merge::merge(&mut graph, &schedule, &architecture)?;
    }
    let settings = Settings { size: plan.size.or(settings.size), calibration: None, ..settings.clone() };
    let card = crate::convert::bare_card(source, &graph, &settings)?;
    let graph = quick(&graph, &card)?;
    // What cannot run is found here.
    Session::from_graph(graph.clone(), &settings.options)?;
    Ok(graph)
}

/// Resolutions that are tried at most.
const SIZES: usize = 4;

/// What can be tried on a model.
fn space(source: &Path, graph: &Graph, settings: &Settings) -> Result<Space> {
    let architecture = arch::recognise(graph);
    let (h, w) = crate::convert::picture_size(graph)?;
    let mut space = Space::default();
    if settings.size.is_none() {
        let step = match graph.nodes.iter().find(|n| n.op_type() == "Conv").and_then(|n| n.ints("strides")) {
            Some(&[s, _]) if matches!(architecture.family, Family::Vit | Family::Deit) => s.max(1) as usize,
            _ => 32,
        };
        // Down to half of each side.
        let mut sizes: Vec<(usize, usize)> = vec![];
        for k in 1..h.min(w) / step {
            let size = (h - k * step, w.saturating_sub(k * step));
            if 2 * size.0 < h || 2 * size.1 < w {
                break;
            }
            let fits = || {
                let mut graph = Graph::read(source).ok()?;
                passes::prepare(&mut graph, &Prepare { size: Some(size) }).ok()
            };
            if sizes.len() < SIZES && fits().is_some() {
                sizes.push(size);
            }
        }
        space.sizes = sizes;
    }
    if matches!(architecture.family, Family::Vit | Family::Deit) {
        let (tokens, blocks) = (architecture.tokens.iter().copied().max().unwrap_or(0), architecture.blocks.max(1));
        // From a fifth to three fifths of the tokens gone at the end.
        space.merges = [5, 3, 2].map(|part| (tokens / part / blocks).max(1)).to_vec();
        space.merges.dedup();
    }
    for (kind, shares) in [(prune::Kind::Neurons, &mut space.neurons), (prune::Kind::Heads, &mut space.heads)] {
        if !prune::unit::find(graph, kind).0.is_empty() {
            *shares = vec![10, 20];
        }
    }
    Ok(space)
}

#[cfg(test)]
mod tests;

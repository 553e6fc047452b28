//! One budget, one search: resolution, tokens, neurons, heads and precision of a model that is to be so fast or so small.
//!
//! Each thing is tried alone first: how long it then takes (or how large it is), and how far its answers on pictures held
//! out diverge from the whole model's. Factors of time multiply and divergences add up well enough to say which
//! combinations are worth a try; those are then made and judged themselves. What is chosen is the one that diverges least
//! within the budget; where none keeps to `max_drop`, it is plain INT8. The file that is made of the choice is judged once
//! more: where it does not keep to `max_drop`, plain INT8 is made instead.

mod candidate;
mod judged;
mod latency;
mod plan;
pub mod plot;

pub use latency::{Latency, Table};
pub use plan::{Plan, Space};

use crate::convert::{Converted, Precision, Settings, answers, convert, float, held_out, sha256, whole_answers};
use crate::quantize::{Effect, Target};
use crate::{passes, progress, prune};
use judged::{Judge, Known, top1};
use latency::Subject;
use serde::Serialize;
use std::path::{Path, PathBuf};
use vedge_runtime::onnx::Graph;
use vedge_runtime::{Error, Result, files};

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
    /// Where the latency table is kept; `None` for the folder that keeps statistics.
    pub table: Option<PathBuf>,
}

/// Something that was tried.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Point {
    /// What was done.
    pub plan: Plan,
    /// Median milliseconds of one inference.
    pub ms: f64,
    /// Whether that was measured; else it follows from what its parts take.
    pub measured: bool,
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
    /// What could not be tried, because the latency table of another machine does not have it.
    pub not_tried: Vec<String>,
    /// Milliseconds of single heads and neurons, where those of layers differ.
    pub prices: prune::Prices,
    /// The least share of right answers that was asked for.
    least_top1: f64,
    /// How many calibration pictures judged, the last ones.
    judges: usize,
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

/// The settings of a plan.
pub fn settings_of(plan: &Plan, prices: &prune::Prices, settings: &Settings) -> Settings {
    let share = |p: u32| (p > 0).then_some(f64::from(p));
    Settings {
        size: plan.size.or(settings.size),
        merge: plan.schedule(),
        prune: prune::Request { heads: share(plan.heads), neurons: share(plan.neurons), no_repair: false },
        prices: prices.clone(),
        precision: plan.precision,
        ..settings.clone()
    }
}

/// Makes the model that a search chose. The search judged it as INT8 without refinement; the file is judged again, by the
/// same pictures, and where it loses more than was asked for it becomes plain INT8, which `found` then says.
///
/// # Errors
/// As [`convert`].
pub fn take(source: &Path, settings: &Settings, found: &mut Found) -> Result<Converted> {
    let make = |plan: &Plan| {
        let mut settings = settings_of(plan, &found.prices, settings);
        // The drop is the search's to keep to; layers in float would cost the time that it saved.
        settings.target.max_drop = None;
        if plan.precision != Precision::Int8 {
            (settings.target, settings.calibrator) = (Target::default(), None);
        }
        convert(source, &settings)
    };
    let done = make(found.plan())?;
    if *found.plan() == Plan::default() {
        return Ok(done);
    }
    let items = &done.items[done.items.len() - found.judges..];
    let preprocess = &done.card.preprocess;
    let said = answers("judging the file", done.graph.clone(), items, preprocess, done.output, &settings.options)?;
    let right = top1(&said, items);
    if right >= found.least_top1 - 1e-9 {
        return Ok(done);
    }
    found.note = format!(
        "budget: {} loses {:.1} points as a file, more than asked for: plain INT8",
        found.plan().describe(),
        100.0 * (found.float_top1 - right)
    );
    found.points.iter_mut().for_each(|p| p.chosen = p.plan == Plan::default());
    make(&Plan::default())
}

/// A search under way.
pub struct Search<'a> {
    source: &'a Path,
    settings: &'a Settings,
    budget: &'a Budget,
    space: Space,
    latency: Latency,
    /// Milliseconds of single heads and neurons, where those of layers differ.
    prices: prune::Prices,
    /// The model as prepared.
    graph: Graph,
    not_tried: Vec<Plan>,
}

impl<'a> Search<'a> {
    /// Looks at the model: what can be tried.
    ///
    /// # Errors
    /// [`Error::Usage`] for settings that leave nothing to search and for a latency table that lacks plain INT8, else those
    /// of reading the model.
    pub fn new(source: &'a Path, settings: &'a Settings, budget: &'a Budget) -> Result<Search<'a>> {
        let usage = |what: &str, hint: &str| Err(Error::Usage { what: what.into(), hint: hint.into() });
        if !settings.precision.tries_int8() {
            return usage(
                "--target-latency and --target-size choose the precision themselves",
                "leave --precision out",
            );
        }
        if settings.merge.is_some() || settings.prune != prune::Request::default() {
            return usage(
                "--target-latency and --target-size choose what is merged and pruned themselves",
                "leave --merge-tokens, --prune-mlp, --prune-heads and --no-repair out",
            );
        }
        let mut graph = Graph::read(source)?;
        passes::prepare(&mut graph, &settings.prepare()).map_err(|e| e.in_file(source))?;
        let mut space = candidate::space(source, &graph, settings)?;
        let kernels = vedge_runtime::kernels::detect()?.name;
        let digest = sha256(&files::map(source)?);
        let subject = Subject { sha256: &digest, name: &stem(source) };
        // Without a file of its own, times are kept beside the statistics, for this machine and these settings.
        let own = format!("{kernels} {} {:?} {:?}", settings.options.threads, settings.size, settings.patch);
        let own = sha256(format!("latency {digest} {own} {}", env!("CARGO_PKG_VERSION")).as_bytes());
        let kept = settings.cache.as_ref().map(|dir| dir.join(format!("{own}.latency")));
        let path = budget.table.clone().or(kept);
        let mut latency = Latency::open(path.as_deref(), &subject, kernels, &settings.options)?;
        let mut not_tried = vec![];
        if latency.foreign() {
            let mut has = |plan: &Plan| latency.of(&plan.key(), || Ok(graph.clone())).is_ok_and(|ms| ms.is_some());
            if !has(&Plan::default()) {
                return Err(Error::Usage {
                    what: format!("the latency table of {} does not have plain INT8 (`int8`)", latency.target()),
                    hint:
                        "--dry-run --plans DIR writes the models to measure there: vedge bench --on HOST DIR/* --json"
                            .into(),
                });
            }
            let known: Vec<Plan> = space.single().into_iter().filter(|p| has(p)).collect();
            not_tried = space.keep(|p| known.contains(p));
        }
        Ok(Search { source, settings, budget, space, latency, prices: prune::Prices::new(), graph, not_tried })
    }

    /// What would be done, in words: nothing but plain INT8 is measured.
    ///
    /// # Errors
    /// Those of making and running it.
    pub fn dry_run(&mut self) -> Result<String> {
        let plain = self.plain()?;
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
        out += &list("precision besides int8", s.precisions.iter().map(|p| p.name().into()).collect());
        if !self.not_tried.is_empty() {
            out += &list("not in the latency table, so not tried", self.not_tried.iter().map(Plan::key).collect());
        }
        let (single, all) = (s.single().len(), s.all().len());
        out += &format!("{single} alone, then up to {COMBINATIONS} of {all} combinations\n");
        Ok(out)
    }

    /// Writes a model for every plan that changes one thing, `FOLDER/MODEL.PLAN.onnx`: they take as long as the candidates,
    /// so that a board can measure them (`vedge bench --on HOST FOLDER/* --json` is then the latency table). Returns their
    /// number.
    ///
    /// # Errors
    /// Those of making and writing them.
    pub fn write_plans(&self, folder: &Path) -> Result<usize> {
        let plans = std::iter::once(Plan::default()).chain(self.space.single());
        let made = plans.map(|p| (p.key(), candidate::stand_in(self.source, self.settings, &p)));
        let classes = candidate::classes(&self.graph).into_iter();
        let halves = classes.map(|(key, units)| (key, candidate::without_half(self.source, self.settings, &units)));
        std::fs::create_dir_all(folder).map_err(|source| Error::Write { path: folder.into(), source })?;
        let mut count = 0;
        for (key, graph) in made.chain(halves) {
            match graph {
                Ok(graph) => graph.write(&folder.join(format!("{}.{key}.onnx", stem(self.source))))?,
                Err(Error::Unsupported { .. }) => continue,
                Err(e) => return Err(e),
            }
            count += 1;
        }
        Ok(count)
    }

    /// Milliseconds of plain INT8.
    fn plain(&mut self) -> Result<f64> {
        Ok(self.ms(&Plan::default())?.expect("it is in every table").0)
    }

    /// Milliseconds of a plan, and whether they were measured. Times do not depend on which heads and neurons leave, so that
    /// no pictures are needed. A table of another machine predicts combinations that it does not have from their parts;
    /// `None` where it cannot.
    fn ms(&mut self, plan: &Plan) -> Result<Option<(f64, bool)>> {
        let (source, settings) = (self.source, self.settings);
        if let Some(ms) = self.latency.of(&plan.key(), || candidate::stand_in(source, settings, plan))? {
            return Ok(Some((ms, true)));
        }
        let parts = plan.parts();
        if parts.len() < 2 {
            return Ok(None);
        }
        let plain = self.plain()?;
        let mut product = plain;
        for part in parts {
            let Some((ms, _)) = self.ms(&part)? else { return Ok(None) };
            product *= ms / plain;
        }
        Ok(Some((product, false)))
    }

    /// What single heads and neurons take, where layers differ: measured without half of them. None where the table of
    /// another machine does not have that.
    fn price(&mut self) -> Result<()> {
        let plain = self.plain()?;
        let classes = candidate::classes(&self.graph);
        let macs: f64 = classes.values().flatten().map(|u| u.price * u.groups as f64).sum();
        let mut prices = prune::Prices::new();
        for (key, units) in classes {
            let (source, settings) = (self.source, self.settings);
            let Some(ms) = self.latency.of(&key, || candidate::without_half(source, settings, &units))? else {
                return Ok(());
            };
            let gone: usize = units.iter().map(|u| u.part(0.5)).sum();
            // A difference lost in noise is no reason to remove nothing, or all.
            let least = 0.1 * plain * units[0].price / macs;
            let each = ((plain - ms) / gone as f64).max(least);
            prices.extend(units.into_iter().map(|u| (u.name, each)));
        }
        self.prices = prices;
        Ok(())
    }

    /// Runs the search.
    ///
    /// # Errors
    /// Those of making and running candidates; [`Error::Usage`] without pictures.
    pub fn run(mut self) -> Result<Found> {
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
        self.price()?;
        let mut known = Known::open(self, &items, &base.card)?;
        let s = &mut known;
        let judge = Judge { whole: &whole, items: &items, count: judges };
        let float_top1 = judge.float_top1();
        let ms = s.search.plain()?;
        let first = s.point(&plain, (ms, true), &judge)?;
        let limits = Limits {
            ms: s.search.budget.latency.map_or(f64::INFINITY, |t| t.of(first.ms)),
            bytes: s.search.budget.size.map_or(f64::INFINITY, |t| t.of(first.bytes as f64)),
            top1: float_top1 - s.search.budget.max_drop / 100.0,
        };
        let singles = s.search.space.single();
        let bar = progress::bar("searching", singles.len() + COMBINATIONS);
        let mut points = vec![first.clone()];
        for plan in singles {
            points.extend(s.tried(&plan, &points, &judge)?);
            bar.inc(1);
        }
        for plan in promising(&s.search.space, &points, &first, &limits) {
            points.extend(s.tried(&plan, &points, &judge)?);
            bar.inc(1);
        }
        bar.finish_and_clear();
        let chosen = choose(&points, &limits);
        points[chosen.unwrap_or(0)].chosen = true;
        let p = &points[chosen.unwrap_or(0)];
        let lost = 100.0 * (float_top1 - p.effect.top1);
        let asked = limits.describe();
        let mut note = match chosen {
            Some(_) => format!(
                "budget: {asked}: {}, {:.2} ms{} where plain INT8 takes {:.2}, {lost:.1} points lost on {} pictures, {} candidates tried",
                p.plan.describe(),
                p.ms,
                if p.measured { "" } else { " (predicted)" },
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
        let not_tried: Vec<String> = s.search.not_tried.iter().map(Plan::key).collect();
        if s.search.latency.foreign() {
            note += &format!("; times of {}", s.search.latency.target());
        }
        if !not_tried.is_empty() {
            note += &format!(", which has none of {}", not_tried.join(", "));
        }
        let (target, prices) = (s.search.latency.target().to_string(), s.search.prices.clone());
        Ok(Found { float_top1, note, target, not_tried, prices, least_top1: limits.top1, judges, points })
    }
}

fn stem(path: &Path) -> String {
    path.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

impl Known<'_> {
    /// Measures and judges a plan. Nothing where the model cannot be shrunk so, and where another size of the picture is not
    /// faster than a larger one that was tried (windows that are padded).
    fn tried(&mut self, plan: &Plan, before: &[Point], judge: &Judge<'_>) -> Result<Option<Point>> {
        let time = match self.search.ms(plan) {
            Ok(Some(time)) => time,
            Ok(None) | Err(Error::Unsupported { .. }) => return Ok(None),
            Err(e) => return Err(e),
        };
        let resized = |p: &Plan| p.size.is_some() && p.parts().len() == 1;
        let slower = |p: &Point| p.ms <= time.0 && (resized(&p.plan) || p.plan == Plan::default());
        if resized(plan) && before.iter().any(slower) {
            return Ok(None);
        }
        self.point(plan, time, judge).map(Some)
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

#[cfg(test)]
mod tests;

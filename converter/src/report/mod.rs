//! The report of a conversion: what the model loses and where, what was tried, size and speed, the pictures that changed.
//! [`Report`] is plain data, which [`page::html`] makes one self-contained page of.

mod html;
mod layers;
mod numbers;
pub mod page;

pub use layers::{LayerReport, Outlier};
pub use numbers::Share;

use crate::budget::Point;
use crate::convert::load_picture;
use crate::evaluate::{best, distribution, divergence};
use crate::progress;
use crate::quantize::{Candidate, Effect, Layer, Skipped, Sqnr};
use numbers::quantile;
use serde::Serialize;
use std::time::Instant;
use vedge_calibration::Item;
use vedge_runtime::model::card::Activations;
use vedge_runtime::onnx::Graph;
use vedge_runtime::preprocess::{Picture, decode_file, encode};
use vedge_runtime::{Card, Options, Result, Session};

/// Layers are measured on so many pictures at most.
const LAYER_PICTURES: usize = 16;
/// Pictures shown.
const SHOWN: usize = 10;
/// Longest side of a picture shown, pixels, and its JPEG quality.
const THUMBNAIL: (usize, u8) = (96, 80);
/// Timed runs of each model.
pub const RUNS: usize = 15;
/// Bars of the score shifts.
const SHIFT_BARS: usize = 41;

/// Everything in the report.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// The converted model's card.
    pub card: Card,
    /// What the pictures are, in words.
    pub measured_on: String,
    /// Accuracy and likeness; absent where there were no pictures with the model's classes.
    pub accuracy: Option<Accuracy>,
    /// Size and speed of the float model and of the converted one.
    pub cost: [Cost; 2],
    /// Quantized layers in graph order.
    pub layers: Vec<LayerReport>,
    /// Pictures on which layers were measured.
    pub layer_pictures: usize,
    /// Layers left in float, and why.
    pub float_layers: Vec<(String, String)>,
    /// What was tried, the chosen one first.
    pub candidates: Vec<Candidate>,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// Pictures whose answer moved most.
    pub moved: Vec<Moved>,
    /// Commands that make this again.
    pub commands: Vec<String>,
    /// What a search for a budget tried; empty without one.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<Point>,
}

/// Accuracy before and after.
#[derive(Clone, Debug, Serialize)]
pub struct Accuracy {
    /// Right first answers of the float model.
    pub float: Share,
    /// Right first answers of the converted one.
    pub model: Share,
    /// Pictures with the same first answer.
    pub agreement: Share,
    /// Signal-to-noise ratio of the logits, dB.
    pub sqnr_db: f64,
    /// Mean Kullback-Leibler divergence from the float model's answers, nats.
    pub mean_kl: f64,
    /// How the score of the float model's answer moved.
    pub shift: Shift,
}

/// Probability of the float model's first answer, after minus before, in points (hundredths).
#[derive(Clone, Debug, Serialize)]
pub struct Shift {
    /// Mean: other than zero, thresholds want another value.
    pub mean: f64,
    /// Half of the pictures move less than this, either way.
    pub median_abs: f64,
    /// 95 % of the pictures move less than this, either way.
    pub p95_abs: f64,
    /// Largest move, either way.
    pub max_abs: f64,
    /// Shares of pictures in equal parts of `−max_abs…max_abs`.
    pub shares: Vec<f64>,
}

/// What a model takes.
#[derive(Clone, Debug, Serialize)]
pub struct Cost {
    /// `float` or the precision.
    pub model: String,
    /// Size of the file, bytes.
    pub bytes: u64,
    /// Median time of an inference with one thread on this machine, ms.
    pub median_ms: f64,
    /// Fastest, ms.
    pub min_ms: f64,
}

/// A picture whose answer moved.
#[derive(Clone, Debug, Serialize)]
pub struct Moved {
    /// Its file, below the pictures' folder.
    pub file: String,
    /// The right label.
    pub label: String,
    /// The float model's answer and its probability.
    pub before: (String, f64),
    /// The converted model's.
    pub after: (String, f64),
    /// Kullback-Leibler divergence, nats.
    pub kl: f64,
    /// A small JPEG.
    #[serde(skip)]
    pub jpeg: Vec<u8>,
}

/// What a report is made of.
pub struct Subject<'a> {
    /// The float model as prepared, before anything left it.
    pub source: &'a Graph,
    /// The float model that was quantized: the same but for pruning and channels evened out.
    pub ground: &'a Graph,
    /// The converted model, its card inside.
    pub model: &'a Graph,
    /// Its card.
    pub card: &'a Card,
    /// Its integer layers, by their nodes in `ground`.
    pub layers: &'a [Layer],
    /// Effect of each layer alone.
    pub alone: &'a [(String, Effect)],
    /// Layers in float.
    pub skipped: &'a [Skipped],
    /// What was tried.
    pub candidates: &'a [Candidate],
    /// What the user should know.
    pub warnings: &'a [String],
    /// Size of the source file and of the converted one, bytes.
    pub bytes: [u64; 2],
    /// Index of the output that is read.
    pub output: usize,
}

/// Measures everything on `items`, labelled pictures which `measured_on` describes.
///
/// # Errors
/// Those of decoding pictures and running the models.
pub fn gather(
    s: &Subject<'_>,
    items: &[Item],
    measured_on: &str,
    commands: Vec<String>,
    options: &Options,
) -> Result<Report> {
    let how = &s.card.preprocess;
    let spread = |count: usize| (0..count).map(move |i| i * items.len() / count);
    let few = spread(items.len().min(LAYER_PICTURES)).map(|i| load_picture(&items[i].path, how));
    let few = few.collect::<Result<Vec<_>>>()?;
    let per_token = s.card.activations == Activations::PerToken;
    let mut layers = layers::measure(s.ground, s.model, s.layers, per_token, &few, options)?;
    for l in &mut layers {
        if let Some((_, e)) = s.alone.iter().find(|(name, _)| *name == l.name) {
            (l.alone_sqnr, l.alone_kl) = (Some(e.sqnr), Some(e.mean_kl));
        }
    }
    let (accuracy, moved) = match s.card.output.kind.as_str() {
        "features" => (None, vec![]),
        _ => accuracy(s, items, options)?,
    };
    let cost = speed(s, &few)?;
    Ok(Report {
        card: s.card.clone(),
        measured_on: measured_on.into(),
        accuracy,
        cost,
        layers,
        layer_pictures: few.len(),
        float_layers: s.skipped.iter().map(|l| (l.name.clone(), l.reason.clone())).collect(),
        candidates: s.candidates.to_vec(),
        warnings: s.warnings.to_vec(),
        moved,
        commands,
        search: vec![],
    })
}

/// How the answer to a picture changed.
struct Change {
    /// To another class.
    other: bool,
    kl: f64,
    picture: usize,
    /// Class and probability before and after.
    answers: [(usize, f64); 2],
}

fn accuracy(s: &Subject<'_>, items: &[Item], options: &Options) -> Result<(Option<Accuracy>, Vec<Moved>)> {
    let probabilities = s.card.output.kind == "probabilities";
    let mut sessions = [s.source, s.model].map(|g| Session::from_graph(g.clone(), options));
    let (mut right, mut agree, mut ratio, mut kls, mut shifts) = ([0, 0], 0, Sqnr::default(), 0.0, vec![]);
    let mut moved: Vec<Change> = vec![];
    let bar = progress::bar("measuring for the report", items.len());
    for (i, item) in items.iter().enumerate() {
        let x = load_picture(&item.path, &s.card.preprocess)?;
        let mut answers = vec![];
        for session in &mut sessions {
            let session = session.as_mut().map_err(|e| vedge_runtime::Error::Engine(e.to_string()))?;
            answers.push(session.run(std::slice::from_ref(&x))?[s.output].iter().copied().collect::<Vec<f32>>());
        }
        let [before, after] = [&answers[0], &answers[1]];
        let (p, q) = (distribution(before, probabilities), distribution(after, probabilities));
        let (a, b) = (best(before), best(after));
        right[0] += usize::from(a == item.class);
        right[1] += usize::from(b == item.class);
        agree += usize::from(a == b);
        ratio.add(before.iter().copied(), after.iter().copied());
        let kl = divergence(before, after, probabilities);
        kls += kl;
        shifts.push(100.0 * (q[a] - p[a]));
        moved.push(Change { other: a != b, kl, picture: i, answers: [(a, p[a]), (b, q[b])] });
        bar.inc(1);
    }
    bar.finish_and_clear();
    moved.sort_by(|x, y| y.other.cmp(&x.other).then(y.kl.total_cmp(&x.kl)).then(x.picture.cmp(&y.picture)));
    moved.truncate(SHOWN);
    let named = |(class, p): (usize, f64)| (s.card.label(class), p);
    let shown = moved.into_iter().map(|Change { kl, picture, answers: [a, b], .. }| {
        let item = &items[picture];
        let folder = item.path.parent().and_then(|p| p.file_name()).unwrap_or_default();
        let file =
            format!("{}/{}", folder.to_string_lossy(), item.path.file_name().unwrap_or_default().to_string_lossy());
        let jpeg = thumbnail(&decode_file(&item.path).map_err(|e| e.in_file(&item.path))?)?;
        Ok(Moved { file, label: s.card.label(item.class), before: named(a), after: named(b), kl, jpeg })
    });
    let shown = shown.collect::<Result<Vec<Moved>>>()?;
    let n = items.len();
    let accuracy = Accuracy {
        float: Share::of(right[0], n),
        model: Share::of(right[1], n),
        agreement: Share::of(agree, n),
        sqnr_db: ratio.db(),
        mean_kl: kls / n.max(1) as f64,
        shift: shift(&shifts),
    };
    Ok((Some(accuracy), shown))
}

fn shift(points: &[f64]) -> Shift {
    let mut sizes: Vec<f64> = points.iter().map(|v| v.abs()).collect();
    sizes.sort_by(f64::total_cmp);
    let max_abs = sizes.last().copied().unwrap_or(0.0);
    let mut shares = vec![0.0; SHIFT_BARS];
    for v in points {
        let at = (v / max_abs.max(1e-12) + 1.0) / 2.0 * SHIFT_BARS as f64;
        shares[(at as usize).min(SHIFT_BARS - 1)] += 1.0 / points.len() as f64;
    }
    Shift {
        mean: points.iter().sum::<f64>() / points.len().max(1) as f64,
        median_abs: quantile(&sizes, 0.5),
        p95_abs: quantile(&sizes, 0.95),
        max_abs,
        shares,
    }
}

/// Times both models of a conversion on some pictures, in turns, with one thread.
///
/// # Errors
/// Those of decoding pictures and running the models.
pub fn time(s: &Subject<'_>, items: &[Item]) -> Result<[Cost; 2]> {
    let pictures = items.iter().map(|i| load_picture(&i.path, &s.card.preprocess));
    speed(s, &pictures.collect::<Result<Vec<_>>>()?)
}

fn speed(s: &Subject<'_>, pictures: &[ndarray::ArrayD<f32>]) -> Result<[Cost; 2]> {
    let mut sessions = vec![];
    for g in [s.source, s.model] {
        sessions.push((Session::from_graph(g.clone(), &Options::default())?, vec![]));
    }
    for x in pictures.iter().cycle().take(if pictures.is_empty() { 0 } else { RUNS + 1 }) {
        for (session, ms) in &mut sessions {
            let start = Instant::now();
            session.run(std::slice::from_ref(x))?;
            ms.push(start.elapsed().as_secs_f64() * 1e3);
        }
    }
    let names = ["float".to_string(), s.card.precision.clone()];
    let mut cost = sessions.into_iter().zip(names).zip(s.bytes).map(|(((_, mut ms), model), bytes)| {
        // The first run warms up.
        ms = ms.split_off(1.min(ms.len()));
        ms.sort_by(f64::total_cmp);
        Cost { model, bytes, median_ms: quantile(&ms, 0.5), min_ms: quantile(&ms, 0.0) }
    });
    let mut next = || cost.next().expect("two models");
    Ok([next(), next()])
}

/// A small JPEG: each of its pixels is the mean of those that it stands for.
fn thumbnail(p: &Picture) -> Result<Vec<u8>> {
    let (side, quality) = THUMBNAIL;
    let longest = p.width.max(p.height).max(1);
    let small = |n: usize| if longest <= side { n } else { (n * side / longest).max(1) };
    let (width, height) = (small(p.width), small(p.height));
    let mut rgb = Vec::with_capacity(width * height * 3);
    for y in 0..height {
        let rows = y * p.height / height..((y + 1) * p.height / height).max(y * p.height / height + 1);
        for x in 0..width {
            let columns = x * p.width / width..((x + 1) * p.width / width).max(x * p.width / width + 1);
            let count = rows.len() * columns.len();
            for c in 0..3 {
                let of = |row: usize| {
                    columns.clone().map(move |column| usize::from(p.rgb[(row * p.width + column) * 3 + c]))
                };
                let sum: usize = rows.clone().flat_map(of).sum();
                rgb.push((sum / count) as u8);
            }
        }
    }
    encode(&Picture { width, height, rgb }, quality)
}

#[cfg(test)]
mod tests;

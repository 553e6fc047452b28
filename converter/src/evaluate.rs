//! Compares models on labelled pictures.

use crate::convert::{load_picture, picture_size};
use crate::passes::{self, Prepare};
use crate::quantize::Sqnr;
use crate::{certainty, preset, progress};
use serde::Serialize;
use std::path::PathBuf;
use std::time::Instant;
use vedge_calibration::Item;
use vedge_runtime::classify::probabilities;
use vedge_runtime::model::card::Preprocess;
use vedge_runtime::onnx::Graph;
use vedge_runtime::{Card, Error, Options, Result, Session};

/// A model under evaluation.
pub struct Subject {
    /// Its file, or a name.
    pub path: PathBuf,
    /// The loaded model.
    pub session: Session,
    /// How it sees pictures.
    pub preprocess: Preprocess,
    /// Index of the output with the class scores.
    pub output: usize,
    /// Whether that output holds probabilities already.
    pub probabilities: bool,
    /// Temperature of its probabilities on a board.
    pub temperature: f32,
}

/// How one model did.
#[derive(Clone, Debug, Serialize)]
pub struct Score {
    /// The model.
    pub model: String,
    /// Size of its file in bytes.
    pub bytes: u64,
    /// Pictures evaluated.
    pub pictures: usize,
    /// Share of pictures whose best class is the right one.
    pub top1: f64,
    /// Share of pictures whose right class is among the best five; absent with five classes or fewer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top5: Option<f64>,
    /// Share of pictures with the same best class as the baseline; absent for the baseline.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agreement: Option<f64>,
    /// Mean Kullback-Leibler divergence from the baseline's probabilities, nats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean_kl: Option<f64>,
    /// Signal-to-noise ratio of the logits against the baseline's, dB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sqnr: Option<f64>,
    /// Expected calibration error, 0…1: how far the probabilities that a board shows and the share of right answers are apart.
    pub calibration_error: f64,
    /// Median time of one inference, ms, preprocessing excluded.
    pub median_ms: f64,
    /// For each class.
    pub classes: Vec<ClassScore>,
}

/// How one model did on one class.
#[derive(Clone, Debug, Serialize)]
pub struct ClassScore {
    /// Label.
    pub label: String,
    /// Pictures of that class.
    pub pictures: usize,
    /// Share of them that was recognised.
    pub top1: f64,
}

#[derive(Default)]
struct Tally {
    right: Vec<usize>,
    top5: usize,
    agree: usize,
    kl: f64,
    sqnr: Sqnr,
    /// Probability of the best class, and whether it is right.
    confidences: Vec<(f64, bool)>,
    ms: Vec<f64>,
}

/// Runs all models on all pictures; the first is the baseline of the others. Memory holds one picture at a time.
///
/// # Errors
/// Those of decoding and running; [`Error::Shape`] when models have different numbers of classes, or fewer than the
/// pictures have.
pub fn evaluate(subjects: &mut [Subject], items: &[Item], labels: &[String]) -> Result<Vec<Score>> {
    let mut tallies: Vec<Tally> =
        subjects.iter().map(|_| Tally { right: vec![0; labels.len()], ..Tally::default() }).collect();
    let mut totals = vec![0; labels.len()];
    let mut classes = 0;
    let bar = progress::bar("evaluating", items.len());
    for item in items {
        totals[item.class] += 1;
        let mut base: Option<Vec<f32>> = None;
        let mut loaded: Option<(Preprocess, ndarray::ArrayD<f32>)> = None;
        for (s, t) in subjects.iter_mut().zip(&mut tallies) {
            let x = match &loaded {
                Some((how, x)) if *how == s.preprocess => x.clone(),
                _ => load_picture(&item.path, &s.preprocess)?,
            };
            loaded = Some((s.preprocess.clone(), x.clone()));
            let start = Instant::now();
            let y = s.session.run(&[x])?;
            t.ms.push(start.elapsed().as_secs_f64() * 1e3);
            let y: Vec<f32> = y[s.output].iter().copied().collect();
            check_width(s, y.len(), item.class, base.as_deref())?;
            classes = y.len();
            let rank = rank_of(&y, item.class);
            t.right[item.class] += usize::from(rank == 0);
            t.top5 += usize::from(rank < 5);
            let p = probabilities(y.clone(), s.probabilities, s.temperature);
            t.confidences.push((f64::from(p[best(&p)]), rank == 0));
            match &base {
                None => base = Some(y),
                Some(base) => {
                    t.agree += usize::from(best(base) == best(&y));
                    t.sqnr.add(base.iter().copied(), y.iter().copied());
                    t.kl += divergence(base, &y, s.probabilities);
                }
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    let n = items.len() as f64;
    let score = |(i, (s, mut t)): (usize, (&mut Subject, Tally))| Score {
        model: s.path.display().to_string(),
        bytes: std::fs::metadata(&s.path).map_or(0, |m| m.len()),
        pictures: items.len(),
        top1: t.right.iter().sum::<usize>() as f64 / n,
        top5: (classes > 5).then_some(t.top5 as f64 / n),
        agreement: (i > 0).then_some(t.agree as f64 / n),
        mean_kl: (i > 0).then_some(t.kl / n),
        sqnr: (i > 0).then_some(t.sqnr.db()),
        calibration_error: certainty::error(t.confidences.iter().copied()),
        median_ms: median(&mut t.ms),
        classes: labels
            .iter()
            .zip(&totals)
            .zip(&t.right)
            .filter(|((_, total), _)| **total > 0)
            .map(|((label, total), right)| ClassScore {
                label: label.clone(),
                pictures: *total,
                top1: *right as f64 / *total as f64,
            })
            .collect(),
    };
    Ok(subjects.iter_mut().zip(tallies).enumerate().map(score).collect())
}

fn check_width(s: &Subject, width: usize, class: usize, base: Option<&[f32]>) -> Result<()> {
    if class >= width {
        return Err(Error::Shape(format!(
            "{} has {width} classes, the pictures have a class {} (counted from 0)",
            s.path.display(),
            class
        )));
    }
    match base {
        Some(b) if b.len() != width => Err(Error::Shape(format!(
            "{} has {width} classes, the first model has {}: they cannot be compared",
            s.path.display(),
            b.len()
        ))),
        _ => Ok(()),
    }
}

/// Index of the largest value; the first among equals.
pub fn best(y: &[f32]) -> usize {
    let mut at = 0;
    for (i, v) in y.iter().enumerate() {
        if *v > y[at] {
            at = i;
        }
    }
    at
}

/// How many classes stand before this one.
fn rank_of(y: &[f32], class: usize) -> usize {
    y.iter().enumerate().filter(|(i, v)| **v > y[class] || (**v == y[class] && *i < class)).count()
}

/// Kullback-Leibler divergence of answers from the reference's, nats.
pub fn divergence(reference: &[f32], y: &[f32], probabilities: bool) -> f64 {
    let (p, q) = (distribution(reference, probabilities), distribution(y, probabilities));
    p.iter().zip(&q).map(|(p, q)| p * (p.max(1e-12) / q.max(1e-12)).ln()).sum()
}

/// Probabilities of the classes.
pub fn distribution(y: &[f32], probabilities: bool) -> Vec<f64> {
    if probabilities {
        return y.iter().map(|v| f64::from(*v)).collect();
    }
    let top = f64::from(y[best(y)]);
    let e: Vec<f64> = y.iter().map(|v| (f64::from(*v) - top).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.into_iter().map(|v| v / sum).collect()
}

fn median(ms: &mut [f64]) -> f64 {
    ms.sort_by(f64::total_cmp);
    ms.get(ms.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Opens models for evaluation. A model without a card (a float source) is prepared as `vedge convert` prepares it and
/// sees pictures as `preprocess` says, else as the first model with a card does. Labels are those of the first card
/// that has some.
///
/// # Errors
/// Those of loading; [`Error::Usage`] when the preprocessing is not known.
pub fn open(
    paths: &[PathBuf],
    preprocess: Option<&str>,
    options: &Options,
) -> Result<(Vec<Subject>, Option<Vec<String>>)> {
    let mut models = vec![];
    for path in paths {
        let mut graph = Graph::read(path)?;
        let card = Card::of(&graph).map_err(|e| e.in_file(path))?;
        if card.is_none() {
            passes::prepare(&mut graph, &Prepare::default()).map_err(|e| e.in_file(path))?;
        }
        models.push((path, graph, card));
    }
    let lender = models.iter().find_map(|(_, _, c)| c.as_ref().map(|c| c.preprocess.clone()));
    let labels = models.iter().filter_map(|(_, _, c)| c.as_ref()).map(|c| c.labels.clone()).find(|l| !l.is_empty());
    let mut subjects = vec![];
    for (path, graph, card) in models {
        let in_file = |e: Error| e.in_file(path);
        let (height, width) = picture_size(&graph).map_err(in_file)?;
        let how = match (card.as_ref(), preprocess, &lender) {
            (Some(card), _, _) => card.preprocess.clone(),
            (None, Some(name), _) => preset::resolve(name, (height, width))?,
            (None, None, Some(other)) => Preprocess { height, width, ..other.clone() },
            (None, None, None) => return Err(preset::missing().in_file(path)),
        };
        let named = card.as_ref().map_or("logits", |c| c.output.name.as_str());
        let output = graph.outputs.iter().position(|o| o.name() == named).unwrap_or(0);
        let probabilities = card.as_ref().is_some_and(|c| c.output.kind == "probabilities");
        let temperature = card.as_ref().and_then(|c| c.certainty.as_ref()).map_or(1.0, |c| c.temperature);
        let session = Session::from_graph(graph, options).map_err(in_file)?;
        subjects.push(Subject { path: path.clone(), session, preprocess: how, output, probabilities, temperature });
    }
    Ok((subjects, labels))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_and_ties() {
        let y = [0.1, 0.7, 0.7, 0.2, -1.0];
        assert_eq!(best(&y), 1);
        assert_eq!([0, 1, 2, 3, 4].map(|c| rank_of(&y, c)), [3, 0, 1, 2, 4]);
    }

    #[test]
    fn probabilities_sum_to_one_even_for_large_logits() {
        let p = distribution(&[1000.0, 999.0, -1000.0], false);
        assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        assert!((p[0] / p[1] - 1f64.exp()).abs() < 1e-9);
    }
}

//! How far candidates are from the whole model, and what is known of that from earlier searches.

use super::candidate::quick;
use super::{Plan, Point, Search, settings_of};
use crate::convert::{Float, float, load_picture, sha256};
use crate::evaluate::best;
use crate::progress;
use crate::quantize::{Effect, Probes};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use vedge_calibration::{Item, dataset};
use vedge_runtime::{Card, Result, files};

/// What judges candidates: the last of the calibration pictures, which calibrate nothing.
pub(super) struct Judge<'a> {
    /// The whole model's answers to all pictures.
    pub whole: &'a [Vec<f32>],
    pub items: &'a [Item],
    /// How many of them judge.
    pub count: usize,
}

impl Judge<'_> {
    fn from(&self) -> usize {
        self.items.len() - self.count
    }

    /// The whole model's share of right answers.
    pub fn float_top1(&self) -> f64 {
        top1(&self.whole[self.from()..], &self.items[self.from()..])
    }
}

/// Share of right answers, 0…1.
pub(super) fn top1(answers: &[Vec<f32>], items: &[Item]) -> f64 {
    let right = answers.iter().zip(items).filter(|(y, i)| best(y) == i.class).count();
    right as f64 / items.len().max(1) as f64
}

/// What is known of a plan's answers; kept between searches.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Judged {
    bytes: usize,
    effect: Effect,
}

/// A search and what it knows from before.
pub(super) struct Known<'a> {
    pub search: Search<'a>,
    judged: BTreeMap<String, Judged>,
    path: Option<PathBuf>,
}

impl<'a> Known<'a> {
    /// The file that keeps what was judged of this model with these pictures.
    pub fn open(search: Search<'a>, items: &[Item], card: &Card) -> Result<Known<'a>> {
        let pictures = dataset::fingerprint(items)?;
        let asked = (search.settings.size, search.settings.patch, &search.prices);
        let how = format!("{:?} {} {} {asked:?}", card.preprocess, card.provenance.sha256, env!("CARGO_PKG_VERSION"));
        let name = sha256(format!("budget 3 {pictures} {how}").as_bytes());
        let path = search.settings.cache.as_ref().map(|dir| dir.join(format!("{name}.budget")));
        let read = path.as_ref().and_then(|p| std::fs::read(p).ok());
        let judged = read.and_then(|b| serde_json::from_slice(&b).ok()).unwrap_or_default();
        Ok(Known { search, judged, path })
    }

    /// Judges a plan that takes so long.
    pub fn point(&mut self, plan: &Plan, (ms, measured): (f64, bool), judge: &Judge<'_>) -> Result<Point> {
        let key = plan.key();
        let j = match self.judged.get(&key) {
            Some(j) => *j,
            None => {
                let j = self.judge(plan, judge)?;
                self.judged.insert(key, j);
                self.keep();
                j
            }
        };
        let Judged { bytes, effect } = j;
        Ok(Point { plan: plan.clone(), ms, measured, bytes, effect, chosen: false })
    }

    /// What cannot be kept is found out again.
    fn keep(&self) {
        if let Some(path) = &self.path
            && let Some(dir) = path.parent()
            && std::fs::create_dir_all(dir).is_ok()
        {
            let json = serde_json::to_vec(&self.judged).expect("plain data");
            let _ = files::write_atomic(path, &json);
        }
    }

    fn judge(&self, plan: &Plan, judge: &Judge<'_>) -> Result<Judged> {
        let settings = settings_of(plan, &self.search.prices, self.search.settings);
        let Float { graph, card, output, .. } = float(self.search.source, &settings, Some(judge.whole))?;
        let graph = quick(&graph, &card, plan.precision)?;
        let from = judge.from();
        let load = |i: &Item| load_picture(&i.path, &card.preprocess);
        let probes = Probes {
            inputs: judge.items[from..].iter().map(load).collect::<Result<_>>()?,
            reference: judge.whole[from..].to_vec(),
            classes: judge.items[from..].iter().map(|i| i.class).collect(),
            output,
            probabilities: card.output.kind == "probabilities",
            held_out: from > 0,
        };
        let bar = progress::bar(&plan.describe(), probes.inputs.len());
        let effect = probes.judge(&graph, &self.search.settings.options, &bar, f64::NEG_INFINITY)?;
        bar.finish_and_clear();
        Ok(Judged { bytes: graph.encode().len(), effect })
    }
}

//! Small layers that matter much: where a few layers that take little of the work make much of the noise, they keep float16
//! weights and float arithmetic (as a rule the patch embedding, which reads pixels, or the first convolutions).

use super::layers::macs;
use super::search::{Attempt, Search, best, better, hopeless};
use crate::progress;
use vedge_runtime::{Error, Result};

/// Share of the model's multiply-accumulates in layers that may stay float for the sake of accuracy: float layers take
/// about three times as long, so this much costs a model about one part in twenty-five of its speed.
const BUDGET: f64 = 0.02;
/// Gain below which no layer stays float, dB; and what each percent of the work has to gain.
const WORTH_DB: f64 = 0.1;
const WORTH_DB_PERCENT: f64 = 0.25;
/// Noise for its work, against that of the whole model, from which on a layer may stay float.
const MUCH: f64 = 5.0;
/// Layers measured together first.
const TOGETHER: usize = 4;
/// So many judging pictures measure the noise of a single layer.
const FEW: usize = 4;

impl Search<'_> {
    /// Adds to the attempts the best one with small layers left in float, and then the same of the other kind of
    /// activations, where that is near enough to catch up or, being static, may become good. Nothing where one is good as it is.
    ///
    /// # Errors
    /// Those of running candidates.
    pub fn spare_best(&self, tried: &mut Vec<Attempt>) -> Result<()> {
        if tried.iter().any(Attempt::is_good) {
            return Ok(());
        }
        let first = best(tried);
        let kind = first.candidate.activations;
        let spared = self.spare(first)?;
        tried.extend(spared);
        let other = tried.iter().filter(|a| a.candidate.activations != kind).reduce(better);
        if let Some(other) = other.filter(|o| o.is_static() || o.candidate.effect.sqnr >= hopeless(tried)) {
            let spared = self.spare(other)?;
            tried.extend(spared);
        }
        Ok(())
    }

    /// The attempt with the layers left in float that make most of the noise for their work; `None` where that gains little.
    ///
    /// # Errors
    /// Those of running candidates.
    pub fn spare(&self, a: &Attempt) -> Result<Option<Attempt>> {
        let work: Vec<f64> = a.layers.iter().map(|l| macs(&a.float, l) as f64).collect();
        let budget = BUDGET * work.iter().sum::<f64>();
        let small: Vec<usize> = (0..work.len()).filter(|i| work[*i] > 0.0 && work[*i] <= budget).collect();
        let few = self.probes.first(FEW);
        let bar = progress::bar("measuring small layers", small.len() * few.inputs.len() * 2 / TOGETHER);
        let noise = |of: &[usize]| {
            let effect = few.judge(&self.partly(a, |l| of.contains(&l))?, self.options, &bar, f64::NEG_INFINITY)?;
            Ok::<_, Error>(10f64.powf(-effect.sqnr / 10.0))
        };
        // Only those that make several times their share of the noise; where a few together do not make as much as one of
        // them would have to, they need not be looked at one by one.
        let much = MUCH * 10f64.powf(-a.candidate.effect.sqnr / 10.0) / work.iter().sum::<f64>();
        let mut worth = vec![];
        for some in small.chunks(TOGETHER) {
            let least = some.iter().map(|i| work[*i]).fold(f64::INFINITY, f64::min);
            if noise(some)? < much * least {
                continue;
            }
            for &i in some {
                worth.push((i, noise(&[i])? / work[i]));
            }
        }
        worth.retain(|(_, w)| *w > much);
        worth.sort_by(|x, y| y.1.total_cmp(&x.1).then(x.0.cmp(&y.0)));
        let (mut left, mut float) = (budget, a.spared.clone());
        for (i, _) in worth {
            if work[i] <= left {
                left -= work[i];
                float.insert(i);
            }
        }
        if float == a.spared {
            return Ok(None);
        }
        let percent = 100.0 * BUDGET * (budget - left) / budget;
        let spared = self.leaving(a, float, &bar)?;
        bar.finish_and_clear();
        let gain = spared.candidate.effect.sqnr - a.candidate.effect.sqnr;
        Ok((gain >= WORTH_DB.max(WORTH_DB_PERCENT * percent)).then_some(spared))
    }
}

#[cfg(test)]
#[path = "spare_tests.rs"]
mod tests;

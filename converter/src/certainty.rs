//! How far a model's probabilities can be believed: its temperature (Guo et al. 2017, arXiv:1706.04599) and the edges of
//! what it knows, both found on the calibration pictures. Of their labels only `--max-drop` makes use besides.
//!
//! The ranges of an INT8 model come from the same pictures, which moves its answers on them too little to matter
//! (measured: tests/records/unknown.md); how far they look from each other is told by some for the others.

use crate::convert;
use crate::evaluate::{best, distribution};
use crate::prune::eliminate::spd_inverse;
use ndarray::{Array1, Array2};
use vedge_calibration::Item;
use vedge_runtime::appearance;
use vedge_runtime::classify::{energy, probabilities};
use vedge_runtime::model::card::{Card, Certainty, FittedTo, Limits, Looks, Preprocess};
use vedge_runtime::onnx::Graph;
use vedge_runtime::{Options, Result, bench};

/// Share of the pictures beyond each limit of answers.
const BEYOND: f64 = 0.01;
/// Share of the pictures beyond the limit of looks, which has more to tell.
const STRANGE: f64 = 0.02;
/// How sure each number of a picture's looks is at best, squared: other cameras and light move it by a tenth.
const BLUR: f64 = 0.01;
/// Pictures for each number of their looks, at least.
const LOOKED_AT: usize = 5;
/// Parts of the pictures, each of which is told by the others.
const FOLDS: usize = 5;
/// Temperatures that are looked at.
const RANGE: (f64, f64) = (0.05, 20.0);
/// Equal parts of 0…1 among which confidences are sorted, as in Guo et al.
const BINS: usize = 15;

/// What certainty is measured of.
pub struct Measured<'a> {
    /// The model as it will be, with its card.
    pub model: &'a Graph,
    /// The float model.
    pub float: &'a Graph,
    /// Its answers, where they are known already.
    pub whole: Option<&'a [Vec<f32>]>,
    /// The pictures.
    pub items: &'a [Item],
    /// Whether their classes are the model's.
    pub labelled: bool,
}

/// Runs a model on its calibration pictures and fits its certainty: to their labels, or where these are not the model's to
/// what the float model says. `output` is the index of the output with its answers.
///
/// # Errors
/// Those of running the models.
pub fn measure(m: &Measured<'_>, card: &Card, output: usize, options: &Options) -> Result<Option<Certainty>> {
    let answers = |graph: &Graph| {
        convert::answers("fitting probabilities", graph.clone(), m.items, &card.preprocess, output, options)
    };
    let (model, given) = (answers(m.model)?, card.output.kind == "probabilities");
    let classes = m.items.iter().map(|i| i.class).collect();
    let mut fitted = m.labelled.then(|| fit(&model, &Truth::Classes(classes), given)).flatten();
    if fitted.is_none() {
        fitted = match m.whole {
            Some(whole) => fit(&model, &Truth::Answers(whole), given),
            None => fit(&model, &Truth::Answers(&answers(m.float)?), given),
        };
    }
    if let Some(fitted) = &mut fitted {
        fitted.limits.looks = looks(&seen(m.items, &card.preprocess)?);
    }
    Ok(fitted)
}

/// The numbers of each picture's looks.
fn seen(items: &[Item], how: &Preprocess) -> Result<Vec<Vec<f32>>> {
    items.iter().map(|i| Ok(appearance::of(&convert::load_picture(&i.path, how)?, how))).collect()
}

/// How pictures look, and a limit that few of them exceed when the others tell. `None` where they are too few.
pub fn looks(pictures: &[Vec<f32>]) -> Option<Looks> {
    let numbers = pictures.first()?.len();
    if pictures.len() < LOOKED_AT * numbers {
        return None;
    }
    let part =
        |keep: &dyn Fn(usize) -> bool| pictures.iter().enumerate().filter(|(i, _)| keep(*i)).map(|(_, p)| p).collect();
    let mut distances = vec![];
    for fold in 0..FOLDS {
        let (others, own): (Vec<_>, Vec<_>) = (part(&|i| i % FOLDS != fold), part(&|i| i % FOLDS == fold));
        let told = cloud(&others)?;
        distances.extend(own.into_iter().map(|p: &Vec<f32>| appearance::distance(&told, p)));
    }
    let distance = quantile(distances.into_iter(), 1.0 - STRANGE);
    Some(Looks { distance, ..cloud(&part(&|_| true))? })
}

/// Mean and inverse covariance, without a limit.
fn cloud(pictures: &[&Vec<f32>]) -> Option<Looks> {
    let (rows, numbers) = (pictures.len(), pictures.first()?.len());
    let all = Array2::from_shape_fn((rows, numbers), |(i, j)| f64::from(pictures[i][j]));
    let mean: Array1<f64> = all.mean_axis(ndarray::Axis(0))?;
    let off = all - &mean;
    let covariance = off.t().dot(&off) / rows as f64 + Array2::<f64>::eye(numbers) * BLUR;
    let inverse = spd_inverse(&covariance)?;
    let inverse = inverse.rows().into_iter().map(|row| row.iter().map(|v| *v as f32).collect()).collect();
    Some(Looks {
        mean: mean.iter().map(|v| *v as f32).collect(),
        inverse,
        distance: f32::INFINITY,
        share: STRANGE as f32,
    })
}

/// What a model's probabilities are to agree with, picture by picture.
pub enum Truth<'a> {
    /// The right classes.
    Classes(Vec<usize>),
    /// Another model's answers.
    Answers(&'a [Vec<f32>]),
}

/// Fits a temperature to a model's answers and finds its limits; `given` where they are probabilities, not logits. `None`
/// without pictures, and where no temperature in 0.05…20 is best: then what is called the truth has nothing to do with the
/// answers.
pub fn fit(answers: &[Vec<f32>], truth: &Truth, given: bool) -> Option<Certainty> {
    if answers.is_empty() {
        return None;
    }
    let pictures = answers.len();
    let targets: Vec<Vec<f64>> = match truth {
        Truth::Classes(classes) => classes.iter().zip(answers).map(|(&c, a)| soft(c, a.len(), pictures)).collect(),
        Truth::Answers(others) => others.iter().map(|a| distribution(a, given)).collect(),
    };
    let temperature = coolest(|t| loss(answers, &targets, given, t))? as f32;
    let at = |t: f32| answers.iter().map(move |a| probabilities(a.clone(), given, t));
    let calibration_error = match truth {
        Truth::Classes(classes) => {
            let error = |t| error(at(t).zip(classes).map(|(p, &c)| (f64::from(p[best(&p)]), best(&p) == c)));
            Some([error(1.0) as f32, error(temperature) as f32])
        }
        Truth::Answers(_) => None,
    };
    let confidences = at(temperature).map(|p| p[best(&p)]);
    let limits = Limits {
        share: BEYOND as f32,
        energy: (!given).then(|| quantile(answers.iter().map(|a| energy(a)), 1.0 - BEYOND)),
        confidence: quantile(confidences, BEYOND),
        looks: None,
    };
    let fitted_to = match truth {
        Truth::Classes(_) => FittedTo::Labels,
        Truth::Answers(_) => FittedTo::FloatModel,
    };
    Some(Certainty { temperature, fitted_to, pictures, calibration_error, limits })
}

/// Certainty about a class as so many pictures can tell it: without the last doubt (Platt 1999), a model that is right on all
/// of them would be certain without end.
fn soft(class: usize, classes: usize, pictures: usize) -> Vec<f64> {
    let doubt = 1.0 / (pictures as f64 + 2.0);
    let other = doubt / (classes.max(2) - 1) as f64;
    (0..classes).map(|i| if i == class { 1.0 - doubt } else { other }).collect()
}

/// Mean cross entropy at a temperature, nats.
fn loss(answers: &[Vec<f32>], targets: &[Vec<f64>], given: bool, temperature: f64) -> f64 {
    let one = |(a, target): (&Vec<f32>, &Vec<f64>)| {
        let scaled = |v: &f32| {
            let logit = if given { f64::from(v.max(f32::MIN_POSITIVE)).ln() } else { f64::from(*v) };
            logit / temperature
        };
        let z: Vec<f64> = a.iter().map(scaled).collect();
        let most = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total = most + z.iter().map(|z| (z - most).exp()).sum::<f64>().ln();
        target.iter().zip(&z).map(|(t, z)| t * (total - z)).sum::<f64>()
    };
    answers.iter().zip(targets).map(one).sum::<f64>() / answers.len() as f64
}

/// Where a loss that is convex in the inverse temperature is least, by golden sections of its logarithm; `None` at the ends.
fn coolest(loss: impl Fn(f64) -> f64) -> Option<f64> {
    let golden = (5f64.sqrt() - 1.0) / 2.0;
    let (mut low, mut high) = (RANGE.0.ln(), RANGE.1.ln());
    while high - low > 1e-4 {
        let (a, b) = (high - golden * (high - low), low + golden * (high - low));
        if loss(a.exp()) < loss(b.exp()) {
            high = b;
        } else {
            low = a;
        }
    }
    let found = ((low + high) / 2.0).exp();
    (found > RANGE.0 * 1.01 && found < RANGE.1 / 1.01).then_some(found)
}

/// Expected calibration error, 0…1: how far confidence (0…1) and the share of right answers are apart, in the mean over
/// pictures sorted by confidence into 15 equal parts.
pub fn error(answers: impl Iterator<Item = (f64, bool)>) -> f64 {
    let mut bins = [(0.0, 0.0); BINS];
    let mut count = 0;
    for (confidence, right) in answers {
        let bin = &mut bins[((confidence * BINS as f64).ceil() as usize).clamp(1, BINS) - 1];
        *bin = (bin.0 + confidence, bin.1 + f64::from(u8::from(right)));
        count += 1;
    }
    bins.iter().map(|(confidence, right)| (confidence - right).abs()).sum::<f64>() / f64::from(count.max(1))
}

/// The value below which that share lies.
fn quantile(values: impl Iterator<Item = f32>, share: f64) -> f32 {
    let mut values: Vec<f64> = values.map(f64::from).collect();
    values.sort_by(f64::total_cmp);
    bench::percentile(&values, 100.0 * share) as f32
}

/// In words.
pub fn describe(c: &Certainty) -> String {
    let to = match (c.fitted_to, c.calibration_error) {
        (FittedTo::Labels, Some([before, after])) => format!(
            "fitted to the labels of {} pictures (calibration error {:.1} % before, {:.1} % after)",
            c.pictures,
            100.0 * before,
            100.0 * after
        ),
        (FittedTo::Labels, None) => format!("fitted to the labels of {} pictures", c.pictures),
        (FittedTo::FloatModel, _) => {
            format!("fitted to the float model on {} pictures: their labels are not the model's", c.pictures)
        }
    };
    format!("temperature {:.3}, {to}", c.temperature)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers of a model whose logits are those of the truth, which is drawn from them, times `heat`.
    fn drawn(heat: f32, pictures: u32) -> (Vec<Vec<f32>>, Vec<usize>) {
        let mut state = 1u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f64::from(state >> 8) / f64::from(1 << 24)
        };
        let one = |_| {
            let logits: Vec<f32> = (0..4).map(|_| 4.0 * random() as f32).collect();
            let p = probabilities(logits.clone(), false, 1.0);
            let mut left = random();
            let class = p.iter().position(|p| {
                left -= f64::from(*p);
                left < 0.0
            });
            (logits.iter().map(|z| z * heat).collect(), class.unwrap_or(3))
        };
        (0..pictures).map(one).unzip()
    }

    #[test]
    fn the_temperature_of_a_model_that_is_too_sure_is_found() {
        for heat in [0.5, 1.0, 3.0] {
            let (answers, classes) = drawn(heat, 4000);
            let c = fit(&answers, &Truth::Classes(classes), false).unwrap();
            assert!((c.temperature / heat - 1.0).abs() < 0.06, "{heat}: {c:?}");
            let [before, after] = c.calibration_error.unwrap();
            assert!(after < 0.03 && (heat == 1.0 || before > 0.1), "{heat}: {c:?}");
        }
    }

    #[test]
    fn without_labels_probabilities_become_the_other_models() {
        let (hot, _) = drawn(2.5, 200);
        let (other, _) = drawn(1.0, 200);
        let c = fit(&hot, &Truth::Answers(&other), false).unwrap();
        assert!((c.temperature - 2.5).abs() < 0.01 && c.calibration_error.is_none(), "{c:?}");
        assert_eq!(c.fitted_to, FittedTo::FloatModel);
    }

    #[test]
    fn probabilities_are_fitted_as_their_logits_are() {
        let (answers, classes) = drawn(2.0, 500);
        let given: Vec<Vec<f32>> = answers.iter().map(|a| probabilities(a.clone(), false, 1.0)).collect();
        let of = |a: &[Vec<f32>], given| fit(a, &Truth::Classes(classes.clone()), given).unwrap();
        let (logits, given) = (of(&answers, false), of(&given, true));
        assert!((logits.temperature - given.temperature).abs() < 0.01);
        assert!(given.limits.energy.is_none() && logits.limits.energy.is_some());
    }

    #[test]
    fn labels_of_another_model_and_right_answers_alone() {
        // Labels that say the opposite: the best is no certainty at all.
        let (answers, _) = drawn(1.0, 100);
        let least = |a: &Vec<f32>| (0..4).min_by(|&i, &j| a[i].total_cmp(&a[j])).unwrap();
        assert_eq!(fit(&answers, &Truth::Classes(answers.iter().map(least).collect()), false), None);
        assert_eq!(fit(&[], &Truth::Classes(vec![]), false), None);
        // A model that is always right has a temperature all the same.
        let right: Vec<usize> = answers.iter().map(|a| best(a)).collect();
        let c = fit(&answers, &Truth::Classes(right), false).unwrap();
        assert!((0.05..1.0).contains(&c.temperature), "{c:?}");
    }

    #[test]
    fn limits_leave_a_hundredth_out() {
        let (answers, classes) = drawn(1.0, 1000);
        let limits = fit(&answers, &Truth::Classes(classes), false).unwrap().limits;
        let beyond = answers.iter().filter(|a| energy(a) > limits.energy.unwrap()).count();
        assert_eq!(beyond, 10);
    }

    #[test]
    fn looks_leave_a_fiftieth_out_of_pictures_that_did_not_tell() {
        let (pictures, _) = drawn(1.0, 1000);
        let looks = looks(&pictures[..500]).unwrap();
        let beyond = |p: &[Vec<f32>]| p.iter().filter(|p| appearance::distance(&looks, p) > looks.distance).count();
        assert!((2..=20).contains(&beyond(&pictures[..500])) && (2..=25).contains(&beyond(&pictures[500..])));
        let far = vec![vec![2.0, 2.0, 2.0, 9.0]];
        assert_eq!(beyond(&far), 1);
        assert_eq!(super::looks(&pictures[..19]), None);
        // a number that never moves, as brightness of line drawings may be, is no reason to refuse all that is near
        let still: Vec<Vec<f32>> = pictures.iter().map(|p| vec![p[0], 1.0]).collect();
        let looks = super::looks(&still).unwrap();
        assert!(appearance::distance(&looks, &[2.0, 1.1]) < looks.distance);
    }

    #[test]
    fn calibration_error_by_hand() {
        // 0.9 twice, right once: 0.4 apart; 0.3 twice, never right: 0.3 apart
        let answers = [(0.9, true), (0.9, false), (0.3, false), (0.3, false)];
        assert!((error(answers.into_iter()) - 0.35).abs() < 1e-12);
        assert_eq!(error([].into_iter()), 0.0);
        assert_eq!(error([(0.0, false), (1.0, true)].into_iter()), 0.0);
    }
}

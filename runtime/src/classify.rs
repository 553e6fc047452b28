//! Logits to labels.

use crate::appearance;
use crate::error::{Error, Result};
use crate::model::card::{Card, Looks, Preprocess};
use crate::session::Session;
use ndarray::ArrayD;

/// One class of an answer.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Class {
    /// Its label, or the index as text where the model has no label for it.
    pub label: String,
    /// Its index in the output.
    pub index: usize,
    /// Its probability, 0…1.
    pub p: f32,
}

/// Turns a model's output into classes.
#[derive(Clone, Debug)]
pub struct Classifier {
    output: usize,
    probabilities: bool,
    temperature: f32,
    labels: Vec<String>,
    /// How calibration pictures looked, and how a picture becomes a tensor.
    looks: Option<(Looks, Preprocess)>,
}

impl Classifier {
    /// Reads what the output means from the model's card.
    ///
    /// # Errors
    /// [`Error::Unsupported`] without a card or when the model is no classifier, [`Error::BadModel`] when the card
    /// names an output that the model does not have, a temperature that is none, or looks of pictures of another size.
    pub fn of(session: &Session) -> Result<(Classifier, Card)> {
        let card = session.card().cloned().ok_or_else(|| Error::Unsupported {
            what: "the model has no card: how pictures become its input and what its output means is unknown".into(),
            hint: "convert it first: vedge convert MODEL -o OUT (infer and bench work without a card)".into(),
        })?;
        let probabilities = match card.output.kind.as_str() {
            "logits" => false,
            "probabilities" => true,
            kind => {
                return Err(Error::Unsupported {
                    what: format!("the model's output `{}` holds {kind}, not classes", card.output.name),
                    hint: "read it with: vedge-run infer MODEL --input x.npy --output y.npy".into(),
                });
            }
        };
        let output = session.outputs().iter().position(|o| *o == card.output.name).ok_or_else(|| {
            let (name, has) = (&card.output.name, session.outputs().join(", "));
            Error::BadModel(format!("the card names output `{name}`, the model has {has}"))
        })?;
        let temperature = card.certainty.as_ref().map_or(1.0, |c| c.temperature);
        if !(temperature.is_finite() && temperature > 0.0) {
            return Err(Error::BadModel(format!(
                "the card's temperature is {temperature}, expected a positive number"
            )));
        }
        let looks = looks(&card)?;
        Ok((Classifier { output, probabilities, temperature, labels: card.labels.clone(), looks }, card))
    }

    /// The probabilities of all classes, and for logits their energy, from the session's outputs.
    ///
    /// # Errors
    /// [`Error::Engine`] when a value is NaN or infinite, [`Error::Shape`] when there is none.
    pub fn read(&self, outputs: &[ArrayD<f32>]) -> Result<Scores> {
        let output = outputs
            .get(self.output)
            .ok_or_else(|| Error::Engine(format!("{} outputs, expected number {}", outputs.len(), self.output)))?;
        let values = checked(output.iter().copied().collect())?;
        let energy = (!self.probabilities).then(|| energy(&values));
        let probabilities = probabilities(values, self.probabilities, self.temperature);
        Ok(Scores { probabilities, energy, distance: None })
    }

    /// How far a picture looks from the calibration pictures, by the model's input `[1, 3, height, width]`; `None` where the
    /// card does not tell how these looked.
    pub fn distance(&self, tensor: &ArrayD<f32>) -> Option<f32> {
        let (looks, how) = self.looks.as_ref()?;
        Some(appearance::distance(looks, &appearance::of(tensor, how)))
    }

    /// The `k` most likely classes, best first.
    pub fn top(&self, probabilities: &[f32], k: usize) -> Vec<Class> {
        let mut order: Vec<usize> = (0..probabilities.len()).collect();
        // ties: the lower index first
        order.sort_by(|&a, &b| probabilities[b].total_cmp(&probabilities[a]));
        order.truncate(k);
        let class = |index| Class { label: self.label(index), index, p: probabilities[index] };
        order.into_iter().map(class).collect()
    }

    /// A class's label, or its index as text.
    pub fn label(&self, index: usize) -> String {
        self.labels.get(index).cloned().unwrap_or_else(|| index.to_string())
    }

    /// Whether the model's output holds probabilities, not logits.
    pub fn gives_probabilities(&self) -> bool {
        self.probabilities
    }

    #[cfg(test)]
    pub(crate) fn for_tests(labels: &[&str]) -> Classifier {
        let labels = labels.iter().map(ToString::to_string).collect();
        Classifier { output: 0, probabilities: false, temperature: 1.0, labels, looks: None }
    }

    /// Labels in the order of the classes; may be empty.
    pub fn labels(&self) -> &[String] {
        &self.labels
    }
}

/// What the model says about one picture.
#[derive(Clone, Debug, PartialEq)]
pub struct Scores {
    /// Of each class, 0…1, by the temperature of the model's card.
    pub probabilities: Vec<f32>,
    /// `−ln Σ exp(logit)`: the higher, the less the picture is like those of the training (Liu et al. 2020,
    /// arXiv:2010.03759). `None` where the model gives probabilities.
    pub energy: Option<f32>,
    /// What [`Classifier::distance`] says of the picture, where it was asked.
    pub distance: Option<f32>,
}

/// Probabilities of a model's output at a temperature; `given` where it holds probabilities already, not logits.
pub fn probabilities(mut values: Vec<f32>, given: bool, temperature: f32) -> Vec<f32> {
    match (given, temperature == 1.0) {
        (true, true) => return values,
        // a probability's logarithm is its logit but for a constant, which softmax takes away
        (true, false) => values.iter_mut().for_each(|v| *v = v.max(f32::MIN_POSITIVE).ln() / temperature),
        (false, _) => values.iter_mut().for_each(|v| *v /= temperature),
    }
    softmax(&values)
}

/// `−ln Σ exp(logit)`.
pub fn energy(logits: &[f32]) -> f32 {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - most).exp()).sum();
    -(most + sum.ln() as f32)
}

/// How calibration pictures looked, by the card.
fn looks(card: &Card) -> Result<Option<(Looks, Preprocess)>> {
    let Some(looks) = card.certainty.as_ref().and_then(|c| c.limits.looks.clone()) else { return Ok(None) };
    let (height, width) = (card.preprocess.height, card.preprocess.width);
    let (want, got) = (appearance::count(height, width), looks.mean.len());
    if got != want || looks.inverse.len() != want || looks.inverse.iter().any(|row| row.len() != want) {
        let what = format!("the card tells looks of pictures by {got} numbers, expected {want} for {width}x{height}");
        return Err(Error::BadModel(what));
    }
    Ok(Some((looks, card.preprocess.clone())))
}

/// Refuses an output that holds NaN or infinity, or nothing.
fn checked(values: Vec<f32>) -> Result<Vec<f32>> {
    if values.is_empty() {
        return Err(Error::Shape("the model's output is empty".into()));
    }
    match values.iter().position(|v| !v.is_finite()) {
        Some(i) => Err(Error::Engine(format!("the model's output {i} is {}: it cannot be trusted", values[i]))),
        None => Ok(values),
    }
}

/// Softmax, stable for large logits.
pub fn softmax(logits: &[f32]) -> Vec<f32> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp: Vec<f64> = logits.iter().map(|l| f64::from(l - most).exp()).collect();
    let sum: f64 = exp.iter().sum();
    exp.iter().map(|e| (e / sum) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn classifier(probabilities: bool) -> Classifier {
        Classifier { probabilities, ..Classifier::for_tests(&["a", "b"]) }
    }

    fn output(values: &[f32]) -> Vec<ArrayD<f32>> {
        vec![ArrayD::from_shape_vec(ndarray::IxDyn(&[1, values.len()]), values.to_vec()).unwrap()]
    }

    #[test]
    fn best_first_with_labels_and_indices() {
        let scores = classifier(false).read(&output(&[1.0, 3.0, 2.0])).unwrap();
        let top = classifier(false).top(&scores.probabilities, 2);
        assert_eq!((top[0].label.as_str(), top[0].index), ("b", 1));
        assert_eq!((top[1].label.as_str(), top[1].index), ("2", 2));
        assert!((top[0].p - 0.665_241).abs() < 1e-5);
        assert_eq!(classifier(false).top(&[0.5, 0.5], 9)[0].index, 0);
        // −ln(e¹ + e³ + e²)
        assert!((scores.energy.unwrap() + 3.407_606).abs() < 1e-5);
    }

    #[test]
    fn probabilities_are_not_softmaxed_again() {
        let scores = classifier(true).read(&output(&[0.25, 0.75])).unwrap();
        assert_eq!(scores, Scores { probabilities: vec![0.25, 0.75], energy: None, distance: None });
    }

    #[test]
    fn a_temperature_moves_probabilities_and_not_their_order_or_energy() {
        let warm = |probabilities| Classifier { temperature: 2.0, ..classifier(probabilities) };
        let scores = warm(false).read(&output(&[1.0, 3.0, 2.0])).unwrap();
        assert_eq!(scores.probabilities, softmax(&[0.5, 1.5, 1.0]));
        assert!((scores.energy.unwrap() + 3.407_606).abs() < 1e-5);
        // the same classes by their probabilities
        let given = warm(true).read(&output(&softmax(&[1.0, 3.0, 2.0]))).unwrap();
        assert!(given.probabilities.iter().zip(&scores.probabilities).all(|(a, b)| (a - b).abs() < 1e-6));
        let never = warm(true).read(&output(&[0.0, 1.0])).unwrap().probabilities;
        assert!(never[0] < 1e-18 && never[1] == 1.0, "{never:?}");
    }

    #[test]
    fn large_logits_do_not_overflow() {
        assert_eq!(softmax(&[1e30, 0.0]), [1.0, 0.0]);
    }

    #[test]
    fn nan_is_an_error() {
        for bad in [f32::NAN, f32::INFINITY] {
            let e = classifier(false).read(&output(&[0.0, bad])).unwrap_err();
            assert!(e.to_string().contains("output 1"), "{e}");
        }
        assert!(classifier(false).read(&output(&[])).is_err());
    }
}

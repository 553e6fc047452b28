//! The model's own test: does this machine compute what the workstation computed?

use crate::error::{Error, Result};
use crate::model::card::{Card, SelfTest};
use crate::session::Session;

/// How the output compares with the one in the card.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Outcome {
    /// Cosine similarity with the expected output.
    pub cosine: f64,
    /// Lowest that passes.
    pub min_cosine: f32,
    /// Whether the first class is the same.
    pub same_top1: bool,
}

impl Outcome {
    /// Whether the test is passed.
    pub fn passed(&self) -> bool {
        self.cosine >= f64::from(self.min_cosine) && self.same_top1
    }
}

/// Runs the test of a model's card.
///
/// # Errors
/// As [`Session::run`]; [`Error::BadModel`] when the output has another length than the expected one.
pub fn run(session: &mut Session, card: &Card, test: &SelfTest) -> Result<Outcome> {
    let index = session.outputs().iter().position(|o| *o == card.output.name).unwrap_or(0);
    let inputs = crate::bench::inputs(session);
    let outputs = session.run(&inputs)?;
    let got: Vec<f32> = outputs.get(index).map(|o| o.iter().copied().collect()).unwrap_or_default();
    if got.len() != test.logits.len() {
        return Err(Error::BadModel(format!(
            "the self-test expects {} values, the model gives {}",
            test.logits.len(),
            got.len()
        )));
    }
    Ok(Outcome {
        cosine: cosine(&got, &test.logits),
        min_cosine: test.min_cosine,
        same_top1: first(&got) == first(&test.logits),
    })
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

fn first(values: &[f32]) -> Option<usize> {
    (0..values.len()).max_by(|&a, &b| values[a].total_cmp(&values[b]).then(b.cmp(&a)))
}

//! What a conversion finds out about its pictures holds on others: probabilities come true, and the limits leave few of them
//! out but more of what the model never saw.

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use vedge_calibration::Dataset;
use vedge_converter::convert::{Converted, Pictures, Precision, Settings, convert};
use vedge_converter::{certainty, evaluate};
use vedge_runtime::classify::{Classifier, Scores};
use vedge_runtime::decide::{Decider, Rules};
use vedge_runtime::model::card::{Certainty, FittedTo};
use vedge_runtime::preprocess::{Picture, decode_file, to_tensor};
use vedge_runtime::{Options, Session};

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models")
}

fn converted(model: &str, settings: Settings) -> Result<Converted> {
    let preprocess = Some(models().join("fashion.json").display().to_string());
    let calibration = Some(Pictures { dir: models().join("fashion/calibration"), count: 200 });
    Ok(convert(&models().join(model), &Settings { calibration, preprocess, ..settings })?)
}

/// The program's own reading of a converted model.
struct Board {
    session: Session,
    classifier: Classifier,
    preprocess: vedge_runtime::model::card::Preprocess,
}

impl Board {
    fn of(done: &Converted) -> Result<Board> {
        let session = Session::from_graph(done.graph.clone(), &Options::default())?;
        let (classifier, card) = Classifier::of(&session)?;
        Ok(Board { session, classifier, preprocess: card.preprocess })
    }

    fn scores(&mut self, picture: &Picture) -> Result<Scores> {
        let outputs = self.session.run(&[to_tensor(picture, &self.preprocess)?])?;
        Ok(self.classifier.read(&outputs)?)
    }

    /// Calibration error on the test pictures, of the probabilities that the board shows.
    fn error(&mut self) -> Result<f64> {
        let mut seen = vec![];
        for item in Dataset::open(&models().join("fashion/test"), None)?.items {
            let p = self.scores(&decode_file(&item.path)?)?.probabilities;
            seen.push((f64::from(p[evaluate::best(&p)]), evaluate::best(&p) == item.class));
        }
        Ok(certainty::error(seen.into_iter()))
    }
}

fn certainty_of(done: &Converted) -> Result<&Certainty> {
    done.card.certainty.as_ref().context("no certainty in the card")
}

#[test]
fn probabilities_come_true_on_other_pictures() -> Result<()> {
    for (model, precision) in [("deit_nano.onnx", Precision::Int8), ("mobilevit_nano.onnx", Precision::Fp16)] {
        let mut done = converted(model, Settings { precision, ..Settings::default() })?;
        let c = certainty_of(&done)?;
        assert_eq!((c.fitted_to, c.pictures), (FittedTo::Labels, 200), "{model}");
        let [before, after] = c.calibration_error.context("labels")?;
        assert!(after < before, "{model}: {c:?}");
        let with = Board::of(&done)?.error()?;
        done.card.certainty.as_mut().context("certainty")?.temperature = 1.0;
        done.card.embed(&mut done.graph);
        let without = Board::of(&done)?.error()?;
        println!("{model}: calibration error on the test pictures {without:.4} without, {with:.4} with a temperature");
        assert!(with < without, "{model}: {with} with, {without} without");
    }
    Ok(())
}

#[test]
fn labels_that_are_not_the_models_are_not_believed() -> Result<()> {
    // Labels in another order: the folders are linked to them by name, and every answer is wrong.
    let mut labels = Dataset::open(&models().join("fashion/test"), None)?.labels;
    labels.rotate_left(3);
    let settings = Settings { labels: Some(labels), precision: Precision::Fp32, ..Settings::default() };
    let done = converted("deit_nano.onnx", settings)?;
    let c = certainty_of(&done)?;
    assert_eq!((c.fitted_to, c.calibration_error), (FittedTo::FloatModel, None));
    assert!((c.temperature - 1.0).abs() < 0.01, "the float model against itself: {c:?}");
    assert!(done.warnings.iter().any(|w| w.contains("labels")), "{:?}", done.warnings);
    Ok(())
}

/// Clouds of grey, 28x28: noise of 5x5 values in between.
fn clouds(seed: u32) -> Picture {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let values: Vec<f32> = (0..25)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as f32
        })
        .collect();
    let mut rgb = vec![];
    for y in 0..28 {
        for x in 0..28 {
            let (fx, fy) = (x as f32 * 4.0 / 28.0, y as f32 * 4.0 / 28.0);
            let (i, j) = (fx as usize, fy as usize);
            let (u, v) = (fx - i as f32, fy - j as f32);
            let at = |j: usize, i: usize| values[j * 5 + i];
            let top = at(j, i) * (1.0 - u) + at(j, i + 1) * u;
            let bottom = at(j + 1, i) * (1.0 - u) + at(j + 1, i + 1) * u;
            rgb.extend([(top * (1.0 - v) + bottom * v) as u8; 3]);
        }
    }
    Picture { width: 28, height: 28, rgb }
}

#[test]
fn more_of_what_it_never_saw_is_none_of_these() -> Result<()> {
    let done = converted("deit_nano.onnx", Settings { precision: Precision::Fp32, ..Settings::default() })?;
    let limits = certainty_of(&done)?.limits.clone();
    let mut board = Board::of(&done)?;
    let rules = Rules { max_energy: limits.energy, min_confidence: Some(limits.confidence), ..Rules::default() };
    let decider = Decider::new(rules, &board.classifier)?;
    let mut share = |pictures: Vec<Picture>| -> Result<f64> {
        let mut unknown = 0;
        for picture in &pictures {
            unknown += usize::from(decider.unknown(&board.scores(picture)?) == Some(true));
        }
        Ok(unknown as f64 / pictures.len() as f64)
    };
    let test = Dataset::open(&models().join("fashion/test"), None)?.items;
    let known = share(test.iter().map(|i| decode_file(&i.path)).collect::<vedge_runtime::Result<_>>()?)?;
    let strange = share((0..200).map(clouds).collect())?;
    println!("none of these: {:.1} % of test pictures, {:.1} % of clouds", 100.0 * known, 100.0 * strange);
    assert!(known < 0.06, "{known} of the test pictures are refused");
    assert!(strange > 0.15 && strange > 4.0 * known, "{strange} of the clouds, {known} of the test pictures");
    Ok(())
}

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
        let tensor = to_tensor(picture, &self.preprocess)?;
        let distance = self.classifier.distance(&tensor);
        let outputs = self.session.run(&[tensor])?;
        Ok(Scores { distance, ..self.classifier.read(&outputs)? })
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

/// The calibration pictures of this parity, in a folder of their own.
fn half(dir: &Path, parity: usize) -> Result<PathBuf> {
    for (n, item) in Dataset::open(&models().join("fashion/calibration"), None)?.items.iter().enumerate() {
        let class = item.path.parent().and_then(Path::file_name).context("a class folder")?;
        let place = dir.join(class);
        std::fs::create_dir_all(&place)?;
        if n % 2 == parity {
            std::fs::copy(&item.path, place.join(item.path.file_name().context("a name")?))?;
        }
    }
    Ok(dir.into())
}

/// Temperature and limits are fitted on the pictures whose ranges the integers have. Here against pictures that told no ranges,
/// with the float model, which has none, for what two different halves of the pictures make.
#[test]
fn ranges_from_the_same_pictures_hardly_move_certainty() -> Result<()> {
    let (first, second) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let halves = [half(first.path(), 0)?, half(second.path(), 1)?];
    for model in ["deit_nano.onnx", "mobilevit_nano.onnx"] {
        let preprocess = Some(models().join("fashion.json").display().to_string());
        let calibration = Some(Pictures { dir: halves[0].clone(), count: 100 });
        let settings = Settings { calibration, preprocess, precision: Precision::Int8, ..Settings::default() };
        let done = convert(&models().join(model), &settings)?;
        let fitted = |graph: &vedge_runtime::onnx::Graph, half: &Path| -> Result<Certainty> {
            let mut session = Session::from_graph(graph.clone(), &Options::default())?;
            let (mut answers, mut classes) = (vec![], vec![]);
            for item in Dataset::open(half, None)?.items {
                let tensor = to_tensor(&decode_file(&item.path)?, &done.card.preprocess)?;
                answers.push(session.run(&[tensor])?[done.output].iter().copied().collect());
                classes.push(item.class);
            }
            certainty::fit(&answers, &certainty::Truth::Classes(classes), false).context("a temperature")
        };
        let moved = |of: &dyn Fn(&Certainty) -> f32| -> Result<[f32; 4]> {
            let [a, b] = [&halves[0], &halves[1]];
            let (int8, float) = (&done.graph, &done.source);
            Ok([of(&fitted(int8, a)?), of(&fitted(int8, b)?), of(&fitted(float, a)?), of(&fitted(float, b)?)])
        };
        let temperature = moved(&|c| c.temperature)?;
        let energy = moved(&|c| c.limits.energy.unwrap_or(f32::NAN))?;
        let confidence = moved(&|c| c.limits.confidence)?;
        println!("{model}: INT8 on the pictures of its ranges, on others; float on these and those:");
        println!("  temperature {temperature:.3?}, energy {energy:.3?}, confidence {confidence:.3?}");
        // what the ranges do is what is left when the halves' own difference is taken away
        let [a, b, c, d] = temperature;
        assert!(((a / b) / (c / d)).ln().abs() < 0.03, "{model}: temperatures {temperature:?}");
        let [a, b, c, d] = energy;
        assert!(((a - b) - (c - d)).abs() < 0.25, "{model}: energies {energy:?}");
        let [a, b, c, d] = confidence;
        // of a hundred pictures this is what the model says of one
        assert!(((a - b) - (c - d)).abs() < 0.05, "{model}: confidences {confidence:?}");
    }
    Ok(())
}

/// Pictures of values between 0 and 255 that depend on a seed and the place.
fn drawn(seeds: u32, size: usize, grey: impl Fn(&mut dyn FnMut() -> f32, usize, usize) -> f32) -> Vec<Picture> {
    let one = |seed: u32| {
        let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32
        };
        let rgb = (0..size * size).flat_map(|i| [grey(&mut random, i / size, i % size) as u8; 3]).collect();
        Picture { width: size, height: size, rgb }
    };
    (0..seeds).map(one).collect()
}

/// A picture between the values of another one.
fn enlarged(p: &Picture, size: usize) -> Picture {
    let mut rgb = vec![];
    for y in 0..size {
        for x in 0..size {
            let of = |v: usize, n: usize| v as f32 * (n - 1) as f32 / size as f32;
            let (fx, fy) = (of(x, p.width), of(y, p.height));
            let (i, j) = (fx as usize, fy as usize);
            let (u, v) = (fx - i as f32, fy - j as f32);
            let at = |j: usize, i: usize| f32::from(p.rgb[3 * (j * p.width + i)]);
            let top = at(j, i) * (1.0 - u) + at(j, i + 1) * u;
            let bottom = at(j + 1, i) * (1.0 - u) + at(j + 1, i + 1) * u;
            rgb.extend([(top * (1.0 - v) + bottom * v) as u8; 3]);
        }
    }
    Picture { width: size, height: size, rgb }
}

#[test]
fn what_it_never_saw_is_none_of_these() -> Result<()> {
    let test: Vec<Picture> = Dataset::open(&models().join("fashion/test"), None)?
        .items
        .iter()
        .map(|i| decode_file(&i.path))
        .collect::<vedge_runtime::Result<_>>()?;
    let strange = [
        ("noise of 28x28", drawn(50, 28, |random, _, _| 255.0 * random())),
        ("noise of 64x64", drawn(50, 64, |random, _, _| 255.0 * random())),
        ("clouds", drawn(50, 5, |random, _, _| 255.0 * random()).iter().map(|p| enlarged(p, 28)).collect()),
        ("grey", (0..=255).step_by(5).flat_map(|v| drawn(1, 28, move |_, _, _| v as f32)).collect()),
        ("stripes", (1..8).flat_map(|n| drawn(1, 64, move |_, _, x| (255 * (x / n % 2)) as f32)).collect()),
    ];
    for (model, precision) in [("deit_nano.onnx", Precision::Int8), ("mobilevit_nano.onnx", Precision::Fp32)] {
        let done = converted(model, Settings { precision, ..Settings::default() })?;
        let limits = certainty_of(&done)?.limits.clone();
        let mut board = Board::of(&done)?;
        let rules = Rules {
            max_energy: limits.energy,
            min_confidence: Some(limits.confidence),
            max_distance: limits.looks.map(|l| l.distance),
            ..Rules::default()
        };
        let decider = Decider::new(rules, &board.classifier)?;
        let mut share = |pictures: &[Picture]| -> Result<f64> {
            let mut unknown = 0;
            for picture in pictures {
                unknown += usize::from(decider.unknown(&board.scores(picture)?) == Some(true));
            }
            Ok(unknown as f64 / pictures.len() as f64)
        };
        let known = share(&test)?;
        println!("{model}: {:.1} % of the test pictures are none of these", 100.0 * known);
        assert!(known <= 0.05, "{model}: {known} of the test pictures are refused");
        for (name, pictures) in &strange {
            let refused = share(pictures)?;
            println!("{model}: {:.1} % of {name}", 100.0 * refused);
            assert!(refused >= 0.95, "{model}: {refused} of {name}");
        }
    }
    Ok(())
}

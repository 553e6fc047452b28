//! A float model in, a model that travels to the board out.

use crate::arch::{self, Architecture};
use crate::merge::{self, Schedule};
use crate::passes::{self, PassReport, Prepare};
use crate::quantize::{self, Candidate, Effect, Evidence, Layer, Preset, Probes, Quantized, Skipped, Target, Wish};
use crate::quantize::{keep, pays};
use crate::{certainty, check, preset, progress, prune, refit, report};
use ndarray::ArrayD;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use vedge_calibration::{Cache, Calibrator, Dataset, Item, Tap, View, collect, dataset, input_moments};
use vedge_runtime::error::counted;
use vedge_runtime::model::card::{
    Accuracy, Activations, CalibrationData, FittedTo, OutputKind, Preprocess, Provenance, SelfTest, VERSION,
};
use vedge_runtime::model::qdq;
use vedge_runtime::onnx::Graph;
use vedge_runtime::preprocess::{decode_file, to_tensor};
use vedge_runtime::{Card, Error, Options, Result, Session, files};

/// Element types of the converted model's layers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// Integer layers, float in between.
    #[default]
    Int8,
    /// Float16 constants, computed in float32.
    Fp16,
    /// As the source.
    Fp32,
    /// INT8 where it pays: where it is faster by its counted work and keeps the answers on the judging pictures; else as `Fp16`.
    Auto,
}

impl Precision {
    /// Whether INT8 is made, if only to be judged.
    pub fn tries_int8(self) -> bool {
        matches!(self, Precision::Int8 | Precision::Auto)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Precision::Int8 => "int8",
            Precision::Fp16 => "fp16",
            Precision::Fp32 => "fp32",
            Precision::Auto => "auto",
        }
    }
}

/// Pictures for calibration.
#[derive(Clone, Debug)]
pub struct Pictures {
    /// `DIR/<class>/<picture>`.
    pub dir: PathBuf,
    /// At most so many are used.
    pub count: usize,
}

/// What to make of a model.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Height and width; `None` keeps the source's.
    pub size: Option<(usize, usize)>,
    /// Height and width of a patch; `None` keeps the source's.
    pub patch: Option<(usize, usize)>,
    /// Element types.
    pub precision: Precision,
    /// Who will run it.
    pub preset: Preset,
    /// Heads and neurons to leave out.
    pub prune: prune::Request,
    /// What these cost in milliseconds, where that was measured.
    pub prices: prune::Prices,
    /// How many tokens each block merges; `None` merges none.
    pub merge: Option<Schedule>,
    /// What INT8 must keep; layers stay float until it does.
    pub target: Target,
    /// How ranges of activations are chosen; `None` tries every way.
    pub calibrator: Option<Calibrator>,
    /// Layers that stay float32: operators, or patterns of names.
    pub keep_float: Vec<String>,
    /// Folder in which statistics are kept between conversions.
    pub cache: Option<PathBuf>,
    /// Calibration pictures.
    pub calibration: Option<Pictures>,
    /// At most so many of them judge only; `None` for what quantization needs.
    pub judges: Option<usize>,
    /// Preset or JSON file for preprocessing; `None` takes that of the source's card.
    pub preprocess: Option<String>,
    /// Mean in place of the preset's, 0…1.
    pub mean: Option<[f32; 3]>,
    /// Standard deviation in place of the preset's, 0…1.
    pub std: Option<[f32; 3]>,
    /// Labels; `None` takes the source's card's, else the calibration folders' names.
    pub labels: Option<Vec<String>>,
    /// Whether to measure the effect of each layer alone, for the report.
    pub explain: bool,
    /// How the float model and the candidates are run.
    pub options: Options,
}

impl Settings {
    /// What the passes are asked for.
    pub fn prepare(&self) -> Prepare {
        Prepare { size: self.size, patch: self.patch }
    }
}

/// A converted model and what was done to it.
pub struct Converted {
    /// The model, its card embedded.
    pub graph: Graph,
    /// Its card.
    pub card: Card,
    /// What the source is.
    pub architecture: Architecture,
    /// Passes before quantization.
    pub passes: Vec<PassReport>,
    /// Heads and neurons that left, layer by layer.
    pub pruned: Vec<prune::Line>,
    /// Layers in integers.
    pub layers: Vec<Layer>,
    /// Weighted nodes that stay float although INT8 was asked for.
    pub skipped: Vec<Skipped>,
    /// Ways to quantize that were tried, the chosen one first.
    pub candidates: Vec<Candidate>,
    /// What the user should know.
    pub warnings: Vec<String>,
    /// The source as prepared, in float, before heads and neurons left it.
    pub source: Graph,
    /// The float model that was quantized.
    pub ground: Graph,
    /// Effect of each layer alone, where that was asked for.
    pub alone: Vec<(String, Effect)>,
    /// Index of the output that is read.
    pub output: usize,
    /// Whether INT8 pays, where that was asked for.
    pub verdict: Option<Verdict>,
    /// The calibration pictures, in the order used.
    pub items: Vec<Item>,
}

impl Converted {
    /// What a report is made of; sizes of the source file and of the written one in bytes.
    pub fn subject(&self, bytes: [u64; 2]) -> report::Subject<'_> {
        report::Subject {
            source: &self.source,
            ground: &self.ground,
            model: &self.graph,
            card: &self.card,
            layers: &self.layers,
            alone: &self.alone,
            skipped: &self.skipped,
            candidates: &self.candidates,
            warnings: &self.warnings,
            bytes,
            output: self.output,
        }
    }
}

/// Whether INT8 pays for a model.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Verdict {
    /// It does.
    pub pays: bool,
    /// Why, in words.
    pub why: String,
}

impl Verdict {
    fn of(graph: &Graph, done: &Quantized) -> Verdict {
        let speed = pays::speedup(graph, &done.layers);
        let db = done.effect.map_or(f64::INFINITY, |e| e.sqnr);
        let numbers =
            format!("{speed:.1} times as fast by counted work (estimated), logits {db:.1} dB on judging pictures");
        let fast = speed >= pays::LEAST;
        let right = db >= pays::LEAST_DB;
        let why = match (fast, right) {
            (true, true) => format!("INT8 pays: {numbers}"),
            (false, _) => format!("INT8 does not pay, at least {:.1} times is asked for: {numbers}", pays::LEAST),
            (true, false) => {
                format!("INT8 costs too many answers, at least {:.0} dB are asked for: {numbers}", pays::LEAST_DB)
            }
        };
        Verdict { pays: fast && right, why }
    }
}

/// At most so many calibration pictures judge the candidates, a quarter of those given.
const PROBES: usize = 32;
/// So many of the calibration pictures correct biases.
const CORRECTING: usize = 16;
/// Bytes that moments of layer inputs may take; layers beyond that are rounded without them.
const MOMENTS: usize = 768 << 20;
/// Fewer judges than this are not held out: all pictures calibrate and judge.
const LEAST_PROBES: usize = 8;
/// Lowest cosine similarity of the self-test on another CPU: integer layers are equal everywhere, float ones nearly.
const SELF_TEST_COSINE: f32 = 0.999;
const SELF_TEST_SEED: u64 = 1;

/// Converts a model file.
///
/// # Errors
/// [`Error::Usage`] for settings that do not fit the model, else those of the steps.
pub fn convert(source: &Path, settings: &Settings) -> Result<Converted> {
    if settings.precision == Precision::Auto && settings.calibration.is_none() {
        return Err(Error::Usage {
            what: "--precision auto judges INT8 by calibration pictures".into(),
            hint: "add --calib DIR".into(),
        });
    }
    if settings.precision == Precision::Int8 && settings.preset != Preset::Cpu && settings.calibration.is_none() {
        return Err(quantize::no_pictures());
    }
    if settings.target.is_some() && (!settings.precision.tries_int8() || settings.calibration.is_none()) {
        return Err(Error::Usage {
            what: "--max-drop and --min-agreement are measured on calibration pictures of an INT8 model".into(),
            hint: "add --calib DIR, and leave --precision out".into(),
        });
    }
    if settings.calibrator.is_some() && (!settings.precision.tries_int8() || settings.calibration.is_none()) {
        return Err(Error::Usage {
            what: "--calibrator chooses ranges from calibration pictures of an INT8 model".into(),
            hint: "add --calib DIR, and leave --precision out".into(),
        });
    }
    if !settings.keep_float.is_empty() && !settings.precision.tries_int8() {
        return Err(Error::Usage {
            what: format!("--keep-float has no meaning with --precision {}", settings.precision.name()),
            hint: "leave one of them out".into(),
        });
    }
    let float = float(source, settings, None)?;
    let Float {
        mut graph,
        architecture,
        passes,
        pruned,
        mut card,
        output: output_index,
        items,
        whole,
        labelled,
        mut warnings,
        before,
    } = float;
    let (mut layers, mut skipped, mut candidates, mut alone) = (vec![], vec![], vec![], vec![]);
    let mut ground = graph.clone();
    let mut precision = settings.precision;
    let mut verdict = None;
    if precision.tries_int8() {
        let mut tried = card.clone();
        // Before the pictures are run: a name that is wrong is told at once.
        let wish = settings.wish(&graph)?;
        match int8(&graph, items.as_deref(), &mut tried, output_index, whole.as_deref(), &wish, settings) {
            Ok(done) => {
                let judged = Verdict::of(&graph, &done);
                if precision == Precision::Int8 || judged.pays {
                    tried.provenance.passes.push(note(&done));
                    card = tried;
                    (graph, layers, skipped, candidates) = (done.graph, done.layers, done.skipped, done.candidates);
                    (ground, alone) = (done.ground, done.alone);
                    precision = Precision::Int8;
                } else {
                    candidates = done.candidates;
                    precision = Precision::Fp16;
                }
                verdict = (settings.precision == Precision::Auto).then_some(judged);
            }
            // The target is missed, or there is nothing to quantize: float16 it is.
            Err(e @ (Error::Usage { .. } | Error::Unsupported { .. })) if precision == Precision::Auto => {
                precision = Precision::Fp16;
                verdict = Some(Verdict { pays: false, why: format!("INT8 does not pay: {e}") });
            }
            Err(e) => return Err(e),
        }
        card.precision = precision.name().into();
        card.provenance.passes.extend(verdict.iter().map(|v| format!("precision: {}", v.why)));
    }
    match precision {
        Precision::Fp32 | Precision::Int8 | Precision::Auto => {}
        Precision::Fp16 => {
            let halved = quantize::write_f16(&mut graph)?;
            let line = format!("float16: {} constants stored in half the size", halved.tensors);
            card.provenance.passes.push(line);
            if halved.too_large > 0 {
                warnings.push(format!("{} constants stay float32: values beyond float16's 65504", halved.too_large));
            }
        }
    }
    // The self-test is an answer of the file as it will be, so the card goes in first without it.
    card.embed(&mut graph);
    card.self_test = Some(self_test(&graph, output_index)?);
    if let (Some(items), true) = (&items, card.output.kind != "features") {
        let measured = certainty::Measured { model: &graph, float: &before, whole: whole.as_deref(), items, labelled };
        card.certainty = certainty::measure(&measured, &card, output_index, &settings.options)?;
        if card.certainty.as_ref().is_none_or(|c| c.fitted_to != FittedTo::Labels) {
            let why = "the labels of the pictures are not those of the model";
            warnings.push(format!("how often its probabilities come true is not known: {why}"));
        }
    }
    card.embed(&mut graph);
    check::check(&graph)?;
    Ok(Converted {
        graph,
        card,
        architecture,
        passes,
        pruned,
        layers,
        skipped,
        candidates,
        warnings,
        source: before,
        ground,
        alone,
        output: output_index,
        verdict,
        items: items.unwrap_or_default(),
    })
}

/// A float model before it is quantized, and what is known of it.
pub struct Float {
    /// The graph, shrunk as asked.
    pub graph: Graph,
    /// What the source is, at the size asked for.
    pub architecture: Architecture,
    /// Passes that were run.
    pub passes: Vec<PassReport>,
    /// Heads and neurons that left.
    pub pruned: Vec<prune::Line>,
    /// Its card so far.
    pub card: Card,
    /// Index of the output that is the classifier's.
    pub output: usize,
    /// Calibration pictures, the judges last.
    pub items: Option<Vec<Item>>,
    /// The graph at the size asked for, before anything else left it.
    pub before: Graph,
    /// Whether the classes of these are the model's.
    pub labelled: bool,
    /// What the whole model says of each, where the graph is a shrunk one.
    pub whole: Option<Vec<Vec<f32>>>,
    /// What the user should know.
    pub warnings: Vec<String>,
}

/// Prepares and shrinks a model. `known` are the whole model's answers on the calibration pictures, where they were
/// asked for already.
///
/// # Errors
/// As [`convert`].
pub fn float(source: &Path, settings: &Settings, known: Option<&[Vec<f32>]>) -> Result<Float> {
    settings.prune.check(settings.calibration.is_some())?;
    let mut graph = Graph::read(source)?;
    let sha256 = sha256(&files::map(source)?);
    let old = Card::of(&graph).map_err(|e| e.in_file(source))?;
    refuse_converted(old.as_ref(), source)?;
    // Integers of another tool stay; the rest is prepared as always.
    let quantized = qdq::normalize(&mut graph);
    if quantized && settings.precision != Precision::Fp32 {
        return Err(Error::Usage {
            what: format!("{} is quantized already", source.display()),
            hint: "--precision fp32 keeps its integers as they are; or convert the float model it came from".into(),
        });
    }
    let declared = passes::freeze::exported(&graph);
    let passes = passes::prepare(&mut graph, &settings.prepare()).map_err(|e| e.in_file(source))?;
    let architecture = arch::recognise(&graph);
    let mut warnings = vec![];
    let preprocess = preprocess_of(&graph, settings, old.as_ref())?;
    let (output_index, output, width) = output_of(&graph, &mut warnings)?;
    let pictures = match &settings.calibration {
        Some(p) => Some(pick(p, settings.labels.as_deref(), &mut warnings)?),
        None => None,
    };
    let labels = settings
        .labels
        .clone()
        .or_else(|| old.as_ref().map(|c| c.labels.clone()).filter(|l| !l.is_empty()))
        .or_else(|| pictures.as_ref().map(|(set, _)| set.labels.clone()))
        .unwrap_or_default();
    if let Some(classes) = width.filter(|&w| !labels.is_empty() && w != labels.len()) {
        let what = format!("{} labels for {classes} classes of output `{}`", labels.len(), output.name);
        if settings.labels.is_some() {
            let hint = "--labels takes a file with one label a line, in the order of the class indices".into();
            return Err(Error::Usage { what, hint });
        }
        warnings.push(what);
    }
    let mut notes: Vec<String> =
        passes.iter().filter(|p| p.changes > 0).map(|p| format!("{}: {}", p.pass, p.line)).collect();
    let (passes_done, before) = (notes.len(), graph.clone());
    let resized = settings.patch.is_some() || settings.size.is_some_and(|s| declared.is_some_and(|d| d != s));
    let mut pruned = prune::Pruned::default();
    let mut calibration = None;
    if settings.prune != prune::Request::default() {
        let items = pictures.as_ref().map_or(&[][..], |(_, items)| items);
        // Not those that judge.
        let items = &items[..items.len() - held_out(items.len(), settings)];
        let load = |i: usize| load_picture(&items[i].path, &preprocess);
        let pictures = prune::Pictures { load: &load, count: items.len(), output: output_index };
        pruned = prune::prune(&mut graph, &settings.prune, &settings.prices, &pictures, &settings.options)?;
        notes.append(&mut pruned.notes);
        warnings.append(&mut pruned.warnings);
        calibration = Some(calibration_data(items)?);
    }
    if let Some(schedule) = &settings.merge {
        notes.extend(merge::merge(&mut graph, schedule, &architecture)?.note);
    }
    let whole = match &pictures {
        Some((_, items)) if notes.len() > passes_done || resized => Some(match known {
            Some(known) => known.to_vec(),
            None => whole_answers(source, &before, items, &preprocess, output_index, &settings.options)?,
        }),
        _ => None,
    };
    if let (Some(whole), Some((_, items)), false) = (&whole, &pictures, settings.prune.no_repair)
        && output.kind == "logits"
    {
        // Not those that judge.
        let items = &items[..items.len() - held_out(items.len(), settings)];
        let load = items.iter().map(|i| load_picture(&i.path, &preprocess));
        let done = refit::refit(&mut graph, output_index, load, &whole[..items.len()], &settings.options)?;
        if let Some(done) = done {
            notes.push(done.note);
            calibration = Some(calibration_data(items)?);
        }
    }
    let mut card = card_of(source, &architecture, settings, preprocess, output, sha256);
    card.labels = labels;
    (card.provenance.passes, card.provenance.calibration) = (notes, calibration);
    if quantized {
        card.precision = Precision::Int8.name().into();
    }
    let labelled = pictures.as_ref().is_some_and(|(set, _)| width == Some(set.labels.len()));
    let items = pictures.map(|(_, items)| items);
    let (pruned, output) = (pruned.lines, output_index);
    Ok(Float { graph, architecture, passes, pruned, card, output, items, labelled, whole, warnings, before })
}

fn card_of(
    source: &Path,
    architecture: &Architecture,
    settings: &Settings,
    preprocess: Preprocess,
    output: OutputKind,
    sha256: String,
) -> Card {
    Card {
        version: VERSION,
        name: source.file_stem().unwrap_or_default().to_string_lossy().into_owned(),
        architecture: architecture.family.name().into(),
        preprocess,
        output,
        labels: vec![],
        precision: settings.precision.name().into(),
        activations: Activations::Static,
        provenance: Provenance {
            source: source.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            sha256,
            tool: format!("vedge {}", env!("CARGO_PKG_VERSION")),
            ..Provenance::default()
        },
        accuracy: None,
        certainty: None,
        self_test: None,
    }
}

/// A card for a graph that only runs here.
///
/// # Errors
/// [`Error::Usage`] when the preprocessing is not known.
pub(crate) fn bare_card(source: &Path, graph: &Graph, settings: &Settings) -> Result<Card> {
    let old = Card::of(graph)?;
    let preprocess = preprocess_of(graph, settings, old.as_ref())?;
    let output = output_of(graph, &mut vec![])?.1;
    Ok(card_of(source, &arch::recognise(graph), settings, preprocess, output, String::new()))
}

/// What the model said of the pictures before it was shrunk: at its own size where it has one, else `prepared` at the
/// size asked for.
pub(crate) fn whole_answers(
    source: &Path,
    prepared: &Graph,
    items: &[Item],
    preprocess: &Preprocess,
    output: usize,
    options: &Options,
) -> Result<Vec<Vec<f32>>> {
    let mut own = Graph::read(source)?;
    let graph = match passes::prepare(&mut own, &Prepare::default()) {
        Ok(_) => own,
        Err(_) => prepared.clone(),
    };
    let (height, width) = picture_size(&graph)?;
    let preprocess = Preprocess { height, width, ..preprocess.clone() };
    answers("asking the whole model", graph, items, &preprocess, output, options)
}

/// What a model answers to each picture at the output of this index; `what` names the work on the progress bar.
///
/// # Errors
/// Those of decoding the pictures and of running the model.
pub(crate) fn answers(
    what: &'static str,
    graph: Graph,
    items: &[Item],
    preprocess: &Preprocess,
    output: usize,
    options: &Options,
) -> Result<Vec<Vec<f32>>> {
    let mut session = Session::from_graph(graph, options)?;
    let bar = progress::bar(what, items.len());
    let mut answers = vec![];
    for i in items {
        let y = session.run(&[load_picture(&i.path, preprocess)?])?;
        answers.push(y[output].iter().copied().collect());
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(answers)
}

/// How many of so many calibration pictures judge only: the last of them. With very few, each is worth more as a
/// calibration picture than as an impartial judge, and none is held out.
pub(crate) fn held_out(pictures: usize, settings: &Settings) -> usize {
    match (pictures / 4).min(settings.judges.unwrap_or(PROBES)) {
        judges @ LEAST_PROBES.. => judges,
        _ => 0,
    }
}

fn refuse_converted(old: Option<&Card>, source: &Path) -> Result<()> {
    match old {
        Some(c) if c.precision == "int8" => Err(Error::Usage {
            what: format!("{} is INT8 already", source.display()),
            hint: format!("convert the float model it came from: {}", c.provenance.source),
        }),
        _ => Ok(()),
    }
}

/// The one picture input's preprocessing.
fn preprocess_of(graph: &Graph, settings: &Settings, old: Option<&Card>) -> Result<Preprocess> {
    let size = picture_size(graph)?;
    let mut p = match (&settings.preprocess, old) {
        (Some(name), _) => preset::resolve(name, size)?,
        (None, Some(card)) => Preprocess { height: size.0, width: size.1, ..card.preprocess.clone() },
        (None, None) => return Err(preset::missing()),
    };
    p.mean = settings.mean.unwrap_or(p.mean);
    p.std = settings.std.unwrap_or(p.std);
    preset::check(&p).map_err(|what| Error::Usage { what, hint: String::new() })?;
    Ok(p)
}

/// Height and width of the input.
///
/// # Errors
/// [`Error::Unsupported`] when it is not one float input `[1, 3, H, W]`.
pub fn picture_size(graph: &Graph) -> Result<(usize, usize)> {
    let unsupported = |what| Error::Unsupported {
        what,
        hint: "vedge converts picture classifiers with one input [1, 3, height, width]".into(),
    };
    let [input] = graph.inputs.as_slice() else {
        return Err(unsupported(format!("the model has {} inputs", graph.inputs.len())));
    };
    match graph.shape(input.name()).as_deref() {
        Some([1, 3, h, w]) => Ok((*h, *w)),
        Some(other) => Err(unsupported(format!("input `{}` has shape {other:?}", input.name()))),
        None => Err(Error::Unsupported {
            what: format!("input `{}` has no fixed shape", input.name()),
            hint: "give the resolution: --size N or --size HxW".into(),
        }),
    }
}

/// Which output is the classifier's: index, meaning, number of classes.
fn output_of(graph: &Graph, warnings: &mut Vec<String>) -> Result<(usize, OutputKind, Option<usize>)> {
    let index = graph.outputs.iter().position(|o| o.name() == "logits").unwrap_or(0);
    let output = graph.outputs.get(index).ok_or_else(|| Error::BadModel("the model has no output".into()))?;
    let name = output.name().to_string();
    if graph.outputs.len() > 1 {
        warnings.push(format!("the model has {} outputs, `{name}` is read", graph.outputs.len()));
    }
    let width = match graph.shape(&name).as_deref() {
        Some([1, n]) => Some(*n),
        _ => None,
    };
    let softmax = graph.nodes.iter().any(|n| n.op_type() == "Softmax" && n.output.contains(&name));
    let kind = match width {
        None => {
            let shape = graph.shape(&name).unwrap_or_default();
            warnings.push(format!("output `{name}` of shape {shape:?} holds features, not class scores"));
            "features"
        }
        Some(_) if softmax => "probabilities",
        Some(_) => "logits",
    };
    Ok((index, OutputKind { name, kind: kind.into() }, width))
}

fn pick(p: &Pictures, labels: Option<&[String]>, warnings: &mut Vec<String>) -> Result<(Dataset, Vec<Item>)> {
    if p.count == 0 {
        return Err(Error::Usage { what: "--calib-count 0: nothing to calibrate with".into(), hint: String::new() });
    }
    let set = Dataset::open(&p.dir, labels)?;
    if set.ignored > 0 {
        let files = counted(set.ignored, "file");
        warnings.push(format!("{files} in {} ignored: no picture", p.dir.display()));
    }
    let items = set.pick(p.count);
    if items.len() < 16 {
        warnings.push(format!("only {} calibration pictures: 32 or more give better ranges", items.len()));
    }
    Ok((set, items))
}

/// The input tensor of a picture file.
///
/// # Errors
/// Those of decoding, naming the file.
pub fn load_picture(path: &Path, how: &Preprocess) -> Result<ArrayD<f32>> {
    let picture = decode_file(path).map_err(|e| e.in_file(path))?;
    to_tensor(&picture, how).map_err(|e| e.in_file(path))
}

/// The line about quantization in the card.
fn note(done: &Quantized) -> String {
    let how = match done.candidates.as_slice() {
        [] => "activations row by row at run time".into(),
        [chosen, others @ ..] => {
            let of = |kind| others.iter().find(move |c| c.activations != chosen.activations && c.activations == kind);
            let other = of(Activations::Static).or_else(|| of(Activations::PerToken));
            chosen.describe() + &other.map_or(String::new(), |c| format!(", chosen over {}", c.describe()))
        }
    };
    let kept = match done.skipped.iter().filter(|s| s.reason == keep::REASON).count() {
        0 => String::new(),
        n => format!(", {n} of them as asked for"),
    };
    let float = match done.skipped.len() {
        0 => String::new(),
        n => format!(", {n} left in float{kept}"),
    };
    format!("int8: {} layers, weights per channel, {how}{float}", done.layers.len())
}

fn calibration_data(items: &[Item]) -> Result<CalibrationData> {
    Ok(CalibrationData { pictures: items.len(), sha256: dataset::fingerprint(items)? })
}

/// Quantizes, and tells the card how well that went.
fn int8(
    graph: &Graph,
    items: Option<&[Item]>,
    card: &mut Card,
    output: usize,
    whole: Option<&[Vec<f32>]>,
    wish: &Wish,
    settings: &Settings,
) -> Result<Quantized> {
    let evidence = items.map(|items| observe(graph, items, card, output, settings)).transpose()?;
    let done = quantize::quantize(graph, wish, evidence.as_ref(), card, &settings.options)?;
    if done.layers.is_empty() {
        return Err(Error::Unsupported {
            what: "the model has no Conv, Gemm or MatMul with a constant weight: nothing to quantize".into(),
            hint: "vedge inspect MODEL shows what it is made of".into(),
        });
    }
    card.activations = done.activations;
    if let (Some(items), Some(e), Some(effect)) = (items, &evidence, done.effect) {
        // Pruning has read the same pictures already.
        if card.provenance.calibration.is_none() {
            card.provenance.calibration = Some(calibration_data(items)?);
        }
        if card.output.kind != "features" {
            let (mut float_top1, mut effect) = (e.probes.float_top1(), effect);
            // Of a shrunk model the losses count that shrinking made, too.
            if let Some(whole) = whole {
                let reference = whole[whole.len() - e.probes.inputs.len()..].to_vec();
                let probes = Probes {
                    reference,
                    inputs: e.probes.inputs.clone(),
                    classes: e.probes.classes.clone(),
                    ..e.probes
                };
                let mut graph = done.graph.clone();
                card.embed(&mut graph);
                let bar = progress::bar("comparing with the whole model", probes.inputs.len());
                effect = probes.judge(&graph, &settings.options, &bar, f64::NEG_INFINITY)?;
                bar.finish_and_clear();
                float_top1 = probes.float_top1();
            }
            card.accuracy = Some(Accuracy {
                measured_on: e.probes.measured_on().into(),
                pictures: e.probes.inputs.len(),
                float_top1: float_top1 as f32,
                top1: effect.top1 as f32,
                agreement: effect.agreement as f32,
                sqnr_db: Some(effect.sqnr as f32),
            });
        }
    }
    Ok(done)
}

/// What to observe for the layers of a model. Moments are kept of the smallest inputs first, up to [`MOMENTS`] bytes.
fn taps(graph: &Graph) -> Vec<Tap> {
    let mut wanted: BTreeMap<String, BTreeSet<View>> = BTreeMap::new();
    for l in quantize::layers::find(graph).0 {
        wanted.entry(l.activation).or_default().extend(l.view);
    }
    let size =
        |value: &str, view| input_moments::bytes(&graph.shape(value).unwrap_or_default(), view).unwrap_or(usize::MAX);
    let sizes: Vec<usize> = wanted.iter().flat_map(|(v, views)| views.iter().map(|w| size(v, *w))).collect();
    let up_to = |limit: usize| sizes.iter().filter(|s| **s <= limit).fold(0usize, |sum, s| sum.saturating_add(*s));
    let largest = sizes.iter().copied().filter(|s| up_to(*s) <= MOMENTS).max().unwrap_or(0);
    let keep = |value: &str, views: BTreeSet<View>| views.into_iter().filter(|v| size(value, *v) <= largest).collect();
    wanted.into_iter().map(|(value, views)| Tap { views: keep(&value, views), value }).collect()
}

/// Runs the float model on the calibration pictures: the last quarter becomes judges, the others are observed.
fn observe(graph: &Graph, items: &[Item], card: &Card, output: usize, settings: &Settings) -> Result<Evidence> {
    let judges = held_out(items.len(), settings);
    let held_out = judges > 0;
    let (observed, probes) = match held_out {
        true => items.split_at(items.len() - judges),
        false => (items, items),
    };
    let taps = taps(graph);
    let bar = progress::bar("calibrating", observed.len() + probes.len());
    let mut cache = settings.cache.as_deref().map(|dir| cache_of(dir, graph, &taps, observed, card)).transpose()?;
    let known = cache.as_ref().map(Cache::load).unwrap_or_default();
    let done = known.pictures.min(observed.len());
    bar.inc(done as u64);
    let inputs = observed[done..].iter().map(|i| load_picture(&i.path, &card.preprocess));
    // A cache that cannot be written is no reason to stop.
    let mut warned = None;
    let statistics = collect(graph, &taps, known, inputs, &settings.options, |known, _| {
        bar.inc(1);
        if let Some(cache) = &mut cache {
            let last = known.pictures == observed.len();
            let saved = if last { cache.save(known) } else { cache.save_now_and_then(known) };
            warned = warned.take().or(saved.err());
        }
    })?;
    if let Some(e) = warned {
        log(&format!("statistics are not kept: {e} (--no-cache avoids this)"));
    }
    let mut session = Session::from_graph(graph.clone(), &settings.options)?;
    let (mut inputs, mut reference) = (vec![], vec![]);
    for i in probes {
        let x = load_picture(&i.path, &card.preprocess)?;
        let y = session.run(std::slice::from_ref(&x))?;
        reference.push(y[output].iter().copied().collect());
        inputs.push(x);
        bar.inc(1);
    }
    bar.finish_and_clear();
    let classes = probes.iter().map(|i| i.class).collect();
    let probabilities = card.output.kind == "probabilities";
    let pictures = observed.iter().take(CORRECTING).map(|i| load_picture(&i.path, &card.preprocess));
    let pictures = pictures.collect::<Result<Vec<_>>>()?;
    Ok(Evidence {
        statistics: statistics.into(),
        pictures,
        probes: Probes { inputs, reference, classes, output, probabilities, held_out },
    })
}

/// The cache of everything that statistics depend on: the float graph, what is observed, the pictures, how they are read.
fn cache_of(dir: &Path, graph: &Graph, taps: &[Tap], items: &[Item], card: &Card) -> Result<Cache> {
    let model = sha256(&graph.encode());
    let pictures = dataset::fingerprint(items)?;
    let how = format!("{taps:?} {:?} {}", card.preprocess, env!("CARGO_PKG_VERSION"));
    Ok(Cache::of(dir, &[model.as_bytes(), pictures.as_bytes(), how.as_bytes()]))
}

fn log(line: &str) {
    eprintln!("warning: {line}");
}

impl Settings {
    fn wish(&self, graph: &Graph) -> Result<Wish> {
        let keep = keep::named(graph, &quantize::layers::find(graph).0, &self.keep_float)?;
        let Settings { preset, calibrator, target, explain, .. } = *self;
        Ok(Wish { preset, calibrator, target, explain, keep })
    }
}

fn self_test(graph: &Graph, output: usize) -> Result<SelfTest> {
    // Defaults, as on the board, whatever the conversion ran with.
    let mut session = Session::from_graph(graph.clone(), &Options::default())?;
    let shape = session.inputs()[0].shape.clone();
    let values = SelfTest::input(SELF_TEST_SEED, shape.iter().product());
    let x = ArrayD::from_shape_vec(shape, values).map_err(|e| Error::Shape(e.to_string()))?;
    let y = session.run(&[x])?;
    Ok(SelfTest { seed: SELF_TEST_SEED, logits: y[output].iter().copied().collect(), min_cosine: SELF_TEST_COSINE })
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests;

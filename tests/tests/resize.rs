//! Another resolution than the exported one: equal to what timm does (`tests/reference/resize.py`), or refused.

use anyhow::{Context, Result};
use ndarray::ArrayD;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use vedge_converter::passes::positions::resample;
use vedge_converter::passes::{Prepare, patch, prepare};
use vedge_runtime::onnx::Graph;
use vedge_runtime::{Error, Options, Session};
use vedge_tests::zoo;

fn reference(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("reference/resize").join(name)
}

fn json<T: serde::de::DeserializeOwned>(name: &str) -> Result<T> {
    Ok(serde_json::from_str(&std::fs::read_to_string(reference(name)).context("tests/reference/resize.py makes it")?)?)
}

#[derive(Deserialize)]
struct Grid {
    prefix: usize,
    old: (usize, usize),
    new: (usize, usize),
    width: usize,
    seed: u64,
    after: Vec<f32>,
}

#[test]
fn positions_equal_timm() -> Result<()> {
    for g in json::<Vec<Grid>>("positions.json")? {
        let before = zoo::generate(g.seed, 0.0, 1.0, (g.prefix + g.old.0 * g.old.1) * g.width);
        let after = resample(&before, g.prefix, g.width, g.old, g.new);
        assert_eq!(after.len(), g.after.len());
        for (i, (a, b)) in after.iter().zip(&g.after).enumerate() {
            assert!((a - b).abs() < 5e-6, "{:?} to {:?}: value {i} is {a}, timm has {b}", g.old, g.new);
        }
    }
    Ok(())
}

#[derive(Deserialize)]
struct Kernel {
    old: (usize, usize),
    new: (usize, usize),
    seed: u64,
    after: Vec<f32>,
}

#[test]
fn patch_kernels_equal_timm() -> Result<()> {
    for k in json::<Vec<Kernel>>("kernels.json")? {
        let before = zoo::generate(k.seed, 0.0, 1.0, 2 * k.old.0 * k.old.1);
        let after = patch::resample(&before, k.old, k.new);
        assert_eq!(after.len(), k.after.len());
        let largest = k.after.iter().fold(0f32, |m, v| m.max(v.abs()));
        for (i, (a, b)) in after.iter().zip(&k.after).enumerate() {
            assert!((a - b).abs() < 1e-5 * largest, "{:?} to {:?}: value {i} is {a}, timm has {b}", k.old, k.new);
        }
    }
    Ok(())
}

#[derive(Deserialize)]
struct Answer {
    model: String,
    size: (usize, usize),
    patch: Option<(usize, usize)>,
    logits: Vec<f32>,
}

fn run(graph: Graph, size: (usize, usize)) -> Result<ArrayD<f32>> {
    run_as(graph, size, None)
}

fn run_as(mut graph: Graph, size: (usize, usize), patch: Option<(usize, usize)>) -> Result<ArrayD<f32>> {
    prepare(&mut graph, &Prepare { size: Some(size), patch })?;
    let mut session = Session::from_graph(graph, &Options::default())?;
    Ok(session.run(&[zoo::input(&[1, 3, size.0, size.1])])?.swap_remove(0))
}

#[test]
fn resized_models_equal_timm() -> Result<()> {
    let answers: Vec<Answer> = json("models.json")?;
    assert!(answers.len() >= 16);
    for a in answers {
        for exporter in ["ts", "dynamo"] {
            let name = format!("{}.{exporter}.onnx", a.model);
            let what = || format!("{name} {:?} {:?}", a.size, a.patch);
            let logits = run_as(Graph::read(&reference(&name))?, a.size, a.patch).with_context(what)?;
            let largest = a.logits.iter().fold(0f32, |m, v| m.max(v.abs()));
            for (x, y) in logits.iter().zip(&a.logits) {
                assert!((x - y).abs() < 1e-4 * largest, "{}: {logits} where timm has {:?}", what(), a.logits);
            }
        }
    }
    Ok(())
}

fn refusal(mut graph: Graph, size: Option<(usize, usize)>) -> String {
    match prepare(&mut graph, &Prepare { size, ..Prepare::default() }) {
        Ok(reports) => panic!("accepted: {reports:?}"),
        Err(e) => format!("{e}\nhint: {}", e.hint().unwrap_or("none")),
    }
}

#[test]
fn a_size_off_the_patch_grid_is_refused_with_the_nearest() -> Result<()> {
    let vit = || Graph::read(&reference("vit.ts.onnx"));
    insta::assert_snapshot!(refusal(vit()?, Some((50, 48))), @r"
    height 50 is no multiple of the patch size 8 of node `/patch_embed/proj/Conv` (Conv)
    hint: the nearest sizes that fit: 48 or 56x48
    ");
    insta::assert_snapshot!(refusal(vit()?, Some((48, 5))), @r"
    width 5 is no multiple of the patch size 8 of node `/patch_embed/proj/Conv` (Conv)
    hint: the nearest sizes that fit: 48x8
    ");
    insta::assert_snapshot!(refusal(vit()?, Some((0, 8))), @r"
    height 0 is no picture size
    hint: give a --size between 1 and 8192
    ");
    insta::assert_snapshot!(refusal(vit()?, Some((8, 80_000))), @r"
    width 80000 is no picture size
    hint: give a --size between 1 and 8192
    ");
    Ok(())
}

#[test]
fn what_cannot_follow_is_refused_by_name() -> Result<()> {
    insta::assert_snapshot!(refusal(zoo::load("mobilevit_xxs.ts")?, Some((260, 260))), @r"
    this export cannot be resized: node `/stages/stages.2/stages.2.1/Reshape` (Reshape): 33 does not divide into parts of 2
    hint: the nearest sizes that fit: 256 or 320
    ");
    insta::assert_snapshot!(refusal(zoo::load("coatnet_nano_rw.dynamo")?, Some((256, 256))), @r"
    this export cannot be resized: node `node_Add_657` (Add): its constant `unsqueeze_6` [1, 8, 49, 49] (no bias by relative position) follows the size
    hint: the nearest sizes that fit: 224
    ");
    insta::assert_snapshot!(refusal(zoo::load("hf_detr_small.ts")?, Some((352, 352))), @r"
    this export cannot be resized: node `/m/model/encoder/layers.1/self_attn/Add` (Add): positions are added in more than one place
    hint: the nearest sizes that fit: 320
    ");
    insta::assert_snapshot!(refusal(zoo::load("hf_vivit_small.ts")?, Some((128, 128))), @r"
    this export cannot be resized: node `/m/vivit/embeddings/Add` (Add): 197 positions are no patch grid with at most 2 tokens before it
    hint: the nearest sizes that fit: 112
    ");
    insta::assert_snapshot!(refusal(zoo::load("mobilevit_xxs_dynHW.ts")?, None), @r"
    input `input` has no fixed height and width
    hint: give the resolution: --size N, or --size HEIGHTxWIDTH
    ");
    Ok(())
}

/// MobileViT with free sizes, frozen at one size and then resized to another, equals the one frozen there at once.
#[test]
fn a_fixed_mobilevit_equals_the_one_with_free_sizes() -> Result<()> {
    for name in ["mobilevit_xxs_dynHW.dynamo", "mobilevit_xxs_dynHW.ts"] {
        let mut fixed = zoo::load(name)?;
        prepare(&mut fixed, &Prepare { size: Some((256, 256)), ..Prepare::default() })?;
        for size in [(320, 320), (192, 320), (256, 192)] {
            let free = run(zoo::load(name)?, size).with_context(|| format!("{name} at {size:?}"))?;
            let resized = run(fixed.clone(), size).with_context(|| format!("{name} from 256 to {size:?}"))?;
            let largest = free.iter().fold(0f32, |m, v| m.max(v.abs()));
            let difference = (&resized - &free).iter().fold(0f32, |m, v| m.max(v.abs()));
            assert!(difference < 1e-4 * largest, "{name} at {size:?}: {difference} of {largest}");
        }
    }
    Ok(())
}

/// Patches that a graph has already change nothing, and what cuts no patches is told so.
#[test]
fn patches_of_another_size() -> Result<()> {
    let read = |name: &str| Graph::read(&reference(name));
    let same = run_as(read("vit.ts.onnx")?, (32, 32), Some((8, 8)))?;
    assert_eq!(same, run(read("vit.ts.onnx")?, (32, 32))?);
    let refused = |mut graph: Graph, size, patch| match prepare(&mut graph, &Prepare { size, patch: Some(patch) }) {
        Ok(reports) => panic!("accepted: {reports:?}"),
        Err(e) => format!("{e}\nhint: {}", e.hint().unwrap_or("none")),
    };
    insta::assert_snapshot!(refused(read("vit.ts.onnx")?, None, (12, 12)), @r"
    height 32 is no multiple of the patch size 12 of --patch
    hint: the nearest sizes that fit: 24 or 36
    ");
    insta::assert_snapshot!(refused(read("coatnet.ts.onnx")?, Some((32, 32)), (4, 4)), @r"
    node `/stem/conv1/Conv` (Conv) is no patch embedding: its strides are not the size of its kernel
    hint: leave --patch out: --size alone makes such a model smaller, too
    ");
    Ok(())
}

/// A graph whose input is dynamic but whose positions are not takes their size where none is given.
#[test]
fn the_size_of_the_positions_is_taken_where_none_is_given() -> Result<()> {
    let mut graph = zoo::load("deit_tiny_fixedimg_dynHW.ts")?;
    let reports = prepare(&mut graph, &Prepare { size: None, ..Prepare::default() })?;
    assert!(reports.iter().any(|r| r.line.contains("224x224 being the size of its positions")), "{reports:?}");
    assert_eq!(graph.inputs[0].fixed().map(|f| f.1), Some(vec![1, 3, 224, 224]));
    Ok(())
}

/// Every graph of the zoo at half as much again: it runs, or it says why not.
#[test]
fn no_graph_of_the_zoo_panics_or_contradicts_itself_at_another_size() -> Result<()> {
    for name in zoo::names()? {
        let shape = zoo::expected(&name)?.input.shape;
        let [.., h, w] = shape[..] else { continue };
        let mut graph = zoo::load(&name)?;
        match prepare(&mut graph, &Prepare { size: Some((h + h / 2 / 32 * 32, w)), ..Prepare::default() }) {
            Ok(_) => {
                let input = graph.inputs[0].fixed().context("fixed")?.1;
                println!("{name}: {input:?}");
                match Session::from_graph(graph, &Options::default()) {
                    Ok(mut session) => {
                        let y = session.run(&[zoo::input(&input)])?;
                        assert!(y[0].iter().all(|v| v.is_finite()), "{name}");
                    }
                    Err(Error::Unsupported { what, .. }) => println!("{name}: {what}"),
                    Err(e) => panic!("{name}: {e}"),
                }
            }
            Err(Error::Unsupported { what, hint }) if !hint.is_empty() => println!("{name}: {what}"),
            Err(Error::Usage { what, hint }) if !hint.is_empty() => println!("{name}: {what}"),
            Err(e) => panic!("{name}: {e}"),
        }
    }
    Ok(())
}

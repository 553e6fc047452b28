use super::*;
use crate::arch;
use crate::passes::{Prepare, prepare};
use ndarray::ArrayD;
use std::path::Path;
use vedge_runtime::model::card::SelfTest;
use vedge_runtime::session::How;
use vedge_runtime::{Options, Session};

fn prepared(file: &str) -> Graph {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(file);
    let mut graph = Graph::read(&path).unwrap();
    prepare(&mut graph, &Prepare::default()).unwrap();
    graph
}

fn merged(file: &str, schedule: &str) -> (Graph, Merging) {
    let mut graph = prepared(file);
    let architecture = arch::recognise(&graph);
    let done = merge(&mut graph, &Schedule::parse(schedule).unwrap(), &architecture).unwrap();
    crate::check::check(&graph).unwrap();
    (graph, done)
}

fn run(graph: &Graph, fuse: bool) -> (Vec<f32>, Session) {
    let options = Options { fuse, ..Options::default() };
    let mut session = Session::from_graph(graph.clone(), &options).unwrap();
    let shape = session.inputs()[0].shape.clone();
    let x = ArrayD::from_shape_vec(shape.clone(), SelfTest::input(3, shape.iter().product())).unwrap();
    (session.run(&[x]).unwrap()[0].iter().copied().collect(), session)
}

#[test]
fn schedules() {
    let parse = |s| Schedule::parse(s);
    assert_eq!(parse("8"), Ok(Schedule::Every(8)));
    assert_eq!(parse("8,8,4"), Ok(Schedule::Blocks(vec![8, 8, 4])));
    assert_eq!(parse("16x3,8x1,2"), Ok(Schedule::Blocks(vec![16, 16, 16, 8, 2])));
    for bad in ["", "a", "8,", "-1", "8x", "1x9999999"] {
        assert!(parse(bad).is_err(), "{bad}");
    }
    assert_eq!(Schedule::Blocks(vec![3]).of(2).unwrap(), [3, 0]);
    assert!(Schedule::Blocks(vec![3; 3]).of(2).is_err());
}

#[test]
fn merging_nothing_is_the_identity() {
    let graph = prepared("models/deit_nano.onnx");
    let (same, done) = merged("models/deit_nano.onnx", "0");
    assert_eq!(graph.encode(), same.encode());
    assert_eq!((done.tokens, done.last, done.note), (vec![66; 8], 66, None));
}

/// The fused operators and the standard ones, of models with one, two and no protected tokens, pooled by their mean.
#[test]
fn the_fused_operators_equal_the_standard_ones() {
    for (file, schedule, tokens) in [
        ("models/deit_nano.onnx", "5", vec![66, 61, 56, 51, 46, 41, 36, 31, 26]),
        ("models/deit_nano.onnx", "0,0,40,3", vec![66, 66, 66, 34, 31, 31, 31, 31, 31]),
        ("tests/reference/resize/vit.ts.onnx", "4,1", vec![17, 13, 12]),
        ("tests/reference/resize/vit.dynamo.onnx", "8,4", vec![17, 9, 5]),
        ("tests/reference/resize/distilled.ts.onnx", "3,3", vec![18, 15, 12]),
        ("tests/reference/resize/mean.ts.onnx", "5,5", vec![16, 11, 6]),
        ("tests/reference/resize/mean.dynamo.onnx", "3", vec![16, 13, 10]),
        ("tests/reference/resize/late.dynamo.onnx", "3", vec![17, 14, 11]),
    ] {
        let (graph, done) = merged(file, schedule);
        assert_eq!([done.tokens, vec![done.last]].concat(), tokens, "{file}");
        let (fused, session) = run(&graph, true);
        let (plain, _) = run(&graph, false);
        let (whole, _) = run(&prepared(file), true);
        let largest = plain.iter().fold(0f32, |m, v| m.max(v.abs()));
        for (a, b) in fused.iter().zip(&plain) {
            assert!((a - b).abs() < 1e-4 * largest, "{file}: {fused:?} {plain:?}");
        }
        assert!(fused.iter().zip(&whole).any(|(a, b)| (a - b).abs() > 1e-4 * largest), "{file}: nothing was merged");
        let lines = session.plan();
        let count = |class: &str| lines.iter().filter(|l| l.class == class).count();
        let merges = tokens.windows(2).filter(|w| w[0] != w[1]).count();
        // Tokens and sizes; those behind the last block may not be needed.
        assert_eq!(count("match"), merges, "{file}: {lines:#?}");
        assert!((2 * merges - 1..=2 * merges).contains(&count("merge")), "{file}: {lines:#?}");
        assert_eq!(count("attention"), tokens.len() - 1, "{file}: {lines:#?}");
        // What the file spells out is gone: all that runs outside of our operators is the logarithm of the sizes.
        let plain = lines.iter().filter(|l| l.how == How::Tract && l.name.contains(".merge")).map(|l| l.class.as_str());
        assert!(plain.clone().all(|c| c == "Log" || c == "Mul"), "{file}: {:?}", plain.collect::<Vec<_>>());
    }
}

/// Equal tokens: merging them changes nothing, since the one that is left counts as often as they did.
#[test]
fn merging_equal_tokens_changes_nothing() {
    let file = "tests/reference/resize/mean.ts.onnx";
    let (graph, whole) = (merged(file, "6,3").0, prepared(file));
    let answer = |graph: &Graph, positions: bool| {
        let mut graph = graph.clone();
        // Without positions, a picture of one colour is sixteen equal tokens.
        if !positions {
            let add = graph
                .nodes
                .iter()
                .find(|n| n.op_type() == "Add" && n.input.iter().any(|i| graph.initializers.contains_key(i)))
                .unwrap();
            let name = add.input.iter().find(|i| graph.initializers.contains_key(*i)).unwrap().clone();
            let shape = shape_of(&graph.initializers[&name]);
            let zeros = vec![0.0; shape.iter().product()];
            graph.initializers.insert(name.clone(), vedge_runtime::onnx::f32_tensor(&name, &shape, &zeros));
        }
        let mut session = Session::from_graph(graph, &Options::default()).unwrap();
        let x = ArrayD::from_elem(vec![1, 3, 32, 32], 0.7);
        session.run(&[x]).unwrap()[0].iter().copied().collect::<Vec<f32>>()
    };
    let near = |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4 * b.abs().max(0.1));
    assert!(near(&answer(&graph, false), &answer(&whole, false)));
    assert!(!near(&answer(&graph, true), &answer(&whole, true)));
}

#[test]
fn what_cannot_be_merged_is_refused_by_name() {
    let mut graph = prepared("models/mobilevit_nano.onnx");
    let mut architecture = arch::recognise(&graph);
    let mut refusal = |architecture: &Architecture| {
        let e = merge(&mut graph, &Schedule::Every(4), architecture).unwrap_err();
        format!("{e}; {}", e.hint().unwrap_or_default())
    };
    let e = refusal(&architecture);
    assert!(e.contains("(mobilevit) folds its tokens") && e.contains("--prune-mlp"), "{e}");
    architecture.family = Family::Swin;
    let e = refusal(&architecture);
    assert!(e.contains("(swin) attends inside of windows"), "{e}");
    let mut graph = prepared("models/deit_nano.onnx");
    let architecture = arch::recognise(&graph);
    let e = merge(&mut graph, &Schedule::Blocks(vec![1; 9]), &architecture).unwrap_err().to_string();
    assert!(e.contains("9 blocks") && e.contains("has 8"), "{e}");
}

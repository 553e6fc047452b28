use super::*;
use crate::passes::{Prepare, prepare};
use std::path::Path;

fn prepared(name: &str) -> Graph {
    let mut g = Graph::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../models").join(name)).unwrap();
    prepare(&mut g, &Prepare::default()).unwrap();
    g
}

/// Pictures of smooth noise.
fn picture(seed: usize) -> ArrayD<f32> {
    ArrayD::from_shape_fn(ndarray::IxDyn(&[1, 3, 64, 64]), |i| {
        let at = (i[2] / 5 * 7 + i[3] / 3 * 11 + i[1] + seed * 13) as f32;
        (at * 0.7).sin() * 1.5 + ((at * 0.31 + seed as f32) * 1.7).cos()
    })
}

fn answers(g: &Graph, count: usize) -> Vec<ArrayD<f32>> {
    let mut s = Session::from_graph(g.clone(), &Options::default()).unwrap();
    (0..count).map(|i| s.run(&[picture(100 + i)]).unwrap().swap_remove(0)).collect()
}

fn pruned(g: &Graph, request: Request) -> (Graph, Pruned) {
    let mut g = g.clone();
    let pictures = Pictures { load: &|i| Ok(picture(i)), count: 24, output: 0 };
    let done = prune(&mut g, &request, &Prices::new(), &pictures, &Options::default()).unwrap();
    crate::check::check(&g).unwrap();
    (g, done)
}

fn far(a: &[ArrayD<f32>], b: &[ArrayD<f32>]) -> f64 {
    a.iter().zip(b).map(|(a, b)| divergence(&logits(a), &logits(b), false)).sum::<f64>() / a.len() as f64
}

#[test]
fn heads_and_neurons_leave_and_the_repair_pays() {
    for (name, blocks) in [("deit_nano.onnx", 8), ("mobilevit_nano.onnx", 0)] {
        let g = prepared(name);
        let whole = answers(&g, 12);
        let parameters = crate::arch::recognise(&g).parameters;
        for (request, kind) in [
            (Request { neurons: Some(30.0), ..Request::default() }, Kind::Neurons),
            (Request { heads: Some(25.0), ..Request::default() }, Kind::Heads),
        ] {
            let units = unit::find(&g, kind).0;
            assert!(units.len() >= blocks.max(2), "{name}: {} units", units.len());
            let (repaired, done) = pruned(&g, request);
            let (plain, _) = pruned(&g, Request { no_repair: true, ..request });
            let smaller = crate::arch::recognise(&repaired).parameters;
            assert!((smaller as f64) < 0.97 * parameters as f64, "{name}: {smaller} of {parameters}");
            assert!(done.lines.iter().all(|l| l.after < l.before && l.after > 0));
            let (with, without) = (far(&whole, &answers(&repaired, 12)), far(&whole, &answers(&plain, 12)));
            println!("{name} {kind:?}: KL {with:.4} with repair, {without:.4} without; {}", done.notes[0]);
            assert!(with < 0.5 * without, "{name} {kind:?}: {with} against {without}");
        }
    }
}

/// A neuron that is always the same moves into the bias.
#[test]
fn what_is_constant_leaves_without_a_trace() {
    let g = prepared("deit_nano.onnx");
    let u = unit::find(&g, Kind::Neurons).0.swap_remove(3);
    let dead = [5, 77, 300];
    let mut constant = g.clone();
    // Without weights before them, these neurons are the GELU of their bias.
    let uses = vedge_runtime::onnx::Uses::of(&g);
    let start = uses.producer(&u.starts[0].0).unwrap();
    let weight = g.nodes[start].input[1].clone();
    let mut values = g.const_f32(&weight).unwrap();
    for row in values.chunks_exact_mut(u.groups) {
        dead.iter().for_each(|&d| row[d] = 0.0);
    }
    let shape = vedge_runtime::onnx::shape_of(&g.initializers[&weight]);
    constant.initializers.insert(weight.clone(), vedge_runtime::onnx::f32_tensor(&weight, &shape, &values));
    let load = (0..8).map(|i| Ok(picture(i)));
    let seen = moments(&constant, std::slice::from_ref(&u.input), load, &Options::default(), |_, _| {}).unwrap();
    let before = u.weights(&constant).unwrap();
    let m = &seen[&u.input];
    let (weights, bias) = eliminate::repair(&m.covariance(), &m.mean(), &before, &dead, RIDGE).unwrap();
    let mut smaller = constant.clone();
    u.remove(&mut smaller, &dead, Some((&weights, &bias))).unwrap();
    shapes::annotate(&mut smaller).unwrap();
    for (a, b) in answers(&constant, 6).iter().zip(&answers(&smaller, 6)) {
        assert!((a - b).iter().all(|d| d.abs() < 2e-3), "{a} {b}");
    }
}

#[test]
fn nothing_asked_is_nothing_done() {
    let g = prepared("deit_nano.onnx");
    let (same, done) = pruned(&g, Request { neurons: Some(0.0), heads: Some(0.0), no_repair: false });
    assert_eq!(answers(&g, 2), answers(&same, 2));
    assert!(done.lines.is_empty());
}

/// Where blocks of one kind take longer than their multiply-accumulates say, they lose more.
#[test]
fn what_takes_longer_leaves_first() {
    let g = prepared("deit_nano.onnx");
    let pictures = Pictures { load: &|i| Ok(picture(i)), count: 8, output: 0 };
    let layers: Vec<String> = unit::find(&g, Kind::Neurons).0.into_iter().map(|u| u.name).collect();
    let left = |prices: &Prices| {
        let request = Request { neurons: Some(20.0), ..Request::default() };
        let done = prune(&mut g.clone(), &request, prices, &pictures, &Options::default()).unwrap();
        let lines = done.lines.into_iter().filter(|l| l.layer == layers[2]);
        lines.map(|l| l.before - l.after).sum::<usize>()
    };
    let even: Prices = layers.iter().map(|l| (l.clone(), 1e-3)).collect();
    let mut slow = even.clone();
    slow.insert(layers[2].clone(), 1e-2);
    assert_eq!(left(&even), left(&Prices::new()));
    assert!(left(&slow) > left(&even), "{} and {}", left(&slow), left(&even));
    // One that is not priced: all are taken by their multiply-accumulates.
    slow.remove(&layers[0]);
    assert_eq!(left(&slow), left(&even));
}

/// A head whose values do not depend on the picture is the first to leave, and the whole graph answers as before.
#[test]
fn a_head_of_constant_output_leaves_the_graph_without_a_trace() {
    for name in ["deit_nano.onnx", "mobilevit_nano.onnx"] {
        let mut g = prepared(name);
        let units = unit::find(&g, Kind::Heads).0;
        let total: f64 = units.iter().map(|u| u.price * u.groups as f64).sum();
        let u = &units[1];
        let head = u.groups - 1;
        // Without weights its values are their bias, whatever is attended to.
        let uses = vedge_runtime::onnx::Uses::of(&g);
        let [(start, outside)] = u.starts.as_slice() else { panic!("{name}: q, k, v come from one layer") };
        let weight = g.nodes[uses.producer(start).unwrap()].input[1].clone();
        let shape = vedge_runtime::onnx::shape_of(&g.initializers[&weight]);
        let (columns, inside) = (shape[1], shape[1] / u.groups / outside);
        let first = (outside - 1) * columns / outside + (head + 1) * inside - u.width;
        let mut values = g.const_f32(&weight).unwrap();
        values.chunks_exact_mut(columns).for_each(|row| row[first..first + u.width].fill(0.0));
        g.initializers.insert(weight.clone(), vedge_runtime::onnx::f32_tensor(&weight, &shape, &values));
        let request = Request { heads: Some(100.0 * u.price / total), ..Request::default() };
        let (smaller, done) = pruned(&g, request);
        let line = Line { layer: u.name.clone(), kind: Kind::Heads, before: u.groups, after: u.groups - 1 };
        assert_eq!(done.lines, [line], "{name}");
        for (a, b) in answers(&g, 6).iter().zip(&answers(&smaller, 6)) {
            assert!((a - b).iter().all(|d| d.abs() < 2e-3), "{name}: {a} {b}");
        }
    }
}

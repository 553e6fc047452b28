use super::*;
use crate::quantize::{layers, tests::empty};
use vedge_calibration::{Partial, Tap, collect};

fn noise(seed: u64, n: usize) -> Vec<f32> {
    vedge_runtime::model::card::SelfTest::input(seed, n)
}

/// LayerNorm with these gains over 32 channels, then a linear layer.
fn normed(gain: &[f32]) -> Graph {
    let mut g = empty(17);
    g.inputs.push(value_info("x", DType::Float, &[1, 8, 32]));
    g.outputs.push(value_info("y", DType::Float, &[1, 8, 16]));
    g.initializers.insert("gain".into(), f32_tensor("gain", &[32], gain));
    g.initializers.insert("bias".into(), f32_tensor("bias", &[32], &noise(2, 32)));
    g.initializers.insert("w".into(), f32_tensor("w", &[32, 16], &noise(3, 512)));
    g.nodes.push(NodeProto::of("LayerNormalization", &["x", "gain", "bias"], &["n"], vec![]));
    g.nodes.push(NodeProto::of("MatMul", &["n", "w"], &["y"], vec![]));
    g.value_info.insert("n".into(), value_info("n", DType::Float, &[1, 8, 32]));
    g
}

fn pictures() -> impl Iterator<Item = ArrayD<f32>> {
    (0..8).map(|i| ArrayD::from_shape_vec(vec![1, 8, 32], noise(50 + 1000 * i, 256)).unwrap())
}

fn observed(g: &Graph) -> Statistics {
    let taps = [Tap { value: "n".into(), views: vec![View::Rows] }];
    collect(g, &taps, Partial::default(), pictures().map(Ok), &Options::default(), |_, _| {}).unwrap()
}

fn outputs(g: &Graph) -> Vec<f32> {
    let mut s = Session::from_graph(g.clone(), &Options::default()).unwrap();
    pictures().flat_map(|x| s.run(&[x]).unwrap()[0].iter().copied().collect::<Vec<_>>()).collect()
}

#[test]
fn a_large_channel_is_evened_out_and_the_float_model_stays() {
    let mut gain = vec![1.0; 32];
    gain[5] = 60.0;
    let g = normed(&gain);
    let (layers, _) = layers::find(&g);
    let sites = sites(&g, &layers).unwrap();
    assert_eq!(sites.len(), 1);
    let statistics = observed(&g);
    let m = &statistics.moments[&("n".to_string(), View::Rows)];
    for kind in [Activations::Static, Activations::PerToken] {
        let by = factors(&g, &layers, &sites[0], m, kind).unwrap().expect("worth it");
        let other = by.iter().enumerate().filter(|(j, _)| *j != 5).fold(0f32, |m, (_, f)| m.max(*f));
        assert!(by[5] > 3.0 * other, "{kind:?} {by:?}");
        let (even, told) = apply(&g, &statistics, &layers, &[(&sites[0], by)]).unwrap();
        let (before, after) = (outputs(&g), outputs(&even));
        let largest = before.iter().fold(0f32, |m, v| m.max(v.abs()));
        assert!(before.iter().zip(&after).all(|(a, b)| (a - b).abs() < 1e-4 * largest));
        // What is told of the new model is what would be observed of it.
        let seen = observed(&even);
        let [told, seen] = [&told, &seen].map(|s| s.observed["n"].extremes());
        assert!((told.0 - seen.0).abs() < 1e-3 && (told.1 - seen.1).abs() < 1e-3, "{told:?} {seen:?}");
    }
}

#[test]
fn even_channels_are_left_alone() {
    let g = normed(&[1.0; 32]);
    let (layers, _) = layers::find(&g);
    let sites = sites(&g, &layers).unwrap();
    let statistics = observed(&g);
    let m = &statistics.moments[&("n".to_string(), View::Rows)];
    for kind in [Activations::Static, Activations::PerToken] {
        assert_eq!(factors(&g, &layers, &sites[0], m, kind).unwrap(), None);
    }
}

#[test]
fn a_value_that_something_else_uses_is_no_place() {
    let mut g = normed(&[1.0; 32]);
    g.nodes.push(NodeProto::of("Relu", &["n"], &["r"], vec![]));
    g.outputs.push(value_info("r", DType::Float, &[1, 8, 32]));
    let (layers, _) = layers::find(&g);
    assert!(sites(&g, &layers).unwrap().is_empty());
}

#[test]
fn the_value_projection_of_a_real_model_is_found() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/deit_nano.onnx");
    let mut g = Graph::read(&path).unwrap();
    crate::passes::prepare(&mut g, &Default::default()).unwrap();
    let (layers, _) = layers::find(&g);
    let sites = sites(&g, &layers).unwrap();
    // Eight blocks: two LayerNorms and one attention each; the last LayerNorm feeds two heads by way of a Gather.
    let of = |op: &str| sites.iter().filter(|s| g.nodes[s.divide[0].node].op_type() == op).count();
    assert_eq!((sites.len() - of("LayerNormalization"), of("LayerNormalization")), (8, 16));
    let statistics = Statistics::default();
    let by: Vec<f32> = noise(9, 128).iter().map(|v| 2f32.powf(*v * 3.0)).collect();
    let chosen: Vec<(&Site, Vec<f32>)> = sites.iter().map(|s| (s, by.clone())).collect();
    let (even, _) = apply(&g, &statistics, &layers, &chosen).unwrap();
    let x = ArrayD::from_shape_vec(vec![1, 3, 64, 64], noise(4, 3 * 64 * 64)).unwrap();
    let [before, after] = [&g, &even].map(|g| {
        let mut s = Session::from_graph(g.clone(), &Options::default()).unwrap();
        s.run(std::slice::from_ref(&x)).unwrap()[0].clone()
    });
    let mut same = crate::quantize::Sqnr::default();
    same.add(before.iter().copied(), after.iter().copied());
    assert!(same.db() > 80.0, "{}", same.db());
}

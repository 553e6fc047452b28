use super::super::tests::{card, empty, noise};
use super::super::{Evidence, Preset, Probes, Quantized, Wish, quantize};
use ndarray::ArrayD;
use vedge_calibration::{Partial, Tap, collect};
use vedge_runtime::onnx::{DType, NodeProto, attr, f32_tensor, i64_tensor, value_info};
use vedge_runtime::{Options, Session};

/// A large layer and a small one beside it, whose input has one channel so large that the others drown in its steps, but
/// without weights.
fn small_beside_large(spread: f32) -> Quantized {
    let mut g = empty(17);
    g.inputs.push(value_info("x", DType::Float, &[1, 136]));
    g.outputs.push(value_info("y", DType::Float, &[1, 66]));
    let mut small = noise(1, 8 * 2);
    small[..2].fill(0.0);
    let mut factor = vec![1.0; 8];
    factor[0] = spread;
    g.initializers.insert("a".into(), f32_tensor("a", &[8, 2], &small));
    g.initializers.insert("b".into(), f32_tensor("b", &[128, 64], &noise(2, 128 * 64)));
    g.initializers.insert("factor".into(), f32_tensor("factor", &[8], &factor));
    g.initializers.insert("parts".into(), i64_tensor("parts", &[2], &[8, 128]));
    g.nodes.push(NodeProto::of("Split", &["x", "parts"], &["left", "right"], vec![attr::int("axis", 1)]));
    g.nodes.push(NodeProto::of("Mul", &["left", "factor"], &["wide"], vec![]));
    g.nodes.push(NodeProto::of("MatMul", &["wide", "a"], &["p"], vec![]));
    g.nodes.push(NodeProto::of("MatMul", &["right", "b"], &["q"], vec![]));
    g.nodes.push(NodeProto::of("Concat", &["p", "q"], &["y"], vec![attr::int("axis", 1)]));
    for (name, n) in [("left", 8), ("right", 128), ("wide", 8), ("p", 2), ("q", 64)] {
        g.value_info.insert(name.into(), value_info(name, DType::Float, &[1, n]));
    }
    let options = Options::default();
    let inputs: Vec<ArrayD<f32>> =
        (0..12).map(|i| ArrayD::from_shape_vec(vec![1, 136], noise(500 + 200 * i, 136)).unwrap()).collect();
    let taps = [Tap::range("wide"), Tap::range("right")];
    let statistics =
        collect(&g, &taps, Partial::default(), inputs.iter().cloned().map(Ok), &options, |_, _| {}).unwrap();
    let mut session = Session::from_graph(g.clone(), &options).unwrap();
    let mut answer = |x: &ArrayD<f32>| session.run(std::slice::from_ref(x)).unwrap()[0].iter().copied().collect();
    let reference = inputs.iter().map(&mut answer).collect();
    let probes = Probes { inputs, reference, classes: vec![0; 12], output: 0, probabilities: false, held_out: false };
    quantize(
        &g,
        &Wish { preset: Preset::Cpu, ..Wish::default() },
        Some(&Evidence { statistics: statistics.into(), pictures: vec![], probes }),
        &card(),
        &options,
    )
    .unwrap()
}

#[test]
fn a_small_layer_that_makes_the_noise_stays_float() {
    let done = small_beside_large(1e4);
    assert_eq!(done.skipped.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["p"]);
    assert_eq!(done.layers.iter().map(|l| l.name.as_str()).collect::<Vec<_>>(), ["q"]);
    let [with, without] = [0, 1].map(|i| &done.candidates[i]);
    assert_eq!((with.spared, without.spared), (1, 0));
    assert!(with.effect.sqnr > without.effect.sqnr + 10.0, "{:?}", done.candidates);
}

#[test]
fn a_small_layer_like_the_others_is_quantized() {
    let done = small_beside_large(1.0);
    assert_eq!((done.layers.len(), done.skipped.len()), (2, 0), "{:?}", done.candidates);
}

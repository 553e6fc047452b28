//! Each refinement where it helps, and where it stays off.

use super::super::smooth::tests::{bottleneck, photo};
use super::super::tests::{card, empty, noise};
use super::super::{Evidence, Layer, Preset, Probes, Quantized, Rounding, Wish, layers, quantize};
use ndarray::ArrayD;
use vedge_calibration::{Partial, Tap, View, collect};
use vedge_runtime::onnx::{DType, Graph, NodeProto, attr, f32_tensor, value_info};
use vedge_runtime::{Options, Session};

/// Quantizes a graph of one input `x` and one output `y` with these inputs as calibration and as judges.
fn quantized(g: &Graph, inputs: Vec<ArrayD<f32>>, taps: &[Tap], preset: Preset) -> Quantized {
    let options = Options::default();
    let all = inputs.iter().cloned().map(Ok);
    let statistics = collect(g, taps, Partial::default(), all, &options, |_, _| {}).unwrap();
    let mut session = Session::from_graph(g.clone(), &options).unwrap();
    let mut answer = |x: &ArrayD<f32>| session.run(std::slice::from_ref(x)).unwrap()[0].iter().copied().collect();
    let reference: Vec<Vec<f32>> = inputs.iter().map(&mut answer).collect();
    let classes = vec![0; inputs.len()];
    let pictures = inputs.clone();
    let probes = Probes { inputs, reference, classes, output: 0, probabilities: false, held_out: false };
    let evidence = Evidence { statistics: statistics.into(), pictures, probes };
    quantize(g, &Wish { preset, ..Wish::default() }, Some(&evidence), &card(), &options).unwrap()
}

/// A depthwise convolution of pictures whose pixels lie around `mean`.
fn depthwise(mean: f32) -> Quantized {
    let mut g = empty(17);
    g.inputs.push(value_info("x", DType::Float, &[1, 8, 10, 10]));
    g.outputs.push(value_info("y", DType::Float, &[1, 8, 8, 8]));
    g.initializers.insert("w".into(), f32_tensor("w", &[8, 1, 3, 3], &noise(1, 72)));
    let how = vec![attr::int("group", 8), attr::ints("kernel_shape", &[3, 3])];
    g.nodes.push(NodeProto::of("Conv", &["x", "w"], &["y"], how));
    let picture = |seed: u64| {
        let x = noise(1000 * seed, 800).into_iter().map(|v| mean + 0.1 * v).collect();
        ArrayD::from_shape_vec(vec![1, 8, 10, 10], x).unwrap()
    };
    // Without moments of its inputs, so that rounding does not correct the bias before.
    quantized(&g, (1..13).map(picture).collect(), &[Tap::range("x")], Preset::Portable)
}

#[test]
fn biases_of_a_depthwise_convolution_are_corrected_where_its_inputs_have_a_mean() {
    let done = depthwise(1.0);
    let [chosen, without] = [true, false].map(|c| done.candidates.iter().find(|x| x.corrected == c).unwrap());
    assert!(done.candidates[0].corrected, "{:?}", done.candidates);
    assert!(chosen.effect.sqnr > without.effect.sqnr + 6.0, "{} {}", chosen.effect.sqnr, without.effect.sqnr);
}

#[test]
fn biases_stay_where_there_is_nothing_to_correct() {
    let done = depthwise(0.0);
    assert!(!done.candidates[0].corrected, "{:?}", done.candidates);
    assert!(done.candidates.iter().any(|c| c.corrected), "it was tried");
}

/// A collapse of a depthwise convolution: one channel of its input and one of its output take all the steps.
#[test]
fn channels_between_convolutions_are_evened_out_where_one_is_large_and_not_where_all_are_alike() {
    for preset in [Preset::Portable, Preset::Cpu] {
        let done = |spread: f32| {
            let g = bottleneck(spread, "Relu");
            let tap = |l: &Layer| Tap { value: l.activation.clone(), views: l.view.into_iter().collect() };
            let taps: Vec<Tap> = layers::find(&g).0.iter().map(tap).collect();
            quantized(&g, (0..12).map(photo).collect(), &taps, preset).candidates
        };
        let tried = done(60.0);
        let without = tried.iter().filter(|c| c.smoothed == 0).map(|c| c.effect.sqnr).fold(f64::MIN, f64::max);
        assert_eq!(tried[0].smoothed, 2, "{tried:?}");
        assert!(tried[0].effect.sqnr > without + 6.0, "{tried:?}");
        let tried = done(1.0);
        assert_eq!(tried[0].smoothed, 0, "{tried:?}");
    }
}

/// A convolution that reads pictures, and the mean of what it makes of each.
fn pooled(pictures: impl Fn(u64) -> Vec<f32>) -> Quantized {
    let mut g = empty(17);
    g.inputs.push(value_info("x", DType::Float, &[1, 3, 16, 16]));
    g.outputs.push(value_info("y", DType::Float, &[1, 24, 1, 1]));
    // Weights that are integers, so that the pictures' rounding is all there is.
    let w: Vec<f32> = noise(1, 648)
        .into_iter()
        .enumerate()
        .map(|(i, w)| if i % 27 == 0 { 127.0 } else { (20.0 * w).round() })
        .collect();
    g.initializers.insert("w".into(), f32_tensor("w", &[24, 3, 3, 3], &w));
    g.value_info.insert("h".into(), value_info("h", DType::Float, &[1, 24, 14, 14]));
    g.nodes.push(NodeProto::of("Conv", &["x", "w"], &["h"], vec![attr::ints("kernel_shape", &[3, 3])]));
    g.nodes.push(NodeProto::of("GlobalAveragePool", &["h"], &["y"], vec![]));
    let picture = |seed: u64| ArrayD::from_shape_vec(vec![1, 3, 16, 16], pictures(seed)).unwrap();
    quantized(&g, (1..13).map(picture).collect(), &[Tap::range("x")], Preset::Cpu)
}

#[test]
fn pictures_on_black_get_one_range_and_pictures_of_all_sizes_their_own() {
    // How bright the brightest pixel is differs; with a range of its own each picture has its own error in every black pixel.
    let black = |seed: u64| {
        let x = noise(1000 * seed, 768).into_iter().enumerate();
        x.map(|(i, v)| if i % 16 < 8 { -2.0 } else { -2.0 + (3.0 + 0.07 * seed as f32) * v.abs() }).collect()
    };
    let done = pooled(black);
    let without = done.candidates.iter().filter(|c| c.ranges == 0).map(|c| c.effect.sqnr).fold(f64::MIN, f64::max);
    assert_eq!((done.candidates[0].ranges, done.candidates[0].symmetric), (1, 1), "{:?}", done.candidates);
    assert!(done.candidates[0].effect.sqnr > without + 3.0, "{:?}", done.candidates);
    let done = pooled(|seed| noise(1000 * seed, 768).into_iter().map(|v| v * 0.4f32.powi(seed as i32)).collect());
    assert_eq!(done.candidates[0].ranges, 0, "{:?}", done.candidates);
    assert!(done.candidates.iter().any(|c| c.ranges == 1), "it was tried");
}

/// A linear layer on rows that `change` makes of noise, with weights that `weigh` changes.
fn linear(
    preset: Preset,
    views: &[View],
    change: impl Fn(usize, f32) -> f32,
    weigh: impl Fn(usize, f32) -> f32,
) -> Quantized {
    let rows =
        |seed: u64| noise(5000 * seed, 40 * 64).into_iter().enumerate().map(|(i, v)| change(i % 64, v)).collect();
    linear_of(preset, views, rows, weigh)
}

/// A linear layer on rows, forty to a picture.
fn linear_of(
    preset: Preset,
    views: &[View],
    rows: impl Fn(u64) -> Vec<f32>,
    weigh: impl Fn(usize, f32) -> f32,
) -> Quantized {
    let mut g = empty(17);
    g.inputs.push(value_info("x", DType::Float, &[1, 40, 64]));
    g.outputs.push(value_info("y", DType::Float, &[1, 40, 24]));
    let w: Vec<f32> = noise(1, 64 * 24).into_iter().enumerate().map(|(i, w)| weigh(i / 24, w)).collect();
    g.initializers.insert("w".into(), f32_tensor("w", &[64, 24], &w));
    g.nodes.push(NodeProto::of("MatMul", &["x", "w"], &["y"], vec![]));
    let picture = |seed: u64| ArrayD::from_shape_vec(vec![1, 40, 64], rows(seed)).unwrap();
    let tap = Tap { views: views.to_vec(), ..Tap::range("x") };
    quantized(&g, (1..13).map(picture).collect(), &[tap], preset)
}

/// Two linear layers with a function between them that does not grow as its input does; of its outputs one channel is `spread`
/// times as large as the others.
#[test]
fn channels_behind_a_function_are_evened_out_by_a_product_where_one_is_large() {
    let done = |spread: f32| {
        let mut g = empty(17);
        g.inputs.push(value_info("x", DType::Float, &[1, 40, 16]));
        g.outputs.push(value_info("y", DType::Float, &[1, 40, 24]));
        let mut w = [noise(1, 16 * 64), noise(2, 64 * 24)];
        (0..16).for_each(|i| w[0][i * 64 + 5] *= spread);
        w[1][5 * 24..6 * 24].iter_mut().for_each(|v| *v /= spread);
        g.initializers.insert("a".into(), f32_tensor("a", &[16, 64], &w[0]));
        g.initializers.insert("b".into(), f32_tensor("b", &[64, 24], &w[1]));
        g.nodes.push(NodeProto::of("MatMul", &["x", "a"], &["h"], vec![]));
        g.nodes.push(NodeProto::of("HardSwish", &["h"], &["s"], vec![]));
        g.nodes.push(NodeProto::of("MatMul", &["s", "b"], &["y"], vec![]));
        for name in ["h", "s"] {
            g.value_info.insert(name.into(), value_info(name, DType::Float, &[1, 40, 64]));
        }
        let picture = |seed: u64| ArrayD::from_shape_vec(vec![1, 40, 16], noise(5000 * seed, 640)).unwrap();
        let taps = ["x", "s"].map(|value| Tap { views: vec![View::Rows], ..Tap::range(value) });
        quantized(&g, (1..13).map(picture).collect(), &taps, Preset::Portable)
    };
    let products = |d: &Quantized| d.graph.nodes.iter().filter(|n| n.op_type() == "Mul").count();
    let large = done(60.0);
    let without = large.candidates.iter().filter(|c| c.smoothed == 0).map(|c| c.effect.sqnr).fold(f64::MIN, f64::max);
    assert_eq!((large.candidates[0].smoothed, products(&large)), (1, 1), "{:?}", large.candidates);
    assert!(large.candidates[0].effect.sqnr > without + 6.0, "{:?}", large.candidates);
    // Layers are known by their nodes in the model with the product.
    assert!(
        large.layers.iter().all(|l| large.ground.nodes[l.node].input_name(0) == l.activation),
        "{:?}",
        large.layers
    );
    // It runs as part of the layer.
    let session = Session::from_graph(large.graph, &Options::default()).unwrap();
    let classes: Vec<&str> = session.plan().iter().map(|l| l.class.as_str()).collect();
    assert!(classes.contains(&"mlp") && !classes.contains(&"Mul"), "{classes:?}");
    assert_eq!(products(&done(1.0)), 0);
}

/// The correction that rounding makes for the mean of the inputs.
#[test]
fn a_bias_is_added_where_inputs_have_a_mean_and_none_where_they_have_not() {
    let done = |mean: f32| {
        // Each row comes with its opposite, so that without `mean` the mean is zero exactly.
        let rows = |seed: u64| {
            let half = noise(5000 * seed, 20 * 64);
            half.iter().copied().chain(half.iter().map(|v| -v)).map(|v| mean + 0.1 * v).collect()
        };
        linear_of(Preset::Cpu, &[View::Rows], rows, |_, w| w)
    };
    let best = |d: &Quantized, r: Rounding| {
        d.candidates.iter().filter(|c| c.rounding == r).map(|c| c.effect.sqnr).fold(f64::MIN, f64::max)
    };
    let with = done(1.0);
    assert!(best(&with, Rounding::Compensated) > best(&with, Rounding::Nearest) + 3.0, "{:?}", with.candidates);
    let added = |d: &Quantized| d.graph.nodes.iter().filter(|n| n.op_type() == "Add").count();
    assert_eq!((added(&with), added(&done(0.0))), (1, 0));
}

#[test]
fn values_on_both_sides_of_zero_are_symmetric_and_others_are_not() {
    let done = linear(Preset::Portable, &[], |_, v| v, |_, w| w);
    let c = &done.candidates[0];
    assert_eq!((c.ranges, c.symmetric), (1, 1), "{:?}", done.candidates);
    let zero = done.graph.nodes.iter().find(|n| n.op_type() == "QuantizeLinear").unwrap().input_name(2).to_string();
    assert_eq!(done.graph.initializers[&zero].dtype(), DType::Int8);
    // As after GELU: half of the integers would never be used.
    let done = linear(Preset::Portable, &[], |_, v| v.max(-0.05), |_, w| w);
    assert_eq!(done.candidates[0].symmetric, 0, "{:?}", done.candidates);
    assert!(done.candidates.iter().any(|c| c.symmetric == 1), "it was tried");
}

#[test]
fn a_large_weight_of_a_quiet_input_is_clipped_and_even_weights_are_not() {
    let quiet = |i: usize, v: f32| if i == 5 { 0.001 * v } else { v };
    let done = linear(Preset::Cpu, &[View::Rows], quiet, |i, w| if i == 5 { 40.0 } else { w });
    assert!(done.candidates[0].clipped, "{:?}", done.candidates);
    let done = linear(Preset::Cpu, &[View::Rows], |_, v| v, |_, w| w);
    assert!(!done.candidates[0].clipped, "{:?}", done.candidates);
}

#[test]
fn weights_are_fitted_to_noisy_inputs_where_those_have_few_directions() {
    // 64 inputs that move in four directions, and one token that makes the steps coarse: the rounding's noise in the other
    // directions is nothing that weights need to pass on.
    let basis = noise(77, 4 * 64);
    let few = |seed: u64| {
        let at = noise(5000 * seed, 40 * 4);
        let value = |i: usize| (0..4).map(|k| at[i / 64 * 4 + k] * basis[k * 64 + i % 64]).sum();
        (0..40 * 64).map(|i| if (seed, i) == (1, 0) { 100.0 } else { value(i) }).collect()
    };
    let done = linear_of(Preset::Portable, &[View::Rows], few, |_, w| w);
    assert!(done.candidates[0].ridge, "{:?}", done.candidates);
    let best = |ridge: bool| {
        done.candidates.iter().filter(|c| c.ridge == ridge).map(|c| c.effect.sqnr).fold(f64::MIN, f64::max)
    };
    assert!(best(true) > best(false) + 3.0, "{} {}", best(true), best(false));
    let done = linear(Preset::Cpu, &[View::Rows], |_, v| v, |_, w| w);
    assert!(!done.candidates[0].ridge, "{:?}", done.candidates);
}

use super::*;
use crate::quantize::{layers, tests::empty};
use vedge_calibration::{Partial, Tap, collect};
use vedge_runtime::onnx::attr;

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

/// Convolution, activation, depthwise convolution, activation, convolution. Of each inner value one channel is `spread` times as
/// large as the others, and what uses it makes up for that.
pub fn bottleneck(spread: f32, activation: &str) -> Graph {
    let mut g = empty(17);
    g.inputs.push(value_info("x", DType::Float, &[1, 6, 8, 8]));
    g.outputs.push(value_info("y", DType::Float, &[1, 4, 8, 8]));
    let mut w =
        [(2, 96), (3, 144), (4, 64)].map(|(seed, n)| noise(seed, n).iter().map(|v| v.signum()).collect::<Vec<_>>());
    w[0][..6].iter_mut().for_each(|v| *v *= spread);
    (0..4).for_each(|o| w[2][o * 16] /= spread);
    for (name, shape, w) in [("p", [16, 6, 1, 1], &w[0]), ("q", [16, 1, 3, 3], &w[1]), ("r", [4, 16, 1, 1], &w[2])] {
        g.initializers.insert(name.into(), f32_tensor(name, &shape, w));
    }
    g.initializers.insert("bias".into(), f32_tensor("bias", &[16], &[0.1; 16]));
    let depthwise = vec![attr::int("group", 16), attr::ints("pads", &[1; 4]), attr::ints("kernel_shape", &[3, 3])];
    g.nodes.push(NodeProto::of("Conv", &["x", "p", "bias"], &["wide"], vec![]));
    g.nodes.push(NodeProto::of(activation, &["wide"], &["a"], vec![]));
    g.nodes.push(NodeProto::of("Conv", &["a", "q"], &["deep"], depthwise));
    g.nodes.push(NodeProto::of(activation, &["deep"], &["d"], vec![]));
    g.nodes.push(NodeProto::of("Conv", &["d", "r"], &["y"], vec![]));
    for name in ["wide", "a", "deep", "d"] {
        g.value_info.insert(name.into(), value_info(name, DType::Float, &[1, 16, 8, 8]));
    }
    g
}

pub fn photo(seed: u64) -> ArrayD<f32> {
    ArrayD::from_shape_vec(vec![1, 6, 8, 8], noise(50 + 1000 * seed, 384)).unwrap()
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
    for kind in [Activations::Static, Activations::PerToken] {
        let by = factors(&g, &layers, &sites[0], &statistics, kind).unwrap().expect("worth it");
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
    for kind in [Activations::Static, Activations::PerToken] {
        assert_eq!(factors(&g, &layers, &sites[0], &statistics, kind).unwrap(), None);
    }
}

#[test]
fn a_value_that_something_else_uses_takes_a_product() {
    let mut g = normed(&[1.0; 32]);
    g.nodes.push(NodeProto::of("Relu", &["n"], &["r"], vec![]));
    g.outputs.push(value_info("r", DType::Float, &[1, 8, 32]));
    let (layers, _) = layers::find(&g);
    let found = sites(&g, &layers).unwrap();
    assert_eq!(found.iter().map(|s| s.by).collect::<Vec<_>>(), [By::Product]);
    // It is divided for the layer alone.
    let by: Vec<f32> = (0..32).map(|i| 2f32.powi(i % 5)).collect();
    let (even, told) = apply(&g, &observed(&g), &layers, &[(&found[0], by)]).unwrap();
    assert_eq!(outputs(&g), outputs(&even));
    assert_eq!(told.observed.keys().collect::<Vec<_>>(), ["n.even"]);
    assert_eq!(layers::find(&even).0[0].activation, "n.even");
}

#[test]
fn layers_one_after_the_other_are_places_where_nothing_else_looks_on() {
    let g = bottleneck(1.0, "Relu");
    let found = sites(&g, &layers::find(&g).0).unwrap();
    let of: Vec<(&str, usize)> = found.iter().map(|s| (s.value.as_str(), s.divide.len())).collect();
    // The first convolution has a bias.
    assert_eq!(of, [("a", 2), ("d", 1)]);
    assert!(found.iter().all(|s| s.by == By::Layer));
    // SiLU and the like do not grow as their inputs do.
    let g = bottleneck(1.0, "Sigmoid");
    assert!(sites(&g, &layers::find(&g).0).unwrap().is_empty());
    // A sum with something else, or a second look.
    for at in ["wide", "a"] {
        let mut g = bottleneck(1.0, "Relu");
        g.nodes.push(NodeProto::of("Abs", &[at], &["seen"], vec![]));
        g.outputs.push(value_info("seen", DType::Float, &[1, 16, 8, 8]));
        let found = sites(&g, &layers::find(&g).0).unwrap();
        assert_eq!(found.iter().map(|s| s.value.as_str()).collect::<Vec<_>>(), ["d"]);
    }
}

/// Factors may be anything: the model stays the same, and what is told of it is what would be observed.
#[test]
fn between_layers_the_float_model_stays() {
    let g = bottleneck(100.0, "Relu");
    let layers = layers::find(&g).0;
    let found = sites(&g, &layers).unwrap();
    let seen = |g: &Graph| {
        let taps =
            layers.iter().skip(1).map(|l| Tap { value: l.activation.clone(), views: l.view.into_iter().collect() });
        let taps: Vec<Tap> = taps.collect();
        let inputs = (0..3).map(|i| Ok(photo(i)));
        collect(g, &taps, Partial::default(), inputs, &Options::default(), |_, _| {}).unwrap()
    };
    let by: Vec<f32> = noise(9, 16).iter().map(|v| 2f32.powf((v * 3.0).round())).collect();
    let chosen: Vec<(&Site, Vec<f32>)> = found.iter().map(|s| (s, by.clone())).collect();
    let (even, told) = apply(&g, &seen(&g), &layers, &chosen).unwrap();
    let [before, after] = [&g, &even].map(|g| {
        let mut s = Session::from_graph(g.clone(), &Options::default()).unwrap();
        s.run(&[photo(7)]).unwrap()[0].clone()
    });
    let mut same = crate::quantize::Sqnr::default();
    same.add(before.iter().copied(), after.iter().copied());
    assert!(same.db() > 100.0, "{}", same.db());
    let seen = seen(&even);
    for (key, m) in &seen.moments {
        let near = |a: f64, b: f64| (a - b).abs() <= 1e-3 * a.abs().max(1e-3);
        let told = &told.moments[key];
        assert!(told.extremes().iter().zip(m.extremes()).all(|(a, b)| near(a.1.into(), b.1.into())), "{key:?}");
        let [told, seen] = [told, m].map(|m| m.mean(m.groups() - 1));
        assert!(told.iter().zip(&seen).all(|(a, b)| near(*a, *b)), "{key:?} {told} {seen}");
    }
}

#[test]
fn the_value_projection_of_a_real_model_is_found() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/deit_nano.onnx");
    let mut g = Graph::read(&path).unwrap();
    crate::passes::prepare(&mut g, &Default::default()).unwrap();
    let (layers, _) = layers::find(&g);
    let sites = sites(&g, &layers).unwrap();
    // Eight blocks: two LayerNorms and one attention each; the last LayerNorm feeds two heads by way of a Gather.
    let sites: Vec<Site> = sites.into_iter().filter(|s| s.by == By::Constants).collect();
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

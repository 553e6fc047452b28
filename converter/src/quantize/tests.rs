use super::*;
use ndarray::ArrayD;
use prost::Message;
use vedge_calibration::{Partial, Tap, collect};
use vedge_runtime::Session;
use vedge_runtime::model::card::{Channels, Filter, Fit, OutputKind, Preprocess, Provenance, VERSION};
use vedge_runtime::onnx::proto::OperatorSetIdProto;
use vedge_runtime::onnx::{DType, ModelProto, NodeProto, attr, f32_tensor, to_f32, to_i8, value_info};

/// Repeatable numbers in −1…1.
pub fn noise(seed: u64, n: usize) -> Vec<f32> {
    vedge_runtime::model::card::SelfTest::input(seed, n)
}

pub fn empty(opset: i64) -> Graph {
    let model = ModelProto {
        ir_version: Some(8),
        opset_import: vec![OperatorSetIdProto { version: Some(opset), ..Default::default() }],
        graph: Some(Default::default()),
        ..Default::default()
    };
    Graph::decode(model.encode_to_vec().into(), None).unwrap()
}

/// x [1, 3, 4] feeds two linear layers (shared activation), one of them a second one with the same weight; then a
/// product of two activations that must stay float.
fn graph() -> Graph {
    let mut g = empty(17);
    g.inputs.push(value_info("x", DType::Float, &[1, 3, 4]));
    g.outputs.push(value_info("y", DType::Float, &[1, 3, 3]));
    g.initializers.insert("w".into(), f32_tensor("w", &[4, 5], &noise(1, 20)));
    g.initializers.insert("v".into(), f32_tensor("v", &[4, 5], &noise(2, 20)));
    g.initializers.insert("b".into(), f32_tensor("b", &[5], &noise(3, 5)));
    g.nodes.push(NodeProto::of("MatMul", &["x", "w"], &["q"], vec![]));
    g.nodes.push(NodeProto::of("Add", &["q", "b"], &["qb"], vec![]));
    g.nodes.push(NodeProto::of("MatMul", &["x", "v"], &["k"], vec![]));
    g.nodes.push(NodeProto::of("Transpose", &["k"], &["kt"], vec![attr::ints("perm", &[0, 2, 1])]));
    g.nodes.push(NodeProto::of("MatMul", &["qb", "kt"], &["y"], vec![]));
    for (name, shape) in [("q", [1, 3, 5]), ("qb", [1, 3, 5]), ("k", [1, 3, 5]), ("kt", [1, 5, 3])] {
        g.value_info.insert(name.into(), value_info(name, DType::Float, &shape));
    }
    g
}

fn ranges(of: &[(&str, (f32, f32))]) -> Recipe {
    Recipe { ranges: of.iter().map(|(n, r)| (n.to_string(), *r)).collect(), ..Recipe::default() }
}

fn count(g: &Graph, op: &str) -> usize {
    g.nodes.iter().filter(|n| n.op_type() == op).count()
}

fn run(g: &Graph, x: &[f32]) -> Vec<f32> {
    let mut s = Session::from_graph(g.clone(), &Options::default()).unwrap();
    let shape = s.inputs()[0].shape.clone();
    let y = s.run(&[ArrayD::from_shape_vec(shape, x.to_vec()).unwrap()]).unwrap();
    y[0].iter().copied().collect()
}

#[test]
fn layers_with_constant_weights_are_found() {
    let (layers, skipped) = layers::find(&graph());
    assert_eq!(layers.iter().map(|l| (l.name.as_str(), l.out_axis)).collect::<Vec<_>>(), [("q", 1), ("k", 1)]);
    assert_eq!(layers[0].activation, "x");
    assert!(skipped.is_empty());
}

#[test]
fn one_pair_serves_all_layers_of_an_activation() {
    let mut g = graph();
    let (layers, _) = layers::find(&g);
    write::write_int8(&mut g, &layers, &ranges(&[("x", (-1.0, 1.0))])).unwrap();
    assert_eq!((count(&g, "QuantizeLinear"), count(&g, "DequantizeLinear")), (1, 3));
    assert_eq!(g.nodes[0].op_type(), "QuantizeLinear");
    assert!(!g.initializers.contains_key("w") && !g.initializers.contains_key("v"));
    assert_eq!(to_i8(&g.initializers["w.int8"]).unwrap().len(), 20);
    assert!(g.sort().is_ok());
}

/// The quantized graph against loops that follow ONNX's definition of QuantizeLinear and DequantizeLinear.
#[test]
fn the_graph_computes_what_the_definition_says() {
    let mut g = graph();
    let x = noise(9, 12);
    let range = (-0.8, 0.9);
    let float = g.clone();
    let (layers, _) = layers::find(&g);
    write::write_int8(&mut g, &layers, &ranges(&[("x", range)])).unwrap();
    let scale = (range.1 - range.0) / 255.0f32;
    let zero = (-range.0 / scale).round_ties_even();
    let xq: Vec<f64> = x
        .iter()
        .map(|v| f64::from(((v / scale).round_ties_even() + zero).clamp(0.0, 255.0) - zero) * f64::from(scale))
        .collect();
    let weight = |name: &str| -> Vec<f64> {
        let w = to_f32(&float.initializers[name]).unwrap();
        (0..20)
            .map(|i| {
                let column: Vec<f32> = (0..4).map(|r| w[r * 5 + i % 5]).collect();
                let largest = column.iter().fold(0f32, |m, w| m.max(w.abs()));
                let rms = (column.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>() / 4.0).sqrt();
                let s = (largest / 127.0).max((rms / number::NARROW_RMS) as f32);
                f64::from((w[i] / s).round_ties_even()) * f64::from(s)
            })
            .collect()
    };
    let product = |w: &[f64], r: usize, c: usize| (0..4).map(|i| xq[r * 4 + i] * w[i * 5 + c]).sum::<f64>();
    let (w, v, b) = (weight("w"), weight("v"), to_f32(&float.initializers["b"]).unwrap());
    let got = run(&g, &x);
    for r in 0..3 {
        for c in 0..3 {
            let want: f64 = (0..5).map(|i| (product(&w, r, i) + f64::from(b[i])) * product(&v, c, i)).sum();
            assert!((f64::from(got[r * 3 + c]) - want).abs() < 1e-5, "{r} {c}: {} {want}", got[r * 3 + c]);
        }
    }
    assert_ne!(got, run(&float, &x), "quantization must change something, or this test compares nothing");
}

#[test]
fn gemm_and_convolutions_quantize_along_their_output_channels() {
    let mut g = empty(17);
    g.inputs.push(value_info("x", DType::Float, &[1, 4, 2, 2]));
    g.outputs.push(value_info("y", DType::Float, &[1, 6]));
    let mut weight = noise(4, 4 * 4);
    weight[..4].iter_mut().for_each(|w| *w *= 3.0);
    g.initializers.insert("dw".into(), f32_tensor("dw", &[4, 1, 2, 2], &weight));
    let mut dense = noise(5, 24);
    dense[4..8].iter_mut().for_each(|w| *w *= 3.0);
    g.initializers.insert("fc".into(), f32_tensor("fc", &[6, 4], &dense));
    let conv = vec![attr::int("group", 4), attr::ints("kernel_shape", &[2, 2])];
    g.nodes.push(NodeProto::of("Conv", &["x", "dw"], &["c"], conv));
    g.nodes.push(NodeProto::of("Flatten", &["c"], &["f"], vec![]));
    g.nodes.push(NodeProto::of("Gemm", &["f", "fc"], &["y"], vec![attr::int("transB", 1)]));
    g.value_info.insert("c".into(), value_info("c", DType::Float, &[1, 4, 1, 1]));
    g.value_info.insert("f".into(), value_info("f", DType::Float, &[1, 4]));
    let (layers, _) = layers::find(&g);
    assert_eq!(
        layers.iter().map(|l| (l.class, l.out_axis)).collect::<Vec<_>>(),
        [("depthwise conv", 0), ("linear", 0)]
    );
    let x = noise(6, 16);
    let float = run(&g, &x);
    let f: Vec<f32> = (0..4).map(|c| (0..4).map(|k| x[c * 4 + k] * weight[c * 4 + k]).sum()).collect();
    let reach = f.iter().fold(0f32, |m, v| m.max(v.abs()));
    let limits = ranges(&[("x", (-1.0, 1.0)), ("f", (-reach, reach))]);
    write::write_int8(&mut g, &layers, &limits).unwrap();
    let largest = float.iter().fold(0f32, |m, v| m.max(v.abs()));
    for (a, b) in run(&g, &x).iter().zip(&float) {
        assert!((a - b).abs() < 0.02 * largest, "{a} {b}");
    }
}

#[test]
fn what_cannot_be_quantized_is_named() {
    let mut g = graph();
    g.nodes[2] = NodeProto::of("MatMul", &["v2", "x2"], &["k"], vec![]);
    g.initializers.insert("v2".into(), f32_tensor("v2", &[1, 3, 4], &noise(7, 12)));
    let (layers, skipped) = layers::find(&g);
    assert_eq!(layers.len(), 1);
    assert_eq!((skipped[0].name.as_str(), skipped[0].reason.as_str()), ("k", "MatMul with the constant on the left"));
}

#[test]
fn an_old_operator_set_is_refused() {
    let mut g = graph();
    g.set_opset(12);
    let (layers, _) = layers::find(&g);
    let e = write::write_int8(&mut g, &layers, &ranges(&[])).unwrap_err();
    assert!(e.to_string().contains("operator set 12"));
}

#[test]
fn float16_halves_large_constants_and_keeps_what_overflows() {
    let mut g = empty(17);
    g.inputs.push(value_info("x", DType::Float, &[1, 32]));
    g.outputs.push(value_info("y", DType::Float, &[1, 32]));
    let mut large = noise(2, 1024);
    g.initializers.insert("w".into(), f32_tensor("w", &[32, 32], &noise(1, 1024)));
    large[3] = 70_000.0;
    g.initializers.insert("v".into(), f32_tensor("v", &[32, 32], &large));
    g.initializers.insert("b".into(), f32_tensor("b", &[32], &noise(3, 32)));
    g.nodes.push(NodeProto::of("MatMul", &["x", "w"], &["h"], vec![]));
    g.nodes.push(NodeProto::of("MatMul", &["h", "v"], &["i"], vec![]));
    g.nodes.push(NodeProto::of("Add", &["i", "b"], &["y"], vec![]));
    for name in ["h", "i"] {
        g.value_info.insert(name.into(), value_info(name, DType::Float, &[1, 32]));
    }
    let x = noise(4, 32);
    let before = run(&g, &x);
    assert_eq!(write_f16(&mut g).unwrap(), Halved { tensors: 1, too_large: 1 });
    assert_eq!(g.initializers["w.f16"].dtype(), DType::Float16);
    let mut ratio = Sqnr::default();
    ratio.add(before.iter().copied(), run(&g, &x).into_iter());
    assert!(ratio.db() > 45.0, "{}", ratio.db());
}

#[test]
fn sqnr_of_equal_and_broken_logits() {
    let db = |r: &[f32], g: &[f32]| {
        let mut s = Sqnr::default();
        s.add(r.iter().copied(), g.iter().copied());
        s.db()
    };
    assert_eq!(db(&[1.0, 2.0], &[1.0, 2.0]), 200.0);
    assert_eq!(db(&[1.0, 2.0], &[f32::NAN, 2.0]), -200.0);
    assert!((db(&[10.0], &[9.0]) - 20.0).abs() < 1e-9);
}

pub fn card() -> Card {
    Card {
        version: VERSION,
        name: "test".into(),
        architecture: "unknown".into(),
        preprocess: Preprocess {
            height: 1,
            width: 1,
            fit: Fit::Squash,
            filter: Filter::Bilinear,
            mean: [0.0; 3],
            std: [1.0; 3],
            channels: Channels::Rgb,
        },
        output: OutputKind { name: "y".into(), kind: "features".into() },
        labels: vec![],
        precision: "int8".into(),
        activations: Activations::Static,
        provenance: Provenance::default(),
        accuracy: None,
        certainty: None,
        self_test: None,
    }
}

/// Rows 1 and 2 of x · w, where row 0 of x is `times` as large as the others.
fn quantized_beside_a_row(times: f32, preset: Preset) -> Quantized {
    let mut g = empty(17);
    g.inputs.push(value_info("x", DType::Float, &[1, 3, 32]));
    g.outputs.push(value_info("y", DType::Float, &[1, 2, 8]));
    g.initializers.insert("w".into(), f32_tensor("w", &[32, 8], &noise(1, 256)));
    g.initializers.insert("rows".into(), vedge_runtime::onnx::i64_tensor("rows", &[2], &[1, 2]));
    g.nodes.push(NodeProto::of("MatMul", &["x", "w"], &["h"], vec![]));
    g.nodes.push(NodeProto::of("Gather", &["h", "rows"], &["y"], vec![attr::int("axis", 1)]));
    g.value_info.insert("h".into(), value_info("h", DType::Float, &[1, 3, 8]));
    let inputs: Vec<ArrayD<f32>> = (0..8)
        .map(|seed| {
            let mut x = noise(100 + seed, 96);
            x[..32].iter_mut().for_each(|v| *v *= times);
            ArrayD::from_shape_vec(vec![1, 3, 32], x).unwrap()
        })
        .collect();
    let mut reference: Vec<Vec<f32>> = vec![];
    let options = Options::default();
    let all = inputs.iter().cloned().map(Ok);
    let statistics = collect(&g, &[Tap::range("x")], Partial::default(), all, &options, |_, y| {
        reference.push(y[0].iter().copied().collect())
    })
    .unwrap();
    let probes = Probes { inputs, reference, classes: vec![0; 8], output: 0, probabilities: false, held_out: false };
    quantize(
        &g,
        &Wish { preset, ..Wish::default() },
        Some(&Evidence { statistics: statistics.into(), pictures: vec![], probes }),
        &card(),
        &options,
    )
    .unwrap()
}

#[test]
fn rows_of_different_size_are_quantized_row_by_row() {
    let done = quantized_beside_a_row(100.0, Preset::Auto);
    assert_eq!(done.activations, Activations::PerToken, "{:?}", done.candidates);
    assert_eq!(count(&done.graph, "QuantizeLinear"), 0);
    let portable = quantized_beside_a_row(100.0, Preset::Portable);
    assert!(portable.candidates.iter().all(|c| c.activations == Activations::Static));
    let [chosen, other] = [&done, &portable].map(|q| q.candidates[0].effect.sqnr);
    assert!(chosen > other + 20.0, "{chosen} {other}");
}

#[test]
fn without_a_meaningful_difference_the_portable_file_is_chosen() {
    let done = quantized_beside_a_row(1.0, Preset::Auto);
    assert_eq!(done.activations, Activations::Static, "{:?}", done.candidates);
    assert_eq!(count(&done.graph, "QuantizeLinear"), 1);
    // All were tried, and the first is the chosen one.
    assert!(done.candidates.len() >= 8, "{:?}", done.candidates);
    assert_eq!(done.candidates[0].activations, Activations::Static);
}

/// Two layers side by side, each with half of the answers: inputs of the first have one channel so large that the
/// others drown in its steps, but it has no weight.
fn one_hopeless_layer(target: Target) -> Quantized {
    let mut g = empty(17);
    g.inputs.push(value_info("x", DType::Float, &[1, 64]));
    g.outputs.push(value_info("y", DType::Float, &[1, 12]));
    let mut hopeless = noise(1, 32 * 6);
    hopeless[..6].fill(0.0);
    let mut spread = vec![1.0; 32];
    spread[0] = 1e5;
    g.initializers.insert("a".into(), f32_tensor("a", &[32, 6], &hopeless));
    g.initializers.insert("b".into(), f32_tensor("b", &[32, 6], &noise(2, 32 * 6)));
    g.initializers.insert("spread".into(), f32_tensor("spread", &[32], &spread));
    g.initializers.insert("halves".into(), vedge_runtime::onnx::i64_tensor("halves", &[2], &[32, 32]));
    g.nodes.push(NodeProto::of("Split", &["x", "halves"], &["left", "right"], vec![attr::int("axis", 1)]));
    g.nodes.push(NodeProto::of("Mul", &["left", "spread"], &["wide"], vec![]));
    g.nodes.push(NodeProto::of("MatMul", &["wide", "a"], &["p"], vec![]));
    g.nodes.push(NodeProto::of("MatMul", &["right", "b"], &["q"], vec![]));
    g.nodes.push(NodeProto::of("Concat", &["p", "q"], &["y"], vec![attr::int("axis", 1)]));
    for (name, n) in [("left", 32), ("right", 32), ("wide", 32), ("p", 6), ("q", 6)] {
        g.value_info.insert(name.into(), value_info(name, DType::Float, &[1, n]));
    }
    let inputs: Vec<ArrayD<f32>> =
        (0..16).map(|i| ArrayD::from_shape_vec(vec![1, 64], noise(500 + 64 * i, 64)).unwrap()).collect();
    let mut reference: Vec<Vec<f32>> = vec![];
    let options = Options::default();
    let taps = [Tap::range("wide"), Tap::range("right")];
    let all = inputs.iter().cloned().map(Ok);
    let statistics =
        collect(&g, &taps, Partial::default(), all, &options, |_, y| reference.push(y[0].iter().copied().collect()))
            .unwrap();
    let classes = reference.iter().map(|y| crate::evaluate::best(y)).collect();
    let probes = Probes { inputs, reference, classes, output: 0, probabilities: false, held_out: false };
    quantize(
        &g,
        &Wish { preset: Preset::Cpu, target, ..Wish::default() },
        Some(&Evidence { statistics: statistics.into(), pictures: vec![], probes }),
        &card(),
        &options,
    )
    .unwrap()
}

#[test]
fn the_layer_that_costs_the_answers_stays_float() {
    let without = one_hopeless_layer(Target::default());
    assert_eq!((without.layers.len(), without.skipped.len()), (2, 0));
    assert!(without.effect.unwrap().agreement < 0.9, "{:?}", without.effect);
    for target in
        [Target { min_agreement: Some(1.0), max_drop: None }, Target { min_agreement: None, max_drop: Some(0.0) }]
    {
        let done = one_hopeless_layer(target);
        assert_eq!(done.layers.iter().map(|l| l.name.as_str()).collect::<Vec<_>>(), ["q"]);
        assert_eq!(done.skipped.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["p"]);
        assert!(done.skipped[0].reason.starts_with("float16 weights to meet the target"));
        assert_eq!(done.effect.unwrap().agreement, 1.0);
        assert_eq!(count(&done.graph, "DequantizeLinear"), 1);
    }
}

#[test]
fn a_target_that_is_met_keeps_every_layer_in_integers() {
    let target = Target { min_agreement: Some(0.05), max_drop: None };
    assert_eq!(one_hopeless_layer(target).layers.len(), 2);
}

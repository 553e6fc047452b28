use super::*;
use crate::onnx::{ModelProto, TensorProto, proto::OperatorSetIdProto, value_info};
use crate::session::How;
use crate::{Options, Session};
use ndarray::ArrayD;
use prost::Message;

/// x `[1, 4, 3]` to y `[1, 4, 2]`, with constants and nodes; nothing else has a stated shape, as in other tools' files.
fn graph(x: &[usize], y: &[usize], constants: Vec<TensorProto>, nodes: Vec<NodeProto>) -> Graph {
    let opset = OperatorSetIdProto { version: Some(17), ..Default::default() };
    let model = ModelProto {
        ir_version: Some(8),
        opset_import: vec![opset],
        graph: Some(Default::default()),
        ..Default::default()
    };
    let mut g = Graph::decode(model.encode_to_vec().into(), None).unwrap();
    g.inputs.push(value_info("x", DType::Float, x));
    g.outputs.push(value_info("y", DType::Float, y));
    g.initializers.extend(constants.into_iter().map(|t| (t.name().to_string(), t)));
    g.nodes = nodes;
    g
}

fn scale(name: &str, values: &[f32]) -> TensorProto {
    let shape = if values.len() == 1 { vec![] } else { vec![values.len()] };
    f32_tensor(name, &shape, values)
}

fn ints(name: &str, dtype: DType, shape: &[usize], values: &[i64]) -> TensorProto {
    let raw = match dtype {
        DType::Int32 => values.iter().flat_map(|v| (*v as i32).to_le_bytes()).collect(),
        _ => values.iter().map(|v| *v as u8).collect(),
    };
    tensor(name, dtype, shape, raw)
}

fn node(op: &str, inputs: &[&str], outputs: &[&str]) -> NodeProto {
    NodeProto::of(op, inputs, outputs, vec![])
}

const X: [f32; 12] = [0.3, -1.2, 0.9, 1.0, 0.0, -0.4, 2.6, -2.0, 0.11, 5.0, -7.0, 0.52];
const W: [i64; 6] = [10, -20, 30, 127, -128, 7];

/// Runs on [`X`]; the answer, and how the operators run by class.
fn run(g: Graph) -> (Vec<f32>, Vec<(String, How)>) {
    let mut session = Session::from_graph(g, &Options::default()).unwrap();
    let shape = session.inputs()[0].shape.clone();
    let y = session.run(&[ArrayD::from_shape_vec(shape, X.to_vec()).unwrap()]).unwrap();
    let plan = session.plan().iter().map(|l| (l.class.clone(), l.how.clone())).collect();
    (y[0].iter().copied().collect(), plan)
}

fn integer_layers(plan: &[(String, How)]) -> usize {
    plan.iter().filter(|(_, how)| *how == How::Integer).count()
}

/// Rounds to a grid, as the operators say.
fn grid(v: f32, scale: f32, low: f32, high: f32) -> f32 {
    (v / scale).round_ties_even().clamp(low, high) * scale
}

/// The product of rounded rows with the weights of [`W`], column scales 0.01 and 0.02.
fn product(rows: &[f32]) -> Vec<f32> {
    let w = |i: usize, o: usize| W[i * 2 + o] as f32 * [0.01, 0.02][o];
    rows.chunks(3).flat_map(|r| [0, 1].map(|o| (0..3).map(|i| r[i] * w(i, o)).sum())).collect()
}

fn near(got: &[f32], want: &[f32]) {
    let close = got.len() == want.len() && got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-4);
    assert!(close, "{got:?}\n{want:?}");
}

fn weights() -> Vec<TensorProto> {
    vec![ints("w", DType::Int8, &[3, 2], &W), scale("ws", &[0.01, 0.02]), ints("wz", DType::Int8, &[2], &[0, 0])]
}

#[test]
fn operators_on_integers_are_layers_of_integers() {
    let mut c = weights();
    c.extend([scale("xs", &[0.05]), ints("xz", DType::Uint8, &[], &[128])]);
    c.extend([scale("ys", &[0.1]), ints("yz", DType::Uint8, &[], &[100])]);
    let x = node("QuantizeLinear", &["x", "xs", "xz"], &["xq"]);
    let product_node = node("QLinearMatMul", &["xq", "xs", "xz", "w", "ws", "wz", "ys", "yz"], &["yq"]);
    let y = node("DequantizeLinear", &["yq", "ys", "yz"], &["y"]);
    let (got, plan) = run(graph(&[1, 4, 3], &[1, 4, 2], c, vec![x, product_node, y]));
    let rows = X.map(|v| grid(v, 0.05, -128., 127.));
    near(&got, &product(&rows).iter().map(|v| grid(*v, 0.1, -100., 155.)).collect::<Vec<_>>());
    assert_eq!(integer_layers(&plan), 1, "{plan:?}");
}

#[test]
fn moved_integers_are_moved_floats() {
    // x is quantized as [1, 3, 4] and transposed as integers.
    let mut c = weights();
    c.extend([scale("xs", &[0.05]), ints("xz", DType::Int8, &[], &[-5])]);
    let nodes = vec![
        node("QuantizeLinear", &["x", "xs", "xz"], &["xq"]),
        NodeProto::of("Transpose", &["xq"], &["t"], vec![attr::ints("perm", &[0, 2, 1])]),
        node("DequantizeLinear", &["t", "xs", "xz"], &["f"]),
        NodeProto::of("DequantizeLinear", &["w", "ws", "wz"], &["wf"], vec![attr::int("axis", 1)]),
        node("MatMul", &["f", "wf"], &["y"]),
    ];
    let (got, plan) = run(graph(&[1, 3, 4], &[1, 4, 2], c, nodes));
    let rows: Vec<f32> = (0..12).map(|i| grid(X[i % 3 * 4 + i / 3], 0.05, -123., 132.)).collect();
    near(&got, &product(&rows));
    assert_eq!(integer_layers(&plan), 1, "{plan:?}");
}

#[test]
fn the_dynamic_form_finds_its_range_in_the_whole_value() {
    let mut c = weights();
    c.push(scale("bias", &[0.5, -0.5]));
    let nodes = vec![
        node("DynamicQuantizeLinear", &["x"], &["xq", "xs", "xz"]),
        node("MatMulInteger", &["xq", "w", "xz", "wz"], &["i"]),
        NodeProto::of("Cast", &["i"], &["f"], vec![attr::int("to", DType::Float as i64)]),
        node("Mul", &["xs", "ws"], &["s"]),
        node("Mul", &["f", "s"], &["p"]),
        node("Add", &["p", "bias"], &["y"]),
    ];
    let (got, plan) = run(graph(&[1, 4, 3], &[1, 4, 2], c, nodes));
    let step = 12. / 255.;
    let rows = X.map(|v| grid(v, step, -149., 106.));
    let want: Vec<f32> = product(&rows).iter().zip([0.5, -0.5].iter().cycle()).map(|(p, b)| p + b).collect();
    near(&got, &want);
    assert_eq!(integer_layers(&plan), 1, "{plan:?}");
}

#[test]
fn fake_quantization_of_weights_and_seven_bit_inputs() {
    // Weights are float in the file; activations use 0…127 of their byte.
    let floats: Vec<f32> = W.iter().enumerate().map(|(i, w)| (*w as f32 + 0.3) * [0.01, 0.02][i % 2]).collect();
    let mut c = weights();
    c[0] = f32_tensor("w", &[3, 2], &floats);
    c.extend([scale("xs", &[0.1]), ints("xz", DType::Uint8, &[], &[64])]);
    c.extend([ints("low", DType::Uint8, &[], &[0]), ints("high", DType::Uint8, &[], &[127])]);
    let nodes = vec![
        node("QuantizeLinear", &["x", "xs", "xz"], &["xq"]),
        node("Clip", &["xq", "low", "high"], &["xc"]),
        node("DequantizeLinear", &["xc", "xs", "xz"], &["xf"]),
        NodeProto::of("QuantizeLinear", &["w", "ws", "wz"], &["wq"], vec![attr::int("axis", 1)]),
        NodeProto::of("DequantizeLinear", &["wq", "ws", "wz"], &["wf"], vec![attr::int("axis", 1)]),
        node("MatMul", &["xf", "wf"], &["y"]),
    ];
    let (got, plan) = run(graph(&[1, 4, 3], &[1, 4, 2], c, nodes));
    near(&got, &product(&X.map(|v| grid(v, 0.1, -64., 63.))));
    assert_eq!(integer_layers(&plan), 1, "{plan:?}");
}

#[test]
fn convolutions_on_integers() {
    // One picture of 3 channels, 2 × 2; 1 × 1 kernel, one output channel; bias in steps of 0.05 · 0.01.
    let c = vec![
        ints("w", DType::Int8, &[1, 3, 1, 1], &[10, -20, 30]),
        scale("ws", &[0.01]),
        ints("wz", DType::Int8, &[], &[0]),
        scale("xs", &[0.05]),
        ints("xz", DType::Uint8, &[], &[128]),
        scale("ys", &[0.02]),
        ints("yz", DType::Uint8, &[], &[128]),
        ints("b", DType::Int32, &[1], &[690]),
    ];
    let nodes = vec![
        node("QuantizeLinear", &["x", "xs", "xz"], &["xq"]),
        node("QLinearConv", &["xq", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"], &["yq"]),
        node("DequantizeLinear", &["yq", "ys", "yz"], &["y"]),
    ];
    let (got, plan) = run(graph(&[1, 3, 2, 2], &[1, 1, 2, 2], c, nodes));
    let rows = X.map(|v| grid(v, 0.05, -128., 127.));
    let one = |p: usize| grid(rows[p] * 0.1 - rows[4 + p] * 0.2 + rows[8 + p] * 0.3 + 0.345, 0.02, -128., 127.);
    near(&got, &(0..4).map(one).collect::<Vec<_>>());
    assert_eq!(integer_layers(&plan), 1, "{plan:?}");
}

#[test]
fn a_softmax_between_pairs_is_a_softmax() {
    let c = vec![
        scale("s", &[0.05]),
        ints("z", DType::Uint8, &[], &[128]),
        scale("t", &[0.01]),
        ints("u", DType::Uint8, &[], &[0]),
    ];
    let nodes = vec![
        node("QuantizeLinear", &["x", "s", "z"], &["xq"]),
        node("DequantizeLinear", &["xq", "s", "z"], &["xf"]),
        NodeProto::of("Softmax", &["xf"], &["p"], vec![attr::int("axis", -1)]),
        node("QuantizeLinear", &["p", "t", "u"], &["pq"]),
        node("DequantizeLinear", &["pq", "t", "u"], &["y"]),
    ];
    let (got, plan) = run(graph(&[1, 4, 3], &[1, 4, 3], c, nodes));
    let rows = X.map(|v| grid(v, 0.05, -128., 127.).exp());
    let want: Vec<f32> =
        rows.chunks(3).flat_map(|r| r.iter().map(|v| grid(v / r.iter().sum::<f32>(), 0.01, 0., 255.))).collect();
    near(&got, &want);
    assert!(plan.iter().filter(|(class, _)| class == "requantize").count() == 2, "{plan:?}");
}

#[test]
fn a_scale_that_changes_between_the_two_is_kept() {
    let c = vec![scale("s", &[0.05]), ints("z", DType::Uint8, &[], &[128]), scale("t", &[0.1])];
    let nodes =
        vec![node("QuantizeLinear", &["x", "s", "z"], &["xq"]), node("DequantizeLinear", &["xq", "t", "z"], &["y"])];
    let (got, _) = run(graph(&[1, 4, 3], &[1, 4, 3], c, nodes));
    near(&got, &X.map(|v| 2. * grid(v, 0.05, -128., 127.)));
}

#[test]
fn graphs_without_quantization_are_left_alone() {
    let mut g = graph(&[1, 4, 3], &[1, 4, 3], vec![], vec![node("Relu", &["x"], &["y"])]);
    let before = g.nodes.clone();
    assert!(!normalize(&mut g));
    assert_eq!(g.nodes, before);
}

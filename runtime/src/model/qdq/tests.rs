use super::*;
use crate::model::lower::testing::Builder;
use crate::onnx::{TensorProto, value_info};
use crate::session::How;
use crate::{Options, Session};
use ndarray::ArrayD;

/// x `[1, 4, 3]` to y `[1, 4, 2]`, with constants and nodes; nothing else has a stated shape, as in other tools' files.
fn graph(x: &[usize], y: &[usize], constants: Vec<TensorProto>, nodes: Vec<NodeProto>) -> Graph {
    let mut g = Builder::new(x).0;
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
fn the_dynamic_form_finds_the_range_of_what_it_quantizes() {
    let factors = [4., 1., 0.5];
    let mut c = weights();
    c.push(scale("factors", &factors));
    let nodes = vec![
        node("Mul", &["x", "factors"], &["xf"]),
        node("DynamicQuantizeLinear", &["xf"], &["xq", "xs", "xz"]),
        node("MatMulInteger", &["xq", "w", "xz", "wz"], &["i"]),
        NodeProto::of("Cast", &["i"], &["f"], vec![attr::int("to", DType::Float as i64)]),
        node("Mul", &["xs", "ws"], &["s"]),
        node("Mul", &["f", "s"], &["y"]),
    ];
    let (got, plan) = run(graph(&[1, 4, 3], &[1, 4, 2], c, nodes));
    let x: Vec<f32> = X.iter().enumerate().map(|(i, v)| v * factors[i % 3]).collect();
    let (low, high) = x.iter().fold((0f32, 0f32), |(l, h), &v| (l.min(v), h.max(v)));
    let step = (high - low) / 255.;
    let zero = (-low / step).round();
    near(&got, &product(&x.iter().map(|v| grid(*v, step, -zero, 255. - zero)).collect::<Vec<_>>()));
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

#[test]
fn a_function_with_a_bound_that_is_computed_is_no_table() {
    for computed in [false, true] {
        let c = vec![
            scale("s", &[0.05]),
            ints("z", DType::Uint8, &[], &[128]),
            scale("bound", &[-0.5]),
            scale("half", &[0.5]),
        ];
        let nodes = vec![
            node("QuantizeLinear", &["x", "s", "z"], &["xq"]),
            node("DequantizeLinear", &["xq", "s", "z"], &["xf"]),
            node("Identity", &["bound"], &["copy"]),
            node("Clip", &["xf", if computed { "copy" } else { "bound" }], &["c"]),
            node("Mul", &["c", "half"], &["y"]),
        ];
        let (got, plan) = run(graph(&[1, 4, 3], &[1, 4, 3], c, nodes));
        near(&got, &X.map(|v| 0.5 * grid(v, 0.05, -128., 127.).max(-0.5)));
        assert_eq!(plan.iter().any(|(class, _)| class == "table"), !computed, "{plan:?}");
    }
}

/// Builds graphs in which every value is rounded, as ONNX Runtime's static quantization writes them.
struct Rounded {
    constants: Vec<TensorProto>,
    nodes: Vec<NodeProto>,
}

impl Rounded {
    fn name(&self) -> String {
        format!("v{}", self.nodes.len())
    }

    /// A node whose output is rounded to multiples of `step`.
    fn node(&mut self, op: &str, inputs: &[&str], attributes: Vec<crate::onnx::AttributeProto>, step: f32) -> String {
        let [raw, s, z, q, out] = ["raw", "s", "z", "q", "out"].map(|part| format!("{}.{part}", self.name()));
        self.nodes.push(NodeProto::of(op, inputs, &[&raw], attributes));
        self.constants.extend([scale(&s, &[step]), ints(&z, DType::Uint8, &[], &[128])]);
        self.nodes.push(node("QuantizeLinear", &[&raw, &s, &z], &[&q]));
        self.nodes.push(node("DequantizeLinear", &[&q, &s, &z], &[&out]));
        out
    }

    fn constant(&mut self, shape: &[usize], values: &[f32]) -> String {
        let name = format!("c{}", self.constants.len());
        self.constants.push(f32_tensor(&name, shape, values));
        name
    }

    fn shape(&mut self, shape: &[i64]) -> String {
        let name = format!("c{}", self.constants.len());
        let raw = shape.iter().flat_map(|v| v.to_le_bytes()).collect();
        self.constants.push(tensor(&name, DType::Int64, &[shape.len()], raw));
        name
    }

    /// A layer of `k` inputs and `n` outputs; its weights differ from layer to layer.
    fn layer(&mut self, x: &str, [k, n]: [usize; 2], step: f32) -> String {
        let [w, s, z, d] = ["w", "ws", "wz", "wd"].map(|part| format!("{}.{part}", self.name()));
        let values: Vec<i64> = (0..k * n).map(|i| ((i * 37 + self.nodes.len() * 11) % 255) as i64 - 127).collect();
        self.constants.extend([
            ints(&w, DType::Int8, &[k, n], &values),
            scale(&s, &vec![0.008; n]),
            ints(&z, DType::Int8, &[n], &vec![0; n]),
        ]);
        self.nodes.push(NodeProto::of("DequantizeLinear", &[&w, &s, &z], &[&d], vec![attr::int("axis", 1)]));
        self.node("MatMul", &[x, &d], vec![], step)
    }
}

#[test]
fn a_block_with_every_operator_quantized_is_a_few_fused_ones() {
    let mut b = Rounded { constants: vec![], nodes: vec![] };
    let perm = |p: &[i64]| vec![attr::ints("perm", p)];
    let x = b.node("Identity", &["x"], vec![], 0.05);
    // Attention: 6 tokens, 2 heads of 4, laid out as timm's export.
    let (parts, step) = (b.layer(&x, [8, 24], 0.03), 0.03);
    let shape = b.shape(&[1, 6, 3, 2, 4]);
    let parts = b.node("Reshape", &[&parts, &shape], vec![], step);
    let parts = b.node("Transpose", &[&parts], perm(&[2, 0, 3, 1, 4]), step);
    let [q, k, v] = [0, 1, 2].map(|i| {
        let index = b.shape(&[i]);
        let index_of = b.constants.last_mut().unwrap();
        index_of.dims.clear();
        b.node("Gather", &[&parts, &index], vec![attr::int("axis", 0)], step)
    });
    let factor = b.constant(&[], &[0.7]);
    let q = b.node("Mul", &[&q, &factor], vec![], 0.02);
    let k = b.node("Transpose", &[&k], perm(&[0, 1, 3, 2]), step);
    let k = b.node("Mul", &[&k, &factor], vec![], 0.02);
    let scores = b.node("MatMul", &[&q, &k], vec![], 0.05);
    let probabilities = b.node("Softmax", &[&scores], vec![attr::int("axis", -1)], 1. / 127.);
    let y = b.node("MatMul", &[&probabilities, &v], vec![], 0.02);
    let y = b.node("Transpose", &[&y], perm(&[0, 2, 1, 3]), 0.02);
    let shape = b.shape(&[1, 6, 8]);
    let y = b.node("Reshape", &[&y, &shape], vec![], 0.02);
    let y = b.layer(&y, [8, 8], 0.03);
    let x = b.node("Add", &[&x, &y], vec![], 0.06);
    // MLP, its GELU in five operators.
    let [root, one, half] = [std::f32::consts::SQRT_2, 1., 0.5].map(|c| b.constant(&[], &[c]));
    let h = b.layer(&x, [8, 16], 0.05);
    let z = b.node("Div", &[&h, &root], vec![], 0.04);
    let z = b.node("Erf", &[&z], vec![], 1. / 127.);
    let z = b.node("Add", &[&z, &one], vec![], 2. / 127.);
    let z = b.node("Mul", &[&h, &z], vec![], 0.1);
    let z = b.node("Mul", &[&z, &half], vec![], 0.05);
    let y = b.layer(&z, [16, 8], 0.05);
    let y = b.node("Add", &[&x, &y], vec![], 0.08);
    b.nodes.push(node("Relu", &[&y], &["y"]));
    let g = graph(&[1, 6, 8], &[1, 6, 8], b.constants, b.nodes);

    let input = ArrayD::from_shape_fn(vec![1, 6, 8], |i| ((i[1] * 8 + i[2]) * 29 % 97) as f32 / 24. - 2.);
    let mut session = Session::from_graph(g, &Options::default()).unwrap();
    let got = session.run(&[input]).unwrap().remove(0);
    let plan: Vec<&str> = session.plan().iter().filter(|l| l.how != How::Layout).map(|l| l.class.as_str()).collect();
    // What the first layer of the MLP and the addition after it both read is rounded for itself.
    assert_eq!(plan, ["requantize", "linear", "attention", "linear", "requantize", "mlp", "activation"]);
    assert!(session.plan().iter().any(|l| l.class == "attention" && l.how == How::Integer));
    // ONNX Runtime 1.32 with graph optimizations disabled, in steps of 0.08.
    let want = [
        [76, 0, 0, 0, 0, 50, 121, 69],
        [0, 0, 41, 78, 71, 70, 0, 0],
        [0, 66, 121, 106, 0, 0, 0, 0],
        [0, 0, 62, 51, 35, 40, 0, 0],
        [0, 49, 79, 76, 0, 0, 0, 0],
        [28, 9, 0, 0, 0, 0, 0, 0],
    ];
    // A sum that falls on the edge between two steps may be rounded to the other.
    let off: Vec<f32> = got.iter().zip(want.as_flattened()).map(|(g, w)| (g / 0.08 - *w as f32).abs()).collect();
    let equal = off.iter().filter(|s| **s < 1e-3).count();
    assert!(equal >= 44 && off.iter().all(|s| *s < 1.001), "{equal} of {}: {got}", off.len());
}

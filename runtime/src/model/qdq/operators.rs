//! Operators that read and write integers, as float operators between DequantizeLinear and QuantizeLinear.

use super::Reader;
use crate::onnx::{AttributeProto, DType, Graph, NodeProto, Uses, elements, f32_tensor, shape_of, to_i64};

/// Whether an operator is one of those.
pub(super) fn is_integer(n: &NodeProto) -> bool {
    n.op_type().starts_with("QLinear") || n.op_type() == "QGemm" || n.op_type().contains("Integer")
}

/// Attributes that only the operators on integers have.
const OWN: [&str; 2] = ["opset", "channels_last"];

fn attributes(n: &NodeProto) -> Vec<AttributeProto> {
    n.attribute.iter().filter(|a| !OWN.contains(&a.name())).cloned().collect()
}

/// Rewrites a node; `None`, with nothing that matters done, where it is none of them or not of a form that is understood.
pub(super) fn rewrite(r: &mut Reader, n: &NodeProto) -> Option<()> {
    match n.op_type() {
        "QLinearConv" => conv(r, n),
        "QLinearMatMul" => mat_mul(r, n),
        "QGemm" => gemm(r, n),
        "QLinearAdd" => several(r, n, "Add", &[0, 3], 6),
        "QLinearMul" => several(r, n, "Mul", &[0, 3], 6),
        "QLinearConcat" => {
            let values: Vec<usize> = (2..n.input.len()).step_by(3).collect();
            several(r, n, "Concat", &values, 0)
        }
        "QLinearSigmoid"
        | "QLinearSoftmax"
        | "QLinearLeakyRelu"
        | "QLinearGlobalAveragePool"
        | "QLinearAveragePool"
        | "QLinearReduceMean" => several(r, n, &n.op_type()["QLinear".len()..], &[0], 3),
        "DynamicQuantizeMatMul" => dynamic(r, n),
        _ => None,
    }
}

/// Operators that take values (each with scale and zero point) at `values`, and the output's scale and zero point at `y`.
fn several(r: &mut Reader, n: &NodeProto, op: &str, values: &[usize], y: usize) -> Option<()> {
    if n.int("channels_last", 0) != 0 {
        return None;
    }
    let floats: Vec<String> = values
        .iter()
        .map(|&i| r.operand(n.input_name(i), n.input_name(i + 1), n.input_name(i + 2)))
        .collect::<Option<_>>()?;
    let floats: Vec<&str> = floats.iter().map(String::as_str).collect();
    let float = r.push(op, &floats, &format!("{}.float", n.output[0]), attributes(n));
    r.quantize(&float, n.input_name(y), n.input_name(y + 1), &n.output[0]);
    Some(())
}

/// An int32 bias: its scales are those of the input times those of the weights.
fn bias(r: &mut Reader, name: &str, input: &str, weights: &[f32], factor: f32) -> Option<String> {
    if name.is_empty() {
        return Some(String::new());
    }
    let t = r.g.initializers.get(name)?;
    let (values, shape) = (to_i64(t).ok()?, shape_of(t));
    let scale = r.g.const_scalar(input)?;
    let one = |(i, v): (usize, &i64)| *v as f32 * (scale * weights[i % weights.len()] * factor);
    let values: Vec<f32> = values.iter().enumerate().map(one).collect();
    let float = r.fresh(&format!("{name}.float"));
    r.constant(&float, &shape, &values);
    Some(float)
}

/// Inputs: x, scale, zero point, w, scale, zero point, output's scale and zero point, bias.
fn conv(r: &mut Reader, n: &NodeProto) -> Option<()> {
    let scales = r.g.const_f32(n.input_name(4))?;
    let bias = bias(r, n.input_name(8), n.input_name(1), &scales, 1.)?;
    let w = r.weight(n.input_name(3), &scales, n.input_name(5), 0)?;
    let x = r.operand(n.input_name(0), n.input_name(1), n.input_name(2))?;
    let inputs: Vec<&str> = [x.as_str(), &w, &bias].into_iter().filter(|i| !i.is_empty()).collect();
    let float = r.push("Conv", &inputs, &format!("{}.float", n.output[0]), attributes(n));
    r.quantize(&float, n.input_name(6), n.input_name(7), &n.output[0]);
    Some(())
}

/// Inputs: a, scale, zero point, b, scale, zero point, output's scale and zero point.
fn mat_mul(r: &mut Reader, n: &NodeProto) -> Option<()> {
    let rank = r.g.initializers.get(n.input_name(3)).map(|t| t.dims.len());
    let b = match rank {
        Some(rank) => {
            let scales = r.g.const_f32(n.input_name(4))?;
            r.weight(n.input_name(3), &scales, n.input_name(5), rank.checked_sub(1)?)?
        }
        None => r.operand(n.input_name(3), n.input_name(4), n.input_name(5))?,
    };
    let a = r.operand(n.input_name(0), n.input_name(1), n.input_name(2))?;
    let float = r.push("MatMul", &[&a, &b], &format!("{}.float", n.output[0]), vec![]);
    r.quantize(&float, n.input_name(6), n.input_name(7), &n.output[0]);
    Some(())
}

/// ONNX Runtime's: as [`mat_mul`], but a bias before the output's scale, which may be missing: a float output then.
fn gemm(r: &mut Reader, n: &NodeProto) -> Option<()> {
    let scales = r.g.const_f32(n.input_name(4))?;
    let bias = bias(r, n.input_name(6), n.input_name(1), &scales, n.float("alpha", 1.))?;
    let axis = if n.int("transB", 0) == 0 { 1 } else { 0 };
    let b = r.weight(n.input_name(3), &scales, n.input_name(5), axis)?;
    let a = r.operand(n.input_name(0), n.input_name(1), n.input_name(2))?;
    let inputs: Vec<&str> = [a.as_str(), &b, &bias].into_iter().filter(|i| !i.is_empty()).collect();
    if n.input_name(7).is_empty() {
        r.out.push(NodeProto::of("Gemm", &inputs, &[&n.output[0]], attributes(n)));
        return Some(());
    }
    let float = r.push("Gemm", &inputs, &format!("{}.float", n.output[0]), attributes(n));
    r.quantize(&float, n.input_name(7), n.input_name(8), &n.output[0]);
    Some(())
}

/// ONNX Runtime's: a float input, b, scale, zero point, bias.
fn dynamic(r: &mut Reader, n: &NodeProto) -> Option<()> {
    let scales = r.g.const_f32(n.input_name(2))?;
    let b = r.weight(n.input_name(1), &scales, n.input_name(3), 1)?;
    let parts = ["quantized", "scale", "zero_point"].map(|p| r.fresh(&format!("{}.{p}", n.output[0])));
    let outputs = [parts[0].as_str(), &parts[1], &parts[2]];
    r.out.push(NodeProto::of("DynamicQuantizeLinear", &[n.input_name(0)], &outputs, vec![]));
    let a = r.push("DequantizeLinear", &outputs, &format!("{}.dequantized", n.output[0]), vec![]);
    match n.input_name(4) {
        "" => r.out.push(NodeProto::of("MatMul", &[&a, &b], &[&n.output[0]], vec![])),
        bias => {
            let product = r.push("MatMul", &[&a, &b], &format!("{}.product", n.output[0]), vec![]);
            r.out.push(NodeProto::of("Add", &[&product, bias], &[&n.output[0]], vec![]));
        }
    }
    Some(())
}

/// A product of integers with the scales that follow it: `Cast(product) · (input's scale · weights' scale)`.
pub(super) struct Product {
    /// Nodes that it takes.
    pub(super) nodes: Vec<usize>,
    /// The last of them.
    pub(super) last: usize,
    node: NodeProto,
    input: String,
    scales: Vec<f32>,
    output: String,
}

/// The product that starts at a MatMulInteger or ConvInteger of constant weights.
pub(super) fn integer_product(r: &Reader, nodes: &[NodeProto], at: usize) -> Option<Product> {
    let n = &nodes[at];
    let seen = match n.op_type() {
        "MatMulInteger" | "ConvInteger" => r.seen.get(n.input_name(0))?,
        _ => return None,
    };
    let same_zero = n.input_name(2) == seen.zero;
    let cast = r.uses.only_consumer(&n.output[0]).filter(|&c| nodes[c].op_type() == "Cast")?;
    let last = r.uses.only_consumer(&nodes[cast].output[0]).filter(|&m| nodes[m].op_type() == "Mul")?;
    let factor = nodes[last].input.iter().find(|i| **i != nodes[cast].output[0])?;
    let inner = &nodes[r.uses.producer(factor)?];
    let weights = inner.input.iter().find(|i| **i != seen.scale)?;
    let scales = r.g.const_f32(weights)?;
    let weight = r.g.initializers.get(n.input_name(1))?;
    let constant = matches!(weight.dtype(), DType::Int8 | DType::Uint8) && weight.dims.len() == expected_rank(n);
    let zero = n.input_name(3).is_empty() || r.g.const_i64(n.input_name(3)).is_some_and(|z| !z.is_empty());
    let fits = constant
        && zero
        && !scales.is_empty()
        && same_zero
        && inner.op_type() == "Mul"
        && inner.input.contains(&seen.scale);
    fits.then(|| Product {
        nodes: vec![at, cast, last],
        last,
        node: n.clone(),
        input: n.input_name(0).into(),
        scales,
        output: nodes[last].output[0].clone(),
    })
}

fn expected_rank(n: &NodeProto) -> usize {
    if n.op_type() == "ConvInteger" { 4 } else { 2 }
}

/// Writes a product as a float layer.
pub(super) fn write_product(r: &mut Reader, p: Product) {
    let (op, axis) = if p.node.op_type() == "ConvInteger" { ("Conv", 0) } else { ("MatMul", 1) };
    let x = r.float(&p.input).expect("the input was seen");
    let w = r.weight(p.node.input_name(1), &p.scales, p.node.input_name(3), axis).expect("constant weights");
    r.out.push(NodeProto::of(op, &[&x, &w], &[&p.output], attributes(&p.node)));
}

/// Moves constants that are added to each channel into convolutions without a bias.
pub(super) fn absorb_conv_bias(g: &mut Graph) {
    let uses = Uses::of(g);
    let mut dropped = vec![];
    for i in 0..g.nodes.len() {
        if g.nodes[i].op_type() != "Conv" || !g.nodes[i].input_name(2).is_empty() {
            continue;
        }
        let output = g.nodes[i].output[0].clone();
        let Some(next) = uses.only_consumer(&output).filter(|&n| g.nodes[n].op_type() == "Add") else { continue };
        let Some(name) = g.nodes[next].input.iter().find(|v| **v != output).cloned() else { continue };
        let Some(shape) = g.initializers.get(&name).map(shape_of) else { continue };
        let [.., channels, 1, 1] = shape[..] else { continue };
        let Some(values) = g.const_f32(&name).filter(|v| v.len() == channels && elements(&shape) == channels) else {
            continue;
        };
        let bias = g.fresh(&format!("{name}.row"));
        g.initializers.insert(bias.clone(), f32_tensor(&bias, &[channels], &values));
        g.nodes[i].input.truncate(2);
        g.nodes[i].input.push(bias);
        g.nodes[i].output[0] = g.nodes[next].output[0].clone();
        dropped.push(next);
    }
    let mut i = 0..;
    g.nodes.retain(|_| i.next().is_some_and(|i| !dropped.contains(&i)));
}

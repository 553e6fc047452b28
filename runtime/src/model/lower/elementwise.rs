//! LayerNorm, GELU (an operator or a chain around Erf), SiLU and other element-wise functions.

use super::{Fused, Lowered, Rewrites};
use crate::kernels::{Activation, Norm};
use crate::onnx::{DType, NodeProto};

pub fn run(l: &mut Lowered) {
    gelu_chains(l);
    silu_chains(l);
    single_nodes(l);
}

fn single_nodes(l: &mut Lowered) {
    let mut r = Rewrites::default();
    for i in 0..l.graph.nodes.len() {
        let n = l.graph.nodes[i].clone();
        if !matches!(n.domain(), "" | "ai.onnx" | "com.microsoft") || n.output.len() != 1 {
            continue;
        }
        let Some((DType::Float, shape)) = l.graph.fact(n.input_name(0)) else { continue };
        let fused = match n.op_type() {
            "LayerNormalization" => norm(l, &n, &shape).map(Fused::LayerNorm),
            _ => activation(l, &n).map(Fused::Activation),
        };
        if let Some(fused) = fused {
            let new = l.node(fused, &[n.input_name(0)], &n.output[0]);
            r.replace(&[i], new);
        }
    }
    l.apply(r);
}

fn norm(l: &Lowered, n: &NodeProto, shape: &[usize]) -> Option<Norm> {
    let axis = super::constant::normal_axis(n.int("axis", -1), shape.len())?;
    let width = *shape.last()?;
    let gamma = l.graph.const_f32(n.input_name(1)).filter(|g| g.len() == width)?;
    let beta = match n.input_name(2) {
        "" => vec![0.; width],
        b => l.graph.const_f32(b).filter(|b| b.len() == width)?,
    };
    (axis + 1 == shape.len()).then(|| Norm { gamma, beta, epsilon: n.float("epsilon", 1e-5) })
}

fn activation(l: &Lowered, n: &NodeProto) -> Option<Activation> {
    Some(match n.op_type() {
        "Gelu" if n.string("approximate", "none") == "tanh" => Activation::GeluTanh,
        "Gelu" => Activation::Gelu,
        "Relu" => Activation::Relu,
        "Sigmoid" => Activation::Sigmoid,
        "HardSwish" => Activation::HardSwish,
        "Clip" => {
            let bounds = (l.graph.const_scalar(n.input_name(1))?, l.graph.const_scalar(n.input_name(2))?);
            (bounds == (0., 6.)).then_some(Activation::Relu6)?
        }
        _ => return None,
    })
}

/// The other input of a two-input node.
fn other<'a>(n: &'a NodeProto, one: &str) -> Option<&'a str> {
    match n.input.as_slice() {
        [a, b] if a == one => Some(b),
        [a, b] if b == one => Some(a),
        _ => None,
    }
}

fn near(a: f32, b: f32) -> bool {
    (a - b).abs() < 1e-4 * b.abs()
}

/// `0.5 · x · (1 + erf(x / √2))`, with the half on either side.
fn gelu_chains(l: &mut Lowered) {
    let uses = l.uses();
    let mut r = Rewrites::default();
    for erf in 0..l.graph.nodes.len() {
        if l.graph.nodes[erf].op_type() == "Erf"
            && let Some((nodes, x, out)) = gelu_chain(l, &uses, erf)
        {
            let new = l.node(Fused::Activation(Activation::Gelu), &[&x], &out);
            r.replace(&nodes, new);
        }
    }
    l.apply(r);
}

fn gelu_chain(l: &Lowered, uses: &crate::onnx::Uses, erf: usize) -> Option<(Vec<usize>, String, String)> {
    let g = &l.graph;
    let constant = |n: &NodeProto, not: &str| other(n, not).and_then(|c| g.const_scalar(c));
    let scaling = uses.producer(g.nodes[erf].input_name(0))?;
    let s = &g.nodes[scaling];
    let x = s.input.iter().find(|i| g.const_scalar(i).is_none())?.clone();
    let root2 = std::f32::consts::SQRT_2;
    match (s.op_type(), constant(s, &x)?) {
        ("Div", c) if near(c, root2) && s.input_name(0) == x => {}
        ("Mul", c) if near(c, 1. / root2) => {}
        _ => return None,
    }
    let erf_out = &g.nodes[erf].output[0];
    let plus = uses.only_consumer(erf_out)?;
    if g.nodes[plus].op_type() != "Add" || constant(&g.nodes[plus], erf_out)? != 1. {
        return None;
    }
    let plus_out = &g.nodes[plus].output[0];
    let times = uses.only_consumer(plus_out)?;
    let t = &g.nodes[times];
    if t.op_type() != "Mul" {
        return None;
    }
    let factor = other(t, plus_out)?;
    let mut nodes = vec![scaling, erf, plus, times];
    if factor == x {
        let half = uses.only_consumer(&t.output[0])?;
        let h = &g.nodes[half];
        match (h.op_type(), constant(h, &t.output[0])?) {
            ("Mul", 0.5) => {}
            ("Div", 2.) if h.input_name(0) == t.output[0] => {}
            _ => return None,
        }
        nodes.push(half);
        return Some((nodes, x, h.output[0].clone()));
    }
    let half = uses.producer(factor)?;
    let h = &g.nodes[half];
    let halves = matches!((h.op_type(), constant(h, &x)?), ("Mul", 0.5) | ("Div", 2.));
    if !halves || !h.input.contains(&x) || uses.only_consumer(factor).is_none() {
        return None;
    }
    nodes.push(half);
    let out = t.output[0].clone();
    Some((nodes, x, out))
}

/// `x · sigmoid(x)`.
fn silu_chains(l: &mut Lowered) {
    let uses = l.uses();
    let mut r = Rewrites::default();
    for i in 0..l.graph.nodes.len() {
        let n = &l.graph.nodes[i];
        if n.op_type() != "Sigmoid" {
            continue;
        }
        let (x, y) = (n.input_name(0).to_string(), n.output[0].clone());
        let Some(mul) = uses.only_consumer(&y) else { continue };
        let m = &l.graph.nodes[mul];
        if m.op_type() == "Mul" && other(m, &y) == Some(&x) {
            let out = m.output[0].clone();
            let new = l.node(Fused::Activation(Activation::Silu), &[&x], &out);
            r.replace(&[i, mul], new);
        }
    }
    l.apply(r);
}

//! Element-wise functions of 8-bit values, as files spell them that quantize every operator: chains (a GELU of five
//! operators) with rounding in between. All that such a chain can give is 256 values.

use super::constant::Parameters;
use super::pairs::{is_move, origin};
use super::{Fused, Lowered, Rewrites};
use crate::kernels::erf;
use crate::kernels::requantize::Table;
use crate::onnx::{Graph, NodeProto, Uses};
use std::collections::{HashMap, HashSet};

pub fn run(l: &mut Lowered) {
    let uses = l.uses();
    let mut r = Rewrites::default();
    for i in 0..l.graph.nodes.len() {
        for x in l.graph.nodes[i].output.clone() {
            let Some(found) = find(&l.graph, &uses, &r, &x) else { continue };
            let new = l.node(Fused::Table(found.table), &[&x], &found.output);
            r.replace(&found.nodes, new);
        }
    }
    l.apply(r);
}

struct Found {
    nodes: Vec<usize>,
    table: Table,
    output: String,
}

/// What is computed of `x` alone, element by element, up to a value that everything else reads.
fn find(g: &Graph, uses: &Uses, r: &Rewrites, x: &str) -> Option<Found> {
    if uses.consumers(x).iter().any(|&i| is_move(&g.nodes[i])) {
        return None;
    }
    let pair = origin(g, uses, x)?;
    let zero = pair.parameters.byte()?;
    let scale = pair.parameters.scale;
    let start: Vec<f32> = (0..256).map(|place| (place - i32::from(zero)) as f32 * scale).collect();
    // Values that depend on x alone, and the nodes that compute them.
    let mut known = HashMap::from([(x, start)]);
    let mut nodes = vec![];
    let mut waiting: Vec<usize> = uses.consumers(x).to_vec();
    while let Some(i) = pop_first(&mut waiting) {
        let n = &g.nodes[i];
        if !r.is_free(i) || nodes.contains(&i) || n.output.len() != 1 {
            continue;
        }
        if let Some(values) = evaluate(g, n, &known) {
            known.insert(&n.output[0], values);
            nodes.push(i);
            waiting.extend(uses.consumers(&n.output[0]));
        }
    }
    // The last float value that hides all before it; a pair at its end is left to who reads it.
    let ends = nodes.iter().rev().filter(|&&i| !matches!(g.nodes[i].op_type(), "QuantizeLinear" | "DequantizeLinear"));
    ends.copied().find_map(|end| {
        let output = &g.nodes[end].output[0];
        let inside = ancestors(g, uses, end, &nodes);
        let hidden = |&i: &usize| {
            let o = &g.nodes[i].output[0];
            i == end || (!uses.is_output(o) && uses.consumers(o).iter().all(|c| inside.contains(c)))
        };
        let values: &[f32; 256] = known[output.as_str()].as_slice().try_into().ok()?;
        let pays = inside.len() > 1 && values.iter().all(|v| v.is_finite());
        (pays && inside.iter().all(hidden)).then(|| Found {
            nodes: inside.into_iter().collect(),
            table: Table { scale, zero, values: Box::new(*values) },
            output: output.clone(),
        })
    })
}

fn pop_first(waiting: &mut Vec<usize>) -> Option<usize> {
    let at = waiting.iter().enumerate().min_by_key(|(_, node)| **node)?.0;
    Some(waiting.swap_remove(at))
}

/// `end` and those of `nodes` that it depends on.
fn ancestors(g: &Graph, uses: &Uses, end: usize, nodes: &[usize]) -> HashSet<usize> {
    let mut found = HashSet::new();
    let mut waiting = vec![end];
    while let Some(i) = waiting.pop() {
        if nodes.contains(&i) && found.insert(i) {
            waiting.extend(g.nodes[i].input.iter().filter_map(|v| uses.producer(v)));
        }
    }
    found
}

/// An operator's results for all 256 values of its inputs; nothing where it is not element-wise in what is known.
fn evaluate(g: &Graph, n: &NodeProto, known: &HashMap<&str, Vec<f32>>) -> Option<Vec<f32>> {
    if !n.domain().is_empty() {
        return None;
    }
    let input = |slot: usize| match known.get(n.input_name(slot)) {
        Some(values) => Some(values.clone()),
        None => g.const_scalar(n.input_name(slot)).map(|v| vec![v; 256]),
    };
    // Between QuantizeLinear and DequantizeLinear values are integers.
    let (x, scalar) = (input(0)?, |slot: usize| g.const_scalar(n.input_name(slot)));
    let one = |f: &dyn Fn(f32) -> f32| Some(x.iter().map(|&v| f(v)).collect());
    let two = |f: &dyn Fn(f32, f32) -> f32| Some(x.iter().zip(input(1)?).map(|(&a, b)| f(a, b)).collect());
    match n.op_type() {
        "QuantizeLinear" => {
            let p = Parameters::of(g, n)?;
            let (low, high) = p.range()?;
            one(&|v| ((v / p.scale).round_ties_even() + p.zero as f32).clamp(low as f32, high as f32))
        }
        "DequantizeLinear" => {
            let p = Parameters::of(g, n)?;
            one(&|v| (v - p.zero as f32) * p.scale)
        }
        "Add" => two(&|a, b| a + b),
        "Sub" => two(&|a, b| a - b),
        "Mul" => two(&|a, b| a * b),
        "Div" => two(&|a, b| a / b),
        "Pow" => two(&f32::powf),
        "Erf" => one(&erf),
        "Tanh" => one(&f32::tanh),
        "Sigmoid" => one(&|v| 1. / (1. + (-v).exp())),
        "Exp" => one(&f32::exp),
        "Sqrt" => one(&f32::sqrt),
        "Neg" => one(&|v| -v),
        "Relu" => one(&|v| v.max(0.)),
        "HardSigmoid" => {
            let (alpha, beta) = (n.float("alpha", 0.2), n.float("beta", 0.5));
            one(&|v| (alpha * v + beta).clamp(0., 1.))
        }
        "HardSwish" => one(&|v| v * (v / 6. + 0.5).clamp(0., 1.)),
        "Clip" => {
            let bound = |slot: usize, none: f32| if n.input_name(slot).is_empty() { Some(none) } else { scalar(slot) };
            let (low, high) = (bound(1, f32::MIN)?, bound(2, f32::MAX)?);
            one(&|v| v.max(low).min(high))
        }
        _ => None,
    }
}

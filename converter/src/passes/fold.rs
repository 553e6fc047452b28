//! Constants evaluated, nodes that change nothing dropped, strided slices spelled as gathers.

use super::{Context, Pass, PassReport, bypass, remove_nodes, report};
use crate::shapes::{self, Facts};
use std::collections::HashSet;
use vedge_runtime::Result;
use vedge_runtime::onnx::{DType, Graph, NodeProto, attr, elements, i64_tensor};

/// A folded constant may always have this many elements; a larger one only if it is no larger than its inputs.
const ALWAYS: usize = 1 << 20;

pub struct Fold;

impl Pass for Fold {
    fn name(&self) -> &'static str {
        "fold"
    }

    fn run(&self, graph: &mut Graph, _cx: &Context) -> Result<PassReport> {
        let before = graph.nodes.len();
        let facts = shapes::infer(graph)?;
        let folded = fold_constants(graph, facts);
        let mut facts = shapes::infer(graph)?;
        let dropped = drop_noops(graph, &mut facts);
        let gathers = slices_to_gathers(graph, &facts);
        graph.prune_unused();
        let line = format!(
            "{before} nodes became {}: {folded} constant, {dropped} without effect, {gathers} strided slices as gathers",
            graph.nodes.len()
        );
        Ok(report(self.name(), folded + dropped + gathers, line))
    }
}

/// Replaces nodes whose outputs are known by their values.
pub(super) fn fold_constants(graph: &mut Graph, mut facts: Facts) -> usize {
    let outputs: HashSet<String> = graph.outputs.iter().map(|o| o.name().to_string()).collect();
    let mut dead = HashSet::new();
    for (i, n) in graph.nodes.iter().enumerate() {
        let size = |names: &[String]| -> usize { names.iter().filter_map(|v| facts.shape(v)).map(elements).sum() };
        // A side output (running statistics, a mask) that nobody knows the value of does not keep the node.
        let known = n.output.first().is_some_and(|o| facts.constants.contains_key(o) && !outputs.contains(o));
        if known && size(&n.output) <= ALWAYS.max(size(&n.input)) {
            dead.insert(i);
        }
    }
    for &i in &dead {
        for o in graph.nodes[i].output.clone() {
            if let Some(t) = facts.constants.remove(&o) {
                graph.initializers.insert(o, t);
            }
        }
    }
    remove_nodes(graph, &dead);
    graph.prune_unused();
    dead.len()
}

/// Drops nodes whose output is their input.
fn drop_noops(graph: &mut Graph, facts: &mut Facts) -> usize {
    let mut dead = HashSet::new();
    for i in 0..graph.nodes.len() {
        let n = &graph.nodes[i];
        let Some(same) = passes_through(graph, n, facts) else { continue };
        let (same, output) = (n.input_name(same).to_string(), n.output[0].clone());
        if bypass(graph, &output, &same) {
            dead.insert(i);
        }
    }
    remove_nodes(graph, &dead);
    dead.len()
}

/// The input that a node hands on unchanged, if it does nothing else.
fn passes_through(graph: &Graph, n: &NodeProto, facts: &Facts) -> Option<usize> {
    let fact = |i: usize| facts.types.get(n.input_name(i));
    let out = facts.types.get(n.output.first()?)?;
    let same = |i: usize| fact(i) == Some(out);
    let all = |i: usize, wanted: f32| {
        let values = graph.const_f32(n.input_name(i));
        values.is_some_and(|v| v.iter().all(|&x| x.to_bits() == wanted.to_bits()))
    };
    let condition = || graph.const_i64(n.input_name(0));
    match n.op_type() {
        "Identity" | "Dropout" | "Cast" | "Reshape" | "Expand" | "Slice" | "Flatten" | "Squeeze" | "Unsqueeze"
            if same(0) =>
        {
            // A slice that keeps the shape may still reverse an axis.
            let forward = n.op_type() != "Slice"
                || n.input_name(4).is_empty()
                || graph.const_i64(n.input_name(4)).is_some_and(|s| s.iter().all(|&s| s > 0));
            forward.then_some(0)
        }
        "Concat" if n.input.len() == 1 => Some(0),
        "Transpose" => n.ints("perm").filter(|p| p.iter().enumerate().all(|(i, &d)| d == i as i64)).map(|_| 0),
        // Masks that mask nothing.
        "Add" if same(0) && all(1, 0.0) => Some(0),
        "Add" if same(1) && all(0, 0.0) => Some(1),
        "Mul" if same(0) && all(1, 1.0) => Some(0),
        "Mul" if same(1) && all(0, 1.0) => Some(1),
        "Div" if same(0) && all(1, 1.0) => Some(0),
        "Pad" if same(0) && graph.const_i64(n.input_name(1)).is_some_and(|p| p.iter().all(|&p| p == 0)) => Some(0),
        "Where" if same(1) && condition().is_some_and(|c| c.iter().all(|&c| c != 0)) => Some(1),
        "Where" if same(2) && condition().is_some_and(|c| c.iter().all(|&c| c == 0)) => Some(2),
        _ => None,
    }
}

/// tract 0.23.9 moves a strided slice over a reshape and gets the axis wrong; a gather it leaves alone.
fn slices_to_gathers(graph: &mut Graph, facts: &Facts) -> usize {
    let mut changes = 0;
    for i in 0..graph.nodes.len() {
        let Some(gathers) = gathers_of(graph, &graph.nodes[i], facts) else { continue };
        let slice = graph.nodes[i].clone();
        let mut from = slice.input_name(0).to_string();
        let mut nodes = vec![];
        let last = gathers.len().saturating_sub(1);
        for (k, (axis, indices)) in gathers.into_iter().enumerate() {
            let to = if k == last { slice.output[0].clone() } else { graph.fresh(&format!("{}_{k}", slice.output[0])) };
            let name = graph.fresh(&format!("{}_indices_{k}", slice.output[0]));
            graph.initializers.insert(name.clone(), i64_tensor(&name, &[indices.len()], &indices));
            nodes.push(NodeProto::of("Gather", &[&from, &name], &[&to], vec![attr::int("axis", axis as i64)]));
            from = to;
        }
        changes += 1;
        graph.nodes.splice(i..=i, nodes);
    }
    changes
}

/// Axis and indices of each gather that does what a slice with some step other than 1 does.
fn gathers_of(graph: &Graph, n: &NodeProto, facts: &Facts) -> Option<Vec<(usize, Vec<i64>)>> {
    if n.op_type() != "Slice" {
        return None;
    }
    let list = |i: usize| graph.const_i64(n.input_name(i));
    let (starts, ends, steps) = (list(1)?, list(2)?, list(4)?);
    if steps.iter().all(|&s| s == 1) || steps.contains(&0) {
        return None;
    }
    let shape = facts.shape(n.input_name(0))?;
    let axes = if n.input_name(3).is_empty() { (0..starts.len() as i64).collect() } else { list(3)? };
    let mut gathers = vec![];
    for (k, &axis) in axes.iter().enumerate() {
        let axis = usize::try_from(if axis < 0 { axis + shape.len() as i64 } else { axis }).ok()?;
        let dim = *shape.get(axis)? as i64;
        let step = *steps.get(k)?;
        let absolute = |v: i64| if v < 0 { v.saturating_add(dim) } else { v };
        let (low, high) = if step > 0 { (0, dim) } else { (-1, dim - 1) };
        let start = absolute(*starts.get(k)?).clamp(low.max(0), high);
        let end = absolute(*ends.get(k)?).clamp(low, high);
        let mut indices = vec![];
        let mut at = start;
        while (step > 0 && at < end) || (step < 0 && at > end) {
            indices.push(at);
            at += step;
        }
        if indices.is_empty() {
            return None;
        }
        let whole = indices.len() as i64 == dim && step == 1;
        if !whole {
            gathers.push((axis, indices));
        }
    }
    (!gathers.is_empty() && facts.types.get(n.input_name(0))?.0 != DType::Undefined).then_some(gathers)
}

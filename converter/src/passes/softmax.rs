//! `Where(IsNaN(softmax), 0, softmax)` after every attention: softmax of a row has a NaN only when the row is all
//! minus infinity, or has a NaN itself. Without a mask in front (or with a finite one) neither can be, so the guard goes.

use super::{Context, Pass, PassReport, bypass, report};
use vedge_runtime::Result;
use vedge_runtime::onnx::{Graph, NodeProto, Uses};

pub struct SoftmaxGuard;

impl Pass for SoftmaxGuard {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn run(&self, graph: &mut Graph, _cx: &Context) -> Result<PassReport> {
        let uses = Uses::of(graph);
        let guards: Vec<(String, String)> =
            graph.nodes.iter().filter_map(|n| guarded(graph, &uses, n).map(|s| (n.output[0].clone(), s))).collect();
        let changes = guards.iter().filter(|(guard, softmax)| bypass(graph, guard, softmax)).count();
        graph.prune_unused();
        Ok(report(self.name(), changes, format!("{changes} guards against NaN after softmax removed")))
    }
}

/// The softmax output that a Where guards needlessly.
fn guarded(graph: &Graph, uses: &Uses, guard: &NodeProto) -> Option<String> {
    let node = |value: &str, op: &str| uses.producer(value).map(|i| &graph.nodes[i]).filter(|n| n.op_type() == op);
    if guard.op_type() != "Where" {
        return None;
    }
    let value = guard.input_name(2);
    let zero = graph.const_f32(guard.input_name(1)).is_some_and(|z| z.iter().all(|&z| z == 0.0));
    let nan = node(guard.input_name(0), "IsNaN")?;
    let softmax = node(value, "Softmax")?;
    if !zero || nan.input_name(0) != value {
        return None;
    }
    let scores = &graph.nodes[uses.producer(softmax.input_name(0))?];
    let finite = |i: usize| graph.const_f32(scores.input_name(i)).is_some_and(|v| v.iter().all(|v| v.is_finite()));
    let safe = match scores.op_type() {
        "MatMul" | "Mul" | "Div" => true,
        "Add" => finite(0) || finite(1),
        _ => false,
    };
    safe.then(|| value.to_string())
}

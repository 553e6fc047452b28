//! Raises old operator sets to 17: LayerNormalization and per-channel DequantizeLinear exist from there on.

use super::{Context, Pass, PassReport, report};
use crate::shapes::describe;
use vedge_runtime::onnx::{Graph, NodeProto, i64_tensor};
use vedge_runtime::{Error, Result};

const OLDEST: i64 = 11;
const NEWEST: i64 = 25;
const WANTED: i64 = 17;
/// The first IR version that ONNX's checker accepts with opset 17.
const WANTED_IR: i64 = 8;

pub struct Opset;

impl Pass for Opset {
    fn name(&self) -> &'static str {
        "opset"
    }

    fn run(&self, graph: &mut Graph, _cx: &Context) -> Result<PassReport> {
        let have = graph.opset();
        if !(OLDEST..=NEWEST).contains(&have) {
            return Err(Error::Unsupported {
                what: format!("operator set {have}: vedge reads {OLDEST} to {NEWEST}"),
                hint: "export again with opset 17 or 18".into(),
            });
        }
        if graph.header.ir_version() < WANTED_IR {
            graph.header.ir_version = Some(WANTED_IR);
        }
        if have >= WANTED {
            return Ok(report(self.name(), 0, format!("operator set {have}")));
        }
        let mut changes = 0;
        if have < 13 {
            let mut nodes = std::mem::take(&mut graph.nodes);
            for n in &mut nodes {
                changes += usize::from(to_13(graph, n)?);
            }
            graph.nodes = nodes;
        }
        graph.set_opset(WANTED);
        Ok(report(self.name(), changes, format!("operator set {have} raised to {WANTED}, {changes} nodes respelled")))
    }
}

/// Rewrites one node of opset 11 or 12 as opset 13 spells it.
fn to_13(graph: &mut Graph, n: &mut NodeProto) -> Result<bool> {
    let attribute = match n.op_type() {
        "Squeeze" | "Unsqueeze" | "ReduceSum" => "axes",
        "Split" => "split",
        "Softmax" | "LogSoftmax" | "Hardmax" => {
            // Before 13 everything from the axis on is one row; the last axis means the same in both.
            let axis = n.int("axis", 1);
            n.attribute.retain(|a| a.name() != "axis");
            n.attribute.push(vedge_runtime::onnx::attr::int("axis", -1));
            let last = graph.shape(n.input_name(0)).map(|s| s.len() as i64 - 1);
            if axis == -1 || Some(axis) == last {
                return Ok(true);
            }
            return Err(Error::Unsupported {
                what: format!("{}: axis {axis} under operator set {}", describe(n), graph.opset()),
                hint: "export again with opset 17 or 18".into(),
            });
        }
        _ => return Ok(false),
    };
    let Some(values) = n.ints(attribute).map(<[i64]>::to_vec) else { return Ok(false) };
    let output = n.output.first().cloned().unwrap_or_default();
    let name = graph.fresh(&format!("{output}_{attribute}"));
    graph.initializers.insert(name.clone(), i64_tensor(&name, &[values.len()], &values));
    n.attribute.retain(|a| a.name() != attribute);
    n.input.truncate(1);
    n.input.push(name);
    Ok(true)
}

//! What runs how: one line for each operator of a lowered graph.

use super::lower::{DOMAIN, Lowered, fused_index};
use super::ops::Fused;
use crate::onnx::NodeProto;

/// How one node of the file runs.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum How {
    /// Integer arithmetic.
    Integer,
    /// One of vedge's fused float operators.
    Fused,
    /// A plain tract operator in float.
    Tract,
    /// Moves or reinterprets data only (reshape, transpose, constant).
    Layout,
    /// Not at all: the model cannot be loaded.
    Unsupported,
}

/// One operator of the execution plan.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct PlanLine {
    /// Name of the node (of the last one, where several are fused).
    pub name: String,
    /// Operator class: `linear`, `conv`, `attention`, `layer_norm`, … or the ONNX operator.
    pub class: String,
    /// How it runs.
    pub how: How,
    /// Why it does not run, or not in integers although it carries quantization; empty otherwise.
    pub note: String,
}

/// Operators that move or rename data without arithmetic.
const LAYOUT: [&str; 19] = [
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Slice",
    "Split",
    "Concat",
    "Gather",
    "GatherND",
    "GatherElements",
    "Expand",
    "Identity",
    "Cast",
    "Pad",
    "Tile",
    "DepthToSpace",
    "SpaceToDepth",
    "Shape",
];

/// How each operator of a lowered graph runs, in execution order, provided that it can be wired.
pub fn lines(l: &Lowered) -> Vec<PlanLine> {
    l.graph.nodes.iter().map(|n| line(l, n)).collect()
}

fn line(l: &Lowered, n: &NodeProto) -> PlanLine {
    let name = n.output.first().cloned().unwrap_or_default();
    let mut note = l.notes.get(&name).cloned().unwrap_or_default();
    let (class, how) = match fused_index(n) {
        Some(i) => {
            let fused = &l.fused[i];
            let how = match fused {
                Fused::Copy(_) => How::Layout,
                f if f.is_integer() => How::Integer,
                _ => How::Fused,
            };
            (fused.class().to_string(), how)
        }
        None if LAYOUT.contains(&n.op_type()) => (n.op_type().to_string(), How::Layout),
        None => {
            if matches!(n.op_type(), "QuantizeLinear" | "DequantizeLinear") {
                note = "no pattern took this quantization: simulated in float".into();
            }
            (n.op_type().to_string(), How::Tract)
        }
    };
    debug_assert!(n.domain() != DOMAIN || how != How::Tract);
    PlanLine { name, class, how, note }
}

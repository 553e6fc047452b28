//! Whether INT8 pays for a model at all, by counted work, so that the same inputs give the same answer on every machine and at
//! every load; what a machine measures is told beside it but decides nothing.

use super::layers::{self, Layer};
use std::collections::BTreeSet;
use vedge_runtime::onnx::{Graph, elements};

/// Multiply-accumulates that integers do while floats do one (`tests/records/speed.md`: layers of DeiT and Swin in our kernels).
const TIMES: f64 = 3.0;
/// Float multiply-accumulates that could be done while an element is read, rounded and stored as an integer (estimated).
const ROUNDING: f64 = 8.0;
/// Float multiply-accumulates for each element that any other operator makes (estimated).
const ELEMENT: f64 = 4.0;
/// Least gain in speed for which INT8 is worth its loss, well beyond what counting cannot know.
pub const LEAST: f64 = 1.2;
/// Least logit signal-to-noise ratio on the judging pictures, dB: below, answers change by the dozen in a thousand.
pub const LEAST_DB: f64 = 20.0;

/// How many times as fast as float a model is with these layers in integers, by counted work (estimated). `graph` is the float
/// model, `integer` names its layers in integers.
pub fn speedup(graph: &Graph, integer: &[Layer]) -> f64 {
    let names: BTreeSet<&str> = integer.iter().map(|l| l.name.as_str()).collect();
    let weighted = layers::find(graph).0;
    let nodes: BTreeSet<usize> = weighted.iter().map(|l| l.node).collect();
    let (mut float, mut mixed) = (0.0, 0.0);
    for l in &weighted {
        let work = layers::macs(graph, l) as f64;
        let read = graph.shape(&l.activation).map_or(0, |s| elements(&s)) as f64;
        float += work;
        mixed += if names.contains(l.name.as_str()) { work / TIMES + ROUNDING * read } else { work };
    }
    for (_, n) in graph.nodes.iter().enumerate().filter(|(i, _)| !nodes.contains(i)) {
        let made = n.output.first().and_then(|o| graph.shape(o)).map_or(0, |s| elements(&s)) as f64;
        // A product of two activations is work for every element; data that only moves is none.
        let work = match n.op_type() {
            "MatMul" => made * graph.shape(n.input_name(0)).and_then(|s| s.last().copied()).unwrap_or(0) as f64,
            op if MOVES.contains(&op) => 0.0,
            _ => made * ELEMENT,
        };
        float += work;
        mixed += work;
    }
    if mixed > 0.0 { float / mixed } else { 1.0 }
}

/// Operators that do no arithmetic.
const MOVES: [&str; 12] = [
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Slice",
    "Split",
    "Concat",
    "Gather",
    "Expand",
    "Identity",
    "Cast",
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quantize::tests::{empty, noise};
    use vedge_runtime::onnx::{DType, NodeProto, attr, f32_tensor, value_info};

    fn linear(inputs: usize, outputs: usize) -> Graph {
        let mut g = empty(17);
        g.inputs.push(value_info("x", DType::Float, &[1, 16, inputs]));
        g.outputs.push(value_info("y", DType::Float, &[1, 16, outputs]));
        g.initializers.insert("w".into(), f32_tensor("w", &[inputs, outputs], &noise(1, inputs * outputs)));
        g.nodes.push(NodeProto::of("MatMul", &["x", "w"], &["y"], vec![]));
        g
    }

    #[test]
    fn large_layers_pay_and_what_stays_float_does_not() {
        let g = linear(256, 512);
        let all = layers::find(&g).0;
        assert!(speedup(&g, &all) > 2.5, "{}", speedup(&g, &all));
        assert_eq!(speedup(&g, &[]), 1.0);
    }

    #[test]
    fn layers_that_hardly_use_what_they_read_do_not_pay() {
        let few = linear(256, 4);
        assert!(speedup(&few, &layers::find(&few).0) < 1.0);
        let mut g = empty(17);
        g.inputs.push(value_info("x", DType::Float, &[1, 8, 16, 16]));
        g.outputs.push(value_info("y", DType::Float, &[1, 8, 14, 14]));
        g.initializers.insert("w".into(), f32_tensor("w", &[8, 1, 3, 3], &noise(1, 72)));
        let how = vec![attr::int("group", 8), attr::ints("kernel_shape", &[3, 3])];
        g.nodes.push(NodeProto::of("Conv", &["x", "w"], &["y"], how));
        assert!(speedup(&g, &layers::find(&g).0) < LEAST);
    }
}

//! Reshape · Gemm · Reshape around a linear layer (as onnxslim writes it) spelled as MatMul · Add.

use super::{Context, Pass, PassReport, report};
use crate::shapes;
use vedge_runtime::Result;
use vedge_runtime::onnx::{Graph, NodeProto, Uses, f32_tensor, shape_of};

pub struct Gemm;

impl Pass for Gemm {
    fn name(&self) -> &'static str {
        "gemm"
    }

    fn run(&self, graph: &mut Graph, _cx: &Context) -> Result<PassReport> {
        let facts = shapes::infer(graph)?;
        let uses = Uses::of(graph);
        let mut changes = 0;
        let mut replaced: Vec<(usize, [NodeProto; 2])> = vec![];
        for (i, gemm) in graph.nodes.clone().iter().enumerate().filter(|(_, n)| n.op_type() == "Gemm") {
            let plain = gemm.float("alpha", 1.0) == 1.0 && gemm.float("beta", 1.0) == 1.0 && gemm.int("transA", 0) == 0;
            let before = uses.producer(gemm.input_name(0)).map(|p| graph.nodes[p].clone());
            let after = uses.only_consumer(&gemm.output[0]);
            let (Some(before), Some(after), true) = (before, after, plain) else { continue };
            if before.op_type() != "Reshape" || graph.nodes[after].op_type() != "Reshape" || gemm.input.len() < 3 {
                continue;
            }
            let output = graph.nodes[after].output[0].clone();
            let (Some(x), Some(y)) = (facts.shape(before.input_name(0)), facts.shape(&output)) else { continue };
            let same_rows = x.len() == y.len() && x.len() > 2 && x[..x.len() - 1] == y[..y.len() - 1];
            let Some((k, n)) = weight(graph, gemm) else { continue };
            if !same_rows || x.last() != Some(&k) || y.last() != Some(&n) {
                continue;
            }
            let Some(w) = transposed_weight(graph, gemm) else { continue };
            let product = graph.fresh(&format!("{}_matmul", gemm.output[0]));
            let linear = [
                NodeProto::of("MatMul", &[before.input_name(0), &w], &[&product], vec![]),
                NodeProto::of("Add", &[&product, gemm.input_name(2)], &[&output], vec![]),
            ];
            replaced.push((after, linear));
            // Two nodes are made at the place of the second reshape; what is left of the first dies unused.
            graph.nodes[i].output[0] = graph.fresh(&format!("{}_unused", gemm.output[0]));
            changes += 1;
        }
        replaced.sort_by_key(|r| std::cmp::Reverse(r.0));
        for (at, linear) in replaced {
            graph.nodes.splice(at..=at, linear);
        }
        graph.prune_unused();
        Ok(report(self.name(), changes, format!("{changes} Reshape-Gemm-Reshape spelled as linear layers")))
    }
}

/// Inputs and outputs of a Gemm with a constant weight.
fn weight(graph: &Graph, gemm: &NodeProto) -> Option<(usize, usize)> {
    let shape = shape_of(graph.initializers.get(gemm.input_name(1))?);
    let [a, b] = shape[..] else { return None };
    Some(if gemm.int("transB", 0) != 0 { (b, a) } else { (a, b) })
}

/// Name of the weight as inputs × outputs, made if the Gemm has it the other way.
fn transposed_weight(graph: &mut Graph, gemm: &NodeProto) -> Option<String> {
    let name = gemm.input_name(1).to_string();
    if gemm.int("transB", 0) == 0 {
        return Some(name);
    }
    let (k, n) = weight(graph, gemm)?;
    let w = graph.const_f32(&name)?;
    let mut t = vec![0.0; k * n];
    for (o, row) in w.chunks_exact(k).enumerate() {
        row.iter().enumerate().for_each(|(i, &v)| t[i * n + o] = v);
    }
    let new = graph.fresh(&format!("{name}_t"));
    graph.initializers.insert(new.clone(), f32_tensor(&new, &[k, n], &t));
    Some(new)
}

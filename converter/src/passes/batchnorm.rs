//! Batch normalization moved into the weights of the convolution before it.

use super::{Context, Pass, PassReport, bypass, remove_nodes, report};
use std::collections::HashSet;
use vedge_runtime::Result;
use vedge_runtime::onnx::{Graph, NodeProto, Uses, f32_tensor, shape_of};

pub struct BatchNorm;

impl Pass for BatchNorm {
    fn name(&self) -> &'static str {
        "batchnorm"
    }

    fn run(&self, graph: &mut Graph, _cx: &Context) -> Result<PassReport> {
        let uses = Uses::of(graph);
        let mut dead = HashSet::new();
        for i in 0..graph.nodes.len() {
            let n = &graph.nodes[i];
            if n.op_type() != "BatchNormalization" || n.int("training_mode", 0) != 0 {
                continue;
            }
            let conv = uses.producer(n.input_name(0)).filter(|&p| graph.nodes[p].op_type() == "Conv");
            let Some(conv) = conv.filter(|_| uses.only_consumer(n.input_name(0)) == Some(i)) else { continue };
            let Some(folded) = fold(graph, &graph.nodes[conv], n) else { continue };
            let (from, to) = (n.output[0].clone(), n.input_name(0).to_string());
            if !bypass(graph, &from, &to) {
                continue;
            }
            let weight = graph.fresh(&format!("{to}_weight"));
            graph.initializers.insert(weight.clone(), f32_tensor(&weight, &folded.shape, &folded.weight));
            let bias = graph.fresh(&format!("{to}_bias"));
            graph.initializers.insert(bias.clone(), f32_tensor(&bias, &[folded.bias.len()], &folded.bias));
            let conv = &mut graph.nodes[conv];
            conv.input.truncate(1);
            conv.input.extend([weight, bias]);
            dead.insert(i);
        }
        remove_nodes(graph, &dead);
        graph.prune_unused();
        Ok(report(self.name(), dead.len(), format!("{} batch norms folded into convolutions", dead.len())))
    }
}

struct Folded {
    shape: Vec<usize>,
    weight: Vec<f32>,
    bias: Vec<f32>,
}

/// Weight and bias of the convolution that does both, computed in f64; `None` when something is not constant.
fn fold(graph: &Graph, conv: &NodeProto, norm: &NodeProto) -> Option<Folded> {
    let shape = shape_of(graph.initializers.get(conv.input_name(1))?);
    let mut weight = graph.const_f32(conv.input_name(1))?;
    let channels = *shape.first()?;
    let mut bias =
        if conv.input_name(2).is_empty() { vec![0.0; channels] } else { graph.const_f32(conv.input_name(2))? };
    let of = |i: usize| graph.const_f32(norm.input_name(i)).filter(|v| v.len() == channels);
    let (scale, shift, mean, variance) = (of(1)?, of(2)?, of(3)?, of(4)?);
    if bias.len() != channels || channels == 0 {
        return None;
    }
    let epsilon = f64::from(norm.float("epsilon", 1e-5));
    let row = weight.len() / channels;
    for c in 0..channels {
        let gain = f64::from(scale[c]) / (f64::from(variance[c]) + epsilon).sqrt();
        weight[c * row..(c + 1) * row].iter_mut().for_each(|w| *w = (f64::from(*w) * gain) as f32);
        bias[c] = ((f64::from(bias[c]) - f64::from(mean[c])) * gain + f64::from(shift[c])) as f32;
    }
    Some(Folded { shape, weight, bias })
}

//! Pairs of QuantizeLinear and DequantizeLinear that no layer took: rounding to the grid, in float. (tract would fold such
//! pairs around a softmax into an element-wise table.)

use super::pairs::Pair;
use super::{Fused, Lowered, Rewrites};
use crate::kernels::requantize::Requantize;
use crate::onnx::{Graph, NodeProto, Uses};

pub fn run(l: &mut Lowered) {
    let uses = l.uses();
    let mut r = Rewrites::default();
    for i in 0..l.graph.nodes.len() {
        let dq = &l.graph.nodes[i];
        if dq.op_type() != "DequantizeLinear" {
            continue;
        }
        let Some((x, fused)) = pair(&l.graph, &uses, dq) else { continue };
        let y = dq.output[0].clone();
        let note = "rounds to the integers of the file, between operators that run in float";
        l.notes.insert(y.clone(), note.into());
        let new = l.node(Fused::Requantize(fused), &[&x], &y);
        r.replace(&[i], new);
    }
    l.apply(r);
}

fn pair(g: &Graph, uses: &Uses, dq: &NodeProto) -> Option<(String, Requantize)> {
    let q = &g.nodes[uses.producer(dq.input_name(0))?];
    match q.op_type() {
        "DynamicQuantizeLinear" if dq.input == q.output => Some((q.input[0].clone(), Requantize::Whole)),
        _ => {
            let pair = Pair::at(g, uses, &dq.output[0])?;
            Some((pair.input(g).to_string(), Requantize::Static(pair.grid)))
        }
    }
}

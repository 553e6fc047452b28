//! Pairs of QuantizeLinear and DequantizeLinear that no layer took: rounding to the grid, in float. (tract would fold such
//! pairs around a softmax into an element-wise table.)

use super::constant::Parameters;
use super::{Fused, Lowered, Rewrites};
use crate::kernels::requantize::{Grid, Requantize};
use crate::onnx::{Graph, NodeProto};

pub fn run(l: &mut Lowered) {
    let uses = l.uses();
    let mut r = Rewrites::default();
    for i in 0..l.graph.nodes.len() {
        let dq = &l.graph.nodes[i];
        let Some(q) = uses.producer(dq.input_name(0)).filter(|_| dq.op_type() == "DequantizeLinear") else { continue };
        let q = &l.graph.nodes[q];
        let Some(fused) = pair(&l.graph, q, dq) else { continue };
        let (x, y) = (q.input_name(0).to_string(), dq.output[0].clone());
        let note = "rounds to the integers of the file, between operators that run in float";
        l.notes.insert(y.clone(), note.into());
        let new = l.node(Fused::Requantize(fused), &[&x], &y);
        r.replace(&[i], new);
    }
    l.apply(r);
}

fn pair(g: &Graph, q: &NodeProto, dq: &NodeProto) -> Option<Requantize> {
    match q.op_type() {
        "DynamicQuantizeLinear" if dq.input == q.output => Some(Requantize::Whole),
        "QuantizeLinear" => {
            let p = Parameters::of(g, q).filter(|p| Parameters::of(g, dq).as_ref() == Some(p))?;
            let (low, high) = p.range()?;
            let grid = Grid { scale: p.scale, low: (low - p.zero) as f32, high: (high - p.zero) as f32 };
            Some(Requantize::Static(grid))
        }
        _ => None,
    }
}

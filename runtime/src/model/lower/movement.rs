//! Chains of reshapes, transposes and slices become one strided copy each, or none.

use super::view::{FactoredView, MOVES, trace_factored};
use super::{Fused, Lowered, Rewrites};
use crate::kernels::copy::Copy;
use crate::onnx::{DType, Graph, NodeProto, Uses, attr, elements, i64_tensor};
use std::collections::HashMap;

/// A transposition to channels last of a picture, and the way back.
pub const TO_LAST: [i64; 4] = [0, 2, 3, 1];
/// See [`TO_LAST`].
pub const TO_FIRST: [i64; 4] = [0, 3, 1, 2];

/// Replaces the last node of each chain; the rest of it goes where nothing else uses it.
pub fn run(l: &mut Lowered) {
    sink(l);
    let uses = l.uses();
    let mut r = Rewrites::default();
    let mut same = vec![];
    for i in 0..l.graph.nodes.len() {
        if !is_move(&l.graph.nodes[i]) {
            continue;
        }
        let outputs = l.graph.nodes[i].output.clone();
        let ends = |o: &String| uses.is_output(o) || uses.consumers(o).iter().any(|&u| !is_move(&l.graph.nodes[u]));
        let used: Vec<&String> = outputs.iter().filter(|o| ends(o)).collect();
        let views: Option<Vec<FactoredView>> = used.iter().map(|o| movable(&l.graph, &uses, o)).collect();
        // A node with an output that only other movements use stays for them; they go with it where they can.
        let Some(views) = views.filter(|v| !v.is_empty() && used.len() == outputs.len()) else { continue };
        let mut new = vec![];
        for (v, &output) in views.iter().zip(&used) {
            match l.moved(&v.root, Copy::new(v.offset, v.axes.iter().flatten().copied()), output) {
                Some(n) => new.push(n),
                None => same.push((output.clone(), v.root.clone())),
            }
        }
        r.replace_by(&[i], new);
    }
    for (value, root) in same {
        l.graph.replace_uses(&value, &root);
    }
    l.apply(r);
}

/// The view of a float value that a movement makes of another node's output.
fn movable(g: &Graph, uses: &Uses, value: &str) -> Option<FactoredView> {
    let v = trace_factored(g, uses, value)?;
    let moves = v.root != value && !g.initializers.contains_key(&v.root);
    (moves && matches!(g.fact(&v.root), Some((DType::Float, _)))).then_some(v)
}

/// Lets transpositions of pictures to channels first sink below what does not care about the order, so that they meet
/// their inverse.
fn sink(l: &mut Lowered) {
    const ANY_ORDER: [&str; 8] = ["Add", "Sub", "Mul", "Div", "Relu", "Sigmoid", "Tanh", "Concat"];
    let mut last: HashMap<String, String> = HashMap::new();
    let nodes = std::mem::take(&mut l.graph.nodes);
    for n in nodes {
        if n.op_type() == "Transpose" && n.domain().is_empty() && n.ints("perm") == Some(&TO_FIRST) {
            last.insert(n.output[0].clone(), n.input_name(0).into());
        } else if (ANY_ORDER.contains(&n.op_type()) && n.domain().is_empty())
            || matches!(l.fused_of(&n), Some(Fused::Activation(_) | Fused::Table(_) | Fused::Requantize(_)))
        {
            // Constants must be scalars; at least one input must be a picture.
            let inputs: Option<Vec<String>> = (n.input.iter())
                .map(|i| last.get(i).cloned().or_else(|| l.graph.const_scalar(i).map(|_| i.clone())))
                .collect();
            let axis = (n.op_type() == "Concat").then(|| n.int("axis", 0));
            let shape = l.graph.shape(&n.output[0]);
            if let (Some(inputs), Some(&[1, c, h, w])) = (inputs, shape.as_deref())
                && matches!(axis, None | Some(1 | -3))
                && n.input.iter().any(|i| last.contains_key(i))
            {
                let output = n.output[0].clone();
                let name = l.value(&format!("{output}.channels_last"), &[1, h, w, c]);
                let mut sunk = NodeProto { input: inputs, output: vec![name.clone()], ..n };
                if axis.is_some() {
                    sunk.attribute = vec![attr::int("axis", 3)];
                }
                let up = NodeProto::of("Transpose", &[&name], &[&output], vec![attr::ints("perm", &TO_FIRST)]);
                last.insert(output, name);
                l.graph.nodes.extend([sunk, up]);
                continue;
            }
        }
        l.graph.nodes.push(n);
    }
}

/// Whether an operator only moves or renames data.
pub fn is_move(n: &NodeProto) -> bool {
    n.domain().is_empty() && MOVES.contains(&n.op_type())
}

impl Lowered {
    /// The node that copies `output` from a value; `None` where the elements and their shape are that value's, so that it can
    /// stand for `output`, unless that is the graph's.
    pub(super) fn moved(&mut self, root: &str, copy: Copy, output: &str) -> Option<NodeProto> {
        let (from, to) = (self.graph.shape(root).unwrap_or_default(), self.graph.shape(output).unwrap_or_default());
        if !copy.is_contiguous() || elements(&from) != elements(&to) {
            return Some(self.node(Fused::Copy(copy), &[root], output));
        }
        if from == to {
            let is_output = self.graph.outputs.iter().any(|o| o.name() == output);
            return is_output.then(|| NodeProto::of("Identity", &[root], &[output], vec![]));
        }
        let shape: Vec<i64> = to.iter().map(|&d| d as i64).collect();
        let name = self.graph.fresh(&format!("{output}.shape"));
        self.graph.initializers.insert(name.clone(), i64_tensor(&name, &[shape.len()], &shape));
        Some(NodeProto::of("Reshape", &[root, &name], &[output], vec![]))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Builder, agrees_with_tract};
    use super::*;
    use crate::kernels::detect;

    #[test]
    fn pictures_stay_channels_last_while_they_are_rounded() {
        let (first, last) = ([1, 8, 4, 6], [1, 4, 6, 8]);
        for tabulated in [false, true] {
            let mut b = Builder::new(&first);
            let y = b.transpose("x", &TO_LAST, &last);
            let y = b.norm(&y, &last);
            let y = b.transpose(&y, &TO_FIRST, &first);
            let mut y = b.round(&y, &first);
            if tabulated {
                let sigmoid = b.node("Sigmoid", &[&y], vec![], &first);
                let sigmoid = b.round(&sigmoid, &first);
                y = b.node("Mul", &[&y, &sigmoid], vec![], &first);
                y = b.round(&y, &first);
            }
            let y = b.transpose(&y, &TO_LAST, &last);
            let y = b.norm(&y, &last);
            let g = b.finish(&[&y]);
            let middle: &[&str] = if tabulated { &["requantize", "table", "requantize"] } else { &["requantize"] };
            assert_eq!(agrees_with_tract(&g), [&["layer_norm"], middle, &["layer_norm"]].concat());
            // The input alone is moved.
            let l = super::super::lower(g, detect().unwrap(), false).unwrap();
            let copies = l.graph.nodes.iter().filter(|n| matches!(l.fused_of(n), Some(Fused::Copy(_))));
            assert_eq!(copies.count(), 1);
        }
    }
}

//! Linear layers that read their rows in another order than they lie in: what movements of whole rows before a layer, or
//! between it and a residual, become (windows of Swin and their shifts, the patches that MobileViT folds back).

use super::constant::normal_axis;
use super::movement::is_move;
use super::view::slices;
use super::{Fused, Lowered, Rewrites, fused_index};
use crate::kernels::linear::Linear;
use crate::onnx::{Graph, NodeProto, Uses};
use ndarray::{ArrayD, Axis, Slice, concatenate};
use std::collections::BTreeSet;

/// Takes movements before layers, and those after them up to a residual: each output row is made of one input row, so
/// that reading them in another order writes them in another order.
pub fn run(l: &mut Lowered) {
    let uses = l.uses();
    let mut r = Rewrites::default();
    for i in 0..l.graph.nodes.len() {
        let Some(m) = residual(l, &uses, i).filter(|m| r.is_free(m.layer)) else { continue };
        let layer = l.graph.nodes[m.layer].clone();
        l.linear_of(&layer).order = m.order;
        let output = l.graph.nodes[i].output[0].clone();
        let input = vec![layer.input[0].clone(), m.other];
        r.replace(&[m.layer, i], NodeProto { input, output: vec![output], ..layer });
    }
    l.apply(r);
    let uses = l.uses();
    for i in 0..l.graph.nodes.len() {
        let n = &l.graph.nodes[i];
        let Some(Fused::Linear(layer)) = l.fused_of(n) else { continue };
        let Some(found) = rows(l, &uses, n.input_name(0), layer.k()) else { continue };
        let Some(order) = found.order(&l.graph).filter(|o| !o.is_empty()) else { continue };
        let node = n.clone();
        let linear = l.linear_of(&node);
        linear.order = match linear.order.as_slice() {
            [] => order,
            after => after.iter().map(|&row| order[row as usize]).collect(),
        };
        l.graph.nodes[i].input[0] = found.root;
    }
    l.graph.prune_unused();
}

impl Lowered {
    /// The linear layer that a node stands for.
    fn linear_of(&mut self, n: &NodeProto) -> &mut Linear {
        match &mut self.fused[fused_index(n).expect("an operator of ours")] {
            Fused::Linear(linear) => linear,
            other => unreachable!("{} where a linear layer was found", other.class()),
        }
    }
}

/// A layer whose output is moved and added to something.
struct Moved {
    /// Node of the layer.
    layer: usize,
    /// Which of its rows each row of the sum is made of.
    order: Vec<u32>,
    /// What it is added to.
    other: String,
}

/// The layer before the movements before an addition, node `add`.
fn residual(l: &Lowered, uses: &Uses, add: usize) -> Option<Moved> {
    let n = &l.graph.nodes[add];
    if n.op_type() != "Add" || !n.domain().is_empty() {
        return None;
    }
    n.input.iter().zip(n.input.iter().rev()).find_map(|(moved, other)| {
        let width = *l.graph.shape(moved)?.last()?;
        let rows = rows(l, uses, moved, width)?;
        let order = rows.order(&l.graph)?;
        let layer = uses.producer(&rows.root)?;
        let before = &l.graph.nodes[layer];
        let Some(Fused::Linear(linear)) = l.fused_of(before) else { return None };
        let all = |value: &str, users: &dyn Fn(usize) -> bool| {
            !uses.is_output(value) && uses.consumers(value).iter().all(|&u| users(u))
        };
        // Nothing else may see what was not added yet.
        let hidden = all(&rows.root, &|u| rows.nodes.contains(&u))
            && rows
                .nodes
                .iter()
                .flat_map(|&i| &l.graph.nodes[i].output)
                .all(|o| all(o, &|u| rows.nodes.contains(&u) || (u == add && o == moved)));
        // An addition of two equal shapes, of a layer that adds nothing yet.
        let fits = super::linear::is_residual(&l.graph, other, moved)
            && l.graph.shape(other) == l.graph.shape(&n.output[0])
            && before.input.len() == 1
            && linear.then.is_empty()
            && moved != other;
        (hidden && fits).then(|| Moved { layer, order, other: other.clone() })
    })
}

/// A value `[…][width]` whose rows are rows of another one.
struct Rows {
    /// The other value.
    root: String,
    /// Which of its rows, by the axes before the last.
    index: ArrayD<u32>,
    /// The nodes between the two.
    nodes: BTreeSet<usize>,
}

impl Rows {
    /// Which rows of the root they are, none where all lie in the same order; `None` unless each row is there once.
    fn order(&self, g: &Graph) -> Option<Vec<u32>> {
        let n = self.index.len();
        let shape = g.shape(&self.root).filter(|_| !g.initializers.contains_key(&self.root))?;
        let whole = shape.split_last().is_some_and(|(_, leading)| leading.iter().product::<usize>() == n);
        let mut seen = vec![false; n];
        let mut first = |row: u32| seen.get_mut(row as usize).is_some_and(|s| !std::mem::replace(s, true));
        let once = whole && self.index.iter().all(|&row| first(row));
        let same = self.index.iter().enumerate().all(|(i, &row)| i == row as usize);
        once.then(|| if same { vec![] } else { self.index.iter().copied().collect() })
    }
}

/// Traces the rows of a value back as far as they stay whole; `None` where its last axis is not `width` long.
fn rows(l: &Lowered, uses: &Uses, value: &str, width: usize) -> Option<Rows> {
    let shape = l.graph.shape(value)?;
    let (&last, leading) = shape.split_last()?;
    if last != width || !(1..1 << 31).contains(&shape.iter().product::<usize>()) {
        return None;
    }
    Some(moved(l, uses, value, leading, width).unwrap_or_else(|| {
        let n = leading.iter().product::<usize>() as u32;
        let index = ArrayD::from_shape_vec(leading, (0..n).collect()).expect("as many as there are");
        Rows { root: value.into(), index, nodes: BTreeSet::new() }
    }))
}

/// As [`rows`], through at least one node; `leading` are the axes of the value but the last.
fn moved(l: &Lowered, uses: &Uses, value: &str, leading: &[usize], width: usize) -> Option<Rows> {
    let at = uses.producer(value)?;
    let n = &l.graph.nodes[at];
    let is_concat = n.op_type() == "Concat" && n.domain().is_empty();
    if !is_concat && !is_move(n) && !matches!(l.fused_of(n), Some(Fused::Copy(_))) {
        return None;
    }
    let mut inputs = vec![];
    let traced = if is_concat { n.input.len() } else { 1 };
    for input in n.input.iter().take(traced) {
        inputs.push(rows(l, uses, input, width)?);
    }
    let mut nodes = BTreeSet::from([at]);
    inputs.iter_mut().for_each(|i| nodes.append(&mut i.nodes));
    let [Rows { root, index, .. }, others @ ..] = inputs.as_slice() else { return None };
    // The last axis stays whole.
    let axis = |a: i64| normal_axis(a, index.ndim() + 1).filter(|&a| a < index.ndim());
    let index = match (l.fused_of(n), n.op_type()) {
        (Some(Fused::Copy(copy)), _) => {
            let places = copy.rows(width)?;
            let flat: Vec<u32> = index.iter().copied().collect();
            let index = places.into_iter().map(|p| flat.get(p).copied()).collect::<Option<_>>()?;
            ArrayD::from_shape_vec(leading, index).ok()?
        }
        (None, "Identity" | "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten") => {
            ArrayD::from_shape_vec(leading, index.iter().copied().collect()).ok()?
        }
        (None, "Transpose") => {
            let (&last, perm) = n.ints("perm")?.split_last()?;
            let perm: Vec<usize> = perm.iter().map(|&p| axis(p)).collect::<Option<_>>()?;
            (last == perm.len() as i64 && perm.len() == index.ndim())
                .then(|| index.view().permuted_axes(perm).to_owned())?
        }
        (None, "Concat") => {
            let axis = axis(n.int("axis", 0))?;
            if others.iter().any(|o| o.root != *root) {
                return None;
            }
            let parts: Vec<_> = inputs.iter().map(|i| i.index.view()).collect();
            concatenate(Axis(axis), &parts).ok()?
        }
        (None, "Slice") => {
            let mut part = index.view();
            for p in slices(&l.graph, n)? {
                let axis = axis(p.axis).filter(|_| p.step > 0)?;
                let [start, end] = p.bounds(part.shape()[axis]).map(|i| i as isize);
                part.slice_axis_inplace(Axis(axis), Slice::new(start, Some(end.max(start)), p.step as isize));
            }
            part.to_owned()
        }
        _ => return None,
    };
    (index.shape() == leading).then(|| Rows { root: root.clone(), index, nodes })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Builder, agrees_with_tract};
    use super::*;
    use crate::onnx::attr;

    const SHAPE: [usize; 4] = [1, 4, 6, 8];

    /// Shifts a picture `[1][4][6][8]` along an axis.
    fn roll(b: &mut Builder, x: &str, axis: usize, by: usize) -> String {
        let shape = [1, 4, 6, 8];
        let mut parts = vec![];
        for (from, to) in [(by, shape[axis]), (0, by)] {
            let [from, to, axes] = [from as i64, to as i64, axis as i64].map(|v| b.ints(&[v]));
            let mut part = shape;
            part[axis] = if parts.is_empty() { shape[axis] - by } else { by };
            parts.push(b.node("Slice", &[x, &from, &to, &axes], vec![], &part));
        }
        b.node("Concat", &[&parts[0], &parts[1]], vec![attr::int("axis", axis as i64)], &shape)
    }

    /// Attention in windows of 2 × 3 of a picture of 4 × 6 that is shifted before and back after it, and its residual.
    fn shifted_windows() -> Graph {
        let mut b = Builder::new(&SHAPE);
        let x = b.norm("x", &SHAPE);
        let x = roll(&mut b, &x, 1, 1);
        let x = roll(&mut b, &x, 2, 2);
        let x = b.reshape(&x, &[1, 2, 2, 2, 3, 8]);
        let x = b.transpose(&x, &[0, 1, 3, 2, 4, 5], &[1, 2, 2, 2, 3, 8]);
        let x = b.reshape(&x, &[4, 6, 8]);
        let qkv = b.layer(&x, &[4, 6, 8], 24);
        let y = b.attention(&qkv, [4, 6, 2, 4]);
        let y = b.layer(&y, &[4, 6, 8], 8);
        let y = b.reshape(&y, &[1, 2, 2, 2, 3, 8]);
        let y = b.transpose(&y, &[0, 1, 3, 2, 4, 5], &[1, 2, 2, 2, 3, 8]);
        let y = b.reshape(&y, &SHAPE);
        let y = roll(&mut b, &y, 2, 4);
        let y = roll(&mut b, &y, 1, 3);
        let y = b.node("Add", &["x", &y], vec![], &SHAPE);
        b.finish(&[&y])
    }

    #[test]
    fn shifted_windows_are_no_copies() {
        assert_eq!(agrees_with_tract(&shifted_windows()), ["windows", "linear"]);
    }

    #[test]
    fn what_others_see_is_moved_for_them() {
        // The moved value is a second output: the layer must not add the residual to it.
        let mut b = Builder::new(&SHAPE);
        let y = b.layer("x", &SHAPE, 8);
        let y = roll(&mut b, &y, 1, 1);
        let z = b.node("Add", &["x", &y], vec![], &SHAPE);
        let y = b.node("Mul", &[&z, &y], vec![], &SHAPE);
        let classes = agrees_with_tract(&b.finish(&[&y]));
        assert!(classes.contains(&"Add".to_string()), "{classes:?}");
    }

    #[test]
    fn rows_that_are_missing_are_no_order() {
        let mut b = Builder::new(&SHAPE);
        let [from, to, axes] = [1, 3, 1].map(|v| b.ints(&[v]));
        let y = b.node("Slice", &["x", &from, &to, &axes], vec![], &[1, 2, 6, 8]);
        let y = b.node("Concat", &[&y, &y], vec![attr::int("axis", 1)], &SHAPE);
        let y = b.layer(&y, &SHAPE, 8);
        let y = b.node("Relu", &[&y], vec![], &SHAPE);
        agrees_with_tract(&b.finish(&[&y]));
    }
}

//! Where a value's elements live: traces it back through operators that only move or rename data.

use super::constant::normal_axis;
use crate::onnx::{Graph, NodeProto, Uses, elements};

/// A strided window on the tensor `root`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct View {
    /// Name of the tensor that holds the elements, contiguous.
    pub root: String,
    /// Element offset of the first one.
    pub offset: usize,
    /// Size and stride (in elements) of each axis.
    pub axes: Vec<(usize, usize)>,
}

/// As [`View`], but an axis may be a product of several: what a reshape makes of axes that do not run through each
/// other. Axes of one element have no factors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FactoredView {
    /// Name of the tensor that holds the elements, contiguous.
    pub root: String,
    /// Element offset of the first one.
    pub offset: usize,
    /// Size and stride of each factor of each axis, outermost first.
    pub axes: Vec<Vec<(usize, usize)>>,
}

/// Strides of a contiguous tensor.
pub fn strides(shape: &[usize]) -> Vec<usize> {
    let mut out = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        out[i - 1] = out[i] * shape[i];
    }
    out
}

/// The operators that only move or rename data.
pub const MOVES: [&str; 9] =
    ["Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Gather", "Identity"];

/// The view that a value is; `None` when its shape is not known or empty.
pub fn trace(g: &Graph, uses: &Uses, name: &str) -> Option<View> {
    let v = within(g, uses, name, 32, true)?;
    let axes = v.axes.iter().map(|factors| factors.first().copied().unwrap_or((1, 1))).collect();
    Some(View { root: v.root, offset: v.offset, axes })
}

/// As [`trace`], through reshapes that no single stride describes too.
pub fn trace_factored(g: &Graph, uses: &Uses, name: &str) -> Option<FactoredView> {
    within(g, uses, name, 32, false)
}

/// Looks through at most `steps` nodes; stops where an axis would have several factors if `simple`.
fn within(g: &Graph, uses: &Uses, name: &str, steps: usize, simple: bool) -> Option<FactoredView> {
    let shape = g.shape(name).filter(|s| (1..1 << 31).contains(&elements(s)))?;
    let found = step(g, uses, name, &shape, steps, simple).filter(|v| !simple || v.axes.iter().all(|a| a.len() <= 1));
    Some(found.unwrap_or_else(|| {
        let axes = shape.iter().copied().zip(strides(&shape)).map(|a| if a.0 == 1 { vec![] } else { vec![a] });
        FactoredView { root: name.into(), offset: 0, axes: axes.collect() }
    }))
}

fn step(g: &Graph, uses: &Uses, name: &str, shape: &[usize], steps: usize, simple: bool) -> Option<FactoredView> {
    let n = &g.nodes[uses.producer(name)?];
    if !MOVES.contains(&n.op_type()) || !n.domain().is_empty() {
        return None;
    }
    let mut v = within(g, uses, n.input_name(0), steps.checked_sub(1)?, simple)?;
    let rank = v.axes.len();
    match n.op_type() {
        "Identity" => {}
        "Transpose" => {
            let reversed: Vec<i64> = (0..rank as i64).rev().collect();
            let perm = n.ints("perm").unwrap_or(&reversed);
            v.axes = perm.iter().map(|&p| v.axes.get(p as usize).cloned()).collect::<Option<_>>()?;
        }
        "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" => v.axes = reshape(&v.axes, shape)?,
        "Slice" => {
            for part in slices(g, n)? {
                let a = normal_axis(part.axis, rank).filter(|_| part.step == 1)?;
                let [start, end] = part.bounds(size_of(&v.axes[a]));
                v.cut(a, start, end.checked_sub(start)?)?;
            }
        }
        "Split" => {
            let a = normal_axis(n.int("axis", 0), rank)?;
            let before = n.output.iter().take_while(|o| *o != name);
            let start = before.map(|o| g.shape(o).and_then(|s| s.get(a).copied()));
            v.cut(a, start.sum::<Option<usize>>()?, *shape.get(a)?)?;
        }
        "Gather" => {
            let t = g.initializers.get(n.input_name(1)).filter(|t| t.dims.is_empty())?;
            let a = normal_axis(n.int("axis", 0), rank)?;
            let i = crate::onnx::to_i64(t).ok()?[0];
            let i = if i < 0 { i + size_of(&v.axes[a]) as i64 } else { i };
            v.cut(a, usize::try_from(i).ok()?, 1)?;
            v.axes.remove(a);
        }
        _ => return None,
    }
    (v.axes.iter().map(|a| size_of(a)).eq(shape.iter().copied())).then_some(v)
}

/// What a Slice takes of one axis, as the file states it.
pub struct Part {
    /// The axis; from the end where negative.
    pub axis: i64,
    /// Elements from one to the next.
    pub step: i64,
    range: [i64; 2],
}

impl Part {
    /// First element and one past the last of an axis of that size, for steps forward.
    pub fn bounds(&self, size: usize) -> [usize; 2] {
        let size = size as i64;
        self.range.map(|i| if i < 0 { i + size } else { i }.clamp(0, size) as usize)
    }
}

/// The parts that a Slice with constant bounds takes.
pub fn slices(g: &Graph, n: &NodeProto) -> Option<Vec<Part>> {
    let (starts, ends) = (g.const_i64(n.input_name(1))?, g.const_i64(n.input_name(2))?);
    let axes = match n.input_name(3) {
        "" => (0..starts.len() as i64).collect(),
        a => g.const_i64(a)?,
    };
    let steps = match n.input_name(4) {
        "" => vec![1; starts.len()],
        s => g.const_i64(s)?,
    };
    let parts = starts.into_iter().zip(ends).zip(axes).zip(steps);
    Some(parts.map(|(((start, end), axis), step)| Part { axis, step, range: [start, end] }).collect())
}

fn size_of(factors: &[(usize, usize)]) -> usize {
    factors.iter().map(|f| f.0).product()
}

impl FactoredView {
    /// Narrows an axis to `size` elements from `start`; `None` outside of it and where it has several factors.
    fn cut(&mut self, axis: usize, start: usize, size: usize) -> Option<()> {
        let whole = size_of(&self.axes[axis]);
        if start.checked_add(size)? > whole || size == 0 {
            return None;
        }
        if size != whole {
            let &[(_, stride)] = self.axes[axis].as_slice() else { return None };
            self.offset += start * stride;
            self.axes[axis] = if size == 1 { vec![] } else { vec![(size, stride)] };
        }
        Some(())
    }
}

/// The axes of a view after a reshape; `None` when factors would have to be cut across.
fn reshape(axes: &[Vec<(usize, usize)>], shape: &[usize]) -> Option<Vec<Vec<(usize, usize)>>> {
    if elements(shape) != axes.iter().map(|a| size_of(a)).product::<usize>() {
        return None;
    }
    let mut old = axes.iter().flatten().copied();
    let (mut left, mut stride) = (1, 1); // What is left of the current factor.
    let mut out = vec![];
    for &want in shape {
        let mut want = want;
        let mut factors: Vec<(usize, usize)> = vec![];
        while want > 1 {
            if left == 1 {
                (left, stride) = old.next()?;
            }
            let take = if left % want == 0 { want } else { (want % left == 0).then_some(left)? };
            left /= take;
            want /= take;
            let factor = (take, stride * left);
            match factors.last_mut() {
                Some(outer) if outer.1 == factor.0 * factor.1 => *outer = (outer.0 * factor.0, factor.1),
                _ => factors.push(factor),
            }
        }
        out.push(factors);
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn single(axes: &[(usize, usize)]) -> Vec<Vec<(usize, usize)>> {
        axes.iter().map(|&a| if a.0 == 1 { vec![] } else { vec![a] }).collect()
    }

    #[test]
    fn reshape_splits_and_merges() {
        // [2,3,4] contiguous.
        let axes = single(&[(2, 12), (3, 4), (4, 1)]);
        let of = |axes: &[_], shape: &[usize]| reshape(axes, shape);
        assert_eq!(of(&axes, &[6, 4]), Some(single(&[(6, 4), (4, 1)])));
        assert_eq!(of(&axes, &[2, 12]), Some(single(&[(2, 12), (12, 1)])));
        assert_eq!(of(&axes, &[2, 3, 2, 2]), Some(single(&[(2, 12), (3, 4), (2, 2), (2, 1)])));
        assert_eq!(of(&axes, &[1, 24, 1]), Some(single(&[(1, 1), (24, 1), (1, 1)])));
        assert_eq!(of(&axes, &[5, 5]), None);
        // Transposed [3,2,4]: the first two do not run through each other.
        let axes = single(&[(3, 4), (2, 12), (4, 1)]);
        assert_eq!(of(&axes, &[6, 4]), Some(vec![vec![(3, 4), (2, 12)], vec![(4, 1)]]));
        assert_eq!(of(&axes, &[3, 2, 2, 2]), Some(single(&[(3, 4), (2, 12), (2, 2), (2, 1)])));
        // Taken apart again.
        let merged = of(&axes, &[6, 4]).expect("factors");
        assert_eq!(of(&merged, &[3, 2, 4]), Some(axes.clone()));
        // Across factors: [2, 12] would cut the 3.
        assert_eq!(of(&axes, &[2, 12]), None);
    }
}

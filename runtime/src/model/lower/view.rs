//! Where a value's elements live: traces it back through operators that only move or rename data.

use crate::onnx::{Graph, Uses, elements};

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

/// Strides of a contiguous tensor.
pub fn strides(shape: &[usize]) -> Vec<usize> {
    let mut out = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        out[i - 1] = out[i] * shape[i];
    }
    out
}

fn contiguous(root: &str, shape: &[usize]) -> View {
    let axes = shape.iter().copied().zip(strides(shape)).collect();
    View { root: root.into(), offset: 0, axes }
}

/// The view that a value is; `None` when its shape is not known or empty.
pub fn trace(g: &Graph, uses: &Uses, name: &str) -> Option<View> {
    within(g, uses, name, 32)
}

/// Looks through at most `steps` nodes.
fn within(g: &Graph, uses: &Uses, name: &str, steps: usize) -> Option<View> {
    let shape = g.shape(name).filter(|s| (1..1 << 31).contains(&elements(s)))?;
    Some(step(g, uses, name, &shape, steps).unwrap_or_else(|| contiguous(name, &shape)))
}

fn step(g: &Graph, uses: &Uses, name: &str, shape: &[usize], steps: usize) -> Option<View> {
    let n = &g.nodes[uses.producer(name)?];
    let source = n.input_name(0);
    let mut v = match n.op_type() {
        "Transpose" | "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" | "Slice" | "Split" | "Gather" | "Identity" => {
            within(g, uses, source, steps.checked_sub(1)?)?
        }
        _ => return None,
    };
    let rank = v.axes.len();
    let axis =
        |a: i64, rank: usize| usize::try_from(if a < 0 { a + rank as i64 } else { a }).ok().filter(|&a| a < rank);
    match n.op_type() {
        "Identity" => {}
        "Transpose" => {
            let reversed: Vec<i64> = (0..rank as i64).rev().collect();
            let perm = n.ints("perm").unwrap_or(&reversed);
            v.axes = perm.iter().map(|&p| v.axes.get(p as usize).copied()).collect::<Option<_>>()?;
        }
        "Reshape" | "Squeeze" | "Unsqueeze" | "Flatten" => v.axes = reshape(&v.axes, shape)?,
        "Slice" => {
            let (starts, ends) = (g.const_i64(n.input_name(1))?, g.const_i64(n.input_name(2))?);
            let axes = match n.input_name(3) {
                "" => (0..starts.len() as i64).collect(),
                a => g.const_i64(a)?,
            };
            let unit = match n.input_name(4) {
                "" => true,
                s => g.const_i64(s)?.iter().all(|&s| s == 1),
            };
            if !unit {
                return None;
            }
            for ((&start, &end), &a) in starts.iter().zip(&ends).zip(&axes) {
                let a = axis(a, rank)?;
                let size = v.axes[a].0 as i64;
                let [start, end] = [start, end].map(|i| if i < 0 { i + size } else { i }.clamp(0, size) as usize);
                v.offset += start * v.axes[a].1;
                v.axes[a].0 = end.checked_sub(start)?;
            }
        }
        "Split" => {
            let a = axis(n.int("axis", 0), rank)?;
            let before = n.output.iter().take_while(|o| *o != name);
            let start = before.map(|o| g.shape(o).and_then(|s| s.get(a).copied()));
            let start: usize = start.sum::<Option<usize>>()?;
            let size = *shape.get(a)?;
            start.checked_add(size).filter(|&end| end <= v.axes[a].0)?;
            v.offset += start * v.axes[a].1;
            v.axes[a].0 = size;
        }
        "Gather" => {
            let t = g.initializers.get(n.input_name(1)).filter(|t| t.dims.is_empty())?;
            let a = axis(n.int("axis", 0), rank)?;
            let i = crate::onnx::to_i64(t).ok()?[0];
            let i = if i < 0 { i + v.axes[a].0 as i64 } else { i };
            v.offset += usize::try_from(i).ok().filter(|&i| i < v.axes[a].0)? * v.axes[a].1;
            v.axes.remove(a);
        }
        _ => return None,
    }
    (v.axes.iter().map(|a| a.0).eq(shape.iter().copied())).then_some(v)
}

/// The axes of a view after a reshape; `None` when that would need a copy.
fn reshape(axes: &[(usize, usize)], shape: &[usize]) -> Option<Vec<(usize, usize)>> {
    if elements(shape) != axes.iter().map(|a| a.0).product::<usize>() {
        return None;
    }
    // Runs of old axes that are contiguous with each other, taken apart into the new ones.
    let mut old = axes.iter().filter(|a| a.0 != 1).copied().peekable();
    let mut out: Vec<(usize, usize)> = vec![];
    let (mut size, mut stride) = (1, 1); // What is left of the current run.
    for &want in shape {
        if want == 1 {
            out.push((1, 1));
            continue;
        }
        while size < want || size % want != 0 {
            let (s, st) = old.next()?;
            if size != 1 && stride != s * st {
                return None;
            }
            size *= s;
            stride = st;
        }
        // The run so far has `size` elements with innermost stride `stride`.
        size /= want;
        out.push((want, size * stride));
    }
    (old.peek().is_none() && size == 1).then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reshape_splits_and_merges() {
        // [2,3,4] contiguous.
        let axes = [(2, 12), (3, 4), (4, 1)];
        assert_eq!(reshape(&axes, &[6, 4]), Some(vec![(6, 4), (4, 1)]));
        assert_eq!(reshape(&axes, &[2, 12]), Some(vec![(2, 12), (12, 1)]));
        assert_eq!(reshape(&axes, &[2, 3, 2, 2]), Some(vec![(2, 12), (3, 4), (2, 2), (2, 1)]));
        assert_eq!(reshape(&axes, &[1, 24, 1]), Some(vec![(1, 1), (24, 1), (1, 1)]));
        assert_eq!(reshape(&axes, &[5, 5]), None);
        // Transposed [3,2,4]: the first two cannot merge.
        let axes = [(3, 4), (2, 12), (4, 1)];
        assert_eq!(reshape(&axes, &[6, 4]), None);
        assert_eq!(reshape(&axes, &[3, 2, 2, 2]), Some(vec![(3, 4), (2, 12), (2, 2), (2, 1)]));
    }
}

//! Another resolution for a graph that was exported with a fixed one.
//!
//! The graph is walked in order with the shapes of both resolutions side by side. Where a constant carries height,
//! width or the number of tokens (targets of reshapes, ends of slices, kernels of global pools, positions), it is
//! rewritten if there is exactly one way to do so; everything else that no longer fits is refused by name.

use super::patch;
use super::positions::resample;
use super::windows::{self, Blocks, End, Shape};
use crate::shapes::{self, Facts, describe, infer_one};
use std::collections::{BTreeSet, HashMap, VecDeque};
use vedge_runtime::onnx::{DType, Graph, NodeProto, attr, elements, f32_tensor, i64_tensor, shape_of, value_info};
use vedge_runtime::{Error, Result};

/// Height and width in pixels.
pub(crate) type Size = (usize, usize);

/// What was rewritten.
#[derive(Debug, Default)]
pub(super) struct Resized {
    /// Constants that carried sizes.
    pub constants: usize,
    /// In words, where the positions came from and went; empty when there are none.
    pub positions: String,
    /// Height and width of a patch as exported, where it has another size now.
    pub patch: Option<Size>,
}

/// Rewrites a folded graph, fixed to some resolution, for the resolution `new` of its only input, and for patches of another
/// size where that is asked for.
///
/// # Errors
/// [`Error::Unsupported`] naming the node that cannot follow.
pub(super) fn resize(graph: &mut Graph, new: Size, patch: Option<Size>) -> Result<Resized> {
    let old = shapes::infer(graph)?;
    let name = graph.inputs[0].name().to_string();
    let Some((dtype, mut shape)) = graph.inputs[0].fixed() else {
        return Err(Error::BadModel(format!("input `{name}` has no fixed shape")));
    };
    let rank = shape.len();
    let blocks = windows::find(graph, &old);
    let mut walk = Walk { blocks, ..Walk::new(old) };
    walk.rows.insert((shape[rank - 2], new.0));
    walk.columns.insert((shape[rank - 1], new.1));
    shape[rank - 2..].copy_from_slice(&[new.0, new.1]);
    graph.inputs[0] = value_info(&name, dtype, &shape);
    if let Some(patch) = patch {
        walk.done.patch = patch::resize(graph, patch)?;
    }
    walk.run(graph, &HashMap::new())?;
    Ok(walk.done)
}

/// Rewrites a graph into which nodes were inserted that change the number of tokens. `old` are the facts from before;
/// `inserted` names every output of the new nodes, and where one takes the place of a value from before, that value.
///
/// # Errors
/// [`Error::Unsupported`] naming the node that cannot follow.
pub(crate) fn follow(graph: &mut Graph, old: Facts, inserted: &HashMap<String, Option<String>>) -> Result<()> {
    Walk::new(old).run(graph, inserted)
}

/// The refusal: this node keeps the graph at its resolution.
fn stuck(node: &NodeProto, why: &str) -> Error {
    let subject = describe(node);
    let why = why.strip_prefix(&format!("{subject}: ")).unwrap_or(why);
    Error::Unsupported {
        what: format!("this export cannot be resized: {subject}: {why}"),
        hint: "leave --size out to keep the exported resolution, or export again at the size you want".into(),
    }
}

/// A block that attends inside of windows.
#[derive(Clone, Copy)]
struct Inside {
    /// Its index.
    block: usize,
    /// Its new sizes.
    new: Shape,
    /// Whether its scores have their mask.
    masked: bool,
}

struct Walk {
    /// Heights seen so far, as (exported, new); sizes of feature maps, from convolutions and pools.
    rows: BTreeSet<(usize, usize)>,
    columns: BTreeSet<(usize, usize)>,
    old: Facts,
    new: Facts,
    /// By value name, where they are finer than the dimensions: what reshapes took apart or together.
    factors: HashMap<String, Vec<Factors>>,
    /// Blocks that attend inside of windows.
    blocks: Blocks,
    /// The one that the walk is in, and its new sizes.
    window: Option<Inside>,
    done: Resized,
}

impl Walk {
    fn new(old: Facts) -> Walk {
        Walk {
            rows: BTreeSet::new(),
            columns: BTreeSet::new(),
            new: Facts::default(),
            factors: HashMap::new(),
            blocks: Blocks::default(),
            window: None,
            done: Resized::default(),
            old,
        }
    }

    fn run(&mut self, graph: &mut Graph, inserted: &HashMap<String, Option<String>>) -> Result<()> {
        for i in &graph.inputs {
            self.new.types.extend(i.fixed().map(|fact| (i.name().to_string(), fact)));
        }
        for (name, t) in &graph.initializers {
            self.new.types.insert(name.clone(), (t.dtype(), shape_of(t)));
        }
        let mut nodes = Vec::with_capacity(graph.nodes.len());
        for i in 0..graph.nodes.len() {
            let mut node = graph.nodes[i].clone();
            if let Some(&(block, end)) = self.blocks.ends.get(&i) {
                nodes.extend(self.windows(graph, &node, block, end)?);
            }
            if self.blocks.replaced.contains(&i) {
                continue;
            }
            let known = inserted.contains_key(&node.output[0]);
            if !known {
                nodes.extend(self.whole_patches(graph, &mut node)?);
                self.rewrite(graph, &mut node)?;
            }
            infer_one(graph, &node, &mut self.new).map_err(|e| stuck(&node, &e.to_string()))?;
            for output in &node.output {
                let before = inserted.get(output).and_then(Option::as_ref).and_then(|b| self.old.types.get(b));
                if let Some(fact) = before.cloned() {
                    self.old.types.insert(output.clone(), fact);
                }
            }
            if !known {
                self.learn(&node);
                self.follow(&node);
            }
            nodes.push(node);
        }
        graph.nodes = nodes;
        graph.prune_unused();
        Ok(())
    }

    /// Both ends of attention inside of windows are written anew.
    fn windows(&mut self, graph: &mut Graph, last: &NodeProto, block: usize, end: End) -> Result<Vec<NodeProto>> {
        let b = self.blocks.all[block].clone();
        let new = match end {
            End::Cut => {
                let map = match self.new.shape(b.source()) {
                    Some(&[1, rows, columns, _]) => [rows, columns],
                    _ => return Err(stuck(last, "the picture that it cuts into windows is not known")),
                };
                b.at(map).map_err(|why| stuck(last, &why))?
            }
            End::Join => match self.window.take() {
                Some(inside) if inside.new.blocked().is_some() && !inside.masked => {
                    return Err(stuck(
                        last,
                        "its windows are shifted at this size, and nothing is added to their scores",
                    ));
                }
                Some(inside) if inside.block == block => inside.new,
                _ => return Err(stuck(last, "its windows are joined before they are cut")),
            },
        };
        self.window = (end == End::Cut).then_some(Inside { block, new, masked: false });
        let nodes = b.write(graph, end, &new);
        for n in &nodes {
            let constants = n.input.iter().filter_map(|i| Some((i, graph.initializers.get(i)?)));
            self.new.types.extend(constants.map(|(i, t)| (i.clone(), (t.dtype(), shape_of(t)))));
            infer_one(graph, n, &mut self.new).map_err(|e| stuck(n, &e.to_string()))?;
        }
        self.done.constants += nodes.len();
        Ok(nodes)
    }

    /// Swin merges two by two patches; an odd picture is padded, as timm does.
    fn whole_patches(&mut self, graph: &mut Graph, node: &mut NodeProto) -> Result<Option<NodeProto>> {
        let (Some(&[1, _, 2, _, 2, c]), Some(([1, a, b, _], [1, h, w, _]))) =
            (self.old.shape(&node.output[0]), self.shapes(node.input_name(0)))
        else {
            return Ok(None);
        };
        if node.op_type() != "Reshape" || (h % 2, w % 2) == (0, 0) || (a % 2, b % 2) != (0, 0) {
            return Ok(None);
        }
        let (old, pads) = ([1, *a, *b, c], [0, 0, 0, 0, 0, (h % 2) as i64, (w % 2) as i64, 0]);
        let (padded, [y, x]) = (graph.fresh(&format!("{}_padded", node.output[0])), [*h, *w]);
        let (rows, columns) = ((old[1], y + y % 2), (old[2], x + x % 2));
        let mut pad = NodeProto::of("Pad", &[node.input_name(0), "", ""], &[&padded], vec![]);
        self.set(graph, &mut pad, 1, &pads);
        pad.input.truncate(2);
        infer_one(graph, &pad, &mut self.new).map_err(|e| stuck(node, &e.to_string()))?;
        self.old.types.insert(padded.clone(), (DType::Float, old.to_vec()));
        self.rows.insert(rows);
        self.columns.insert(columns);
        node.input[0] = padded;
        Ok(Some(pad))
    }

    /// Exported and new shape of a value.
    fn shapes(&self, value: &str) -> Option<(&[usize], &[usize])> {
        Some((self.old.shape(value)?, self.new.shape(value)?))
    }

    fn changed(&self, value: &str) -> bool {
        self.shapes(value).is_some_and(|(a, b)| a != b)
    }

    /// Remembers the feature map sizes that a node made.
    fn learn(&mut self, node: &NodeProto) {
        // Swin's merging of two by two patches.
        if node.ints("perm") == Some(&[0, 1, 3, 4, 2, 5])
            && let Some(([_, h, w, ..], [_, h2, w2, ..])) = self.shapes(&node.output[0])
        {
            let (row, column) = ((*h, *h2), (*w, *w2));
            self.rows.insert(row);
            self.columns.insert(column);
        }
        if !matches!(node.op_type(), "Conv" | "MaxPool" | "AveragePool") {
            return;
        }
        if let Some(([_, _, h, w], [_, _, h2, w2])) = node.output.first().and_then(|o| self.shapes(o)) {
            let (row, column) = ((*h, *h2), (*w, *w2));
            self.rows.insert(row);
            self.columns.insert(column);
        }
    }

    fn rewrite(&mut self, graph: &mut Graph, node: &mut NodeProto) -> Result<()> {
        let scores = self.window.is_some() && node.op_type() == "Add";
        // Rows and columns may change although their product does not.
        let inside = |i: &String| self.factors(i).iter().flatten().any(|f| f.0 != f.1);
        let reshaped = node.op_type() == "Reshape" && inside(&node.input[0]);
        if !scores && !reshaped && !node.input.iter().any(|i| self.changed(i)) {
            return Ok(());
        }
        match node.op_type() {
            "Reshape" => self.reshape(graph, node),
            "Expand" => self.expand(graph, node),
            "Slice" => self.slice(graph, node),
            "Gather" => self.gather(graph, node),
            "Split" => self.split(graph, node),
            "AveragePool" | "MaxPool" => self.global_pool(node),
            "Add" => self.positions(graph, node),
            "Resize" if !node.input_name(3).is_empty() => Err(stuck(node, "its target size is part of the file")),
            _ => Ok(()),
        }
    }

    /// Gives the node a new constant of integers as its n-th input.
    fn set(&mut self, graph: &mut Graph, node: &mut NodeProto, n: usize, values: &[i64]) {
        let name = graph.fresh(&format!("{}_resized", node.output[0]));
        let t = i64_tensor(&name, &[values.len()], values);
        self.new.types.insert(name.clone(), (t.dtype(), vec![values.len()]));
        graph.initializers.insert(name.clone(), t);
        node.input[n] = name;
        self.done.constants += 1;
    }

    fn reshape(&mut self, graph: &mut Graph, node: &mut NodeProto) -> Result<()> {
        let Some(to) = self.old.shape(&node.output[0]) else { return Ok(()) };
        let factors = self.distribute(node.input_name(0), to).map_err(|why| stuck(node, &why))?;
        let target: Vec<i64> = factors.iter().map(|dim| new_size(dim) as i64).collect();
        self.set(graph, node, 1, &target);
        Ok(())
    }

    /// The factors of a value's dimensions, outer to inner.
    fn factors(&self, value: &str) -> Vec<Factors> {
        let Some((old, new)) = self.shapes(value) else { return vec![] };
        let whole = || old.iter().zip(new).map(|(&a, &b)| if (a, b) == (1, 1) { vec![] } else { vec![(a, b)] });
        self.factors.get(value).cloned().unwrap_or_else(|| whole().collect())
    }

    /// The factors of a value when its elements are given the (exported) shape `to`.
    fn distribute(&self, value: &str, to: &[usize]) -> Result<Vec<Factors>, String> {
        let mut left: VecDeque<Size> = self.factors(value).into_iter().flatten().collect();
        let mut dims = vec![];
        for &dim in to {
            let (mut factors, mut missing) = (vec![], dim);
            // What was one and becomes several: the first dimension of one takes it.
            while dim == 1 && left.front().is_some_and(|f| f.0 == 1) {
                factors.extend(left.pop_front());
            }
            while missing > 1 {
                let (a, b) = left.pop_front().ok_or_else(|| format!("its shape {to:?} has other elements"))?;
                if missing % a == 0 {
                    factors.push((a, b));
                    missing /= a;
                } else if a % missing == 0 {
                    let (outer, inner) = self.take_apart((a, b), missing)?;
                    left.push_front(inner);
                    factors.push(outer);
                    missing = 1;
                } else {
                    return Err(format!("its shape {to:?} cuts across dimensions that follow the size"));
                }
            }
            dims.push(factors);
        }
        Ok(dims)
    }

    /// Splits a factor into an outer one that was `outer` in the export and what is inside of it. Of a height or a
    /// width, the inner part is a patch or window and stays; a number of patches is a height times a width.
    fn take_apart(&self, (a, b): Size, outer: usize) -> Result<(Size, Size), String> {
        let inner = a / outer;
        if a == b {
            return Ok(((outer, outer), (inner, inner)));
        }
        let mut ways = BTreeSet::new();
        if self.rows.contains(&(a, b)) || self.columns.contains(&(a, b)) {
            ways.insert(((outer, b / inner), (inner, inner)));
        }
        for &row in self.rows.iter().filter(|row| row.0 == outer) {
            for &column in self.columns.iter().filter(|c| c.0 == inner && row.1 * c.1 == b) {
                ways.insert((row, column));
            }
        }
        match ways.pop_first() {
            Some((outer, inner)) if ways.is_empty() && outer.1 * inner.1 == b => Ok((outer, inner)),
            Some((_, inner)) if ways.is_empty() => Err(format!("{b} does not divide into parts of {}", inner.0)),
            _ => Err(format!("how {a} that becomes {b} divides into {outer} parts of {inner} is not clear")),
        }
    }

    /// Remembers the factors of what a node made, where they follow from those of its inputs.
    fn follow(&mut self, node: &NodeProto) {
        let Some(output) = node.output.first() else { return };
        let Some((old, new)) = self.shapes(output) else { return };
        let source = self.factors(node.input_name(0));
        let factors = match node.op_type() {
            "Reshape" | "Flatten" | "Squeeze" | "Unsqueeze" => match self.distribute(node.input_name(0), old) {
                Ok(factors) => factors,
                Err(_) => return,
            },
            "Transpose" => {
                let reversed: Vec<i64> = (0..source.len() as i64).rev().collect();
                let perm = node.ints("perm").unwrap_or(&reversed);
                perm.iter().map(|&p| source.get(p as usize).cloned().unwrap_or_default()).collect()
            }
            _ => {
                // A dimension that keeps its place and its sizes is the same one.
                let inputs = node.input.iter().map(|i| self.factors(i)).filter(|f| f.len() == old.len());
                let inputs: Vec<Vec<Factors>> = inputs.collect();
                let same = |i: usize| {
                    let of = inputs.iter().map(|f| &f[i]);
                    of.filter(|f| (old_size(f), new_size(f)) == (old[i], new[i])).max_by_key(|f| f.len()).cloned()
                };
                (0..old.len()).map(|i| same(i).unwrap_or_else(|| vec![(old[i], new[i])])).collect()
            }
        };
        let fits = factors.iter().map(|f| (old_size(f), new_size(f))).eq(old.iter().copied().zip(new.iter().copied()));
        if fits {
            self.factors.insert(output.clone(), factors);
        }
    }

    fn expand(&mut self, graph: &mut Graph, node: &mut NodeProto) -> Result<()> {
        let Some((from, from_new)) = self.shapes(node.input_name(0)) else { return Ok(()) };
        let Some(to) = self.old.shape(&node.output[0]) else { return Ok(()) };
        let lead = to.len() - from.len();
        let mut target: Vec<i64> = to.iter().map(|&d| d as i64).collect();
        for (i, (&a, &b)) in from.iter().zip(from_new).enumerate() {
            if a != b && to[lead + i] != a {
                return Err(stuck(node, &format!("its shape {to:?} does not follow its input {from:?}")));
            }
            if a != b {
                target[lead + i] = b as i64;
            }
        }
        self.set(graph, node, 1, &target);
        Ok(())
    }

    fn slice(&mut self, graph: &mut Graph, node: &mut NodeProto) -> Result<()> {
        let Some((from, from_new)) = self.shapes(node.input_name(0)) else { return Ok(()) };
        let list = |n: usize| graph.const_i64(node.input_name(n));
        let (Some(starts), Some(mut ends)) = (list(1), list(2)) else { return Ok(()) };
        let axes = list(3).unwrap_or_else(|| (0..starts.len() as i64).collect());
        for (k, &axis) in axes.iter().enumerate() {
            let axis = if axis < 0 { axis + from.len() as i64 } else { axis } as usize;
            let (Some(&a), Some(&b)) = (from.get(axis), from_new.get(axis)) else { continue };
            if a == b {
                continue;
            }
            let (start, end) = (starts[k], ends[k]);
            let near_start = (0..=PREFIX as i64).contains(&start);
            if near_start && end >= a as i64 {
                ends[k] = i64::MAX;
            } else if !(near_start && end <= PREFIX as i64) {
                let end = if end >= a as i64 { "the end".into() } else { end.to_string() };
                let why = "as windows that are shifted do, whose masks are part of the file";
                return Err(stuck(
                    node,
                    &format!("it takes {start} to {end} of a dimension that follows the size, {why}"),
                ));
            }
        }
        self.set(graph, node, 2, &ends);
        Ok(())
    }

    fn gather(&self, graph: &Graph, node: &NodeProto) -> Result<()> {
        let Some((from, from_new)) = self.shapes(node.input_name(0)) else { return Ok(()) };
        let axis = node.int("axis", 0);
        let axis = if axis < 0 { axis + from.len() as i64 } else { axis } as usize;
        let fixed = from.get(axis) == from_new.get(axis);
        let first = |i: &Vec<i64>| i.iter().all(|&i| (0..PREFIX as i64).contains(&i));
        if fixed || graph.const_i64(node.input_name(1)).as_ref().is_some_and(first) {
            return Ok(());
        }
        Err(stuck(node, "it picks places of a dimension that follows the size"))
    }

    fn split(&mut self, graph: &mut Graph, node: &mut NodeProto) -> Result<()> {
        let Some((from, from_new)) = self.shapes(node.input_name(0)) else { return Ok(()) };
        let axis = node.int("axis", 0);
        let axis = if axis < 0 { axis + from.len() as i64 } else { axis } as usize;
        let (Some(&a), Some(&b)) = (from.get(axis), from_new.get(axis)) else { return Ok(()) };
        if a == b {
            return Ok(());
        }
        let sizes = graph.const_i64(node.input_name(1)).unwrap_or_default();
        match sizes.split_last() {
            Some((_, first)) if !first.is_empty() && first.iter().sum::<i64>() <= PREFIX as i64 => {
                let rest = b as i64 - first.iter().sum::<i64>();
                let sizes: Vec<i64> = first.iter().copied().chain([rest]).collect();
                self.set(graph, node, 1, &sizes);
                Ok(())
            }
            _ => Err(stuck(node, "it splits a dimension that follows the size")),
        }
    }

    /// A pool over the whole feature map stays one.
    fn global_pool(&mut self, node: &mut NodeProto) -> Result<()> {
        let Some(([_, _, h, w], [_, _, h2, w2])) = self.shapes(node.input_name(0)) else { return Ok(()) };
        let whole = node.ints("kernel_shape") == Some(&[*h as i64, *w as i64][..]);
        if whole && self.old.shape(&node.output[0]).is_some_and(|o| o[2..] == [1, 1]) {
            let kernel = [*h2 as i64, *w2 as i64];
            node.attribute.retain(|a| !matches!(a.name(), "kernel_shape" | "strides"));
            node.attribute.push(attr::ints("kernel_shape", &kernel));
            self.done.constants += 1;
        }
        Ok(())
    }

    /// A constant added to tokens (batch × tokens × width) is their position.
    fn positions(&mut self, graph: &mut Graph, node: &mut NodeProto) -> Result<()> {
        let constant = |n: usize| graph.initializers.contains_key(node.input_name(n));
        let Some(n) = [0, 1].into_iter().find(|&n| constant(n)) else { return Ok(()) };
        let name = node.input_name(n).to_string();
        let tokens = node.input_name(1 - n).to_string();
        let Some((x, x_new)) = self.shapes(&tokens) else { return Ok(()) };
        let shape = self.old.shape(&name).unwrap_or_default();
        if self.window.is_some() && x.len() >= 4 && shape.len() >= 3 {
            return self.score_bias(graph, node, n);
        }
        let lead = x.len().saturating_sub(shape.len());
        let follows = |i: usize| shape[i] != 1 && x.get(lead + i) != x_new.get(lead + i);
        if !(0..shape.len()).any(follows) {
            return Ok(());
        }
        if let ([1, heads, t, t2], [.., m, _]) = (x, x_new)
            && t == t2
            && elements(shape) == heads * t * t
            && let Some(((h, w), (h2, w2), 0)) = self.token_grid(*t, *m)
        {
            let values = graph.const_f32(&name).ok_or_else(|| stuck(node, "its bias is no float"))?;
            let (shape, heads, m) = (shape.to_vec(), *heads, *m);
            let values = windows::relative(&values, heads, [h, w], [h2, w2]).ok_or_else(|| {
                stuck(node, &format!("its constant `{name}` {shape:?} (no bias by relative position) follows the size"))
            })?;
            let shape: Vec<usize> = [vec![1; shape.len().saturating_sub(3)], vec![heads, m, m]].concat();
            self.set_floats(graph, node, n, &shape, &values);
            return Ok(());
        }
        let [1, count, width] = *x else {
            return Err(stuck(node, &format!("its constant `{name}` {shape:?} (a mask or bias) follows the size")));
        };
        let (old_grid, new_grid, prefix) = self.token_grid(count, x_new[1]).ok_or_else(|| {
            stuck(node, &format!("{count} positions are no patch grid with at most {PREFIX} tokens before it"))
        })?;
        if shape.last() != Some(&width) || elements(shape) != count * width {
            return Err(stuck(node, &format!("its constant `{name}` has shape {shape:?}, tokens {x:?}")));
        }
        if !self.done.positions.is_empty() {
            return Err(stuck(node, "positions are added in more than one place"));
        }
        let mut new_shape = shape.to_vec();
        let at = new_shape.len() - 2;
        new_shape[at] = x_new[1];
        let values = graph.const_f32(&name).ok_or_else(|| stuck(node, "its positions are no floats"))?;
        let values = resample(&values, prefix, width, old_grid, new_grid);
        self.set_floats(graph, node, n, &new_shape, &values);
        self.done.positions = format!(
            "positions interpolated from {}x{} to {}x{} patches ({prefix} tokens before them kept)",
            old_grid.0, old_grid.1, new_grid.0, new_grid.1
        );
        Ok(())
    }

    /// Gives the node a new constant of floats as its n-th input.
    fn set_floats(&mut self, graph: &mut Graph, node: &mut NodeProto, n: usize, shape: &[usize], values: &[f32]) {
        let name = graph.fresh(&format!("{}_resized", node.input[n]));
        let t = f32_tensor(&name, shape, values);
        self.new.types.insert(name.clone(), (t.dtype(), shape.to_vec()));
        graph.initializers.insert(name.clone(), t);
        node.input[n] = name;
        self.done.constants += 1;
    }

    /// A constant added to the scores inside of windows: bias by relative position, mask, or both.
    fn score_bias(&mut self, graph: &mut Graph, node: &mut NodeProto, n: usize) -> Result<()> {
        let name = node.input_name(n).to_string();
        let scores = self.old.shape(node.input_name(1 - n)).unwrap_or_default().to_vec();
        let shape = self.old.shape(&name).unwrap_or_default().to_vec();
        let Some(Inside { block, new, .. }) = self.window else { return Ok(()) };
        let b = self.blocks.all[block].clone();
        let tokens = b.old.tokens();
        let [.., heads, t, t2] = shape[..] else { return Ok(()) };
        if [t, t2] != [tokens, tokens] || scores[scores.len() - 2..] != [tokens, tokens] {
            return Err(stuck(
                node,
                &format!("its constant `{name}` {shape:?} does not fit windows of {tokens} tokens"),
            ));
        }
        let values = graph.const_f32(&name).ok_or_else(|| stuck(node, "its bias is no float"))?;
        let why = |why: String| {
            stuck(node, &format!("its constant `{name}` {shape:?} (a mask or bias) follows the size, and {why}"))
        };
        // The mask goes where it was; blocks that had none get theirs with the bias.
        let mask = b.old.shift == [0, 0];
        let (windows, values) = b.bias(&values, heads, &new, mask).map_err(why)?;
        self.window = Some(Inside { block, new, masked: windows == new.windows() });
        let m = new.tokens();
        // Masks that came with an axis for the batch keep it.
        let lead = vec![1; scores.len().saturating_sub(4)];
        let shape = [lead, vec![windows, heads, m, m]].concat();
        self.set_floats(graph, node, n, &shape, &values);
        Ok(())
    }

    /// Exported grid, new grid and tokens before the grid, that make these numbers of tokens.
    fn token_grid(&self, old: usize, new: usize) -> Option<(Size, Size, usize)> {
        for &(h, h2) in &self.rows {
            for &(w, w2) in &self.columns {
                let prefix = old.checked_sub(h * w);
                if prefix.is_some_and(|p| p <= PREFIX) && prefix == new.checked_sub(h2 * w2) {
                    return Some(((h, w), (h2, w2), prefix?));
                }
            }
        }
        None
    }
}

/// Class and distillation token: at most this many tokens stand before the patches.
const PREFIX: usize = 2;

/// Factors of a dimension, as (exported, new), outer to inner; none for a dimension of 1.
type Factors = Vec<Size>;

fn old_size(factors: &Factors) -> usize {
    factors.iter().map(|f| f.0).product()
}

fn new_size(factors: &Factors) -> usize {
    factors.iter().map(|f| f.1).product()
}

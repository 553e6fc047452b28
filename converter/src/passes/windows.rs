//! Attention inside of windows (Swin): where a graph cuts a picture into windows and joins them again, and how both are
//! spelled at another size.
//!
//! A block shifts its picture (two slices and their concatenation along each axis), pads it to whole windows, cuts it,
//! attends, and undoes all that. Every size changes several of these at once: a picture that is no larger than a window
//! has no shift, and its window shrinks to it. So both ends are written anew, as timm's `SwinTransformerBlock` does them.

use crate::shapes::Facts;
use std::collections::{HashMap, HashSet};
use vedge_runtime::onnx::{Graph, NodeProto, Uses, attr, f32_tensor, i64_tensor};

/// What belongs to rows and what to columns.
type Pair = [usize; 2];

/// Sizes of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// Of the feature map.
    pub map: Pair,
    /// Of a window.
    pub window: Pair,
    /// By how much the picture is shifted; 0 where it is not.
    pub shift: Pair,
}

impl Shape {
    /// Windows down and across.
    pub fn grid(&self) -> Pair {
        [0, 1].map(|i| self.map[i].div_ceil(self.window[i]))
    }

    /// How many windows.
    pub fn windows(&self) -> usize {
        self.grid()[0] * self.grid()[1]
    }

    /// Tokens of a window.
    pub fn tokens(&self) -> usize {
        self.window[0] * self.window[1]
    }

    fn shifts(&self) -> bool {
        self.shift != [0, 0]
    }

    fn padded(&self) -> Pair {
        [0, 1].map(|i| self.grid()[i] * self.window[i])
    }

    /// Which tokens of a shifted picture do not see each other, as `[windows][tokens][tokens]`: those that came from
    /// opposite edges. Nothing where it is not shifted.
    pub fn blocked(&self) -> Option<Vec<bool>> {
        let padded = self.padded();
        let group = |axis: usize, at: usize| match self.shift[axis] {
            0 => 0,
            _ if at < padded[axis] - self.window[axis] => 0,
            s if at < padded[axis] - s => 1,
            _ => 2,
        };
        let [_, across] = self.grid();
        let place = |window: usize, token: usize| {
            let y = window / across * self.window[0] + token / self.window[1];
            let x = window % across * self.window[1] + token % self.window[1];
            (group(0, y), group(1, x))
        };
        let n = self.tokens();
        let pairs = |w: usize| (0..n * n).map(move |i| place(w, i / n) != place(w, i % n));
        self.shifts().then(|| (0..self.windows()).flat_map(pairs).collect())
    }
}

/// A block that attends inside of windows.
#[derive(Clone, Debug)]
pub(super) struct Block {
    /// What is cut, `[1][rows][columns][channels]`.
    source: String,
    /// The windows, `[windows][tokens][channels]`.
    cut: String,
    /// What attention made of them, likewise.
    made: String,
    /// The picture again.
    joined: String,
    channels: usize,
    /// Sizes in the export.
    pub old: Shape,
    /// Whether it is one of those that shift their picture where it has more than one window; `None` where the export
    /// does not tell.
    shifting: Option<bool>,
}

/// The blocks of a graph, and what each of their nodes is for.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    pub all: Vec<Block>,
    /// By index of a node: the block that it starts or ends, for the last node of each end.
    pub ends: HashMap<usize, (usize, End)>,
    /// Nodes that are written anew.
    pub replaced: HashSet<usize>,
}

/// Which end of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Cut,
    Join,
}

const PARTITION: [i64; 6] = [0, 1, 3, 2, 4, 5];

/// Finds the blocks; what does not look like one in every detail is none.
pub(super) fn find(g: &Graph, facts: &Facts) -> Blocks {
    let look = Look { g, facts, uses: Uses::of(g) };
    let mut blocks = Blocks::default();
    let transposes = g.nodes.iter().enumerate().filter(|(_, n)| n.ints("perm") == Some(&PARTITION));
    let mut open: Option<(usize, Cut)> = None;
    for (i, _) in transposes {
        if let Some((_, cut)) = &open
            && let Some(join) = look.join(i, cut)
        {
            let (_, cut) = open.take().expect("it is open");
            let old = Shape { map: cut.map, window: cut.window, shift: cut.shift };
            let at = blocks.all.len();
            blocks.ends.insert(cut.last, (at, End::Cut));
            blocks.ends.insert(join.last, (at, End::Join));
            blocks.replaced.extend(cut.nodes.iter().chain(&join.nodes));
            let (source, channels) = (cut.source, cut.channels);
            let (cut, made, joined) = (cut.windows, join.made, join.joined);
            blocks.all.push(Block { source, cut, made, joined, channels, old, shifting: None });
        } else {
            open = look.cut(i).map(|c| (i, c));
        }
    }
    // Every other block of a stage shifts, where any does.
    let shifts = blocks.all.iter().any(|b| b.old.shifts());
    let (mut stage, mut index) = (0, 0);
    for b in &mut blocks.all {
        (stage, index) = if b.channels == stage { (stage, index + 1) } else { (b.channels, 0) };
        let several = b.old.windows() > 1;
        b.shifting = if several { Some(b.old.shifts()) } else { shifts.then_some(index % 2 == 1) };
    }
    blocks
}

struct Cut {
    source: String,
    windows: String,
    map: Pair,
    window: Pair,
    shift: Pair,
    channels: usize,
    nodes: Vec<usize>,
    last: usize,
}

struct Join {
    made: String,
    joined: String,
    nodes: Vec<usize>,
    last: usize,
}

struct Look<'a> {
    g: &'a Graph,
    facts: &'a Facts,
    uses: Uses,
}

impl Look<'_> {
    fn shape(&self, value: &str) -> &[usize] {
        self.facts.shape(value).unwrap_or_default()
    }

    /// The node that makes a value, where only others of `inside` use it.
    fn maker(&self, value: &str, inside: &[usize]) -> Option<(usize, &NodeProto)> {
        let alone = self.uses.consumers(value).iter().all(|i| inside.contains(i)) && !self.uses.is_output(value);
        let i = self.uses.producer(value).filter(|_| alone)?;
        Some((i, &self.g.nodes[i]))
    }

    /// The only node that takes a value in.
    fn taker(&self, value: &str) -> Option<(usize, &NodeProto)> {
        self.uses.only_consumer(value).filter(|_| !self.uses.is_output(value)).map(|i| (i, &self.g.nodes[i]))
    }

    /// A slice along one axis: the axis, its start and its end.
    fn slice(&self, n: &NodeProto) -> Option<(usize, usize, usize)> {
        let one = |k: usize| self.g.const_i64(n.input_name(k)).filter(|v| v.len() == 1).map(|v| v[0]);
        if n.op_type() != "Slice" || (!n.input_name(4).is_empty() && one(4) != Some(1)) {
            return None;
        }
        let axis = usize::try_from(one(3)?).ok()?;
        let size = *self.shape(n.input_name(0)).get(axis)? as i64;
        let place = |v: i64| if v < 0 { v + size } else { v }.clamp(0, size) as usize;
        Some((axis, place(one(1)?), place(one(2)?)))
    }

    /// A rotation along rows or columns that makes `value`: what is rotated, the axis, and how far forwards.
    fn rotation(&self, value: &str, inside: &mut Vec<usize>) -> Option<(String, usize, usize)> {
        let (i, n) = self.maker(value, inside)?;
        let [tail, head] = n.input.as_slice() else { return None };
        if n.op_type() != "Concat" {
            return None;
        }
        let parts = [tail, head].map(|v| self.uses.producer(v));
        let [Some(t), Some(h)] = parts else { return None };
        let (axis, start, end) = self.slice(&self.g.nodes[t])?;
        let (other, zero, cut) = self.slice(&self.g.nodes[h])?;
        let source = self.g.nodes[t].input_name(0);
        let size = *self.shape(source).get(axis)?;
        let whole = end == size && zero == 0 && cut == start && axis == other && n.int("axis", 0) == axis as i64;
        if !whole || source != self.g.nodes[h].input_name(0) || !(1..=2).contains(&axis) {
            return None;
        }
        inside.extend([i, t, h]);
        Some((source.to_string(), axis - 1, start))
    }

    /// The end that cuts, around its transposition.
    fn cut(&self, transpose: usize) -> Option<Cut> {
        let n = &self.g.nodes[transpose];
        let [1, _, h, _, w, channels] = *self.shape(n.input_name(0)) else { return None };
        let mut nodes = vec![transpose];
        let (i, reshape) = self.maker(n.input_name(0), &nodes)?;
        if reshape.op_type() != "Reshape" {
            return None;
        }
        nodes.push(i);
        let mut value = reshape.input_name(0).to_string();
        if let Some((i, pad)) = self.maker(&value, &nodes).filter(|(_, n)| n.op_type() == "Pad") {
            nodes.push(i);
            value = pad.input_name(0).to_string();
        }
        let [1, rows, columns, c] = *self.shape(&value) else { return None };
        let mut shift = [0, 0];
        while let Some((from, axis, by)) = self.rotation(&value, &mut nodes) {
            if shift[axis] != 0 {
                return None;
            }
            shift[axis] = by;
            value = from;
        }
        // Forwards to the windows.
        let (mut windows, mut last) = (n.output[0].clone(), transpose);
        while let Some((i, n)) = self.taker(&windows)
            && n.op_type() == "Reshape"
            && self.shape(&windows).len() != 3
        {
            windows = n.output[0].clone();
            nodes.push(i);
            last = i;
        }
        let cut = Cut { source: value, map: [rows, columns], window: [h, w], shift, channels, nodes, last, windows };
        let fits = c == channels && matches!(*self.shape(&cut.windows), [_, t, c2] if t == h * w && c2 == c);
        fits.then_some(cut)
    }

    /// The end that joins what `cut` made, around its transposition.
    fn join(&self, transpose: usize, cut: &Cut) -> Option<Join> {
        let n = &self.g.nodes[transpose];
        let [1, _, _, h, w, channels] = *self.shape(n.input_name(0)) else { return None };
        if [h, w] != cut.window || channels != cut.channels {
            return None;
        }
        let mut nodes = vec![transpose];
        let mut made = n.input_name(0).to_string();
        while self.shape(&made).len() != 3 {
            let (i, n) = self.maker(&made, &nodes).filter(|(_, n)| n.op_type() == "Reshape")?;
            nodes.push(i);
            made = n.input_name(0).to_string();
        }
        let whole = [&[1], &cut.map[..], &[channels]].concat();
        let (mut joined, mut last) = (n.output[0].clone(), transpose);
        let (i, reshape) = self.taker(&joined).filter(|(_, n)| n.op_type() == "Reshape")?;
        (joined, last) = (reshape.output[0].clone(), last.max(i));
        nodes.push(i);
        // What padding added is cut off along each axis.
        while self.shape(&joined) != whole {
            let (i, n) = self.taker(&joined)?;
            if n.op_type() != "Slice" || self.shape(&joined).len() != 4 {
                return None;
            }
            (joined, last) = (n.output[0].clone(), i);
            nodes.push(i);
        }
        // Rotations back: two slices and their concatenation each.
        let mut back = [0, 0];
        while let [a, b] = *self.uses.consumers(&joined)
            && let Some(c) = self.g.nodes[a].output.first().and_then(|o| self.uses.only_consumer(o))
        {
            let output = self.g.nodes[c].output[0].clone();
            let mut around = self.uses.consumers(&output).to_vec();
            let Some((from, axis, start)) = self.rotation(&output, &mut around) else { break };
            if from != joined || back[axis] != 0 {
                break;
            }
            back[axis] = cut.map[axis] - start;
            nodes.extend([a, b, c]);
            (joined, last) = (output, c);
        }
        (back == cut.shift && self.shape(&joined) == whole).then_some(Join { made, joined, nodes, last })
    }
}

impl Block {
    /// Name of what is cut.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Its sizes for another feature map. As in timm, a window is no larger than the picture, and a picture of one
    /// window is not shifted.
    ///
    /// # Errors
    /// What cannot be told, in words.
    pub fn at(&self, map: Pair) -> Result<Shape, String> {
        let window = [0, 1].map(|i| self.old.window[i].min(map[i]));
        let several = (0..2).any(|i| map[i] > window[i]);
        let shifting = match self.shifting {
            Some(s) => s,
            None if !several => false,
            None => return Err("whether its windows are shifted cannot be told from this export".into()),
        };
        if (0..2).any(|i| self.old.shift[i] != 0 && self.old.shift[i] != self.old.window[i] / 2) {
            return Err(format!("its windows {:?} are shifted by {:?}", self.old.window, self.old.shift));
        }
        let half = |i: usize| if shifting && map[i] > window[i] { self.old.window[i] / 2 } else { 0 };
        Ok(Shape { map, window, shift: [half(0), half(1)] })
    }

    /// The nodes of one end at other sizes.
    pub fn write(&self, g: &mut Graph, end: End, new: &Shape) -> Vec<NodeProto> {
        let (output, from) = match end {
            End::Cut => (&self.cut, &self.source),
            End::Join => (&self.joined, &self.made),
        };
        let mut w = Writer { g, nodes: vec![], value: from.clone(), output: output.clone() };
        let ([rows, columns], [h, v]) = (new.grid(), new.window);
        let (padded, c) = (new.padded(), self.channels);
        let missing = [0, 1].map(|i| padded[i] - new.map[i]);
        match end {
            End::Cut => {
                for axis in 0..2 {
                    w.rotate(axis, new.shift[axis]);
                }
                if missing != [0, 0] {
                    let pads = [0, 0, 0, 0, 0, missing[0] as i64, missing[1] as i64, 0];
                    let pads = w.constant(&pads);
                    let zero = w.g.fresh(&format!("{}_zero", w.output));
                    w.g.initializers.insert(zero.clone(), f32_tensor(&zero, &[], &[0.0]));
                    w.put("Pad", &[&pads, &zero], vec![]);
                }
                w.reshape(&[1, rows, h, columns, v, c]);
                w.put("Transpose", &[], vec![attr::ints("perm", &PARTITION)]);
                w.reshape(&[new.windows(), new.tokens(), c]);
            }
            End::Join => {
                w.reshape(&[1, rows, columns, h, v, c]);
                w.put("Transpose", &[], vec![attr::ints("perm", &PARTITION)]);
                w.reshape(&[1, padded[0], padded[1], c]);
                for axis in (0..2).filter(|&a| missing[a] > 0) {
                    w.slice(axis, 0, new.map[axis]);
                }
                for axis in 0..2 {
                    w.rotate(axis, (new.map[axis] - new.shift[axis]) % new.map[axis]);
                }
            }
        }
        w.finish()
    }

    /// A constant that is added to the scores of this block, `[windows or 1][heads][tokens][tokens]`, at other sizes: the
    /// bias by relative position, and the mask of shifted windows. Whether it has the mask of a block whose scores get
    /// none elsewhere is `mask`.
    ///
    /// # Errors
    /// What it is not, in words.
    pub fn bias(&self, values: &[f32], heads: usize, new: &Shape, mask: bool) -> Result<(usize, Vec<f32>), String> {
        let (n, m) = (self.old.tokens(), new.tokens());
        let each = heads * n * n;
        let windows = values.len() / each.max(1);
        let expected = self.old.windows();
        if windows * each != values.len() || (windows != 1 && windows != expected) {
            return Err(format!("its {} values are not of {heads} heads and {n} x {n} tokens", values.len()));
        }
        // The first window lies where nothing was shifted together.
        let first = &values[..each];
        let mut far = -100.0;
        if windows > 1 {
            let blocked = self.old.blocked().ok_or("it differs from window to window without a shift")?;
            far = values.iter().zip(first.iter().cycle()).map(|(a, b)| a - b).fold(0f32, f32::min);
            let same = values.iter().enumerate().all(|(i, v)| {
                let (window, pair) = (i / each, i % (n * n));
                let want = first[i % each] + if blocked[window * n * n + pair] { far } else { 0.0 };
                *v == want || (v - want).abs() <= 1e-4 * far.abs().min(1e6)
            });
            if !same {
                return Err("it is not the mask of shifted windows".into());
            }
        }
        let bias = if first.iter().all(|v| *v == 0.0) {
            vec![0.0; heads * m * m]
        } else {
            relative(first, heads, self.old.window, new.window).ok_or("it is no bias by relative position")?
        };
        match new.blocked().filter(|_| windows > 1 || mask) {
            None => Ok((1, bias)),
            Some(blocked) => {
                let of = |w: usize| {
                    let blocked = &blocked[w * m * m..][..m * m];
                    bias.iter().zip(blocked.iter().cycle()).map(|(b, far_away)| if *far_away { b + far } else { *b })
                };
                Ok((new.windows(), (0..new.windows()).flat_map(of).collect()))
            }
        }
    }
}

/// Writes a chain of nodes.
struct Writer<'a> {
    g: &'a mut Graph,
    nodes: Vec<NodeProto>,
    value: String,
    /// Name of what comes out in the end.
    output: String,
}

impl Writer<'_> {
    fn fresh(&self) -> String {
        // Names of nodes that are not in the graph yet count, too.
        self.g.fresh(&format!("{}_at{}", self.output, self.nodes.len()))
    }

    fn constant(&mut self, values: &[i64]) -> String {
        let name = self.g.fresh(&format!("{}_size", self.output));
        self.g.initializers.insert(name.clone(), i64_tensor(&name, &[values.len()], values));
        name
    }

    fn put(&mut self, op: &str, more: &[&str], attributes: Vec<vedge_runtime::onnx::AttributeProto>) {
        let to = self.fresh();
        let inputs: Vec<&str> = std::iter::once(self.value.as_str()).chain(more.iter().copied()).collect();
        let node = NodeProto::of(op, &inputs, &[&to], attributes);
        self.nodes.push(node);
        self.value = to;
    }

    fn reshape(&mut self, shape: &[usize]) {
        let shape: Vec<i64> = shape.iter().map(|&s| s as i64).collect();
        let to = self.constant(&shape);
        self.put("Reshape", &[&to], vec![]);
    }

    fn slice(&mut self, axis: usize, start: usize, end: usize) {
        let [start, end, axis] = [start, end, axis + 1].map(|v| self.constant(&[v as i64]));
        self.put("Slice", &[&start, &end, &axis], vec![]);
    }

    /// What lies from `start` on comes first.
    fn rotate(&mut self, axis: usize, start: usize) {
        if start == 0 {
            return;
        }
        let source = self.value.clone();
        self.slice(axis, start, i64::MAX as usize);
        let tail = std::mem::replace(&mut self.value, source);
        self.slice(axis, 0, start);
        let head = std::mem::replace(&mut self.value, tail);
        self.put("Concat", &[&head], vec![attr::int("axis", axis as i64 + 1)]);
    }

    fn finish(mut self) -> Vec<NodeProto> {
        if let Some(last) = self.nodes.last_mut() {
            last.output[0] = self.output;
        }
        self.nodes
    }
}

/// A bias by relative position, `[heads][tokens][tokens]`, for windows of another size: timm's
/// `resize_rel_pos_bias_table`. `None` where it is no such bias.
pub(super) fn relative(values: &[f32], heads: usize, old: Pair, new: Pair) -> Option<Vec<f32>> {
    let (n, m) = (old[0] * old[1], new[0] * new[1]);
    if values.len() != heads * n * n {
        return None;
    }
    if old == new {
        return Some(values.to_vec());
    }
    // Distance down and right of a pair of tokens, as a place in the table.
    let place = |pair: usize, tokens: usize, [h, w]: Pair| {
        let (i, j) = (pair / tokens, pair % tokens);
        (i / w + h - 1 - j / w) * (2 * w - 1) + i % w + w - 1 - j % w
    };
    let size = |[h, w]: Pair| [2 * h - 1, 2 * w - 1];
    let (from, to) = (size(old), size(new));
    let taps = [0, 1].map(|i| spread(from[i], to[i]));
    let mut out = Vec::with_capacity(heads * m * m);
    for head in values.chunks_exact(n * n) {
        let mut table = vec![None; from[0] * from[1]];
        for (pair, v) in head.iter().enumerate() {
            let known = table[place(pair, n, old)].get_or_insert(*v);
            if (*known - v).abs() > 1e-6 * v.abs().max(1.0) {
                return None;
            }
        }
        let table: Vec<f64> = table.into_iter().map(|v| f64::from(v.unwrap_or(0.0))).collect();
        let at = |pair: usize| {
            let p = place(pair, m, new);
            let (y, x) = (&taps[0][p / to[1]], &taps[1][p % to[1]]);
            let row = |r: usize| x.iter().map(|(c, f)| f * table[r * from[1] + c]).sum::<f64>();
            y.iter().map(|(r, f)| f * row(*r)).sum::<f64>() as f32
        };
        out.extend((0..m * m).map(at));
    }
    Some(out)
}

/// For each of `new` distances the two of `old` around it and their shares. The old ones lie further apart the further
/// out they are, in a geometric progression that reaches as far as the new ones do.
fn spread(old: usize, new: usize) -> Vec<[(usize, f64); 2]> {
    if old == new {
        return (0..new).map(|i| [(i, 1.0), (i, 0.0)]).collect();
    }
    let (mut left, mut right, mut q) = (1.01f64, 1.5f64, 1.0f64);
    while right - left > 1e-6 {
        q = (left + right) / 2.0;
        let reach = (1.0 - q.powi((old / 2) as i32)) / (1.0 - q);
        if reach > (new / 2) as f64 { right = q } else { left = q }
    }
    let mut out = vec![];
    let mut distance = 1.0;
    for i in 0..old / 2 {
        out.push(distance);
        distance += q.powi(i as i32 + 1);
    }
    let places: Vec<f64> = out.iter().rev().map(|d| -d).chain([0.0]).chain(out.iter().copied()).collect();
    let half = (new / 2) as f64;
    (0..new)
        .map(|i| {
            let x = i as f64 - half;
            let after = places.partition_point(|p| *p < x).min(old - 1);
            let before = after.saturating_sub(1);
            let (a, b) = ((x - places[before]).max(0.0), (places[after] - x).max(0.0));
            match a + b {
                0.0 => [(before, 0.5), (after, 0.5)],
                sum => [(before, b / sum), (after, a / sum)],
            }
        })
        .collect()
}

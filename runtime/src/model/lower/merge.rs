//! Token merging as `vedge convert` writes it (see `converter/src/merge/write.rs`): from the keys to the place of each
//! token in standard operators, then products with a matrix of zeros and ones that gathers the tokens. Every constant
//! on the way is checked, so that nothing else is taken for it; what differs runs as it is written.

use super::view::trace;
use super::{Fused, Lowered, Rewrites};
use crate::kernels::attention::HeadView;
use crate::kernels::merge::{EPSILON, How, Match, Merge};
use crate::onnx::{Graph, NodeProto, Uses, f32_tensor};

pub fn run(l: &mut Lowered) {
    let uses = l.uses();
    let mut r = Rewrites::default();
    for i in 0..l.graph.nodes.len() {
        let Some(found) = places(&l.graph, &uses, i) else { continue };
        let places = l.graph.nodes[i].output[0].clone();
        let products = products(&l.graph, &uses, &places, &found.matching);
        // All or nothing: the matrix must not be needed any more.
        let Some(products) = products else { continue };
        let new = l.node(Fused::Match(found.matching), &[&found.keys], &places);
        r.replace(&[i], new);
        for p in products {
            let values = p.values.unwrap_or_else(|| ones(l, p.merge.tokens));
            let inputs: Vec<&str> = [&values, &places].into_iter().chain(&p.sizes).map(String::as_str).collect();
            let new = l.node(Fused::Merge(p.merge), &inputs, &p.output);
            r.replace(&[p.last], new);
        }
    }
    l.apply(r);
}

/// The sizes of tokens that were never merged.
fn ones(l: &mut Lowered, tokens: usize) -> String {
    let name = l.graph.fresh("ones");
    l.graph.initializers.insert(name.clone(), f32_tensor(&name, &[1, tokens, 1], &vec![1.; tokens]));
    name
}

struct Places {
    matching: Match,
    keys: String,
}

/// Walks upwards from values whose producers are known.
struct Up<'a> {
    graph: &'a Graph,
    uses: &'a Uses,
}

impl<'a> Up<'a> {
    /// The node of this type that makes a value.
    fn node(&self, value: &str, op: &str) -> Option<&'a NodeProto> {
        let n = &self.graph.nodes[self.uses.producer(value)?];
        (n.op_type() == op && n.domain().is_empty()).then_some(n)
    }

    /// The first input of the node of this type that makes a value.
    fn first(&self, value: &str, op: &str) -> Option<&'a str> {
        self.node(value, op).map(|n| n.input_name(0))
    }

    /// The first input of such a node whose second one is the constant number.
    fn with(&self, value: &str, op: &str, constant: f32) -> Option<&'a str> {
        let n = self.node(value, op)?;
        (self.graph.const_scalar(n.input_name(1)) == Some(constant)).then(|| n.input_name(0))
    }

    /// The first input of such a node whose second one is this list.
    fn with_list(&self, value: &str, op: &str, list: &[i64]) -> Option<&'a str> {
        let n = self.node(value, op)?;
        (self.graph.const_i64(n.input_name(1)).as_deref() == Some(list)).then(|| n.input_name(0))
    }
}

/// The Gather at the end of what computes the places.
fn places(g: &Graph, uses: &Uses, end: usize) -> Option<Places> {
    let n = &g.nodes[end];
    if n.op_type() != "Gather" || n.int("axis", 0) != 1 {
        return None;
    }
    let up = Up { graph: g, uses };
    let order = g.const_i64(n.input_name(1))?;
    let tokens = order.len();
    let concat = up.node(n.input_name(0), "Concat").filter(|c| c.int("axis", 0) == 1)?;
    let (prefix, computed, second) = match concat.input.as_slice() {
        [prefix, computed, second] => (g.const_f32(prefix)?, computed, g.const_f32(second)?),
        [computed, second] => (vec![], computed, g.const_f32(second)?),
        _ => return None,
    };
    let p = prefix.len();
    let (na, nb) = (tokens.checked_sub(p)?.div_ceil(2), tokens.checked_sub(p)? / 2);
    let whole = |from: usize, count: usize| (from..from + count).map(|v| v as f32).collect::<Vec<_>>();
    let position = |i: usize| match i.checked_sub(p) {
        None => i,
        Some(i) => p + i / 2 + if i % 2 == 0 { 0 } else { na },
    };
    if nb == 0 || prefix != whole(0, p) || !(0..tokens).map(position).map(|i| i as i64).eq(order) {
        return None;
    }
    // gone · (left + partner) + kept · (place among the kept).
    let sum = up.node(computed, "Add")?;
    let (joins, stays) = (up.node(sum.input_name(0), "Mul")?, up.node(sum.input_name(1), "Mul")?);
    let gone = joins.input_name(0);
    let kept = stays.input_name(0);
    let minus = up.node(kept, "Sub").filter(|n| n.input_name(1) == gone)?;
    let count = up.with(stays.input_name(1), "Add", p as f32 - 1.)?;
    let count = up.node(count, "CumSum").filter(|n| n.input_name(0) == kept && n.attribute.is_empty())?;
    let axis = g.const_i64(count.input_name(1));
    if g.const_scalar(minus.input_name(0)) != Some(1.) || axis.as_deref() != Some(&[1]) {
        return None;
    }
    // Which are gone: the `merged` most similar ones.
    let hits = up.with_list(gone, "ReduceSum", &[1]).filter(|_| shape(g, gone, &[1, na]))?;
    let hits = up.node(up.first(hits, "Cast")?, "Equal")?;
    let all: Vec<i64> = (0..na as i64).collect();
    let chosen = up.first(hits.input_name(0), "Reshape")?;
    let top = up.node(chosen, "TopK").filter(|n| n.output.get(1).is_some_and(|o| o == chosen) && descends(n))?;
    let merged = usize::try_from(*g.const_i64(top.input_name(1))?.first()?).ok()?;
    if g.const_i64(hits.input_name(1)) != Some(all) || merged == 0 || merged > na {
        return None;
    }
    let left = p + na - merged;
    if second != whole(left, nb) {
        return None;
    }
    // The best partner of each.
    let best = up.node(up.first(top.input_name(0), "Reshape")?, "TopK")?;
    let partner = up.with(joins.input_name(1), "Add", left as f32)?;
    let partner = up.first(up.first(partner, "Reshape")?, "Cast")?;
    let one = g.const_i64(best.input_name(1)).as_deref() == Some(&[1]);
    if best.output.get(1).is_none_or(|o| o != partner) || !one || !descends(best) {
        return None;
    }
    // Cosines of the keys' sums over the heads, `[1][dim][tokens]`.
    let product = up.node(best.input_name(0), "MatMul").filter(|_| shape(g, best.input_name(0), &[1, na, nb]))?;
    let a = up.node(product.input_name(0), "Transpose").filter(|n| n.ints("perm") == Some(&[0, 2, 1]))?;
    let side = |value: &str, from: usize| {
        let n = up.node(value, "Gather").filter(|n| n.int("axis", 0) == 2)?;
        let places = (p + from..tokens).step_by(2).map(|i| i as i64);
        (g.const_i64(n.input_name(1))? == places.collect::<Vec<_>>()).then(|| n.input_name(0))
    };
    let unit = side(a.input_name(0), 0)?;
    let divide = up.node(unit, "Div").filter(|_| side(product.input_name(1), 1) == Some(unit))?;
    let keys = divide.input_name(0);
    let squares = up.with(up.first(divide.input_name(1), "Sqrt")?, "Add", EPSILON)?;
    let squares = up.node(up.with_list(squares, "ReduceSum", &[1])?, "Mul")?;
    let keys_of_heads = up.with_list(keys, "ReduceSum", &[1])?;
    if squares.input.as_slice() != [keys, keys] {
        return None;
    }
    let view = trace(g, uses, keys_of_heads)?;
    let [(1, _), (heads, head), (dim, along), (count, token)] = view.axes[..] else { return None };
    let keys = HeadView { input: 0, offset: view.offset, strides: [0, head, token, along] };
    let matching = Match { keys, heads, tokens, dim, prefix: p, merged };
    (count == tokens && !g.initializers.contains_key(&view.root)).then_some(Places { matching, keys: view.root })
}

/// A value that a product with the matrix makes.
struct Product {
    merge: Merge,
    /// Tokens, or sizes; none for sizes that all are 1.
    values: Option<String>,
    /// Sizes to weigh tokens by, where they are not all 1.
    sizes: Option<String>,
    output: String,
    last: usize,
}

/// What is made with the matrix of zeros and ones that belongs to places; `None` if it has other uses.
fn products(g: &Graph, uses: &Uses, places: &str, m: &Match) -> Option<Vec<Product>> {
    let next = |value: &str, op: &str| {
        let n = &g.nodes[uses.only_consumer(value)?];
        (n.op_type() == op).then(|| n.output[0].as_str())
    };
    let row = next(places, "Reshape").filter(|v| shape(g, v, &[1, 1, m.tokens]))?;
    let equal = uses.only_consumer(row).filter(|&i| g.nodes[i].op_type() == "Equal")?;
    let left = m.tokens - m.merged;
    let numbers = g.nodes[equal].input.iter().find(|i| *i != row)?;
    let wanted: Vec<f32> = (0..left).map(|v| v as f32).collect();
    if g.const_f32(numbers)? != wanted || !shape(g, numbers, &[1, left, 1]) {
        return None;
    }
    let matrix = next(&g.nodes[equal].output[0], "Cast").filter(|v| shape(g, v, &[1, left, m.tokens]))?;
    if uses.is_output(matrix) {
        return None;
    }
    let up = Up { graph: g, uses };
    let mut found = vec![];
    // Sums of sizes first: the means divide by them.
    let mut by_matrix: Vec<(usize, &NodeProto)> = uses.consumers(matrix).iter().map(|&i| (i, &g.nodes[i])).collect();
    by_matrix.sort_by_key(|(_, n)| g.shape(&n.output[0]).is_none_or(|s| s.last() != Some(&1)));
    // The sizes before, where they are not all 1, and after.
    let (mut before, mut after) = (None, None);
    for (i, n) in by_matrix {
        let out = n.output[0].as_str();
        let [1, _, width] = g.shape(out)?[..] else { return None };
        let merge = |how| Merge { tokens: m.tokens, left, width, how };
        let product = n.op_type() == "MatMul" && n.input_name(0) == matrix;
        if after.is_none() && width == 1 {
            let counts = n.op_type() == "ReduceSum" && g.const_i64(n.input_name(1)).as_deref() == Some(&[2]);
            before = product.then(|| n.input_name(1).to_string());
            after = Some(out);
            let sum =
                Product { merge: merge(How::Sum), values: before.clone(), sizes: None, output: out.into(), last: i };
            found.push((product || counts).then_some(sum)?);
            continue;
        }
        let last = uses.only_consumer(out).filter(|_| product)?;
        let divide = &g.nodes[last];
        if divide.op_type() != "Div" || divide.input.as_slice() != [out, after?] {
            return None;
        }
        let values = match &before {
            Some(sizes) => up.node(n.input_name(1), "Mul").filter(|n| n.input_name(1) == sizes)?.input_name(0),
            None => n.input_name(1),
        };
        let output = divide.output[0].clone();
        found.push(Product {
            merge: merge(How::Mean),
            values: Some(values.into()),
            sizes: before.clone(),
            output,
            last,
        });
    }
    (!found.is_empty()).then_some(found)
}

fn shape(g: &Graph, value: &str, want: &[usize]) -> bool {
    g.shape(value).as_deref() == Some(want)
}

/// Whether a TopK is over the last of two or three axes, largest first.
fn descends(n: &NodeProto) -> bool {
    n.int("axis", -1) == -1 && n.int("largest", 1) == 1 && n.int("sorted", 1) == 1
}

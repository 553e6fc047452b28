//! Scaled dot-product attention around a Softmax: `softmax(scale · q kᵀ + bias) v`, with the reshapes, transposes and
//! slices before and after it read as strides.

use super::pairs::{Pair, origin};
use super::view::{View, strides, trace};
use super::{Fused, Lowered, Rewrites, fused_index};
use crate::kernels::attention::{Arithmetic, Attention, Bytes, Grids, HeadView, ScoreBias, Step};
use crate::kernels::requantize::Grid;
use crate::kernels::windows::Windows;
use crate::kernels::{Kernels, Layout};
use crate::onnx::{DType, Graph, NodeProto, Uses, elements, shape_of};

struct Found {
    nodes: Vec<usize>,
    attention: Attention,
    inputs: Vec<String>,
    output: String,
}

pub fn run(l: &mut Lowered) {
    let uses = l.uses();
    let mut r = Rewrites::default();
    for i in 0..l.graph.nodes.len() {
        if l.graph.nodes[i].op_type() != "Softmax" {
            continue;
        }
        if let Some(f) = find(&l.graph, &uses, i) {
            let inputs: Vec<&str> = f.inputs.iter().map(String::as_str).collect();
            let new = l.node(Fused::Attention(Box::new(f.attention)), &inputs, &f.output);
            r.replace(&f.nodes, new);
        }
    }
    l.apply(r);
}

/// Batch, heads and the last two axes of a shape of rank 2 to 4.
fn four(shape: &[usize]) -> Option<[usize; 4]> {
    match *shape {
        [n, d] => Some([1, 1, n, d]),
        [b, n, d] => Some([b, 1, n, d]),
        [b, h, n, d] => Some([b, h, n, d]),
        _ => None,
    }
}

fn find(g: &Graph, uses: &Uses, softmax: usize) -> Option<Found> {
    let mut nodes = vec![softmax];
    let n = &g.nodes[softmax];
    let scores_shape = g.shape(n.input_name(0))?;
    let [batch, heads, queries, keys] = four(&scores_shape)?;
    let last = super::constant::normal_axis(n.int("axis", -1), scores_shape.len())?;
    if last + 1 != scores_shape.len() {
        return None;
    }
    let mut grids = Grids::default();
    let mut inputs: Vec<String> = vec![];
    // Upwards to the product of q and k.
    let mut steps = vec![];
    let mut value = n.input_name(0).to_string();
    let product = loop {
        if let Some(pair) = Pair::before_one(g, uses, &value) {
            steps.push(Step::Round(eight_bits(&pair)?));
            nodes.extend([pair.quantize, pair.dequantize]);
            value = pair.input(g).into();
            continue;
        }
        let i = uses.producer(&value)?;
        uses.only_consumer(&value)?;
        let n = &g.nodes[i];
        nodes.push(i);
        match n.op_type() {
            "MatMul" => break i,
            "Reshape" => value = n.input_name(0).into(),
            "Add" if !n.input.iter().any(|i| g.initializers.contains_key(i)) => {
                let at = key_bias_of(g, n, keys)?;
                steps.push(Step::AddInput(inputs.len()));
                inputs.push(n.input[at].clone());
                value = n.input[1 - at].clone();
            }
            "Add" => {
                let constant = n.input.iter().take(2).position(|i| g.initializers.contains_key(i))?;
                let at = g.shape(&n.output[0])?;
                steps.push(Step::Add(score_bias(g, &n.input[constant], &at, [batch, heads, queries, keys])?));
                value = n.input.get(1 - constant)?.clone();
            }
            "Mul" | "Div" => {
                let (rest, s) = scaled(g, n.op_type(), &n.input)?;
                steps.push(Step::Times(s));
                value = rest;
            }
            _ => return None,
        }
    };
    // Both sides, looking through a scalar factor.
    let n = &g.nodes[product];
    let mut side_scale = 1.;
    let mut side = |input: &str, grid: &mut Option<(f32, Grid)>| -> Option<View> {
        let mut name = input.to_string();
        if let Some(pair) = Pair::before_one(g, uses, &name)
            && let Some(i) = uses.producer(pair.input(g))
            && let Some((rest, s)) = scaled(g, g.nodes[i].op_type(), &g.nodes[i].input)
        {
            *grid = Some((s, eight_bits(&pair)?));
            return trace(g, uses, &rest);
        }
        // The factor may stand before or after the transposition.
        for _ in 0..3 {
            let Some(i) = uses.producer(&name) else { break };
            let p = &g.nodes[i];
            if !matches!(p.op_type(), "Mul" | "Div") {
                break;
            }
            let Some((rest, s)) = scaled(g, p.op_type(), &p.input) else { break };
            side_scale *= s;
            name = rest;
        }
        let mut v = trace(g, uses, &name)?;
        if let Some(i) = uses.producer(&v.root)
            && matches!(g.nodes[i].op_type(), "Mul" | "Div")
            && let Some((rest, s)) = scaled(g, g.nodes[i].op_type(), &g.nodes[i].input)
        {
            let inner = trace(g, uses, &rest)?;
            // Only where the factor's result is laid out like its input.
            if inner.axes.iter().map(|a| a.0).collect::<Vec<_>>() == g.shape(&v.root)? {
                let compose = compose(&v, &inner)?;
                side_scale *= s;
                v = compose;
            }
        }
        Some(v)
    };
    let q = side(n.input_name(0), &mut grids.q)?;
    let k = side(n.input_name(1), &mut grids.k)?;
    steps.push(Step::Times(side_scale));
    steps.reverse();
    // Downwards: the product with v, then the way back to tokens × width.
    let mut probabilities = &g.nodes[softmax].output[0];
    if let Some(pair) = Pair::after(g, uses, probabilities) {
        grids.probabilities = Some(eight_bits(&pair)?);
        nodes.extend([pair.quantize, pair.dequantize]);
        probabilities = &g.nodes[pair.dequantize].output[0];
    }
    let times_v = uses.only_consumer(probabilities)?;
    let n = &g.nodes[times_v];
    if n.op_type() != "MatMul" || n.input_name(0) != probabilities {
        return None;
    }
    nodes.push(times_v);
    let v = trace(g, uses, n.input_name(1))?;
    grids.inputs = [&q, &k, &v].map(|v| origin(g, uses, &v.root).as_ref().and_then(eight_bits));
    let mut output = n.output[0].clone();
    let [ob, oh, on, dim_v] = four(&g.shape(&output)?)?;
    if [ob, oh, on] != [batch, heads, queries] || g.fact(&output)?.0 != DType::Float {
        return None;
    }
    let rank = g.shape(&output)?.len();
    let mut out = to_four(&strides(&g.shape(&output)?));
    if let Some(t) = uses.only_consumer(&output)
        && g.nodes[t].op_type() == "Transpose"
    {
        let perm: Vec<usize> = g.nodes[t].ints("perm")?.iter().map(|&p| p as usize).collect();
        let of = strides(&g.shape(&g.nodes[t].output[0])?);
        let mut by_axis = vec![0; rank];
        for (&p, s) in perm.iter().zip(of) {
            *by_axis.get_mut(p)? = s;
        }
        out = to_four(&by_axis);
        nodes.push(t);
        output = g.nodes[t].output[0].clone();
    }
    if let Some(s) = uses.only_consumer(&output)
        && g.nodes[s].op_type() == "Reshape"
    {
        nodes.push(s);
        output = g.nodes[s].output[0].clone();
    }
    let mut head_view = |v: &View, swap: bool| -> Option<HeadView> {
        let shape: Vec<usize> = v.axes.iter().map(|a| a.0).collect();
        four(&shape)?;
        let by_axis: Vec<usize> = v.axes.iter().map(|a| if a.0 == 1 { 0 } else { a.1 }).collect();
        let mut strides = to_four(&by_axis);
        // A dimension of one element has stride 0; dim must stay 1 for direct reads.
        if swap {
            strides.swap(2, 3);
        }
        let input = inputs.iter().position(|i| *i == v.root).unwrap_or_else(|| {
            inputs.push(v.root.clone());
            inputs.len() - 1
        });
        Some(HeadView { input, offset: v.offset, strides })
    };
    let dims = |v: &View| four(&v.axes.iter().map(|a| a.0).collect::<Vec<_>>());
    let dim = dims(&q)?[3];
    if dims(&q)? != [batch, heads, queries, dim]
        || dims(&k)? != [batch, heads, dim, keys]
        || dims(&v)? != [batch, heads, keys, dim_v]
    {
        return None;
    }
    let (q, k, v) = (head_view(&q, false)?, head_view(&k, true)?, head_view(&v, false)?);
    if inputs.iter().any(|i| g.initializers.contains_key(i) || g.fact(i).is_none_or(|f| f.0 != DType::Float)) {
        return None;
    }
    let attention = Attention {
        batch,
        heads,
        queries,
        keys,
        dim,
        dim_v,
        q,
        k,
        v,
        steps,
        out,
        grids,
        arithmetic: Arithmetic::Float,
    };
    Some(Found { nodes, attention, inputs, output })
}

/// The grid of a pair that rounds to 8 bits.
fn eight_bits(pair: &Pair) -> Option<Grid> {
    matches!(pair.parameters.dtype, DType::Uint8 | DType::Int8).then_some(pair.grid)
}

/// Where the CPU multiplies 16-bit integers faster than floats, and q, k and v come from layers in integers, their products
/// need no more precision; other CPUs compute in 8 bits where the file rounds to that anyway.
pub fn choose_arithmetic(l: &mut Lowered, kernels: &Kernels) {
    let uses = l.uses();
    let choice = |n: &NodeProto| {
        let Some(Fused::Attention(a)) = l.fused_of(n) else { return None };
        let of_integers = |v: &HeadView| from_integers(l, &uses, &n.input[v.input]);
        let arithmetic = match kernels.tile_i16 {
            Some(_) => [&a.q, &a.k, &a.v].into_iter().all(of_integers).then_some(Arithmetic::Words),
            // Finding pairs takes longer than multiplying.
            None if kernels.layout == Layout::Paired => None,
            None => Bytes::of(a).map(|bytes| Arithmetic::Bytes(Box::new(bytes))),
        };
        Some((fused_index(n)?, arithmetic?))
    };
    let chosen: Vec<(usize, Arithmetic)> = l.graph.nodes.iter().filter_map(choice).collect();
    for (index, arithmetic) in chosen {
        if let Fused::Attention(a) = &mut l.fused[index] {
            a.arithmetic = arithmetic;
        }
    }
}

/// Joins attention within windows with the linear layer that makes its queries, keys and values and nothing else.
pub fn join_windows(l: &mut Lowered) {
    let uses = l.uses();
    let mut r = Rewrites::default();
    for i in 0..l.graph.nodes.len() {
        let n = &l.graph.nodes[i];
        let Some(Fused::Attention(a)) = l.fused_of(n).filter(|_| n.input.len() == 1) else { continue };
        let (value, attention) = (n.input_name(0), (**a).clone());
        let Some(before) = uses.producer(value).filter(|_| uses.only_consumer(value).is_some()) else { continue };
        let layer = &l.graph.nodes[before];
        let Some(Fused::Linear(linear)) = l.fused_of(layer).filter(|_| layer.input.len() == 1) else { continue };
        if attention.batch < 2 || linear.reads_whole() || !Windows::fit(linear, &attention) {
            continue;
        }
        let (input, output) = (layer.input[0].clone(), n.output[0].clone());
        let linear = l.take_linear(fused_index(&l.graph.nodes[before]).expect("linear"));
        let windows = Fused::Windows(Box::new(Windows { linear, attention }));
        let new = l.node(windows, &[&input], &output);
        r.replace(&[before, i], new);
    }
    l.apply(r);
}

/// Whether a value is the output of an operator in integers, perhaps moved since.
fn from_integers(l: &Lowered, uses: &Uses, name: &str) -> bool {
    let Some(n) = uses.producer(name).map(|i| &l.graph.nodes[i]) else { return false };
    match l.fused_of(n) {
        Some(Fused::Copy(_)) => from_integers(l, uses, n.input_name(0)),
        Some(f) => f.is_integer(),
        None => false,
    }
}

/// Strides for batch, head, row, column; 0 for axes that are not there.
fn to_four(by_axis: &[usize]) -> [usize; 4] {
    let mut out = [0; 4];
    match *by_axis {
        [n, d] => (out[2], out[3]) = (n, d),
        [b, n, d] => (out[0], out[2], out[3]) = (b, n, d),
        _ => out.copy_from_slice(by_axis),
    }
    out
}

/// The view `outer` of a tensor that itself is the view `inner` (contiguous in between).
fn compose(outer: &View, inner: &View) -> Option<View> {
    let shape: Vec<usize> = inner.axes.iter().map(|a| a.0).collect();
    let contiguous = strides(&shape);
    // Each axis of the outer view must run along one axis of the inner one.
    let along = |stride: usize| contiguous.iter().zip(&shape).position(|(&s, &n)| s == stride && n != 1);
    let mut axes = vec![];
    for &(size, stride) in &outer.axes {
        let stride = if size == 1 { 0 } else { inner.axes.get(along(stride)?)?.1 };
        axes.push((size, stride));
    }
    let (mut left, mut offset) = (outer.offset, inner.offset);
    for (s, a) in contiguous.iter().zip(&inner.axes).filter(|(s, _)| **s > 0) {
        offset += left / s * a.1;
        left %= s;
    }
    Some(View { root: inner.root.clone(), offset, axes })
}

/// A product or quotient with a constant scalar: the other operand and the factor.
fn scaled(g: &Graph, op: &str, inputs: &[String]) -> Option<(String, f32)> {
    let [a, b] = inputs else { return None };
    match (op, g.const_scalar(a), g.const_scalar(b)) {
        ("Mul", None, Some(s)) => Some((a.clone(), s)),
        ("Mul", Some(s), None) => Some((b.clone(), s)),
        ("Div", None, Some(s)) if s != 0. => Some((a.clone(), 1. / s)),
        _ => None,
    }
}

/// Which input of an Add to scores is a computed value for each key, the same for all heads and queries.
fn key_bias_of(g: &Graph, n: &NodeProto, keys: usize) -> Option<usize> {
    let shapes: Vec<Vec<usize>> = n.input.iter().map(|i| g.shape(i)).collect::<Option<_>>()?;
    let at = shapes.iter().position(|s| s.last() == Some(&keys) && elements(s) == keys)?;
    (shapes.len() == 2 && elements(&shapes[1 - at]) > keys).then_some(at)
}

/// A constant added to scores that have the shape `at` (rank 2 to 5, `[1, windows, heads, n, m]` for rank 5).
fn score_bias(g: &Graph, name: &str, at: &[usize], scores: [usize; 4]) -> Option<ScoreBias> {
    let t = g.initializers.get(name)?;
    let shape = shape_of(t);
    let values = g.const_f32(name)?;
    let mut full = vec![1; at.len().checked_sub(shape.len())?];
    full.extend(&shape);
    let [batch, heads, n, m] = match *full.as_slice() {
        [a, b, h, n, m] if at[0] * at[1] == scores[0] && at[2] == scores[1] => [a * b, h, n, m],
        ref s => four(s)?,
    };
    // A window index that repeats over a batch of pictures would need a > 1 with b > 1 broadcast; batch is 1 here.
    let fits = [batch, heads].iter().zip(&scores).all(|(&x, &s)| x == 1 || x == s) && [n, m] == [scores[2], scores[3]];
    // What is no number would have to be looked for in each row of scores.
    let fits = fits && !values.iter().any(|v| v.is_nan());
    fits.then_some(ScoreBias { batch, heads, values })
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Builder, agrees_with_tract};

    #[test]
    fn scores_take_their_steps_in_order() {
        let (x, scores) = ([4, 6, 8], [4, 2, 6, 6]);
        let mut b = Builder::new(&x);
        let qkv = b.layer("x", &x, 24);
        let y = b.attention_by(&qkv, [4, 6, 2, 4], |b, value| {
            let [factor, by_head] = [vec![], vec![1, 2, 6, 6]].map(|shape: Vec<usize>| b.floats(&shape));
            let value = b.round(&value, &scores);
            let value = b.node("Mul", &[&value, &factor], vec![], &scores);
            let value = b.node("Add", &[&value, &by_head], vec![], &scores);
            let value = b.round(&value, &scores);
            // As Swin masks windows: four of them in each picture.
            let value = b.reshape(&value, &[1, 4, 2, 6, 6]);
            let by_window = b.floats(&[1, 4, 1, 6, 6]);
            let value = b.node("Add", &[&value, &by_window], vec![], &[1, 4, 2, 6, 6]);
            let value = b.round(&value, &[1, 4, 2, 6, 6]);
            b.reshape(&value, &scores)
        });
        let y = b.layer(&y, &x, 8);
        assert_eq!(agrees_with_tract(&b.finish(&[&y])), ["windows", "linear"]);
    }
}

//! Linear layers: MatMul or Gemm with constant weights, factors of their inputs, and what follows them: bias, per-channel
//! scale (LayerScale), element-wise function, residual.

use super::constant::{Constant, constant, quantized};
use super::pairs::Pair;
use super::{Fused, Lowered, Rewrites, fused_index};
use crate::error::Result;
use crate::kernels::linear::{InputQuant, Linear, Step, Weights};
use crate::kernels::{Activation, F32Weights, I8Weights, Kernels};
use crate::model::check::EXACT_INPUTS;
use crate::model::qdq::MOVES;
use crate::onnx::{DType, Graph, NodeProto, Uses, elements};

/// A linear layer as found: `x · W · scale + bias`.
struct Found {
    nodes: Vec<usize>,
    input: String,
    factors: Option<Vec<f32>>,
    quant: Option<InputQuant>,
    weight: Constant,
    /// Whether the weight is stored `[k][n]`, as for MatMul.
    by_input: bool,
    scale: Vec<f32>,
    bias: Vec<f32>,
    activation: Activation,
    residual: Option<String>,
    then: Vec<Step>,
    output: String,
    note: Option<String>,
}

pub fn run(l: &mut Lowered, kernels: &Kernels, per_token: bool) -> Result<()> {
    let uses = l.uses();
    let mut r = Rewrites::default();
    for i in 0..l.graph.nodes.len() {
        if !r.is_free(i) {
            continue;
        }
        let Some(mut found) = head(&l.graph, &uses, i, per_token) else { continue };
        enter(&l.graph, &uses, &r, &mut found);
        extend(l, &uses, &r, &mut found);
        if let Some(note) = found.note.take() {
            l.notes.insert(found.output.clone(), note);
        }
        let mut inputs = vec![found.input.as_str()];
        inputs.extend(found.residual.as_deref());
        let linear = Linear {
            factors: found.factors.take(),
            then: std::mem::take(&mut found.then),
            ..Linear::new(pack(kernels, &found), &found.bias, found.activation)
        };
        let new = l.node(Fused::Linear(Box::new(linear)), &inputs, &found.output);
        r.replace(&found.nodes, new);
    }
    l.apply(r);
    Ok(())
}

/// The matrix product itself.
fn head(g: &Graph, uses: &Uses, i: usize, per_token: bool) -> Option<Found> {
    let n = &g.nodes[i];
    if !n.domain().is_empty() || !matches!(n.op_type(), "MatMul" | "Gemm") {
        return None;
    }
    let x = n.input_name(0);
    let weight = constant(g, uses, n.input_name(1)).filter(|w| w.shape().len() == 2 && elements(w.shape()) > 0)?;
    let (dtype, shape) = g.fact(x)?;
    let output = n.output.first()?;
    if dtype != DType::Float || elements(&shape) == 0 || g.initializers.contains_key(x) {
        return None;
    }
    let by_input = n.op_type() == "MatMul" || n.int("transB", 0) == 0;
    let (k, width) =
        if by_input { (weight.shape()[0], weight.shape()[1]) } else { (weight.shape()[1], weight.shape()[0]) };
    if shape.last() != Some(&k) {
        return None;
    }
    let (mut scale, mut bias) = (1., vec![0.; width]);
    if n.op_type() == "Gemm" {
        if n.int("transA", 0) != 0 {
            return None;
        }
        scale = n.float("alpha", 1.);
        if !n.input_name(2).is_empty() {
            let beta = n.float("beta", 1.);
            bias = per_column(g, n.input_name(2), width)?.iter().map(|b| b * beta).collect();
        }
    }
    let mut found = Found {
        nodes: vec![i],
        input: x.into(),
        factors: None,
        quant: None,
        weight,
        by_input,
        scale: vec![scale; width],
        bias,
        activation: Activation::None,
        residual: None,
        then: vec![],
        output: output.clone(),
        note: None,
    };
    choose_quant(g, uses, per_token, &mut found);
    found.input = same_rows(g, uses, &found.input, k).into();
    Some(found)
}

/// Takes a product with a constant row before the layer, but where the product's own range is what quantizes it.
fn enter(g: &Graph, uses: &Uses, r: &Rewrites, f: &mut Found) {
    if f.quant == Some(InputQuant::Whole) {
        return;
    }
    let Some(at) = uses.producer(&f.input).filter(|&at| r.is_free(at)) else { return };
    let n = &g.nodes[at];
    let [a, b] = n.input.as_slice() else { return };
    if n.op_type() != "Mul" || !n.domain().is_empty() {
        return;
    }
    let Some(inputs) = g.shape(&f.input).and_then(|s| s.last().copied()) else { return };
    for (x, row) in [(a, b), (b, a)] {
        if !g.initializers.contains_key(x)
            && g.fact(x) == g.fact(&f.input)
            && let Some(factors) = per_column(g, row, inputs)
        {
            (f.factors, f.input) = (Some(factors), x.clone());
            return;
        }
    }
}

/// The value that reshapes made the rows of `k` elements from.
fn same_rows<'a>(g: &'a Graph, uses: &Uses, mut x: &'a str, k: usize) -> &'a str {
    while let Some(n) = uses.producer(x).map(|i| &g.nodes[i])
        && n.op_type() == "Reshape"
        && g.fact(n.input_name(0)).is_some_and(|(dtype, shape)| dtype == DType::Float && shape.last() == Some(&k))
    {
        x = n.input_name(0);
    }
    x
}

/// Integers where both sides are quantized; else float, with a note where only one is.
fn choose_quant(g: &Graph, uses: &Uses, per_token: bool, f: &mut Found) {
    let activations = quantized(g, uses, &f.input);
    let outputs_axis = usize::from(f.by_input);
    match &f.weight {
        Constant::I8 { scale, axis, .. } => {
            if f.weight.shape()[1 - outputs_axis] > EXACT_INPUTS {
                f.note = Some(format!("more than {EXACT_INPUTS} inputs overflow 32-bit sums: float"));
            } else if scale.len() > 1 && *axis != outputs_axis {
                f.note = Some("weight scales run along the inputs: float".into());
            } else if let Some((x, quant)) = activations {
                f.input = x;
                f.quant = Some(quant);
            } else if per_token {
                f.quant = Some(InputQuant::PerRow);
            } else {
                f.note = Some("int8 weights, but the input is not quantized: float".into());
            }
        }
        Constant::F32(..) if activations.is_some() => {
            f.note = Some("quantized input, but float weights: float".into());
        }
        Constant::F32(..) => {}
    }
}

/// A constant that has one value for each output column (or one for all).
fn per_column(g: &Graph, name: &str, n: usize) -> Option<Vec<f32>> {
    let shape = g.initializers.get(name).map(crate::onnx::shape_of)?;
    let values = g.const_f32(name)?;
    match values.len() {
        1 => Some(vec![values[0]; n]),
        len if len == n && shape.last() == Some(&n) => Some(values),
        _ => None,
    }
}

/// Takes the nodes that follow.
fn extend(l: &Lowered, uses: &Uses, r: &Rewrites, f: &mut Found) {
    // A reshape is taken only together with what comes after it.
    let mut taken = (f.nodes.len(), f.output.clone());
    while let Some(shape_only) = take_next(l, uses, r, f) {
        if !shape_only {
            taken = (f.nodes.len(), f.output.clone());
        }
    }
    f.nodes.truncate(taken.0);
    f.output = taken.1;
}

/// Takes what comes next, if it may be; says whether that was a reshape.
fn take_next(l: &Lowered, uses: &Uses, r: &Rewrites, f: &mut Found) -> Option<bool> {
    let g = &l.graph;
    let n = f.bias.len();
    if f.residual.is_some() && f.then.is_empty() {
        return None;
    }
    if let Some(pair) = Pair::after(g, uses, &f.output).filter(|p| r.is_free(p.quantize) && r.is_free(p.dequantize)) {
        let output = &g.nodes[pair.dequantize].output[0];
        if is_read_by_layer(g, uses, output, 8) {
            return None;
        }
        f.then.push(Step::Round(pair.grid));
        f.nodes.extend([pair.quantize, pair.dequantize]);
        f.output.clone_from(output);
        return Some(false);
    }
    let next = uses.only_consumer(&f.output).filter(|&i| r.is_free(i))?;
    let node = &g.nodes[next];
    let operand = node.input.iter().find(|i| **i != f.output);
    let values = operand.and_then(|o| per_column(g, o, n));
    let plain = f.activation == Activation::None && f.then.is_empty();
    let mut shape_only = false;
    match (node.op_type(), values) {
        ("Add", Some(b)) if plain => f.bias.iter_mut().zip(b).for_each(|(x, b)| *x += b),
        ("Mul", Some(s)) if plain => {
            f.bias.iter_mut().zip(&s).for_each(|(x, s)| *x *= s);
            f.scale.iter_mut().zip(&s).for_each(|(x, s)| *x *= s);
        }
        ("Add", None) if f.residual.is_none() => {
            f.residual = Some(operand.filter(|o| is_residual(g, o, &f.output))?.clone());
            if !f.then.is_empty() || Pair::after(g, uses, &node.output[0]).is_some() {
                f.then.push(Step::Residual);
            }
        }
        ("Reshape", _) if g.shape(&node.output[0]).is_some_and(|s| s.last() == Some(&n)) => shape_only = true,
        _ => match l.fused_of(node)? {
            Fused::Activation(a) if plain => f.activation = *a,
            Fused::Table(table) => {
                // It rounds by itself.
                if matches!(f.then.last(), Some(Step::Round(grid)) if grid.scale == table.scale) {
                    f.then.pop();
                }
                f.then.push(Step::Table(table.clone()));
            }
            _ => return None,
        },
    }
    f.nodes.push(next);
    f.output = node.output[0].clone();
    Some(shape_only)
}

/// Whether a layer with constant weights reads a value, perhaps moved, so that it takes the value's quantization.
fn is_read_by_layer(g: &Graph, uses: &Uses, value: &str, steps: usize) -> bool {
    uses.consumers(value).iter().any(|&i| {
        let n = &g.nodes[i];
        let constant = |name: &str| match uses.producer(name) {
            None => true,
            Some(p) => g.initializers.contains_key(g.nodes[p].input_name(0)),
        };
        match n.op_type() {
            "MatMul" | "Gemm" | "Conv" => n.input_name(0) == value && constant(n.input_name(1)),
            op if MOVES.contains(&op) && steps > 0 => n.output.iter().any(|o| is_read_by_layer(g, uses, o, steps - 1)),
            _ => false,
        }
    })
}

/// Whether a value may be added to an operator's output as it leaves it.
pub fn is_residual(g: &Graph, name: &str, output: &str) -> bool {
    !g.initializers.contains_key(name) && g.fact(name).is_some() && g.fact(name) == g.fact(output)
}

fn pack(kernels: &Kernels, f: &Found) -> Weights {
    let (k, n) = match f.by_input {
        true => (f.weight.shape()[0], f.weight.shape()[1]),
        false => (f.weight.shape()[1], f.weight.shape()[0]),
    };
    let at = |row: usize, i: usize| if f.by_input { i * n + row } else { row * k + i };
    match (&f.weight, f.quant) {
        (Constant::I8 { values, scale, .. }, Some(quant)) => {
            let strides = if f.by_input { [1, n] } else { [k, 1] };
            let scale: Vec<f32> = f.scale.iter().enumerate().map(|(c, s)| s * scale[c % scale.len()]).collect();
            Weights::I8(I8Weights::pack_strided(kernels, [n, k], values, strides, &scale), quant)
        }
        (weight, _) => {
            let values = weight.to_f32();
            Weights::F32(F32Weights::pack(n, k, |row, i| values[at(row, i)] * f.scale[row]))
        }
    }
}

/// Moves a LayerNorm into the linear layers that use it, where nothing else does.
pub fn absorb_norms(l: &mut Lowered) {
    let uses = l.uses();
    let is_linear = |n: &NodeProto| matches!(l.fused_of(n), Some(Fused::Linear(_)));
    let reads_whole = |n: &NodeProto| matches!(l.fused_of(n), Some(Fused::Linear(l)) if l.reads_whole());
    let mut moves = vec![];
    for n in &l.graph.nodes {
        let Some(Fused::LayerNorm(norm)) = l.fused_of(n) else { continue };
        let users = uses.consumers(&n.output[0]);
        let all = users.iter().all(|&u| {
            let user = &l.graph.nodes[u];
            is_linear(user)
                && !reads_whole(user)
                && user.input_name(0) == n.output[0]
                && user.input.get(1) != n.output.first()
        });
        if all && !uses.is_output(&n.output[0]) {
            moves.push((users.to_vec(), n.input[0].clone(), norm.clone()));
        }
    }
    for (users, input, norm) in moves {
        for u in users {
            let n = &mut l.graph.nodes[u];
            n.input[0] = input.clone();
            let index = fused_index(n).expect("a linear layer");
            if let Fused::Linear(linear) = &mut l.fused[index] {
                linear.norm = Some(norm.clone());
            }
        }
    }
    l.graph.prune_unused();
}

/// Joins a linear layer with the one that alone uses its output.
pub fn join_pairs(l: &mut Lowered, kernels: &Kernels) {
    let uses = l.uses();
    let mut r = Rewrites::default();
    for first in 0..l.graph.nodes.len() {
        let n = &l.graph.nodes[first];
        let Some(Fused::Linear(one)) = l.fused_of(n).filter(|_| r.is_free(first) && n.input.len() == 1) else {
            continue;
        };
        let Some(second) = uses.only_consumer(&n.output[0]) else { continue };
        let m = &l.graph.nodes[second];
        let Some(Fused::Linear(two)) = l.fused_of(m).filter(|_| r.is_free(second)) else { continue };
        let is_integer = |l: &Linear| matches!(l.weights, Weights::I8(..));
        // Kinds are not mixed, so that the plan can say what runs in integers.
        if m.input[0] != n.output[0]
            || m.input.get(1) == Some(&n.output[0])
            || is_integer(one) != is_integer(two)
            || two.reads_whole()
            || !two.order.is_empty()
        {
            continue;
        }
        let inputs: Vec<String> = std::iter::once(&n.input[0]).chain(m.input.get(1)).cloned().collect();
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let output = m.output[0].clone();
        let (one, two) = (fused_index(n).expect("linear"), fused_index(m).expect("linear"));
        let (mut one, mut two) = (l.take_linear(one), l.take_linear(two));
        if let Some(Step::Table(table)) = one.then.last()
            && two.take_table(kernels, table)
        {
            one.then.pop();
        }
        let pair = Fused::Mlp(Box::new([one, two]));
        let new = l.node(pair, &inputs, &output);
        r.replace(&[first, second], new);
    }
    l.apply(r);
}

impl Lowered {
    /// Moves a linear layer out of the operators; nothing may refer to it afterwards.
    pub(super) fn take_linear(&mut self, index: usize) -> Linear {
        match self.take(index) {
            Fused::Linear(l) => *l,
            other => unreachable!("operator {index} is {}", other.class()),
        }
    }
}

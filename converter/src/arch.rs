//! Recognises what a graph is, from its structure alone: names differ between exporters. What does not fit is
//! `unknown`, never guessed.

use serde::Serialize;
use std::collections::BTreeSet;
use vedge_runtime::onnx::{DType, Graph, NodeProto, Uses, elements, shape_of};

/// Family of architectures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// One patch convolution, then attention over all patches with at most a class token (or registers).
    Vit,
    /// As ViT, with a class and a distillation token.
    Deit,
    /// One patch convolution, attention inside of windows, several widths.
    Swin,
    /// Depthwise convolutions with attention over unfolded patches in between.
    MobileVit,
    /// Convolutions and attention, in another arrangement.
    Hybrid,
    /// None of these.
    Unknown,
}

impl Family {
    /// Its name in the card.
    pub fn name(self) -> &'static str {
        match self {
            Family::Vit => "vit",
            Family::Deit => "deit",
            Family::Swin => "swin",
            Family::MobileVit => "mobilevit",
            Family::Hybrid => "hybrid",
            Family::Unknown => "unknown",
        }
    }
}

/// What a graph is made of. Lists hold the distinct values in graph order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Architecture {
    /// Family.
    pub family: Family,
    /// Number of attention blocks.
    pub blocks: usize,
    /// Heads of the attention blocks.
    pub heads: Vec<usize>,
    /// Embedding widths (heads times head width).
    pub width: Vec<usize>,
    /// Tokens that attend to each other.
    pub tokens: Vec<usize>,
    /// Hidden widths of the MLPs.
    pub mlp: Vec<usize>,
    /// Convolutions, the patch embedding included.
    pub convolutions: usize,
    /// Elements of all float and integer weights and other float constants, quantization scales excepted.
    pub parameters: usize,
    /// Multiply-accumulates for one picture; `None` where a shape is not known.
    pub macs: Option<u64>,
}

/// One attention block: softmax, then the product with V.
struct Attention {
    windows: usize,
    heads: usize,
    head_width: usize,
    tokens: usize,
}

/// A linear layer with a constant weight.
struct Linear {
    inputs: usize,
    outputs: usize,
}

/// Recognises a graph. Shapes of inner values must be stated for all of it to be found.
pub fn recognise(g: &Graph) -> Architecture {
    let uses = Uses::of(g);
    let of_op = |op: &'static str| g.nodes.iter().filter(move |n| n.op_type() == op && n.domain().is_empty());
    let attention: Vec<Attention> = of_op("Softmax").filter_map(|n| attention(g, &uses, n)).collect();
    let convolutions: Vec<&NodeProto> = of_op("Conv").collect();
    let linear: Vec<Linear> = g.nodes.iter().filter_map(|n| linear(g, &uses, n)).collect();
    let mlp = linear.windows(2).filter(|w| {
        let (up, down) = (&w[0], &w[1]);
        (up.inputs, up.outputs) == (down.outputs, down.inputs) && up.inputs != up.outputs
    });
    Architecture {
        family: family(g, &attention, &convolutions),
        blocks: attention.len(),
        heads: distinct(attention.iter().map(|a| a.heads)),
        width: distinct(attention.iter().map(|a| a.heads * a.head_width)),
        tokens: distinct(attention.iter().map(|a| a.tokens)),
        mlp: distinct(mlp.map(|w| w[0].outputs)),
        convolutions: convolutions.len(),
        parameters: parameters(g),
        macs: g.nodes.iter().map(|n| macs(g, n)).sum(),
    }
}

fn family(g: &Graph, attention: &[Attention], convolutions: &[&NodeProto]) -> Family {
    let picture = matches!(g.inputs.as_slice(), [i] if g.shape(i.name()).is_some_and(|s| s.len() == 4));
    let (Some(first), true) = (attention.first(), picture) else { return Family::Unknown };
    let depthwise = convolutions.iter().any(|n| n.int("group", 1) > 1);
    let windowed = attention.iter().any(|a| a.windows > 1);
    match convolutions {
        [patch] if is_patch_embedding(patch) => {
            let alike = attention
                .iter()
                .all(|a| (a.tokens, a.heads * a.head_width) == (first.tokens, first.heads * first.head_width));
            let patches = patch.output.first().and_then(|o| g.shape(o)).map(|s| elements(&s[2..]));
            match patches.and_then(|p| first.tokens.checked_sub(p)) {
                Some(2) if alike && !windowed => Family::Deit,
                Some(_) if alike && !windowed => Family::Vit,
                _ if windowed => Family::Swin,
                _ => Family::Unknown,
            }
        }
        [] => Family::Unknown,
        _ if depthwise && windowed => Family::MobileVit,
        _ => Family::Hybrid,
    }
}

fn is_patch_embedding(n: &NodeProto) -> bool {
    n.ints("kernel_shape").is_some() && n.ints("kernel_shape") == n.ints("strides")
}

fn attention(g: &Graph, uses: &Uses, softmax: &NodeProto) -> Option<Attention> {
    let scores = g.shape(softmax.output.first()?)?;
    // A cast, a dropout or a guard against rows of minus infinity may stand between softmax and product.
    let mut value = softmax.output.first()?.clone();
    for _ in 0..4 {
        let consumers: Vec<&NodeProto> = uses.consumers(&value).iter().map(|&i| &g.nodes[i]).collect();
        if let Some(product) = consumers.iter().find(|n| n.op_type() == "MatMul" && n.input_name(0) == value) {
            let context = g.shape(product.output.first()?)?;
            let (head_width, tokens) = (*context.last()?, *scores.last()?);
            let (windows, heads) = match scores.as_slice() {
                [w, h, _, _] => (*w, *h),
                [h, _, _] => (1, *h),
                [w @ .., h, _, _] => (elements(w), *h),
                _ => return None,
            };
            return Some(Attention { windows, heads, head_width, tokens });
        }
        let through = |n: &&&NodeProto| matches!(n.op_type(), "Cast" | "Identity" | "Dropout" | "Where");
        value = consumers.iter().find(through)?.output.first()?.clone();
    }
    None
}

/// Shape of a constant, also one that passes through DequantizeLinear or Cast.
pub fn constant_shape(g: &Graph, uses: &Uses, value: &str) -> Option<Vec<usize>> {
    if let Some(t) = g.initializers.get(value) {
        return Some(shape_of(t));
    }
    let n = &g.nodes[uses.producer(value)?];
    match n.op_type() {
        "DequantizeLinear" | "Cast" => constant_shape(g, uses, n.input_name(0)),
        _ => None,
    }
}

fn linear(g: &Graph, uses: &Uses, n: &NodeProto) -> Option<Linear> {
    if !matches!(n.op_type(), "MatMul" | "Gemm") {
        return None;
    }
    match constant_shape(g, uses, n.input_name(1))?.as_slice() {
        [o, i] if n.int("transB", 0) == 1 => Some(Linear { inputs: *i, outputs: *o }),
        [i, o] => Some(Linear { inputs: *i, outputs: *o }),
        _ => None,
    }
}

fn parameters(g: &Graph) -> usize {
    let quantization = |n: &&NodeProto| matches!(n.op_type(), "QuantizeLinear" | "DequantizeLinear");
    let scales: BTreeSet<&str> =
        g.nodes.iter().filter(quantization).flat_map(|n| n.input.iter().skip(1)).map(String::as_str).collect();
    let counted = |t: DType| matches!(t, DType::Float | DType::Float16 | DType::Double | DType::Int8 | DType::Bfloat16);
    g.initializers
        .iter()
        .filter(|(name, t)| counted(t.dtype()) && !scales.contains(name.as_str()))
        .map(|(_, t)| elements(&shape_of(t)))
        .sum()
}

/// Multiply-accumulates of a node, 0 for one without products.
pub fn macs(g: &Graph, n: &NodeProto) -> Option<u64> {
    let depth = match n.op_type() {
        "Conv" => elements(g.shape(n.input_name(1))?.get(1..)?),
        "MatMul" => *g.shape(n.input_name(0))?.last()?,
        "Gemm" => *g.shape(n.input_name(0))?.get(1 - n.int("transA", 0).clamp(0, 1) as usize)?,
        _ => return Some(0),
    };
    Some(elements(&g.shape(n.output.first()?)?) as u64 * depth as u64)
}

fn distinct(values: impl Iterator<Item = usize>) -> Vec<usize> {
    let mut seen = vec![];
    for v in values {
        if !seen.contains(&v) {
            seen.push(v);
        }
    }
    seen
}

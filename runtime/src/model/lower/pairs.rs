//! Pairs of QuantizeLinear and DequantizeLinear with the same constant scale and zero point: rounding to a grid. Files that
//! quantize every operator round again after each reshape, and far from the layer that could take the pair.

use super::constant::Parameters;
use super::{Lowered, Rewrites};
use crate::kernels::requantize::Grid;
use crate::model::qdq::MOVES;
use crate::onnx::{Graph, NodeProto, Uses, value_info};

/// A pair as found at its float output.
pub struct Pair {
    /// Index of QuantizeLinear.
    pub quantize: usize,
    /// Index of DequantizeLinear.
    pub dequantize: usize,
    /// Scale and zero point.
    pub parameters: Parameters,
    /// The values that it rounds to.
    pub grid: Grid,
}

impl Pair {
    /// The pair whose output is `value`.
    pub fn at(g: &Graph, uses: &Uses, value: &str) -> Option<Pair> {
        let dequantize = uses.producer(value).filter(|&i| g.nodes[i].op_type() == "DequantizeLinear")?;
        let quantize = uses.producer(g.nodes[dequantize].input_name(0))?;
        let q = &g.nodes[quantize];
        let of = |n| Parameters::of(g, n);
        let parameters =
            of(q).filter(|p| q.op_type() == "QuantizeLinear" && of(&g.nodes[dequantize]).as_ref() == Some(p))?;
        let (low, high) = parameters.range()?;
        let grid = Grid {
            scale: parameters.scale,
            low: (low - parameters.zero) as f32,
            high: (high - parameters.zero) as f32,
        };
        Some(Pair { quantize, dequantize, parameters, grid })
    }

    /// As [`Pair::at`], where nothing else reads what is between the two, nor the output but one operator.
    pub fn before_one(g: &Graph, uses: &Uses, value: &str) -> Option<Pair> {
        uses.only_consumer(value)?;
        Pair::at(g, uses, value).filter(|p| uses.only_consumer(&g.nodes[p.quantize].output[0]).is_some())
    }

    /// The pair that alone reads `value`.
    pub fn after(g: &Graph, uses: &Uses, value: &str) -> Option<Pair> {
        let q = uses.only_consumer(value).filter(|&i| g.nodes[i].op_type() == "QuantizeLinear")?;
        let q = &g.nodes[q].output[0];
        let dq = uses.only_consumer(q)?;
        Pair::at(g, uses, g.nodes[dq].output.first()?)
    }

    /// The value that it rounds.
    pub fn input<'a>(&self, g: &'a Graph) -> &'a str {
        g.nodes[self.quantize].input_name(0)
    }
}

/// Drops what rounds again to the grid that a value is on, then brings the rest next to the layers that read them.
pub fn run(l: &mut Lowered) {
    drop_repeated(&mut l.graph);
    sink(l);
}

/// Whether an operator only moves elements of its first input.
pub fn is_move(n: &NodeProto) -> bool {
    n.domain().is_empty() && MOVES.contains(&n.op_type())
}

/// The pair that a value comes from, perhaps moved since.
pub fn origin(g: &Graph, uses: &Uses, value: &str) -> Option<Pair> {
    let mut value = value;
    loop {
        match &g.nodes[uses.producer(value)?] {
            n if is_move(n) => value = n.input_name(0),
            _ => return Pair::at(g, uses, value),
        }
    }
}

fn drop_repeated(g: &mut Graph) {
    let uses = Uses::of(g);
    let mut dropped = false;
    for i in 0..g.nodes.len() {
        let Some(output) = g.nodes[i].output.first().cloned() else { continue };
        let Some(pair) = Pair::at(g, &uses, &output).filter(|_| !uses.is_output(&output)) else { continue };
        let input = pair.input(g).to_string();
        if origin(g, &uses, &input).is_some_and(|o| o.parameters == pair.parameters) {
            g.replace_uses(&output, &input);
            dropped = true;
        }
    }
    if dropped {
        g.prune_unused();
    }
}

/// Moves pairs behind the reshapes and transpositions between them and a layer or an addition.
fn sink(l: &mut Lowered) {
    let uses = l.uses();
    let mut r = Rewrites::default();
    for i in 0..l.graph.nodes.len() {
        if l.graph.nodes[i].op_type() != "DequantizeLinear" {
            continue;
        }
        let output = l.graph.nodes[i].output[0].clone();
        let Some(pair) = Pair::before_one(&l.graph, &uses, &output) else { continue };
        let Some(moves) = moves_to_reader(&l.graph, &uses, &output) else { continue };
        let taken = [&[pair.quantize, pair.dequantize], moves.as_slice()].concat();
        let new = sunk(l, &moves, &pair);
        r.replace_by(&taken, new);
    }
    l.apply(r);
}

/// The moves from a value to the layer or addition that reads it, where nothing else uses what is between.
fn moves_to_reader<'a>(g: &'a Graph, uses: &Uses, mut value: &'a str) -> Option<Vec<usize>> {
    let mut moves = vec![];
    loop {
        let next = uses.only_consumer(value)?;
        let n = &g.nodes[next];
        let keeps_all = matches!(n.op_type(), "Reshape" | "Transpose" | "Squeeze" | "Unsqueeze" | "Flatten");
        if is_move(n) && keeps_all && n.input[1..].iter().all(|i| g.initializers.contains_key(i)) {
            moves.push(next);
            value = &n.output[0];
        } else {
            let reads = matches!(n.op_type(), "MatMul" | "Gemm" | "Conv" | "Add");
            return (reads && !moves.is_empty()).then_some(moves);
        }
    }
}

/// The moves of what was not rounded yet, then the pair.
fn sunk(l: &mut Lowered, moves: &[usize], pair: &Pair) -> Vec<NodeProto> {
    let mut nodes: Vec<NodeProto> = moves.iter().map(|&i| l.graph.nodes[i].clone()).collect();
    let [mut q, mut dq] = [pair.quantize, pair.dequantize].map(|i| l.graph.nodes[i].clone());
    let to = nodes[nodes.len() - 1].output[0].clone();
    let shape = l.graph.shape(&to).expect("shapes are known");
    // Values on the way keep their names and shapes, but are not rounded yet.
    let unrounded = l.value(&format!("{to}.unrounded"), &shape);
    let quantized = l.graph.fresh(&format!("{to}.quantized"));
    let info = value_info(&quantized, pair.parameters.dtype, &shape);
    l.graph.value_info.insert(quantized.clone(), info);
    nodes[0].input[0] = pair.input(&l.graph).into();
    nodes[moves.len() - 1].output[0].clone_from(&unrounded);
    q.input[0] = unrounded;
    q.output[0].clone_from(&quantized);
    dq.input[0] = quantized;
    dq.output[0] = to;
    nodes.extend([q, dq]);
    nodes
}

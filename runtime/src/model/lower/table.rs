//! Element-wise functions of 8-bit values, as files spell them that quantize every operator: chains (a GELU of five
//! operators) with rounding in between. All that such a chain can give is 256 values.

use super::constant::Parameters;
use super::linear::is_residual;
use super::pairs::{is_move, origin};
use super::{Fused, Lowered, Rewrites, fused_index};
use crate::kernels::conv::Filter;
use crate::kernels::depthwise::Taps;
use crate::kernels::linear::{InputQuant, Linear, Step, Weights};
use crate::kernels::requantize::{ByteTable, Requantize, Table};
use crate::kernels::{Kernels, erf};
use crate::onnx::{Graph, NodeProto, Uses};
use std::collections::{HashMap, HashSet};

pub fn run(l: &mut Lowered) {
    let uses = l.uses();
    let mut r = Rewrites::default();
    for i in 0..l.graph.nodes.len() {
        for x in l.graph.nodes[i].output.clone() {
            let Some(found) = find(&l.graph, &uses, &r, &x) else { continue };
            let new = l.node(Fused::Table(found.table), &[&x], &found.output);
            r.replace(&found.nodes, new);
        }
    }
    l.apply(r);
}

struct Found {
    nodes: Vec<usize>,
    table: Table,
    output: String,
}

/// What is computed of `x` alone, element by element, up to a value that everything else reads.
fn find(g: &Graph, uses: &Uses, r: &Rewrites, x: &str) -> Option<Found> {
    if uses.consumers(x).iter().any(|&i| is_move(&g.nodes[i])) {
        return None;
    }
    let pair = origin(g, uses, x)?;
    let zero = pair.parameters.byte()?;
    let scale = pair.parameters.scale;
    let start: Vec<f32> = (0..256).map(|place| (place - i32::from(zero)) as f32 * scale).collect();
    // Values that depend on x alone, and the nodes that compute them.
    let mut known = HashMap::from([(x, start)]);
    let mut nodes = vec![];
    let mut waiting: Vec<usize> = uses.consumers(x).to_vec();
    while let Some(i) = pop_first(&mut waiting) {
        let n = &g.nodes[i];
        if !r.is_free(i) || nodes.contains(&i) || n.output.len() != 1 {
            continue;
        }
        if let Some(values) = evaluate(g, n, &known) {
            known.insert(&n.output[0], values);
            nodes.push(i);
            waiting.extend(uses.consumers(&n.output[0]));
        }
    }
    // The last float value that hides all before it; a pair at its end is left to who reads it.
    let ends = nodes.iter().rev().filter(|&&i| !matches!(g.nodes[i].op_type(), "QuantizeLinear" | "DequantizeLinear"));
    ends.copied().find_map(|end| {
        let output = &g.nodes[end].output[0];
        let inside = ancestors(g, uses, end, &nodes);
        let hidden = |&i: &usize| {
            let o = &g.nodes[i].output[0];
            i == end || (!uses.is_output(o) && uses.consumers(o).iter().all(|c| inside.contains(c)))
        };
        let values: &[f32; 256] = known[output.as_str()].as_slice().try_into().ok()?;
        let pays = inside.len() > 1 && values.iter().all(|v| v.is_finite());
        (pays && inside.iter().all(hidden)).then(|| Found {
            nodes: inside.into_iter().collect(),
            table: Table { scale, zero, values: Box::new(*values) },
            output: output.clone(),
        })
    })
}

fn pop_first(waiting: &mut Vec<usize>) -> Option<usize> {
    let at = waiting.iter().enumerate().min_by_key(|(_, node)| **node)?.0;
    Some(waiting.swap_remove(at))
}

/// Moves tables into the layers that alone read them, where those quantize with a static scale, and what is left of tables,
/// rounding and sums into the layer before: whole tensors are not read and written for them.
pub fn absorb(l: &mut Lowered, kernels: &Kernels) {
    absorb_into_readers(l, kernels);
    absorb_into_producers(l);
    l.graph.prune_unused();
}

fn absorb_into_readers(l: &mut Lowered, kernels: &Kernels) {
    let uses = l.uses();
    for i in 0..l.graph.nodes.len() {
        let n = &l.graph.nodes[i];
        let Some(Fused::Table(table)) = l.fused_of(n) else { continue };
        let (table, mut input, output) = (table.clone(), n.input[0].clone(), n.output[0].clone());
        let Some(reader) = uses.only_consumer(&output) else { continue };
        let Some(index) = fused_index(&l.graph.nodes[reader]) else { continue };
        let beside = &l.graph.nodes[reader].input[1..];
        if beside.contains(&output) || !l.fused[index].take_table(kernels, &table) {
            continue;
        }
        // A table rounds by itself.
        let before = uses.producer(&input).filter(|_| uses.only_consumer(&input) == Some(i));
        if let Some(before) = before.map(|p| &l.graph.nodes[p])
            && matches!(l.fused_of(before), Some(Fused::Requantize(Requantize::Static(grid))) if *grid == table.grid())
        {
            input.clone_from(&before.input[0]);
        }
        l.graph.nodes[reader].input[0] = input;
    }
    l.graph.prune_unused();
}

fn absorb_into_producers(l: &mut Lowered) {
    let uses = l.uses();
    let mut made_by: HashMap<String, usize> = HashMap::new();
    for i in 0..l.graph.nodes.len() {
        let n = l.graph.nodes[i].clone();
        let layers = n.input.iter().filter(|x| uses.only_consumer(x) == Some(i)).filter_map(|x| made_by.get(x));
        if let Some(layer) = layers.copied().find(|&layer| l.append(layer, &n)) {
            // The layer's place is now that of what it took.
            l.graph.nodes.swap(layer, i);
            l.graph.nodes[layer].output.clear();
        }
        made_by.extend(l.graph.nodes[i].output.iter().map(|o| (o.clone(), i)));
    }
}

impl Lowered {
    /// Lets the layer at node `layer` do what node `n` does with its output; says whether it does.
    fn append(&mut self, layer: usize, n: &NodeProto) -> bool {
        let node = &self.graph.nodes[layer];
        let (value, has_residual) = (node.output[0].clone(), node.input.len() > 1);
        let mut residual = None;
        let step = match self.fused_of(n) {
            Some(Fused::Table(table)) => Step::Table(table.clone()),
            Some(Fused::Requantize(Requantize::Static(grid))) => Step::Round(*grid),
            None if n.op_type() == "Add" && n.domain().is_empty() && !has_residual => {
                residual = n.input.iter().find(|x| **x != value && is_residual(&self.graph, x, &n.output[0]));
                Step::Residual
            }
            _ => return false,
        };
        if matches!(step, Step::Residual) && residual.is_none() {
            return false;
        }
        let linear = match fused_index(node).map(|index| &mut self.fused[index]) {
            Some(Fused::Linear(linear)) => linear,
            Some(Fused::Conv(conv)) if residual.is_none() => match &mut conv.filter {
                Filter::Dense(linear) | Filter::Patches(linear) => linear,
                Filter::Depthwise(_) => return false,
            },
            _ => return false,
        };
        // A residual alone is added without a step.
        if has_residual && linear.then.is_empty() {
            linear.then.push(Step::Residual);
        }
        if residual.is_none() || !linear.then.is_empty() {
            linear.then.push(step);
        }
        let node = &mut self.graph.nodes[layer];
        node.input.extend(residual.cloned());
        node.output.clone_from(&n.output);
        self.notes.remove(&n.output[0]);
        if let Some(note) = self.notes.remove(&value) {
            self.notes.insert(n.output[0].clone(), note);
        }
        true
    }
}

impl Fused {
    /// Takes a function of its first input, if it quantizes that with a static scale; says whether it did.
    fn take_table(&mut self, kernels: &Kernels, table: &Table) -> bool {
        match self {
            Fused::Linear(linear) => linear.take_table(kernels, table),
            Fused::Conv(conv) => match &mut conv.filter {
                Filter::Dense(linear) | Filter::Patches(linear) => linear.take_table(kernels, table),
                Filter::Depthwise(d) => match d.taps {
                    Taps::I8 { quant: InputQuant::Static { scale, zero }, .. } if d.table.is_none() => {
                        d.table = Some(ByteTable::of(table, kernels, (scale, zero), 0));
                        true
                    }
                    _ => false,
                },
            },
            _ => false,
        }
    }
}

impl Linear {
    /// Takes a function of its input, if it quantizes that with a static scale; says whether it did.
    pub(super) fn take_table(&mut self, kernels: &Kernels, table: &Table) -> bool {
        match (&self.weights, &self.norm, &self.factors, &self.table) {
            (&Weights::I8(_, InputQuant::Static { scale, zero }), None, None, None) => {
                self.table = Some(ByteTable::of(table, kernels, (scale, zero), kernels.flip));
                true
            }
            _ => false,
        }
    }
}

/// `end` and those of `nodes` that it depends on.
fn ancestors(g: &Graph, uses: &Uses, end: usize, nodes: &[usize]) -> HashSet<usize> {
    let mut found = HashSet::new();
    let mut waiting = vec![end];
    while let Some(i) = waiting.pop() {
        if nodes.contains(&i) && found.insert(i) {
            waiting.extend(g.nodes[i].input.iter().filter_map(|v| uses.producer(v)));
        }
    }
    found
}

/// An operator's results for all 256 values of its inputs; nothing where it is not element-wise in what is known.
fn evaluate(g: &Graph, n: &NodeProto, known: &HashMap<&str, Vec<f32>>) -> Option<Vec<f32>> {
    if !n.domain().is_empty() {
        return None;
    }
    let input = |slot: usize| match known.get(n.input_name(slot)) {
        Some(values) => Some(values.clone()),
        None => g.const_scalar(n.input_name(slot)).map(|v| vec![v; 256]),
    };
    // Between QuantizeLinear and DequantizeLinear values are integers.
    let (x, scalar) = (input(0)?, |slot: usize| g.const_scalar(n.input_name(slot)));
    let one = |f: &dyn Fn(f32) -> f32| Some(x.iter().map(|&v| f(v)).collect());
    let two = |f: &dyn Fn(f32, f32) -> f32| Some(x.iter().zip(input(1)?).map(|(&a, b)| f(a, b)).collect());
    match n.op_type() {
        "QuantizeLinear" => {
            let p = Parameters::of(g, n)?;
            let (low, high) = p.range()?;
            one(&|v| ((v / p.scale).round_ties_even() + p.zero as f32).clamp(low as f32, high as f32))
        }
        "DequantizeLinear" => {
            let p = Parameters::of(g, n)?;
            one(&|v| (v - p.zero as f32) * p.scale)
        }
        "Add" => two(&|a, b| a + b),
        "Sub" => two(&|a, b| a - b),
        "Mul" => two(&|a, b| a * b),
        "Div" => two(&|a, b| a / b),
        "Pow" => two(&f32::powf),
        "Erf" => one(&erf),
        "Tanh" => one(&f32::tanh),
        "Sigmoid" => one(&|v| 1. / (1. + (-v).exp())),
        "Exp" => one(&f32::exp),
        "Sqrt" => one(&f32::sqrt),
        "Neg" => one(&|v| -v),
        "Relu" => one(&|v| v.max(0.)),
        "HardSigmoid" => {
            let (alpha, beta) = (n.float("alpha", 0.2), n.float("beta", 0.5));
            one(&|v| (alpha * v + beta).clamp(0., 1.))
        }
        "HardSwish" => one(&|v| v * (v / 6. + 0.5).clamp(0., 1.)),
        "Clip" => {
            let bound = |slot: usize, none: f32| if n.input_name(slot).is_empty() { Some(none) } else { scalar(slot) };
            let (low, high) = (bound(1, f32::MIN)?, bound(2, f32::MAX)?);
            one(&|v| v.max(low).min(high))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Builder, agrees_with_tract};
    use crate::onnx::attr;

    /// A convolution of quantized values and weights, rounded; then x·σ(x) in quantized steps, if wanted.
    fn conv(b: &mut Builder, x: &str, [c, oc, size]: [usize; 3], depthwise: bool, silu: bool) -> String {
        let (shape, kernel) = ([1, oc, size, size], if depthwise { 3 } else { 1 });
        let w = b.quantized(&[oc, if depthwise { 1 } else { c }, kernel, kernel]);
        let group = attr::int("group", if depthwise { c as i64 } else { 1 });
        let pads = attr::ints("pads", &[kernel as i64 / 2; 4]);
        let y = b.node("Conv", &[x, &w], vec![group, pads], &shape);
        let y = b.round(&y, &shape);
        if !silu {
            return y;
        }
        let s = b.node("Sigmoid", &[&y], vec![], &shape);
        let s = b.round(&s, &shape);
        let y = b.node("Mul", &[&y, &s], vec![], &shape);
        b.round(&y, &shape)
    }

    #[test]
    fn tables_rounding_and_sums_enter_a_bottleneck() {
        let (c, wide, size) = (8, 24, 6);
        let mut b = Builder::new(&[1, c, size, size]);
        let x = b.round("x", &[1, c, size, size]);
        let x = conv(&mut b, &x, [c, c, size], false, false);
        let y = conv(&mut b, &x, [c, wide, size], false, true);
        let y = conv(&mut b, &y, [wide, wide, size], true, true);
        let y = conv(&mut b, &y, [wide, c, size], false, false);
        let y = b.node("Add", &[&y, &x], vec![], &[1, c, size, size]);
        let y = b.round(&y, &[1, c, size, size]);
        let classes = agrees_with_tract(&b.finish(&[&y]));
        // The sum and the expansion both read what the first layer makes, one of them rounded.
        assert_eq!(classes, ["linear", "requantize", "bottleneck"]);
    }

    #[test]
    fn a_table_that_others_read_stays() {
        let (c, size) = (8, 6);
        let mut b = Builder::new(&[1, c, size, size]);
        let x = b.round("x", &[1, c, size, size]);
        let y = conv(&mut b, &x, [c, c, size], true, true);
        let z = conv(&mut b, &y, [c, c, size], true, false);
        let y = b.node("Add", &[&y, &z], vec![], &[1, c, size, size]);
        let classes = agrees_with_tract(&b.finish(&[&y]));
        assert!(classes.contains(&"table".to_string()), "{classes:?}");
    }
}

//! Tables, rounding and sums between layers become part of the layer after or before them: whole tensors are not read and
//! written for them.

use super::linear::is_residual;
use super::{Fused, Lowered, fused_index};
use crate::kernels::Kernels;
use crate::kernels::conv::Filter;
use crate::kernels::depthwise::Taps;
use crate::kernels::linear::{InputQuant, Linear, Step, Weights};
use crate::kernels::requantize::{ByteTable, Requantize, Table};
use crate::onnx::NodeProto;
use std::collections::HashMap;

pub fn run(l: &mut Lowered, kernels: &Kernels) {
    into_readers(l, kernels);
    into_producers(l);
    l.graph.prune_unused();
}

/// Moves tables into the layer that alone reads them, where it quantizes with a static scale.
fn into_readers(l: &mut Lowered, kernels: &Kernels) {
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

/// Moves tables, rounding and sums into the layer before.
fn into_producers(l: &mut Lowered) {
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
                residual = n.input.iter().find(|x| **x != value && is_residual(&self.graph, x, &value));
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
    fn a_sum_that_repeats_a_row_is_no_residual() {
        let mut b = Builder::new(&[1, 8]);
        let w = b.quantized(&[8, 16]);
        let x = b.round("x", &[1, 8]);
        let y = b.node("MatMul", &[&x, &w], vec![], &[1, 16]);
        let y = b.round(&y, &[1, 16]);
        let w = b.quantized(&[8, 48]);
        let z = b.node("MatMul", &[&x, &w], vec![], &[1, 48]);
        let z = b.round(&z, &[1, 48]);
        let z = b.reshape(&z, &[3, 16]);
        let y = b.node("Add", &[&y, &z], vec![], &[3, 16]);
        let classes = agrees_with_tract(&b.finish(&[&y]));
        assert!(classes.contains(&"Add".to_string()), "{classes:?}");
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

//! Rows that nothing reads are not computed: of the last block of a vision transformer, many classifiers read the class
//! token alone. What is read moves upwards through all that treats each row by itself, up to the queries of an attention.

use super::{Fused, Lowered, Rewrites, fused_index};
use crate::kernels::attention::Attention;
use crate::kernels::copy::Copy;
use crate::kernels::requantize::Requantize;
use crate::onnx::{NodeProto, Uses, elements};
use std::ops::Range;

pub fn run(l: &mut Lowered) {
    let mut uses = l.uses();
    // From the end, so that a node is looked at when those after it read no more than they must.
    let mut end = l.graph.nodes.len();
    while end > 0 {
        end -= 1;
        if let Some(rows) = rows_read(l, &uses, end).filter(|rows| computes_rows_alone(l, end, rows)) {
            // Copies of rows come before the node, and are looked at where they are made.
            narrow(l, &uses, end, &rows);
            uses = l.uses();
        }
    }
}

/// The rows of a node's output that are read, where only copies read it and not all of it.
fn rows_read(l: &Lowered, uses: &Uses, node: usize) -> Option<Range<usize>> {
    let output = l.graph.nodes[node].output.first().filter(|o| !uses.is_output(o))?;
    let shape = l.graph.shape(output)?;
    let width = *shape.last().filter(|&&w| w > 0)?;
    let read = |&user: &usize| match l.fused_of(&l.graph.nodes[user]) {
        Some(Fused::Copy(copy)) => Some(copy.offset / width..copy.end().div_ceil(width)),
        _ => None,
    };
    let all: Vec<Range<usize>> = uses.consumers(output).iter().map(read).collect::<Option<_>>()?;
    let read = all.into_iter().reduce(|a, b| a.start.min(b.start)..a.end.max(b.end))?;
    (read.len() < elements(&shape) / width).then_some(read)
}

/// Whether a node makes each row of its output of the same rows of its inputs, or can leave out those beside the range.
fn computes_rows_alone(l: &Lowered, node: usize, rows: &Range<usize>) -> bool {
    let n = &l.graph.nodes[node];
    let count = |value: &str| l.graph.shape(value).map(|s| elements(&s) / s.last().copied().unwrap_or(1).max(1));
    match l.fused_of(n) {
        Some(Fused::Linear(layer)) => {
            !layer.reads_whole() && layer.order.is_empty() && n.input.iter().all(|i| count(i) == count(&n.output[0]))
        }
        Some(
            Fused::LayerNorm(_) | Fused::Activation(_) | Fused::Table(_) | Fused::Requantize(Requantize::Static(_)),
        ) => count(&n.input[0]) == count(&n.output[0]),
        Some(Fused::Attention(a)) => a.batch == 1 && rows.end <= a.queries && writes_rows(a),
        _ => false,
    }
}

/// Whether each query of an attention makes a row of its output.
fn writes_rows(a: &Attention) -> bool {
    let [_, head, query, dim] = a.out;
    query == a.heads * a.dim_v && (a.heads - 1) * head + (a.dim_v - 1) * dim < query
}

/// Makes a node compute these rows alone, of copies of its inputs' rows.
fn narrow(l: &mut Lowered, uses: &Uses, node: usize, rows: &Range<usize>) {
    let n = l.graph.nodes[node].clone();
    let (output, index) = (n.output[0].clone(), fused_index(&n).expect("an operator of ours"));
    let users = uses.consumers(&output).to_vec();
    let shape = l.graph.shape(&output).expect("known");
    let width = shape[shape.len() - 1];
    // As the only reader wants it, so that nothing has to reshape it.
    let wanted = users.first().and_then(|&u| l.graph.shape(&l.graph.nodes[u].output[0]));
    let wanted = wanted.filter(|s| s.last() == Some(&width) && elements(s) == rows.len() * width);
    let name = l.value(&format!("{output}.read"), &wanted.unwrap_or_else(|| of_rows(&shape, rows.len())));
    let (mut new, mut inputs) = (vec![], n.input.clone());
    if let Fused::Attention(a) = &mut l.fused[index] {
        a.keep_queries(rows.clone());
    } else {
        for input in &mut inputs {
            let shape = l.graph.shape(input).expect("known");
            let width = shape[shape.len() - 1];
            let part = l.value(&format!("{input}.read"), &of_rows(&shape, rows.len()));
            let copy = Copy::new(rows.start * width, [(rows.len() * width, 1)]);
            new.push(l.node(Fused::Copy(copy), &[input], &part));
            *input = part;
        }
    }
    new.push(NodeProto { input: inputs, output: vec![name.clone()], ..n });
    let mut r = Rewrites::default();
    r.replace_by(&[node], new);
    let mut same = vec![];
    for user in users {
        let Some(Fused::Copy(copy)) = l.fused_of(&l.graph.nodes[user]) else { unreachable!("only copies read it") };
        let copy = Copy { offset: copy.offset - rows.start * width, axes: copy.axes.clone() };
        let output = l.graph.nodes[user].output[0].clone();
        match l.moved(&name, copy, &output) {
            Some(n) => r.replace(&[user], n),
            None => same.push(output),
        }
    }
    for output in same {
        l.graph.replace_uses(&output, &name);
    }
    l.apply(r);
}

/// The shape of some rows of a value.
fn of_rows(shape: &[usize], rows: usize) -> Vec<usize> {
    let mut part = vec![1; shape.len()];
    if let [.., r, w] = part.as_mut_slice() {
        (*r, *w) = (rows, shape[shape.len() - 1]);
    }
    part
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Builder, agrees_with_tract};
    use super::*;
    use crate::kernels::detect;
    use crate::onnx::{Graph, attr};

    const SHAPE: [usize; 3] = [1, 6, 8];

    /// A block of a transformer and a LayerNorm of all tokens.
    fn block() -> (Builder, String) {
        let mut b = Builder::new(&SHAPE);
        let y = b.norm("x", &SHAPE);
        let qkv = b.layer(&y, &SHAPE, 24);
        let y = b.attention(&qkv, [1, 6, 2, 4]);
        let y = b.layer(&y, &SHAPE, 8);
        let x = b.node("Add", &["x", &y], vec![], &SHAPE);
        let y = b.norm(&x, &SHAPE);
        let y = b.layer(&y, &SHAPE, 32);
        let y = b.node("Relu", &[&y], vec![], &[1, 6, 32]);
        let y = b.layer(&y, &[1, 6, 32], 8);
        let x = b.node("Add", &[&x, &y], vec![], &SHAPE);
        let y = b.norm(&x, &SHAPE);
        (b, y)
    }

    /// Multiply-accumulates of linear layers and attention.
    fn macs(g: &Graph) -> usize {
        let l = super::super::lower(g.clone(), detect().unwrap(), false).unwrap();
        let of = |n: &NodeProto| Some(l.fused_of(n)?.macs(elements(&l.graph.shape(&n.output[0])?)));
        l.graph.nodes.iter().filter_map(of).sum()
    }

    /// Of the block when that many rows are read, with a head of 3 outputs for each that is.
    fn expected(rows: usize) -> usize {
        let (every_row, attention, every_read_row) = (8 * 24, 2 * 6 * 8, 8 * 8 + 2 * 8 * 32);
        6 * every_row + rows * (attention + every_read_row)
    }

    #[test]
    fn a_class_token_needs_its_own_row_alone() {
        for token in [0, 5] {
            let (mut b, y) = block();
            let y = b.pick(&y, 1, token, &[1, 8]);
            let y = b.layer(&y, &[1, 8], 3);
            let g = b.finish(&[&y]);
            assert_eq!(agrees_with_tract(&g), ["linear", "attention", "linear", "mlp", "linear"]);
            assert_eq!(macs(&g), expected(1) + 24);
        }
    }

    #[test]
    fn two_tokens_need_the_rows_between_them() {
        let (mut b, y) = block();
        let heads = [1, 3].map(|token| {
            let y = b.pick(&y, 1, token, &[1, 8]);
            b.layer(&y, &[1, 8], 3)
        });
        let y = b.node("Add", &[&heads[0], &heads[1]], vec![], &[1, 3]);
        let g = b.finish(&[&y]);
        agrees_with_tract(&g);
        assert_eq!(macs(&g), expected(3) + 2 * 24);
    }

    #[test]
    fn what_is_read_otherwise_too_stays_whole() {
        // The mean of all tokens, and an output of the graph.
        for is_output in [false, true] {
            let (mut b, y) = block();
            let first = b.pick(&y, 1, 0, &[1, 8]);
            let first = b.layer(&first, &[1, 8], 8);
            let other = if is_output {
                y.clone()
            } else {
                b.node("ReduceMean", &[&y], vec![attr::ints("axes", &[1]), attr::int("keepdims", 0)], &[1, 8])
            };
            let g = b.finish(&[&first, &other]);
            agrees_with_tract(&g);
            assert_eq!(macs(&g), expected(6) + 64);
        }
    }
}

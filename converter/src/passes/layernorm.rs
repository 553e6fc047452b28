//! LayerNorm written out (mean, variance, division, gain, bias) recognised and spelled as one operator.

use super::{Context, Pass, PassReport, remove_nodes, report};
use crate::shapes::{self, Facts};
use std::collections::HashSet;
use vedge_runtime::Result;
use vedge_runtime::onnx::{Graph, NodeProto, Uses, attr, f32_tensor};

pub struct LayerNorm;

impl Pass for LayerNorm {
    fn name(&self) -> &'static str {
        "layernorm"
    }

    fn run(&self, graph: &mut Graph, _cx: &Context) -> Result<PassReport> {
        let facts = shapes::infer(graph)?;
        let uses = Uses::of(graph);
        let mut dead = HashSet::new();
        let mut changes = 0;
        let found: Vec<(usize, Found)> = (0..graph.nodes.len())
            .filter_map(|i| recognise(&Search { graph, uses: &uses, facts: &facts }, i).map(|f| (i, f)))
            .collect();
        for (_, f) in found {
            let gain = f.gain.unwrap_or_else(|| {
                let name = graph.fresh(&format!("{}_gain", f.output));
                graph.initializers.insert(name.clone(), f32_tensor(&name, &[f.width], &vec![1.0; f.width]));
                name
            });
            let mut inputs = vec![f.input.as_str(), gain.as_str()];
            inputs.extend(f.bias.as_deref());
            let attributes = vec![attr::int("axis", -1), attr::float("epsilon", f.epsilon)];
            graph.nodes[f.at] = NodeProto::of("LayerNormalization", &inputs, &[&f.output], attributes);
            dead.extend(f.dead);
            changes += 1;
        }
        remove_nodes(graph, &dead);
        graph.prune_unused();
        Ok(report(self.name(), changes, format!("{changes} written-out LayerNorms recognised")))
    }
}

struct Found {
    input: String,
    output: String,
    epsilon: f32,
    width: usize,
    gain: Option<String>,
    bias: Option<String>,
    /// The last node, which becomes the LayerNormalization.
    at: usize,
    /// Nodes between the division and the last one.
    dead: Vec<usize>,
}

struct Search<'a> {
    graph: &'a Graph,
    uses: &'a Uses,
    facts: &'a Facts,
}

impl Search<'_> {
    fn node(&self, value: &str, op: &str) -> Option<&NodeProto> {
        self.uses.producer(value).map(|i| &self.graph.nodes[i]).filter(|n| n.op_type() == op)
    }

    /// The constant scalar beside a value, and the value, of a commutative node.
    fn with_scalar<'n>(&self, n: &'n NodeProto) -> Option<(&'n str, f32)> {
        let (a, b) = (n.input_name(0), n.input_name(1));
        self.graph.const_scalar(b).map(|s| (a, s)).or_else(|| self.graph.const_scalar(a).map(|s| (b, s)))
    }

    /// What a ReduceMean over the last axis, keeping it, averages.
    fn mean_of_last<'n>(&'n self, value: &str) -> Option<&'n str> {
        let n = self.node(value, "ReduceMean")?;
        let rank = self.facts.shape(n.input_name(0))?.len() as i64;
        let axes = n.ints("axes").map(<[i64]>::to_vec).or_else(|| self.graph.const_i64(n.input_name(1)))?;
        let last = axes == [-1] || axes == [rank - 1];
        (last && n.int("keepdims", 1) == 1).then(|| n.input_name(0))
    }

    /// A constant of the normalized width on the other side of a commutative node that alone uses `value`.
    fn then(&self, value: &str, op: &str, width: usize) -> Option<(usize, String)> {
        let i = self.uses.only_consumer(value)?;
        let n = &self.graph.nodes[i];
        let other = if n.input_name(0) == value { n.input_name(1) } else { n.input_name(0) };
        let fits = self.graph.initializers.contains_key(other) && self.facts.shape(other) == Some(&[width]);
        (n.op_type() == op && fits).then(|| (i, other.to_string()))
    }
}

/// Recognises the pattern from its division: `(x - mean(x)) / sqrt(mean((x - mean(x))²) + ε)`.
fn recognise(s: &Search, at: usize) -> Option<Found> {
    let div = &s.graph.nodes[at];
    if div.op_type() != "Div" {
        return None;
    }
    let centred = div.input_name(0);
    let sub = s.node(centred, "Sub")?;
    let input = sub.input_name(0);
    if s.mean_of_last(sub.input_name(1))? != input {
        return None;
    }
    let sqrt = s.node(div.input_name(1), "Sqrt")?;
    let (variance, epsilon) = s.with_scalar(s.node(sqrt.input_name(0), "Add")?)?;
    let squares = s.mean_of_last(variance)?;
    let squared = if let Some(pow) = s.node(squares, "Pow") {
        (s.graph.const_scalar(pow.input_name(1)) == Some(2.0)).then(|| pow.input_name(0))
    } else {
        s.node(squares, "Mul").filter(|m| m.input_name(0) == m.input_name(1)).map(|m| m.input_name(0))
    }?;
    // Exporters compute `x - mean` once or twice.
    let same = |v: &str| {
        v == centred
            || s.node(v, "Sub")
                .is_some_and(|n| n.input_name(0) == input && s.mean_of_last(n.input_name(1)) == Some(input))
    };
    if !same(squared) {
        return None;
    }
    let width = *s.facts.shape(input)?.last()?;
    let mut found = Found {
        input: input.into(),
        output: div.output[0].clone(),
        epsilon,
        width,
        gain: None,
        bias: None,
        at,
        dead: vec![],
    };
    if let Some((i, gain)) = s.then(&found.output, "Mul", width) {
        found.step_to(s, i);
        found.gain = Some(gain);
        if let Some((i, bias)) = s.then(&found.output, "Add", width) {
            found.step_to(s, i);
            found.bias = Some(bias);
        }
    }
    Some(found)
}

impl Found {
    fn step_to(&mut self, s: &Search, node: usize) {
        self.dead.push(self.at);
        self.at = node;
        self.output = s.graph.nodes[node].output[0].clone();
    }
}

//! Turns patterns of the portable graph into vedge's operators before tract sees it.
//!
//! Each pass finds one pattern and replaces its nodes by one node of the domain [`DOMAIN`], whose attribute `fused`
//! indexes [`Lowered::fused`]. What no pattern takes stays as it is and runs in tract.

mod absorb;
mod attention;
pub(crate) mod constant;
mod conv;
mod elementwise;
mod linear;
mod merge;
mod movement;
mod order;
mod pairs;
mod requantize;
mod table;
#[cfg(test)]
pub(super) mod testing;
mod unread;
mod view;

use super::ops::Fused;
use crate::error::Result;
use crate::kernels::{Activation, Kernels};
use crate::onnx::{DType, Graph, NodeProto, Uses, attr, value_info};
use std::collections::{HashMap, HashSet};

/// Domain of the nodes that stand for fused operators.
pub const DOMAIN: &str = "vedge";

/// A graph whose patterns are replaced.
pub struct Lowered {
    /// The graph.
    pub graph: Graph,
    /// The operators that its nodes of [`DOMAIN`] index.
    pub fused: Vec<Fused>,
    /// By node name: why it does not run in integers although it carries quantization.
    pub notes: HashMap<String, String>,
}

/// Lowers a graph for a kernel. `per_token` makes layers with int8 weights and float activations run in integers.
pub fn lower(graph: Graph, kernels: &Kernels, per_token: bool) -> Result<Lowered> {
    let mut l = Lowered { graph, fused: vec![], notes: HashMap::new() };
    pairs::run(&mut l);
    table::run(&mut l);
    elementwise::run(&mut l);
    merge::run(&mut l);
    attention::run(&mut l);
    linear::run(&mut l, kernels, per_token)?;
    conv::run(&mut l, kernels, per_token)?;
    requantize::run(&mut l);
    movement::run(&mut l);
    order::run(&mut l);
    unread::run(&mut l);
    absorb::run(&mut l, kernels);
    conv::join_bottlenecks(&mut l);
    linear::absorb_norms(&mut l);
    linear::join_pairs(&mut l, kernels);
    attention::choose_arithmetic(&mut l, kernels);
    attention::join_windows(&mut l);
    Ok(l)
}

/// Whether the graph tells the shape of every value, as those from `vedge convert` do: patterns need them.
pub fn shapes_known(graph: &Graph) -> bool {
    let mut values = graph.nodes.iter().flat_map(|n| &n.output).filter(|o| !o.is_empty());
    values.all(|o| graph.shape(o).is_some())
}

/// A graph as it is, for plain tract.
pub fn unchanged(graph: Graph) -> Lowered {
    Lowered { graph, fused: vec![], notes: HashMap::new() }
}

/// The operator a node stands for.
pub fn fused_index(n: &NodeProto) -> Option<usize> {
    (n.domain() == DOMAIN).then(|| n.int("fused", 0) as usize)
}

impl Lowered {
    fn fused_of(&self, n: &NodeProto) -> Option<&Fused> {
        fused_index(n).map(|i| &self.fused[i])
    }

    /// States the type and shape of a new float value; returns its name.
    fn value(&mut self, prefix: &str, shape: &[usize]) -> String {
        let name = self.graph.fresh(prefix);
        self.graph.value_info.insert(name.clone(), value_info(&name, DType::Float, shape));
        name
    }

    /// Adds an operator and makes the node that stands for it.
    fn node(&mut self, fused: Fused, inputs: &[&str], output: &str) -> NodeProto {
        self.fused.push(fused);
        let index = attr::int("fused", self.fused.len() as i64 - 1);
        NodeProto { domain: Some(DOMAIN.into()), ..NodeProto::of("Fused", inputs, &[output], vec![index]) }
    }

    /// Moves an operator out; nothing may refer to it afterwards.
    fn take(&mut self, index: usize) -> Fused {
        std::mem::replace(&mut self.fused[index], Fused::Activation(Activation::None))
    }

    fn uses(&self) -> Uses {
        Uses::of(&self.graph)
    }

    fn apply(&mut self, r: Rewrites) {
        let nodes = std::mem::take(&mut self.graph.nodes);
        let mut with = r.with;
        for (i, n) in nodes.into_iter().enumerate() {
            if let Some(new) = with.remove(&i) {
                self.graph.nodes.extend(new);
            } else if !r.taken.contains(&i) {
                self.graph.nodes.push(n);
            }
        }
        self.graph.prune_unused();
    }
}

/// Replacements of one pass: nodes that a pattern took, and what stands in their place.
#[derive(Default)]
struct Rewrites {
    taken: HashSet<usize>,
    with: HashMap<usize, Vec<NodeProto>>,
}

impl Rewrites {
    /// Replaces the nodes of a pattern by one at the place of the last; `nodes` must be free and are taken.
    fn replace(&mut self, nodes: &[usize], new: NodeProto) {
        self.replace_by(nodes, vec![new]);
    }

    /// As [`Rewrites::replace`], by several nodes.
    fn replace_by(&mut self, nodes: &[usize], new: Vec<NodeProto>) {
        let last = *nodes.iter().max().expect("a pattern has nodes");
        self.taken.extend(nodes);
        self.with.insert(last, new);
    }

    fn is_free(&self, node: usize) -> bool {
        !self.taken.contains(&node)
    }
}

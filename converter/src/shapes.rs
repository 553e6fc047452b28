//! Element types and shapes of every value of a graph, and the values of those that are constant.
//!
//! Each node is given to tract alone, as a graph of one node whose inputs have the facts found so far: an error or a
//! panic inside tract then has a name, nodes whose inputs are constant are evaluated, and weights are never copied
//! where only their shape matters.

mod node;

use node::{Given, infer_node};
use std::collections::{HashMap, HashSet};
use vedge_runtime::onnx::{AttributeProto, DType, Graph, NodeProto, TensorProto, elements, shape_of, value_info};
use vedge_runtime::{Error, Result};

/// What is known about the values of a graph.
#[derive(Default)]
pub struct Facts {
    /// Element type and fixed shape by value name: graph inputs, initializers and outputs of nodes.
    pub types: HashMap<String, (DType, Vec<usize>)>,
    /// Outputs of nodes that depend on constants only, by value name.
    pub constants: HashMap<String, TensorProto>,
}

impl Facts {
    /// Shape of a value.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.types.get(name).map(|t| t.1.as_slice())
    }
}

/// Constants up to this many elements are shown to shape inference as values (targets of reshapes, ends of slices).
const SMALL: usize = 4096;

/// Infers types and shapes of a graph whose inputs are fixed, and evaluates what is constant.
///
/// # Errors
/// [`Error::Unsupported`] for an input without a fixed shape, an operator that cannot run, or a shape that depends on
/// data; [`Error::BadModel`] for a node whose inputs do not fit. Both name the node.
pub fn infer(graph: &Graph) -> Result<Facts> {
    let mut facts = Facts::default();
    for i in &graph.inputs {
        let fixed = i.fixed().ok_or_else(|| Error::Unsupported {
            what: format!("input `{}` has no fixed shape", i.name()),
            hint: "give the resolution: --size N, or --size HEIGHTxWIDTH".into(),
        })?;
        facts.types.insert(i.name().into(), fixed);
    }
    for (name, t) in &graph.initializers {
        facts.types.insert(name.clone(), (t.dtype(), shape_of(t)));
    }
    for n in &graph.nodes {
        infer_one(graph, n, &mut facts)?;
    }
    Ok(facts)
}

/// Infers one more node, whose inputs are known, into `facts`.
///
/// # Errors
/// As [`infer`].
pub fn infer_one(graph: &Graph, node: &NodeProto, facts: &mut Facts) -> Result<()> {
    // tract wants a constant scale; the type and shape do not depend on it.
    if let ("DequantizeLinear", Some((_, shape))) = (node.op_type(), facts.types.get(node.input_name(0))) {
        facts.types.insert(node.output[0].clone(), (DType::Float, shape.clone()));
        return Ok(());
    }
    let mut names: Vec<&str> = node.input.iter().map(String::as_str).filter(|s| !s.is_empty()).collect();
    let mut seen: HashSet<&str> = names.iter().copied().collect();
    names.retain(|n| seen.remove(n));
    for outer in captured_names(node) {
        if facts.types.contains_key(outer) && !names.contains(&outer) {
            names.push(outer);
        }
    }
    let constant = |name: &str| facts.constants.get(name).or_else(|| graph.initializers.get(name));
    let all_constant = names.iter().all(|n| constant(n).is_some());
    let mut given = Vec::with_capacity(names.len());
    for name in names {
        let Some((dtype, shape)) = facts.types.get(name) else {
            return Err(Error::BadModel(format!(
                "{} needs `{name}`, which nothing produces before it",
                describe(node)
            )));
        };
        match constant(name) {
            Some(t) if all_constant || elements(shape) <= SMALL => given.push(Given::Value(name, t)),
            _ => given.push(Given::Fact(value_info(name, *dtype, shape))),
        }
    }
    let found = infer_node(&graph.header, node, given, all_constant && foldable(node))?;
    for (name, f) in node.output.iter().filter(|o| !o.is_empty()).zip(found) {
        facts.types.insert(name.clone(), (f.dtype, f.shape));
        if let Some(mut v) = f.value {
            v.name = Some(name.clone());
            facts.constants.insert(name.clone(), v);
        }
    }
    Ok(())
}

/// The nodes whose operators do not run at all, by index, and why.
pub fn unknown_operators(graph: &Graph) -> Vec<(usize, Error)> {
    let nodes = graph.nodes.iter().enumerate().filter(|(_, n)| !node::is_known(n));
    nodes.map(|(i, n)| (i, node::unsupported(&graph.header, n))).collect()
}

/// Writes what [`infer`] found into `value_info` and the graph's outputs, so that nobody downstream has to infer.
///
/// # Errors
/// As [`infer`].
pub fn annotate(graph: &mut Graph) -> Result<()> {
    let facts = infer(graph)?;
    graph.value_info.clear();
    for o in graph.nodes.iter().flat_map(|n| &n.output).filter(|o| !o.is_empty()) {
        if let Some((dtype, shape)) = facts.types.get(o) {
            graph.value_info.insert(o.clone(), value_info(o, *dtype, shape));
        }
    }
    for o in &mut graph.outputs {
        let name = o.name().to_string();
        let (dtype, shape) = facts
            .types
            .get(&name)
            .ok_or_else(|| Error::BadModel(format!("output `{name}` of the graph is produced by nothing")))?;
        *o = value_info(&name, *dtype, shape);
        graph.value_info.remove(&name);
    }
    Ok(())
}

/// A node in words: its name and operator.
pub fn describe(node: &NodeProto) -> String {
    let name = if node.name().is_empty() { node.output.first().map_or("", String::as_str) } else { node.name() };
    format!("node `{name}` ({})", node.op_type())
}

/// Whether a constant result may replace the node: not what carries quantization, and nothing random.
fn foldable(node: &NodeProto) -> bool {
    !matches!(node.op_type(), "QuantizeLinear" | "DequantizeLinear" | "Multinomial" | "Bernoulli")
        && !node.op_type().starts_with("Random")
}

/// Names used inside the subgraphs of a node (a superset of what they take from outside).
fn captured_names(node: &NodeProto) -> Vec<&str> {
    fn walk<'a>(a: &'a AttributeProto, into: &mut Vec<&'a str>) {
        for g in a.g.iter().chain(&a.graphs) {
            for n in &g.node {
                into.extend(n.input.iter().map(String::as_str));
                n.attribute.iter().for_each(|a| walk(a, into));
            }
            into.extend(g.output.iter().map(|o| o.name()));
        }
    }
    let mut names = vec![];
    node.attribute.iter().for_each(|a| walk(a, &mut names));
    names
}

//! What is done to a graph before it is quantized, one file a pass.

mod batchnorm;
mod fold;
pub(crate) mod freeze;
mod gemm;
mod layernorm;
mod opset;
pub mod patch;
pub mod positions;
pub(crate) mod resize;
mod softmax;
mod windows;

use crate::{check, shapes};
use std::collections::HashSet;
use vedge_runtime::Result;
use vedge_runtime::onnx::{AttributeProto, Graph};

/// What the passes are asked to make of a model.
#[derive(Clone, Debug, Default)]
pub struct Prepare {
    /// Height and width of the input in pixels; `None` keeps those of the file.
    pub size: Option<(usize, usize)>,
    /// Height and width of a patch in pixels; `None` keeps those of the file.
    pub patch: Option<(usize, usize)>,
}

/// What a pass may look at besides the graph.
#[derive(Clone, Debug)]
pub struct Context {
    /// What the user asked for.
    pub options: Prepare,
}

/// What a pass did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassReport {
    /// The pass.
    pub pass: &'static str,
    /// One line for a person.
    pub line: String,
    /// How many places it changed.
    pub changes: usize,
}

/// One rewriting of a graph. A pass leaves a graph that computes the same (unless its report says otherwise).
pub trait Pass {
    /// Short name, for reports.
    fn name(&self) -> &'static str;

    /// Rewrites the graph.
    ///
    /// # Errors
    /// What cannot be done is refused by name; the graph must not be used any more then.
    fn run(&self, graph: &mut Graph, cx: &Context) -> Result<PassReport>;
}

/// Makes a model of any exporter a clean one: fixed shapes, batch 1, the asked-for resolution, constants folded, batch
/// norms inside convolutions, LayerNorm and linear layers spelled in one way, types and shapes of all values stated.
///
/// # Errors
/// The graph contradicts itself, cannot have that resolution, or has an operator that does not run.
pub fn prepare(graph: &mut Graph, options: &Prepare) -> Result<Vec<PassReport>> {
    check::check(graph)?;
    let passes: [&dyn Pass; 7] = [
        &opset::Opset,
        &freeze::Freeze,
        &fold::Fold,
        &layernorm::LayerNorm,
        &gemm::Gemm,
        &softmax::SoftmaxGuard,
        &batchnorm::BatchNorm,
    ];
    let cx = Context { options: options.clone() };
    let reports = passes.iter().map(|p| p.run(graph, &cx)).collect::<Result<Vec<_>>>()?;
    graph.prune_unused();
    shapes::annotate(graph)?;
    check::check(graph)?;
    Ok(reports)
}

/// A report from a count and its unit.
fn report(pass: &'static str, changes: usize, line: impl Into<String>) -> PassReport {
    PassReport { pass, line: line.into(), changes }
}

/// Lets everything that used `value` use `instead`; false (and nothing changed) when `value` must keep its name: it is
/// an output of the graph or taken by a subgraph.
fn bypass(graph: &mut Graph, value: &str, instead: &str) -> bool {
    let taken = graph.outputs.iter().any(|o| o.name() == value)
        || graph.nodes.iter().flat_map(|n| &n.attribute).any(|a| mentions(a, value));
    if !taken {
        graph.replace_uses(value, instead);
    }
    !taken
}

/// Whether a subgraph of an attribute uses a value of that name.
fn mentions(a: &AttributeProto, value: &str) -> bool {
    a.g.iter().chain(&a.graphs).any(|g| {
        g.node.iter().any(|n| n.input.iter().any(|i| i == value) || n.attribute.iter().any(|a| mentions(a, value)))
            || g.output.iter().any(|o| o.name() == value)
    })
}

/// Removes the nodes of these indices.
fn remove_nodes(graph: &mut Graph, dead: &HashSet<usize>) {
    let mut i = 0;
    graph.nodes.retain(|_| {
        i += 1;
        !dead.contains(&(i - 1))
    });
}

//! What can leave a model as a whole: the heads of an attention block, the neurons of an MLP.

use super::walk::{Dim, Factor, Walk, kept};
use crate::quantize::layers::node_name;
use ndarray::{Array1, Array2, Axis};
use std::collections::BTreeSet;
use std::rc::Rc;
use vedge_runtime::onnx::{Graph, NodeProto, Uses, elements, f32_tensor, shape_of, value_info};

/// What is pruned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Heads of attention blocks.
    Heads,
    /// Hidden neurons of MLPs.
    Neurons,
}

impl Kind {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Heads => "heads",
            Kind::Neurons => "neurons",
        }
    }
}

/// Channels between some linear layers and the one that takes them in.
#[derive(Clone, Debug)]
pub struct Unit {
    /// Heads or neurons.
    pub kind: Kind,
    /// Name of the layer that takes the channels in.
    pub name: String,
    /// How many heads or neurons.
    pub groups: usize,
    /// Inputs of the last layer that belong to one of them.
    pub width: usize,
    /// Value that the last layer takes in.
    pub input: String,
    /// What the last layer puts out (its product, before the bias).
    end: String,
    /// The first layers by what they put out, and how many places stand outside of the groups there.
    pub(super) starts: Vec<(String, usize)>,
    /// Multiply-accumulates that one group costs for one picture.
    pub macs: u64,
    /// What one group costs against those of other layers: its multiply-accumulates, or milliseconds where they are known.
    pub price: f64,
}

impl Unit {
    /// How many groups a share (0…1) of them is; at least one stays.
    pub(crate) fn part(&self, share: f64) -> usize {
        ((share * self.groups as f64).round() as usize).min(self.groups - 1)
    }

    /// Rows of the last layer's weight that belong to a group.
    pub fn rows(&self, group: usize) -> Vec<usize> {
        (group * self.width..(group + 1) * self.width).collect()
    }

    /// The last layer's weight, inputs × outputs.
    pub fn weights(&self, g: &Graph) -> Option<Array2<f64>> {
        let node = g.nodes.iter().find(|n| n.output.first() == Some(&self.end))?;
        let t = g.initializers.get(node.input_name(1))?;
        let shape = shape_of(t);
        let values = g.const_f32(node.input_name(1))?;
        Array2::from_shape_vec((shape[0], shape[1]), values.into_iter().map(f64::from).collect()).ok()
    }

    fn walk(&self, g: &Graph, keep: &[usize]) -> Result<Walk, String> {
        let uses = Uses::of(g);
        let keep: Rc<[usize]> = keep.into();
        let mut starts = vec![];
        for (output, outside) in &self.starts {
            let node = uses.producer(output).ok_or("a layer is gone")?;
            let columns = shape_of(&g.initializers[g.nodes[node].input_name(1)])[1];
            let inside = columns / self.groups / outside;
            let dim = vec![Factor::whole(*outside), Factor::some(self.groups, &keep), Factor::whole(inside)];
            starts.push((node, dim));
        }
        let walk = Walk::follow(g, &uses, &starts)?;
        let rows: Dim = vec![Factor::some(self.groups, &keep), Factor::whole(self.width)];
        match walk.ends.as_slice() {
            [(node, taken)] if g.nodes[*node].output[0] == self.end && *taken == kept(&rows) => Ok(walk),
            _ => Err("the channels do not all end in one linear layer".into()),
        }
    }

    /// Removes groups from the graph: the layers before and after get smaller. With the repaired weights (inputs ×
    /// outputs, before anything is removed) and the change of the bias, where there is a repair.
    ///
    /// # Errors
    /// What cannot follow, in words; the graph is unchanged then.
    pub fn remove(
        &self,
        g: &mut Graph,
        dropped: &[usize],
        repair: Option<(&Array2<f64>, &Array1<f64>)>,
    ) -> Result<(), String> {
        let keep: Vec<usize> = (0..self.groups).filter(|i| !dropped.contains(i)).collect();
        let walk = self.walk(g, &keep)?;
        let mut weights = self.weights(g).ok_or("the last layer's weight is not constant")?;
        let (end, rows) = walk.ends[0].clone();
        walk.apply(g);
        if let Some((repaired, bias)) = repair {
            weights.assign(repaired);
            add_bias(g, end, bias);
        }
        // A bias that was put in stands behind the layer, so its index is the same.
        let weights = weights.select(Axis(0), &rows).mapv(|v| v as f32);
        let name = g.fresh(&format!("{}_pruned", g.nodes[end].input[1]));
        let values: Vec<f32> = weights.iter().copied().collect();
        g.initializers.insert(name.clone(), f32_tensor(&name, weights.shape(), &values));
        g.nodes[end].input[1] = name;
        Ok(())
    }
}

/// Adds to the bias of a linear layer; gives it one where it has none.
fn add_bias(g: &mut Graph, end: usize, change: &Array1<f64>) {
    let output = g.nodes[end].output[0].clone();
    let uses = Uses::of(g);
    let add = uses.only_consumer(&output).filter(|&i| g.nodes[i].op_type() == "Add");
    let constant = add.and_then(|i| {
        let at = (0..2).find(|&k| g.nodes[i].input_name(k) != output)?;
        let name = g.nodes[i].input_name(at).to_string();
        let shape = shape_of(g.initializers.get(&name)?);
        let values = g.const_f32(&name)?;
        let fits = elements(&shape) == change.len() && shape.last() == Some(&change.len());
        fits.then_some((i, at, name, shape, values))
    });
    if let Some((node, at, name, shape, values)) = constant {
        let values: Vec<f32> = values.iter().zip(change).map(|(b, c)| (f64::from(*b) + c) as f32).collect();
        let new = g.fresh(&format!("{name}_repaired"));
        g.initializers.insert(new.clone(), f32_tensor(&new, &shape, &values));
        g.nodes[node].input[at] = new;
        return;
    }
    let (product, bias) = (g.fresh(&format!("{output}_product")), g.fresh(&format!("{output}_bias")));
    let values: Vec<f32> = change.iter().map(|&c| c as f32).collect();
    g.initializers.insert(bias.clone(), f32_tensor(&bias, &[values.len()], &values));
    if let Some((dtype, shape)) = g.fact(&output) {
        g.value_info.insert(product.clone(), value_info(&product, dtype, &shape));
    }
    g.nodes[end].output[0] = product.clone();
    g.nodes.insert(end + 1, NodeProto::of("Add", &[&product, &bias], &[&output], vec![]));
}

/// Finds what can be pruned, in graph order, and for the rest why it cannot.
pub fn find(g: &Graph, kind: Kind) -> (Vec<Unit>, Vec<String>) {
    let uses = Uses::of(g);
    let candidates = match kind {
        Kind::Heads => g.nodes.iter().filter(|n| n.op_type() == "Softmax").filter_map(|n| heads(g, &uses, n)).collect(),
        Kind::Neurons => (0..g.nodes.len()).filter_map(|i| neurons(g, &uses, i)).collect::<Vec<_>>(),
    };
    let (mut units, mut not) = (vec![], vec![]);
    for layouts in candidates {
        // A fused projection holds q, k, v outside of the heads or inside: the layout is the one that fits the graph.
        let all_but_first = |u: &Unit| (1..u.groups).collect::<Vec<_>>();
        match layouts.iter().find(|u| u.groups > 1 && u.walk(g, &all_but_first(u)).is_ok()) {
            Some(u) => units.push(u.clone()),
            None => {
                let u = &layouts[0];
                let why =
                    if u.groups > 1 { u.walk(g, &all_but_first(u)).err() } else { Some("there is only one".into()) };
                not.push(format!("{}: {}", u.name, why.unwrap_or_default()));
            }
        }
    }
    (units, not)
}

/// A `MatMul` with a constant matrix: its node, inputs and outputs.
fn linear(g: &Graph, node: usize) -> Option<(usize, usize)> {
    let n = &g.nodes[node];
    let shape = shape_of(g.initializers.get(n.input_name(1)).filter(|_| n.op_type() == "MatMul")?);
    let [k, n] = shape[..] else { return None };
    Some((k, n))
}

/// The linear layers that a value comes from, through operators that `through` accepts.
fn origins(g: &Graph, uses: &Uses, value: &str, through: &dyn Fn(&NodeProto) -> bool) -> Option<BTreeSet<usize>> {
    let mut found = BTreeSet::new();
    let mut open = vec![value.to_string()];
    let mut seen = BTreeSet::new();
    while let Some(value) = open.pop() {
        if value.is_empty() || g.initializers.contains_key(&value) || !seen.insert(value.clone()) {
            continue;
        }
        let node = uses.producer(&value)?;
        let n = &g.nodes[node];
        if linear(g, node).is_some() {
            found.insert(node);
        } else if through(n) && seen.len() < 64 {
            open.extend(n.input.iter().cloned());
        } else {
            return None;
        }
    }
    Some(found)
}

const MOVES: [&str; 8] = ["Reshape", "Transpose", "Split", "Slice", "Gather", "Squeeze", "Unsqueeze", "Flatten"];
const MAPS: [&str; 12] =
    ["Add", "Mul", "Div", "Sub", "Pow", "Erf", "Gelu", "Sigmoid", "Tanh", "Relu", "HardSwish", "LayerNormalization"];
const PASSES: [&str; 4] = ["Cast", "Identity", "Where", "IsNaN"];

fn rows(g: &Graph, node: usize) -> u64 {
    g.shape(&g.nodes[node].output[0]).map_or(0, |s| elements(&s[..s.len() - 1]) as u64)
}

/// The heads of an attention block, found from its softmax; in each layout that a fused projection may have.
fn heads(g: &Graph, uses: &Uses, softmax: &NodeProto) -> Option<Vec<Unit>> {
    let is = |n: &NodeProto, ops: &[&str]| ops.contains(&n.op_type());
    // Forward: the product with V, then the layer that takes the heads in.
    let mut value = softmax.output.first()?.clone();
    let mut context = None;
    let mut end = None;
    for _ in 0..12 {
        let next = uses.consumers(&value).iter().map(|&i| (i, &g.nodes[i]));
        let (i, n) = next.rev().find(|(_, n)| n.op_type() != "IsNaN")?;
        match (n.op_type(), &context) {
            ("MatMul", None) if n.input_name(0) == value => context = Some(i),
            ("MatMul", Some(_)) => {
                end = linear(g, i).map(|size| (i, size));
                break;
            }
            _ if is(n, &MOVES) || is(n, &PASSES) || n.op_type() == "Dropout" => {}
            _ => return None,
        }
        value = n.output.first()?.clone();
    }
    let (context, (end, (k, out))) = (context?, end?);
    let width = *g.shape(&g.nodes[context].output[0])?.last()?;
    if width == 0 || !k.is_multiple_of(width) {
        return None;
    }
    // Backward: the product of Q and K, then the projections of all three.
    let mut value = softmax.input_name(0).to_string();
    let scores = (0..12).find_map(|_| {
        let n = &g.nodes[uses.producer(&value)?];
        let variable = n.input.iter().find(|i| !i.is_empty() && !g.initializers.contains_key(*i))?.clone();
        if n.op_type() == "MatMul" {
            return Some(Some(n));
        }
        value = variable;
        (!is(n, &MOVES) && !is(n, &MAPS) && !is(n, &PASSES)).then_some(None)
    })??;
    let through = |n: &NodeProto| is(n, &MOVES) || is(n, &MAPS) || is(n, &PASSES) || n.op_type() == "Sqrt";
    let mut starts = origins(g, uses, g.nodes[context].input_name(1), &through)?;
    for i in 0..2 {
        starts.extend(origins(g, uses, scores.input_name(i), &through)?);
    }
    let groups = k / width;
    let columns: Vec<usize> = starts.iter().map(|&s| linear(g, s).map_or(0, |l| l.1)).collect();
    if columns.iter().any(|c| !c.is_multiple_of(groups)) {
        return None;
    }
    let inputs = |s: usize| linear(g, s).map_or(0, |l| l.0 as u64);
    let product = |n: usize| -> u64 {
        let inner = g.shape(g.nodes[n].input_name(0)).and_then(|s| s.last().copied()).unwrap_or(0);
        g.shape(&g.nodes[n].output[0]).map_or(0, |s| elements(&s) as u64) * inner as u64 / groups as u64
    };
    let scores = uses.producer(&scores.output[0]).map_or(0, product);
    let projections: u64 =
        starts.iter().zip(&columns).map(|(&s, &c)| rows(g, s) * inputs(s) * (c / groups) as u64).sum();
    let macs = projections + scores + product(context) + rows(g, end) * (width * out) as u64;
    let layout = |outside: &dyn Fn(usize) -> usize| Unit {
        kind: Kind::Heads,
        name: node_name(&g.nodes[end]),
        groups,
        width,
        input: g.nodes[end].input_name(0).into(),
        end: g.nodes[end].output[0].clone(),
        starts: starts.iter().zip(&columns).map(|(&s, &c)| (g.nodes[s].output[0].clone(), outside(c))).collect(),
        macs,
        price: macs as f64,
    };
    // Heads of another width in Q and K than in V cannot be told apart in a fused projection.
    let outside = |c: usize| if c.is_multiple_of(groups * width) { c / (groups * width) } else { 1 };
    Some(vec![layout(&outside), layout(&|_| 1)])
}

/// The hidden neurons before a linear layer, if what it takes in comes through an activation from one other.
fn neurons(g: &Graph, uses: &Uses, end: usize) -> Option<Vec<Unit>> {
    let (k, out) = linear(g, end)?;
    let n = &g.nodes[end];
    let through = |n: &NodeProto| {
        (MAPS.contains(&n.op_type()) && n.op_type() != "LayerNormalization") || PASSES.contains(&n.op_type())
    };
    let starts = origins(g, uses, n.input_name(0), &through)?;
    let start = *starts.first().filter(|_| starts.len() == 1)?;
    let (inputs, columns) = linear(g, start)?;
    if columns != k || uses.producer(n.input_name(0)) == Some(start) {
        return None;
    }
    let macs = rows(g, start) * inputs as u64 + rows(g, end) * out as u64;
    Some(vec![Unit {
        kind: Kind::Neurons,
        name: node_name(n),
        groups: k,
        width: 1,
        input: n.input_name(0).into(),
        end: n.output[0].clone(),
        starts: vec![(g.nodes[start].output[0].clone(), 1)],
        macs,
        price: macs as f64,
    }])
}

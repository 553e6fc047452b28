//! Token merging (Bolya et al., "Token Merging: Your ViT But Faster", 2023): after the attention of each block, tokens
//! whose keys are alike become one, so that later blocks have less to do. No training; shapes stay fixed.

mod write;

use crate::arch::{Architecture, Family};
use crate::passes::resize::follow;
use crate::shapes::{self, describe};
use std::collections::{BTreeMap, HashMap};
use vedge_runtime::onnx::{Graph, NodeProto, Uses, shape_of};
use vedge_runtime::{Error, Result};
use write::Place;

/// How many tokens each block merges.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(untagged)]
pub enum Schedule {
    /// The same in every block.
    Every(usize),
    /// In the first block, the second, …; none in those after the last that is given.
    Blocks(Vec<usize>),
}

impl Schedule {
    /// Reads `8` (in every block), `8,8,4` (in the first three blocks) or `16x3,8x4` (three times 16, four times 8).
    ///
    /// # Errors
    /// What was expected, in words.
    pub fn parse(s: &str) -> Result<Schedule, String> {
        let expected = || "expected tokens per block, such as 8, or 8,8,4, or 16x3,8x4".to_string();
        let number = |s: &str| s.trim().parse::<usize>().map_err(|_| expected());
        if !s.contains([',', 'x']) {
            return Ok(Schedule::Every(number(s)?));
        }
        let mut blocks = vec![];
        for part in s.split(',') {
            let (each, times) = part.split_once('x').unwrap_or((part, "1"));
            let times = number(times)?;
            if times > 1000 {
                return Err(expected());
            }
            blocks.resize(blocks.len() + times, number(each)?);
        }
        Ok(Schedule::Blocks(blocks))
    }

    /// Tokens for a model of so many blocks.
    fn of(&self, blocks: usize) -> Result<Vec<usize>> {
        match self {
            Schedule::Every(r) => Ok(vec![*r; blocks]),
            Schedule::Blocks(r) if r.len() <= blocks => {
                Ok(r.iter().copied().chain(std::iter::repeat(0)).take(blocks).collect())
            }
            Schedule::Blocks(r) => Err(Error::Usage {
                what: format!("--merge-tokens says what {} blocks merge, the model has {blocks}", r.len()),
                hint: format!("give {blocks} numbers or fewer, or one for all blocks"),
            }),
        }
    }
}

/// What was merged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Merging {
    /// Tokens that each block's attention sees.
    pub tokens: Vec<usize>,
    /// Tokens after the last block.
    pub last: usize,
    /// For the card.
    pub note: Option<String>,
}

/// A block as far as merging is concerned.
struct Block {
    /// The softmax.
    softmax: usize,
    /// Keys `[1][heads][dim][tokens]`.
    keys: String,
    /// What the block adds its attention to, afterwards: `[1][tokens][width]`.
    end: String,
}

/// Merges tokens of a prepared float graph. A schedule of zeros changes nothing.
///
/// # Errors
/// [`Error::Unsupported`] for a model in which tokens cannot be merged, by name; [`Error::Usage`] for a schedule that does
/// not fit it.
pub fn merge(graph: &mut Graph, schedule: &Schedule, architecture: &Architecture) -> Result<Merging> {
    let family = architecture.family;
    if !matches!(family, Family::Vit | Family::Deit) {
        let why = match family {
            Family::Swin => "attends inside of windows, which need all of their tokens",
            Family::MobileVit => "folds its tokens back into a picture",
            Family::Hybrid => "has convolutions between its blocks",
            _ => "has no blocks that were recognised",
        };
        return Err(Error::Unsupported {
            what: format!("--merge-tokens: this model ({}) {why}", family.name()),
            hint: "tokens can be merged in ViT and DeiT; use --size, --prune-mlp or --prune-heads here".into(),
        });
    }
    let old = shapes::infer(graph)?;
    let uses = Uses::of(graph);
    let softmax = graph.nodes.iter().enumerate().filter(|(_, n)| n.op_type() == "Softmax");
    let blocks: Vec<Block> = softmax.map(|(i, _)| block(graph, &uses, i)).collect::<Result<_>>()?;
    let before = old.shape(&blocks[0].end).map_or(0, |s| s[1]);
    let prefix = before.saturating_sub(patches(graph, &old));
    let wanted = schedule.of(blocks.len())?;
    let (mut sizes, mut tokens): (Option<String>, usize) = (None, before);
    let mut done = Merging::default();
    // What the last block adds its attention to.
    let mut end = String::new();
    let mut inserted: HashMap<String, Option<String>> = HashMap::new();
    // By node of the graph before: what follows it.
    let mut after: BTreeMap<usize, Vec<NodeProto>> = BTreeMap::new();
    for (b, merged) in blocks.iter().zip(wanted) {
        done.tokens.push(tokens);
        if let Some(sizes) = &sizes {
            let scores = graph.nodes[b.softmax].input[0].clone();
            let (nodes, sum) = write::proportional(graph, &scores, sizes, tokens);
            note_nodes(&mut inserted, &nodes, &sum, &scores);
            graph.nodes[b.softmax].input[0] = sum;
            let at = uses.producer(&scores).ok_or_else(|| stuck(&graph.nodes[b.softmax], "its scores are constant"))?;
            after.entry(at).or_default().extend(nodes);
        }
        end.clone_from(&b.end);
        // The paper's bound: no more than half of the tokens that are not protected.
        let merged = merged.min((tokens - prefix) / 2);
        if merged == 0 {
            continue;
        }
        let place = Place { keys: &b.keys, values: &b.end, sizes: sizes.as_deref(), tokens, prefix, merged };
        let new = write::merge(graph, &place);
        note_nodes(&mut inserted, &new.nodes, &new.values, &b.end);
        for n in &mut graph.nodes {
            n.input.iter_mut().filter(|i| **i == b.end).for_each(|i| i.clone_from(&new.values));
        }
        let at = uses.producer(&b.end).ok_or_else(|| stuck(&graph.nodes[b.softmax], "its block has no end"))?;
        after.entry(at).or_default().extend(new.nodes);
        tokens -= merged;
        sizes = Some(new.sizes);
        end = new.values;
    }
    done.last = tokens;
    let Some(sizes) = sizes else { return Ok(done) };
    let tail = Tail { old: &old, sizes: &sizes, before, tokens, prefix };
    tail.weigh(graph, end, &mut inserted, &mut after)?;
    for (at, nodes) in after.into_iter().rev() {
        graph.nodes.splice(at + 1..at + 1, nodes);
    }
    graph.sort()?;
    follow(graph, old, &inserted)?;
    shapes::annotate(graph)?;
    graph.prune_unused();
    let counts: Vec<String> = done.tokens.iter().chain([&tokens]).map(usize::to_string).collect();
    done.note = Some(format!("merge: tokens {} (similar ones become one after each attention)", counts.join(", ")));
    Ok(done)
}

/// Patches that the one convolution cuts the picture into.
fn patches(graph: &Graph, facts: &shapes::Facts) -> usize {
    let conv = graph.nodes.iter().find(|n| n.op_type() == "Conv");
    conv.and_then(|n| facts.shape(&n.output[0])).map_or(0, |s| s[2..].iter().product())
}

/// Remembers what was put in, the result standing for a value from before.
fn note_nodes(inserted: &mut HashMap<String, Option<String>>, nodes: &[NodeProto], result: &str, stands_for: &str) {
    inserted.extend(nodes.iter().flat_map(|n| &n.output).map(|o| (o.clone(), None)));
    // What stands for something that itself was put in stands for the first of them.
    let first = inserted.get(stands_for).cloned().flatten().unwrap_or_else(|| stands_for.into());
    inserted.insert(result.into(), Some(first));
}

fn stuck(n: &NodeProto, why: &str) -> Error {
    Error::Unsupported {
        what: format!("tokens of this model cannot be merged: {}: {why}", describe(n)),
        hint: "leave --merge-tokens out".into(),
    }
}

/// The block around a softmax.
fn block(g: &Graph, uses: &Uses, softmax: usize) -> Result<Block> {
    let n = &g.nodes[softmax];
    let stuck = |why: &str| stuck(n, why);
    let unknown = || stuck("its shape is not known");
    let scores = g.shape(n.input_name(0)).ok_or_else(unknown)?;
    let [1, _, tokens, keys] = scores[..] else {
        return Err(stuck("its scores are not [1][heads][queries][keys]"));
    };
    if tokens != keys {
        return Err(stuck("it has other keys than queries"));
    }
    // Upwards to the product of q and k.
    let mut value = n.input_name(0).to_string();
    let product = loop {
        let i = uses.producer(&value).ok_or_else(|| stuck("its scores are no product"))?;
        let p = &g.nodes[i];
        match p.op_type() {
            "MatMul" => break p,
            "Mul" | "Div" if p.input.iter().any(|i| g.const_scalar(i).is_some()) => {
                value = p.input.iter().find(|i| g.const_scalar(i).is_none()).cloned().unwrap_or_default();
            }
            "Add" => return Err(stuck("it adds a bias for each pair of tokens")),
            op => return Err(stuck(&format!("{op} stands between its scores and it"))),
        }
    };
    // The similarity does not depend on a factor, and the runtime reads keys best before it.
    let mut keys = product.input_name(1).to_string();
    while let Some(i) = uses.producer(&keys)
        && matches!(g.nodes[i].op_type(), "Mul" | "Div")
        && let [variable, factor] = g.nodes[i].input.as_slice()
        && g.const_scalar(factor).is_some()
    {
        keys.clone_from(variable);
    }
    if g.shape(&keys).is_none_or(|s| s.len() != 4 || s[0] != 1 || s[3] != tokens) {
        return Err(stuck("its keys are not [1][heads][width][tokens]"));
    }
    // Downwards to where the block adds what attention gave.
    let mut value = n.output[0].clone();
    for _ in 0..24 {
        let next = uses.consumers(&value).last().map(|&i| &g.nodes[i]).ok_or_else(|| stuck("nothing uses it"))?;
        let other = next.input.iter().find(|i| **i != value && !g.initializers.contains_key(*i));
        let output = next.output[0].clone();
        if next.op_type() == "Add"
            && let Some(other) = other
        {
            let shape = g.shape(&output).ok_or_else(unknown)?;
            let fits = matches!(shape[..], [1, t, _] if t == tokens) && g.shape(other).as_ref() == Some(&shape);
            return match fits {
                true => Ok(Block { softmax, keys, end: output }),
                false => Err(stuck("its block adds something of another shape")),
            };
        }
        value = output;
    }
    Err(stuck("its block adds its attention to nothing"))
}

/// What stands behind the last attention.
struct Tail<'a> {
    old: &'a shapes::Facts,
    /// Sizes of the tokens there.
    sizes: &'a str,
    /// Tokens before any were merged.
    before: usize,
    /// Tokens that are left.
    tokens: usize,
    prefix: usize,
}

impl Tail<'_> {
    /// Tokens may still be averaged: each then counts as often as it was merged. What else mixes tokens is refused.
    fn weigh(
        &self,
        graph: &mut Graph,
        end: String,
        inserted: &mut HashMap<String, Option<String>>,
        after: &mut BTreeMap<usize, Vec<NodeProto>>,
    ) -> Result<()> {
        // By value: how many tokens were left out at its start.
        let mut open = HashMap::from([(end, 0)]);
        for i in 0..graph.nodes.len() {
            let n = graph.nodes[i].clone();
            let Some(from) = n.input.iter().find_map(|v| open.get(v).copied()) else { continue };
            let axis = |a: i64| if a < 0 { a + 3 } else { a };
            let one = |k: usize| graph.const_i64(n.input_name(k)).filter(|v| v.len() == 1).map(|v| v[0]);
            let count = self.before - from;
            let same = self.old.shape(&n.output[0]).is_some_and(|s| s.len() == 3 && s[1] == count);
            let weight = || graph.initializers.get(n.input_name(1)).is_some_and(|t| shape_of(t).len() == 2);
            // How many tokens the result lacks; nothing where it has none any more.
            let lacks = match n.op_type() {
                "Add" | "Sub" | "Mul" | "Div" | "Pow" | "Erf" | "Gelu" | "Sigmoid" | "Tanh" | "Relu" | "Sqrt"
                | "Cast" | "Identity" | "HardSwish"
                    if same =>
                {
                    Some(from)
                }
                "LayerNormalization" | "Softmax" if same && axis(n.int("axis", -1)) == 2 => Some(from),
                "MatMul" if same && weight() => Some(from),
                "Slice" => match (one(1), one(2), one(3).map(axis)) {
                    (_, _, Some(2)) => Some(from),
                    (Some(start @ 0..), Some(end), Some(1)) if end as u64 >= count as u64 => {
                        Some(from + start as usize)
                    }
                    (Some(0..), Some(end @ 0..), Some(1)) if from + end as usize <= self.prefix => None,
                    _ => return Err(stuck(&n, "it takes some of the tokens")),
                },
                "Gather" if axis(n.int("axis", 0)) == 1 => {
                    let place = |i: &i64| usize::try_from(*i).is_ok_and(|i| from + i < self.prefix);
                    match graph.const_i64(n.input_name(1)) {
                        Some(v) if v.iter().all(place) => None,
                        _ => return Err(stuck(&n, "it takes some of the tokens")),
                    }
                }
                "ReduceMean" => {
                    let axes = n.ints("axes").map(<[i64]>::to_vec).or_else(|| graph.const_i64(n.input_name(1)));
                    match axes.as_deref() {
                        Some(&[a]) if axis(a) == 2 => Some(from),
                        Some(&[a]) if axis(a) == 1 => {
                            let values = n.input[0].clone();
                            let counts = [count, self.tokens - from];
                            let (nodes, product) = write::weighted(graph, &values, self.sizes, from, counts);
                            note_nodes(inserted, &nodes, &product, &values);
                            graph.nodes[i].input[0] = product;
                            after.entry(i - 1).or_default().extend(nodes);
                            None
                        }
                        _ => return Err(stuck(&n, "it averages over more than the tokens")),
                    }
                }
                op => return Err(stuck(&n, &format!("{op} behind the last attention may mix tokens"))),
            };
            open.extend(lacks.map(|from| (n.output[0].clone(), from)));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;

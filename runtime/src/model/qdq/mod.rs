//! Quantization as other tools write it, brought into one form before patterns are looked for: every quantized value is the
//! output of a QuantizeLinear and read by a DequantizeLinear of the same scale, weights lie behind a DequantizeLinear, and
//! everything between is float. Moving elements (a transposition) is done on the floats, which is the same.
//!
//! Read are QDQ with weights or biases that are quantized in the graph (NNCF, PyTorch's fake quantization), operators on
//! integers (QLinearConv, QLinearMatMul and those of ONNX Runtime's domain), and ONNX Runtime's dynamic form
//! (DynamicQuantizeLinear with MatMulInteger or ConvInteger). What does not fit stays as it is.

mod constants;
mod operators;

use super::check;
use crate::onnx::{DType, Graph, NodeProto, Uses, attr, f32_tensor, tensor, to_f32, to_i64};
use std::collections::{HashMap, HashSet};

/// Operators that move elements of their first input or choose among them, whatever stands for a number.
pub(crate) const MOVES: [&str; 14] = [
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Slice",
    "Split",
    "Gather",
    "Identity",
    "Expand",
    "Tile",
    "MaxPool",
    "DepthToSpace",
    "SpaceToDepth",
];

/// Brings a graph into that form, if it has quantization at all, and says whether it has. A graph in disorder stays as it is.
pub fn normalize(g: &mut Graph) -> bool {
    let spelled = |n: &NodeProto| n.op_type().contains("Quantize") || operators::is_integer(n);
    if !g.nodes.iter().any(spelled) {
        return false;
    }
    if check::graph(g).is_err() {
        return true;
    }
    let uses = Uses::of(g);
    let nodes = g.nodes.clone();
    let mut r = Reader { g, uses, out: vec![], seen: HashMap::new(), alias: HashMap::new(), names: HashSet::new() };
    let mut done: HashSet<usize> = HashSet::new();
    let mut products = HashMap::new();
    for (i, mut n) in nodes.iter().cloned().enumerate() {
        n.input.iter_mut().for_each(|v| {
            if let Some(a) = r.alias.get(v) {
                a.clone_into(v);
            }
        });
        if let Some(found) = operators::integer_product(&r, &nodes, i) {
            done.extend(&found.nodes);
            products.insert(found.last, found);
            continue;
        }
        if let Some(found) = products.remove(&i) {
            operators::write_product(&mut r, found);
        } else if !done.contains(&i) {
            r.node(n);
        }
    }
    let out = r.out;
    g.nodes = out;
    operators::absorb_conv_bias(g);
    g.prune_unused();
    true
}

/// A quantized value.
#[derive(Clone)]
struct Seen {
    /// Name of its scale.
    scale: String,
    /// Name of its zero point; may be empty.
    zero: String,
    /// Name of the float value, once something has asked for it.
    float: Option<String>,
}

/// Reads a graph node by node.
struct Reader<'a> {
    /// The graph, its nodes as they were.
    g: &'a mut Graph,
    /// Uses in it.
    uses: Uses,
    /// The new nodes.
    out: Vec<NodeProto>,
    /// Quantized values by name.
    seen: HashMap<String, Seen>,
    alias: HashMap<String, String>,
    names: HashSet<String>,
}

impl Reader<'_> {
    fn node(&mut self, n: NodeProto) {
        let Some(x) = n.input.first().cloned() else { return self.out.push(n) };
        let data = self.g.initializers.contains_key(&x);
        match n.op_type() {
            "QuantizeLinear" if data && self.quantize_constant(&n).is_some() => {}
            "QuantizeLinear" => {
                self.register(&n.output[0], n.input_name(1), n.input_name(2));
                self.out.push(standard(n));
            }
            "DynamicQuantizeLinear" if n.output.len() == 3 => {
                self.register(&n.output[0], &n.output[1], &n.output[2]);
                self.out.push(n);
            }
            "DequantizeLinear" if data => {
                if self.is_weight(&n.output[0]) || self.dequantize_constant(&n).is_none() {
                    self.out.push(standard(n));
                }
            }
            "DequantizeLinear" => self.dequantize(standard(n), &x),
            "Reshape" if data && self.reshape_constant(&n).is_some() => {}
            op if MOVES.contains(&op) && self.seen.contains_key(&x) => self.moved(n, &x),
            "Clip" if self.seen.contains_key(&x) && self.clip(&n, &x).is_some() => {}
            _ if operators::rewrite(self, &n).is_some() => {}
            _ => {
                // Anything else reads integers, where it does.
                let inputs: Vec<String> = n.input.iter().map(|i| self.integers(i)).collect();
                self.out.push(NodeProto { input: inputs, ..n });
            }
        }
    }

    fn register(&mut self, value: &str, scale: &str, zero: &str) {
        self.seen.insert(value.into(), Seen { scale: scale.into(), zero: zero.into(), float: None });
    }

    /// A value name that nothing uses.
    fn fresh(&mut self, prefix: &str) -> String {
        let mut name = self.g.fresh(prefix);
        while !self.names.insert(name.clone()) {
            name += "_";
        }
        name
    }

    /// Adds a node with one new output, whose name starts with `prefix`.
    fn push(
        &mut self,
        op: &str,
        inputs: &[&str],
        prefix: &str,
        attributes: Vec<crate::onnx::AttributeProto>,
    ) -> String {
        let output = self.fresh(prefix);
        self.out.push(NodeProto::of(op, inputs, &[&output], attributes));
        output
    }

    /// Quantizes a new float value into a value of the file.
    fn quantize(&mut self, float: &str, scale: &str, zero: &str, output: &str) {
        self.out.push(NodeProto::of("QuantizeLinear", &[float, scale, zero], &[output], vec![]));
        self.register(output, scale, zero);
    }

    /// The floats that a quantized value stands for.
    fn float(&mut self, x: &str) -> Option<String> {
        let seen = self.seen.get(x)?.clone();
        if let Some(f) = seen.float {
            return Some(f);
        }
        let f = self.push("DequantizeLinear", &[x, &seen.scale, &seen.zero], &format!("{x}.dequantized"), vec![]);
        self.seen.get_mut(x)?.float = Some(f.clone());
        Some(f)
    }

    /// The floats of an input that an operator on integers reads with this scale and zero point.
    fn operand(&mut self, x: &str, scale: &str, zero: &str) -> Option<String> {
        if self.seen.get(x).is_some_and(|seen| self.same(&seen.scale, scale) && self.same(&seen.zero, zero)) {
            return self.float(x);
        }
        let n =
            NodeProto::of("DequantizeLinear", &[x, scale, zero], &[&self.fresh(&format!("{x}.dequantized"))], vec![]);
        let output = n.output[0].clone();
        if !self.g.initializers.contains_key(x) || self.dequantize_constant(&n).is_none() {
            let x = self.integers(x);
            self.out.push(NodeProto { input: vec![x, scale.into(), zero.into()], ..n });
        }
        Some(output)
    }

    /// Whether two names stand for the same constant or value.
    fn same(&self, a: &str, b: &str) -> bool {
        let known = |n: &str| {
            let t = self.g.initializers.get(n)?;
            let values = to_f32(t).or_else(|_| to_i64(t).map(|v| v.iter().map(|v| *v as f32).collect())).ok()?;
            Some((t.dtype(), values))
        };
        a == b || (known(a).is_some() && known(a) == known(b))
    }

    /// The value itself, or made again where only its floats were moved.
    fn integers(&mut self, x: &str) -> String {
        match self.seen.get(x).cloned() {
            Some(Seen { scale, zero, float: Some(f) }) if !self.produced(x) => {
                self.push("QuantizeLinear", &[&f, &scale, &zero], &format!("{x}.quantized"), vec![])
            }
            _ => x.into(),
        }
    }

    fn produced(&self, x: &str) -> bool {
        self.out.iter().any(|n| n.output.iter().any(|o| o == x))
    }

    fn dequantize(&mut self, n: NodeProto, x: &str) {
        let output = n.output[0].clone();
        match self.seen.get(x).cloned() {
            Some(s) if self.same(&s.scale, n.input_name(1)) && self.same(&s.zero, n.input_name(2)) => match s.float {
                Some(f) if self.g.outputs.iter().any(|o| o.name() == output) => {
                    self.out.push(NodeProto::of("Identity", &[&f], &[&output], vec![]));
                }
                Some(f) => drop(self.alias.insert(output, f)),
                None => {
                    self.seen.get_mut(x).expect("found above").float = Some(output);
                    self.out.push(n);
                }
            },
            _ => {
                let input = [vec![self.integers(x)], n.input[1..].to_vec()].concat();
                self.out.push(NodeProto { input, ..n });
            }
        }
    }

    /// Moves the floats instead of the integers.
    fn moved(&mut self, mut n: NodeProto, x: &str) {
        let seen = self.seen[x].clone();
        n.input[0] = self.float(x).expect("seen");
        let outputs = n.output.clone();
        for o in n.output.iter_mut().filter(|o| !o.is_empty()) {
            *o = self.fresh(&format!("{o}.float"));
        }
        let floats = n.output.clone();
        self.out.push(n);
        for (o, f) in outputs.iter().zip(floats).filter(|(o, _)| !o.is_empty()) {
            if self.g.outputs.iter().any(|v| v.name() == o) {
                self.out.push(NodeProto::of("QuantizeLinear", &[&f, &seen.scale, &seen.zero], &[o], vec![]));
            }
            self.seen.insert(o.clone(), Seen { float: Some(f), ..seen.clone() });
        }
    }

    /// Integers that are clipped: PyTorch's way to use fewer of them.
    fn clip(&mut self, n: &NodeProto, x: &str) -> Option<()> {
        let seen = self.seen[x].clone();
        let (scale, zero) = (self.g.const_scalar(&seen.scale)?, self.g.const_i64(&seen.zero)?);
        let [zero] = zero[..] else { return None };
        let mut input = vec![self.float(x)?];
        for slot in 1..3 {
            let bound = match n.input_name(slot) {
                "" => String::new(),
                b => {
                    let [b] = self.g.const_i64(b)?[..] else { return None };
                    let name = self.fresh(&format!("{}.bound", n.output[0]));
                    self.constant(&name, &[], &[(b - zero) as f32 * scale]);
                    name
                }
            };
            input.push(bound);
        }
        let input: Vec<&str> = input.iter().map(String::as_str).collect();
        let float = self.push("Clip", &input, &format!("{}.float", n.output[0]), vec![]);
        self.seen.insert(n.output[0].clone(), Seen { float: Some(float), ..seen });
        Some(())
    }

    /// Adds a float constant.
    fn constant(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        self.g.initializers.insert(name.into(), f32_tensor(name, shape, values));
    }

    /// Whether a value is the weight of a layer, perhaps behind a transposition.
    fn is_weight(&self, value: &str) -> bool {
        let of = |i: &usize| {
            let n = &self.g.nodes[*i];
            match n.op_type() {
                "MatMul" | "Gemm" | "Conv" => n.input_name(1) == value,
                "Transpose" => self.is_weight(&n.output[0]),
                _ => false,
            }
        };
        let users = self.uses.consumers(value);
        !users.is_empty() && users.iter().all(of)
    }

    /// Puts int8 weights behind a DequantizeLinear with a scale for each index of `axis`, or one for all.
    fn weight(&mut self, name: &str, scale: &[f32], zero: &str, axis: usize) -> Option<String> {
        let dtype = self.g.initializers.get(name)?.dtype();
        let zero = if zero.is_empty() { vec![0] } else { self.g.const_i64(zero)? };
        let shape = if scale.len() == 1 { vec![] } else { vec![scale.len()] };
        if zero.is_empty() || scale.is_empty() || !matches!(dtype, DType::Int8 | DType::Uint8) {
            return None;
        }
        let (s, z) = (self.fresh(&format!("{name}.scale")), self.fresh(&format!("{name}.zero_point")));
        self.constant(&s, &shape, scale);
        let zeros = (0..scale.len()).map(|i| zero[i % zero.len()] as u8).collect();
        self.g.initializers.insert(z.clone(), tensor(&z, dtype, &shape, zeros));
        let axis = if scale.len() == 1 { vec![] } else { vec![attr::int("axis", axis as i64)] };
        Some(self.push("DequantizeLinear", &[name, &s, &z], &format!("{name}.dequantized"), axis))
    }
}

/// ONNX Runtime has both operators in its own domain too.
fn standard(n: NodeProto) -> NodeProto {
    NodeProto { domain: None, ..n }
}

#[cfg(test)]
mod tests;

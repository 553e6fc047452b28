//! Token merging in standard operators. `runtime/src/model/lower/merge.rs` recognises what is written here.

use vedge_runtime::kernels::merge::EPSILON;
use vedge_runtime::onnx::{AttributeProto, DType, Graph, NodeProto, attr, f32_tensor, i64_tensor};

/// Where tokens are merged in one block.
pub struct Place<'a> {
    /// Keys `[1][heads][dim][tokens]`.
    pub keys: &'a str,
    /// Tokens to merge, `[1][tokens][width]`.
    pub values: &'a str,
    /// Sizes of the tokens, `[1][tokens][1]`; `None` while all are 1.
    pub sizes: Option<&'a str>,
    /// Tokens.
    pub tokens: usize,
    /// Tokens at the start that are never merged.
    pub prefix: usize,
    /// How many go.
    pub merged: usize,
}

/// Names of what was written.
pub struct Merged {
    /// The nodes, in order.
    pub nodes: Vec<NodeProto>,
    /// The tokens that are left.
    pub values: String,
    /// Their sizes.
    pub sizes: String,
}

/// Writes nodes one after the other; names begin with a prefix.
struct Pen<'a> {
    graph: &'a mut Graph,
    prefix: String,
    nodes: Vec<NodeProto>,
}

impl Pen<'_> {
    fn name(&self, what: &str) -> String {
        self.graph.fresh(&format!("{}.{what}", self.prefix))
    }

    fn node(&mut self, what: &str, op: &str, inputs: &[&str], attributes: Vec<AttributeProto>) -> String {
        let output = self.name(what);
        self.nodes.push(NodeProto { name: Some(output.clone()), ..NodeProto::of(op, inputs, &[&output], attributes) });
        output
    }

    fn integers(&mut self, what: &str, shape: &[usize], values: &[i64]) -> String {
        let name = self.name(what);
        self.graph.initializers.insert(name.clone(), i64_tensor(&name, shape, values));
        name
    }

    fn floats(&mut self, what: &str, shape: &[usize], values: &[f32]) -> String {
        let name = self.name(what);
        self.graph.initializers.insert(name.clone(), f32_tensor(&name, shape, values));
        name
    }

    fn numbers(&mut self, what: &str, shape: &[usize], from: usize, count: usize) -> String {
        let values: Vec<f32> = (from..from + count).map(|v| v as f32).collect();
        self.floats(what, shape, &values)
    }

    fn reshape(&mut self, what: &str, value: &str, shape: &[i64]) -> String {
        let to = self.integers(&format!("{what}_shape"), &[shape.len()], shape);
        self.node(what, "Reshape", &[value, &to], vec![])
    }

    fn add(&mut self, what: &str, value: &str, number: f32) -> String {
        let c = self.floats(&format!("{what}_by"), &[], &[number]);
        self.node(what, "Add", &[value, &c], vec![])
    }

    /// The places of the largest `count` of the last axis.
    fn top(&mut self, what: &str, value: &str, count: usize) -> (String, String) {
        let k = self.integers(&format!("{what}_count"), &[1], &[count as i64]);
        let (largest, at) = (self.name(&format!("{what}_value")), self.name(what));
        let attributes = vec![attr::int("axis", -1), attr::int("largest", 1), attr::int("sorted", 1)];
        let node = NodeProto::of("TopK", &[value, &k], &[&largest, &at], attributes);
        self.nodes.push(NodeProto { name: Some(at.clone()), ..node });
        (largest, at)
    }

    fn sum(&mut self, what: &str, value: &str, axis: i64, keep: bool) -> String {
        let axes = self.integers(&format!("{what}_axes"), &[1], &[axis]);
        self.node(what, "ReduceSum", &[value, &axes], vec![attr::int("keepdims", keep.into())])
    }

    fn cast(&mut self, what: &str, value: &str) -> String {
        self.node(what, "Cast", &[value], vec![attr::int("to", DType::Float as i64)])
    }
}

/// Writes one merging: tokens are matched by their keys as in the paper, and become their mean weighted by size.
pub fn merge(graph: &mut Graph, p: &Place<'_>) -> Merged {
    let rest = p.tokens - p.prefix;
    let (na, nb) = (rest.div_ceil(2), rest / 2);
    let left = p.prefix + na - p.merged;
    let prefix = format!("{}.merge", p.values);
    let mut w = Pen { graph, prefix, nodes: vec![] };
    // The paper's mean over the heads points where their sum does.
    let keys = w.sum("keys", p.keys, 1, false);
    let squares = w.node("squares", "Mul", &[&keys, &keys], vec![]);
    let squares = w.sum("length2", &squares, 1, true);
    let squares = w.add("length2_above_0", &squares, EPSILON);
    let length = w.node("length", "Sqrt", &[&squares], vec![]);
    let unit = w.node("unit", "Div", &[&keys, &length], vec![]);
    let side = |w: &mut Pen<'_>, what: &str, from: usize| {
        let tokens: Vec<i64> = (p.prefix + from..p.tokens).step_by(2).map(|i| i as i64).collect();
        let tokens = w.integers(&format!("{what}_tokens"), &[tokens.len()], &tokens);
        w.node(what, "Gather", &[&unit, &tokens], vec![attr::int("axis", 2)])
    };
    let first = side(&mut w, "first", 0);
    let first = w.node("first_rows", "Transpose", &[&first], vec![attr::ints("perm", &[0, 2, 1])]);
    let second = side(&mut w, "second", 1);
    let scores = w.node("scores", "MatMul", &[&first, &second], vec![]);
    let (best, partner) = w.top("partner", &scores, 1);
    let best = w.reshape("best", &best, &[1, na as i64]);
    let (_, chosen) = w.top("chosen", &best, p.merged);
    // Which of the first side are gone: 1, else 0.
    let chosen = w.reshape("chosen_rows", &chosen, &[1, p.merged as i64, 1]);
    let all: Vec<i64> = (0..na as i64).collect();
    let all = w.integers("firsts", &[1, 1, na], &all);
    let hits = w.node("hits", "Equal", &[&chosen, &all], vec![]);
    let hits = w.cast("hits_float", &hits);
    let gone = w.sum("gone", &hits, 1, false);
    let one = w.floats("one", &[], &[1.0]);
    let kept = w.node("kept", "Sub", &[&one, &gone], vec![]);
    // Where each token goes: to its partner, or in order behind the protected ones.
    let axis = w.integers("axis", &[], &[1]);
    let count = w.node("count", "CumSum", &[&kept, &axis], vec![]);
    let place = w.add("place", &count, p.prefix as f32 - 1.0);
    let partner = w.cast("partner_float", &partner);
    let partner = w.reshape("partner_row", &partner, &[1, na as i64]);
    let partner = w.add("partner_place", &partner, left as f32);
    let joins = w.node("joins", "Mul", &[&gone, &partner], vec![]);
    let stays = w.node("stays", "Mul", &[&kept, &place], vec![]);
    let firsts = w.node("first_places", "Add", &[&joins, &stays], vec![]);
    let seconds = w.numbers("second_places", &[1, nb], left, nb);
    let mut sides = vec![];
    if p.prefix > 0 {
        sides.push(w.numbers("prefix_places", &[1, p.prefix], 0, p.prefix));
    }
    sides.extend([firsts, seconds]);
    let sides: Vec<&str> = sides.iter().map(String::as_str).collect();
    let sides = w.node("sides", "Concat", &sides, vec![attr::int("axis", 1)]);
    let position = |i: usize| match i.checked_sub(p.prefix) {
        None => i,
        Some(i) => p.prefix + i / 2 + (i % 2) * na,
    };
    let order: Vec<i64> = (0..p.tokens).map(|i| position(i) as i64).collect();
    let order = w.integers("order", &[p.tokens], &order);
    let places = w.node("places", "Gather", &[&sides, &order], vec![attr::int("axis", 1)]);
    // A product with zeros and ones gathers them.
    let row = w.reshape("places_row", &places, &[1, 1, p.tokens as i64]);
    let after = p.tokens - p.merged;
    let numbers = w.numbers("numbers", &[1, after, 1], 0, after);
    let matrix = w.node("matrix_bool", "Equal", &[&row, &numbers], vec![]);
    let matrix = w.cast("matrix", &matrix);
    let (sizes, weighted) = match p.sizes {
        Some(s) => {
            let weighted = w.node("weighted", "Mul", &[p.values, s], vec![]);
            (w.node("sizes", "MatMul", &[&matrix, s], vec![]), weighted)
        }
        None => (w.sum("sizes", &matrix, 2, true), p.values.to_string()),
    };
    let sums = w.node("sums", "MatMul", &[&matrix, &weighted], vec![]);
    let values = w.node("tokens", "Div", &[&sums, &sizes], vec![]);
    Merged { nodes: w.nodes, values, sizes }
}

/// Adds the logarithm of the sizes to scores `[…][tokens]` (proportional attention); returns the nodes and their result.
pub fn proportional(graph: &mut Graph, scores: &str, sizes: &str, tokens: usize) -> (Vec<NodeProto>, String) {
    let prefix = format!("{scores}.merge");
    let mut w = Pen { graph, prefix, nodes: vec![] };
    let logarithm = w.node("log_sizes", "Log", &[sizes], vec![]);
    let row = w.reshape("log_sizes_row", &logarithm, &[1, 1, 1, tokens as i64]);
    let sum = w.node("scores", "Add", &[scores, &row], vec![]);
    (w.nodes, sum)
}

/// Weighs tokens from `from` on, so that their plain mean is the mean of what they were before they were merged;
/// returns the nodes and their result.
pub fn weighted(
    graph: &mut Graph,
    values: &str,
    sizes: &str,
    from: usize,
    [before, after]: [usize; 2],
) -> (Vec<NodeProto>, String) {
    let prefix = format!("{values}.merge");
    let mut w = Pen { graph, prefix, nodes: vec![] };
    let mut sizes = sizes.to_string();
    if from > 0 {
        let [starts, ends, axes] =
            [("starts", from as i64), ("ends", i64::MAX), ("axes", 1)].map(|(n, v)| w.integers(n, &[1], &[v]));
        sizes = w.node("sizes", "Slice", &[&sizes, &starts, &ends, &axes], vec![]);
    }
    let factor = w.floats("factor", &[], &[after as f32 / before as f32]);
    let share = w.node("share", "Mul", &[&sizes, &factor], vec![]);
    let product = w.node("weighted", "Mul", &[values, &share], vec![]);
    (w.nodes, product)
}

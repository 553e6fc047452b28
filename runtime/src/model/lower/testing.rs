//! Graphs for tests, written node by node.

use crate::model::card::SelfTest;
use crate::model::plan::How;
use crate::onnx::proto::OperatorSetIdProto;
use crate::onnx::{
    AttributeProto, DType, Graph, ModelProto, NodeProto, attr, elements, f32_tensor, i64_tensor, tensor, value_info,
};
use crate::{Options, Session};
use ndarray::ArrayD;
use prost::Message;

/// A graph that is written node by node.
pub struct Builder(pub Graph);

impl Builder {
    /// With an input `x` of this shape.
    pub fn new(shape: &[usize]) -> Builder {
        let opset = OperatorSetIdProto { version: Some(17), ..Default::default() };
        let header = ModelProto {
            ir_version: Some(8),
            opset_import: vec![opset],
            graph: Some(Default::default()),
            ..Default::default()
        };
        let mut g = Graph::decode(header.encode_to_vec().into(), None).unwrap();
        g.inputs.push(value_info("x", DType::Float, shape));
        Builder(g)
    }

    /// Adds a node; returns its output.
    pub fn node(&mut self, op: &str, inputs: &[&str], attributes: Vec<AttributeProto>, shape: &[usize]) -> String {
        let name = format!("v{}", self.0.nodes.len());
        self.0.nodes.push(NodeProto::of(op, inputs, &[&name], attributes));
        self.0.value_info.insert(name.clone(), value_info(&name, DType::Float, shape));
        name
    }

    pub fn floats(&mut self, shape: &[usize]) -> String {
        let name = self.0.fresh("f");
        let values = SelfTest::input(self.0.initializers.len() as u64, shape.iter().product());
        self.0.initializers.insert(name.clone(), f32_tensor(&name, shape, &values));
        name
    }

    pub fn ints(&mut self, values: &[i64]) -> String {
        let name = self.0.fresh("i");
        self.0.initializers.insert(name.clone(), i64_tensor(&name, &[values.len()], values));
        name
    }

    pub fn reshape(&mut self, x: &str, shape: &[usize]) -> String {
        let to = self.ints(&shape.iter().map(|&d| d as i64).collect::<Vec<_>>());
        self.node("Reshape", &[x, &to], vec![], shape)
    }

    pub fn transpose(&mut self, x: &str, perm: &[i64], shape: &[usize]) -> String {
        self.node("Transpose", &[x], vec![attr::ints("perm", perm)], shape)
    }

    pub fn layer(&mut self, x: &str, shape: &[usize], n: usize) -> String {
        let (&k, leading) = shape.split_last().unwrap();
        let (w, b, shape) = (self.floats(&[k, n]), self.floats(&[n]), [leading, &[n]].concat());
        let y = self.node("MatMul", &[x, &w], vec![], &shape);
        self.node("Add", &[&y, &b], vec![], &shape)
    }

    /// The graph with these outputs.
    pub fn finish(mut self, outputs: &[&str]) -> Graph {
        let output = |name: &&str| value_info(name, DType::Float, &self.0.shape(name).unwrap());
        self.0.outputs = outputs.iter().map(output).collect();
        self.0
    }

    /// Attention of heads of `q k v`, `[batch][tokens][3 · heads · dim]`; `[batch][tokens][heads · dim]`.
    pub fn attention(&mut self, qkv: &str, sizes: [usize; 4]) -> String {
        self.attention_by(qkv, sizes, |_, scores| scores)
    }

    /// As [`Builder::attention`]; `steps` come before the softmax.
    pub fn attention_by(
        &mut self,
        qkv: &str,
        [batch, tokens, heads, dim]: [usize; 4],
        steps: impl Fn(&mut Builder, String) -> String,
    ) -> String {
        let qkv = self.reshape(qkv, &[batch, tokens, 3, heads, dim]);
        let qkv = self.transpose(&qkv, &[2, 0, 3, 1, 4], &[3, batch, heads, tokens, dim]);
        let shape = [batch, heads, tokens, dim];
        let [q, k, v] = [0, 1, 2].map(|i| self.pick(&qkv, 0, i, &shape));
        let k = self.transpose(&k, &[0, 1, 3, 2], &[batch, heads, dim, tokens]);
        let scores = self.node("MatMul", &[&q, &k], vec![], &[batch, heads, tokens, tokens]);
        let scores = steps(self, scores);
        let p = self.node("Softmax", &[&scores], vec![attr::int("axis", -1)], &[batch, heads, tokens, tokens]);
        let y = self.node("MatMul", &[&p, &v], vec![], &shape);
        let y = self.transpose(&y, &[0, 2, 1, 3], &[batch, tokens, heads, dim]);
        self.reshape(&y, &[batch, tokens, heads * dim])
    }

    /// An element of an axis, which goes.
    pub fn pick(&mut self, x: &str, axis: i64, element: i64, shape: &[usize]) -> String {
        let at = self.0.fresh("g");
        self.0.initializers.insert(at.clone(), i64_tensor(&at, &[], &[element]));
        self.node("Gather", &[x, &at], vec![attr::int("axis", axis)], shape)
    }

    /// Rounds to multiples of 1/32 as 8-bit integers.
    pub fn round(&mut self, x: &str, shape: &[usize]) -> String {
        let [scale, zero] = ["scale", "zero"].map(|name| self.0.fresh(name));
        self.0.initializers.insert(scale.clone(), f32_tensor(&scale, &[], &[1. / 32.]));
        self.0.initializers.insert(zero.clone(), tensor(&zero, DType::Uint8, &[], vec![128]));
        let q = self.node("QuantizeLinear", &[x, &scale, &zero], vec![], shape);
        self.0.value_info.insert(q.clone(), value_info(&q, DType::Uint8, shape));
        self.node("DequantizeLinear", &[&q, &scale, &zero], vec![], shape)
    }

    /// Weights as 8-bit integers, multiples of 1/128.
    pub fn quantized(&mut self, shape: &[usize]) -> String {
        let [w, scale, zero] = ["w", "scale", "zero"].map(|name| self.0.fresh(name));
        let values = SelfTest::input(self.0.initializers.len() as u64, shape.iter().product());
        let bytes = values.iter().map(|v| ((v * 127.) as i8).cast_unsigned()).collect();
        self.0.initializers.insert(w.clone(), tensor(&w, DType::Int8, shape, bytes));
        self.0.initializers.insert(scale.clone(), f32_tensor(&scale, &[], &[1. / 128.]));
        self.0.initializers.insert(zero.clone(), tensor(&zero, DType::Int8, &[], vec![0]));
        self.node("DequantizeLinear", &[&w, &scale, &zero], vec![], shape)
    }

    /// LayerNorm over the last axis.
    pub fn norm(&mut self, x: &str, shape: &[usize]) -> String {
        let width = &shape[shape.len() - 1..];
        let (gamma, beta) = (self.floats(width), self.floats(width));
        self.node("LayerNormalization", &[x, &gamma, &beta], vec![attr::int("axis", -1)], shape)
    }
}

/// Compares what a graph computes with what tract makes of it; the classes of what runs, but for what only renames data.
pub fn agrees_with_tract(g: &Graph) -> Vec<String> {
    let shape = g.shape("x").unwrap();
    let x = ArrayD::from_shape_vec(shape.as_slice(), SelfTest::input(99, elements(&shape))).unwrap();
    let run = |options: Options| {
        let mut session = Session::from_graph(g.clone(), &options).unwrap();
        (session.run(std::slice::from_ref(&x)).unwrap(), session)
    };
    let (want, _) = run(Options { fuse: false, ..Options::default() });
    let mut classes = vec![];
    for threads in [1, 2, 8] {
        let (got, session) = run(Options { threads, ..Options::default() });
        let pairs = got.iter().flatten().zip(want.iter().flatten());
        let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0., f32::max);
        assert!(worst < 1e-4, "{worst} with {threads} threads");
        let runs = session.plan().iter().filter(|l| l.how != How::Layout);
        classes = runs.map(|l| l.class.clone()).collect();
    }
    classes
}

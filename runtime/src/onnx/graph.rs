//! The main graph of a model: nodes in execution order, initializers by name.

use super::proto::{AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto};
use super::tensor::{DType, to_f32, to_i64};
use crate::error::{Error, Result};
use crate::files::{self, Mapping};
use bytes::Bytes;
use prost::Message;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

/// An ONNX model taken apart for editing. `Constant` nodes are read as initializers and graph inputs that have an
/// initializer (IR < 4) are dropped, so a value is either a graph input, an initializer, or a node's output.
#[derive(Clone, Debug)]
pub struct Graph {
    /// Everything of the file that is not its main graph: IR version, opsets, metadata, local functions.
    pub header: ModelProto,
    /// Name of the graph.
    pub name: String,
    /// Nodes, in an order in which every input is produced before it is used.
    pub nodes: Vec<NodeProto>,
    /// Constants by name.
    pub initializers: BTreeMap<String, TensorProto>,
    /// Graph inputs, in order.
    pub inputs: Vec<ValueInfoProto>,
    /// Graph outputs, in order.
    pub outputs: Vec<ValueInfoProto>,
    /// Types and shapes of inner values, by name, where the file states them.
    pub value_info: BTreeMap<String, ValueInfoProto>,
    /// The file, where the constants lie in its memory.
    file: Option<Mapping>,
}

impl Graph {
    /// Reads a model, external data included.
    ///
    /// # Errors
    /// [`Error::Read`] when the file or its external data cannot be read, [`Error::BadModel`] when it is no ONNX model.
    pub fn read(path: &Path) -> Result<Graph> {
        let file = Mapping::of(path)?;
        let graph = Self::decode(file.bytes(), path.parent()).map_err(|e| e.in_file(path))?;
        Ok(Graph { file: Some(file), ..graph })
    }

    /// Reads a model from memory; `dir` is where external data lives.
    ///
    /// # Errors
    /// As [`Graph::read`].
    pub fn decode(bytes: Bytes, dir: Option<&Path>) -> Result<Graph> {
        if bytes.is_empty() {
            return Err(Error::BadModel("the file is empty".into()));
        }
        let mut header = ModelProto::decode(bytes)
            .map_err(|e| Error::BadModel(format!("not an ONNX model, or a damaged one ({e})")))?;
        let graph = header.graph.take().ok_or_else(|| Error::BadModel("no graph: not an ONNX model".into()))?;
        let mut g = Graph {
            header,
            name: graph.name.unwrap_or_default(),
            nodes: graph.node,
            initializers: BTreeMap::new(),
            inputs: graph.input,
            outputs: graph.output,
            value_info: graph.value_info.into_iter().map(|v| (v.name().to_string(), v)).collect(),
            file: None,
        };
        for t in graph.initializer {
            g.initializers.insert(t.name().to_string(), t);
        }
        g.hoist_constants()?;
        for t in g.initializers.values_mut() {
            resolve_external(t, dir)?;
        }
        g.inputs.retain(|i| !g.initializers.contains_key(i.name()));
        Ok(g)
    }

    /// Gives back the memory of a constant that has been copied elsewhere; it can still be read, from the file.
    pub fn forget(&self, t: &TensorProto) {
        if let Some(file) = &self.file {
            file.forget(t.raw_data());
        }
    }

    fn hoist_constants(&mut self) -> Result<()> {
        let nodes = std::mem::take(&mut self.nodes);
        for mut n in nodes {
            if n.op_type() != "Constant" || !n.domain().is_empty() {
                self.nodes.push(n);
                continue;
            }
            let name = n.output.first().cloned().unwrap_or_default();
            let a = n
                .attribute
                .first_mut()
                .ok_or_else(|| Error::BadModel(format!("Constant `{name}` has no value: the file is damaged")))?;
            let t = match a.name() {
                "value" => a.t.take(),
                "value_float" => Some(super::f32_tensor(&name, &[], &[a.f()])),
                "value_floats" => Some(super::f32_tensor(&name, &[a.floats.len()], &a.floats)),
                "value_int" => Some(super::i64_tensor(&name, &[], &[a.i()])),
                "value_ints" => Some(super::i64_tensor(&name, &[a.ints.len()], &a.ints)),
                _ => None,
            };
            match t {
                Some(mut t) => {
                    t.name = Some(name.clone());
                    self.initializers.insert(name, t);
                }
                None => self.nodes.push(n),
            }
        }
        Ok(())
    }

    /// The file's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut model = self.header.clone();
        model.graph = Some(GraphProto {
            name: Some(self.name.clone()),
            node: self.nodes.clone(),
            initializer: self.initializers.values().cloned().collect(),
            input: self.inputs.clone(),
            output: self.outputs.clone(),
            value_info: self.value_info.values().cloned().collect(),
            ..GraphProto::default()
        });
        model.encode_to_vec()
    }

    /// Writes the model: to a temporary file beside `path`, then renamed over it.
    ///
    /// # Errors
    /// [`Error::Write`]; what was at `path` is untouched then.
    pub fn write(&self, path: &Path) -> Result<()> {
        files::write_atomic(path, &self.encode())
    }

    /// Version of the default operator set.
    pub fn opset(&self) -> i64 {
        let default = |d: &str| d.is_empty() || d == "ai.onnx";
        self.header.opset_import.iter().find(|o| default(o.domain())).map_or(0, |o| o.version())
    }

    /// Sets the version of the default operator set.
    pub fn set_opset(&mut self, version: i64) {
        for o in &mut self.header.opset_import {
            if o.domain().is_empty() || o.domain() == "ai.onnx" {
                o.version = Some(version);
            }
        }
    }

    /// The value of a `metadata_props` key.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.header.metadata_props.iter().find(|p| p.key() == key).map(|p| p.value())
    }

    /// Sets a `metadata_props` key.
    pub fn set_metadata(&mut self, key: &str, value: String) {
        self.header.metadata_props.retain(|p| p.key() != key);
        self.header
            .metadata_props
            .push(super::proto::StringStringEntryProto { key: Some(key.into()), value: Some(value) });
    }

    /// Constant floats by value name; `None` when the value is not a constant float.
    pub fn const_f32(&self, name: &str) -> Option<Vec<f32>> {
        self.initializers.get(name).and_then(|t| to_f32(t).ok())
    }

    /// Constant integers by value name; `None` when the value is not a constant integer.
    pub fn const_i64(&self, name: &str) -> Option<Vec<i64>> {
        self.initializers.get(name).and_then(|t| to_i64(t).ok())
    }

    /// The single float of a constant scalar (or one-element tensor).
    pub fn const_scalar(&self, name: &str) -> Option<f32> {
        self.const_f32(name).filter(|v| v.len() == 1).map(|v| v[0])
    }

    /// Element type and shape of any value, where known and fixed.
    pub fn fact(&self, name: &str) -> Option<(DType, Vec<usize>)> {
        if let Some(t) = self.initializers.get(name) {
            return Some((t.dtype(), super::shape_of(t)));
        }
        let info =
            self.value_info.get(name).or_else(|| self.inputs.iter().chain(&self.outputs).find(|i| i.name() == name))?;
        info.fixed()
    }

    /// Shape of any value, where known and fixed.
    pub fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.fact(name).map(|f| f.1)
    }

    /// A value name that nothing uses yet.
    pub fn fresh(&self, prefix: &str) -> String {
        let taken: HashSet<&str> = self.value_names().collect();
        if !taken.contains(prefix) {
            return prefix.into();
        }
        (1..).map(|i| format!("{prefix}_{i}")).find(|n| !taken.contains(n.as_str())).expect("names do not run out")
    }

    fn value_names(&self) -> impl Iterator<Item = &str> {
        let outputs = self.nodes.iter().flat_map(|n| n.output.iter().map(String::as_str));
        let constants = self.initializers.keys().map(String::as_str);
        let stated = self.value_info.keys().map(String::as_str);
        constants.chain(outputs).chain(stated).chain(self.inputs.iter().map(|i| i.name()))
    }

    /// Makes every use of `old` (graph outputs excepted) use `new`.
    pub fn replace_uses(&mut self, old: &str, new: &str) {
        for n in &mut self.nodes {
            for i in &mut n.input {
                if i == old {
                    *i = new.into();
                }
            }
        }
    }

    /// Drops nodes, initializers and value infos that no graph output needs.
    pub fn prune_unused(&mut self) {
        let mut needed: HashSet<String> = self.outputs.iter().map(|o| o.name().to_string()).collect();
        let mut keep = vec![false; self.nodes.len()];
        for (i, n) in self.nodes.iter().enumerate().rev() {
            if n.output.iter().any(|o| needed.contains(o)) {
                keep[i] = true;
                needed.extend(n.input.iter().cloned());
                n.attribute.iter().for_each(|a| captured(a, &mut needed));
            }
        }
        let mut k = keep.into_iter();
        self.nodes.retain(|_| k.next().unwrap_or(false));
        self.initializers.retain(|name, _| needed.contains(name));
        let produced: HashSet<&String> = self.nodes.iter().flat_map(|n| &n.output).collect();
        self.value_info.retain(|name, _| produced.contains(name));
    }

    /// Orders nodes so that every input is produced before it is used.
    ///
    /// # Errors
    /// [`Error::BadModel`] on a cycle or an input that nothing produces.
    pub fn sort(&mut self) -> Result<()> {
        let mut known: HashSet<String> = self.initializers.keys().cloned().collect();
        known.extend(self.inputs.iter().map(|i| i.name().to_string()));
        known.insert(String::new());
        let mut left = std::mem::take(&mut self.nodes);
        while !left.is_empty() {
            let before = left.len();
            for n in std::mem::take(&mut left) {
                let mut inner = HashSet::new();
                n.attribute.iter().for_each(|a| captured(a, &mut inner));
                // Names produced inside a subgraph are not ours to wait for.
                let waits = n.input.iter().any(|i| !known.contains(i));
                if waits {
                    left.push(n);
                } else {
                    known.extend(n.output.iter().cloned());
                    self.nodes.push(n);
                }
            }
            if left.len() == before {
                let n = &left[0];
                let missing = n.input.iter().find(|i| !known.contains(*i)).cloned().unwrap_or_default();
                return Err(Error::BadModel(format!(
                    "node `{}` ({}) needs `{missing}`, which nothing produces before it",
                    n.name(),
                    n.op_type()
                )));
            }
        }
        Ok(())
    }
}

/// Names that the subgraphs of an attribute take from outside (a superset: inner names are included).
fn captured(a: &AttributeProto, into: &mut HashSet<String>) {
    for g in a.g.iter().chain(&a.graphs) {
        for n in &g.node {
            into.extend(n.input.iter().cloned());
            n.attribute.iter().for_each(|a| captured(a, into));
        }
        into.extend(g.output.iter().map(|o| o.name().to_string()));
    }
}

fn resolve_external(t: &mut TensorProto, dir: Option<&Path>) -> Result<()> {
    use super::proto::tensor_proto::DataLocation;
    if t.data_location() != DataLocation::External {
        return Ok(());
    }
    let entry = |k: &str| t.external_data.iter().find(|e| e.key() == k).map(|e| e.value().to_string());
    let name = t.name().to_string();
    let bad = |what: String| Error::BadModel(format!("external data of tensor `{name}`: {what}"));
    let location = entry("location").ok_or_else(|| bad("no location".into()))?;
    let inside = Path::new(&location).components().all(|c| matches!(c, std::path::Component::Normal(_)));
    if !inside {
        return Err(bad(format!("location `{location}` leads out of the model's folder")));
    }
    let path = dir.unwrap_or(Path::new(".")).join(&location);
    let data = files::map(&path).map_err(|e| bad(format!("{e}; it must lie beside the model, as exported")))?;
    let number = |k: &str| {
        entry(k).map_or(Ok(None), |v| v.parse::<usize>().map(Some).map_err(|_| bad(format!("bad {k} `{v}`"))))
    };
    let offset = number("offset")?.unwrap_or(0);
    let length = number("length")?.unwrap_or(data.len().saturating_sub(offset));
    let end = offset
        .checked_add(length)
        .filter(|&e| e <= data.len())
        .ok_or_else(|| bad(format!("{} holds {} bytes, {offset}+{length} are needed", path.display(), data.len())))?;
    t.raw_data = Some(data.slice(offset..end));
    t.external_data.clear();
    t.data_location = None;
    Ok(())
}

/// Who produces and who uses each value; valid until the graph is edited.
pub struct Uses {
    producer: HashMap<String, usize>,
    consumers: HashMap<String, Vec<usize>>,
    outputs: HashSet<String>,
}

impl Uses {
    /// Indexes a graph.
    pub fn of(g: &Graph) -> Uses {
        let mut producer = HashMap::new();
        let mut consumers: HashMap<String, Vec<usize>> = HashMap::new();
        for (i, n) in g.nodes.iter().enumerate() {
            for o in n.output.iter().filter(|o| !o.is_empty()) {
                producer.insert(o.clone(), i);
            }
            let mut used: HashSet<String> = n.input.iter().filter(|s| !s.is_empty()).cloned().collect();
            n.attribute.iter().for_each(|a| captured(a, &mut used));
            for u in used {
                consumers.entry(u).or_default().push(i);
            }
        }
        Uses { producer, consumers, outputs: g.outputs.iter().map(|o| o.name().to_string()).collect() }
    }

    /// Index of the node that produces a value.
    pub fn producer(&self, value: &str) -> Option<usize> {
        self.producer.get(value).copied()
    }

    /// Indices of the nodes that use a value, ascending.
    pub fn consumers(&self, value: &str) -> &[usize] {
        self.consumers.get(value).map_or(&[], Vec::as_slice)
    }

    /// The one node that uses a value; `None` if there are several or the value is a graph output.
    pub fn only_consumer(&self, value: &str) -> Option<usize> {
        match self.consumers(value) {
            [one] if !self.outputs.contains(value) => Some(*one),
            _ => None,
        }
    }

    /// Whether the value is a graph output.
    pub fn is_output(&self, value: &str) -> bool {
        self.outputs.contains(value)
    }
}

impl ValueInfoProto {
    /// Element type and shape, when every dimension is fixed.
    pub fn fixed(&self) -> Option<(DType, Vec<usize>)> {
        let dims = self.dims()?;
        let shape = dims.into_iter().collect::<Option<Vec<usize>>>()?;
        Some((self.dtype()?, shape))
    }

    /// Element type of a tensor value.
    pub fn dtype(&self) -> Option<DType> {
        use super::proto::type_proto::Value;
        match self.r#type.as_ref()?.value.as_ref()? {
            Value::TensorType(t) => DType::try_from(t.elem_type()).ok(),
            _ => None,
        }
    }

    /// Dimensions of a tensor value, `None` for each that is symbolic or absent.
    pub fn dims(&self) -> Option<Vec<Option<usize>>> {
        use super::proto::{tensor_shape_proto::dimension, type_proto::Value};
        match self.r#type.as_ref()?.value.as_ref()? {
            Value::TensorType(t) => Some(
                t.shape
                    .as_ref()?
                    .dim
                    .iter()
                    .map(|d| match d.value {
                        Some(dimension::Value::DimValue(v)) if v >= 0 => Some(v as usize),
                        _ => None,
                    })
                    .collect(),
            ),
            _ => None,
        }
    }
}

impl NodeProto {
    /// A node of the default domain; its name is the name of its first output.
    pub fn of(op_type: &str, inputs: &[&str], outputs: &[&str], attributes: Vec<AttributeProto>) -> NodeProto {
        NodeProto {
            op_type: Some(op_type.into()),
            name: Some(outputs.first().copied().unwrap_or_default().into()),
            input: inputs.iter().map(|s| s.to_string()).collect(),
            output: outputs.iter().map(|s| s.to_string()).collect(),
            attribute: attributes,
            ..NodeProto::default()
        }
    }

    /// An attribute by name.
    pub fn attr(&self, name: &str) -> Option<&AttributeProto> {
        self.attribute.iter().find(|a| a.name() == name)
    }

    /// An integer attribute, or the default.
    pub fn int(&self, name: &str, default: i64) -> i64 {
        self.attr(name).map_or(default, |a| a.i())
    }

    /// A float attribute, or the default.
    pub fn float(&self, name: &str, default: f32) -> f32 {
        self.attr(name).map_or(default, |a| a.f())
    }

    /// An integer list attribute.
    pub fn ints(&self, name: &str) -> Option<&[i64]> {
        self.attr(name).map(|a| a.ints.as_slice())
    }

    /// A string attribute, or the default.
    pub fn string<'a>(&'a self, name: &str, default: &'a str) -> &'a str {
        self.attr(name).and_then(|a| std::str::from_utf8(a.s()).ok()).unwrap_or(default)
    }

    /// The n-th input's name; empty when absent.
    pub fn input_name(&self, n: usize) -> &str {
        self.input.get(n).map_or("", String::as_str)
    }
}

/// Constructors of attributes.
pub mod attr {
    use super::super::proto::attribute_proto::AttributeType;
    use super::AttributeProto;

    fn of(name: &str, t: AttributeType) -> AttributeProto {
        AttributeProto { name: Some(name.into()), r#type: Some(t as i32), ..AttributeProto::default() }
    }

    /// An integer.
    pub fn int(name: &str, i: i64) -> AttributeProto {
        AttributeProto { i: Some(i), ..of(name, AttributeType::Int) }
    }

    /// A float.
    pub fn float(name: &str, f: f32) -> AttributeProto {
        AttributeProto { f: Some(f), ..of(name, AttributeType::Float) }
    }

    /// A list of integers.
    pub fn ints(name: &str, ints: &[i64]) -> AttributeProto {
        AttributeProto { ints: ints.to_vec(), ..of(name, AttributeType::Ints) }
    }

    /// A string.
    pub fn string(name: &str, s: &str) -> AttributeProto {
        AttributeProto { s: Some(s.as_bytes().to_vec()), ..of(name, AttributeType::String) }
    }
}

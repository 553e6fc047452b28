//! A lowered graph as a tract plan: our operators as they are, every other node through tract's ONNX reader, one node
//! at a time with the types and shapes already known. tract's own analysis of the whole graph is not needed.

use super::check;
use super::lower::{DOMAIN, Lowered, fused_index};
use super::ops::{Fused, FusedOp};
use crate::error::{Error, Result};
use crate::exec::Exec;
use crate::guard::caught;
use crate::onnx::{DType, Graph, NodeProto, ValueInfoProto, value_info};
use prost::Message;
use std::borrow::Cow;
use std::collections::HashMap;
use tract_onnx::model::{Onnx, ParsingContext};
use tract_onnx::pb;
use tract_onnx::prelude::*;
use tract_onnx::tract_hir::internal::*;

/// Builds the typed model; inputs and outputs are those of the graph, in order.
///
/// # Errors
/// [`Error::Unsupported`] with the node's name and operator when tract does not take it.
pub fn wire(lowered: Lowered, exec: &Arc<Exec>) -> Result<TypedModel> {
    wire_or(lowered, exec, &mut |_, _, e| Err(e))
}

/// As [`wire`], but `failed` is told of each node that cannot be wired (its index, itself, why) and may let the rest
/// go on with what the file states of its outputs. Nodes that lack such a statement fail in turn.
pub fn wire_or(
    lowered: Lowered,
    exec: &Arc<Exec>,
    failed: &mut dyn FnMut(usize, &NodeProto, Error) -> Result<()>,
) -> Result<TypedModel> {
    let Lowered { mut graph, fused, .. } = lowered;
    let mut fused: Vec<Option<Fused>> = fused.into_iter().map(Some).collect();
    let onnx = tract_onnx::onnx();
    let nodes = std::mem::take(&mut graph.nodes);
    let mut w = Wiring { onnx: &onnx, exec, model: TypedModel::default(), values: HashMap::new() };
    for i in &graph.inputs {
        let fact = input_fact(i)?;
        let outlet = w.model.add_source(i.name(), fact).map_err(|e| Error::Engine(format!("{e:#}")))?;
        w.values.insert(i.name().into(), outlet);
    }
    let header = header(&graph)?;
    for (index, n) in nodes.iter().enumerate() {
        for input in n.input.iter().filter(|i| !i.is_empty()) {
            w.constant(&graph, input)?;
        }
        let wired = match fused_index(n) {
            Some(i) => w.fused(&graph, n, fused[i].take().expect("an operator stands for one node")),
            None => w.guarded_node(&header, graph.opset(), n).map_err(|e| unsupported(n, &e)),
        };
        if let Err(e) = wired {
            failed(index, n, e)?;
            w.stand_in(&graph, n)?;
        }
    }
    let mut outputs = vec![];
    for o in &graph.outputs {
        w.constant(&graph, o.name())?;
        let outlet = w.values.get(o.name()).copied();
        outputs.push(outlet.ok_or_else(|| Error::BadModel(format!("nothing produces the output `{}`", o.name())))?);
    }
    w.model.select_output_outlets(&outputs).map_err(|e| Error::Engine(format!("{e:#}")))?;
    Ok(w.model)
}

/// States the type and shape of every value that a graph does not tell, as far as tract can derive them: up to the first
/// operator that it cannot run.
pub fn annotate(graph: &mut Graph, exec: &Arc<Exec>) {
    let onnx = tract_onnx::onnx();
    let Ok(header) = header(graph) else { return };
    let mut w = Wiring { onnx: &onnx, exec, model: TypedModel::default(), values: HashMap::new() };
    for i in &graph.inputs {
        let source = input_fact(i).ok().and_then(|fact| w.model.add_source(i.name(), fact).ok());
        w.values.extend(source.map(|outlet| (i.name().to_string(), outlet)));
    }
    let mut found = vec![];
    for n in &graph.nodes {
        // tract wants a constant scale; the shape does not depend on it.
        if n.op_type() == "DequantizeLinear" {
            let _ = w.constant(graph, n.input_name(0));
            let source = w.values.get(n.input_name(0)).and_then(|outlet| w.model.outlet_fact(*outlet).ok());
            let Some(shape) = source.and_then(|f| f.shape.as_concrete()).map(<[usize]>::to_vec) else { break };
            let stated = value_info(&n.output[0], DType::Float, &shape);
            let Ok(outlet) = w.model.add_source(&n.output[0], f32::fact(&shape)) else { break };
            w.values.insert(n.output[0].clone(), outlet);
            found.push(stated);
            continue;
        }
        let constants = n.input.iter().filter(|i| !i.is_empty()).try_for_each(|i| w.constant(graph, i));
        if constants.is_err() || w.guarded_node(&header, graph.opset(), n).is_err() {
            break;
        }
        for o in n.output.iter().filter(|o| !o.is_empty()) {
            let fact = w.values.get(o).and_then(|outlet| w.model.outlet_fact(*outlet).ok());
            let stated = fact.and_then(|f| Some((onnx_type(f.datum_type)?, f.shape.as_concrete()?)));
            found.extend(stated.map(|(dtype, shape)| value_info(o, dtype, shape)));
        }
    }
    for v in found {
        graph.value_info.insert(v.name().to_string(), v);
    }
}

fn onnx_type(t: DatumType) -> Option<DType> {
    Some(match t {
        DatumType::F32 => DType::Float,
        DatumType::F16 => DType::Float16,
        DatumType::I64 | DatumType::TDim => DType::Int64,
        DatumType::I32 => DType::Int32,
        DatumType::Bool => DType::Bool,
        DatumType::I8 | DatumType::QI8(_) => DType::Int8,
        DatumType::U8 | DatumType::QU8(_) => DType::Uint8,
        DatumType::I16 => DType::Int16,
        DatumType::U16 => DType::Uint16,
        _ => return None,
    })
}

/// tract may panic on graphs it does not expect; that is an error of the model, not of this program.
pub fn guarded<T>(doing: impl Into<Cow<'static, str>>, f: impl FnOnce() -> TractResult<T>) -> TractResult<T> {
    caught(doing, f).unwrap_or_else(|panic| Err(format_err!("{panic}")))
}

fn told(n: &NodeProto) -> String {
    let op = if n.domain().is_empty() { n.op_type().to_string() } else { format!("{}.{}", n.domain(), n.op_type()) };
    let name = if n.name().is_empty() { n.output.first().map_or("", String::as_str) } else { n.name() };
    format!("operator {op} (node `{name}`)")
}

fn unsupported(n: &NodeProto, e: &TractError) -> Error {
    Error::Unsupported {
        what: format!("{} cannot run: {e:#}", told(n)),
        hint: "convert the float model with `vedge convert`, which folds and rewrites what it can; \
               `vedge inspect MODEL` lists the operators"
            .into(),
    }
}

fn input_fact(i: &ValueInfoProto) -> Result<TypedFact> {
    let (dtype, shape) = i.fixed().ok_or_else(|| Error::Unsupported {
        what: format!("input `{}` has no fixed shape", i.name()),
        hint: "freeze it first: vedge convert MODEL -o OUT --size N".into(),
    })?;
    let dt: DatumType = tract_onnx::pb::tensor_proto::DataType::try_from(dtype as i32)
        .ok()
        .and_then(|d| DatumType::try_from(d).ok())
        .ok_or_else(|| Error::BadModel(format!("input `{}` has element type {dtype:?}", i.name())))?;
    Ok(dt.fact(shape.as_slice()))
}

/// A protobuf message of ours as tract's (an older version of the same schema).
fn translate<T: Message + Default>(m: &impl Message) -> Result<T> {
    T::decode(m.encode_to_vec().as_slice()).map_err(|e| Error::BadModel(e.to_string()))
}

/// What tract's reader wants to see of the model that a node comes from; its nodes and constants are not needed.
fn header(graph: &Graph) -> Result<pb::ModelProto> {
    let none = Some(crate::onnx::proto::GraphProto::default());
    translate(&crate::onnx::ModelProto { graph: none, ..graph.header.clone() })
}

struct Wiring<'a> {
    onnx: &'a Onnx,
    exec: &'a Arc<Exec>,
    model: TypedModel,
    values: HashMap<String, OutletId>,
}

impl Wiring<'_> {
    /// Makes an initializer a constant of the model when something first uses it.
    fn constant(&mut self, graph: &Graph, name: &str) -> Result<()> {
        if self.values.contains_key(name) {
            return Ok(());
        }
        let Some(t) = graph.initializers.get(name) else { return Ok(()) };
        let proto = translate::<pb::TensorProto>(t)?;
        graph.forget(t);
        let load = || -> TractResult<OutletId> {
            let tensor = tract_onnx::tensor::load_tensor(&*self.onnx.provider, &proto, None)?;
            self.model.add_const(name, tensor)
        };
        let outlet = guarded(format!("loading tensor `{name}`"), load)
            .map_err(|e| Error::BadModel(format!("tensor `{name}`: {e:#}")))?;
        self.values.insert(name.into(), outlet);
        Ok(())
    }

    /// Sources in place of a node's outputs, as the file states them.
    fn stand_in(&mut self, graph: &Graph, n: &NodeProto) -> Result<()> {
        for o in n.output.iter().filter(|o| !o.is_empty()) {
            let stated = graph.value_info.get(o).or_else(|| graph.outputs.iter().find(|v| v.name() == o));
            let Some(Ok(fact)) = stated.map(input_fact) else { continue };
            let outlet = self.model.add_source(o, fact).map_err(|e| Error::Engine(format!("{e:#}")))?;
            self.values.insert(o.clone(), outlet);
        }
        Ok(())
    }

    fn inputs(&self, n: &NodeProto) -> TractResult<TVec<OutletId>> {
        let find = |i: &String| self.values.get(i).copied().with_context(|| format!("nothing produces `{i}`"));
        n.input.iter().filter(|i| !i.is_empty()).map(find).collect()
    }

    /// The kernels index by shape, so the shapes that the file states are held against those that tract derives.
    fn fused(&mut self, graph: &Graph, n: &NodeProto, fused: Fused) -> Result<()> {
        let output = &n.output[0];
        let bad = |what: String| Error::BadModel(format!("{} `{output}`: {what}: the file is damaged", fused.class()));
        let engine = |e: TractError| Error::Engine(format!("{output}: {e:#}"));
        let shape = graph.shape(output).ok_or_else(|| bad("no shape".into()))?;
        let outlets = self.inputs(n).map_err(engine)?;
        let mut inputs = vec![];
        for (name, outlet) in n.input.iter().zip(&outlets) {
            let fact = self.model.outlet_fact(*outlet).map_err(engine)?;
            match fact.shape.as_concrete() {
                Some(shape) if fact.datum_type == f32::datum_type() && graph.shape(name).as_deref() == Some(shape) => {
                    inputs.push(shape.to_vec());
                }
                _ => {
                    let stated = graph.shape(name).unwrap_or_default();
                    return Err(bad(format!("`{name}` is stated as float {stated:?}, but it is {fact:?}")));
                }
            }
        }
        fused.check(&inputs, &shape).map_err(bad)?;
        let op = FusedOp { fused: Arc::new(fused), exec: Arc::clone(self.exec), shape: shape.into() };
        let outlets = self.model.wire_node(output, op, &outlets).map_err(engine)?;
        self.values.insert(output.clone(), outlets[0]);
        Ok(())
    }

    fn guarded_node(&mut self, header: &pb::ModelProto, opset: i64, n: &NodeProto) -> TractResult<()> {
        guarded(told(n), || self.node(header, opset, n))
    }

    fn node(&mut self, header: &pb::ModelProto, opset: i64, n: &NodeProto) -> TractResult<()> {
        ensure!(n.domain() != DOMAIN);
        let proto = pb::NodeProto::decode(n.encode_to_vec().as_slice())?;
        let builder = self.onnx.op_register.0.get(&proto.op_type).context("tract does not know this operator")?;
        let context = ParsingContext {
            onnx_operator_set_version: opset,
            framework: self.onnx,
            model: header,
            parent_graphs: vec![],
            model_dir: None,
            template: InferenceModel::default(),
        };
        let (op, closures) = builder(&context, &proto)?;
        ensure!(closures.is_empty(), "its subgraph uses values from outside");
        let inputs = self.inputs(n)?;
        // A model of this node alone: sources with what is known, then the node.
        let mut alone = InferenceModel::default();
        let mut mapping = HashMap::new();
        let mut sources = vec![];
        for (ix, &outlet) in inputs.iter().enumerate() {
            let fact = InferenceFact::from(self.model.outlet_fact(outlet)?);
            let source = alone.add_source(format!("in{ix}"), fact)?;
            mapping.insert(source, outlet);
            sources.push(source);
        }
        let names: Vec<&String> = n.output.iter().filter(|o| !o.is_empty()).collect();
        let name = names.first().map_or(n.name(), |o| o.as_str());
        let id = alone.add_node(name, op, names.iter().map(|_| InferenceFact::default()).collect())?;
        for (ix, source) in sources.iter().enumerate() {
            alone.add_edge(*source, InletId::new(id, ix))?;
        }
        let outputs: Vec<OutletId> = (0..names.len()).map(|i| OutletId::new(id, i)).collect();
        alone.select_output_outlets(&outputs)?;
        alone.analyse(false)?;
        let node = alone.node(id);
        let outlets = node.op.to_typed(&alone, node, &mut self.model, &mapping)?;
        for (name, outlet) in names.iter().zip(outlets) {
            let fact = self.model.outlet_fact(outlet)?;
            if let Some(shape) = fact.shape.as_concrete() {
                ensure!(check::product(shape) <= check::LIMIT, "its result {shape:?} is too large");
            }
            self.values.insert((*name).clone(), outlet);
        }
        Ok(())
    }
}

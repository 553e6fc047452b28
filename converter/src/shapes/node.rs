//! One node through tract: facts in, facts and constant values out.

use super::describe;
use prost::Message;
use std::sync::LazyLock;
use tract_onnx::Onnx;
use tract_onnx::pb;
use tract_onnx::prelude::*;
use tract_onnx::tract_hir::internal::{DimLike, Factoid};
use vedge_runtime::guard::caught;
use vedge_runtime::onnx::proto::GraphProto;
use vedge_runtime::onnx::{
    DType, ModelProto, NodeProto, TensorProto, ValueInfoProto, absurd, elements, f32_tensor, shape_of, tensor, to_f32,
    to_i64,
};
use vedge_runtime::{Error, Result};

/// An input of the node: its type alone, or its value.
pub(super) enum Given<'a> {
    Fact(ValueInfoProto),
    Value(&'a str, &'a TensorProto),
}

/// An output of the node.
pub(super) struct Found {
    pub dtype: DType,
    pub shape: Vec<usize>,
    pub value: Option<TensorProto>,
}

static ONNX: LazyLock<Onnx> =
    LazyLock::new(|| tract_onnx::onnx().with_ignore_output_shapes(true).with_ignore_value_info(true));

/// A constant that would be larger than this is not made (elements).
const LARGEST: usize = 1 << 28;

/// Infers the outputs of one node; `evaluate` asks for their values, all inputs being values.
pub(super) fn infer_node(
    header: &ModelProto,
    node: &NodeProto,
    given: Vec<Given>,
    evaluate: bool,
) -> Result<Vec<Found>> {
    if !is_known(node) {
        return Err(unsupported(header, node));
    }
    if evaluate && node.op_type() == "BatchNormalization" && node.int("training_mode", 0) != 0 {
        return batch_norm_of_constant(node, &given);
    }
    if let Some(what) = absurd(node) {
        return Err(Error::BadModel(format!("{} {what}", describe(node))));
    }
    refuse_huge(node, &given)?;
    let model = ModelProto {
        ir_version: header.ir_version,
        opset_import: header.opset_import.clone(),
        graph: Some(one_node_graph(node, given)),
        ..ModelProto::default()
    };
    let bytes = model.encode_to_vec();
    guarded(|| {
        let model = pb::ModelProto::decode(bytes.as_slice())?;
        let mut model = ONNX.model_for_proto_model(&model)?;
        model.analyse(false)?;
        let outlets = model.output_outlets()?.to_vec();
        let facts: Vec<InferenceFact> =
            outlets.iter().map(|&o| model.outlet_fact(o).cloned()).collect::<TractResult<_>>()?;
        let complete = |f: &InferenceFact| {
            f.value.is_concrete() || (!evaluate && f.shape.is_concrete() && f.datum_type.is_concrete())
        };
        if facts.iter().all(complete) {
            return facts.iter().map(found).collect();
        }
        let typed = model.into_typed()?;
        if evaluate {
            let values = typed.into_runnable()?.run(tvec![])?;
            return values.iter().map(|v| value_found(v)).collect();
        }
        typed
            .output_outlets()?
            .iter()
            .map(|&o| {
                let f = typed.outlet_fact(o)?;
                let shape = f.shape.as_concrete().ok_or_else(|| TractError::msg("its shape depends on data"))?;
                Ok(Found { dtype: onnx_type(f.datum_type)?, shape: shape.to_vec(), value: None })
            })
            .collect()
    })
    .map_err(|e| Error::BadModel(format!("{}: {e}", describe(node))))
}

fn one_node_graph(node: &NodeProto, given: Vec<Given>) -> GraphProto {
    let mut graph = GraphProto { node: vec![node.clone()], name: Some("node".into()), ..GraphProto::default() };
    for g in given {
        match g {
            Given::Fact(info) => graph.input.push(info),
            Given::Value(name, t) => graph.initializer.push(TensorProto { name: Some(name.into()), ..t.clone() }),
        }
    }
    let output = |o: &String| ValueInfoProto { name: Some(o.clone()), ..ValueInfoProto::default() };
    graph.output = node.output.iter().filter(|o| !o.is_empty()).map(output).collect();
    graph
}

/// Whether the operator is one that the engine knows at all.
pub(super) fn is_known(node: &NodeProto) -> bool {
    let domain = ["", "ai.onnx", "com.microsoft", "ai.onnx.ml"].contains(&node.domain());
    domain && ONNX.op_register.0.contains_key(node.op_type())
}

/// The error that names an operator which is not known.
pub(super) fn unsupported(header: &ModelProto, node: &NodeProto) -> Error {
    let local = header.functions.iter().any(|f| f.name() == node.op_type() && f.domain() == node.domain());
    let domain = if node.domain().is_empty() { String::new() } else { format!(" of domain `{}`", node.domain()) };
    if local {
        return Error::Unsupported {
            what: format!("{} calls the local function `{}`", describe(node), node.op_type()),
            hint: "inline local functions first: onnx.inliner.inline_local_functions(model)".into(),
        };
    }
    Error::Unsupported {
        what: format!("{}: operator `{}`{domain} is not supported", describe(node), node.op_type()),
        hint: "export the model without it, or with only operators of the default ONNX domain".into(),
    }
}

/// Refuses results that only a damaged or hostile file asks for, before memory is asked for.
fn refuse_huge(node: &NodeProto, given: &[Given]) -> Result<()> {
    let values = |i: usize| {
        given.iter().find_map(|g| match g {
            Given::Value(name, t) if *name == node.input_name(i) => Some(*t),
            _ => None,
        })
    };
    let size = match node.op_type() {
        "ConstantOfShape" => values(0).map(product),
        "Expand" | "Tile" => values(1).map(product),
        "Range" => range_length(values(0), values(1), values(2)),
        _ => None,
    };
    match size {
        Some(n) if n > LARGEST => {
            Err(Error::BadModel(format!("{} asks for {n} elements: the file is damaged", describe(node))))
        }
        _ => Ok(()),
    }
}

/// Product of the absolute values of an integer tensor; the largest number where it overflows or is not one.
fn product(t: &TensorProto) -> usize {
    let multiply = |p: usize, &d: &i64| p.checked_mul(usize::try_from(d.unsigned_abs()).ok()?);
    to_i64(t).ok().and_then(|v| v.iter().try_fold(1usize, multiply)).unwrap_or(usize::MAX)
}

fn range_length(
    start: Option<&TensorProto>,
    limit: Option<&TensorProto>,
    delta: Option<&TensorProto>,
) -> Option<usize> {
    let one = |t: Option<&TensorProto>| {
        let t = t?;
        to_f32(t)
            .ok()
            .or_else(|| Some(to_i64(t).ok()?.iter().map(|&v| v as f32).collect()))
            .and_then(|v| v.first().copied())
    };
    let (start, limit, delta) = (one(start)?, one(limit)?, one(delta)?);
    Some(((limit - start) / delta).abs().ceil() as usize)
}

/// Statistics of the batch itself, as weight-standardised convolutions export them: on a constant, so a constant.
fn batch_norm_of_constant(node: &NodeProto, given: &[Given]) -> Result<Vec<Found>> {
    let value = |i: usize| {
        given
            .iter()
            .find_map(|g| match g {
                Given::Value(name, t) if *name == node.input_name(i) => Some(*t),
                _ => None,
            })
            .ok_or_else(|| Error::BadModel(format!("{}: input {i} is missing", describe(node))))
    };
    let x = value(0)?;
    let shape = shape_of(x);
    let (x, scale, bias) = (to_f32(x)?, to_f32(value(1)?)?, to_f32(value(2)?)?);
    let channels = shape.get(1).copied().unwrap_or(1);
    if scale.len() != channels || bias.len() != channels || shape.len() < 2 {
        return Err(Error::BadModel(format!("{}: {} scales for shape {shape:?}", describe(node), scale.len())));
    }
    let inner = elements(&shape[2..]);
    let per_channel = (shape[0] * inner) as f64;
    let epsilon = f64::from(node.float("epsilon", 1e-5));
    let mut y = vec![0f32; x.len()];
    for c in 0..channels {
        let rows = || (0..shape[0]).map(|n| (n * channels + c) * inner);
        let sum: f64 = rows().flat_map(|r| &x[r..r + inner]).map(|&v| f64::from(v)).sum();
        let mean = sum / per_channel;
        let squares: f64 = rows().flat_map(|r| &x[r..r + inner]).map(|&v| (f64::from(v) - mean).powi(2)).sum();
        let gain = f64::from(scale[c]) / (squares / per_channel + epsilon).sqrt();
        for r in rows() {
            for i in r..r + inner {
                y[i] = ((f64::from(x[i]) - mean) * gain + f64::from(bias[c])) as f32;
            }
        }
    }
    let y = Found { dtype: DType::Float, value: Some(f32_tensor("", &shape, &y)), shape };
    // The running statistics that training mode also returns are nothing that inference uses.
    let statistic = || Found { dtype: DType::Float, shape: vec![channels], value: None };
    let others = node.output.iter().filter(|o| !o.is_empty()).count().saturating_sub(1);
    Ok(std::iter::once(y).chain((0..others).map(|_| statistic())).collect())
}

fn found(f: &InferenceFact) -> TractResult<Found> {
    if let Some(v) = f.value.concretize() {
        return value_found(&v);
    }
    let dtype = f.datum_type.concretize().ok_or_else(|| TractError::msg("its element type is unknown"))?;
    let dims = f.shape.concretize().ok_or_else(|| TractError::msg("its shape is unknown"))?;
    let shape = dims.iter().map(|d| Ok(d.to_usize()?)).collect::<TractResult<_>>()?;
    Ok(Found { dtype: onnx_type(dtype)?, shape, value: None })
}

fn value_found(v: &Tensor) -> TractResult<Found> {
    let dtype = onnx_type(v.datum_type())?;
    let v = if v.datum_type() == TDim::datum_type() { v.cast_to::<i64>()? } else { std::borrow::Cow::Borrowed(v) };
    let shape = v.shape().to_vec();
    Ok(Found { dtype, value: Some(tensor("", dtype, &shape, v.as_bytes().to_vec())), shape })
}

fn onnx_type(t: DatumType) -> TractResult<DType> {
    Ok(match t {
        _ if t == TDim::datum_type() => DType::Int64,
        DatumType::F32 => DType::Float,
        DatumType::F16 => DType::Float16,
        DatumType::F64 => DType::Double,
        DatumType::I64 => DType::Int64,
        DatumType::I32 => DType::Int32,
        DatumType::I16 => DType::Int16,
        DatumType::I8 | DatumType::QI8(_) => DType::Int8,
        DatumType::U8 | DatumType::QU8(_) => DType::Uint8,
        DatumType::U16 => DType::Uint16,
        DatumType::U32 => DType::Uint32,
        DatumType::U64 => DType::Uint64,
        DatumType::Bool => DType::Bool,
        other => return Err(TractError::msg(format!("element type {other:?} is not supported"))),
    })
}

/// Runs `f`; an error or a panic of tract becomes a message, and nothing is printed.
fn guarded<T>(f: impl FnOnce() -> TractResult<T>) -> Result<T, String> {
    match caught("working out shapes", f) {
        Ok(result) => result.map_err(|e| innermost(&e)),
        Err(panic) => Err(format!("does not fit its inputs ({panic})")),
    }
}

/// What went wrong at the bottom of tract's chain of contexts, on one line.
fn innermost(e: &TractError) -> String {
    e.root_cause().to_string().lines().next().unwrap_or_default().to_string()
}

//! What ONNX's own checker would refuse, said before a file is written.

use crate::shapes::describe;
use std::collections::HashSet;
use vedge_runtime::onnx::{DType, Graph, TensorProto, shape_of};
use vedge_runtime::{Error, Result};

/// The oldest IR version that may carry each operator set (onnx/docs/Versioning.md).
const IR_OF_OPSET: [(i64, i64); 15] = [
    (11, 6),
    (12, 7),
    (13, 7),
    (14, 7),
    (15, 8),
    (16, 8),
    (17, 8),
    (18, 8),
    (19, 9),
    (20, 9),
    (21, 10),
    (22, 10),
    (23, 11),
    (24, 12),
    (25, 13),
];

/// Checks that a graph is a valid ONNX model: sorted, every value made once and before its use, initializers whose
/// data fills their shape, operator sets declared.
///
/// # Errors
/// [`Error::BadModel`] with the first thing that is wrong.
pub fn check(graph: &Graph) -> Result<()> {
    versions(graph)?;
    let mut known: HashSet<&str> = HashSet::new();
    for i in &graph.inputs {
        fresh(&mut known, i.name(), "input")?;
        if i.dtype().is_none_or(|t| t == DType::Undefined) {
            return Err(Error::BadModel(format!("input `{}` has no element type", i.name())));
        }
    }
    for (name, t) in &graph.initializers {
        fresh(&mut known, name, "initializer")?;
        initializer(name, t)?;
    }
    let domains: HashSet<&str> = graph.header.opset_import.iter().map(|o| canonical(o.domain())).collect();
    for n in &graph.nodes {
        if n.op_type().is_empty() {
            return Err(Error::BadModel(format!("{} has no operator", describe(n))));
        }
        if !domains.contains(canonical(n.domain())) {
            return Err(Error::BadModel(format!("{}: no operator set declared for `{}`", describe(n), n.domain())));
        }
        if let Some(i) = n.input.iter().find(|i| !i.is_empty() && !known.contains(i.as_str())) {
            return Err(Error::BadModel(format!("{} needs `{i}`, which nothing produces before it", describe(n))));
        }
        for o in n.output.iter().filter(|o| !o.is_empty()) {
            fresh(&mut known, o, "output of a node")?;
        }
    }
    if graph.outputs.is_empty() {
        return Err(Error::BadModel("the graph has no output".into()));
    }
    match graph.outputs.iter().find(|o| !known.contains(o.name())) {
        Some(o) => Err(Error::BadModel(format!("output `{}` of the graph is produced by nothing", o.name()))),
        None => Ok(()),
    }
}

fn canonical(domain: &str) -> &str {
    if domain == "ai.onnx" { "" } else { domain }
}

fn versions(graph: &Graph) -> Result<()> {
    let opset = graph.opset();
    if opset == 0 {
        return Err(Error::BadModel("no operator set declared for the default domain".into()));
    }
    let needed = IR_OF_OPSET.iter().rev().find(|(o, _)| *o <= opset).map_or(3, |(_, ir)| *ir);
    if graph.header.ir_version() < needed {
        return Err(Error::BadModel(format!(
            "IR version {} with operator set {opset}, which needs IR version {needed}",
            graph.header.ir_version()
        )));
    }
    Ok(())
}

fn fresh<'a>(known: &mut HashSet<&'a str>, name: &'a str, what: &str) -> Result<()> {
    if name.is_empty() {
        return Err(Error::BadModel(format!("an {what} has no name")));
    }
    if !known.insert(name) {
        return Err(Error::BadModel(format!("{what} `{name}`: another value has that name")));
    }
    Ok(())
}

fn initializer(name: &str, t: &TensorProto) -> Result<()> {
    let bad = |what: String| Err(Error::BadModel(format!("tensor `{name}` {what}: the file is damaged")));
    if t.name() != name {
        return bad(format!("calls itself `{}`", t.name()));
    }
    if t.dims.iter().any(|&d| d < 0) {
        return bad(format!("has the negative shape {:?}", t.dims));
    }
    let Some(count) = shape_of(t).iter().try_fold(1usize, |p, &d| p.checked_mul(d)) else {
        return bad(format!("has the impossible shape {:?}", t.dims));
    };
    let Some(bits) = bits(t.dtype()) else {
        return if t.dtype() == DType::Undefined { bad("has no element type".into()) } else { Ok(()) };
    };
    let typed = t.float_data.len().max(t.int32_data.len()).max(t.int64_data.len());
    let typed = typed.max(t.double_data.len()).max(t.uint64_data.len());
    let wanted = count.saturating_mul(bits).div_ceil(8);
    if t.raw_data().is_empty() {
        let packed = if bits == 4 { count.div_ceil(2) } else { count };
        if typed != packed && typed != count {
            return bad(format!("holds {typed} elements where its shape {:?} needs {count}", t.dims));
        }
    } else if t.raw_data().len() != wanted {
        return bad(format!("holds {} bytes where its shape {:?} needs {wanted}", t.raw_data().len(), t.dims));
    }
    Ok(())
}

/// Bits of an element; `None` for strings and complex numbers, whose data this module does not count.
fn bits(t: DType) -> Option<usize> {
    Some(match t {
        DType::Float | DType::Int32 | DType::Uint32 => 32,
        DType::Double | DType::Int64 | DType::Uint64 => 64,
        DType::Float16 | DType::Bfloat16 | DType::Int16 | DType::Uint16 => 16,
        DType::Int8 | DType::Uint8 | DType::Bool => 8,
        DType::Int4 | DType::Uint4 => 4,
        _ => return None,
    })
}

//! Batch 1 and a fixed resolution.

use super::resize::{Size, resize};
use super::{Context, Pass, PassReport, Prepare, fold, report};
use crate::shapes::{self, describe};
use std::collections::HashSet;
use vedge_runtime::onnx::{DType, Graph, NodeProto, shape_of, value_info};
use vedge_runtime::{Error, Result};

pub struct Freeze;

impl Pass for Freeze {
    fn name(&self) -> &'static str {
        "freeze"
    }

    fn run(&self, graph: &mut Graph, cx: &Context) -> Result<PassReport> {
        let Some(size) = cx.options.size else { return freeze(graph, cx) };
        let before = graph.clone();
        match freeze(graph, cx) {
            Err(Error::Unsupported { what, hint }) => {
                let near = nearest(size, |size| {
                    let options = Prepare { size: Some(size) };
                    freeze(&mut before.clone(), &Context { options }).is_ok()
                });
                let hint = if near.is_empty() { hint } else { format!("the nearest sizes that fit: {near}") };
                Err(Error::Unsupported { what, hint })
            }
            result => result,
        }
    }
}

/// The nearest sizes below and above that fit, in words: multiples of powers of two, which is what models ask for.
fn nearest(size: Size, fits: impl Fn(Size) -> bool) -> String {
    let show = |(h, w): Size| if h == w { h.to_string() } else { format!("{h}x{w}") };
    let find = |round: &dyn Fn(usize, usize) -> usize| {
        let mut sizes: Vec<Size> = [8, 16, 32, 64, 128].map(|m| (round(size.0, m), round(size.1, m))).to_vec();
        sizes.retain(|&s| s != size && s.0 > 0 && s.1 > 0);
        sizes.dedup();
        sizes.into_iter().find(|&s| fits(s))
    };
    let below = find(&|pixels, m| pixels / m * m);
    let above = find(&|pixels, m| pixels.next_multiple_of(m));
    below.into_iter().chain(above).map(show).collect::<Vec<_>>().join(" or ")
}

fn freeze(graph: &mut Graph, cx: &Context) -> Result<PassReport> {
    graph.value_info.clear();
    let (dtype, dims) = picture(graph)?;
    let declared = dims[dims.len() - 2].zip(dims[dims.len() - 1]);
    let wanted = cx.options.size;
    if let Some(size) = wanted.filter(|&s| declared != Some(s)) {
        fits_patches(graph, size)?;
    }
    let fix = |graph: &mut Graph, size: Size| {
        let name = graph.inputs[0].name().to_string();
        let mut shape: Vec<usize> = dims.iter().map(|d| d.unwrap_or(1)).collect();
        let rank = shape.len();
        shape[0] = 1;
        shape[rank - 2..].copy_from_slice(&[size.0, size.1]);
        graph.inputs[0] = value_info(&name, dtype, &shape);
        shapes::infer(graph).map(|_| ())
    };
    let mut how = String::new();
    let exported = match (declared, wanted) {
        (Some(size), _) => {
            fix(graph, size)?;
            size
        }
        (None, Some(size)) => match fix(graph, size) {
            Ok(()) => size,
            Err(misfit) => {
                // The graph takes any size, its positions do not: freeze it at theirs, then go on from there.
                let fits = implied(graph).into_iter().find(|&s| fix(graph, s).is_ok());
                let size = fits.ok_or_else(|| not_at(size, &misfit))?;
                how = format!(", positions are for {}x{}", size.0, size.1);
                size
            }
        },
        (None, None) => {
            let size = implied(graph).into_iter().find(|&s| fix(graph, s).is_ok()).ok_or_else(|| no_size(graph))?;
            how = format!(", {}x{} being the size of its positions", size.0, size.1);
            size
        }
    };
    let size = wanted.unwrap_or(exported);
    if size != exported {
        fold::Fold.run(graph, cx)?;
        let done = resize(graph, size)?;
        let from = format!(", resized from {}x{}: {} constants rewritten", exported.0, exported.1, done.constants);
        how += &from;
        if !done.positions.is_empty() {
            how += &format!(", {}", done.positions);
        }
    }
    let line = format!("input `{}` fixed to batch 1, {}x{} pixels{how}", graph.inputs[0].name(), size.0, size.1);
    Ok(report("freeze", 1, line))
}

fn not_at(size: Size, misfit: &Error) -> Error {
    Error::Unsupported {
        what: format!("the model does not take {}x{} pixels: {misfit}", size.0, size.1),
        hint: "sizes may be part of the graph although its input says otherwise: give the size it was exported at"
            .into(),
    }
}

fn no_size(graph: &Graph) -> Error {
    Error::Usage {
        what: format!("input `{}` has no fixed height and width", graph.inputs[0].name()),
        hint: "give the resolution: --size N, or --size HEIGHTxWIDTH".into(),
    }
}

/// Element type and dimensions of the one input, which must be a picture (rank 4) or a clip of pictures (rank 5).
fn picture(graph: &Graph) -> Result<(DType, Vec<Option<usize>>)> {
    let [input] = graph.inputs.as_slice() else {
        let names: Vec<&str> = graph.inputs.iter().map(|i| i.name()).collect();
        return Err(Error::Unsupported {
            what: format!("the model has {} inputs ({}), vedge feeds one picture", names.len(), names.join(", ")),
            hint: "export the vision part alone".into(),
        });
    };
    let dims = input.dims().unwrap_or_default();
    let dtype = input.dtype().unwrap_or(DType::Undefined);
    let refuse = |what: String| {
        Err(Error::Unsupported { what, hint: "vedge converts models that take pictures as floats".into() })
    };
    if !(4..=5).contains(&dims.len()) {
        return refuse(format!(
            "input `{}` has {} dimensions, a picture has 4: batch, channels, height, width",
            input.name(),
            dims.len()
        ));
    }
    if !matches!(dtype, DType::Float | DType::Float16) {
        return refuse(format!("input `{}` has element type {dtype:?}, expected float", input.name()));
    }
    let channels = dims[dims.len() - 3];
    if !matches!(channels, None | Some(1 | 3)) {
        return refuse(format!(
            "input `{}` has dimensions {dims:?}, expected 1 or 3 channels before height and width",
            input.name()
        ));
    }
    Ok((dtype, dims))
}

/// The convolution that cuts the picture into patches (kernel = stride), and its patch size.
fn patch_embedding(graph: &Graph) -> Option<(&NodeProto, Size)> {
    let conv = graph.nodes.iter().find(|n| n.op_type() == "Conv")?;
    let kernel = shape_of(graph.initializers.get(conv.input_name(1))?);
    let stride: Vec<usize> = conv.ints("strides")?.iter().map(|&s| s.max(1) as usize).collect();
    let [.., kh, kw] = kernel[..] else { return None };
    (stride.ends_with(&[kh, kw]) && kh * kw > 1).then_some((conv, (kh, kw)))
}

/// A picture that patches do not cover would lose its edge.
fn fits_patches(graph: &Graph, size: Size) -> Result<()> {
    let refuse = |axis: &str, pixels: usize, why: String, hint: String| {
        Err(Error::Usage { what: format!("{axis} {pixels} {why}"), hint })
    };
    for (axis, pixels) in [("height", size.0), ("width", size.1)] {
        if !(1..=8192).contains(&pixels) {
            return refuse(axis, pixels, "is no picture size".into(), "give a --size between 1 and 8192".into());
        }
    }
    let Some((conv, patch)) = patch_embedding(graph) else { return Ok(()) };
    for (axis, pixels, patch) in [("height", size.0, patch.0), ("width", size.1, patch.1)] {
        if pixels % patch != 0 {
            let below = pixels / patch * patch;
            let nearest = if below == 0 { patch.to_string() } else { format!("{below} or {}", below + patch) };
            let why = format!("is no multiple of the patch size {patch} of {}", describe(conv));
            return refuse(axis, pixels, why, format!("the nearest sizes that fit: {nearest}"));
        }
    }
    Ok(())
}

/// Square sizes that constants shaped like positions (1 × tokens × width of the patch embedding) are made for.
fn implied(graph: &Graph) -> Vec<Size> {
    let Some((conv, patch)) = patch_embedding(graph) else { return vec![] };
    let width = graph.initializers.get(conv.input_name(1)).map_or(0, |w| shape_of(w)[0]);
    let linear = |n: &&NodeProto| matches!(n.op_type(), "MatMul" | "Gemm");
    let weights: HashSet<&String> = graph.nodes.iter().filter(linear).flat_map(|n| &n.input).collect();
    let mut sizes = vec![];
    for (_, t) in graph.initializers.iter().filter(|(name, _)| !weights.contains(name)) {
        let shape = shape_of(t);
        let [.., tokens, w] = shape[..] else { continue };
        if w != width || shape.len() > 3 || (shape.len() == 3 && shape[0] != 1) {
            continue;
        }
        for prefix in 0..=2usize.min(tokens) {
            let side = (tokens - prefix).isqrt();
            if side > 1 && side * side + prefix == tokens {
                sizes.push((side * patch.0, side * patch.1));
            }
        }
    }
    // Several may look like positions: larger grids first, the caller tries which one fits.
    sizes.sort_unstable_by(|a, b| b.cmp(a));
    sizes.dedup();
    sizes
}

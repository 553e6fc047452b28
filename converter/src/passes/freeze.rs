//! Batch 1 and a fixed resolution.

use super::resize::{Size, resize};
use super::{Context, Pass, PassReport, Prepare, fold, patch, report};
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
        if cx.options.size.is_none() && cx.options.patch.is_none() {
            return freeze(graph, cx);
        }
        let before = graph.clone();
        freeze(graph, cx).map_err(|e| {
            let asked = cx.options.size.or_else(|| exported(&before));
            let Some(size) = asked.filter(|s| [s.0, s.1].iter().all(|p| SIZES.contains(p))) else { return e };
            let near = nearest(&before, size, cx.options.patch);
            let better =
                |hint: String| if near.is_empty() { hint } else { format!("the nearest sizes that fit: {near}") };
            match e {
                Error::Unsupported { what, hint } => Error::Unsupported { what, hint: better(hint) },
                Error::Usage { what, hint } => Error::Usage { what, hint: better(hint) },
                e => e,
            }
        })
    }
}

/// Heights and widths that pictures may have.
const SIZES: std::ops::RangeInclusive<usize> = 1..=8192;

/// Sizes at which models are exported most often, where nothing but trying tells which one it was.
const USUAL: [usize; 10] = [224, 256, 384, 192, 320, 288, 512, 128, 64, 32];

/// The size that a graph was exported at.
pub(crate) fn exported(graph: &Graph) -> Option<Size> {
    match graph.inputs.first()?.dims()?[..] {
        [.., Some(h), Some(w)] => Some((h, w)),
        _ => None,
    }
}

/// The nearest sizes below and above that fit, in words: multiples of the patch and of powers of two, which is what models
/// ask for; else the exported size.
fn nearest(graph: &Graph, size: Size, patch: Option<Size>) -> String {
    let show = |(h, w): Size| if h == w { h.to_string() } else { format!("{h}x{w}") };
    let fits = |size: Size| {
        let options = Prepare { size: Some(size), patch };
        size.0 * size.1 > 0 && freeze(&mut graph.clone(), &Context { options }).is_ok()
    };
    let unit = patch.or_else(|| patch::find(graph).map(|p| p.1)).unwrap_or((8, 8));
    let find = |round: &dyn Fn(usize, usize) -> usize| {
        let mut sizes = [1, 2, 4, 8, 16].map(|m| (round(size.0, m * unit.0), round(size.1, m * unit.1))).to_vec();
        sizes.dedup();
        sizes.into_iter().find(|&s| s != size && fits(s))
    };
    let below = find(&|pixels, m| pixels / m * m);
    let above = find(&|pixels, m| pixels.next_multiple_of(m));
    let mut near: Vec<Size> = below.into_iter().chain(above).collect();
    if near.is_empty() {
        near.extend(exported(graph).filter(|&e| fits(e)));
    }
    near.into_iter().map(show).collect::<Vec<_>>().join(" or ")
}

fn freeze(graph: &mut Graph, cx: &Context) -> Result<PassReport> {
    graph.value_info.clear();
    let (dtype, dims) = picture(graph)?;
    let declared = exported(graph);
    let (wanted, patch) = (cx.options.size, cx.options.patch);
    if let Some(size) = wanted.filter(|&s| declared != Some(s)) {
        fits_patches(graph, size, patch)?;
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
    let own = |graph: &mut Graph| implied(graph).into_iter().find(|&s| fix(graph, s).is_ok());
    let from = match (declared, wanted) {
        (Some(size), _) => {
            fix(graph, size)?;
            size
        }
        (None, Some(size)) => {
            // Where the input takes any size but constants of the graph do not, it is frozen at theirs and goes on from there;
            // so it is with other patches, for positions are interpolated once.
            let first = if patch.is_some() { own(graph) } else { None };
            match first.map_or_else(|| fix(graph, size).map(|()| size), Ok) {
                Ok(from) => from,
                Err(misfit) => {
                    let usual = |graph: &mut Graph| USUAL.map(|s| (s, s)).into_iter().find(|&s| fix(graph, s).is_ok());
                    let from = own(graph).or_else(|| usual(graph)).ok_or_else(|| not_at(size, &misfit))?;
                    how = format!(", its constants are for {}x{}", from.0, from.1);
                    from
                }
            }
        }
        (None, None) => {
            let size = own(graph).ok_or_else(|| no_size(graph))?;
            how = format!(", {}x{} being the size of its positions", size.0, size.1);
            size
        }
    };
    let size = wanted.unwrap_or(from);
    if size != from || patch.is_some() {
        fits_patches(graph, size, patch)?;
        fold::Fold.run(graph, cx)?;
        let done = resize(graph, size, patch)?;
        if size != from {
            how += &format!(", resized from {}x{}", from.0, from.1);
        }
        if let (Some(old), Some(new)) = (done.patch, patch) {
            how += &format!(", patches of {}x{} pixels where {}x{} were exported", new.0, new.1, old.0, old.1);
        }
        if done.constants > 0 {
            how += &format!(": {} constants rewritten", done.constants);
        }
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

/// A picture that patches do not cover would lose its edge. `asked` are patches of another size than the graph's.
fn fits_patches(graph: &Graph, size: Size, asked: Option<Size>) -> Result<()> {
    let refuse = |what: String, hint: String| Err(Error::Usage { what, hint });
    for (axis, pixels) in [("height", size.0), ("width", size.1)] {
        if !SIZES.contains(&pixels) {
            return refuse(format!("{axis} {pixels} is no picture size"), "give a --size between 1 and 8192".into());
        }
    }
    let embedding = patch::find(graph).map(|(i, patch)| (patch, describe(&graph.nodes[i])));
    let Some((patch, of)) = asked.map(|p| (p, "--patch".into())).or(embedding) else { return Ok(()) };
    for (axis, pixels, patch) in [("height", size.0, patch.0), ("width", size.1, patch.1)] {
        if pixels % patch != 0 {
            let what = format!("{axis} {pixels} is no multiple of the patch size {patch} of {of}");
            return refuse(what, format!("give a --size that is a multiple of {patch}"));
        }
    }
    Ok(())
}

/// Square sizes that constants shaped like positions (1 × tokens × width of the patch embedding) are made for.
fn implied(graph: &Graph) -> Vec<Size> {
    let Some((conv, patch)) = patch::find(graph) else { return vec![] };
    let conv = &graph.nodes[conv];
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

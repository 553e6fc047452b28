//! Convolutions of one picture, dense or depthwise, in integers where weights and input are quantized, else in float.
//!
//! Pictures keep their channels last inside vedge: each convolution stands between two transpositions, most of which
//! meet their inverse and vanish. A pointwise convolution then is a linear layer over pixels.

use super::constant::{Constant, constant, quantized};
use super::linear::is_residual;
use super::movement::{TO_FIRST, TO_LAST};
use super::{Fused, Lowered, Rewrites, fused_index};
use crate::error::Result;
use crate::kernels::conv::{Conv, Filter, Geometry};
use crate::kernels::depthwise::{Bottleneck, Depthwise, Taps};
use crate::kernels::linear::{InputQuant, Linear, Weights};
use crate::kernels::{Activation, F32Weights, I8Weights, Kernels};
use crate::model::check::EXACT_INPUTS;
use crate::onnx::{DType, Graph, NodeProto, Uses, attr};

pub fn run(l: &mut Lowered, kernels: &Kernels, per_token: bool) -> Result<()> {
    let uses = l.uses();
    let mut r = Rewrites::default();
    for i in 0..l.graph.nodes.len() {
        let n = l.graph.nodes[i].clone();
        if n.op_type() != "Conv" || !n.domain().is_empty() {
            continue;
        }
        let Some(weight) = constant(&l.graph, &uses, n.input_name(1)) else { continue };
        let activations = quantized(&l.graph, &uses, n.input_name(0));
        let mut note = None;
        let (input, quant) = match (&weight, activations) {
            (Constant::I8 { .. }, Some((x, quant))) => (x, Some(quant)),
            (Constant::I8 { .. }, None) if per_token => (n.input_name(0).into(), Some(InputQuant::PerRow)),
            (Constant::I8 { .. }, None) => {
                note = Some("int8 weights, but the input is not quantized: float".to_string());
                (n.input_name(0).into(), None)
            }
            (Constant::F32(..), _) => (n.input_name(0).to_string(), None),
        };
        let found = match found(&l.graph, &n, &weight) {
            Ok(found) => found,
            Err(why) => {
                if matches!(weight, Constant::I8 { .. }) {
                    l.notes.insert(n.output[0].clone(), format!("{why}: float"));
                }
                continue;
            }
        };
        let (mut nodes, mut output) = (vec![i], n.output[0].clone());
        let mut activation = Activation::None;
        if let Some(next) = uses.only_consumer(&output).filter(|&next| r.is_free(next))
            && let Some(Fused::Activation(a)) = l.fused_of(&l.graph.nodes[next])
        {
            activation = *a;
            nodes.push(next);
            output = l.graph.nodes[next].output[0].clone();
        }
        let g = found.geometry;
        // A residual, where a linear layer takes the convolution's place.
        let mut residual = None;
        if g.is_pointwise()
            && found.groups == 1
            && let Some(next) = uses.only_consumer(&output).filter(|&next| r.is_free(next))
            && let add = &l.graph.nodes[next]
            && add.op_type() == "Add"
            && let Some(other) = add.input.iter().find(|o| **o != output)
            && is_residual(&l.graph, other, &output)
        {
            residual = Some(other.clone());
            nodes.push(next);
            output = add.output[0].clone();
        }
        if let Some(note) = note {
            l.notes.insert(output.clone(), note);
        }
        let patches = found.is_patches() && uses.producer(&input).is_none();
        let fused = found.fuse(kernels, weight, quant, activation, patches);
        let mut new = vec![];
        let picture = |[h, w, c]: [usize; 3]| [1, h, w, c];
        let mut inputs = vec![];
        if patches {
            inputs.push(input.clone());
        }
        for (value, shape) in [((!patches).then_some(input), g.input), (residual, g.output)] {
            let Some(value) = value else { continue };
            let last = l.value(&format!("{value}.channels_last"), &picture(shape));
            new.push(NodeProto::of("Transpose", &[&value], &[&last], vec![attr::ints("perm", &TO_LAST)]));
            inputs.push(last);
        }
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let last = l.value(&format!("{output}.channels_last"), &picture(g.output));
        new.push(l.node(fused, &inputs, &last));
        new.push(NodeProto::of("Transpose", &[&last], &[&output], vec![attr::ints("perm", &TO_FIRST)]));
        r.replace_by(&nodes, new);
    }
    l.apply(r);
    Ok(())
}

/// Joins a depthwise convolution with the pointwise layers before and after it, where nothing else uses what lies between.
pub fn join_bottlenecks(l: &mut Lowered) {
    let uses = l.uses();
    let mut r = Rewrites::default();
    for first in 0..l.graph.nodes.len() {
        let Some((nodes, note)) = bottleneck(l, &uses, first).filter(|(nodes, _)| nodes.iter().all(|&n| r.is_free(n)))
        else {
            continue;
        };
        let [expand, depthwise, project] = nodes;
        let node = &l.graph.nodes[project];
        let output = node.output[0].clone();
        let inputs: Vec<String> = l.graph.nodes[expand].input.iter().chain(node.input.get(1)).cloned().collect();
        let inputs: Vec<&str> = inputs.iter().map(String::as_str).collect();
        let index = |n: usize| fused_index(&l.graph.nodes[n]).expect("an operator of ours");
        let [expand, depthwise, project] = [index(expand), index(depthwise), index(project)];
        let (expand, project) = (l.take_linear(expand), l.take_linear(project));
        let Fused::Conv(conv) = l.take(depthwise) else { unreachable!("a convolution") };
        let Conv { geometry, filter: Filter::Depthwise(depthwise) } = *conv else { unreachable!("depthwise") };
        if let Some(note) = note {
            l.notes.insert(output.clone(), note);
        }
        let joined = Fused::Bottleneck(Box::new(Bottleneck { expand, geometry, depthwise, project }));
        let new = l.node(joined, &inputs, &output);
        r.replace(&nodes, new);
    }
    l.apply(r);
}

/// The nodes of a bottleneck whose expansion is node `first`, and what there is to say about its convolution.
fn bottleneck(l: &Lowered, uses: &Uses, first: usize) -> Option<([usize; 3], Option<String>)> {
    let node = |i: usize| &l.graph.nodes[i];
    let linear = |i: usize| match l.fused_of(node(i)) {
        Some(Fused::Linear(l)) if !l.reads_whole() && l.order.is_empty() => Some(l),
        _ => None,
    };
    let expand = linear(first).filter(|_| node(first).input.len() == 1)?;
    let second = uses.only_consumer(&node(first).output[0])?;
    let Some(Fused::Conv(conv)) = l.fused_of(node(second)) else { return None };
    let Filter::Depthwise(depthwise) = &conv.filter else { return None };
    let third = uses.only_consumer(&node(second).output[0])?;
    let project = linear(third).filter(|_| node(third).input.get(1) != node(second).output.first())?;
    let is_integer = |l: &Linear| matches!(l.weights, Weights::I8(..));
    if !depthwise.is_static() || is_integer(expand) != is_integer(project) {
        return None;
    }
    let mut notes: Vec<&str> = [first, second, third]
        .into_iter()
        .filter_map(|i| l.notes.get(&node(i).output[0]).map(String::as_str))
        .collect();
    if conv.is_integer() != is_integer(expand) && notes.is_empty() {
        notes.push(if conv.is_integer() { "its convolution alone in integers" } else { "its convolution in float" });
    }
    Some(([first, second, third], (!notes.is_empty()).then(|| notes.join("; "))))
}

/// A convolution that vedge runs.
struct Found {
    geometry: Geometry,
    groups: usize,
    bias: Vec<f32>,
}

fn found(g: &Graph, n: &NodeProto, weight: &Constant) -> std::result::Result<Found, &'static str> {
    let (x, y) = (g.fact(n.input_name(0)), g.fact(&n.output[0]));
    let (Some((DType::Float, x)), Some((DType::Float, y))) = (x, y) else { return Err("not a picture of floats") };
    let (&[1, c, h, w], &[1, oc, oh, ow]) = (x.as_slice(), y.as_slice()) else {
        return Err("not a picture with batch 1");
    };
    let &[outputs, ic, kh, kw] = weight.shape() else { return Err("not a two-dimensional convolution") };
    let group = n.int("group", 1);
    if outputs != oc || ic * kh * kw == 0 || oc == 0 || (ic as i64).checked_mul(group) != Some(c as i64) {
        return Err("weights that do not fit the channels");
    }
    if let Constant::I8 { scale, axis, values, .. } = weight {
        if scale.is_empty() || values.is_empty() {
            return Err("weights that do not fit the channels");
        }
        if ic.saturating_mul(kh * kw) > EXACT_INPUTS {
            return Err("more inputs than 32-bit sums hold");
        }
        if scale.len() > 1 && *axis != 0 {
            return Err("weight scales do not run along the output channels");
        }
    }
    if group != 1 && !(group as usize == c && oc == c && ic == 1) {
        return Err("grouped, but not depthwise");
    }
    if !matches!(n.string("auto_pad", "NOTSET"), "NOTSET" | "") {
        return Err("automatic padding");
    }
    let two = |name: &str| -> std::result::Result<[usize; 2], &'static str> {
        match n.ints(name) {
            None => Ok([1, 1]),
            Some(&[a, b]) if a > 0 && b > 0 => Ok([a as usize, b as usize]),
            Some(_) => Err("strides or dilations that are not two positive numbers"),
        }
    };
    let pads: [usize; 4] = match n.ints("pads") {
        None => [0; 4],
        Some(&[t, l, b, r]) if t.min(l).min(b).min(r) >= 0 => [t as usize, l as usize, b as usize, r as usize],
        Some(_) => return Err("negative padding"),
    };
    let bias = match n.input_name(2) {
        "" => vec![0.; oc],
        b => g.const_f32(b).filter(|b| b.len() == oc).ok_or("bias is not a constant of one value a channel")?,
    };
    let geometry = Geometry {
        input: [h, w, c],
        output: [oh, ow, oc],
        kernel: [kh, kw],
        stride: two("strides")?,
        dilation: two("dilations")?,
        pads,
    };
    Ok(Found { geometry, groups: group as usize, bias })
}

impl Found {
    /// Whether it takes what the model is given as it is: patches that the picture is cut into.
    fn is_patches(&self) -> bool {
        let g = &self.geometry;
        self.groups == 1 && g.stride == g.kernel && g.kernel != [1, 1] && g.pads == [0; 4] && g.dilation == [1, 1]
    }

    /// The operator: channels last (but for the input of `patches`), float in and out.
    fn fuse(
        self,
        kernels: &Kernels,
        weight: Constant,
        quant: Option<InputQuant>,
        activation: Activation,
        patches: bool,
    ) -> Fused {
        let Found { geometry, groups, bias } = self;
        let (taps, ic, oc) = (geometry.taps(), geometry.input[2] / groups, geometry.output[2]);
        let scales = |scale: &[f32]| -> Vec<f32> { (0..oc).map(|i| scale[i % scale.len()]).collect() };
        if groups == 1 {
            // [oc][ic][tap] becomes [oc][tap][ic], but for patches.
            let k = taps * ic;
            let at = |row: usize, i: usize| if patches { row * k + i } else { (row * ic + i % ic) * taps + i / ic };
            let weights = match (weight, quant) {
                (Constant::I8 { values, scale, .. }, Some(quant)) => {
                    let rows: Vec<i8> = (0..values.len()).map(|i| values[at(i / k, i % k)]).collect();
                    Weights::I8(I8Weights::pack(kernels, oc, k, &rows, &scales(&scale)), quant)
                }
                (weight, _) => {
                    let values = weight.to_f32();
                    Weights::F32(F32Weights::pack(oc, k, |row, i| values[at(row, i)]))
                }
            };
            let linear = Linear::new(weights, &bias, activation);
            return match geometry.is_pointwise() {
                true => Fused::Linear(Box::new(linear)),
                false => {
                    let filter = if patches { Filter::Patches(linear) } else { Filter::Dense(linear) };
                    Fused::Conv(Box::new(Conv { geometry, filter }))
                }
            };
        }
        let at = |i: usize| i % oc * taps + i / oc;
        let taps = match (weight, quant) {
            (Constant::I8 { values, scale, .. }, Some(quant)) => {
                let values = (0..values.len()).map(|i| values[at(i)]).collect();
                Taps::i8(values, scales(&scale), quant)
            }
            (weight, _) => {
                let values = weight.to_f32();
                Taps::F32((0..values.len()).map(|i| values[at(i)]).collect())
            }
        };
        Fused::Conv(Box::new(Conv {
            geometry,
            filter: Filter::Depthwise(Depthwise { table: None, taps, bias, activation }),
        }))
    }
}

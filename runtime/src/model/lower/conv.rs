//! Convolutions with int8 weights and a quantized input, dense or depthwise, batch 1.

use super::constant::{Constant, constant, quantized};
use super::{Fused, Lowered, Rewrites};
use crate::error::Result;
use crate::kernels::conv::{Conv, ConvWeights, Geometry};
use crate::kernels::linear::{InputQuant, bias_panels};
use crate::kernels::{Activation, I8Weights, Kernels};
use crate::model::check::EXACT_INPUTS;
use crate::onnx::{Graph, NodeProto};

pub fn run(l: &mut Lowered, kernels: &Kernels, per_token: bool) -> Result<()> {
    let uses = l.uses();
    let mut r = Rewrites::default();
    for i in 0..l.graph.nodes.len() {
        let n = &l.graph.nodes[i];
        if n.op_type() != "Conv" || !n.domain().is_empty() {
            continue;
        }
        let weight = constant(&l.graph, &uses, n.input_name(1));
        let activations = quantized(&l.graph, &uses, n.input_name(0));
        let (input, quant) = match (&weight, activations) {
            (Some(Constant::I8 { .. }), Some((x, scale, zero))) => (x, InputQuant::Static { scale, zero }),
            (Some(Constant::I8 { .. }), None) if per_token => (n.input_name(0).into(), InputQuant::PerRow),
            (Some(Constant::I8 { .. }), None) => {
                l.notes.insert(n.output[0].clone(), "int8 weights, but the input is not quantized: float".into());
                continue;
            }
            _ => continue,
        };
        let conv = match integer(kernels, &l.graph, n, weight.expect("matched above"), quant) {
            Ok(conv) => conv,
            Err(why) => {
                l.notes.insert(n.output[0].clone(), format!("{why}: float"));
                continue;
            }
        };
        let mut conv = conv;
        let (mut nodes, mut output) = (vec![i], n.output[0].clone());
        if let Some(next) = uses.only_consumer(&output)
            && let Some(Fused::Activation(a)) = l.fused_of(&l.graph.nodes[next])
        {
            conv.activation = *a;
            nodes.push(next);
            output = l.graph.nodes[next].output[0].clone();
        }
        let new = l.node(Fused::Conv(Box::new(conv)), &[&input], &output);
        r.replace(&nodes, new);
    }
    l.apply(r);
    Ok(())
}

fn integer(
    kernels: &Kernels,
    g: &Graph,
    n: &NodeProto,
    weight: Constant,
    quant: InputQuant,
) -> std::result::Result<Conv, &'static str> {
    let Constant::I8 { values, shape, scale, axis } = weight else { return Err("float weights") };
    let (x, y) = (g.shape(n.input_name(0)), g.shape(&n.output[0]));
    let (Some([1, c, h, w]), Some([1, oc, oh, ow])) = (x.as_deref(), y.as_deref()) else {
        return Err("not a picture with batch 1");
    };
    let (c, h, w, oc, oh, ow) = (*c, *h, *w, *oc, *oh, *ow);
    let &[_, ic, kh, kw] = shape.as_slice() else { return Err("not a two-dimensional convolution") };
    let group = n.int("group", 1);
    if shape[0] != oc || scale.is_empty() || values.is_empty() || (ic as i64).checked_mul(group) != Some(c as i64) {
        return Err("weights that do not fit the channels");
    }
    if ic.saturating_mul(kh * kw) > EXACT_INPUTS {
        return Err("more inputs than 32-bit sums hold");
    }
    if scale.len() > 1 && axis != 0 {
        return Err("weight scales do not run along the output channels");
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
    let geometry = Geometry {
        input: [c, h, w],
        output: [oc, oh, ow],
        kernel: [kh, kw],
        stride: two("strides")?,
        dilation: two("dilations")?,
        pads,
    };
    let scales: Vec<f32> = (0..oc).map(|i| scale[i % scale.len()]).collect();
    let weights = match group as usize {
        1 => {
            // [oc][ic][ky][kx] → [oc][ky][kx][ic]
            let taps = kh * kw;
            let row = |i: usize| {
                let (o, rest) = (i / (taps * ic), i % (taps * ic));
                values[(o * ic + rest % ic) * taps + rest / ic]
            };
            let rows: Vec<i8> = (0..values.len()).map(row).collect();
            ConvWeights::Dense(I8Weights::pack(kernels, oc, taps * ic, &rows, &scales))
        }
        groups if groups == c && oc == c && ic == 1 => {
            let taps = kh * kw;
            ConvWeights::Depthwise((0..taps * c).map(|i| i16::from(values[i % c * taps + i / c])).collect(), scales)
        }
        _ => return Err("grouped, but not depthwise"),
    };
    let bias = match n.input_name(2) {
        "" => vec![0.; oc],
        b => g.const_f32(b).filter(|b| b.len() == oc).ok_or("bias is not a constant of one value a channel")?,
    };
    Ok(Conv { geometry, quant, weights, bias: bias_panels(&bias), activation: Activation::None })
}

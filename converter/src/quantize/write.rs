//! Writes integers into a graph as standard ONNX: QuantizeLinear and DequantizeLinear pairs, int8 initializers.

use super::layers::{Layer, node_name};
use super::number::{Affine, Weight, quantize_weight, symmetric};
use super::round::Rounded;
use half::f16;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use vedge_runtime::onnx::{DType, Graph, NodeProto, Uses, attr, elements, f32_tensor, shape_of, tensor, value_info};
use vedge_runtime::{Error, Result};

/// DequantizeLinear takes a scale for each channel from this operator set on.
const FIRST_OPSET: i64 = 13;

/// How a model is quantized.
#[derive(Clone, Default)]
pub struct Recipe {
    /// Range of each activation that gets QuantizeLinear and DequantizeLinear.
    pub ranges: BTreeMap<String, (f32, f32)>,
    /// Those of them that are int8 with zero point 0; the others are uint8 with a zero point of their own.
    pub symmetric: BTreeSet<String>,
    /// What biases gain beyond that, by index of the node.
    pub shifts: BTreeMap<usize, Vec<f32>>,
    /// Integers of layers and what their biases gain, by index of the node; the others' weights are rounded to the nearest.
    pub rounded: Arc<BTreeMap<usize, Rounded>>,
}

/// Quantizes layers in place: weights become int8 initializers behind a DequantizeLinear; activations with a range in
/// the recipe get one QuantizeLinear and DequantizeLinear pair, shared by all the layers they feed. Biases stay float.
///
/// # Errors
/// [`Error::Unsupported`] when the model's operator set is too old.
pub fn write_int8(g: &mut Graph, layers: &[Layer], recipe: &Recipe) -> Result<()> {
    if g.opset() < FIRST_OPSET {
        return Err(Error::Unsupported {
            what: format!("the model has operator set {}, INT8 needs {FIRST_OPSET} or newer", g.opset()),
            hint: "export the model again with opset_version=17".into(),
        });
    }
    let by_node: BTreeMap<usize, &Layer> = layers.iter().map(|l| (l.node, l)).collect();
    let mut activations: BTreeMap<String, String> = BTreeMap::new();
    let mut weights: BTreeMap<(String, usize), String> = BTreeMap::new();
    let mut shifts: Vec<(String, &Layer, Vec<f32>)> = vec![];
    let nodes = std::mem::take(&mut g.nodes);
    // Names are looked for in the whole graph, so the old nodes go back one by one and the rest is kept aside.
    let taken: BTreeSet<String> = nodes.iter().flat_map(|n| n.output.iter().cloned()).collect();
    for (i, mut n) in nodes.into_iter().enumerate() {
        if let Some(l) = by_node.get(&i) {
            if let Some(&range) = recipe.ranges.get(&l.activation) {
                let dequantized = activations
                    .entry(l.activation.clone())
                    .or_insert_with_key(|a| quantize_activation(g, &taken, a, range, recipe.symmetric.contains(a)));
                n.input[0] = dequantized.clone();
            }
            n.input[1] = match recipe.rounded.get(&i) {
                Some(r) => {
                    shifts.push((n.output[0].clone(), l, r.bias.clone()));
                    weight_int8(g, &taken, l, &r.weight)
                }
                None => {
                    let key = (l.weight.clone(), l.out_axis);
                    if !weights.contains_key(&key) {
                        let values = vedge_runtime::onnx::to_f32(&g.initializers[&l.weight])?;
                        let nearest = quantize_weight(&values, &l.shape, l.out_axis, l.grid());
                        weights.insert(key.clone(), weight_int8(g, &taken, l, &nearest));
                    }
                    weights[&key].clone()
                }
            };
            if let Some(s) = recipe.shifts.get(&i) {
                shifts.push((n.output[0].clone(), l, s.clone()));
            }
            if n.name().is_empty() {
                n.name = Some(node_name(&n));
            }
        }
        g.nodes.push(n);
    }
    for (output, layer, shift) in shifts {
        shift_bias(g, &output, layer.shape[layer.out_axis], &shift);
    }
    g.prune_unused();
    Ok(())
}

/// Adds to the bias of the layer with that output: to its own, to the constant that follows it, else by a new Add.
fn shift_bias(g: &mut Graph, output: &str, channels: usize, shift: &[f32]) {
    if shift.iter().all(|s| *s == 0.0) {
        return;
    }
    let at = g.nodes.iter().position(|n| n.output.first().is_some_and(|o| o == output)).expect("the layer's node");
    let node = &g.nodes[at];
    let (index, slot, factor) = match node.op_type() {
        "MatMul" => {
            let next = Uses::of(g).only_consumer(output);
            let added = next.filter(|&i| g.nodes[i].op_type() == "Add").and_then(|i| {
                let slot = g.nodes[i].input.iter().position(|v| v != output)?;
                let shape = g.initializers.get(g.nodes[i].input_name(slot)).map(shape_of)?;
                (shape.last() == Some(&channels) && elements(&shape) == channels).then_some((i, slot))
            });
            match added {
                Some((i, slot)) => (i, slot, 1.0),
                None => return append_add(g, at, channels, shift),
            }
        }
        "Gemm" => (at, 2, node.float("beta", 1.0)),
        _ => (at, 2, 1.0),
    };
    let name = g.nodes[index].input_name(slot).to_string();
    let old =
        if name.is_empty() { Some((vec![channels], vec![0.0; channels])) } else { constant_row(g, &name, channels) };
    let Some((shape, values)) = old.filter(|_| factor != 0.0) else {
        return append_add(g, at, channels, shift);
    };
    let values: Vec<f32> = values.iter().zip(shift).map(|(b, s)| b + s / factor).collect();
    let new = g.fresh(&format!("{}.shifted", if name.is_empty() { format!("{output}.bias") } else { name }));
    g.initializers.insert(new.clone(), f32_tensor(&new, &shape, &values));
    let inputs = &mut g.nodes[index].input;
    inputs.resize(inputs.len().max(slot + 1), String::new());
    inputs[slot] = new;
}

/// A constant of one value for each channel, or of one for all: its shape with all channels, its values.
fn constant_row(g: &Graph, name: &str, channels: usize) -> Option<(Vec<usize>, Vec<f32>)> {
    let values = g.const_f32(name)?;
    match values.len() {
        n if n == channels => Some((shape_of(&g.initializers[name]), values)),
        1 => Some((vec![channels], vec![values[0]; channels])),
        _ => None,
    }
}

/// Puts an Add behind a layer.
fn append_add(g: &mut Graph, at: usize, channels: usize, shift: &[f32]) {
    let output = g.nodes[at].output[0].clone();
    let (product, bias) = (g.fresh(&format!("{output}.product")), g.fresh(&format!("{output}.shift")));
    if let Some((dtype, shape)) = g.fact(&output) {
        g.value_info.insert(product.clone(), value_info(&product, dtype, &shape));
    }
    let shape = if g.nodes[at].op_type() == "Conv" { vec![channels, 1, 1] } else { vec![channels] };
    g.initializers.insert(bias.clone(), f32_tensor(&bias, &shape, shift));
    g.nodes[at].output[0] = product.clone();
    g.nodes.insert(at + 1, NodeProto::of("Add", &[&product, &bias], &[&output], vec![]));
}

fn quantize_activation(
    g: &mut Graph,
    taken: &BTreeSet<String>,
    value: &str,
    range: (f32, f32),
    is_symmetric: bool,
) -> String {
    let (step, dtype, point) = match is_symmetric {
        true => (symmetric(range), DType::Int8, 0),
        false => {
            let a = Affine::over(range);
            (a.scale, DType::Uint8, a.zero_point)
        }
    };
    let [scale, zero, q, dq] = ["scale", "zero_point", "quantized", "dequantized"].map(|s| fresh(g, taken, value, s));
    g.initializers.insert(scale.clone(), f32_tensor(&scale, &[], &[step]));
    g.initializers.insert(zero.clone(), tensor(&zero, dtype, &[], vec![point]));
    g.nodes.push(NodeProto::of("QuantizeLinear", &[value, &scale, &zero], &[&q], vec![]));
    g.nodes.push(NodeProto::of("DequantizeLinear", &[&q, &scale, &zero], &[&dq], vec![]));
    if let Some(shape) = g.shape(value) {
        g.value_info.insert(q.clone(), value_info(&q, dtype, &shape));
        g.value_info.insert(dq.clone(), value_info(&dq, DType::Float, &shape));
    }
    dq
}

fn weight_int8(g: &mut Graph, taken: &BTreeSet<String>, l: &Layer, quantized: &Weight) -> String {
    let [int8, scale, zero, dq] = ["int8", "scale", "zero_point", "dequantized"].map(|s| fresh(g, taken, &l.weight, s));
    let raw = quantized.values.iter().map(|v| *v as u8).collect();
    let channels = quantized.scales.len();
    g.initializers.insert(int8.clone(), tensor(&int8, DType::Int8, &l.shape, raw));
    g.initializers.insert(scale.clone(), f32_tensor(&scale, &[channels], &quantized.scales));
    g.initializers.insert(zero.clone(), tensor(&zero, DType::Int8, &[channels], vec![0; channels]));
    let axis = attr::int("axis", l.out_axis as i64);
    g.nodes.push(NodeProto::of("DequantizeLinear", &[&int8, &scale, &zero], &[&dq], vec![axis]));
    g.value_info.insert(dq.clone(), value_info(&dq, DType::Float, &l.shape));
    dq
}

/// `value.suffix`, or the next such name that neither the graph nor `taken` has.
fn fresh(g: &Graph, taken: &BTreeSet<String>, value: &str, suffix: &str) -> String {
    let mut name = g.fresh(&format!("{value}.{suffix}"));
    for i in 1.. {
        if !taken.contains(&name) {
            break;
        }
        name = g.fresh(&format!("{value}.{suffix}_{i}"));
    }
    name
}

/// What [`write_f16`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Halved {
    /// Constants stored as float16.
    pub tensors: usize,
    /// Constants left in float32 because a value is beyond float16.
    pub too_large: usize,
}

/// Constants of at least this many elements are worth a Cast.
const WORTH_A_CAST: usize = 256;

/// Stores float constants as float16 with a Cast to float32 before their first use: half the size, computed in
/// float32 everywhere.
///
/// # Errors
/// [`Error::BadModel`] for a damaged constant.
pub fn write_f16(g: &mut Graph) -> Result<Halved> {
    write_f16_of(g, |_| true)
}

/// As [`write_f16`], of the constants of some names only.
///
/// # Errors
/// [`Error::BadModel`] for a damaged constant.
pub fn write_f16_of(g: &mut Graph, wanted: impl Fn(&str) -> bool) -> Result<Halved> {
    let mut done = Halved::default();
    let large = |(name, t): &(&String, &vedge_runtime::onnx::TensorProto)| {
        t.dtype() == DType::Float && elements(&shape_of(t)) >= WORTH_A_CAST && wanted(name)
    };
    let names: Vec<String> = g.initializers.iter().filter(large).map(|(n, _)| n.clone()).collect();
    let mut casts = vec![];
    for name in names {
        if g.outputs.iter().any(|o| o.name() == name) {
            continue;
        }
        let t = &g.initializers[&name];
        let (values, shape) = (vedge_runtime::onnx::to_f32(t)?, shape_of(t));
        if values.iter().any(|v| f16::from_f32(*v).is_infinite()) {
            done.too_large += 1;
            continue;
        }
        let raw = values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect();
        let stored = g.fresh(&format!("{name}.f16"));
        g.initializers.remove(&name);
        g.initializers.insert(stored.clone(), tensor(&stored, DType::Float16, &shape, raw));
        g.value_info.insert(name.clone(), value_info(&name, DType::Float, &shape));
        // The Cast takes over the constant's name, so no use has to change, inner graphs included.
        casts.push(NodeProto::of("Cast", &[&stored], &[&name], vec![attr::int("to", DType::Float as i64)]));
        done.tensors += 1;
    }
    g.nodes.splice(0..0, casts);
    Ok(done)
}

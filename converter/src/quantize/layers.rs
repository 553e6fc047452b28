//! Which nodes hold weights that can become integers.

use super::number::Grid;
use vedge_calibration::View;
use vedge_runtime::onnx::{DType, Graph, NodeProto, elements};

/// A Conv, Gemm or MatMul with a constant float weight.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// Name of the node, or of its output where it has no name.
    pub name: String,
    /// Index of the node.
    pub node: usize,
    /// Value name of the input activations.
    pub activation: String,
    /// Name of the weight initializer.
    pub weight: String,
    /// Axis of the weight that counts output channels.
    pub out_axis: usize,
    /// Shape of the weight.
    pub shape: Vec<usize>,
    /// `linear`, `conv` or `depthwise conv`.
    pub class: &'static str,
    /// How elements of the activation meet the weights; `None` where that has no simple form.
    pub view: Option<View>,
}

impl Layer {
    /// Axis of the weight that counts input channels; a depthwise convolution has as many of one as of the other.
    pub fn in_axis(&self) -> usize {
        if self.class == "depthwise conv" { 0 } else { 1 - self.out_axis }
    }

    /// The grid of its weights: depthwise convolutions run in 16 bits and gain nothing from narrow weights.
    pub fn grid(&self) -> Grid {
        if self.class == "depthwise conv" { Grid::Full } else { Grid::Narrow }
    }
}

/// A weighted node that stays in float, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Skipped {
    /// Name of the node.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// Multiply-accumulates of a layer; 0 where shapes are not known.
pub fn macs(g: &Graph, l: &Layer) -> usize {
    let output = g.nodes[l.node].output.first().and_then(|o| g.shape(o)).unwrap_or_default();
    elements(&output) / l.shape[l.out_axis].max(1) * elements(&l.shape)
}

/// Name of a node in messages.
pub fn node_name(n: &NodeProto) -> String {
    let output = n.output.first().map_or("", String::as_str);
    if n.name().is_empty() { output.into() } else { n.name().into() }
}

/// Finds every layer with a constant weight, in graph order, and those whose form cannot be quantized.
pub fn find(g: &Graph) -> (Vec<Layer>, Vec<Skipped>) {
    let (mut layers, mut skipped) = (vec![], vec![]);
    for (i, n) in g.nodes.iter().enumerate().filter(|(_, n)| n.domain().is_empty()) {
        match layer(g, i, n) {
            Ok(Some(l)) => layers.push(l),
            Ok(None) => {}
            Err(reason) => skipped.push(Skipped { name: node_name(n), reason }),
        }
    }
    (layers, skipped)
}

fn layer(g: &Graph, node: usize, n: &NodeProto) -> Result<Option<Layer>, String> {
    let op = n.op_type();
    if !matches!(op, "Conv" | "Gemm" | "MatMul") {
        return Ok(None);
    }
    let Some(weight) = g.initializers.get(n.input_name(1)) else {
        return match g.initializers.contains_key(n.input_name(0)) {
            true => Err(format!("{op} with the constant on the left")),
            false => Ok(None),
        };
    };
    if g.initializers.contains_key(n.input_name(0)) {
        return Err(format!("{op} of two constants"));
    }
    if weight.dtype() != DType::Float {
        return Err(format!("weight of type {:?}, only float32 is quantized", weight.dtype()));
    }
    let shape = vedge_runtime::onnx::shape_of(weight);
    if g.shape(n.input_name(0)).is_none() {
        return Err(format!("shape of the input `{}` is not known", n.input_name(0)));
    }
    let (out_axis, class) = match op {
        "Conv" if shape.len() == 4 => {
            let group = n.int("group", 1);
            let depthwise = group > 1 && shape[1] == 1;
            (0, if depthwise { "depthwise conv" } else { "conv" })
        }
        "Gemm" if shape.len() == 2 && n.int("transA", 0) == 0 => {
            (1 - n.int("transB", 0).clamp(0, 1) as usize, "linear")
        }
        "Gemm" => return Err("Gemm with transA".into()),
        "MatMul" if shape.len() == 2 => (1, "linear"),
        _ => return Err(format!("{op} with a weight of shape {shape:?}")),
    };
    Ok(Some(Layer {
        name: node_name(n),
        node,
        activation: n.input_name(0).into(),
        weight: n.input_name(1).into(),
        out_axis,
        view: match op {
            "Conv" => patches(n, &shape),
            _ => Some(View::Rows),
        },
        shape,
        class,
    }))
}

/// The view of a convolution that is dense or has one filter for each channel.
fn patches(n: &NodeProto, shape: &[usize]) -> Option<View> {
    let two = |name: &str| match n.ints(name) {
        None => Some([1, 1]),
        Some(&[a, b]) if a > 0 && b > 0 => Some([a as usize, b as usize]),
        Some(_) => None,
    };
    let pads = match n.ints("pads") {
        None => [0; 4],
        Some(&[t, l, b, r]) if t.min(l).min(b).min(r) >= 0 => [t, l, b, r].map(|p| p as usize),
        Some(_) => return None,
    };
    let group = n.int("group", 1);
    let depthwise = group > 1 && shape[1] == 1 && group as usize == shape[0];
    if !(depthwise || group == 1) || !matches!(n.string("auto_pad", "NOTSET"), "NOTSET" | "") {
        return None;
    }
    let (stride, dilation) = (two("strides")?, two("dilations")?);
    Some(View::Patches { kernel: [shape[2], shape[3]], stride, dilation, pads, depthwise })
}

//! Constant weights as a file spells them: float, float16 behind a Cast, or int8 behind DequantizeLinear.

use crate::onnx::{DType, Graph, NodeProto, Uses, elements, shape_of, to_f32, to_i8, to_i64};
use std::borrow::Cow;

/// A constant weight tensor.
pub enum Constant {
    /// Float values.
    F32(Vec<f32>, Vec<usize>),
    /// 8-bit values, symmetric, with a scale for each index of `axis` (or one for all).
    I8 {
        /// Values.
        values: Vec<i8>,
        /// Shape.
        shape: Vec<usize>,
        /// Scales: one, or one for each index of `axis`.
        scale: Vec<f32>,
        /// Axis of the scales.
        axis: usize,
    },
}

impl Constant {
    /// Shape of the tensor.
    pub fn shape(&self) -> &[usize] {
        match self {
            Constant::F32(_, shape) | Constant::I8 { shape, .. } => shape,
        }
    }

    /// The values as floats, in their order.
    pub fn to_f32(&self) -> Cow<'_, [f32]> {
        match self {
            Constant::F32(values, _) => Cow::Borrowed(values),
            Constant::I8 { values, shape, scale, axis } => {
                // With one scale for all, any axis will do.
                let inner: usize = shape.iter().skip(axis + 1).product();
                let of = |i: usize| scale[i / inner.max(1) % scale.len()];
                Cow::Owned(values.iter().enumerate().map(|(i, &v)| f32::from(v) * of(i)).collect())
            }
        }
    }
}

/// The constant that a value is, looking through DequantizeLinear, Cast and Transpose of two axes.
pub fn constant(g: &Graph, uses: &Uses, name: &str) -> Option<Constant> {
    if let Some(t) = g.initializers.get(name) {
        return Some(Constant::F32(to_f32(t).ok()?, shape_of(t)));
    }
    let n = &g.nodes[uses.producer(name)?];
    match n.op_type() {
        "Cast" => match constant(g, uses, n.input_name(0))? {
            c @ Constant::F32(..) => Some(c),
            Constant::I8 { .. } => None,
        },
        "DequantizeLinear" => dequantized(g, n),
        "Transpose" if n.ints("perm").is_none_or(|p| p == [1, 0]) => transpose(constant(g, uses, n.input_name(0))?),
        _ => None,
    }
}

fn dequantized(g: &Graph, n: &NodeProto) -> Option<Constant> {
    let t = g.initializers.get(n.input_name(0))?;
    let shape = shape_of(t);
    let scale = g.const_f32(n.input_name(1))?;
    let zero = match n.input_name(2) {
        "" => vec![0],
        z => g.const_i64(z)?,
    };
    // An unsigned tensor with zero point 128 is a signed one.
    let values = match t.dtype() {
        DType::Int8 if zero.iter().all(|&z| z == 0) => to_i8(t).ok()?,
        DType::Uint8 if zero.iter().all(|&z| z == 128) => to_i64(t).ok()?.iter().map(|v| (v - 128) as i8).collect(),
        _ => return None,
    };
    let axis = if scale.len() == 1 { 0 } else { normal_axis(n.int("axis", 1), shape.len())? };
    if scale.len() != 1 && shape.get(axis) != Some(&scale.len()) {
        return None;
    }
    Some(Constant::I8 { values, shape, scale, axis })
}

/// An axis counted from the end, from the start.
pub fn normal_axis(axis: i64, rank: usize) -> Option<usize> {
    usize::try_from(if axis < 0 { axis + rank as i64 } else { axis }).ok().filter(|&a| a < rank)
}

fn transpose(c: Constant) -> Option<Constant> {
    fn flip<T: Copy>(v: &[T], shape: &[usize]) -> Vec<T> {
        let (r, c) = (shape[0], shape[1]);
        (0..r * c).map(|i| v[i % r * c + i / r]).collect()
    }
    let shape = c.shape().to_vec();
    if shape.len() != 2 || elements(&shape) == 0 {
        return None;
    }
    let flipped = vec![shape[1], shape[0]];
    Some(match c {
        Constant::F32(v, _) => Constant::F32(flip(&v, &shape), flipped),
        Constant::I8 { values, scale, axis, .. } => {
            let axis = if scale.len() == 1 { 0 } else { 1 - axis };
            Constant::I8 { values: flip(&values, &shape), shape: flipped, scale, axis }
        }
    })
}

/// The static quantization of an activation value: the float value before QuantizeLinear, its scale and zero point as
/// for u8 (an int8 zero point plus 128). `None` when the value is not a QuantizeLinear → DequantizeLinear pair with
/// one constant scale.
pub fn quantized(g: &Graph, uses: &Uses, name: &str) -> Option<(String, f32, u8)> {
    let dq = &g.nodes[uses.producer(name)?];
    if dq.op_type() != "DequantizeLinear" {
        return None;
    }
    let q = &g.nodes[uses.producer(dq.input_name(0))?];
    if q.op_type() != "QuantizeLinear" {
        return None;
    }
    let parameters = |n: &NodeProto| {
        let scale = g.const_scalar(n.input_name(1)).filter(|s| s.is_finite() && *s > 0.)?;
        let zero = match n.input_name(2) {
            "" => (0, DType::Uint8),
            z => {
                let t = g.initializers.get(z)?;
                (*to_i64(t).ok()?.first()?, t.dtype())
            }
        };
        let zero = match zero {
            (z @ 0..=255, DType::Uint8) => z as u8,
            (z @ -128..=127, DType::Int8) => (z + 128) as u8,
            _ => return None,
        };
        Some((scale, zero))
    };
    let p = parameters(q)?;
    (parameters(dq)? == p).then(|| (q.input_name(0).to_string(), p.0, p.1))
}

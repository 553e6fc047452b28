//! Constant weights as a file spells them: float, float16 behind a Cast, or int8 behind DequantizeLinear.

use super::pairs::Pair;
use crate::kernels::linear::InputQuant;
use crate::model::qdq::MOVES;
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
        let values = to_f32(t).ok()?;
        g.forget(t);
        return Some(Constant::F32(values, shape_of(t)));
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
    g.forget(t);
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

/// How an activation value is quantized, and the float value to quantize so: that before QuantizeLinear, or, where its
/// elements were moved since, the value itself (quantizing it again gives the same integers). `None` when the value is not
/// a pair of QuantizeLinear (or DynamicQuantizeLinear) and DequantizeLinear with one constant scale.
pub fn quantized(g: &Graph, uses: &Uses, name: &str) -> Option<(String, InputQuant)> {
    let mut source = name;
    let dq = loop {
        let n = &g.nodes[uses.producer(source)?];
        match n.op_type() {
            "DequantizeLinear" => break n,
            op if MOVES.contains(&op) || op == "Clip" => source = n.input_name(0),
            _ => return None,
        }
    };
    let q = &g.nodes[uses.producer(dq.input_name(0))?];
    let before = if source == name { q.input_name(0) } else { name }.to_string();
    if q.op_type() == "DynamicQuantizeLinear" {
        return (source == name && dq.input == q.output).then_some((before, InputQuant::Whole));
    }
    let p = Pair::at(g, uses, source)?.parameters;
    Some((before, InputQuant::Static { scale: p.scale, zero: p.byte()? }))
}

/// One scale and zero point for all elements, both constant.
#[derive(Clone, Debug, PartialEq)]
pub struct Parameters {
    /// Step; positive.
    pub scale: f32,
    /// The integer that stands for zero.
    pub zero: i64,
    /// Type of the integers.
    pub dtype: DType,
}

impl Parameters {
    /// Those of a QuantizeLinear or DequantizeLinear.
    pub fn of(g: &Graph, n: &NodeProto) -> Option<Parameters> {
        let scale = g.const_scalar(n.input_name(1)).filter(|s| s.is_finite() && *s > 0.)?;
        let (zero, dtype) = match n.input_name(2) {
            "" => (0, DType::Uint8),
            z => {
                let t = g.initializers.get(z)?;
                (*to_i64(t).ok()?.first()?, t.dtype())
            }
        };
        let p = Parameters { scale, zero, dtype };
        let (low, high) = p.range()?;
        (low..=high).contains(&zero).then_some(p)
    }

    /// The zero point where the integers are stored as u8; `None` where they are no bytes.
    pub fn byte(&self) -> Option<u8> {
        match self.dtype {
            DType::Uint8 => Some(self.zero as u8),
            DType::Int8 => Some((self.zero + 128) as u8),
            _ => None,
        }
    }

    /// Smallest and largest integer.
    pub fn range(&self) -> Option<(i64, i64)> {
        match self.dtype {
            DType::Uint8 => Some((0, 255)),
            DType::Int8 => Some((-128, 127)),
            DType::Uint16 => Some((0, 65535)),
            DType::Int16 => Some((-32768, 32767)),
            _ => None,
        }
    }
}

//! Quantization of constants, evaluated.

use super::Reader;
use crate::model::lower::constant::normal_axis;
use crate::onnx::{DType, NodeProto, elements, shape_of, tensor, to_f32, to_i64};

impl Reader<'_> {
    /// Scale and zero point of each element of a constant of that shape.
    fn each(&self, n: &NodeProto, shape: &[usize]) -> Option<impl Fn(usize) -> (f32, i64) + use<>> {
        let scale = self.g.const_f32(n.input_name(1))?;
        let zero = match n.input_name(2) {
            "" => vec![0],
            z => self.g.const_i64(z)?,
        };
        if n.int("block_size", 0) != 0 || scale.is_empty() || zero.is_empty() {
            return None;
        }
        let axis = if scale.len() == 1 { 0 } else { normal_axis(n.int("axis", 1), shape.len())? };
        if scale.len() > 1 && shape[axis] != scale.len() || zero.len() > scale.len() {
            return None;
        }
        let inner = elements(shape.get(axis + 1..).unwrap_or(&[])).max(1);
        Some(move |i: usize| {
            let c = i / inner % scale.len();
            (scale[c], zero[c % zero.len()])
        })
    }

    /// Evaluates a QuantizeLinear of a constant.
    pub(super) fn quantize_constant(&mut self, n: &NodeProto) -> Option<()> {
        let t = &self.g.initializers[n.input_name(0)];
        let (values, shape) = (to_f32(t).ok()?, shape_of(t));
        let dtype = self.g.initializers.get(n.input_name(2)).map_or(DType::Uint8, |z| z.dtype());
        let (low, high) = match dtype {
            DType::Uint8 => (0., 255.),
            DType::Int8 => (-128., 127.),
            _ => return None,
        };
        let of = self.each(n, &shape)?;
        let one = |(i, v): (usize, &f32)| {
            let (scale, zero) = of(i);
            ((v / scale).round_ties_even() + zero as f32).clamp(low, high) as i64 as u8
        };
        let raw = values.iter().enumerate().map(one).collect();
        let name = &n.output[0];
        self.g.initializers.insert(name.clone(), tensor(name, dtype, &shape, raw));
        Some(())
    }

    /// Evaluates a DequantizeLinear of a constant.
    pub(super) fn dequantize_constant(&mut self, n: &NodeProto) -> Option<()> {
        let t = &self.g.initializers[n.input_name(0)];
        let (values, shape) = (to_i64(t).ok()?, shape_of(t));
        let of = self.each(n, &shape)?;
        let one = |(i, v): (usize, &i64)| {
            let (scale, zero) = of(i);
            (v - zero) as f32 * scale
        };
        let values: Vec<f32> = values.iter().enumerate().map(one).collect();
        self.constant(&n.output[0], &shape, &values);
        Some(())
    }

    /// Evaluates a Reshape of a constant.
    pub(super) fn reshape_constant(&mut self, n: &NodeProto) -> Option<()> {
        let mut t = self.g.initializers[n.input_name(0)].clone();
        let mut shape = self.g.const_i64(n.input_name(1))?;
        let count = elements(&shape_of(&t)) as i64;
        let multiply = |p: i64, d: &i64| p.checked_mul(*d);
        let known = shape.iter().filter(|d| **d > 0).try_fold(1, multiply)?;
        if shape.contains(&0) {
            return None;
        }
        shape.iter_mut().filter(|d| **d < 0).for_each(|d| *d = count / known);
        if shape.iter().try_fold(1, multiply) != Some(count) {
            return None;
        }
        (t.dims, t.name) = (shape, Some(n.output[0].clone()));
        self.g.initializers.insert(n.output[0].clone(), t);
        Some(())
    }
}

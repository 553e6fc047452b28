//! `TensorProto` to and from vectors.

use super::proto::{
    TensorProto, TensorShapeProto, TypeProto, ValueInfoProto, tensor_shape_proto::Dimension,
    tensor_shape_proto::dimension, type_proto,
};
use crate::error::{Error, Result};
use half::f16;

/// Element types of ONNX tensors that vedge reads or writes.
pub use super::proto::tensor_proto::DataType as DType;

impl TensorProto {
    /// Element type; `Undefined` for one that this build does not know.
    pub fn dtype(&self) -> DType {
        DType::try_from(self.data_type()).unwrap_or(DType::Undefined)
    }
}

/// Dimensions of a tensor; `[]` is a scalar.
pub fn shape_of(t: &TensorProto) -> Vec<usize> {
    t.dims.iter().map(|&d| d.max(0) as usize).collect()
}

/// Number of elements of a shape (1 for a scalar); the largest number where it would be larger.
pub fn elements(shape: &[usize]) -> usize {
    shape.iter().fold(1, |n, &s| n.saturating_mul(s))
}

/// A tensor from little-endian bytes.
pub fn tensor(name: &str, dtype: DType, shape: &[usize], raw: Vec<u8>) -> TensorProto {
    TensorProto {
        name: Some(name.into()),
        data_type: Some(dtype as i32),
        dims: shape.iter().map(|&d| d as i64).collect(),
        raw_data: Some(raw.into()),
        ..TensorProto::default()
    }
}

/// A float32 tensor.
pub fn f32_tensor(name: &str, shape: &[usize], values: &[f32]) -> TensorProto {
    debug_assert_eq!(elements(shape), values.len());
    tensor(name, DType::Float, shape, values.iter().flat_map(|v| v.to_le_bytes()).collect())
}

/// An int64 tensor.
pub fn i64_tensor(name: &str, shape: &[usize], values: &[i64]) -> TensorProto {
    debug_assert_eq!(elements(shape), values.len());
    tensor(name, DType::Int64, shape, values.iter().flat_map(|v| v.to_le_bytes()).collect())
}

/// The type and fixed shape of a value.
pub fn value_info(name: &str, dtype: DType, shape: &[usize]) -> ValueInfoProto {
    let dim = |&d: &usize| Dimension { value: Some(dimension::Value::DimValue(d as i64)), ..Dimension::default() };
    let tensor = type_proto::Tensor {
        elem_type: Some(dtype as i32),
        shape: Some(TensorShapeProto { dim: shape.iter().map(dim).collect() }),
    };
    ValueInfoProto {
        name: Some(name.into()),
        r#type: Some(TypeProto { value: Some(type_proto::Value::TensorType(tensor)), ..TypeProto::default() }),
        ..ValueInfoProto::default()
    }
}

fn chunks<const N: usize, T>(t: &TensorProto, f: impl Fn([u8; N]) -> T) -> Vec<T> {
    t.raw_data().as_ref().chunks_exact(N).map(|c| f(c.try_into().expect("chunk of N bytes"))).collect()
}

fn check(t: &TensorProto, len: usize) -> Result<()> {
    let want = elements(&shape_of(t));
    if len == want {
        return Ok(());
    }
    Err(Error::BadModel(format!(
        "tensor `{}` holds {len} elements where its shape {:?} needs {want}: the file is damaged",
        t.name(),
        t.dims
    )))
}

fn wrong_type<T>(t: &TensorProto, want: &str) -> Result<T> {
    Err(Error::BadModel(format!("tensor `{}` has element type {:?}, expected {want}", t.name(), t.dtype())))
}

/// Values of a float32, float16 or float64 tensor, widened or narrowed to f32.
///
/// # Errors
/// [`Error::BadModel`] for another element type or when the data does not fill the shape.
pub fn to_f32(t: &TensorProto) -> Result<Vec<f32>> {
    let raw = !t.raw_data().is_empty();
    let values = match t.dtype() {
        DType::Float if raw => chunks(t, f32::from_le_bytes),
        DType::Float => t.float_data.clone(),
        DType::Float16 if raw => chunks(t, |b| f16::from_le_bytes(b).to_f32()),
        DType::Float16 => t.int32_data.iter().map(|&v| f16::from_bits(v as u16).to_f32()).collect(),
        DType::Double if raw => chunks(t, |b| f64::from_le_bytes(b) as f32),
        DType::Double => t.double_data.iter().map(|&v| v as f32).collect(),
        _ => return wrong_type(t, "a float"),
    };
    check(t, values.len()).map(|()| values)
}

/// Values of an integer or bool tensor as i64.
///
/// # Errors
/// [`Error::BadModel`] for another element type or when the data does not fill the shape.
pub fn to_i64(t: &TensorProto) -> Result<Vec<i64>> {
    let raw = !t.raw_data().is_empty();
    let values: Vec<i64> = match t.dtype() {
        DType::Int64 if raw => chunks(t, i64::from_le_bytes),
        DType::Int64 => t.int64_data.clone(),
        DType::Int32 if raw => chunks(t, |b| i64::from(i32::from_le_bytes(b))),
        DType::Int16 if raw => chunks(t, |b| i64::from(i16::from_le_bytes(b))),
        DType::Uint16 if raw => chunks(t, |b| i64::from(u16::from_le_bytes(b))),
        DType::Int8 if raw => chunks(t, |b: [u8; 1]| i64::from(b[0] as i8)),
        DType::Uint8 | DType::Bool if raw => chunks(t, |b: [u8; 1]| i64::from(b[0])),
        DType::Int32 | DType::Int16 | DType::Uint16 | DType::Int8 | DType::Uint8 | DType::Bool => {
            t.int32_data.iter().map(|&v| i64::from(v)).collect()
        }
        _ => return wrong_type(t, "an integer"),
    };
    check(t, values.len()).map(|()| values)
}

/// Values of an int8 tensor.
///
/// # Errors
/// [`Error::BadModel`] for another element type or when the data does not fill the shape.
pub fn to_i8(t: &TensorProto) -> Result<Vec<i8>> {
    if t.dtype() != DType::Int8 {
        return wrong_type(t, "int8");
    }
    let values: Vec<i8> = match t.raw_data() {
        [] => t.int32_data.iter().map(|&v| v as i8).collect(),
        _ => chunks(t, i8::from_le_bytes),
    };
    check(t, values.len()).map(|()| values)
}

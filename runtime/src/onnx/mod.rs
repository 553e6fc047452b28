//! ONNX files as data: the protobuf types, a graph that passes edit by value name, and tensors in and out.
//!
//! The board and the workstation share this module: what `vedge convert` writes and what `vedge-run` lowers is
//! one representation.

mod graph;
#[allow(missing_docs, clippy::all, rustdoc::all)]
#[rustfmt::skip]
pub mod proto;
mod sane;
mod tensor;

pub use graph::{Graph, Uses, attr};
pub use proto::{AttributeProto, ModelProto, NodeProto, TensorProto, ValueInfoProto};
pub use sane::absurd;
pub use tensor::{DType, elements, f32_tensor, i64_tensor, shape_of, tensor, to_f32, to_i8, to_i64, value_info};

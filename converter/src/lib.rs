//! ONNX in, small and fast ONNX out, passes, evaluation, the vedge command line.

pub mod check;
pub mod passes;
pub mod shapes;

//! ONNX in, small and fast ONNX out, passes, evaluation, the vedge command line.

pub mod arch;
pub mod budget;
pub mod certainty;
pub mod check;
pub mod cmd;
pub mod convert;
pub mod deploy;
pub mod evaluate;
pub mod merge;
pub mod passes;
pub mod preset;
pub mod progress;
pub mod prune;
pub mod quantize;
pub mod refit;
pub mod report;
pub mod shapes;

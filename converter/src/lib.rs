//! ONNX in, small and fast ONNX out, passes, evaluation, the vedge command line.

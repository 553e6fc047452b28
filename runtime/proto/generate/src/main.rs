//! Writes `runtime/src/onnx/proto.rs` from the vendored `onnx.proto`.

fn main() -> std::io::Result<()> {
    let proto = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let out = proto.parent().unwrap().join("src/onnx");
    prost_build::Config::new()
        // Weights stay slices of the (memory-mapped) file instead of being copied.
        .bytes([".onnx.TensorProto.raw_data"])
        .out_dir(&out)
        .compile_protos(&[proto.join("onnx.proto")], &[proto])?;
    std::fs::rename(out.join("onnx.rs"), out.join("proto.rs"))
}

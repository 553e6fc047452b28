//! Damaged and unfit models: always an error in words, never a panic.

use anyhow::Result;
use bytes::Bytes;
use std::path::{Path, PathBuf};
use vedge_converter::passes::{Prepare, prepare};
use vedge_runtime::onnx::{Graph, NodeProto, attr};
use vedge_runtime::{Error, Result as VedgeResult};
use vedge_tests::zoo;

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("reference/resize/vit.ts.onnx")
}

fn convert(bytes: &[u8]) -> VedgeResult<Graph> {
    let mut graph = Graph::decode(Bytes::copy_from_slice(bytes), None)?;
    prepare(&mut graph, &Prepare::default())?;
    Ok(graph)
}

fn said(e: &Error) -> String {
    let text = e.to_string();
    assert!(!text.is_empty() && !text.contains("panicked"), "{text}");
    text
}

#[test]
fn truncated_models_are_refused() -> Result<()> {
    let bytes = std::fs::read(model())?;
    convert(&bytes)?;
    let cuts = (0..64).map(|i| bytes.len() * i / 64).chain(bytes.len() - 40..bytes.len());
    for cut in cuts {
        // What a cut at the border of two fields leaves may still be a model; then it must be a complete one.
        if let Err(e) = convert(&bytes[..cut]) {
            said(&e);
        }
    }
    insta::assert_snapshot!(said(&convert(&[]).expect_err("empty")), @"the file is empty");
    insta::assert_snapshot!(said(&convert(&bytes[..1000]).expect_err("truncated")), @"not an ONNX model, or a damaged one (failed to decode Protobuf message: ModelProto.graph: buffer underflow)");
    insta::assert_snapshot!(said(&convert(&b"GIF89a not an ONNX file"[..]).expect_err("no model")), @"not an ONNX model, or a damaged one (failed to decode Protobuf message: invalid wire type value: 7)");
    Ok(())
}

#[test]
fn flipped_bits_never_panic() -> Result<()> {
    let bytes = std::fs::read(model())?;
    let mut state = 7u64;
    let mut next = |below: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % below
    };
    let (mut refused, mut accepted) = (0, 0);
    for round in 0..300 {
        let mut damaged = bytes.clone();
        for _ in 0..1 + round % 3 {
            let at = next(bytes.len());
            damaged[at] ^= 1 << next(8);
        }
        match convert(&damaged) {
            Ok(_) => accepted += 1,
            Err(e) => {
                said(&e);
                refused += 1;
            }
        }
    }
    assert!(refused > 10 && accepted > 10, "{refused} refused, {accepted} accepted: the test tests nothing");
    Ok(())
}

#[test]
fn missing_external_data_is_named() -> Result<()> {
    use vedge_runtime::onnx::proto::{StringStringEntryProto, tensor_proto::DataLocation};
    let mut graph = Graph::read(&model())?;
    let t = graph.initializers.values_mut().next().expect("a weight");
    t.raw_data = None;
    t.data_location = Some(DataLocation::External as i32);
    t.external_data = vec![StringStringEntryProto { key: Some("location".into()), value: Some("weights.bin".into()) }];
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("model.onnx");
    graph.write(&path)?;
    let e = Graph::read(&path).expect_err("the weights are missing").to_string();
    assert!(e.contains("weights.bin"), "{e}");
    Ok(())
}

#[test]
fn an_unsupported_operator_is_named_with_its_node() -> Result<()> {
    let refused = |op: &str, domain: &str| -> Result<String> {
        let mut graph = Graph::read(&model())?;
        let output = graph.outputs[0].name().to_string();
        let last = graph.nodes.iter_mut().find(|n| n.output.contains(&output)).expect("a node makes the logits");
        last.output[0] = "before".into();
        let mut node = NodeProto::of(op, &["before"], &[&output], vec![attr::int("mode", 1)]);
        node.domain = Some(domain.into());
        node.name = Some("/head/odd".into());
        graph.nodes.push(node);
        let e = prepare(&mut graph, &Prepare::default()).expect_err("unsupported");
        Ok(format!("{e}\nhint: {}", e.hint().unwrap_or("none")))
    };
    insta::assert_snapshot!(refused("Wobble", "")?, @r"
    node `/head/odd` (Wobble): operator `Wobble` is not supported
    hint: export the model without it, or with only operators of the default ONNX domain
    ");
    insta::assert_snapshot!(refused("Gelu", "my.own")?, @r"
    node `/head/odd` (Gelu): no operator set declared for `my.own`
    hint: none
    ");
    let mut loops = zoo::load("mamba_loop.ts")?;
    let e = prepare(&mut loops, &Prepare::default()).expect_err("a loop");
    insta::assert_snapshot!(format!("{e}"), @"node `SequenceEmpty_150` (SequenceEmpty): operator `SequenceEmpty` is not supported");
    Ok(())
}

#[test]
fn contradictions_are_named() -> Result<()> {
    let refused = |break_it: &dyn Fn(&mut Graph)| -> Result<String> {
        let mut graph = Graph::read(&model())?;
        break_it(&mut graph);
        Ok(prepare(&mut graph, &Prepare::default()).expect_err("broken").to_string())
    };
    insta::assert_snapshot!(refused(&|g| g.nodes.swap(0, 9))?, @"node `/Where` (Where) needs `/Equal_output_0`, which nothing produces before it");
    insta::assert_snapshot!(refused(&|g| { g.nodes.remove(5); })?, @"node `/Concat` (Concat) needs `/patch_embed/Transpose_output_0`, which nothing produces before it");
    insta::assert_snapshot!(refused(&|g| g.set_opset(9))?, @"operator set 9: vedge reads 11 to 25");
    insta::assert_snapshot!(refused(&|g| g.outputs.clear())?, @"the graph has no output");
    insta::assert_snapshot!(refused(&|g| {
        let name = g.initializers.keys().find(|k| k.contains("qkv.bias")).expect("a bias").clone();
        g.initializers.get_mut(&name).expect("there").dims = vec![47];
    })?, @"tensor `blocks.0.attn.qkv.bias` holds 192 bytes where its shape [47] needs 188: the file is damaged");
    Ok(())
}

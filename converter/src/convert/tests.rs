use super::*;
use std::path::PathBuf;

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models")
}

fn settings(count: usize) -> Settings {
    Settings {
        calibration: Some(Pictures { dir: models().join("fashion/calibration"), count }),
        preprocess: Some(models().join("fashion.json").display().to_string()),
        ..Settings::default()
    }
}

fn error(s: &Settings) -> Error {
    match convert(&models().join("deit_nano.onnx"), s) {
        Ok(_) => panic!("must fail"),
        Err(e) => e,
    }
}

#[test]
fn the_same_input_gives_the_same_bytes_with_any_number_of_threads() {
    for model in ["deit_nano.onnx", "mobilevit_nano.onnx"] {
        let bytes = |threads| {
            let options = Options { threads, ..Options::default() };
            convert(&models().join(model), &Settings { options, ..settings(10) }).unwrap().graph.encode()
        };
        let one = bytes(1);
        assert!(one == bytes(1), "{model}: another file from the same input");
        assert!(one == bytes(3), "{model}: another file with three threads");
    }
}

#[test]
fn the_card_says_what_was_done() {
    let c = convert(&models().join("deit_nano.onnx"), &settings(10)).unwrap();
    assert_eq!((c.card.architecture.as_str(), c.card.precision.as_str()), ("deit", "int8"));
    assert_eq!((c.card.labels.len(), c.card.labels[0].as_str()), (10, "0_t-shirt"));
    assert_eq!(c.card.output, OutputKind { name: "logits".into(), kind: "logits".into() });
    assert_eq!(c.card.provenance.calibration.as_ref().unwrap().pictures, 10);
    assert_eq!(c.card.self_test.as_ref().unwrap().logits.len(), 10);
    assert_eq!(Card::of(&c.graph).unwrap().unwrap(), c.card);
    // Eight blocks of four linear layers, the patch embedding and two heads: good enough without float layers.
    assert_eq!((c.layers.len(), c.skipped.len()), (35, 0));
    let a = &c.architecture;
    assert_eq!((a.blocks, &a.width[..], &a.tokens[..], &a.mlp[..]), (8, &[128][..], &[66][..], &[512][..]));
}

#[test]
fn an_int8_model_is_not_converted_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("q.onnx");
    convert(&models().join("deit_nano.onnx"), &settings(2)).unwrap().graph.write(&path).unwrap();
    let Err(e) = convert(&path, &settings(2)) else { panic!("must fail") };
    assert!(e.to_string().contains("is INT8 already"), "{e}");
}

#[test]
fn wrong_settings_are_usage_errors_that_name_the_next_step() {
    let usage = |s: &Settings, what: &str, hint: &str| {
        let e = error(s);
        assert!(matches!(e, Error::Usage { .. }), "{e:?}");
        assert!(e.to_string().contains(what), "{e}");
        assert!(e.hint().unwrap_or_default().contains(hint), "{:?}", e.hint());
    };
    usage(&Settings { calibration: None, ..settings(1) }, "INT8 needs calibration pictures", "--calib DIR");
    usage(&Settings { preprocess: None, ..settings(1) }, "has no card", "--preprocess");
    usage(
        &Settings { preprocess: Some("haf".into()), ..settings(1) },
        "unknown preprocess preset `haf`",
        "one of half,",
    );
    usage(&Settings { std: Some([0.0; 3]), ..settings(1) }, "must be positive", "");
    usage(&settings(0), "--calib-count 0", "");
    let empty = tempfile::tempdir().unwrap();
    let calibration = Some(Pictures { dir: empty.path().into(), count: 8 });
    usage(&Settings { calibration, ..settings(1) }, "no class folders", "DIR/<class>/<picture>");
}

#[test]
fn a_picture_that_is_none_is_named() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("a")).unwrap();
    std::fs::write(dir.path().join("a/broken.png"), "not a picture").unwrap();
    let calibration = Some(Pictures { dir: dir.path().into(), count: 8 });
    let e = error(&Settings { calibration, ..settings(1) });
    assert!(e.to_string().contains("broken.png"), "{e}");
}

#[test]
fn float_precisions_need_no_pictures_and_answer_alike() {
    let run = |precision| {
        let s = Settings { precision, calibration: None, ..settings(1) };
        let c = convert(&models().join("mobilevit_nano.onnx"), &s).unwrap();
        assert_eq!(c.card.architecture, "mobilevit");
        (c.graph.encode().len(), c.card.self_test.unwrap().logits)
    };
    let (full, want) = run(Precision::Fp32);
    let (half, got) = run(Precision::Fp16);
    assert!(half * 100 < full * 56, "{half} {full}");
    let mut ratio = quantize::Sqnr::default();
    ratio.add(want.into_iter(), got.into_iter());
    assert!(ratio.db() > 40.0, "{}", ratio.db());
}

#[test]
fn the_cpu_preset_quantizes_weights_only() {
    let s = Settings { preset: Preset::Cpu, ..settings(4) };
    let c = convert(&models().join("deit_nano.onnx"), &s).unwrap();
    assert_eq!(c.card.activations, Activations::PerToken);
    assert_eq!(c.card.provenance.calibration.as_ref().unwrap().pictures, 4);
    assert!(c.graph.nodes.iter().all(|n| n.op_type() != "QuantizeLinear"));
    assert_eq!(c.graph.nodes.iter().filter(|n| n.op_type() == "DequantizeLinear").count(), c.layers.len());
}

#[test]
fn layers_that_are_named_stay_as_they_are() {
    let s = Settings { preset: Preset::Cpu, keep_float: vec!["Conv".into(), "*/fc2/*".into()], ..settings(4) };
    let c = convert(&models().join("deit_nano.onnx"), &s).unwrap();
    let kept: Vec<&str> = c.skipped.iter().filter(|l| l.reason == keep::REASON).map(|l| l.name.as_str()).collect();
    let note = c.card.provenance.passes.last().unwrap();
    assert!(note.contains(&format!("{} of them as asked for", kept.len())), "{note}");
    assert!(kept.iter().all(|n| !c.layers.iter().any(|l| l.name == **n)) && kept.len() > 1, "{kept:?}");
    let source = Graph::read(&models().join("deit_nano.onnx")).unwrap();
    let conv = |g: &Graph| g.nodes.iter().find(|n| n.op_type() == "Conv").unwrap().input_name(1).to_string();
    assert_eq!(c.graph.const_f32(&conv(&c.graph)), source.const_f32(&conv(&source)));
    // Also where the precision is chosen a name that means nothing is an error.
    let wrong = Settings { precision: Precision::Auto, keep_float: vec!["Cnv".into()], ..settings(4) };
    assert!(error(&wrong).to_string().contains("--keep-float Cnv"));
}

#[test]
fn the_card_says_how_near_int8_is_to_float() {
    let c = convert(&models().join("mobilevit_nano.onnx"), &settings(40)).unwrap();
    let a = c.card.accuracy.as_ref().unwrap();
    assert_eq!((a.pictures, a.measured_on.as_str()), (10, "calibration pictures held out"));
    assert!(a.float_top1 >= 0.5 && a.top1 >= a.float_top1 - 0.2 && a.agreement >= 0.8, "{a:?}");
    assert!(a.sqnr_db.unwrap() > 25.0, "{a:?}");
    let of = |kind| c.candidates.iter().find(|c| c.activations == kind).unwrap().effect.sqnr;
    let (portable, cpu) = (of(Activations::Static), of(Activations::PerToken));
    let note = c.card.provenance.passes.last().unwrap();
    for number in [portable, cpu] {
        assert!(note.contains(&format!("({number:.1} dB)")), "{note}");
    }
    // Row by row only where that is meaningfully nearer; a portable file that is good is taken all the same.
    assert!(c.card.activations == Activations::Static || cpu > portable + 1.0, "{note}");
}

#[test]
fn the_cpu_preset_needs_no_pictures() {
    let s = Settings { preset: Preset::Cpu, calibration: None, ..settings(1) };
    let c = convert(&models().join("deit_nano.onnx"), &s).unwrap();
    assert_eq!((c.card.activations, c.card.accuracy), (Activations::PerToken, None));
    assert_eq!(c.card.provenance.calibration, None);
}

#[test]
fn what_pictures_told_is_kept_for_the_next_conversion() {
    let dir = tempfile::tempdir().unwrap();
    let cached = Settings { cache: Some(dir.path().join("a/b")), ..settings(10) };
    let bytes = |s: &Settings| convert(&models().join("deit_nano.onnx"), s).unwrap().graph.encode();
    let plain = bytes(&settings(10));
    assert_eq!(bytes(&cached), plain);
    let files = || std::fs::read_dir(dir.path().join("a/b")).unwrap().count();
    assert_eq!(files(), 1);
    assert_eq!(bytes(&cached), plain);
    assert_eq!(files(), 1);
    // Other pictures are another file.
    bytes(&Settings { cache: cached.cache.clone(), ..settings(9) });
    assert_eq!(files(), 2);
}

#[test]
fn one_way_to_choose_ranges_can_be_asked_for() {
    let s = Settings { calibrator: Some(Calibrator::Entropy), preset: Preset::Portable, ..settings(8) };
    let c = convert(&models().join("deit_nano.onnx"), &s).unwrap();
    assert!(c.candidates.iter().all(|c| c.calibrator == Some(Calibrator::Entropy)), "{:?}", c.candidates);
    let e = error(&Settings { precision: Precision::Fp16, ..s });
    assert!(e.to_string().contains("--calibrator"), "{e}");
}

#[test]
fn auto_takes_int8_where_it_pays_and_float16_where_it_does_not() {
    let auto = |model: &Path, target: Target| {
        convert(model, &Settings { precision: Precision::Auto, target, ..settings(16) }).unwrap()
    };
    let done = auto(&models().join("deit_nano.onnx"), Target::default());
    assert_eq!(done.card.precision, "int8");
    assert!(done.verdict.as_ref().unwrap().pays && done.card.provenance.passes.last().unwrap().contains("INT8 pays"));
    // Every layer but the large ones' worth of work is gone: what is left does not pay.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("thin.onnx");
    let thin = thin_model();
    thin.write(&path).unwrap();
    let done = auto(&path, Target::default());
    assert_eq!((done.card.precision.as_str(), done.layers.len()), ("fp16", 0));
    assert!(!done.verdict.as_ref().unwrap().pays, "{:?}", done.verdict);
    assert_eq!(auto(&path, Target::default()).graph.encode(), done.graph.encode());
}

/// A model of depthwise convolutions, which hardly compute anything on what they read.
fn thin_model() -> Graph {
    use vedge_runtime::onnx::{DType, NodeProto, attr, f32_tensor, value_info};
    let mut g = crate::quantize::tests::empty(17);
    g.inputs.push(value_info("x", DType::Float, &[1, 3, 64, 64]));
    g.outputs.push(value_info("logits", DType::Float, &[1, 3]));
    for i in 0..3 {
        let weight: Vec<f32> = SelfTest::input(i, 27);
        g.initializers.insert(format!("w{i}"), f32_tensor(&format!("w{i}"), &[3, 1, 3, 3], &weight));
        let how = vec![attr::int("group", 3), attr::ints("kernel_shape", &[3, 3]), attr::ints("pads", &[1; 4])];
        let from = if i == 0 { "x".to_string() } else { format!("c{}", i - 1) };
        g.nodes.push(NodeProto::of("Conv", &[&from, &format!("w{i}")], &[&format!("c{i}")], how));
    }
    g.nodes.push(NodeProto::of("GlobalAveragePool", &["c2"], &["p"], vec![]));
    g.nodes.push(NodeProto::of("Flatten", &["p"], &["logits"], vec![]));
    g
}

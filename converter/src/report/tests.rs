use super::*;
use crate::convert::{Pictures, Settings, convert};
use crate::quantize::keep;
use std::path::{Path, PathBuf};
use vedge_calibration::Dataset;

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models")
}

/// A report of deit_nano from few pictures.
fn report() -> Report {
    let settings = Settings {
        calibration: Some(Pictures { dir: models().join("fashion/calibration"), count: 32 }),
        preprocess: Some(models().join("fashion.json").display().to_string()),
        explain: true,
        keep_float: vec!["Conv".into()],
        ..Settings::default()
    };
    let done = convert(&models().join("deit_nano.onnx"), &settings).unwrap();
    let set = Dataset::open(&models().join("fashion/test"), None).unwrap();
    let commands = vec!["vedge convert a<b".into()];
    gather(&done.subject([6_600_000, 1_800_000]), &set.pick(40), "40 test pictures", commands, &Options::default())
        .unwrap()
}

#[test]
fn the_report_measures_and_the_page_holds_it() {
    let r = report();
    let a = r.accuracy.as_ref().unwrap();
    assert_eq!((a.float.of, a.model.of, a.agreement.of), (40, 40, 40));
    assert!(a.agreement.value > 0.9 && a.sqnr_db > 30.0, "{a:?}");
    assert!((a.shift.shares.iter().sum::<f64>() - 1.0).abs() < 1e-9);
    // Every integer layer, with a finite noise that is not none, and its effect alone.
    assert_eq!(r.layers.len(), 34);
    for l in &r.layers {
        assert!((15.0..90.0).contains(&l.input_sqnr), "{l:?}");
        assert!((15.0..90.0).contains(&l.output_sqnr), "{l:?}");
        assert!(l.alone_kl.is_some_and(|k| k > 0.0) && l.alone_sqnr.is_some_and(|s| s > a.sqnr_db - 6.0), "{l:?}");
        assert!((l.shares.iter().sum::<f64>() - 1.0).abs() < 1e-6, "{l:?}");
        assert!((0.0..0.5).contains(&l.clipped), "{l:?}");
    }
    assert_eq!(r.float_layers, [("/patch_embed/proj/Conv".to_string(), keep::REASON.to_string())]);
    assert_eq!(r.moved.len(), SHOWN);
    assert!(
        r.moved
            .windows(2)
            .all(|w| (w[0].before.0 != w[0].after.0, w[0].kl) >= (w[1].before.0 != w[1].after.0, w[1].kl))
    );
    assert!(r.cost.iter().all(|c| c.median_ms >= c.min_ms && c.min_ms > 0.0));
    let page = page::html(&r);
    for id in [
        "summary",
        "accuracy",
        "pictures",
        "cost",
        "layers",
        "ranges",
        "outliers",
        "tried",
        "float",
        "shift",
        "reproduce",
    ] {
        assert!(page.contains(&format!("<section id=\"{id}\">")), "no section {id}");
    }
    assert_eq!(page.matches("data:image/jpeg;base64,/9j/").count(), SHOWN);
    assert!(page.contains("vedge convert a&lt;b"));
    // Self-contained: nothing to fetch, nothing that runs; no number that is none.
    for bad in ["http://", "https://", "<script", "url(", "@import", "NaN", ">inf<", ">-inf<"] {
        assert!(!page.contains(bad), "{bad}");
    }
    let json = serde_json::to_value(&r).unwrap();
    assert_eq!(json["layers"].as_array().unwrap().len(), 34);
}

#[test]
fn thumbnails_are_small_and_keep_the_colours() {
    let rgb = (0..300 * 200).flat_map(|i| if i % 300 < 150 { [250, 10, 10] } else { [10, 10, 250] }).collect();
    let small = vedge_runtime::preprocess::decode_bytes(&thumbnail(&Picture { width: 300, height: 200, rgb }).unwrap())
        .unwrap();
    assert_eq!((small.width, small.height), (96, 64));
    let at = |x: usize| &small.rgb[(32 * 96 + x) * 3..][..3];
    assert!(at(10)[0] > 200 && at(10)[2] < 60 && at(85)[2] > 200 && at(85)[0] < 60, "{:?} {:?}", at(10), at(85));
}

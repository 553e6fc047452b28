//! Decoding and resizing against what Pillow gives (`tests/reference/make_pictures.py`).
#![allow(missing_docs)]

use ndarray::{Array3, ArrayD, Axis};
use std::path::PathBuf;
use vedge_runtime::model::card::{Channels, Filter, Fit, Preprocess};
use vedge_runtime::preprocess::{
    Matrix, Picture, PixelFormat, Preprocessor, RawFrame, View, decode_bytes, decode_file, to_tensor,
};

fn reference(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/reference/pictures").join(name)
}

fn expected(name: &str) -> Array3<u8> {
    ndarray_npy::read_npy(reference(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// Mean and largest absolute difference in 8-bit steps.
fn difference(a: &[u8], b: &[u8]) -> (f64, u8) {
    assert_eq!(a.len(), b.len());
    let d: Vec<u8> = a.iter().zip(b).map(|(a, b)| a.abs_diff(*b)).collect();
    (d.iter().map(|&d| f64::from(d)).sum::<f64>() / d.len() as f64, *d.iter().max().unwrap())
}

fn check_decode(file: &str, mean: f64, most: u8) {
    let picture = decode_file(&reference(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
    let want = expected(&format!("{}.npy", file.split('.').next().unwrap()));
    assert_eq!((picture.height, picture.width, 3), want.dim(), "{file}");
    let (m, x) = difference(&picture.rgb, want.as_standard_layout().as_slice().unwrap());
    println!("{file}: mean {m:.3}, largest {x}");
    assert!(m <= mean && x <= most, "{file}: mean {m}, largest {x}");
}

#[test]
fn png_files_decode_as_in_pillow() {
    let names = "rgb grey one_bit palette palette_transparent rgba grey_alpha rgb16 grey16";
    for name in names.split(' ') {
        check_decode(&format!("{name}.png"), 0.0, 0);
    }
}

#[test]
fn jpeg_files_decode_as_in_pillow() {
    for name in "baseline grey_jpeg standard_tables rotated cmyk".split(' ') {
        check_decode(&format!("{name}.jpg"), 0.6, 4);
    }
    // chroma upsampling differs between decoders
    for name in "subsampled progressive".split(' ') {
        check_decode(&format!("{name}.jpg"), 1.0, 24);
    }
}

fn how(height: usize, width: usize, fit: Fit, filter: Filter, channels: Channels) -> Preprocess {
    Preprocess { height, width, fit, filter, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225], channels }
}

/// Back to 8-bit interleaved RGB; exact, because to_tensor starts from 8-bit values.
fn bytes(tensor: &ArrayD<f32>, how: &Preprocess) -> Vec<u8> {
    let t = tensor.index_axis(Axis(0), 0);
    let mut out = vec![0; how.height * how.width * 3];
    for (i, v) in t.as_standard_layout().iter().enumerate() {
        let (plane, at) = (i / (how.height * how.width), i % (how.height * how.width));
        let c = if how.channels == Channels::Rgb { plane } else { 2 - plane };
        out[at * 3 + c] = ((v * how.std[c] + how.mean[c]) * 255.0).round() as u8;
    }
    out
}

#[test]
fn resizing_equals_pillow() {
    let photo = decode_file(&reference("photo.png")).unwrap();
    for (filter, name) in [(Filter::Bilinear, "bilinear"), (Filter::Bicubic, "bicubic")] {
        let mut cases =
            vec![(how(40, 48, Fit::Squash, filter, Channels::Rgb), format!("resize_squash_{name}_48x40.npy"))];
        for (side, crop) in [(32, 0.875), (64, 1.0), (120, 0.9)] {
            let fit = Fit::Crop { crop };
            cases.push((how(side, side, fit, filter, Channels::Rgb), format!("resize_crop_{name}_{side}.npy")));
            cases.push((how(side, side, fit, filter, Channels::Bgr), format!("resize_crop_{name}_{side}.npy")));
        }
        for (how, file) in cases {
            let got = to_tensor(&photo, &how).unwrap();
            assert_eq!(got.shape(), [1, 3, how.height, how.width]);
            let (mean, most) = difference(&bytes(&got, &how), expected(&file).as_standard_layout().as_slice().unwrap());
            println!("{file}: mean {mean:.4}, largest {most}");
            assert!(mean <= 0.2 && most <= 2, "{file}: mean {mean}, largest {most}");
        }
    }
}

/// As `VIEWS` in the script.
#[test]
fn parts_turned_mirrored_and_letterboxed_equal_pillow() {
    let photo = decode_file(&reference("photo.png")).unwrap();
    let crop = Fit::Crop { crop: 0.9 };
    for (name, fit, region, turns, flip, width, height) in [
        ("letterbox_wide", Fit::Letterbox, None, 0, false, 40, 56),
        ("letterbox_tall_turned_flipped", Fit::Letterbox, None, 1, true, 56, 40),
        ("region", Fit::Squash, Some("11,7,60x50"), 0, false, 48, 40),
        ("region_turned_270_crop", crop, Some("5,3,80x60"), 3, false, 32, 32),
        ("turned_90", Fit::Squash, None, 1, false, 48, 40),
        ("turned_180_flipped_crop", crop, None, 2, true, 48, 48),
        ("flipped", Fit::Squash, None, 0, true, 48, 40),
    ] {
        let how = how(height, width, fit, Filter::Bicubic, Channels::Rgb);
        let view = View { region: region.map(|r| r.parse().unwrap()), turns, flip };
        let got = Preprocessor::new(how.clone(), view).picture(&photo).unwrap();
        let want = expected(&format!("view_{name}.npy"));
        let (mean, most) = difference(&bytes(&got, &how), want.as_standard_layout().as_slice().unwrap());
        println!("{name}: mean {mean:.4}, largest {most}");
        assert!(mean <= 0.2 && most <= 2, "{name}: mean {mean}, largest {most}");
    }
}

#[test]
fn frames_of_luma_and_chroma_equal_pillow() {
    let how = how(32, 40, Fit::Squash, Filter::Bicubic, Channels::Rgb);
    for (name, format, bt709, full_range) in [
        ("yuyv_601_limited", PixelFormat::Yuyv, false, false),
        ("nv12_709_limited", PixelFormat::Nv12, true, false),
        ("nv12_601_full", PixelFormat::Nv12, false, true),
        ("uyvy_709_full", PixelFormat::Uyvy, true, true),
    ] {
        let raw = std::fs::read(reference(&format!("{name}.raw"))).unwrap();
        let want = expected(&format!("{name}.npy"));
        let mean_with = |matrix| {
            let frame = RawFrame::new(format, (96, 64), 0, matrix, raw.clone());
            let got = Preprocessor::new(how.clone(), View::default()).frame(&frame).unwrap();
            difference(&bytes(&got, &how), want.as_standard_layout().as_slice().unwrap()).0
        };
        let mean = mean_with(Matrix { bt709, full_range });
        println!("{name}: mean {mean:.3}");
        assert!(mean <= 1.0, "{name}: mean {mean}");
        for (bt709, full_range) in [(!bt709, full_range), (bt709, !full_range)] {
            let other = mean_with(Matrix { bt709, full_range });
            assert!(other > 2.0 * mean, "{name}: the wrong matrix or range does not show: {other} beside {mean}");
        }
    }
}

#[test]
fn normalization_is_exact() {
    let picture = Picture { width: 2, height: 1, rgb: vec![0, 128, 255, 255, 0, 128] };
    let how = how(1, 2, Fit::Squash, Filter::Bicubic, Channels::Rgb);
    let t = to_tensor(&picture, &how).unwrap();
    for (c, x, byte) in [(0, 0, 0u8), (0, 1, 255), (1, 0, 128), (1, 1, 0), (2, 0, 255), (2, 1, 128)] {
        assert_eq!(t[[0, c, 0, x]], (f32::from(byte) / 255.0 - how.mean[c]) / how.std[c]);
    }
}

#[test]
fn letterbox_is_filled_with_the_mean_colour() {
    let picture = Picture { width: 8, height: 4, rgb: vec![255; 96] };
    let t = to_tensor(&picture, &how(8, 8, Fit::Letterbox, Filter::Bilinear, Channels::Rgb)).unwrap();
    for y in 0..8 {
        assert_eq!(t[[0, 0, y, 3]] == 0.0, !(2..6).contains(&y), "row {y}");
    }
}

#[test]
fn what_is_no_picture_is_refused_by_name() {
    for (bytes, word) in [
        (&b""[..], "empty"),
        (b"hello there, this is text", "text"),
        (b"GIF89a\x01\x00\x01\x00", "GIF"),
        (b"\x08\x0aonnx", "08"),
        (b"\xff\xd8\xff", "truncated"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
    ] {
        let e = decode_bytes(bytes).unwrap_err().to_string();
        assert!(e.contains(word), "{e}");
    }
}

#[test]
fn damaged_files_never_panic() {
    let mut state = 1u64;
    for name in ["rgb.png", "rgb16.png", "palette.png", "baseline.jpg", "progressive.jpg", "cmyk.jpg"] {
        let whole = std::fs::read(reference(name)).unwrap();
        // the last chunk of a PNG, 12 bytes, says nothing but that it is the last
        for length in (0..whole.len() - 12).step_by(7) {
            assert!(decode_bytes(&whole[..length]).is_err(), "{name} cut at {length} of {}", whole.len());
        }
        for _ in 0..300 {
            let mut flipped = whole.clone();
            for _ in 0..3 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let bit = (state >> 33) as usize % (flipped.len() * 8);
                flipped[bit / 8] ^= 1 << (bit % 8);
            }
            let _ = decode_bytes(&flipped);
        }
    }
}

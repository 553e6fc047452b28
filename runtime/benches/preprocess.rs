//! How long a camera's frame takes to the model's tensor; `tests/benches/preprocess.py` runs it beside Pillow and OpenCV.
//!
//! Prints a JSON line a case: the format, and the median of many runs in microseconds. At last how long the tensor's looks take.

use std::time::Instant;
use vedge_runtime::appearance;
use vedge_runtime::model::card::{Channels, Filter, Fit, Preprocess};
use vedge_runtime::preprocess::{Matrix, PixelFormat, Preprocessor, RawFrame, View};

const SIZE: (usize, usize) = (640, 480);
const RUNS: usize = 400;

fn main() {
    let how = Preprocess {
        height: 224,
        width: 224,
        fit: Fit::Crop { crop: 0.9 },
        filter: Filter::Bicubic,
        mean: [0.485, 0.456, 0.406],
        std: [0.229, 0.224, 0.225],
        channels: Channels::Rgb,
    };
    for format in PixelFormat::ALL.into_iter().filter(|f| *f != PixelFormat::Mjpg) {
        let bytes = (0..format.frame_bytes(SIZE.0, SIZE.1)).map(|i| (i * i / 7 % 251) as u8).collect();
        let frame = RawFrame::new(format, SIZE, 0, Matrix::default(), bytes);
        let mut preprocessor = Preprocessor::new(how.clone(), View::default());
        let us = median(|| drop(std::hint::black_box(preprocessor.frame(&frame).expect("a whole frame"))));
        println!(r#"{{"format":"{}","us":{us:.1}}}"#, format.fourcc());
    }
    for side in [64, 224] {
        let how = Preprocess { height: side, width: side, ..how.clone() };
        let values = |i: ndarray::IxDyn| ((i[1] * 7 + i[2] * i[3]) % 251) as f32 / 100.0;
        let tensor = ndarray::ArrayD::from_shape_fn(ndarray::IxDyn(&[1, 3, side, side]), values);
        let us = median(|| drop(std::hint::black_box(appearance::of(&tensor, &how))));
        println!("looks of {side}x{side}: {us:.1} us");
    }
}

/// Median time in microseconds.
fn median(mut work: impl FnMut()) -> f64 {
    let mut times: Vec<u128> = (0..RUNS)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_nanos()
        })
        .collect();
    times.sort_unstable();
    times[RUNS / 2] as f64 / 1e3
}

//! How long a camera's frame takes to the model's tensor; `tests/benches/preprocess.py` runs it beside Pillow and OpenCV.
//!
//! Prints a JSON line a case: the format, and the median of many runs in microseconds.

use std::time::Instant;
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
        let mut times: Vec<u128> = (0..RUNS)
            .map(|_| {
                let start = Instant::now();
                std::hint::black_box(preprocessor.frame(&frame).expect("a whole frame"));
                start.elapsed().as_nanos()
            })
            .collect();
        times.sort_unstable();
        println!(r#"{{"format":"{}","us":{:.1}}}"#, format.fourcc(), times[RUNS / 2] as f64 / 1e3);
    }
}

//! Pictures and camera frames to the model's input tensor. The one implementation: calibration and evaluation call
//! it too, so what they measure is what the board sees.

mod decode;
mod jpeg;
mod pixels;
mod resize;

pub use decode::{decode_bytes, decode_file};
pub use pixels::{Matrix, PixelFormat, RawFrame};

use crate::error::Result;
use crate::model::card::{Channels, Preprocess};
use ndarray::ArrayD;

/// A picture in 8-bit RGB.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Picture {
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// Rows from the top, pixels from the left, red, green, blue; `width * height * 3` bytes.
    pub rgb: Vec<u8>,
}

/// The model's input for a picture: float32 `[1, 3, height, width]`, `(x / 255 - mean) / std` per channel.
///
/// Resampling equals Pillow's (antialiased when shrinking, rounded to 8 bits), geometry equals torchvision's.
///
/// # Errors
/// [`crate::Error::Picture`] when the picture is empty, or so long and thin that its resized form would not fit in
/// memory.
pub fn to_tensor(picture: &Picture, how: &Preprocess) -> Result<ArrayD<f32>> {
    let fitted = resize::fit(picture, how)?;
    let area = how.height * how.width;
    let mut data = Vec::with_capacity(3 * area);
    for plane in 0..3 {
        let colour = match how.channels {
            Channels::Rgb => plane,
            Channels::Bgr => 2 - plane,
        };
        // 256 values a channel: a table gives exactly what the formula gives, and faster.
        let (mean, std) = (how.mean[colour], how.std[colour]);
        let table: [f32; 256] = std::array::from_fn(|x| (x as f32 / 255.0 - mean) / std);
        // Letterbox borders are the mean colour, which is 0 after normalization.
        let mut values = vec![0.0; area];
        for y in 0..fitted.picture.height {
            let from = &fitted.picture.rgb[y * fitted.picture.width * 3..][..fitted.picture.width * 3];
            let to = &mut values[(fitted.top + y) * how.width + fitted.left..][..fitted.picture.width];
            for (t, pixel) in to.iter_mut().zip(from.chunks_exact(3)) {
                *t = table[pixel[colour] as usize];
            }
        }
        data.extend_from_slice(&values);
    }
    let shape = ndarray::IxDyn(&[1, 3, how.height, how.width]);
    Ok(ArrayD::from_shape_vec(shape, data).expect("three planes of height x width"))
}

//! Pictures and camera frames to the model's input tensor. The one implementation: calibration and evaluation call
//! it too, so what they measure is what the board sees.

mod decode;
mod fit;
mod fused;
mod jpeg;
mod pixels;
mod taps;

pub use decode::{decode_bytes, decode_file};
pub use fit::{Region, View};
pub use jpeg::{complete_frame, encode, frame_length};
pub use pixels::{Matrix, PixelFormat, RawFrame};

use crate::error::{Error, Result};
use crate::model::card::Preprocess;
use fused::Plan;
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

/// Makes the model's input of frames: float32 `[1, 3, height, width]`, `(x / 255 - mean) / std` per channel, x rounded to 8
/// bits.
///
/// Resampling equals Pillow's (antialiased when shrinking) but for its rounding between the two directions; geometry
/// equals torchvision's.
pub struct Preprocessor {
    how: Preprocess,
    view: View,
    /// For frames like the last one.
    plan: Option<(Kind, Plan)>,
}

/// What a [`Plan`] depends on.
type Kind = (PixelFormat, (usize, usize), Matrix);

impl Preprocessor {
    /// As the model's card says, looking at a part of the source, turned.
    pub fn new(how: Preprocess, view: View) -> Preprocessor {
        Preprocessor { how, view, plan: None }
    }

    /// The tensor of a camera's frame.
    ///
    /// # Errors
    /// [`Error::Picture`] when the frame is shorter than its format needs, or its JPEG is damaged; else as
    /// [`Self::picture`].
    pub fn frame(&mut self, frame: &RawFrame) -> Result<ArrayD<f32>> {
        match frame.format {
            PixelFormat::Mjpg => self.picture(&jpeg::decode_frame(&frame.bytes)?),
            PixelFormat::Y10 => {
                frame.check()?;
                self.frame(&frame.narrowed())
            }
            format => {
                frame.check()?;
                let kind = (format, (frame.width, frame.height), frame.matrix);
                self.tensor(kind, &frame.bytes, &frame.planes)
            }
        }
    }

    /// The tensor of a picture.
    ///
    /// # Errors
    /// [`Error::Picture`] when the picture is empty, or so long and thin that its resized form would not fit in memory;
    /// [`Error::Usage`] when the region does not lie inside.
    pub fn picture(&mut self, picture: &Picture) -> Result<ArrayD<f32>> {
        let Picture { width, height, rgb } = picture;
        if rgb.len() != width * height * 3 {
            let has = rgb.len();
            return Err(Error::Picture(format!("a picture of {width}x{height} has {has} bytes, not three a pixel")));
        }
        self.tensor((PixelFormat::Rgb3, (*width, *height), Matrix::default()), rgb, &[(0, width * 3)])
    }

    fn tensor(&mut self, kind: Kind, bytes: &[u8], planes: &[(usize, usize)]) -> Result<ArrayD<f32>> {
        let plan = match self.plan.take() {
            Some((of, plan)) if of == kind => plan,
            _ => Plan::new(kind.0, kind.1, kind.2, &self.how, self.view)?,
        };
        let shape = [1, 3, self.how.height, self.how.width];
        // Letterbox borders are the mean colour, which is 0 after normalization.
        let mut data = vec![0.0; shape.iter().product()];
        plan.run(bytes, planes, &mut data);
        self.plan = Some((kind, plan));
        Ok(ArrayD::from_shape_vec(ndarray::IxDyn(&shape), data).expect("three planes of height x width"))
    }
}

/// The model's input for one picture, upright and whole; see [`Preprocessor::picture`].
///
/// # Errors
/// As there.
pub fn to_tensor(picture: &Picture, how: &Preprocess) -> Result<ArrayD<f32>> {
    Preprocessor::new(how.clone(), View::default()).picture(picture)
}

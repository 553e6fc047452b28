//! Fitting a picture into height × width: torchvision's geometry, Pillow's filters.

use super::Picture;
use crate::error::{Error, Result};
use crate::model::card::{Filter, Fit, Preprocess};
use fast_image_resize::images::{TypedImage, TypedImageRef};
use fast_image_resize::pixels::U8x3;
use fast_image_resize::{FilterType, ResizeAlg, ResizeOptions, Resizer};

/// Largest intermediate picture, in pixels; a picture of 1×10000 would otherwise become gigabytes.
const LARGEST: usize = 1 << 26;

/// A picture that fits inside height × width, and where it lies there.
pub struct Fitted {
    pub picture: Picture,
    pub top: usize,
    pub left: usize,
}

/// Resizes and crops as the card says.
pub fn fit(picture: &Picture, how: &Preprocess) -> Result<Fitted> {
    if picture.width == 0 || picture.height == 0 || picture.rgb.len() != picture.width * picture.height * 3 {
        return Err(Error::Picture(format!("empty picture ({}x{})", picture.width, picture.height)));
    }
    match how.fit {
        Fit::Squash => {
            let picture = resize(picture, how.width, how.height, how.filter)?;
            Ok(Fitted { picture, top: 0, left: 0 })
        }
        Fit::Crop { crop } => {
            let (width, height) = covering(picture, how, crop);
            let picture = centre(resize(picture, width, height, how.filter)?, how.width, how.height);
            Ok(Fitted { picture, top: 0, left: 0 })
        }
        Fit::Letterbox => {
            let scale = (how.width as f64 / picture.width as f64).min(how.height as f64 / picture.height as f64);
            let side = |x: usize, most: usize| ((x as f64 * scale).round() as usize).clamp(1, most);
            let (width, height) = (side(picture.width, how.width), side(picture.height, how.height));
            let picture = resize(picture, width, height, how.filter)?;
            Ok(Fitted { picture, top: (how.height - height) / 2, left: (how.width - width) / 2 })
        }
    }
}

/// Size of the resized picture from which the centre is cropped: at least the model's size in both directions.
fn covering(picture: &Picture, how: &Preprocess, crop: f32) -> (usize, usize) {
    // The decimal number that the card shows, not its nearest f32: 224 / 0.8 must be 280, not 279.99.
    let crop: f64 = crop.to_string().parse().unwrap_or(f64::from(crop));
    let scaled = |x: usize| ((x as f64 / crop).floor() as usize).max(x);
    let (height, width) = (scaled(how.height), scaled(how.width));
    if how.height == how.width {
        // torchvision's Resize(int): the long edge is truncated
        let long = |short: usize, long: usize| (height as f64 * long as f64 / short as f64) as usize;
        if picture.width <= picture.height {
            (width, long(picture.width, picture.height))
        } else {
            (long(picture.height, picture.width), height)
        }
    } else {
        // timm's ResizeKeepRatio: both edges rounded
        let ratio = (picture.height as f64 / height as f64).min(picture.width as f64 / width as f64);
        let side = |x: usize, least: usize| ((x as f64 / ratio).round_ties_even() as usize).max(least);
        (side(picture.width, how.width), side(picture.height, how.height))
    }
}

/// torchvision's CenterCrop of a picture at least that large.
fn centre(picture: Picture, width: usize, height: usize) -> Picture {
    if (picture.width, picture.height) == (width, height) {
        return picture;
    }
    let start = |from: usize, to: usize| ((from - to) as f64 / 2.0).round_ties_even() as usize;
    let (top, left) = (start(picture.height, height), start(picture.width, width));
    let mut rgb = Vec::with_capacity(width * height * 3);
    for y in top..top + height {
        rgb.extend_from_slice(&picture.rgb[(y * picture.width + left) * 3..][..width * 3]);
    }
    Picture { width, height, rgb }
}

fn resize(picture: &Picture, width: usize, height: usize, filter: Filter) -> Result<Picture> {
    if (picture.width, picture.height) == (width, height) {
        return Ok(picture.clone());
    }
    if width.saturating_mul(height) > LARGEST {
        return Err(Error::Picture(format!(
            "a picture of {}x{} pixels would be resized to {width}x{height}: too long and thin",
            picture.width, picture.height
        )));
    }
    let filter = match filter {
        Filter::Bilinear => FilterType::Bilinear,
        Filter::Bicubic => FilterType::CatmullRom,
    };
    let failed = |e: &dyn std::fmt::Display| Error::Picture(format!("cannot resize to {width}x{height}: {e}"));
    let source = TypedImageRef::<U8x3>::from_buffer(picture.width as u32, picture.height as u32, &picture.rgb)
        .map_err(|e| failed(&e))?;
    let mut rgb = vec![0; width * height * 3];
    let mut target = TypedImage::<U8x3>::from_buffer(width as u32, height as u32, &mut rgb).map_err(|e| failed(&e))?;
    let options = ResizeOptions::new().resize_alg(ResizeAlg::Convolution(filter));
    Resizer::new().resize_typed(&source, &mut target, &options).map_err(|e| failed(&e))?;
    Ok(Picture { width, height, rgb })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::card::Channels;

    fn how(height: usize, width: usize, fit: Fit) -> Preprocess {
        Preprocess {
            height,
            width,
            fit,
            filter: Filter::Bicubic,
            mean: [0.5; 3],
            std: [0.25; 3],
            channels: Channels::Rgb,
        }
    }

    fn grey(width: usize, height: usize) -> Picture {
        Picture { width, height, rgb: vec![7; width * height * 3] }
    }

    #[test]
    fn crop_sizes_equal_torchvision() {
        let size = |w, h, side, crop| covering(&grey(w, h), &how(side, side, Fit::Crop { crop }), crop);
        assert_eq!(size(500, 375, 224, 0.875), (341, 256)); // int(256 * 500 / 375) = 341
        assert_eq!(size(375, 500, 224, 0.875), (256, 341));
        assert_eq!(size(100, 100, 224, 0.8), (280, 280)); // 224 / 0.8f32 would be 279.99
        assert_eq!(size(100, 100, 224, 0.9), (248, 248));
        assert_eq!(size(64, 64, 64, 1.0), (64, 64));
    }

    #[test]
    fn every_fit_gives_the_model_size() {
        for (w, h) in [(1, 1), (3, 200), (200, 3), (65, 64), (640, 480)] {
            for (height, width) in [(64, 64), (48, 80), (80, 48)] {
                for fit in [Fit::Crop { crop: 0.9 }, Fit::Squash] {
                    let f = super::fit(&grey(w, h), &how(height, width, fit)).unwrap();
                    assert_eq!((f.picture.width, f.picture.height), (width, height), "{w}x{h} {fit:?}");
                }
                let f = super::fit(&grey(w, h), &how(height, width, Fit::Letterbox)).unwrap();
                assert!(f.picture.width == width || f.picture.height == height);
                assert!(f.left + f.picture.width <= width && f.top + f.picture.height <= height);
            }
        }
    }

    #[test]
    fn a_thread_of_pixels_is_refused() {
        let e = super::fit(&grey(1, 100_000), &how(224, 224, Fit::Crop { crop: 1.0 })).err().unwrap();
        assert!(e.to_string().contains("1x100000"), "{e}");
    }
}

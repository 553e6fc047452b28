//! Picture files to RGB, as Pillow's `Image.open(path).convert("RGB")` gives it.
//!
//! - An alpha channel is dropped, not blended.
//! - The EXIF orientation is not applied: timm, torchvision and Pillow do not apply it either, so a model saw its
//!   training pictures that way.
//! - 16-bit samples keep their high byte. (Pillow clips 16-bit grey at 255 instead, which is of no use.)
//! - Embedded colour profiles are ignored.

use super::{Picture, jpeg};
use crate::error::{Error, Result};
use image::{DynamicImage, ImageDecoder};
use std::io::Cursor;
use std::path::Path;

/// Reads a JPEG or PNG file.
///
/// # Errors
/// [`Error::Read`]; [`Error::Picture`] (in the file) when it is no picture, is damaged or truncated.
pub fn decode_file(path: &Path) -> Result<Picture> {
    let read = |source| Error::Read { path: path.into(), source };
    if path.is_dir() {
        return Err(read(std::io::Error::other("is a directory, expected a picture file")));
    }
    decode_bytes(&std::fs::read(path).map_err(read)?).map_err(|e| e.in_file(path))
}

/// Decodes a JPEG or PNG file's bytes; the format is told by its first bytes.
///
/// # Errors
/// [`Error::Picture`].
pub fn decode_bytes(bytes: &[u8]) -> Result<Picture> {
    match bytes {
        [] => Err(Error::Picture("is empty, expected a JPEG or PNG picture".into())),
        [0xFF, 0xD8, ..] => jpeg::decode_file(bytes),
        [0x89, b'P', b'N', b'G', ..] => png(bytes),
        _ => {
            Err(Error::Picture(format!("is no picture that vedge reads: expected JPEG or PNG, found {}", kind(bytes))))
        }
    }
}

/// What a file that is neither JPEG nor PNG seems to be.
fn kind(bytes: &[u8]) -> String {
    match bytes {
        [b'G', b'I', b'F', b'8', ..] => "GIF".into(),
        [b'B', b'M', ..] => "BMP".into(),
        [b'R', b'I', b'F', b'F', _, _, _, _, b'W', b'E', b'B', b'P', ..] => "WebP".into(),
        [_, _, _, _, b'f', b't', b'y', b'p', ..] => "HEIF, AVIF or a video".into(),
        [b'I', b'I', 42, 0, ..] | [b'M', b'M', 0, 42, ..] => "TIFF".into(),
        _ if bytes.iter().take(64).all(|b| b.is_ascii_graphic() || b.is_ascii_whitespace()) => "text".into(),
        _ => format!("bytes that begin with {:02x?}", &bytes[..bytes.len().min(4)]),
    }
}

fn png(bytes: &[u8]) -> Result<Picture> {
    let bad = |e: image::ImageError| {
        let e = e.to_string();
        Error::Picture(format!(
            "damaged or truncated PNG: {}",
            e.strip_prefix("Format error decoding Png: ").unwrap_or(&e)
        ))
    };
    let mut decoder = image::codecs::png::PngDecoder::new(Cursor::new(bytes)).map_err(bad)?;
    decoder.set_limits(image::Limits::default()).map_err(bad)?;
    let picture = DynamicImage::from_decoder(decoder).map_err(bad)?;
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    let grey = |bytes: Vec<u8>, step: usize| bytes.chunks_exact(step).flat_map(|p| [p[0]; 3]).collect();
    let colour = |bytes: Vec<u8>| bytes.chunks_exact(4).flat_map(|p| [p[0], p[1], p[2]]).collect();
    let high = |samples: Vec<u16>| samples.into_iter().map(|v| (v >> 8) as u8).collect::<Vec<u8>>();
    let rgb: Vec<u8> = match picture {
        DynamicImage::ImageLuma8(i) => grey(i.into_raw(), 1),
        DynamicImage::ImageLumaA8(i) => grey(i.into_raw(), 2),
        DynamicImage::ImageRgb8(i) => i.into_raw(),
        DynamicImage::ImageRgba8(i) => colour(i.into_raw()),
        DynamicImage::ImageLuma16(i) => grey(high(i.into_raw()), 1),
        DynamicImage::ImageLumaA16(i) => grey(high(i.into_raw()), 2),
        DynamicImage::ImageRgb16(i) => high(i.into_raw()),
        DynamicImage::ImageRgba16(i) => colour(high(i.into_raw())),
        other => other.into_rgb8().into_raw(),
    };
    Ok(Picture { width, height, rgb })
}

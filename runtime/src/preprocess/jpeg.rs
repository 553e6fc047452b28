//! JPEG files and the JPEG frames of webcams.

use super::Picture;
use crate::error::{Error, Result};
use std::borrow::Cow;
use zune_jpeg::JpegDecoder;
use zune_jpeg::zune_core::bytestream::ZCursor;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

/// Decodes a file; one that ends before its end-of-image marker is truncated, which the decoder alone would hide
/// behind a grey area.
pub fn decode_file(bytes: &[u8]) -> Result<Picture> {
    let layout = Layout::of(bytes)?;
    if !layout.ended {
        return Err(Error::Picture(format!("truncated JPEG: its {} bytes hold no end-of-image marker", bytes.len())));
    }
    decode(bytes)
}

/// Decodes a camera's frame: the standard Huffman tables are added where it leaves them out, and bytes after the
/// picture are ignored.
pub fn decode_frame(bytes: &[u8]) -> Result<Picture> {
    decode(&complete_frame(bytes)?)
}

/// A camera's JPEG frame as a file that every reader understands: with Huffman tables.
///
/// # Errors
/// [`Error::Picture`] when it is incomplete.
pub fn complete_frame(bytes: &[u8]) -> Result<Cow<'_, [u8]>> {
    let layout = Layout::of(bytes)?;
    if !layout.ended {
        return Err(Error::Picture(format!("incomplete JPEG frame of {} bytes", bytes.len())));
    }
    if layout.has_tables {
        return Ok(bytes.into());
    }
    let mut whole = Vec::with_capacity(bytes.len() + 512);
    whole.extend_from_slice(&bytes[..layout.scan]);
    whole.extend_from_slice(&standard_tables());
    whole.extend_from_slice(&bytes[layout.scan..]);
    Ok(whole.into())
}

/// Length of the JPEG picture at the start of a stream of them; `None` while more bytes are needed.
pub fn frame_length(bytes: &[u8]) -> Option<usize> {
    // an empty picture: what follows is the next one
    if bytes.starts_with(&[0xFF, 0xD8, 0xFF, 0xD9]) {
        return Some(4);
    }
    let scan = Layout::of(bytes).ok()?.scan;
    bytes[scan..].windows(2).position(|w| w == [0xFF, 0xD9]).map(|end| scan + end + 2)
}

/// A picture as a JPEG file; `quality` 1…100.
///
/// # Errors
/// [`Error::Picture`] when it is empty or longer than 65535 pixels.
pub fn encode(picture: &Picture, quality: u8) -> Result<Vec<u8>> {
    let mut bytes = vec![];
    let mut encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut bytes, quality);
    let (width, height) = (picture.width as u32, picture.height as u32);
    match encoder.encode(&picture.rgb, width, height, image::ExtendedColorType::Rgb8) {
        Ok(()) => Ok(bytes),
        Err(e) => Err(Error::Picture(format!("a picture of {width}x{height} cannot become JPEG: {e}"))),
    }
}

fn decode(bytes: &[u8]) -> Result<Picture> {
    let options = DecoderOptions::default().jpeg_set_out_colorspace(ColorSpace::RGB);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    let bad = |e: zune_jpeg::errors::DecodeErrors| Error::Picture(format!("damaged JPEG: {e}"));
    let rgb = decoder.decode().map_err(bad)?;
    let info = decoder.info().ok_or_else(|| Error::Picture("damaged JPEG: no frame header".into()))?;
    let (width, height) = (usize::from(info.width), usize::from(info.height));
    if rgb.len() != width * height * 3 {
        let components = rgb.len() / (width * height).max(1);
        return Err(Error::Picture(format!("JPEG with {components} colour components is not supported")));
    }
    Ok(Picture { width, height, rgb })
}

/// Where things are in a JPEG file.
struct Layout {
    /// Offset of the first start-of-scan marker.
    scan: usize,
    /// Whether Huffman tables come before it.
    has_tables: bool,
    /// Whether an end-of-image marker comes after it.
    ended: bool,
}

impl Layout {
    /// Walks the segments up to the first scan (ITU-T T.81, annex B).
    fn of(bytes: &[u8]) -> Result<Layout> {
        let truncated = || Error::Picture(format!("truncated JPEG: {} bytes, no picture data", bytes.len()));
        let (mut at, mut has_tables) = (2, false);
        loop {
            // Fill bytes may come before a marker; anything else between segments is skipped as decoders do.
            while *bytes.get(at).ok_or_else(truncated)? != 0xFF {
                at += 1;
            }
            let marker = *bytes.get(at + 1).ok_or_else(truncated)?;
            match marker {
                0xFF => at += 1,
                0x00 | 0x01 | 0xD0..=0xD8 => at += 2,
                0xD9 => return Err(Error::Picture("JPEG without picture data".into())),
                0xDA => {
                    let ended = bytes[at..].windows(2).any(|w| w == [0xFF, 0xD9]);
                    return Ok(Layout { scan: at, has_tables, ended });
                }
                _ => {
                    has_tables |= marker == 0xC4;
                    let length = bytes.get(at + 2..at + 4).ok_or_else(truncated)?;
                    at += 2 + usize::from(u16::from_be_bytes([length[0], length[1]])).max(2);
                }
            }
        }
    }
}

/// The DHT segment of the typical tables of ITU-T T.81, K.3.3, which Motion-JPEG presumes.
fn standard_tables() -> Vec<u8> {
    const DC_LUMA: [u8; 16] = [0, 1, 5, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0];
    const DC_CHROMA: [u8; 16] = [0, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0];
    const AC_LUMA: [u8; 16] = [0, 2, 1, 3, 3, 2, 4, 3, 5, 5, 4, 4, 0, 0, 1, 0x7D];
    const AC_CHROMA: [u8; 16] = [0, 2, 1, 2, 4, 4, 3, 4, 7, 5, 4, 4, 0, 1, 2, 0x77];
    #[rustfmt::skip]
    const AC_LUMA_VALUES: [u8; 162] = [
        0x01, 0x02, 0x03, 0x00, 0x04, 0x11, 0x05, 0x12, 0x21, 0x31, 0x41, 0x06, 0x13, 0x51, 0x61, 0x07, 0x22, 0x71,
        0x14, 0x32, 0x81, 0x91, 0xA1, 0x08, 0x23, 0x42, 0xB1, 0xC1, 0x15, 0x52, 0xD1, 0xF0, 0x24, 0x33, 0x62, 0x72,
        0x82, 0x09, 0x0A, 0x16, 0x17, 0x18, 0x19, 0x1A, 0x25, 0x26, 0x27, 0x28, 0x29, 0x2A, 0x34, 0x35, 0x36, 0x37,
        0x38, 0x39, 0x3A, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48, 0x49, 0x4A, 0x53, 0x54, 0x55, 0x56, 0x57, 0x58, 0x59,
        0x5A, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68, 0x69, 0x6A, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78, 0x79, 0x7A, 0x83,
        0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8A, 0x92, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99, 0x9A, 0xA2, 0xA3,
        0xA4, 0xA5, 0xA6, 0xA7, 0xA8, 0xA9, 0xAA, 0xB2, 0xB3, 0xB4, 0xB5, 0xB6, 0xB7, 0xB8, 0xB9, 0xBA, 0xC2, 0xC3,
        0xC4, 0xC5, 0xC6, 0xC7, 0xC8, 0xC9, 0xCA, 0xD2, 0xD3, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8, 0xD9, 0xDA, 0xE1, 0xE2,
        0xE3, 0xE4, 0xE5, 0xE6, 0xE7, 0xE8, 0xE9, 0xEA, 0xF1, 0xF2, 0xF3, 0xF4, 0xF5, 0xF6, 0xF7, 0xF8, 0xF9, 0xFA,
    ];
    #[rustfmt::skip]
    const AC_CHROMA_VALUES: [u8; 162] = [
        0x00, 0x01, 0x02, 0x03, 0x11, 0x04, 0x05, 0x21, 0x31, 0x06, 0x12, 0x41, 0x51, 0x07, 0x61, 0x71, 0x13, 0x22,
        0x32, 0x81, 0x08, 0x14, 0x42, 0x91, 0xA1, 0xB1, 0xC1, 0x09, 0x23, 0x33, 0x52, 0xF0, 0x15, 0x62, 0x72, 0xD1,
        0x0A, 0x16, 0x24, 0x34, 0xE1, 0x25, 0xF1, 0x17, 0x18, 0x19, 0x1A, 0x26, 0x27, 0x28, 0x29, 0x2A, 0x35, 0x36,
        0x37, 0x38, 0x39, 0x3A, 0x43, 0x44, 0x45, 0x46, 0x47, 0x48, 0x49, 0x4A, 0x53, 0x54, 0x55, 0x56, 0x57, 0x58,
        0x59, 0x5A, 0x63, 0x64, 0x65, 0x66, 0x67, 0x68, 0x69, 0x6A, 0x73, 0x74, 0x75, 0x76, 0x77, 0x78, 0x79, 0x7A,
        0x82, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8A, 0x92, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99, 0x9A,
        0xA2, 0xA3, 0xA4, 0xA5, 0xA6, 0xA7, 0xA8, 0xA9, 0xAA, 0xB2, 0xB3, 0xB4, 0xB5, 0xB6, 0xB7, 0xB8, 0xB9, 0xBA,
        0xC2, 0xC3, 0xC4, 0xC5, 0xC6, 0xC7, 0xC8, 0xC9, 0xCA, 0xD2, 0xD3, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8, 0xD9, 0xDA,
        0xE2, 0xE3, 0xE4, 0xE5, 0xE6, 0xE7, 0xE8, 0xE9, 0xEA, 0xF2, 0xF3, 0xF4, 0xF5, 0xF6, 0xF7, 0xF8, 0xF9, 0xFA,
    ];
    let dc: Vec<u8> = (0..12).collect();
    let mut segment = vec![0xFF, 0xC4, 0, 0];
    // class (0: DC, 1: AC) in the high nibble, identifier in the low one
    let tables: [(u8, &[u8; 16], &[u8]); 4] = [
        (0x00, &DC_LUMA, &dc),
        (0x10, &AC_LUMA, &AC_LUMA_VALUES),
        (0x01, &DC_CHROMA, &dc),
        (0x11, &AC_CHROMA, &AC_CHROMA_VALUES),
    ];
    for (id, counts, values) in tables {
        segment.push(id);
        segment.extend_from_slice(counts);
        segment.extend_from_slice(values);
    }
    let length = (segment.len() - 2) as u16;
    segment[2..4].copy_from_slice(&length.to_be_bytes());
    segment
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Baseline, written with the standard tables.
    const JPEG: &[u8] = include_bytes!("../../../tests/reference/pictures/standard_tables.jpg");

    /// The file without its DHT segments, as many webcams send it.
    fn without_tables() -> Vec<u8> {
        let (mut out, mut at) = (JPEG[..2].to_vec(), 2);
        while JPEG[at + 1] != 0xDA {
            let length = 2 + usize::from(u16::from_be_bytes([JPEG[at + 2], JPEG[at + 3]]));
            if JPEG[at + 1] != 0xC4 {
                out.extend_from_slice(&JPEG[at..at + length]);
            }
            at += length;
        }
        out.extend_from_slice(&JPEG[at..]);
        out
    }

    #[test]
    fn huffman_tables_are_added_where_a_webcam_leaves_them_out() {
        let bare = without_tables();
        assert!(bare.len() + 400 < JPEG.len() && decode(&bare).is_err());
        assert_eq!(decode_frame(&bare).unwrap(), decode(JPEG).unwrap());
    }

    #[test]
    fn bytes_after_the_frame_are_ignored() {
        let mut padded = JPEG.to_vec();
        padded.resize(10 * JPEG.len(), 0);
        assert_eq!(decode_frame(&padded).unwrap(), decode(JPEG).unwrap());
    }

    #[test]
    fn every_truncation_is_an_error() {
        for length in 2..JPEG.len() {
            let e = decode_file(&JPEG[..length]).expect_err("truncated");
            assert!(e.to_string().contains("truncated"), "{length}: {e}");
            assert!(decode_frame(&JPEG[..length]).is_err());
        }
    }
}

//! Camera pixel formats to RGB.

use super::{Picture, jpeg};
use crate::error::{Error, Result};

/// A pixel format that vedge converts; names are the V4L2 fourcc codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PixelFormat {
    /// `YUYV`: packed 4:2:2.
    Yuyv,
    /// `NV12`: a plane of Y, then one of interleaved U and V at half the resolution.
    Nv12,
    /// `RGB3`: packed red, green, blue.
    Rgb3,
    /// `BGR3`: packed blue, green, red.
    Bgr3,
    /// `GREY`: 8-bit luma.
    Grey,
    /// `MJPG`: one JPEG picture a frame.
    Mjpg,
}

impl PixelFormat {
    /// Every format, cheapest to convert first.
    pub const ALL: [PixelFormat; 6] = [Self::Rgb3, Self::Bgr3, Self::Yuyv, Self::Nv12, Self::Grey, Self::Mjpg];

    /// The four-character code.
    pub fn fourcc(self) -> &'static str {
        match self {
            Self::Yuyv => "YUYV",
            Self::Nv12 => "NV12",
            Self::Rgb3 => "RGB3",
            Self::Bgr3 => "BGR3",
            Self::Grey => "GREY",
            Self::Mjpg => "MJPG",
        }
    }

    /// The format of a four-character code; `JPEG` is taken as `MJPG`.
    pub fn from_fourcc(code: &str) -> Option<PixelFormat> {
        Self::ALL.into_iter().find(|f| f.fourcc() == code).or((code == "JPEG").then_some(Self::Mjpg))
    }

    /// Bytes of a row without padding (for NV12: of the Y plane); 0 for MJPG.
    pub fn row_bytes(self, width: usize) -> usize {
        match self {
            Self::Yuyv => width.div_ceil(2) * 4,
            Self::Nv12 => width.div_ceil(2) * 2,
            Self::Grey => width,
            Self::Rgb3 | Self::Bgr3 => width * 3,
            Self::Mjpg => 0,
        }
    }
}

/// How luma and chroma become RGB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Matrix {
    /// ITU-R BT.709 instead of BT.601.
    pub bt709: bool,
    /// Luma 0…255 instead of 16…235.
    pub full_range: bool,
}

/// A frame as a camera gives it.
#[derive(Clone, Debug)]
pub struct RawFrame {
    /// Width in pixels.
    pub width: usize,
    /// Height in pixels.
    pub height: usize,
    /// Bytes from one row to the next; 0 means no padding.
    pub stride: usize,
    /// How the pixels are stored.
    pub format: PixelFormat,
    /// For YUYV, NV12 and GREY: the meaning of luma and chroma.
    pub matrix: Matrix,
    /// The bytes that the driver filled.
    pub bytes: Vec<u8>,
}

impl RawFrame {
    /// Converts to RGB.
    ///
    /// # Errors
    /// [`Error::Picture`] when the frame is shorter than its format needs, or its JPEG is damaged.
    pub fn picture(&self) -> Result<Picture> {
        if self.format == PixelFormat::Mjpg {
            return jpeg::decode_frame(&self.bytes);
        }
        let (width, height) = (self.width, self.height);
        let row = self.format.row_bytes(width);
        let stride = if self.stride == 0 { row } else { self.stride };
        let chroma = if self.format == PixelFormat::Nv12 { height.div_ceil(2) } else { 0 };
        // the last row need not be padded
        let needed = (height + chroma).saturating_sub(1) * stride + row;
        if width == 0 || height == 0 || stride < row || self.bytes.len() < needed {
            return Err(Error::Picture(format!(
                "frame has {} bytes at {stride} a row, {width}x{height} {} needs {needed} at {row} or more",
                self.bytes.len(),
                self.format.fourcc(),
            )));
        }
        let mut rgb = vec![0; width * height * 3];
        let yuv = Yuv::new(self.matrix);
        for (y, out) in rgb.chunks_exact_mut(width * 3).enumerate() {
            let line = &self.bytes[y * stride..][..row];
            match self.format {
                PixelFormat::Rgb3 => out.copy_from_slice(line),
                PixelFormat::Bgr3 => {
                    for (o, i) in out.chunks_exact_mut(3).zip(line.chunks_exact(3)) {
                        o.copy_from_slice(&[i[2], i[1], i[0]]);
                    }
                }
                PixelFormat::Grey => {
                    for (o, &i) in out.chunks_exact_mut(3).zip(line) {
                        o.copy_from_slice(&yuv.rgb(i, 128, 128));
                    }
                }
                PixelFormat::Yuyv => {
                    for (o, i) in out.chunks_mut(6).zip(line.chunks_exact(4)) {
                        o[..3].copy_from_slice(&yuv.rgb(i[0], i[1], i[3]));
                        if let Some(second) = o.get_mut(3..6) {
                            second.copy_from_slice(&yuv.rgb(i[2], i[1], i[3]));
                        }
                    }
                }
                PixelFormat::Nv12 => {
                    let uv = &self.bytes[(height + y / 2) * stride..][..row];
                    for (x, (o, &i)) in out.chunks_exact_mut(3).zip(line).enumerate() {
                        o.copy_from_slice(&yuv.rgb(i, uv[x & !1], uv[x | 1]));
                    }
                }
                PixelFormat::Mjpg => unreachable!("decoded above"),
            }
        }
        Ok(Picture { width, height, rgb })
    }
}

/// Fixed-point conversion, 16 fractional bits.
struct Yuv {
    black: i32,
    luma: i32,
    red_v: i32,
    green_u: i32,
    green_v: i32,
    blue_u: i32,
}

impl Yuv {
    fn new(matrix: Matrix) -> Yuv {
        let (kr, kb) = if matrix.bt709 { (0.2126, 0.0722) } else { (0.299, 0.114) };
        let kg = 1.0 - kr - kb;
        let (luma, chroma) = if matrix.full_range { (1.0, 1.0) } else { (255.0 / 219.0, 255.0 / 224.0) };
        let fixed = |x: f64| (x * 65536.0).round() as i32;
        Yuv {
            black: if matrix.full_range { 0 } else { 16 },
            luma: fixed(luma),
            red_v: fixed(chroma * 2.0 * (1.0 - kr)),
            green_u: fixed(-chroma * 2.0 * kb * (1.0 - kb) / kg),
            green_v: fixed(-chroma * 2.0 * kr * (1.0 - kr) / kg),
            blue_u: fixed(chroma * 2.0 * (1.0 - kb)),
        }
    }

    #[inline]
    fn rgb(&self, y: u8, u: u8, v: u8) -> [u8; 3] {
        let y = (i32::from(y) - self.black) * self.luma + (1 << 15);
        let (u, v) = (i32::from(u) - 128, i32::from(v) - 128);
        let clip = |x: i32| (x >> 16).clamp(0, 255) as u8;
        [clip(y + self.red_v * v), clip(y + self.green_u * u + self.green_v * v), clip(y + self.blue_u * u)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITED: Matrix = Matrix { bt709: false, full_range: false };

    fn frame(format: PixelFormat, width: usize, height: usize, stride: usize, bytes: Vec<u8>) -> RawFrame {
        RawFrame { width, height, stride, format, matrix: LIMITED, bytes }
    }

    #[test]
    fn primaries_of_both_standards() {
        // 8-bit codes of 75 % and 100 % bars as the standards' tables give them
        let bt601 = Yuv::new(LIMITED);
        assert_eq!(bt601.rgb(16, 128, 128), [0, 0, 0]);
        assert_eq!(bt601.rgb(235, 128, 128), [255, 255, 255]);
        assert_eq!(bt601.rgb(81, 90, 240), [254, 0, 0]);
        assert_eq!(bt601.rgb(145, 54, 34), [0, 255, 1]);
        assert_eq!(bt601.rgb(41, 240, 110), [0, 0, 255]);
        let bt709 = Yuv::new(Matrix { bt709: true, full_range: false });
        let [r, g, b] = bt709.rgb(63, 102, 240);
        assert!(r >= 254 && g <= 1 && b <= 1, "{r} {g} {b}");
        let full = Yuv::new(Matrix { bt709: false, full_range: true });
        assert_eq!(full.rgb(255, 128, 128), [255, 255, 255]);
        assert_eq!(full.rgb(100, 128, 128), [100, 100, 100]);
    }

    #[test]
    fn strides_and_odd_sizes() {
        // 3×3, rows padded to 8 bytes, the last row not padded
        let mut bytes = vec![99; 2 * 8 + 3];
        for y in 0..3 {
            bytes[y * 8..y * 8 + 3].fill(235);
        }
        let p = frame(PixelFormat::Grey, 3, 3, 8, bytes).picture().unwrap();
        assert_eq!(p.rgb, vec![255; 27]);
        let mut bytes = vec![0; 5 * 8];
        for (y, row) in bytes.chunks_exact_mut(8).enumerate() {
            row[..4].fill(if y < 3 { 235 } else { 128 });
        }
        let p = frame(PixelFormat::Nv12, 3, 3, 8, bytes).picture().unwrap();
        assert_eq!(p.rgb, vec![255; 27]);
        let yuyv: Vec<u8> = [235, 128].into_iter().cycle().take(3 * 8).collect();
        let p = frame(PixelFormat::Yuyv, 3, 3, 8, yuyv).picture().unwrap();
        assert_eq!(p.rgb, vec![255; 27]);
        let p = frame(PixelFormat::Bgr3, 1, 2, 4, vec![1, 2, 3, 0, 4, 5, 6]).picture().unwrap();
        assert_eq!(p.rgb, [3, 2, 1, 6, 5, 4]);
    }

    #[test]
    fn a_short_frame_is_an_error_for_every_format() {
        for format in PixelFormat::ALL {
            for (w, h) in [(0usize, 0usize), (4, 4), (5, 3)] {
                let length = (h + h.div_ceil(2)) * format.row_bytes(w).max(6);
                for bytes in [vec![], vec![0; (length / 3).max(1) - 1]] {
                    assert!(frame(format, w, h, 0, bytes).picture().is_err(), "{format:?} {w}x{h}");
                }
            }
        }
    }
}

//! Camera pixel formats, as data: which byte of which plane is which component.

use super::{Picture, jpeg};
use crate::error::{Error, Result};

/// A pixel format that vedge reads; names are the V4L2 fourcc codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PixelFormat {
    /// `RGB3`: packed red, green, blue.
    Rgb3,
    /// `BGR3`: packed blue, green, red.
    Bgr3,
    /// `XR24`: packed blue, green, red, and a byte without meaning.
    Xr24,
    /// `YUYV`: packed 4:2:2.
    Yuyv,
    /// `UYVY`: packed 4:2:2, chroma first.
    Uyvy,
    /// `YVYU`: packed 4:2:2, V before U.
    Yvyu,
    /// `NV12`: a plane of Y, then one of interleaved U and V at half the resolution.
    Nv12,
    /// `NV21`: as NV12, V before U.
    Nv21,
    /// `YU12`: planes of Y, U and V, the last two at half the resolution.
    Yu12,
    /// `GREY`: 8-bit luma.
    Grey,
    /// `Y10`: 10-bit luma in the low bits of 16, little endian; the two lowest bits are not used.
    Y10,
    /// `Y16`: 16-bit luma, little endian; the high byte is used.
    Y16,
    /// `MJPG`: one JPEG picture a frame.
    Mjpg,
}

/// Where a component's samples are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Component {
    pub plane: usize,
    /// Byte of a row's first sample.
    pub offset: usize,
    /// Bytes from one sample to the next.
    pub step: usize,
    /// Pixels that share a sample, horizontally and vertically.
    pub sub: (usize, usize),
}

const fn at(plane: usize, offset: usize, step: usize, sub: (usize, usize)) -> Component {
    Component { plane, offset, step, sub }
}

const FULL: (usize, usize) = (1, 1);
const HALF: (usize, usize) = (2, 1);
const QUARTER: (usize, usize) = (2, 2);

impl PixelFormat {
    /// Every format, cheapest to convert first; the grey ones and the compressed one last.
    pub const ALL: [PixelFormat; 13] = [
        Self::Nv12,
        Self::Nv21,
        Self::Yu12,
        Self::Yuyv,
        Self::Uyvy,
        Self::Yvyu,
        Self::Rgb3,
        Self::Bgr3,
        Self::Xr24,
        Self::Mjpg,
        Self::Y16,
        Self::Y10,
        Self::Grey,
    ];

    /// The four-character code; trailing blanks are left out (`Y10`).
    pub fn fourcc(self) -> &'static str {
        self.codes()[0]
    }

    /// Its codes in V4L2: the usual one, then others for the same pixels (JPEG, planes in separate buffers).
    pub fn codes(self) -> &'static [&'static str] {
        match self {
            Self::Rgb3 => &["RGB3"],
            Self::Bgr3 => &["BGR3"],
            Self::Xr24 => &["XR24"],
            Self::Yuyv => &["YUYV"],
            Self::Uyvy => &["UYVY"],
            Self::Yvyu => &["YVYU"],
            Self::Nv12 => &["NV12", "NM12"],
            Self::Nv21 => &["NV21", "NM21"],
            Self::Yu12 => &["YU12", "YM12"],
            Self::Grey => &["GREY"],
            Self::Y10 => &["Y10"],
            Self::Y16 => &["Y16"],
            Self::Mjpg => &["MJPG", "JPEG"],
        }
    }

    /// The format of a four-character code.
    pub fn from_fourcc(code: &str) -> Option<PixelFormat> {
        Self::ALL.into_iter().find(|f| f.codes().contains(&code.trim_end()))
    }

    /// Whether it has luma alone.
    pub fn is_grey(self) -> bool {
        matches!(self, Self::Grey | Self::Y10 | Self::Y16)
    }

    pub(super) fn is_rgb(self) -> bool {
        matches!(self, Self::Rgb3 | Self::Bgr3 | Self::Xr24)
    }

    /// Red, green and blue; Y, U and V; or Y alone. Empty for MJPG.
    pub(super) fn components(self) -> &'static [Component] {
        match self {
            Self::Rgb3 => const { &[at(0, 0, 3, FULL), at(0, 1, 3, FULL), at(0, 2, 3, FULL)] },
            Self::Bgr3 => const { &[at(0, 2, 3, FULL), at(0, 1, 3, FULL), at(0, 0, 3, FULL)] },
            Self::Xr24 => const { &[at(0, 2, 4, FULL), at(0, 1, 4, FULL), at(0, 0, 4, FULL)] },
            Self::Yuyv => const { &[at(0, 0, 2, FULL), at(0, 1, 4, HALF), at(0, 3, 4, HALF)] },
            Self::Uyvy => const { &[at(0, 1, 2, FULL), at(0, 0, 4, HALF), at(0, 2, 4, HALF)] },
            Self::Yvyu => const { &[at(0, 0, 2, FULL), at(0, 3, 4, HALF), at(0, 1, 4, HALF)] },
            Self::Nv12 => const { &[at(0, 0, 1, FULL), at(1, 0, 2, QUARTER), at(1, 1, 2, QUARTER)] },
            Self::Nv21 => const { &[at(0, 0, 1, FULL), at(1, 1, 2, QUARTER), at(1, 0, 2, QUARTER)] },
            Self::Yu12 => const { &[at(0, 0, 1, FULL), at(1, 0, 1, QUARTER), at(2, 0, 1, QUARTER)] },
            Self::Grey | Self::Y10 => const { &[at(0, 0, 1, FULL)] },
            Self::Y16 => const { &[at(0, 1, 2, FULL)] },
            Self::Mjpg => &[],
        }
    }

    /// Bytes of a row of the first plane without padding; 0 for MJPG.
    pub fn row_bytes(self, width: usize) -> usize {
        match self {
            Self::Yuyv | Self::Uyvy | Self::Yvyu => width.div_ceil(2) * 4,
            Self::Nv12 | Self::Nv21 | Self::Yu12 => width.div_ceil(2) * 2,
            Self::Grey => width,
            Self::Y10 | Self::Y16 => width * 2,
            Self::Rgb3 | Self::Bgr3 => width * 3,
            Self::Xr24 => width * 4,
            Self::Mjpg => 0,
        }
    }

    /// Planes as `(bytes of a row, rows)` for that stride of the first one; empty for MJPG.
    pub fn planes(self, stride: usize, height: usize) -> Vec<(usize, usize)> {
        match self {
            Self::Mjpg => vec![],
            Self::Nv12 | Self::Nv21 => vec![(stride, height), (stride, height.div_ceil(2))],
            Self::Yu12 => vec![(stride, height), (stride / 2, height.div_ceil(2)), (stride / 2, height.div_ceil(2))],
            _ => vec![(stride, height)],
        }
    }

    /// Bytes of a frame without padding; 0 for MJPG.
    pub fn frame_bytes(self, width: usize, height: usize) -> usize {
        self.planes(self.row_bytes(width), height).iter().map(|(row, rows)| row * rows).sum()
    }
}

/// How luma and chroma become RGB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
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
    /// How the pixels are stored.
    pub format: PixelFormat,
    /// For formats of luma and chroma: their meaning.
    pub matrix: Matrix,
    /// First byte of each plane, and bytes from one of its rows to the next.
    pub planes: Vec<(usize, usize)>,
    /// The bytes that the driver filled.
    pub bytes: Vec<u8>,
}

impl RawFrame {
    /// A frame whose planes follow one another. `stride` is that of the first plane; 0 means no padding.
    pub fn new(format: PixelFormat, size: (usize, usize), stride: usize, matrix: Matrix, bytes: Vec<u8>) -> RawFrame {
        let (width, height) = size;
        let stride = if stride == 0 { format.row_bytes(width) } else { stride };
        let place = |start: &mut usize, (row, rows): (usize, usize)| {
            let first = *start;
            *start += row * rows;
            Some((first, row))
        };
        let planes = format.planes(stride, height).into_iter().scan(0, place).collect();
        RawFrame { width, height, format, matrix, planes, bytes }
    }

    /// Refuses a frame that is shorter than its format needs, so that every sample can be read.
    ///
    /// # Errors
    /// [`Error::Picture`].
    pub(super) fn check(&self) -> Result<()> {
        let (width, height, format) = (self.width, self.height, self.format);
        let components = format.components();
        let needed = components.iter().map(|c| {
            let (samples, rows) = (width.div_ceil(c.sub.0), height.div_ceil(c.sub.1));
            // Y10 takes two bytes a sample
            let last =
                if format == PixelFormat::Y10 { 2 * samples } else { c.offset + (samples.max(1) - 1) * c.step + 1 };
            let (start, stride) = self.planes.get(c.plane).copied().unwrap_or((usize::MAX / 2, 0));
            if stride < last { usize::MAX / 2 } else { start + (rows.max(1) - 1) * stride + last }
        });
        let needed = needed.max().unwrap_or(0);
        if width == 0 || height == 0 || self.bytes.len() < needed {
            let stride = self.planes.first().map_or(0, |p| p.1);
            return Err(Error::Picture(format!(
                "frame has {} bytes at {stride} a row, {width}x{height} {} needs {} at {} or more",
                self.bytes.len(),
                format.fourcc(),
                format.frame_bytes(width, height),
                format.row_bytes(width),
            )));
        }
        Ok(())
    }

    /// Y10 as GREY: the upper eight of ten bits.
    pub(super) fn narrowed(&self) -> RawFrame {
        let (start, stride) = self.planes[0];
        let mut bytes = vec![0; self.width * self.height];
        for (y, grey) in bytes.chunks_exact_mut(self.width).enumerate() {
            let samples = self.bytes[start + y * stride..][..self.width * 2].chunks_exact(2);
            for (grey, s) in grey.iter_mut().zip(samples) {
                *grey = (u16::from_le_bytes([s[0], s[1]]).min(1023) >> 2) as u8;
            }
        }
        RawFrame::new(PixelFormat::Grey, (self.width, self.height), 0, self.matrix, bytes)
    }

    /// Converts to RGB, pixel by pixel: for looking at; [`super::Preprocessor`] does not come this way.
    ///
    /// # Errors
    /// [`Error::Picture`] when the frame is shorter than its format needs, or its JPEG is damaged.
    pub fn picture(&self) -> Result<Picture> {
        match self.format {
            PixelFormat::Mjpg => return jpeg::decode_frame(&self.bytes),
            PixelFormat::Y10 => {
                self.check()?;
                return self.narrowed().picture();
            }
            _ => self.check()?,
        }
        let yuv = Yuv::new(self.matrix);
        let mut rgb = Vec::with_capacity(self.width * self.height * 3);
        for y in 0..self.height {
            let row = |c: &Component| {
                let (start, stride) = self.planes[c.plane];
                (&self.bytes[start + y / c.sub.1 * stride..], *c)
            };
            let rows: Vec<(&[u8], Component)> = self.format.components().iter().map(row).collect();
            let sample = |(bytes, c): &(&[u8], Component), x: usize| bytes[c.offset + x / c.sub.0 * c.step];
            match rows.as_slice() {
                [a, b, c] if self.format.is_rgb() => {
                    rgb.extend((0..self.width).flat_map(|x| [sample(a, x), sample(b, x), sample(c, x)]));
                }
                [l, u, v] => {
                    rgb.extend((0..self.width).flat_map(|x| yuv.rgb(sample(l, x), sample(u, x), sample(v, x))));
                }
                [l, ..] => rgb.extend((0..self.width).flat_map(|x| yuv.rgb(sample(l, x), 128, 128))),
                [] => unreachable!("MJPG is decoded above"),
            }
        }
        Ok(Picture { width: self.width, height: self.height, rgb })
    }
}

/// Factors of the conversion from luma and chroma, 0…255 each, chroma less 128.
#[derive(Clone, Copy, Debug)]
pub(super) struct Yuv {
    pub black: f32,
    pub luma: f32,
    pub red_v: f32,
    pub green_u: f32,
    pub green_v: f32,
    pub blue_u: f32,
}

impl Yuv {
    /// By ITU-R BT.601 or BT.709.
    pub fn new(matrix: Matrix) -> Yuv {
        let (kr, kb) = if matrix.bt709 { (0.2126, 0.0722) } else { (0.299, 0.114) };
        let kg = 1.0 - kr - kb;
        let (luma, chroma) = if matrix.full_range { (1.0, 1.0) } else { (255.0 / 219.0, 255.0 / 224.0) };
        Yuv {
            black: if matrix.full_range { 0.0 } else { 16.0 },
            luma,
            red_v: chroma * 2.0 * (1.0 - kr),
            green_u: -chroma * 2.0 * kb * (1.0 - kb) / kg,
            green_v: -chroma * 2.0 * kr * (1.0 - kr) / kg,
            blue_u: chroma * 2.0 * (1.0 - kb),
        }
    }

    fn rgb(&self, y: u8, u: u8, v: u8) -> [u8; 3] {
        let y = (f32::from(y) - self.black) * self.luma;
        let (u, v) = (f32::from(u) - 128.0, f32::from(v) - 128.0);
        [y + self.red_v * v, y + self.green_u * u + self.green_v * v, y + self.blue_u * u].map(|x| (x + 0.5) as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITED: Matrix = Matrix { bt709: false, full_range: false };

    fn frame(format: PixelFormat, width: usize, height: usize, stride: usize, bytes: Vec<u8>) -> RawFrame {
        RawFrame::new(format, (width, height), stride, LIMITED, bytes)
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
        for format in [PixelFormat::Nv12, PixelFormat::Nv21] {
            let mut bytes = vec![0; 5 * 8];
            for (y, row) in bytes.chunks_exact_mut(8).enumerate() {
                row[..4].fill(if y < 3 { 235 } else { 128 });
            }
            assert_eq!(frame(format, 3, 3, 8, bytes).picture().unwrap().rgb, vec![255; 27]);
        }
        let planes: Vec<u8> = [vec![235; 12], vec![128; 8]].concat();
        assert_eq!(frame(PixelFormat::Yu12, 3, 3, 0, planes).picture().unwrap().rgb, vec![255; 27]);
        let p = frame(PixelFormat::Bgr3, 1, 2, 4, vec![1, 2, 3, 0, 4, 5, 6]).picture().unwrap();
        assert_eq!(p.rgb, [3, 2, 1, 6, 5, 4]);
        let p = frame(PixelFormat::Xr24, 1, 1, 0, vec![1, 2, 3, 99]).picture().unwrap();
        assert_eq!(p.rgb, [3, 2, 1]);
    }

    #[test]
    fn order_of_packed_luma_and_chroma() {
        let (y0, y1, u, v) = (81, 145, 90, 240);
        let want = frame(PixelFormat::Yuyv, 2, 1, 0, vec![y0, u, y1, v]).picture().unwrap();
        assert_eq!(want.rgb[..3], [254, 0, 0]);
        assert_eq!(frame(PixelFormat::Uyvy, 2, 1, 0, vec![u, y0, v, y1]).picture().unwrap(), want);
        assert_eq!(frame(PixelFormat::Yvyu, 2, 1, 0, vec![y0, v, y1, u]).picture().unwrap(), want);
        assert_eq!(frame(PixelFormat::Nv21, 2, 1, 0, vec![y0, y1, v, u]).picture().unwrap(), want);
        let p = frame(PixelFormat::Yuyv, 3, 1, 0, vec![y0, u, y1, v, y0, u, 0, v]).picture().unwrap();
        assert_eq!(p.rgb[6..], [254, 0, 0]);
    }

    #[test]
    fn deep_grey() {
        let full = Matrix { bt709: false, full_range: true };
        let of = |format, bytes| RawFrame::new(format, (2, 1), 0, full, bytes).picture().unwrap().rgb;
        assert_eq!(of(PixelFormat::Y10, vec![0xFF, 3, 0, 2]), [255, 255, 255, 128, 128, 128]);
        assert_eq!(of(PixelFormat::Y16, vec![1, 255, 255, 128]), [255, 255, 255, 128, 128, 128]);
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
            if format != PixelFormat::Mjpg {
                let whole = vec![0; format.frame_bytes(6, 4)];
                assert!(frame(format, 6, 4, 0, whole.clone()).picture().is_ok(), "{format:?}");
                let two_less = whole[2..].to_vec();
                assert!(frame(format, 6, 4, 0, two_less).picture().is_err(), "{format:?}");
            }
        }
    }
}

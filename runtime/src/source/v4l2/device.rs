//! The ioctls that a camera needs, on the `v4l` crate's bindings.
//!
//! The crate's own `Format`, `Description` and `Stream` are not used: they panic on values that they do not know and
//! on errors in `Drop`, keep a larger old stride, and hand out whole buffers.

use crate::preprocess::{Matrix, PixelFormat};
use std::io;
use std::path::Path;
use v4l::v4l_sys::*;
use v4l::v4l2::vidioc::{self, _IOC_TYPE};

/// A structure of the kernel's interface for which all-zero bytes are a value.
///
/// # Safety
/// Only for `repr(C)` structures of integers, arrays and unions of such, without references.
pub(super) unsafe trait Plain: Sized {
    fn zeroed() -> Self {
        // SAFETY: the trait's contract: all-zero bytes are a value of the type.
        unsafe { std::mem::zeroed() }
    }
}

macro_rules! plain {
    ($($t:ty),*) => { $(
        // SAFETY: a repr(C) structure of integers, arrays and unions of such (raw pointers in unions may be null).
        unsafe impl Plain for $t {}
    )* };
}
plain!(
    v4l2_capability,
    v4l2_fmtdesc,
    v4l2_frmsizeenum,
    v4l2_frmivalenum,
    v4l2_format,
    v4l2_streamparm,
    v4l2_requestbuffers,
    v4l2_buffer,
    v4l2_plane,
    v4l2_queryctrl,
    v4l2_querymenu,
    v4l2_control,
    std::os::raw::c_int
);

const CAPTURE: u32 = v4l2_buf_type_V4L2_BUF_TYPE_VIDEO_CAPTURE;
const CAPTURE_PLANES: u32 = v4l2_buf_type_V4L2_BUF_TYPE_VIDEO_CAPTURE_MPLANE;

/// Most planes that a buffer can have.
pub(super) const PLANES: usize = 8;

/// An open device node.
pub struct Device {
    pub(super) device: v4l::Device,
    /// Type of its capture buffers: with one plane, or with several.
    pub(super) kind: u32,
}

/// What a device says about itself.
#[derive(Clone, Debug)]
pub struct Capabilities {
    pub driver: String,
    pub card: String,
    pub bus: String,
    flags: u32,
}

impl Capabilities {
    pub fn captures(&self) -> bool {
        self.flags & (V4L2_CAP_VIDEO_CAPTURE | V4L2_CAP_VIDEO_CAPTURE_MPLANE) != 0
    }

    /// Only where there is no interface for one plane.
    fn captures_planes(&self) -> bool {
        self.flags & (V4L2_CAP_VIDEO_CAPTURE_MPLANE | V4L2_CAP_VIDEO_CAPTURE) == V4L2_CAP_VIDEO_CAPTURE_MPLANE
    }

    pub fn streams(&self) -> bool {
        self.flags & V4L2_CAP_STREAMING != 0
    }
}

/// Frame sizes of one format: a range with steps, or one size (`min == max`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    pub min: (u32, u32),
    pub max: (u32, u32),
    pub step: (u32, u32),
}

impl Sizes {
    pub fn contains(&self, (w, h): (u32, u32)) -> bool {
        let fits =
            |x: u32, min: u32, max: u32, step: u32| (min..=max).contains(&x) && (x - min).is_multiple_of(step.max(1));
        fits(w, self.min.0, self.max.0, self.step.0) && fits(h, self.min.1, self.max.1, self.step.1)
    }
}

impl std::fmt::Display for Sizes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}x{}", self.min.0, self.min.1)?;
        if self.min != self.max {
            write!(f, "…{}x{}", self.max.0, self.max.1)?;
        }
        Ok(())
    }
}

/// The format that the driver really set.
#[derive(Clone, Debug)]
pub struct Negotiated {
    pub fourcc: String,
    pub width: u32,
    pub height: u32,
    /// Bytes from one row to the next, for each of the buffer's planes: several where components lie in buffers of their
    /// own.
    pub strides: Vec<u32>,
    pub matrix: Matrix,
}

impl Device {
    pub fn open(path: &Path) -> io::Result<Device> {
        if path.as_os_str().as_encoded_bytes().contains(&0) {
            return Err(io::ErrorKind::InvalidInput.into()); // the crate would panic
        }
        let mut device = Device { device: v4l::Device::with_path(path)?, kind: CAPTURE };
        if device.capabilities().is_ok_and(|c| c.captures_planes()) {
            device.kind = CAPTURE_PLANES;
        }
        Ok(device)
    }

    /// Whether its buffers have several planes.
    pub(super) fn has_planes(&self) -> bool {
        self.kind == CAPTURE_PLANES
    }

    /// One ioctl; interrupted ones are repeated.
    pub(super) fn call<T: Plain>(&self, request: _IOC_TYPE, argument: &mut T) -> io::Result<()> {
        loop {
            let pointer = std::ptr::from_mut(argument).cast();
            // SAFETY: every caller passes the structure that the request is defined with (the request's number holds
            // its size), and the kernel writes no further than that.
            match unsafe { v4l::v4l2::ioctl(self.device.handle().fd(), request, pointer) } {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                result => return result,
            }
        }
    }

    pub fn capabilities(&self) -> io::Result<Capabilities> {
        let mut c = v4l2_capability::zeroed();
        self.call(vidioc::VIDIOC_QUERYCAP, &mut c)?;
        // of this node, where the driver tells, not of the whole device: a webcam's metadata node captures no video
        let flags = if c.capabilities & V4L2_CAP_DEVICE_CAPS != 0 { c.device_caps } else { c.capabilities };
        Ok(Capabilities { driver: text(&c.driver), card: text(&c.card), bus: text(&c.bus_info), flags })
    }

    /// Four-character codes of the formats, in the driver's order.
    pub fn formats(&self) -> Vec<String> {
        let describe = |index| {
            let mut d = v4l2_fmtdesc { index, type_: self.kind, ..v4l2_fmtdesc::zeroed() };
            self.call(vidioc::VIDIOC_ENUM_FMT, &mut d).ok().map(|()| code(d.pixelformat))
        };
        (0..256).map_while(describe).collect()
    }

    /// Sizes of a format; empty when the driver does not tell.
    pub fn sizes(&self, fourcc: &str) -> Vec<Sizes> {
        let describe = |index| {
            let mut s = v4l2_frmsizeenum { index, pixel_format: number(fourcc), ..v4l2_frmsizeenum::zeroed() };
            self.call(vidioc::VIDIOC_ENUM_FRAMESIZES, &mut s).ok()?;
            if s.type_ == v4l2_frmsizetypes_V4L2_FRMSIZE_TYPE_DISCRETE {
                // SAFETY: the type says that this variant was written.
                let d = unsafe { s.__bindgen_anon_1.discrete };
                return Some(Sizes { min: (d.width, d.height), max: (d.width, d.height), step: (1, 1) });
            }
            // SAFETY: as above; the other two types share this variant.
            let r = unsafe { s.__bindgen_anon_1.stepwise };
            let (min, max) = ((r.min_width, r.min_height), (r.max_width, r.max_height));
            Some(Sizes { min, max, step: (r.step_width, r.step_height) })
        };
        (0..256).map_while(describe).collect()
    }

    /// Highest frame rate of a format and size; `None` when the driver does not tell.
    pub fn fastest(&self, fourcc: &str, (width, height): (u32, u32)) -> Option<f64> {
        let describe = |index| {
            let pixel_format = number(fourcc);
            let mut i = v4l2_frmivalenum { index, pixel_format, width, height, ..v4l2_frmivalenum::zeroed() };
            self.call(vidioc::VIDIOC_ENUM_FRAMEINTERVALS, &mut i).ok()?;
            // SAFETY: the type says which variant was written; the shortest interval is a stepwise range's `min`.
            let shortest = unsafe {
                if i.type_ == v4l2_frmivaltypes_V4L2_FRMIVAL_TYPE_DISCRETE {
                    i.__bindgen_anon_1.discrete
                } else {
                    i.__bindgen_anon_1.stepwise.min
                }
            };
            Some(f64::from(shortest.denominator) / f64::from(shortest.numerator.max(1)))
        };
        (0..256).map_while(describe).reduce(f64::max)
    }

    /// Sets format and size; what comes back may differ from what was asked.
    pub fn set_format(&self, fourcc: &str, size: (u32, u32)) -> io::Result<Negotiated> {
        let mut format = v4l2_format { type_: self.kind, ..v4l2_format::zeroed() };
        // strides and buffer sizes stay 0: the driver would keep larger old ones
        if self.has_planes() {
            // SAFETY: the buffer type says that this variant is meant; all of it is zero, a value of it.
            let pix = unsafe { &mut format.fmt.pix_mp };
            (pix.width, pix.height, pix.pixelformat) = (size.0, size.1, number(fourcc));
            pix.field = v4l2_field_V4L2_FIELD_ANY;
        } else {
            // SAFETY: as above.
            let pix = unsafe { &mut format.fmt.pix };
            (pix.width, pix.height, pix.pixelformat) = (size.0, size.1, number(fourcc));
            pix.field = v4l2_field_V4L2_FIELD_ANY;
            // tells the driver that the fields after `priv` are there
            pix.priv_ = V4L2_PIX_FMT_PRIV_MAGIC;
        }
        self.call(vidioc::VIDIOC_S_FMT, &mut format)?;
        // SAFETY: the driver fills the variant of the buffer type; the unions of encodings are one number.
        let (got, width, height, colorspace, encoding, quantization, strides): (_, _, _, _, _, _, Vec<u32>) = unsafe {
            if self.has_planes() {
                let pix = format.fmt.pix_mp;
                let planes = pix.plane_fmt;
                let strides = planes.iter().take(usize::from(pix.num_planes)).map(|p| p.bytesperline).collect();
                let encoding = u32::from(pix.__bindgen_anon_1.ycbcr_enc);
                let quantization = u32::from(pix.quantization);
                (pix.pixelformat, pix.width, pix.height, pix.colorspace, encoding, quantization, strides)
            } else {
                let pix = format.fmt.pix;
                let extended = pix.priv_ == V4L2_PIX_FMT_PRIV_MAGIC;
                let encoding = pix.__bindgen_anon_1.ycbcr_enc;
                let (encoding, quantization) = if extended { (encoding, pix.quantization) } else { (0, 0) };
                let strides = vec![pix.bytesperline];
                (pix.pixelformat, pix.width, pix.height, pix.colorspace, encoding, quantization, strides)
            }
        };
        let mut matrix = matrix(colorspace, (encoding, quantization));
        // monochrome cameras give the sensor's whole range, whatever the kernel's default for luma says
        let grey = PixelFormat::from_fourcc(fourcc).is_some_and(PixelFormat::is_grey);
        matrix.full_range |= grey && quantization != v4l2_quantization_V4L2_QUANTIZATION_LIM_RANGE;
        Ok(Negotiated { fourcc: code(got), width, height, strides, matrix })
    }

    /// Asks for a frame rate; returns the one that is set, `None` when the driver does not let it be set.
    pub fn set_rate(&self, fps: f64) -> Option<f64> {
        let mut parameters = v4l2_streamparm { type_: self.kind, ..v4l2_streamparm::zeroed() };
        let interval = v4l2_fract { numerator: 1000, denominator: (fps * 1000.0).round() as u32 };
        parameters.parm.capture.timeperframe = interval;
        self.call(vidioc::VIDIOC_S_PARM, &mut parameters).ok()?;
        rate(&parameters)
    }

    /// The frame rate that is set, where the driver tells.
    pub fn rate(&self) -> Option<f64> {
        let mut parameters = v4l2_streamparm { type_: self.kind, ..v4l2_streamparm::zeroed() };
        self.call(vidioc::VIDIOC_G_PARM, &mut parameters).ok()?;
        rate(&parameters)
    }
}

fn rate(parameters: &v4l2_streamparm) -> Option<f64> {
    // SAFETY: the driver fills the variant of the buffer type.
    let capture = unsafe { parameters.parm.capture };
    let t = capture.timeperframe;
    let told = capture.capability & V4L2_CAP_TIMEPERFRAME != 0 && t.numerator > 0;
    told.then(|| f64::from(t.denominator) / f64::from(t.numerator))
}

/// The kernel's rules for fields left at their default (`V4L2_MAP_YCBCR_ENC_DEFAULT`, `V4L2_MAP_QUANTIZATION_DEFAULT`).
fn matrix(colorspace: u32, (encoding, quantization): (u32, u32)) -> Matrix {
    let wide = [v4l2_colorspace_V4L2_COLORSPACE_REC709, v4l2_colorspace_V4L2_COLORSPACE_DCI_P3].contains(&colorspace);
    let bt709 = encoding == v4l2_ycbcr_encoding_V4L2_YCBCR_ENC_709 || (encoding == 0 && wide);
    let full_range = quantization == v4l2_quantization_V4L2_QUANTIZATION_FULL_RANGE
        || (quantization == 0 && colorspace == v4l2_colorspace_V4L2_COLORSPACE_JPEG);
    Matrix { bt709, full_range }
}

pub(super) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// A code's characters, without blanks at its end; `\xNN` for those that are none.
fn code(number: u32) -> String {
    let text: String =
        number.to_le_bytes().iter().flat_map(|&b| std::ascii::escape_default(b)).map(char::from).collect();
    text.trim_end().into()
}

fn number(code: &str) -> u32 {
    let mut bytes = [b' '; 4];
    for (to, from) in bytes.iter_mut().zip(code.bytes()) {
        *to = from;
    }
    u32::from_le_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes() {
        assert_eq!(code(number("YUYV")), "YUYV");
        assert_eq!(number("MJPG"), 0x4750_4a4d);
        assert_eq!(code(number("Y16")), "Y16");
        assert_eq!(code(0x3231_0a59), "Y\\n12");
        assert_eq!(text(b"uvcvideo\0\0"), "uvcvideo");
    }

    #[test]
    fn colour_defaults() {
        let m = |c, x| matrix(c, x);
        assert_eq!(m(8, (0, 0)), Matrix { bt709: false, full_range: false }); // sRGB
        assert_eq!(m(3, (0, 0)), Matrix { bt709: true, full_range: false });
        assert_eq!(m(3, (1, 0)), Matrix { bt709: false, full_range: false });
        assert_eq!(m(7, (0, 0)), Matrix { bt709: false, full_range: true });
        assert_eq!(m(8, (2, 1)), Matrix { bt709: true, full_range: true });
    }

    #[test]
    fn stepped_sizes() {
        let s = Sizes { min: (32, 16), max: (64, 64), step: (16, 8) };
        assert!(s.contains((32, 16)) && s.contains((64, 64)) && s.contains((48, 24)));
        assert!(!s.contains((40, 24)) && !s.contains((80, 64)) && !s.contains((32, 12)));
    }
}

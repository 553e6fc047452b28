//! Which of a camera's formats and sizes to use.

use super::device::Sizes;
use crate::preprocess::PixelFormat;
use crate::source::uri::Camera;

/// A usable format of a camera.
#[derive(Clone, Debug)]
pub struct Offer {
    pub format: PixelFormat,
    /// Empty when the driver does not tell.
    pub sizes: Vec<Sizes>,
}

/// Sizes tried within a range of sizes.
const USUAL: [(u32, u32); 8] =
    [(160, 120), (320, 180), (320, 240), (640, 360), (640, 480), (800, 600), (1280, 720), (1920, 1080)];

/// Below this many frames a second at the chosen size an uncompressed format is not preferred to MJPG.
const SLOW: f64 = 15.0;

/// The format and size to ask for; `None` when nothing offered is what the user wants.
///
/// Of what the user left open: the size nearest above `input` (the largest when none is), then a format that reaches
/// the frame rate, then one with colours, the cheapest to convert.
pub fn choose(
    offers: &[Offer],
    wanted: &Camera,
    input: (usize, usize),
    fastest: impl Fn(PixelFormat, (u32, u32)) -> Option<f64>,
) -> Option<(PixelFormat, (u32, u32))> {
    let order = |f: PixelFormat| PixelFormat::ALL.iter().position(|&x| x == f);
    let needed = (input.0 as u32, input.1 as u32);
    let mut candidates = vec![];
    for offer in offers.iter().filter(|o| wanted.format.is_none_or(|f| f == o.format)) {
        for size in sizes(offer, wanted.size) {
            let covers = size.0 >= needed.0 && size.1 >= needed.1;
            let area = i64::from(size.0) * i64::from(size.1);
            let reaches = fastest(offer.format, size).is_none_or(|f| f >= wanted.fps.unwrap_or(SLOW) * 0.98);
            // a rate that was asked for comes before the size, the usual one after it
            let late = wanted.fps.is_some() && !reaches;
            let rank = (!covers, late, if covers { area } else { -area }, !reaches, order(offer.format));
            candidates.push((rank, offer.format, size));
        }
    }
    candidates.into_iter().min_by_key(|c| c.0).map(|(_, format, size)| (format, size))
}

fn sizes(offer: &Offer, wanted: Option<(u32, u32)>) -> Vec<(u32, u32)> {
    if let Some(size) = wanted {
        let offered = offer.sizes.is_empty() || offer.sizes.iter().any(|s| s.contains(size));
        return if offered { vec![size] } else { vec![] };
    }
    if offer.sizes.is_empty() {
        return vec![(640, 480)]; // the driver answers with what it has
    }
    offer
        .sizes
        .iter()
        .flat_map(|s| {
            let inside = USUAL.into_iter().filter(|&u| s.contains(u));
            if s.min == s.max { vec![s.min] } else { inside.chain([s.min, s.max]).collect() }
        })
        .collect()
}

/// Whether a fourcc is raw sensor data (Bayer mosaic), which only a camera stack turns into pictures.
pub fn is_bayer(fourcc: &str) -> bool {
    const NAMED: [&str; 5] = ["BA81", "GBRG", "GRBG", "RGGB", "BYR2"];
    const DEPTHS: [&[u8]; 4] = [b"10", b"12", b"14", b"16"];
    // RG10, BG12, GB16, …; packed pRAA, pBCC, …; compressed aBA8, bRA8; Raspberry Pi PC1R
    let b = fourcc.as_bytes();
    let order = |x: &[u8]| matches!(x, b"RG" | b"BG" | b"GB" | b"GR" | b"BA");
    NAMED.contains(&fourcc)
        || (b.len() == 4 && order(&b[..2]) && DEPTHS.contains(&&b[2..]))
        || (b.len() == 4 && b[0] == b'p' && matches!(b[1], b'R' | b'B' | b'G' | b'g') && b[2] == b[3])
        || (b.len() == 4 && matches!(b[0], b'a' | b'b') && matches!(&b[3..], b"8") && b[1..3].is_ascii())
        || (fourcc.starts_with("PC1") && fourcc != "PC1M")
}

#[cfg(test)]
mod tests {
    use super::*;
    use PixelFormat::{Grey, Mjpg, Rgb3, Yuyv};

    fn offer(format: PixelFormat, sizes: &[(u32, u32)]) -> Offer {
        Offer { format, sizes: sizes.iter().map(|&s| Sizes { min: s, max: s, step: (1, 1) }).collect() }
    }

    /// A usual webcam: YUYV is slow above 640×480.
    fn webcam() -> Vec<Offer> {
        let sizes = [(160, 120), (320, 240), (640, 480), (1280, 720)];
        vec![offer(Mjpg, &sizes), offer(Yuyv, &sizes)]
    }

    fn speed(format: PixelFormat, size: (u32, u32)) -> Option<f64> {
        Some(if format == Mjpg || size.0 <= 640 { 30.0 } else { 10.0 })
    }

    fn camera(format: Option<PixelFormat>, size: Option<(u32, u32)>, fps: Option<f64>) -> Camera {
        Camera { device: "/dev/video0".into(), format, size, fps, ..Camera::default() }
    }

    #[test]
    fn nearest_size_above_and_the_cheap_format() {
        let auto = camera(None, None, None);
        assert_eq!(choose(&webcam(), &auto, (224, 224), speed), Some((Yuyv, (320, 240))));
        assert_eq!(choose(&webcam(), &auto, (384, 384), speed), Some((Yuyv, (640, 480))));
        assert_eq!(choose(&webcam(), &auto, (9000, 9000), speed), Some((Mjpg, (1280, 720))));
    }

    #[test]
    fn mjpg_only_where_it_is_needed() {
        let large = camera(None, Some((1280, 720)), None);
        assert_eq!(choose(&webcam(), &large, (64, 64), speed), Some((Mjpg, (1280, 720))));
        let slow = camera(None, Some((1280, 720)), Some(5.0));
        assert_eq!(choose(&webcam(), &slow, (64, 64), speed), Some((Yuyv, (1280, 720))));
        let grey = [offer(Grey, &[(640, 480)]), offer(Mjpg, &[(640, 480)])];
        assert_eq!(choose(&grey, &camera(None, None, None), (64, 64), speed), Some((Mjpg, (640, 480))));
    }

    #[test]
    fn what_the_user_asks_for_is_kept_or_refused() {
        assert_eq!(choose(&webcam(), &camera(Some(Mjpg), None, None), (64, 64), speed), Some((Mjpg, (160, 120))));
        assert_eq!(choose(&webcam(), &camera(Some(Rgb3), None, None), (64, 64), speed), None);
        assert_eq!(choose(&webcam(), &camera(None, Some((641, 480)), None), (64, 64), speed), None);
    }

    #[test]
    fn ranges_of_sizes() {
        let range = Offer { format: Yuyv, sizes: vec![Sizes { min: (48, 32), max: (2592, 1944), step: (2, 2) }] };
        let auto = camera(None, None, None);
        assert_eq!(choose(std::slice::from_ref(&range), &auto, (224, 224), speed), Some((Yuyv, (320, 240))));
        let odd = camera(None, Some((321, 240)), None);
        assert_eq!(choose(&[range], &odd, (224, 224), speed), None);
    }

    #[test]
    fn bayer_codes() {
        for code in ["BA81", "RGGB", "RG10", "BG12", "GB16", "pRAA", "pgCC", "pBAA", "bRA8", "PC1R"] {
            assert!(is_bayer(code), "{code}");
        }
        for code in ["YUYV", "MJPG", "NV12", "GREY", "RGB3", "BGR3", "H264", "BA24", "RGBP"] {
            assert!(!is_bayer(code), "{code}");
        }
    }
}

//! Where a picture goes in the model's input: torchvision's geometry, and how the camera is mounted.

use crate::error::{Error, Result};
use crate::model::card::{Fit, Preprocess};

/// Longest edge of the resized picture, of which only the part that the model sees is made.
const LONGEST: usize = 1 << 24;

/// What part of a picture is looked at, and how it is turned before the model sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct View {
    /// The part, in pixels of the source; `None` is all of it.
    pub region: Option<Region>,
    /// Quarter turns clockwise, 0…3: 1 where the camera is mounted with its top to the left.
    pub turns: u8,
    /// Mirrored left to right, after turning.
    pub flip: bool,
}

/// A rectangle of pixels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Region {
    /// Pixels left of it.
    pub left: usize,
    /// Pixels above it.
    pub top: usize,
    /// Its width, at least 1.
    pub width: usize,
    /// Its height, at least 1.
    pub height: usize,
}

impl std::str::FromStr for Region {
    type Err = String;

    fn from_str(text: &str) -> Result<Region, String> {
        let wrong = || format!("`{text}` is not LEFT,TOP,WIDTHxHEIGHT in pixels, such as 80,0,480x480");
        let mut parts = text.split([',', 'x']).map(str::parse);
        let mut next = || parts.next().and_then(std::result::Result::ok).filter(|&n: &usize| n <= 65_535);
        match (next(), next(), next(), next()) {
            (Some(left), Some(top), Some(width @ 1..), Some(height @ 1..)) if text.split([',', 'x']).count() == 4 => {
                Ok(Region { left, top, width, height })
            }
            _ => Err(wrong()),
        }
    }
}

/// One direction of the resize: `length` source pixels become `resized`, of which `kept` from `skip` on are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Axis {
    pub length: usize,
    pub resized: usize,
    pub skip: usize,
    pub kept: usize,
}

/// A picture's way into height × width.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Placed {
    /// The part of the source that is read.
    pub region: Region,
    /// Along the source's rows, and along its columns.
    pub across: Axis,
    pub down: Axis,
    /// Element of the output plane for the first pixel made; steps to it along the source's rows and columns.
    pub origin: isize,
    pub step_across: isize,
    pub step_down: isize,
}

/// Fits a picture of `width` × `height`.
pub(super) fn place(width: usize, height: usize, how: &Preprocess, view: View) -> Result<Placed> {
    if width == 0 || height == 0 {
        return Err(Error::Picture(format!("empty picture ({width}x{height})")));
    }
    let region = view.region.unwrap_or(Region { left: 0, top: 0, width, height });
    if region.left + region.width > width || region.top + region.height > height {
        let Region { left, top, width: w, height: h } = region;
        let what = format!("the region {left},{top},{w}x{h} does not lie inside a picture of {width}x{height}");
        return Err(Error::Usage { what, hint: "region is LEFT,TOP,WIDTHxHEIGHT in pixels of the source".into() });
    }
    let upright = view.turns.is_multiple_of(2);
    let (w, h) = if upright { (region.width, region.height) } else { (region.height, region.width) };
    let ((x, left), (y, top)) = fit(w, h, how);
    if x.resized.max(y.resized) > LONGEST {
        let what =
            format!("a picture of {w}x{h} pixels would be resized to {}x{}: too long and thin", x.resized, y.resized);
        return Err(Error::Picture(what));
    }
    // the turned picture's axes, walked backwards where the source's run the other way
    let back_x = matches!(view.turns % 4, 1 | 2) != view.flip;
    let back_y = matches!(view.turns % 4, 2 | 3);
    let walk = |axis: Axis, first: usize, back: bool, step: usize| {
        let (axis, start) = if back {
            (Axis { skip: axis.resized - axis.skip - axis.kept, ..axis }, first + axis.kept - 1)
        } else {
            (axis, first)
        };
        let step = step as isize;
        (axis, start as isize * step, if back { -step } else { step })
    };
    let (x, x0, step_x) = walk(x, left, back_x, 1);
    let (y, y0, step_y) = walk(y, top, back_y, how.width);
    let origin = x0 + y0;
    Ok(if upright {
        Placed { region, across: x, down: y, origin, step_across: step_x, step_down: step_y }
    } else {
        Placed { region, across: y, down: x, origin, step_across: step_y, step_down: step_x }
    })
}

/// Both axes of an upright picture, each with the first element of the output.
fn fit(width: usize, height: usize, how: &Preprocess) -> ((Axis, usize), (Axis, usize)) {
    let whole = |length: usize, resized: usize| Axis { length, resized, skip: 0, kept: resized };
    match how.fit {
        Fit::Squash => ((whole(width, how.width), 0), (whole(height, how.height), 0)),
        Fit::Crop { crop } => {
            let (w, h) = covering(width, height, how, crop);
            // torchvision's CenterCrop
            let centre = |length: usize, resized: usize, kept: usize| {
                let skip = ((resized - kept) as f64 / 2.0).round_ties_even() as usize;
                Axis { length, resized, skip, kept }
            };
            ((centre(width, w, how.width), 0), (centre(height, h, how.height), 0))
        }
        Fit::Letterbox => {
            let scale = (how.width as f64 / width as f64).min(how.height as f64 / height as f64);
            let side = |x: usize, most: usize| ((x as f64 * scale).round() as usize).clamp(1, most);
            let (w, h) = (side(width, how.width), side(height, how.height));
            ((whole(width, w), (how.width - w) / 2), (whole(height, h), (how.height - h) / 2))
        }
    }
}

/// Size of the resized picture from which the centre is cropped: at least the model's size in both directions.
fn covering(width: usize, height: usize, how: &Preprocess, crop: f32) -> (usize, usize) {
    // The decimal number that the card shows, not its nearest f32: 224 / 0.8 must be 280, not 279.99.
    let crop: f64 = crop.to_string().parse().unwrap_or(f64::from(crop));
    let scaled = |x: usize| ((x as f64 / crop).floor() as usize).max(x);
    let (least_height, least_width) = (scaled(how.height), scaled(how.width));
    if how.height == how.width {
        // torchvision's Resize(int): the long edge is truncated
        let long = |short: usize, long: usize| (least_height as f64 * long as f64 / short as f64) as usize;
        if width <= height { (least_width, long(width, height)) } else { (long(height, width), least_height) }
    } else {
        // timm's ResizeKeepRatio: both edges rounded
        let ratio = (height as f64 / least_height as f64).min(width as f64 / least_width as f64);
        let side = |x: usize, least: usize| ((x as f64 / ratio).round_ties_even() as usize).max(least);
        (side(width, how.width), side(height, how.height))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::card::{Channels, Filter};

    fn how(height: usize, width: usize, fit: Fit) -> Preprocess {
        let (mean, std) = ([0.5; 3], [0.25; 3]);
        Preprocess { height, width, fit, filter: Filter::Bicubic, mean, std, channels: Channels::Rgb }
    }

    #[test]
    fn crop_sizes_equal_torchvision() {
        let size = |w, h, side, crop| covering(w, h, &how(side, side, Fit::Crop { crop }), crop);
        assert_eq!(size(500, 375, 224, 0.875), (341, 256)); // int(256 * 500 / 375) = 341
        assert_eq!(size(375, 500, 224, 0.875), (256, 341));
        assert_eq!(size(100, 100, 224, 0.8), (280, 280)); // 224 / 0.8f32 would be 279.99
        assert_eq!(size(100, 100, 224, 0.9), (248, 248));
        assert_eq!(size(64, 64, 64, 1.0), (64, 64));
    }

    #[test]
    fn every_fit_and_turn_stays_inside_the_model_size() {
        for (w, h) in [(1, 1), (3, 200), (200, 3), (65, 64), (640, 480)] {
            for (height, width) in [(64, 64), (48, 80), (80, 48)] {
                for fit in [Fit::Crop { crop: 0.9 }, Fit::Squash, Fit::Letterbox] {
                    for (turns, flip) in [(0, false), (1, false), (2, true), (3, true)] {
                        let view = View { turns, flip, ..View::default() };
                        let p = place(w, h, &how(height, width, fit), view).unwrap();
                        let end = |a: Axis| a.kept as isize - 1;
                        for (x, y) in [(0, 0), (end(p.across), 0), (0, end(p.down)), (end(p.across), end(p.down))] {
                            let at = p.origin + x * p.step_across + y * p.step_down;
                            assert!((0..(width * height) as isize).contains(&at), "{w}x{h} {fit:?} {view:?}");
                        }
                        if fit != Fit::Letterbox {
                            assert_eq!(p.across.kept * p.down.kept, width * height);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn regions() {
        let region = "2,1,4x3".parse().unwrap();
        assert_eq!(region, Region { left: 2, top: 1, width: 4, height: 3 });
        for bad in ["", "1,2,3", "1,2,0x4", "1,2,3x4x5", "a,2,3x4", "-1,2,3x4"] {
            assert!(bad.parse::<Region>().is_err(), "{bad}");
        }
        let view = View { region: Some(region), ..View::default() };
        let squash = how(8, 8, Fit::Squash);
        assert_eq!(place(6, 4, &squash, view).unwrap().across.length, 4);
        let e = place(5, 4, &squash, view).unwrap_err();
        assert!(e.to_string().contains("2,1,4x3") && e.to_string().contains("5x4"), "{e}");
    }

    #[test]
    fn a_thread_of_pixels_is_refused() {
        let e = place(1, 100_000, &how(224, 224, Fit::Crop { crop: 1.0 }), View::default()).unwrap_err();
        assert!(e.to_string().contains("1x100000"), "{e}");
    }
}

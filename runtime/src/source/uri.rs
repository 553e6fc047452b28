//! The SOURCE argument.

use crate::error::{Error, Result};
use crate::preprocess::PixelFormat;
use std::path::PathBuf;
use std::str::FromStr;

/// Forms that a source may have, for messages.
pub const FORMS: &str = "a picture file, a folder, a pattern such as 'shots/*.jpg', /dev/videoN, \
     v4l2:///dev/videoN?format=MJPG&size=640x480&fps=30, or synthetic://[WxH][?fps=N]";

/// A parsed source.
#[derive(Clone, Debug, PartialEq)]
pub enum Uri {
    /// A picture file, a folder of them or a pattern.
    Path(PathBuf),
    /// `v4l2:///dev/videoN` with options, or the device's path alone.
    Camera(Camera),
    /// `synthetic://WxH?fps=N`: a moving test pattern without end.
    Synthetic(Synthetic),
}

/// A V4L2 device and what is asked of it; what is `None` is chosen.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Camera {
    /// Device node.
    pub device: PathBuf,
    /// Pixel format.
    pub format: Option<PixelFormat>,
    /// Width and height in pixels.
    pub size: Option<(u32, u32)>,
    /// Frames a second.
    pub fps: Option<f64>,
}

/// Size and rate of the test pattern.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Synthetic {
    /// Width and height in pixels.
    pub size: (u32, u32),
    /// Frames a second.
    pub fps: f64,
}

impl FromStr for Uri {
    type Err = Error;

    fn from_str(text: &str) -> Result<Uri> {
        if text.is_empty() {
            return Err(usage("the source is empty".into()));
        }
        let (scheme, rest) = match text.split_once("://") {
            Some((scheme, rest)) => (scheme, rest),
            None if text.starts_with("/dev/") => ("v4l2", text),
            None => match text.split_once(':') {
                Some(("v4l2" | "synthetic" | "file", _)) => {
                    return Err(usage(format!("source `{text}`: `//` is missing after the colon")));
                }
                _ => return Ok(Uri::Path(text.into())),
            },
        };
        match scheme {
            "file" => Ok(Uri::Path(rest.into())),
            "v4l2" => camera(text, rest),
            "synthetic" => synthetic(text, rest),
            _ => Err(usage(format!("source `{text}`: unknown kind `{scheme}://`"))),
        }
    }
}

fn camera(text: &str, rest: &str) -> Result<Uri> {
    let (device, query) = rest.split_once('?').unwrap_or((rest, ""));
    if !device.starts_with('/') {
        return Err(usage(format!("source `{text}`: expected a device such as v4l2:///dev/video0")));
    }
    let mut camera = Camera { device: device.into(), ..Camera::default() };
    for (key, value) in pairs(text, query)? {
        match key {
            "format" => {
                let known = PixelFormat::from_fourcc(&value.to_ascii_uppercase());
                camera.format = Some(known.ok_or_else(|| {
                    let all = PixelFormat::ALL.map(PixelFormat::fourcc).join(", ");
                    usage(format!("source `{text}`: format `{value}` is not supported, expected one of {all}"))
                })?);
            }
            "size" => camera.size = Some(size(text, value)?),
            "fps" => camera.fps = Some(rate(text, value)?),
            _ => return Err(unknown(text, key, "format, size, fps")),
        }
    }
    Ok(Uri::Camera(camera))
}

fn synthetic(text: &str, rest: &str) -> Result<Uri> {
    let (dimensions, query) = rest.split_once('?').unwrap_or((rest, ""));
    let mut synthetic = Synthetic { size: (640, 480), fps: 30.0 };
    if !dimensions.is_empty() {
        synthetic.size = size(text, dimensions)?;
    }
    for (key, value) in pairs(text, query)? {
        match key {
            "fps" => synthetic.fps = rate(text, value)?,
            _ => return Err(unknown(text, key, "fps")),
        }
    }
    Ok(Uri::Synthetic(synthetic))
}

fn pairs<'a>(text: &str, query: &'a str) -> Result<Vec<(&'a str, &'a str)>> {
    let mut found: Vec<(&str, &str)> = vec![];
    for part in query.split('&').filter(|p| !p.is_empty()) {
        let pair = part.split_once('=').ok_or_else(|| usage(format!("source `{text}`: `{part}` has no value")))?;
        if found.iter().any(|(key, _)| *key == pair.0) {
            return Err(usage(format!("source `{text}`: `{}` is given twice", pair.0)));
        }
        found.push(pair);
    }
    Ok(found)
}

fn size(text: &str, value: &str) -> Result<(u32, u32)> {
    let parsed = value.split_once('x').and_then(|(w, h)| Some((w.parse().ok()?, h.parse().ok()?)));
    match parsed {
        Some((w @ 1..=16384, h @ 1..=16384)) => Ok((w, h)),
        _ => Err(usage(format!("source `{text}`: size `{value}` is not WIDTHxHEIGHT between 1x1 and 16384x16384"))),
    }
}

fn rate(text: &str, value: &str) -> Result<f64> {
    match value.parse() {
        Ok(fps) if (0.01..=1000.0).contains(&fps) => Ok(fps),
        _ => Err(usage(format!("source `{text}`: fps `{value}` is not a number between 0.01 and 1000"))),
    }
}

fn unknown(text: &str, key: &str, valid: &str) -> Error {
    usage(format!("source `{text}`: unknown option `{key}`, expected one of {valid}"))
}

fn usage(what: String) -> Error {
    Error::Usage { what, hint: format!("a source is {FORMS}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Uri {
        text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
    }

    #[test]
    fn every_form() {
        let camera = Camera { device: "/dev/video2".into(), ..Camera::default() };
        assert_eq!(parse("/dev/video2"), Uri::Camera(camera.clone()));
        assert_eq!(parse("v4l2:///dev/video2"), Uri::Camera(camera.clone()));
        let full =
            Camera { format: Some(PixelFormat::Mjpg), size: Some((640, 480)), fps: Some(29.97), ..camera.clone() };
        assert_eq!(parse("v4l2:///dev/video2?format=mjpg&size=640x480&fps=29.97"), Uri::Camera(full));
        assert_eq!(parse("a b/c?.jpg"), Uri::Path("a b/c?.jpg".into()));
        assert_eq!(parse("file:///x/y.png"), Uri::Path("/x/y.png".into()));
        assert_eq!(parse("synthetic://"), Uri::Synthetic(Synthetic { size: (640, 480), fps: 30.0 }));
        assert_eq!(parse("synthetic://32x24?fps=5"), Uri::Synthetic(Synthetic { size: (32, 24), fps: 5.0 }));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, word) in [
            ("", "empty"),
            ("rtsp://host/stream", "rtsp"),
            ("v4l2:/dev/video0", "//"),
            ("v4l2://video0", "v4l2:///dev/video0"),
            ("/dev/video0?fmt=YUYV", "fmt"),
            ("/dev/video0?format=BA81", "BA81"),
            ("/dev/video0?size=640", "640"),
            ("/dev/video0?size=0x10", "0x10"),
            ("/dev/video0?fps=fast", "fast"),
            ("/dev/video0?fps=NaN", "NaN"),
            ("/dev/video0?fps=1&fps=2", "twice"),
            ("synthetic://?size=1x1", "size"),
            ("synthetic://large", "large"),
        ] {
            let e = text.parse::<Uri>().unwrap_err();
            assert!(e.to_string().contains(word) && e.hint().is_some(), "{text}: {e}");
        }
    }
}

//! The SOURCE argument.

use crate::error::{Error, Result};
use crate::preprocess::PixelFormat;
use std::path::PathBuf;
use std::str::FromStr;

/// Forms that a source may have, for messages.
pub const FORMS: &str = "a picture file, a folder, a pattern such as 'shots/*.jpg', file://PATH?fps=N (as a camera would), \
     /dev/videoN, v4l2:///dev/videoN?format=MJPG&size=640x480&fps=30&ctrl.NAME=VALUE, exec:COMMAND (JPEG pictures on its \
     output), 'exec:?format=YU12&size=640x480 COMMAND' (raw frames), or synthetic://[WxH][?fps=N]";

/// A parsed source.
#[derive(Clone, Debug, PartialEq)]
pub enum Uri {
    /// Picture files.
    Files(Files),
    /// `v4l2:///dev/videoN` with options, or the device's path alone.
    Camera(Camera),
    /// `exec:COMMAND`: a program that writes frames.
    Exec(Exec),
    /// `synthetic://WxH?fps=N`: a moving test pattern without end.
    Synthetic(Synthetic),
}

/// Picture files.
#[derive(Clone, Debug, PartialEq)]
pub struct Files {
    /// A file, a folder or a pattern.
    pub path: PathBuf,
    /// Pictures a second, as from a camera: late ones are dropped. `None`: each as soon as the model is free.
    pub fps: Option<f64>,
    /// Whether it starts again after the last one.
    pub repeat: bool,
}

/// A V4L2 device and what is asked of it; what is `None` is chosen.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Camera {
    /// Device node.
    pub device: PathBuf,
    /// Pixel format.
    pub format: Option<PixelFormat>,
    /// Its code where it is not the usual one: NM12, planes in buffers of their own.
    pub code: Option<&'static str>,
    /// Width and height in pixels.
    pub size: Option<(u32, u32)>,
    /// Frames a second.
    pub fps: Option<f64>,
    /// Controls to set: name as `v4l2-ctl -l` shows it, and a number or a menu entry.
    pub controls: Vec<(String, String)>,
}

/// A program that writes frames to its standard output.
#[derive(Clone, Debug, PartialEq)]
pub struct Exec {
    /// A shell's command line.
    pub command: String,
    /// What it writes: JPEG pictures one after the other, or raw frames.
    pub format: PixelFormat,
    /// Width and height of raw frames.
    pub size: (u32, u32),
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
        if let Some(rest) = text.strip_prefix("exec:") {
            return exec(text, rest);
        }
        let (scheme, rest) = match text.split_once("://") {
            Some((scheme, rest)) => (scheme, rest),
            None if text.starts_with("/dev/") => ("v4l2", text),
            None => match text.split_once(':') {
                Some(("v4l2" | "synthetic" | "file", _)) => {
                    return Err(usage(format!("source `{text}`: `//` is missing after the colon")));
                }
                _ => return Ok(Uri::Files(Files { path: text.into(), fps: None, repeat: false })),
            },
        };
        match scheme {
            "file" => files(text, rest),
            "v4l2" => camera(text, rest),
            "synthetic" => synthetic(text, rest),
            _ => Err(usage(format!("source `{text}`: unknown kind `{scheme}://`"))),
        }
    }
}

fn files(text: &str, rest: &str) -> Result<Uri> {
    let (path, query) = rest.rsplit_once('?').unwrap_or((rest, ""));
    let mut files = Files { path: path.into(), fps: None, repeat: false };
    for (key, value) in pairs(text, query)? {
        match (key, value) {
            ("fps", _) => files.fps = Some(rate(text, value)?),
            ("repeat", "yes") => files.repeat = true,
            ("repeat", "no") => files.repeat = false,
            ("repeat", _) => return Err(usage(format!("source `{text}`: repeat `{value}` is neither yes nor no"))),
            _ => return Err(unknown(text, key, "fps, repeat")),
        }
    }
    Ok(Uri::Files(files))
}

fn exec(text: &str, rest: &str) -> Result<Uri> {
    let (query, command) = match rest.strip_prefix('?') {
        Some(rest) => rest.split_once(' ').unwrap_or((rest, "")),
        None => ("", rest),
    };
    let (mut read, mut dimensions) = (PixelFormat::Mjpg, None);
    for (key, value) in pairs(text, query)? {
        match key {
            "format" => read = format(text, value)?,
            "size" => dimensions = Some(size(text, value)?),
            _ => return Err(unknown(text, key, "format, size")),
        }
    }
    if command.trim().is_empty() {
        return Err(usage(format!("source `{text}`: the command is missing")));
    }
    let size = match (read, dimensions) {
        (PixelFormat::Mjpg, None) => (0, 0),
        (PixelFormat::Mjpg, Some(_)) => {
            return Err(usage(format!("source `{text}`: JPEG pictures say their size themselves, leave size out")));
        }
        (_, Some(size)) => size,
        (_, None) => return Err(usage(format!("source `{text}`: raw frames need a size, such as size=640x480"))),
    };
    Ok(Uri::Exec(Exec { command: command.trim().into(), format: read, size }))
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
                let known = format(text, value)?;
                let other = known.codes().iter().skip(1).find(|c| c.eq_ignore_ascii_case(value));
                (camera.format, camera.code) = (Some(known), other.copied());
            }
            "size" => camera.size = Some(size(text, value)?),
            "fps" => camera.fps = Some(rate(text, value)?),
            _ => match key.strip_prefix("ctrl.") {
                Some(name) if !name.is_empty() => camera.controls.push((name.into(), value.into())),
                _ => return Err(unknown(text, key, "format, size, fps, ctrl.NAME")),
            },
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

fn format(text: &str, value: &str) -> Result<PixelFormat> {
    PixelFormat::from_fourcc(&value.to_ascii_uppercase()).ok_or_else(|| {
        let all = PixelFormat::ALL.map(PixelFormat::fourcc).join(", ");
        usage(format!("source `{text}`: format `{value}` is not supported, expected one of {all}"))
    })
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
        let controls = vec![("exposure_auto".into(), "1".into()), ("gain".into(), "-3".into())];
        let set = Camera { controls, ..Camera { device: "/dev/video2".into(), ..Camera::default() } };
        assert_eq!(parse("/dev/video2?ctrl.exposure_auto=1&ctrl.gain=-3"), Uri::Camera(set));
        let planes = Camera { format: Some(PixelFormat::Nv12), code: Some("NM12"), ..camera };
        assert_eq!(parse("/dev/video2?format=nm12"), Uri::Camera(planes));
        let files = |path: &str| Files { path: path.into(), fps: None, repeat: false };
        assert_eq!(parse("a b/c?.jpg"), Uri::Files(files("a b/c?.jpg")));
        assert_eq!(parse("file:///x/y.png"), Uri::Files(files("/x/y.png")));
        let paced = Files { fps: Some(5.0), repeat: true, ..files("shots/") };
        assert_eq!(parse("file://shots/?fps=5&repeat=yes"), Uri::Files(paced));
        let exec = |command: &str, format, size| Uri::Exec(Exec { command: command.into(), format, size });
        let pi = "rpicam-vid -t 0 --codec mjpeg -o -";
        assert_eq!(parse(&format!("exec:{pi}")), exec(pi, PixelFormat::Mjpg, (0, 0)));
        assert_eq!(parse("exec:?format=YU12&size=64x48 cat 'a?b'"), exec("cat 'a?b'", PixelFormat::Yu12, (64, 48)));
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
            ("file://x?fast=1", "fast"),
            ("file://x?repeat=often", "often"),
            ("exec:", "command"),
            ("exec:?format=YUYV&size=2x2", "command"),
            ("exec:?format=YUYV cat x", "size"),
            ("exec:?size=2x2 cat x", "size"),
            ("/dev/video0?ctrl.=1", "ctrl.NAME"),
        ] {
            let e = text.parse::<Uri>().unwrap_err();
            assert!(e.to_string().contains(word) && e.hint().is_some(), "{text}: {e}");
        }
    }
}

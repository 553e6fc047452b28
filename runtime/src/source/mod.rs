//! Where frames come from.

mod awaited;
mod exec;
mod files;
mod synthetic;
pub mod uri;
pub mod v4l2;

use crate::error::{Error, Result};
use crate::preprocess::{Picture, PixelFormat, Preprocessor, RawFrame, complete_frame, decode_bytes, encode};
use ndarray::ArrayD;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime};

pub use uri::Uri;

/// How long a call of a source may take that is not told to wait for a while.
const PATIENCE: Duration = Duration::from_secs(60);
/// Quality of JPEG pictures made of frames that are none yet.
const JPEG_QUALITY: u8 = 85;

/// One frame, not decoded yet: that is the next thread's work.
pub struct Frame {
    /// Its pixels.
    pub pixels: Pixels,
    /// The file it comes from, for file sources.
    pub file: Option<PathBuf>,
    /// When it was captured, for people; the clock may be set meanwhile.
    pub time: SystemTime,
    /// When it was captured, by the driver's timestamp where there is one: latency counts from here.
    pub at: Instant,
    /// How long reading or receiving it took, without the wait for the camera.
    pub capture: Duration,
    /// Frames that the source itself skipped since the one before (stale or damaged buffers).
    pub skipped: u64,
}

/// A frame's pixels.
pub enum Pixels {
    /// Ready.
    Picture(Picture),
    /// As the camera gives them.
    Raw(RawFrame),
    /// A JPEG or PNG file's bytes.
    Encoded(Vec<u8>),
}

impl Frame {
    /// A frame of no file, taken at that time.
    pub fn taken(pixels: Pixels, at: Instant, capture: Duration) -> Frame {
        let now = SystemTime::now();
        let time = now.checked_sub(at.elapsed()).unwrap_or(now);
        Frame { pixels, file: None, time, at, capture, skipped: 0 }
    }

    /// The model's input.
    ///
    /// # Errors
    /// [`crate::Error::Picture`], naming the file where there is one.
    pub fn tensor(&self, preprocessor: &mut Preprocessor) -> Result<ArrayD<f32>> {
        let tensor = match &self.pixels {
            Pixels::Picture(picture) => preprocessor.picture(picture),
            Pixels::Raw(raw) => preprocessor.frame(raw),
            Pixels::Encoded(bytes) => decode_bytes(bytes).and_then(|picture| preprocessor.picture(&picture)),
        };
        self.named(tensor)
    }

    /// The frame as a JPEG file: the camera's own bytes where it sends such.
    ///
    /// # Errors
    /// As [`Self::tensor`].
    pub fn jpeg(&self) -> Result<Vec<u8>> {
        let jpeg = match &self.pixels {
            Pixels::Picture(picture) => encode(picture, JPEG_QUALITY),
            Pixels::Raw(raw) if raw.format == PixelFormat::Mjpg => complete_frame(&raw.bytes).map(Into::into),
            Pixels::Raw(raw) => raw.picture().and_then(|picture| encode(&picture, JPEG_QUALITY)),
            Pixels::Encoded(bytes) if bytes.starts_with(&[0xFF, 0xD8]) => Ok(bytes.clone()),
            Pixels::Encoded(bytes) => decode_bytes(bytes).and_then(|picture| encode(&picture, JPEG_QUALITY)),
        };
        self.named(jpeg)
    }

    fn named<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|e| match &self.file {
            Some(file) => e.in_file(file),
            None => e,
        })
    }
}

/// A source of frames.
pub trait FrameSource: Send {
    /// The next frame; `None` at the end.
    ///
    /// # Errors
    /// A file that cannot be read, a camera that stopped. A file source can be asked for the next frame after an
    /// error, a live one after [`Self::reopen`].
    fn next(&mut self) -> Result<Option<Frame>>;

    /// Starts a live source again after an error: a camera that was plugged in again, perhaps under another number.
    ///
    /// # Errors
    /// As [`open`]; it can be tried again.
    fn reopen(&mut self) -> Result<()> {
        Ok(())
    }

    /// What this is, for people: device, format, size, rate; or how many files.
    fn describe(&self) -> String;

    /// Whether frames come by themselves and may be dropped when they are not taken in time.
    fn is_live(&self) -> bool;

    /// How long [`Self::next`] or [`Self::reopen`] may take: beyond it what they wait for, such as a driver, hangs.
    fn patience(&self) -> Duration {
        PATIENCE
    }

    /// How many frames there are in all, where that is known.
    fn frames(&self) -> Option<usize> {
        None
    }
}

/// Opens a source. `input` is the model's input width and height: a camera is set to the nearest size above.
///
/// # Errors
/// No such file, no picture in a folder, no such camera, or a camera that does not offer what was asked for.
pub fn open(uri: &Uri, input: (usize, usize)) -> Result<Box<dyn FrameSource>> {
    Ok(match uri {
        Uri::Files(options) => Box::new(files::Files::open(options)?),
        Uri::Synthetic(options) => Box::new(synthetic::Synthetic::new(options)),
        Uri::Camera(camera) => Box::new(v4l2::V4l2::open(camera, input)?),
        Uri::Exec(options) => Box::new(exec::Exec::open(options)?),
    })
}

/// As [`open`], but a camera that cannot be opened now is one that failed, and is tried again and again.
///
/// # Errors
/// As [`open`] for sources that are no cameras, and for settings that no camera could have.
pub fn open_or_wait(uri: &Uri, input: (usize, usize)) -> Result<Box<dyn FrameSource>> {
    match (open(uri, input), uri) {
        (Err(why @ Error::Source { .. }), Uri::Camera(_)) => Ok(Box::new(awaited::Awaited::new(uri, input, why))),
        (opened, _) => opened,
    }
}

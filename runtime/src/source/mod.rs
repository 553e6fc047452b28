//! Where frames come from.

mod files;
mod synthetic;
pub mod uri;
pub mod v4l2;

use crate::error::Result;
use crate::preprocess::{Picture, RawFrame, decode_bytes};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

pub use uri::Uri;

/// One frame, not decoded yet: that is the next thread's work.
pub struct Frame {
    /// Its pixels.
    pub pixels: Pixels,
    /// The file it comes from, for file sources.
    pub file: Option<PathBuf>,
    /// When it was captured.
    pub time: SystemTime,
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
    /// Decodes or converts the pixels to RGB.
    ///
    /// # Errors
    /// [`crate::Error::Picture`], naming the file where there is one.
    pub fn picture(self) -> Result<Picture> {
        let picture = match self.pixels {
            Pixels::Picture(p) => Ok(p),
            Pixels::Raw(raw) => raw.picture(),
            Pixels::Encoded(bytes) => decode_bytes(&bytes),
        };
        picture.map_err(|e| match &self.file {
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
    /// error, a live one cannot.
    fn next(&mut self) -> Result<Option<Frame>>;

    /// What this is, for people: device, format, size, rate; or how many files.
    fn describe(&self) -> String;

    /// Whether frames come by themselves and may be dropped when they are not taken in time.
    fn is_live(&self) -> bool;

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
        Uri::Path(path) => Box::new(files::Files::open(path)?),
        Uri::Synthetic(options) => Box::new(synthetic::Synthetic::new(options)),
        Uri::Camera(camera) => Box::new(v4l2::V4l2::open(camera, input)?),
    })
}

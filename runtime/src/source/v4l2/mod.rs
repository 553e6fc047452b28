//! Cameras through Video4Linux2.

mod choose;
mod controls;
mod device;
mod explain;
mod stream;

use super::{Frame, FrameSource, Pixels, uri};
use crate::error::{Error, Result};
use crate::preprocess::{PixelFormat, RawFrame};
use choose::{Offer, choose, is_bayer};
use device::{Device, Negotiated};
use explain::{cannot_open, csi_hint, failed, not_offered, offers_text};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use stream::Stream;

/// How long a camera may give no frame.
const PATIENCE: Duration = Duration::from_secs(5);
/// Damaged frames in a row that end the stream.
const MOST_DAMAGED: u64 = 30;

/// A streaming camera.
pub struct V4l2 {
    wanted: uri::Camera,
    input: (usize, usize),
    /// The device's name and bus address, to know it again.
    identity: (String, String),
    /// `None` while the camera is lost.
    running: Option<Running>,
}

/// What a running camera gives.
struct Running {
    stream: Stream,
    device: PathBuf,
    format: PixelFormat,
    negotiated: Negotiated,
    rate: Option<f64>,
    sequence: Option<u32>,
}

/// A video device as `vedge-run cameras` lists it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Listed {
    /// Device node.
    pub device: PathBuf,
    /// Name of the camera; empty when it cannot be opened.
    pub name: String,
    /// Kernel driver.
    pub driver: String,
    /// Bus address.
    pub bus: String,
    /// Formats with their sizes.
    pub formats: Vec<ListedFormat>,
    /// Whether vedge can take pictures from it.
    pub usable: bool,
    /// Why not, and what to do; empty when usable.
    pub problem: String,
}

/// One format of a [`Listed`] device.
#[derive(Clone, Debug, serde::Serialize)]
pub struct ListedFormat {
    /// Four-character code.
    pub fourcc: String,
    /// Whether vedge converts it.
    pub supported: bool,
    /// Sizes, `640x480`, or ranges of them.
    pub sizes: Vec<String>,
}

impl V4l2 {
    /// Opens a camera, sets controls, format, size and rate, and starts streaming.
    ///
    /// # Errors
    /// [`Error::Source`]: no such device, no permission, in use, not a camera, only Bayer formats, or it does not
    /// offer what is asked for.
    pub fn open(wanted: &uri::Camera, input: (usize, usize)) -> Result<V4l2> {
        let (running, identity) = start(&wanted.device, wanted, input)?;
        Ok(V4l2 { wanted: wanted.clone(), input, identity, running: Some(running) })
    }

    /// Where the camera is now: at its path, or at another number when it was plugged in again.
    fn find_again(&self) -> PathBuf {
        let path = &self.wanted.device;
        let same = |l: &Listed| l.name == self.identity.0;
        if path.exists() && describe(path).as_ref().is_none_or(same) {
            return path.clone();
        }
        let others = list().into_iter().filter(same);
        others.min_by_key(|l| l.bus != self.identity.1).map_or(path.clone(), |l| l.device)
    }
}

/// Starts the device, which may have another path than the one that is wanted; with its name and bus address.
fn start(path: &Path, wanted: &uri::Camera, input: (usize, usize)) -> Result<(Running, (String, String))> {
    let device = Device::open(path).map_err(|e| cannot_open(path, &e))?;
    let (offers, fourccs) = offers(path, &device)?;
    let identity = device.capabilities().map(|c| (c.card, c.bus)).map_err(|e| cannot_open(path, &e))?;
    let fastest = |format: PixelFormat, size| device.fastest(offered_code(format, &fourccs), size);
    let (format, size) = choose(&offers, wanted, input, fastest)
        .filter(|_| offers_code(wanted, &fourccs))
        .ok_or_else(|| not_offered(path, wanted, &offers))?;
    controls::set(path, &device, &wanted.controls)?;
    let fourcc = wanted.code.unwrap_or(offered_code(format, &fourccs));
    let negotiated = device.set_format(fourcc, size).map_err(|e| failed(path, "cannot set the format", &e))?;
    let substituted = negotiated.fourcc != fourcc;
    if substituted || (wanted.size.is_some() && (negotiated.width, negotiated.height) != size) {
        let got = format!("{} {}x{}", negotiated.fourcc, negotiated.width, negotiated.height);
        let what = format!("{}: asked for {fourcc} {}x{}, the driver sets {got}", path.display(), size.0, size.1);
        return Err(Error::Source { what, hint: offers_text(&offers) });
    }
    let fastest = device.fastest(fourcc, (negotiated.width, negotiated.height));
    let rate = set_rate(path, &device, wanted.fps, fastest)?;
    let stream = Stream::start(device).map_err(|e| failed(path, "cannot start streaming", &e))?;
    Ok((Running { stream, device: path.into(), format, negotiated, rate, sequence: None }, identity))
}

impl Running {
    fn next(&mut self) -> Result<Frame> {
        let (mut skipped, mut damaged) = (0, 0);
        loop {
            let captured = self.stream.next(PATIENCE).map_err(|e| failed(&self.device, "no frame", &e))?;
            let begin = Instant::now();
            // Frames that the driver itself lost show as a gap; stale ones are in the gap too, where it counts at all.
            let gap = self.sequence.map_or(0, |last| u64::from(captured.sequence.wrapping_sub(last).saturating_sub(1)));
            skipped += captured.stale.max(if gap < 10_000 { gap } else { 0 });
            self.sequence = Some(captured.sequence);
            if captured.damaged {
                (skipped, damaged) = (skipped + 1, damaged + 1);
                if damaged >= MOST_DAMAGED {
                    let what = format!("{}: {damaged} damaged frames in a row", self.device.display());
                    let hint = "check the cable, or try a smaller size: v4l2://DEVICE?size=320x240".into();
                    return Err(Error::Source { what, hint });
                }
                continue;
            }
            let n = &self.negotiated;
            let size = (n.width as usize, n.height as usize);
            let stride = n.strides.first().map_or(0, |&s| s as usize);
            let mut raw = RawFrame::new(self.format, size, stride, n.matrix, captured.bytes);
            if captured.starts.len() > 1 {
                raw.planes = captured.starts.into_iter().zip(n.strides.iter().map(|&s| s as usize)).collect();
            }
            return Ok(Frame { skipped, ..Frame::taken(Pixels::Raw(raw), captured.at, begin.elapsed()) });
        }
    }
}

impl FrameSource for V4l2 {
    fn next(&mut self) -> Result<Option<Frame>> {
        match &mut self.running {
            Some(running) => running.next().map(Some),
            None => Ok(None),
        }
    }

    fn reopen(&mut self) -> Result<()> {
        self.running = None; // the device must be closed first
        self.running = Some(start(&self.find_again(), &self.wanted, self.input)?.0);
        Ok(())
    }

    fn describe(&self) -> String {
        let Some(Running { negotiated: n, device, rate, .. }) = &self.running else {
            return format!("{} (lost)", self.wanted.device.display());
        };
        let rate = rate.map(|r| format!(" at {r:.4} frames a second")).unwrap_or_default();
        format!("{} {} {}x{}{}", device.display(), n.fourcc, n.width, n.height, rate.replace(".0000 ", " "))
    }

    fn is_live(&self) -> bool {
        true
    }
}

/// Every video device of this machine that captures, or that cannot be opened.
pub fn list() -> Vec<Listed> {
    let number = |p: &Path| p.to_string_lossy().strip_prefix("/dev/video").and_then(|n| n.parse::<u32>().ok());
    let entries = std::fs::read_dir("/dev").into_iter().flatten().flatten();
    let mut nodes: Vec<PathBuf> = entries.map(|e| e.path()).filter(|p| number(p).is_some()).collect();
    nodes.sort_by_key(|p| number(p));
    nodes.into_iter().filter_map(|path| describe(&path)).collect()
}

fn describe(path: &Path) -> Option<Listed> {
    let mut listed = Listed {
        device: path.into(),
        name: String::new(),
        driver: String::new(),
        bus: String::new(),
        formats: vec![],
        usable: false,
        problem: String::new(),
    };
    let problem = |e: &Error| match e.hint() {
        Some(hint) => format!("{e} ({hint})"),
        None => e.to_string(),
    };
    let device = match Device::open(path) {
        Ok(device) => device,
        Err(e) => {
            listed.problem = problem(&cannot_open(path, &e));
            return Some(listed);
        }
    };
    let capabilities = device.capabilities().ok()?;
    if !capabilities.captures() {
        return None; // an output, a metadata node, a codec
    }
    (listed.name, listed.driver, listed.bus) = (capabilities.card, capabilities.driver, capabilities.bus);
    for fourcc in device.formats() {
        let sizes = device.sizes(&fourcc).iter().map(ToString::to_string).collect();
        let supported = PixelFormat::from_fourcc(&fourcc).is_some();
        listed.formats.push(ListedFormat { fourcc, supported, sizes });
    }
    match offers(path, &device) {
        Ok(_) => listed.usable = true,
        Err(e) => listed.problem = problem(&e),
    }
    Some(listed)
}

/// Formats that vedge converts, and the codes of all.
fn offers(path: &Path, device: &Device) -> Result<(Vec<Offer>, Vec<String>)> {
    let source = |what: &str, hint: String| Error::Source { what: format!("{}: {what}", path.display()), hint };
    let list = || "list cameras with: vedge-run cameras".to_string();
    let c = device.capabilities().map_err(|_| source("is not a video device", list()))?;
    if !c.captures() || !c.streams() {
        return Err(source("is no camera: it does not capture video", list()));
    }
    let fourccs = device.formats();
    let formats = readable(path, &c.driver, &fourccs)?;
    let offer = |format| Offer { format, sizes: device.sizes(offered_code(format, &fourccs)) };
    let offers = formats.into_iter().map(offer).collect();
    Ok((offers, fourccs))
}

/// Those of a camera's formats that vedge converts, by the four-character codes that it lists.
///
/// # Errors
/// [`Error::Source`] when there is none; for a camera of raw sensor data the hint names what makes pictures of it.
pub fn readable(path: &Path, driver: &str, fourccs: &[String]) -> Result<Vec<PixelFormat>> {
    let mut formats: Vec<PixelFormat> = fourccs.iter().filter_map(|f| PixelFormat::from_fourcc(f)).collect();
    formats.dedup();
    if !formats.is_empty() {
        return Ok(formats);
    }
    let (device, all) = (path.display(), fourccs.join(", "));
    if fourccs.iter().any(|f| is_bayer(f)) {
        let what = format!("{device}: offers raw sensor data only ({all}), not pictures");
        return Err(Error::Source { what, hint: csi_hint(driver) });
    }
    let known = PixelFormat::ALL.map(PixelFormat::fourcc).join(", ");
    let what =
        format!("{device}: offers {}, none of which vedge reads", if all.is_empty() { "no format" } else { &all });
    Err(Error::Source { what, hint: format!("vedge reads {known}") })
}

/// Whether the camera offers the very code that is asked for, where one is.
fn offers_code(wanted: &uri::Camera, fourccs: &[String]) -> bool {
    wanted.code.is_none_or(|code| fourccs.iter().any(|f| f == code))
}

/// The code under which the camera offers a format: MJPG may be called JPEG, NV12 in two buffers is NM12.
fn offered_code(format: PixelFormat, fourccs: &[String]) -> &'static str {
    let offered = |code: &&&str| fourccs.iter().any(|f| f == **code);
    format.codes().iter().find(offered).copied().unwrap_or(format.fourcc())
}

/// Sets the rate that is asked for, or else up to 30 frames a second: drivers keep what the last program set.
fn set_rate(path: &Path, device: &Device, wanted: Option<f64>, fastest: Option<f64>) -> Result<Option<f64>> {
    let Some(fps) = wanted else {
        let usual = fastest.and_then(|f| device.set_rate(f.min(30.0)));
        return Ok(usual.or_else(|| device.rate()));
    };
    let source = |what: String, hint: String| Error::Source { what: format!("{}: {what}", path.display()), hint };
    match device.set_rate(fps) {
        Some(rate) if (rate - fps).abs() <= 0.02 * fps => Ok(Some(rate)),
        Some(rate) => {
            let what = format!("asked for {fps} frames a second, the driver sets {rate:.2}");
            Err(source(what, format!("ask for fps={rate:.0}, or leave fps out")))
        }
        None => {
            let what = format!("asked for {fps} frames a second, the driver does not let the rate be set");
            Err(source(what, "leave fps out".into()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(driver: &str, fourccs: &[&str]) -> Result<Vec<PixelFormat>> {
        let fourccs: Vec<String> = fourccs.iter().map(ToString::to_string).collect();
        readable(Path::new("/dev/video0"), driver, &fourccs)
    }

    #[test]
    fn only_what_can_be_converted_is_taken() {
        assert_eq!(judged("uvcvideo", &["MJPG", "H264", "YUYV"]).unwrap(), [PixelFormat::Mjpg, PixelFormat::Yuyv]);
        assert_eq!(judged("x", &["JPEG", "RG10"]).unwrap(), [PixelFormat::Mjpg]);
        let e = judged("x", &["H264"]).unwrap_err();
        assert!(e.to_string().contains("H264") && e.hint().unwrap().contains("YUYV"), "{e}");
        assert!(judged("x", &[]).unwrap_err().to_string().contains("no format"));
    }
}

//! What a camera's refusals mean, and what to do.

use super::choose::Offer;
use super::{PATIENCE, list};
use crate::error::Error;
use crate::source::uri;
use std::io;
use std::path::Path;

pub(super) fn not_offered(path: &Path, wanted: &uri::Camera, offers: &[Offer]) -> Error {
    let format = wanted.format.map(|f| wanted.code.unwrap_or(f.fourcc()).to_string());
    let size = wanted.size.map(|(w, h)| format!("{w}x{h}"));
    let asked: Vec<String> = format.into_iter().chain(size).collect();
    let what = format!("{}: does not offer {}", path.display(), asked.join(" "));
    Error::Source { what, hint: offers_text(offers) }
}

pub(super) fn offers_text(offers: &[Offer]) -> String {
    let one = |o: &Offer| {
        let sizes: Vec<String> = o.sizes.iter().map(ToString::to_string).collect();
        format!("{} {}", o.format.fourcc(), sizes.join(" "))
    };
    format!("it offers {}", offers.iter().map(one).collect::<Vec<_>>().join("; "))
}

/// How to get pictures from a sensor whose driver gives raw data.
pub(super) fn csi_hint(driver: &str) -> String {
    let pi = "Raspberry Pi: let the camera's own program make the pictures: \
              'exec:rpicam-vid -t 0 -n --codec mjpeg --width 640 --height 480 -o -'; a program that only knows V4L2 can be \
              started through `libcamerify` (not a static binary)";
    let jetson = "Jetson: let the camera's own software make the pictures: 'exec:gst-launch-1.0 -q nvarguscamerasrc ! \
                  nvvidconv ! video/x-raw,width=640,height=480,format=I420 ! nvjpegenc ! fdsink'";
    match driver {
        "unicam" | "rp1-cfe" | "bcm2835-isp" | "pispbe" => pi.into(),
        d if d.starts_with("tegra") => jetson.into(),
        _ => format!("{pi}; {jetson}"),
    }
}

pub(super) fn cannot_open(path: &Path, e: &io::Error) -> Error {
    let hint = match e.kind() {
        io::ErrorKind::NotFound => {
            let there: Vec<String> =
                list().into_iter().filter(|l| l.usable).map(|l| l.device.display().to_string()).collect();
            match there.as_slice() {
                [] => "no camera is connected that vedge can use; list devices with: vedge-run cameras".into(),
                there => format!("cameras here: {}", there.join(", ")),
            }
        }
        io::ErrorKind::PermissionDenied => {
            "join the group `video` and log in again: sudo usermod -aG video $USER".into()
        }
        _ => String::new(),
    };
    let why = if e.kind() == io::ErrorKind::NotFound { "no such device".into() } else { e.to_string() };
    Error::Source { what: format!("cannot open camera {}: {why}", path.display()), hint }
}

pub(super) fn failed(path: &Path, what: &str, e: &io::Error) -> Error {
    let (why, hint) = match e.raw_os_error() {
        Some(libc::EBUSY) => ("another program is using it".to_string(), "find it with: fuser -v /dev/video*"),
        Some(libc::ENODEV) => ("the camera is gone (unplugged?)".to_string(), ""),
        Some(libc::ENOSPC) => ("not enough USB bandwidth".to_string(), "try a smaller size, or format=MJPG"),
        _ if e.kind() == io::ErrorKind::TimedOut => {
            let seconds = PATIENCE.as_secs();
            (
                format!("for {seconds} seconds"),
                "another program may hold the camera, or it needs to be plugged in again",
            )
        }
        _ => (e.to_string(), ""),
    };
    let separator = if e.kind() == io::ErrorKind::TimedOut { " " } else { ": " };
    Error::Source { what: format!("{}: {what}{separator}{why}", path.display()), hint: hint.into() }
}

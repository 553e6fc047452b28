//! Frames that a program writes to its standard output: a CSI camera's own software, `ffmpeg`, a script.

use super::{Frame, FrameSource, Pixels, uri};
use crate::error::{Error, Result};
use crate::preprocess::{Matrix, PixelFormat, RawFrame, frame_length};
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

/// How long the program may give no frame; starting a camera takes seconds.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long the program may take to end when it is asked to.
const FAREWELL: Duration = Duration::from_secs(1);
/// Longest JPEG picture that is taken for one.
const LONGEST: usize = 64 << 20;

/// A running program.
pub struct Exec {
    options: uri::Exec,
    running: Option<Running>,
    /// How long the program may give no frame.
    patience: Duration,
}

struct Running {
    child: Child,
    frames: Receiver<Received>,
}

struct Received {
    bytes: Vec<u8>,
    at: Instant,
    capture: Duration,
    /// Bytes before it that belong to no picture.
    damaged: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        // What it started, too: a program that hangs would keep the camera from the next one. Politely first.
        self.signal(libc::SIGTERM);
        let asked = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) && asked.elapsed() < FAREWELL {
            std::thread::sleep(Duration::from_millis(10));
        }
        self.signal(libc::SIGKILL);
        let _ = self.child.wait();
    }
}

impl Running {
    /// Sends a signal to the program and all that it started; fails only when they have ended already.
    fn signal(&self, signal: libc::c_int) {
        if let Ok(group) = libc::pid_t::try_from(self.child.id()) {
            // SAFETY: no memory is touched. The group is the child's own, made by `process_group(0)`.
            let _ = unsafe { libc::kill(-group, signal) };
        }
    }
}

impl Exec {
    /// Starts the program.
    ///
    /// # Errors
    /// [`Error::Source`] when no shell can be started. That the command is wrong shows at the first frame.
    pub fn open(options: &uri::Exec) -> Result<Exec> {
        Ok(Exec { running: Some(start(options)?), options: options.clone(), patience: PATIENCE })
    }

    fn failed(&self, what: String) -> Error {
        let shown: String = self.options.command.chars().take(120).collect();
        let hint = match self.options.format {
            PixelFormat::Mjpg => "it must write JPEG pictures to its standard output; try the command by itself".into(),
            f => format!("it must write {} frames to its standard output; try the command by itself", f.fourcc()),
        };
        Error::Source { what: format!("`{shown}` {what}"), hint }
    }
}

fn start(options: &uri::Exec) -> Result<Running> {
    let mut command = Command::new("/bin/sh");
    command.arg("-c").arg(&options.command).stdin(Stdio::null()).stdout(Stdio::piped());
    command.process_group(0);
    let cannot = |e| Error::Source { what: format!("cannot start `{}`: {e}", options.command), hint: String::new() };
    let mut child = command.spawn().map_err(cannot)?;
    let output = child.stdout.take().expect("a pipe was asked for");
    let (sender, frames) = sync_channel(1);
    let running = Running { child, frames };
    let frame = options.format.frame_bytes(options.size.0 as usize, options.size.1 as usize);
    let read = move || if frame == 0 { read_jpeg(output, &sender) } else { read_raw(output, frame, &sender) };
    std::thread::Builder::new().name("exec".into()).spawn(read).map_err(cannot)?;
    Ok(running)
}

/// Sends frames of that many bytes until either side ends; a frame that is cut short is not sent.
fn read_raw(mut output: ChildStdout, length: usize, frames: &SyncSender<Received>) {
    loop {
        let mut bytes = vec![0; length];
        // the wait for a frame's first byte is not part of receiving it
        if output.read_exact(&mut bytes[..1]).is_err() {
            return;
        }
        let at = Instant::now();
        if output.read_exact(&mut bytes[1..]).is_err() {
            return;
        }
        if frames.send(Received { bytes, at, capture: at.elapsed(), damaged: false }).is_err() {
            return;
        }
    }
}

/// Sends JPEG pictures until either side ends.
fn read_jpeg(mut output: ChildStdout, frames: &SyncSender<Received>) {
    let mut splitter = Splitter::default();
    let mut chunk = vec![0; 1 << 16];
    let mut at = Instant::now();
    loop {
        match output.read(&mut chunk) {
            Ok(0) | Err(_) => return,
            Ok(n) => {
                if splitter.is_empty() {
                    at = Instant::now();
                }
                splitter.push(&chunk[..n]);
            }
        }
        while let Some((bytes, damaged)) = splitter.next() {
            if frames.send(Received { bytes, at, capture: at.elapsed(), damaged }).is_err() {
                return;
            }
            at = Instant::now();
        }
    }
}

/// Cuts a stream of bytes into JPEG pictures.
#[derive(Default)]
struct Splitter {
    bytes: Vec<u8>,
    damaged: bool,
}

impl Splitter {
    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole picture, and whether bytes that belong to none were passed over.
    fn next(&mut self) -> Option<(Vec<u8>, bool)> {
        // a byte of a marker may be the last one so far
        let begin = self.bytes.windows(2).position(|w| w == [0xFF, 0xD8]);
        let stray = begin.unwrap_or(self.bytes.len().saturating_sub(1));
        self.damaged |= stray > 0;
        self.bytes.drain(..stray);
        begin?;
        let Some(length) = frame_length(&self.bytes) else {
            if self.bytes.len() > LONGEST {
                self.bytes.clear();
                self.damaged = true;
            }
            return None;
        };
        let rest = self.bytes.split_off(length);
        Some((std::mem::replace(&mut self.bytes, rest), std::mem::take(&mut self.damaged)))
    }
}

impl FrameSource for Exec {
    fn next(&mut self) -> Result<Option<Frame>> {
        let Some(running) = &mut self.running else { return Ok(None) };
        let received = match running.frames.recv_timeout(self.patience) {
            Ok(received) => received,
            Err(RecvTimeoutError::Timeout) => {
                return Err(self.failed(format!("gave no frame for {} seconds", self.patience.as_secs())));
            }
            Err(RecvTimeoutError::Disconnected) => {
                let ended = match running.child.wait() {
                    Ok(status) => format!("ended ({status})"),
                    Err(e) => format!("ended ({e})"),
                };
                return Err(self.failed(ended));
            }
        };
        let size = (self.options.size.0 as usize, self.options.size.1 as usize);
        // what programs write by default: JPEG is full range by itself, raw video is limited
        let raw = RawFrame::new(self.options.format, size, 0, Matrix::default(), received.bytes);
        let frame = Frame::taken(Pixels::Raw(raw), received.at, received.capture);
        Ok(Some(Frame { skipped: u64::from(received.damaged), ..frame }))
    }

    fn reopen(&mut self) -> Result<()> {
        self.running = None;
        self.running = Some(start(&self.options)?);
        Ok(())
    }

    fn describe(&self) -> String {
        let uri::Exec { command, format, size } = &self.options;
        match format {
            PixelFormat::Mjpg => format!("JPEG pictures of `{command}`"),
            _ => format!("{} {}x{} of `{command}`", format.fourcc(), size.0, size.1),
        }
    }

    fn is_live(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const JPEG: &[u8] = include_bytes!("../../../tests/reference/pictures/standard_tables.jpg");

    fn exec(command: &str, format: PixelFormat, size: (u32, u32)) -> Exec {
        Exec::open(&uri::Exec { command: command.into(), format, size }).unwrap()
    }

    #[test]
    fn pictures_are_found_in_any_pieces() {
        let stream = [&[1, 2, 0xFF][..], JPEG, JPEG, b"junk", JPEG].concat();
        for piece in [1, 7, 1000, stream.len()] {
            let mut splitter = Splitter::default();
            let mut found = vec![];
            for bytes in stream.chunks(piece) {
                splitter.push(bytes);
                found.extend(std::iter::from_fn(|| splitter.next()));
            }
            assert!(found.iter().all(|(picture, _)| picture == JPEG), "pieces of {piece}");
            assert_eq!(found.iter().map(|f| f.1).collect::<Vec<_>>(), [true, false, true], "pieces of {piece}");
        }
    }

    #[test]
    fn raw_frames_and_the_end() {
        let mut source = exec("printf 'abcdefgh'; exit 3", PixelFormat::Grey, (3, 1));
        for want in [b"abc", b"def"] {
            let Pixels::Raw(raw) = source.next().unwrap().unwrap().pixels else { panic!("not raw") };
            assert_eq!(raw.bytes, want);
        }
        let e = source.next().err().unwrap();
        assert!(e.to_string().contains("exit status: 3") && e.hint().unwrap().contains("GREY"), "{e}");
        source.reopen().unwrap();
        assert!(source.next().is_ok());
    }

    #[test]
    fn a_program_that_hangs_is_lost_and_ends_with_all_that_it_started() {
        let dir = tempfile::tempdir().unwrap();
        let pids = dir.path().join("pids");
        // the shell waits for a program that writes nothing and does not care for SIGTERM, as a stuck driver's would
        let command =
            format!("printf abc; (trap '' TERM; echo $BASHPID $$ >{0}; sleep 300; sleep 300) ; :", pids.display());
        let mut source = exec(&command.replace("$BASHPID", "$(exec sh -c 'echo $PPID')"), PixelFormat::Grey, (3, 1));
        source.patience = Duration::from_millis(500);
        assert!(source.next().unwrap().is_some());
        let e = source.next().err().unwrap();
        assert!(e.to_string().contains("gave no frame"), "{e}");
        let text = std::fs::read_to_string(&pids).unwrap();
        let started: Vec<u32> = text.split_whitespace().map(|p| p.parse().unwrap()).collect();
        let runs = |pid: &u32| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            status.contains("State:") && !status.contains("State:\tZ")
        };
        assert!(started.len() == 2 && started.iter().all(runs), "{started:?}");
        source.running = None;
        // the kernel delivers at once, but not before it says so
        let asked = Instant::now();
        while started.iter().any(runs) {
            assert!(asked.elapsed() < Duration::from_secs(5), "{started:?} are left");
            std::thread::sleep(Duration::from_millis(20));
        }
        source.reopen().unwrap();
        assert!(source.next().unwrap().is_some(), "frames again");
    }

    #[test]
    fn a_command_that_is_none_is_told() {
        let e = exec("/no/such/program 2>/dev/null", PixelFormat::Mjpg, (0, 0)).next().err().unwrap();
        assert!(e.to_string().contains("/no/such/program") && e.to_string().contains("127"), "{e}");
    }
}

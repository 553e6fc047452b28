//! `feed OUTPUT CAPTURE FOURCC WIDTHxHEIGHT FRAME`: plays the raw frame in the file FRAME into vivid's output node until it
//! is killed; with vivid's loop on, capturing from CAPTURE at the same format and size gives exactly these bytes.
//! Prints `feeding` on stdout once frames flow.
//!
//! `feed write DEVICE FOURCC WIDTHxHEIGHT FRAME…`: writes the files, compressed pictures, in turn to a v4l2loopback device.
//!
//! `feed take SOURCE COUNT`: takes frames as `vedge-run` does, through the same code, and prints the SHA-256 of each one's bytes,
//! of all planes after each other.
//!
//! `feed set DEVICE CONTROL VALUE`: sets a control by its name, such as vivid's `Disconnect`.

use anyhow::{Context, Result, bail};
use memmap2::{MmapMut, MmapOptions};
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::os::raw::{c_int, c_void};
use std::time::Duration;
use v4l::control::{Control, Value};
use v4l::v4l_sys::{v4l2_buffer, v4l2_requestbuffers};
use v4l::v4l2::vidioc::{
    _IOC_TYPE as Request, VIDIOC_DQBUF, VIDIOC_QBUF, VIDIOC_QUERYBUF, VIDIOC_REQBUFS, VIDIOC_S_INPUT, VIDIOC_STREAMON,
};
use v4l::video::Output;
use v4l::{Device, FourCC};
use vedge_runtime::source::{self, Pixels};

/// `V4L2_BUF_TYPE_VIDEO_OUTPUT`, `V4L2_MEMORY_MMAP` and `V4L2_FIELD_NONE` of videodev2.h.
const VIDEO_OUTPUT: u32 = 2;
const MEMORY_MMAP: u32 = 1;
const FIELD_NONE: u32 = 1;
/// Of vivid's two capture inputs the one that its output loops back to (HDMI; 0 is a webcam with a test pattern).
const LOOPED_INPUT: c_int = 1;
/// vivid stops delivering with fewer buffers queued.
const BUFFERS: u32 = 4;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [word, device, control, value] = args.as_slice()
        && word == "set"
    {
        let opened = Device::with_path(device).with_context(|| format!("opening {device}"))?;
        if !set_control(&opened, control, Value::Integer(value.parse()?))? {
            bail!("{device} has no control {control}");
        }
        return Ok(());
    }
    if let [word, device, fourcc, size, frames @ ..] = args.as_slice()
        && word == "write"
        && !frames.is_empty()
    {
        return write(device, self::fourcc(fourcc)?, self::size(size)?, frames);
    }
    if let [word, uri, count] = args.as_slice()
        && word == "take"
    {
        return take(uri, count.parse()?);
    }
    let [output, capture, fourcc, size, frame] = args.as_slice() else {
        eprintln!("usage: feed OUTPUT CAPTURE FOURCC WIDTHxHEIGHT FRAME");
        std::process::exit(2);
    };
    let (fourcc, (width, height)) = (self::fourcc(fourcc)?, self::size(size)?);
    let frame = std::fs::read(frame).with_context(|| format!("reading {frame}"))?;

    let out = Device::with_path(output).with_context(|| format!("opening {output}"))?;
    let cap = Device::with_path(capture).with_context(|| format!("opening {capture}"))?;
    set_format(&out, fourcc, width, height, frame.len())?;
    let mut input = LOOPED_INPUT;
    ioctl(&cap, VIDIOC_S_INPUT, &mut input).with_context(|| format!("input {LOOPED_INPUT} of {capture}"))?;
    let looped =
        set_control(&out, "Loop Video", Value::Boolean(true))? | set_control(&cap, "Loop Video", Value::Boolean(true))?;
    if !looped {
        bail!("neither {output} nor {capture} has the control Loop Video: is it vivid?");
    }
    set_control(&cap, "OSD Text Mode", Value::Integer(2))?; // no text over the picture
    drop(cap);
    play(&out, &frame)
}

/// What the program that runs on boards gets from a source, byte for byte.
fn take(uri: &str, count: usize) -> Result<()> {
    let mut source = source::open(&uri.parse()?, (64, 64))?;
    for _ in 0..count {
        let frame = source.next()?.context("the source has ended")?;
        let Pixels::Raw(raw) = frame.pixels else { bail!("{}: no raw frames", source.describe()) };
        let digest: String = Sha256::digest(&raw.bytes).iter().map(|b| format!("{b:02x}")).collect();
        println!("@frame {digest} {}", raw.bytes.len());
    }
    Ok(())
}

/// A four-character code; shorter ones end with blanks (`Y10`).
fn fourcc(text: &str) -> Result<FourCC> {
    let padded = format!("{text:<4}");
    let bytes: [u8; 4] = padded.as_bytes().try_into().with_context(|| format!("{text} is not a fourcc"))?;
    Ok(FourCC::new(&bytes))
}

fn size(text: &str) -> Result<(u32, u32)> {
    let (width, height) = text.split_once('x').with_context(|| format!("{text} is not WIDTHxHEIGHT"))?;
    Ok((width.parse()?, height.parse()?))
}

/// Plays files into v4l2loopback, which hands each one as it is to whoever captures.
fn write(device: &str, fourcc: FourCC, (width, height): (u32, u32), frames: &[String]) -> Result<()> {
    let out = Device::with_path(device).with_context(|| format!("opening {device}"))?;
    let mut format = Output::format(&out)?;
    (format.width, format.height, format.fourcc) = (width, height, fourcc);
    (format.stride, format.size) = (0, 0);
    let got = Output::set_format(&out, &format)?;
    if (got.width, got.height, got.fourcc) != (width, height, fourcc) {
        bail!("{width}x{height} {fourcc}: {device} sets {}x{} {}", got.width, got.height, got.fourcc);
    }
    let frames: Vec<Vec<u8>> = frames.iter().map(std::fs::read).collect::<io::Result<_>>()?;
    println!("feeding");
    io::stdout().flush()?;
    // SAFETY: the descriptor is `out`'s, which lives to the end of the function; the copy is closed by `file`.
    let copy = unsafe { BorrowedFd::borrow_raw(out.handle().fd()) }.try_clone_to_owned()?;
    let mut file = File::from(copy);
    for frame in frames.iter().cycle() {
        // one call: an empty frame is one of no bytes, where write_all would do nothing
        let written = file.write(frame)?;
        if written != frame.len() {
            bail!("{device} takes {written} of {} bytes", frame.len());
        }
        std::thread::sleep(Duration::from_millis(33));
    }
    Ok(())
}

/// Asks for a format and insists on it.
fn set_format(out: &Device, fourcc: FourCC, width: u32, height: u32, bytes: usize) -> Result<()> {
    let mut format = Output::format(out)?;
    (format.width, format.height, format.fourcc) = (width, height, fourcc);
    (format.stride, format.size) = (0, 0); // else the driver keeps a larger old stride
    let got = Output::set_format(out, &format)?;
    if (got.width, got.height, got.fourcc, got.size as usize) != (width, height, fourcc, bytes) {
        bail!(
            "{width}x{height} {fourcc} with frames of {bytes} bytes: the driver offers {}x{} {} with {} bytes",
            got.width,
            got.height,
            got.fourcc,
            got.size
        );
    }
    Ok(())
}

/// Sets the control of this name; false when the device has none.
fn set_control(device: &Device, name: &str, value: Value) -> Result<bool> {
    let Some(control) = device.query_controls()?.into_iter().find(|c| c.name == name) else { return Ok(false) };
    device.set_control(Control { id: control.id, value }).with_context(|| format!("setting {name}"))?;
    Ok(true)
}

/// Streams the frame for ever with every buffer but one queued: the `v4l` crate's output stream queues one at a time, which
/// a non-blocking vivid answers with EAGAIN.
fn play(out: &Device, frame: &[u8]) -> Result<()> {
    // SAFETY: a plain C struct of integers, for which all bytes zero is a valid value.
    let mut request: v4l2_requestbuffers = unsafe { std::mem::zeroed() };
    (request.count, request.type_, request.memory) = (BUFFERS, VIDEO_OUTPUT, MEMORY_MMAP);
    ioctl(out, VIDIOC_REQBUFS, &mut request)?;
    let mut maps: Vec<MmapMut> = Vec::new();
    for index in 0..request.count {
        let mut buffer = v4l2_buffer { index, ..descriptor() };
        ioctl(out, VIDIOC_QUERYBUF, &mut buffer)?;
        // SAFETY: the driver filled the descriptor for memory mapping, so `offset` is the live member of the union; the
        // buffer is mapped once, and the driver only reads it.
        let mut map = unsafe {
            let offset = u64::from(buffer.m.offset);
            MmapOptions::new().offset(offset).len(buffer.length as usize).map_mut(out.handle().fd())?
        };
        map[..frame.len()].copy_from_slice(frame);
        maps.push(map);
        queue(out, index, frame.len())?;
    }
    let mut kind = VIDEO_OUTPUT as c_int;
    ioctl(out, VIDIOC_STREAMON, &mut kind)?;
    println!("feeding");
    io::stdout().flush()?;
    loop {
        let mut buffer = descriptor();
        match ioctl(out, VIDIOC_DQBUF, &mut buffer) {
            Ok(()) => queue(out, buffer.index, frame.len())?,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(2)),
            Err(e) => return Err(e.into()),
        }
    }
}

fn queue(out: &Device, index: u32, bytes: usize) -> io::Result<()> {
    ioctl(out, VIDIOC_QBUF, &mut v4l2_buffer { index, bytesused: bytes as u32, field: FIELD_NONE, ..descriptor() })
}

fn descriptor() -> v4l2_buffer {
    // SAFETY: a plain C struct of integers and a union of integers and pointers, for which all bytes zero is a valid value.
    v4l2_buffer { type_: VIDEO_OUTPUT, memory: MEMORY_MMAP, ..unsafe { std::mem::zeroed() } }
}

fn ioctl<T>(device: &Device, request: Request, argument: &mut T) -> io::Result<()> {
    // SAFETY: every caller passes the structure that belongs to the request; the kernel reads and writes inside it.
    unsafe { v4l::v4l2::ioctl(device.handle().fd(), request, (argument as *mut T).cast::<c_void>()) }
}

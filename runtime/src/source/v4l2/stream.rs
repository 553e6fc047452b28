//! Streaming from mapped buffers: waits with a deadline, skips to the newest buffer, never panics.

use super::device::{CAPTURE, Device, Plain};
use std::io;
use std::time::{Duration, Instant};
use v4l::v4l_sys::*;
use v4l::v4l2::vidioc;

/// Buffers asked for: one being filled, one ready, two to spare.
const BUFFERS: u32 = 4;

/// A running stream. It owns the device; dropping it stops the stream and unmaps the buffers.
pub struct Stream {
    device: Device,
    buffers: Vec<Mapping>,
}

/// A buffer of the driver, mapped.
struct Mapping {
    start: *mut u8,
    length: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread, and is reachable through its one `Stream` only.
unsafe impl Send for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `Stream::start` with this start and length, unmapped here only. An error leaves the
        // mapping in place, which is harmless.
        let _ = unsafe { v4l::v4l2::munmap(self.start.cast(), self.length) };
    }
}

/// A frame copied out of its buffer.
pub struct Captured {
    pub bytes: Vec<u8>,
    /// The driver's frame counter.
    pub sequence: u32,
    /// Older buffers that were ready and passed over.
    pub stale: u64,
    /// The driver marked the frame as damaged, or it is empty.
    pub damaged: bool,
}

impl Stream {
    /// Maps the buffers and starts.
    pub fn start(device: Device) -> io::Result<Stream> {
        let memory = v4l2_memory_V4L2_MEMORY_MMAP;
        let mut request =
            v4l2_requestbuffers { count: BUFFERS, type_: CAPTURE, memory, ..v4l2_requestbuffers::zeroed() };
        device.call(vidioc::VIDIOC_REQBUFS, &mut request)?;
        if request.count < 2 {
            return Err(io::Error::other(format!("the driver gives {} buffers, 2 are needed", request.count)));
        }
        let mut stream = Stream { device, buffers: vec![] };
        for index in 0..request.count {
            let mut buffer = buffer(index);
            stream.device.call(vidioc::VIDIOC_QUERYBUF, &mut buffer)?;
            let length = buffer.length as usize;
            // SAFETY: for mapped memory QUERYBUF writes the offset variant.
            let offset = unsafe { buffer.m.offset };
            // SAFETY: a new shared mapping at an address of the kernel's choice, of the length and offset that the
            // driver gave for this buffer.
            let start = unsafe {
                let protection = libc::PROT_READ | libc::PROT_WRITE;
                let fd = stream.device.device.handle().fd();
                v4l::v4l2::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, fd, offset as libc::off_t)
            }?;
            if start == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            stream.buffers.push(Mapping { start: start.cast(), length });
            stream.queue(index)?;
        }
        stream.device.call(vidioc::VIDIOC_STREAMON, &mut (CAPTURE as std::os::raw::c_int))?;
        Ok(stream)
    }

    /// The newest frame; waits up to `patience` for one.
    pub fn next(&mut self, patience: Duration) -> io::Result<Captured> {
        self.wait(patience)?;
        let (mut newest, mut stale) = (self.dequeue()?, 0);
        while self.ready(Duration::ZERO)? {
            let newer = self.dequeue()?;
            self.queue(newest.index)?;
            newest = newer;
            stale += 1;
        }
        let mapping = self.buffers.get(newest.index as usize).ok_or_else(|| io::Error::other("unknown buffer"))?;
        let used = (newest.bytesused as usize).min(mapping.length);
        // SAFETY: the buffer is mapped for `length` bytes, at least `used`, and between DQBUF and QBUF the driver does
        // not write to it.
        let bytes = unsafe { std::slice::from_raw_parts(mapping.start, used) }.to_vec();
        let damaged = newest.flags & V4L2_BUF_FLAG_ERROR != 0 || used == 0;
        self.queue(newest.index)?;
        Ok(Captured { bytes, sequence: newest.sequence, stale, damaged })
    }

    fn queue(&self, index: u32) -> io::Result<()> {
        self.device.call(vidioc::VIDIOC_QBUF, &mut buffer(index))
    }

    fn dequeue(&self) -> io::Result<v4l2_buffer> {
        let mut buffer = buffer(0);
        self.device.call(vidioc::VIDIOC_DQBUF, &mut buffer)?;
        Ok(buffer)
    }

    fn wait(&self, patience: Duration) -> io::Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if self.ready(left)? {
                return Ok(());
            }
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
    }

    /// Whether a frame is ready within that time; a signal ends the wait early.
    fn ready(&self, wait: Duration) -> io::Result<bool> {
        let milliseconds = i32::try_from(wait.as_millis()).unwrap_or(i32::MAX);
        match self.device.device.handle().poll(libc::POLLIN, milliseconds) {
            Ok(n) => Ok(n > 0),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => Ok(false),
            Err(e) => Err(e),
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // fails when the camera was unplugged, and then there is nothing to stop
        let _ = self.device.call(vidioc::VIDIOC_STREAMOFF, &mut (CAPTURE as std::os::raw::c_int));
    }
}

fn buffer(index: u32) -> v4l2_buffer {
    v4l2_buffer { index, type_: CAPTURE, memory: v4l2_memory_V4L2_MEMORY_MMAP, ..v4l2_buffer::zeroed() }
}

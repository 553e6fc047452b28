//! Streaming from mapped buffers: waits with a deadline, skips to the newest buffer, never panics.

use super::device::{Device, PLANES, Plain};
use std::io;
use std::time::{Duration, Instant};
use v4l::v4l_sys::*;
use v4l::v4l2::vidioc;

/// Buffers asked for: one being filled, one ready, two to spare.
const BUFFERS: u32 = 4;

/// A running stream. It owns the device; dropping it stops the stream and unmaps the buffers.
pub struct Stream {
    device: Device,
    /// For each buffer its planes; one, where the interface has no planes.
    buffers: Vec<Vec<Mapping>>,
}

/// A plane of a buffer of the driver, mapped.
struct Mapping {
    start: *mut u8,
    length: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread, and is reachable through its one `Stream` only.
unsafe impl Send for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `Mapping::new` with this start and length, unmapped here only. An error leaves the mapping in
        // place, which is harmless.
        let _ = unsafe { v4l::v4l2::munmap(self.start.cast(), self.length) };
    }
}

impl Mapping {
    fn new(device: &Device, length: usize, offset: u32) -> io::Result<Mapping> {
        // SAFETY: a new shared mapping at an address of the kernel's choice, of the length and offset that the driver gave
        // for this buffer.
        let start = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let fd = device.device.handle().fd();
            v4l::v4l2::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, fd, offset as libc::off_t)
        }?;
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapping { start: start.cast(), length })
    }
}

/// A frame copied out of its buffer.
pub struct Captured {
    /// What the driver filled, plane after plane.
    pub bytes: Vec<u8>,
    /// First byte of each of the buffer's planes.
    pub starts: Vec<usize>,
    /// The driver's frame counter.
    pub sequence: u32,
    /// When the driver took it; now, where it does not tell by the monotonic clock.
    pub at: Instant,
    /// Older buffers that were ready and passed over.
    pub stale: u64,
    /// The driver marked the frame as damaged, or it is empty.
    pub damaged: bool,
}

/// A buffer's description with room for those of its planes.
struct Described {
    buffer: v4l2_buffer,
    planes: [v4l2_plane; PLANES],
}

impl Described {
    fn new(device: &Device, index: u32) -> Described {
        let memory = v4l2_memory_V4L2_MEMORY_MMAP;
        let buffer = v4l2_buffer { index, type_: device.kind, memory, ..v4l2_buffer::zeroed() };
        Described { buffer, planes: std::array::from_fn(|_| v4l2_plane::zeroed()) }
    }

    fn call(&mut self, device: &Device, request: vidioc::_IOC_TYPE) -> io::Result<()> {
        if device.has_planes() {
            // set at each call: the structure may have moved
            self.buffer.m.planes = self.planes.as_mut_ptr();
            self.buffer.length = PLANES as u32;
        }
        device.call(request, &mut self.buffer)
    }

    /// For each plane its length, offset for mapping, and the part of it that is filled.
    fn planes(&self, device: &Device) -> Vec<(usize, u32, std::ops::Range<usize>)> {
        if !device.has_planes() {
            // SAFETY: for mapped memory and one plane the driver writes the offset variant.
            let offset = unsafe { self.buffer.m.offset };
            return vec![(self.buffer.length as usize, offset, 0..self.buffer.bytesused as usize)];
        }
        let plane = |p: &v4l2_plane| {
            // SAFETY: for mapped memory the driver writes the offset variant.
            let offset = unsafe { p.m.mem_offset };
            (p.length as usize, offset, p.data_offset as usize..p.bytesused as usize)
        };
        self.planes.iter().take(self.buffer.length as usize).map(plane).collect()
    }
}

impl Stream {
    /// Maps the buffers and starts.
    pub fn start(device: Device) -> io::Result<Stream> {
        let memory = v4l2_memory_V4L2_MEMORY_MMAP;
        let type_ = device.kind;
        let mut request = v4l2_requestbuffers { count: BUFFERS, type_, memory, ..v4l2_requestbuffers::zeroed() };
        device.call(vidioc::VIDIOC_REQBUFS, &mut request)?;
        if request.count < 2 {
            return Err(io::Error::other(format!("the driver gives {} buffers, 2 are needed", request.count)));
        }
        let mut stream = Stream { device, buffers: vec![] };
        for index in 0..request.count {
            let mut described = Described::new(&stream.device, index);
            described.call(&stream.device, vidioc::VIDIOC_QUERYBUF)?;
            let planes = described.planes(&stream.device);
            let map = |(length, offset, _)| Mapping::new(&stream.device, length, offset);
            let planes = planes.into_iter().map(map).collect::<io::Result<_>>()?;
            stream.buffers.push(planes);
            stream.queue(index)?;
        }
        let mut kind = type_ as std::os::raw::c_int;
        stream.device.call(vidioc::VIDIOC_STREAMON, &mut kind)?;
        Ok(stream)
    }

    /// The newest frame; waits up to `patience` for one.
    pub fn next(&mut self, patience: Duration) -> io::Result<Captured> {
        self.wait(patience)?;
        let (mut newest, mut stale) = (self.dequeue()?, 0);
        while self.ready(Duration::ZERO)? {
            let newer = self.dequeue()?;
            self.queue(newest.buffer.index)?;
            newest = newer;
            stale += 1;
        }
        let index = newest.buffer.index;
        let mappings = self.buffers.get(index as usize).ok_or_else(|| io::Error::other("unknown buffer"))?;
        let (mut bytes, mut starts, mut empty) = (vec![], vec![], false);
        for (mapping, (_, _, filled)) in mappings.iter().zip(newest.planes(&self.device)) {
            let end = filled.end.min(mapping.length);
            let start = filled.start.min(end);
            empty |= start == end;
            starts.push(bytes.len());
            // SAFETY: the plane is mapped for `length` bytes, at least `end`, and between DQBUF and QBUF the driver does not
            // write to it.
            bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(mapping.start.add(start), end - start) });
        }
        let damaged = newest.buffer.flags & V4L2_BUF_FLAG_ERROR != 0 || empty;
        self.queue(index)?;
        Ok(Captured { bytes, starts, sequence: newest.buffer.sequence, at: taken_at(&newest.buffer), stale, damaged })
    }

    fn queue(&self, index: u32) -> io::Result<()> {
        Described::new(&self.device, index).call(&self.device, vidioc::VIDIOC_QBUF)
    }

    fn dequeue(&self) -> io::Result<Described> {
        let mut described = Described::new(&self.device, 0);
        described.call(&self.device, vidioc::VIDIOC_DQBUF)?;
        Ok(described)
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
        let _ = self.device.call(vidioc::VIDIOC_STREAMOFF, &mut (self.device.kind as std::os::raw::c_int));
    }
}

/// The buffer's timestamp as an instant, where it is one of the monotonic clock and not absurd.
fn taken_at(buffer: &v4l2_buffer) -> Instant {
    let now = Instant::now();
    if buffer.flags & V4L2_BUF_FLAG_TIMESTAMP_MASK != V4L2_BUF_FLAG_TIMESTAMP_MONOTONIC {
        return now;
    }
    let mut clock = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec.
    if unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut clock) } != 0 {
        return now;
    }
    let of = |seconds: i64, micros: i64| {
        Duration::from_secs(seconds.max(0) as u64) + Duration::from_micros(micros.max(0) as u64)
    };
    #[allow(clippy::unnecessary_cast, reason = "these types differ between targets")]
    let age = of(clock.tv_sec as i64, clock.tv_nsec as i64 / 1000)
        .saturating_sub(of(buffer.timestamp.tv_sec as i64, buffer.timestamp.tv_usec as i64));
    if age > Duration::from_secs(10) { now } else { now.checked_sub(age).unwrap_or(now) }
}

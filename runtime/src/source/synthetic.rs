//! A moving test pattern: no camera needed.

use super::{Frame, FrameSource, PATIENCE, Pixels, uri};
use crate::error::Result;
use crate::preprocess::Picture;
use std::time::{Duration, Instant};

/// Frame `n` depends on `n` alone. Like a camera it does not wait: frame times that nobody took are skipped.
pub struct Synthetic {
    width: usize,
    height: usize,
    fps: f64,
    pace: Pace,
    frame: u64,
}

/// Gives frames their time: as a camera it does not wait for its reader.
pub(super) struct Pace {
    fps: f64,
    start: Option<Instant>,
    /// Number of the next frame.
    next: u64,
}

impl Pace {
    pub fn new(fps: f64) -> Pace {
        Pace { fps, start: None, next: 0 }
    }

    /// From frame to frame.
    pub fn period(&self) -> Duration {
        Duration::from_secs_f64(1.0 / self.fps)
    }

    /// Waits for the next frame's time; how many frames' times have passed that nobody waited for.
    pub fn wait(&mut self) -> u64 {
        let start = *self.start.get_or_insert_with(Instant::now);
        let at = start + Duration::from_secs_f64(self.next as f64 / self.fps);
        std::thread::sleep(at.saturating_duration_since(Instant::now()));
        let due = (start.elapsed().as_secs_f64() * self.fps) as u64;
        let skipped = due.saturating_sub(self.next);
        self.next = due.max(self.next) + 1;
        skipped
    }
}

impl Synthetic {
    /// A pattern of that size and rate.
    pub fn new(options: &uri::Synthetic) -> Synthetic {
        let (width, height) = (options.size.0 as usize, options.size.1 as usize);
        Synthetic { width, height, fps: options.fps, pace: Pace::new(options.fps), frame: 0 }
    }

    /// Colour gradients that drift, with a bright square that moves across them.
    fn picture(&self, n: u64) -> Picture {
        let (width, height) = (self.width, self.height);
        let side = (width.min(height) / 4).max(1);
        let shift = (n * 3) as usize;
        let (left, top) = (shift % width, (shift / 2) % height);
        let mut rgb = Vec::with_capacity(width * height * 3);
        for y in 0..height {
            for x in 0..width {
                let inside = (left..left + side).contains(&x) && (top..top + side).contains(&y);
                let gradient =
                    [(x + shift) * 255 / width, (y + shift) * 255 / height, (x + y) * 255 / (width + height)];
                rgb.extend(if inside { [250, 240, 40] } else { gradient.map(|v| (v % 256) as u8) });
            }
        }
        Picture { width, height, rgb }
    }
}

impl FrameSource for Synthetic {
    fn next(&mut self) -> Result<Option<Frame>> {
        let skipped = self.pace.wait();
        let n = self.frame + skipped;
        self.frame = n + 1;
        let begin = Instant::now();
        let pixels = Pixels::Picture(self.picture(n));
        Ok(Some(Frame { skipped, ..Frame::taken(pixels, begin, begin.elapsed()) }))
    }

    fn describe(&self) -> String {
        format!("test pattern {}x{} at {} frames a second", self.width, self.height, self.fps)
    }

    fn patience(&self) -> Duration {
        PATIENCE + self.pace.period()
    }

    fn is_live(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_move_and_are_paced() {
        let mut source = Synthetic::new(&uri::Synthetic { size: (16, 12), fps: 50.0 });
        let start = Instant::now();
        let mut pictures = vec![];
        for _ in 0..4 {
            let Pixels::Picture(picture) = source.next().unwrap().unwrap().pixels else { panic!("no picture") };
            pictures.push(picture);
        }
        assert!(start.elapsed() >= Duration::from_millis(60), "{:?}", start.elapsed());
        assert!(pictures.windows(2).all(|p| p[0] != p[1]));
        assert!(pictures.iter().all(|p| p.rgb.len() == 16 * 12 * 3));
    }
}

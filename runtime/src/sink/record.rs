//! Keeps frames that match a rule, as JPEG files with their answers beside them, in a bounded part of the disk.

use super::{Answer, ResultSink, json};
use crate::error::{Error, Result};
use crate::files::write_atomic;
use crate::pipeline::Totals;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, UNIX_EPOCH};

/// Shortest time between two frames of a rule that many frames match.
const EVERY: Duration = Duration::from_secs(1);
/// What the names of its own files begin with.
const PREFIX: &str = "vedge-";

/// Which frames are kept.
#[derive(Clone, Debug, PartialEq)]
pub enum When {
    /// Those that a class came or went with.
    Change,
    /// Those whose best class is less likely than this.
    Unsure(f32),
    /// Those whose best class is this one.
    Label(String),
}

impl std::str::FromStr for When {
    type Err = String;

    fn from_str(text: &str) -> Result<When, String> {
        if text == "change" {
            return Ok(When::Change);
        }
        if let Some(label) = text.strip_prefix("label=").filter(|l| !l.is_empty()) {
            return Ok(When::Label(label.into()));
        }
        let share = text.strip_prefix("p<").and_then(|p| p.parse().ok()).filter(|p| (0.0..=1.0).contains(p));
        share
            .map(When::Unsure)
            .ok_or_else(|| format!("`{text}` is none of change, p<SHARE (such as p<0.6), label=LABEL"))
    }
}

impl When {
    fn matches(&self, answer: &Answer) -> bool {
        let best = answer.top.first();
        match self {
            When::Change => !answer.events.is_empty(),
            When::Unsure(share) => best.is_some_and(|c| c.p < *share),
            When::Label(label) => best.is_some_and(|c| c.label == *label),
        }
    }
}

/// Writes frames into a folder. What cannot be written, on a disk that is full for instance, is counted and told once; the
/// stream goes on, and so do recordings when there is room again.
pub struct Record {
    dir: PathBuf,
    when: When,
    most_bytes: u64,
    /// Own files there, oldest first, with their sizes.
    files: Vec<(PathBuf, u64)>,
    last: Option<Instant>,
    totals: Arc<Totals>,
    tell: Box<dyn Fn(&str) + Send>,
    /// The last frame could not be written.
    failing: bool,
}

impl Record {
    /// Goes on in a folder, which may hold recordings already; they count. `tell` gets messages for people.
    ///
    /// # Errors
    /// [`Error::Write`] when the folder cannot be made or read.
    pub fn new(
        dir: &Path,
        when: When,
        most_bytes: u64,
        totals: Arc<Totals>,
        tell: Box<dyn Fn(&str) + Send>,
    ) -> Result<Record> {
        let failed = |source| Error::Write { path: dir.into(), source };
        std::fs::create_dir_all(dir).map_err(failed)?;
        let mut files = vec![];
        for entry in std::fs::read_dir(dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_name().to_string_lossy().starts_with(PREFIX) {
                files.push((entry.path(), entry.metadata().map_err(failed)?.len()));
            }
        }
        files.sort(); // names begin with the time
        Ok(Record { dir: dir.into(), when, most_bytes, files, last: None, totals, tell, failing: false })
    }

    /// Writes a frame and its answer, both or neither. The oldest make room for it where the bound wants that, once: what
    /// then cannot be written costs no more of them.
    fn keep(&mut self, answer: &Answer, jpeg: &[u8]) -> Result<()> {
        let line = json(answer) + "\n";
        let size = jpeg.len() as u64 + line.len() as u64;
        let mut bytes: u64 = self.files.iter().map(|f| f.1).sum();
        while bytes + size > self.most_bytes && !self.files.is_empty() {
            let (oldest, freed) = self.files.remove(0);
            match std::fs::remove_file(&oldest) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    self.files.insert(0, (oldest.clone(), freed));
                    return Err(Error::Write { path: oldest, source: e });
                }
                _ => bytes -= freed,
            }
        }
        if size > self.most_bytes {
            return Ok(());
        }
        let time = answer.time.duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let path = |extension| self.dir.join(format!("{PREFIX}{time:013}-{}.{extension}", answer.seq));
        let (picture, text) = (path("jpg"), path("json"));
        write_atomic(&picture, jpeg)?;
        if let Err(e) = write_atomic(&text, line.as_bytes()) {
            let _ = std::fs::remove_file(&picture);
            return Err(e);
        }
        self.files.extend([(picture, jpeg.len() as u64), (text, line.len() as u64)]);
        Ok(())
    }
}

impl ResultSink for Record {
    fn put(&mut self, answer: &Answer) -> io::Result<()> {
        let soon = self.when != When::Change && self.last.is_some_and(|last| last.elapsed() < EVERY);
        if soon || !self.when.matches(answer) {
            return Ok(());
        }
        self.last = Some(Instant::now());
        let Some(frame) = &answer.frame else { return Ok(()) };
        match frame.jpeg().and_then(|jpeg| self.keep(answer, &jpeg)) {
            Ok(()) if std::mem::take(&mut self.failing) => (self.tell)("frames are kept again"),
            Ok(()) => {}
            Err(e) => {
                self.totals.unkept.fetch_add(1, Relaxed);
                if !std::mem::replace(&mut self.failing, true) {
                    (self.tell)(&format!("a frame is not kept: {e}; trying with the next"));
                }
            }
        }
        Ok(())
    }

    fn capacity(&self) -> usize {
        4
    }

    fn wants_frames(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decide::{Change, Event};
    use crate::preprocess::Picture;
    use crate::sink::tests::answer;
    use crate::source::{Frame, Pixels};
    use std::sync::Arc;

    fn frame(seq: u64, event: bool) -> Answer {
        let rgb = (0..32 * 32 * 3).map(|i| (i * 37 % 251) as u8).collect();
        let picture = Pixels::Picture(Picture { width: 32, height: 32, rgb });
        let event = event.then(|| Event::new(Change::Left, "x", 0.1));
        let frame = Some(Arc::new(Frame::taken(picture, Instant::now(), Duration::ZERO)));
        Answer {
            seq,
            time: UNIX_EPOCH + Duration::from_secs(seq),
            events: event.into_iter().collect(),
            frame,
            ..answer()
        }
    }

    fn files(dir: &Path) -> Vec<String> {
        let name = |e: io::Result<std::fs::DirEntry>| e.unwrap().file_name().to_string_lossy().into_owned();
        let mut names: Vec<String> = std::fs::read_dir(dir).unwrap().map(name).collect();
        names.sort();
        names
    }

    /// A recorder, and what it tells.
    fn recorder(dir: &Path, most: u64, totals: &Arc<Totals>) -> (Record, std::sync::mpsc::Receiver<String>) {
        let (send, told) = std::sync::mpsc::channel();
        let tell = Box::new(move |text: &str| send.send(text.into()).unwrap());
        (Record::new(dir, When::Change, most, Arc::clone(totals), tell).unwrap(), told)
    }

    #[test]
    fn what_cannot_be_written_is_counted_and_told_once_and_costs_nothing_that_is_there() {
        let (dir, totals) = (tempfile::tempdir().unwrap(), Arc::<Totals>::default());
        let (mut record, told) = recorder(dir.path(), 1 << 20, &totals);
        record.put(&frame(1, true)).unwrap();
        let before = files(dir.path());
        // where their answers would be written is a folder: the pictures are taken away again
        for seq in [2, 3] {
            std::fs::create_dir(dir.path().join(format!("vedge-000000000{seq}000-{seq}.json"))).unwrap();
            record.put(&frame(seq, true)).unwrap();
        }
        for seq in [2, 3] {
            std::fs::remove_dir(dir.path().join(format!("vedge-000000000{seq}000-{seq}.json"))).unwrap();
        }
        assert_eq!((files(dir.path()), totals.unkept.load(Relaxed)), (before, 2));
        record.put(&frame(4, true)).unwrap();
        assert_eq!(files(dir.path()).len(), 4);
        let told: Vec<String> = told.try_iter().collect();
        assert!(told.len() == 2 && told[0].contains("-2.json") && told[1].contains("again"), "{told:?}");
    }

    #[test]
    fn matching_frames_within_bounds() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("other.jpg"), vec![0; 5000]).unwrap();
        let (mut record, _) = recorder(dir.path(), 8000, &Arc::default());
        for seq in 0..20 {
            record.put(&frame(seq, seq % 2 == 1)).unwrap();
        }
        // the same folder again: what is there counts, the oldest go first
        let (mut record, _) = recorder(dir.path(), 8000, &Arc::default());
        record.put(&frame(21, true)).unwrap();
        let names = files(dir.path());
        let size: u64 = names.iter().skip(1).map(|n| dir.path().join(n).metadata().unwrap().len()).sum();
        assert!(
            names.contains(&"other.jpg".into()) && names.contains(&"vedge-0000000021000-21.jpg".into()),
            "{names:?}"
        );
        assert!(size <= 8000 && names.len() > 3, "{size} bytes: {names:?}");
        let jpeg = std::fs::read(dir.path().join("vedge-0000000021000-21.jpg")).unwrap();
        assert_eq!(crate::preprocess::decode_bytes(&jpeg).unwrap().width, 32);
    }

    #[test]
    fn rules() {
        assert_eq!("p<0.6".parse(), Ok(When::Unsure(0.6)));
        assert!(When::Unsure(0.6).matches(&answer()) && !When::Unsure(0.4).matches(&answer()));
        assert!("label=a \"b\"".parse::<When>().unwrap().matches(&answer()));
        for bad in ["", "p<2", "p>1", "label="] {
            assert!(bad.parse::<When>().unwrap_err().contains("change"), "{bad}");
        }
    }
}

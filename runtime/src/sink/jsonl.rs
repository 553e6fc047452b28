//! One JSON line an answer.

use super::{Answer, ResultSink};
use crate::classify::Class;
use crate::decide::Event;
use serde::Serialize;
use std::io::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Version of the line's fields: it grows when one changes its meaning or goes; new ones may come at any time.
const VERSION: u32 = 1;

/// Which lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lines {
    /// One a frame.
    #[default]
    Frames,
    /// One for each class that comes or goes.
    Events,
    /// Both; events follow the frame that brought them.
    Both,
}

/// Writes JSON lines, each flushed.
pub struct JsonLines<W: Write + Send> {
    /// Where to.
    pub out: W,
    /// Which.
    pub lines: Lines,
}

#[derive(Serialize)]
struct Line<'a> {
    v: u32,
    seq: u64,
    t: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<&'a str>,
    ms: Times,
    top: &'a [Class],
    #[serde(skip_serializing_if = "Option::is_none")]
    energy: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    distance: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unknown: Option<bool>,
    state: Option<&'a str>,
    dropped: u64,
}

#[derive(Serialize)]
struct Times {
    capture: f64,
    preprocess: f64,
    infer: f64,
    total: f64,
    latency: f64,
}

#[derive(Serialize)]
struct EventLine<'a> {
    v: u32,
    t: String,
    seq: u64,
    #[serde(flatten)]
    event: &'a Event,
}

/// An answer as one line of JSON, without its events.
pub fn json(a: &Answer) -> String {
    let ms = |d: Duration| d.as_micros() as f64 / 1e3;
    let (capture, preprocess, infer) = (ms(a.capture), ms(a.preprocess), ms(a.infer));
    let times = Times { capture, preprocess, infer, total: ms(a.total), latency: ms(a.latency) };
    let (source, state) = (a.source.as_deref(), a.state.as_deref());
    let t = rfc3339(a.time);
    let (seq, top, unknown, dropped) = (a.seq, a.top.as_slice(), a.unknown, a.dropped);
    let (energy, distance) = (a.energy, a.distance);
    let line = Line { v: VERSION, seq, t, source, ms: times, top, energy, distance, unknown, state, dropped };
    serde_json::to_string(&line).expect("plain data")
}

/// The events of an answer, a line of JSON each.
pub fn event_lines(a: &Answer) -> impl Iterator<Item = String> {
    let line =
        |event: &Event| serde_json::to_string(&EventLine { v: VERSION, t: rfc3339(event.time), seq: event.seq, event });
    a.events.iter().map(move |event| line(event).expect("plain data"))
}

impl<W: Write + Send> ResultSink for JsonLines<W> {
    fn put(&mut self, a: &Answer) -> std::io::Result<()> {
        let mut text = String::new();
        if self.lines != Lines::Events {
            text += &(json(a) + "\n");
        }
        if self.lines != Lines::Frames {
            text.extend(event_lines(a).map(|line| line + "\n"));
        }
        // one write: a reader never sees half a line
        self.out.write_all(text.as_bytes())?;
        self.out.flush()
    }
}

/// UTC to the millisecond, `2026-01-31T23:59:59.123Z`.
pub fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (seconds, milliseconds) = (since.as_secs(), since.subsec_millis());
    let (year, month, day) = civil(seconds / 86_400);
    let (h, m, s) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{milliseconds:03}Z")
}

/// Year, month and day of a day since 1970-01-01, by counting years from March so that the leap day comes last.
fn civil(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468; // days since 0000-03-01
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decide::Change;
    use crate::sink::tests::answer;

    #[test]
    fn dates() {
        let at = |s: u64| rfc3339(UNIX_EPOCH + Duration::from_millis(s * 1000 + 7));
        assert_eq!(at(0), "1970-01-01T00:00:00.007Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00.007Z");
        assert_eq!(at(951_868_799), "2000-02-29T23:59:59.007Z");
        assert_eq!(at(1_767_225_599), "2025-12-31T23:59:59.007Z");
        assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00.007Z");
    }

    fn written(answer: &Answer, lines: Lines) -> String {
        let mut out = vec![];
        JsonLines { out: &mut out, lines }.put(answer).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn the_line() {
        let mut answer = answer();
        let want = concat!(
            r#"{"v":1,"seq":17,"t":"1970-01-01T00:00:00.000Z","#,
            r#""ms":{"capture":1.5,"preprocess":3.0,"infer":6.0,"total":12.0,"latency":15.0},"#,
            r#""top":[{"label":"a \"b\"","index":3,"p":0.5}],"energy":-2.5,"distance":1.25,"state":null,"dropped":2}"#,
            "\n"
        );
        assert_eq!(written(&answer, Lines::Frames), want);
        answer.source = Some("x.png".into());
        answer.state = Some("cat".into());
        let line = written(&answer, Lines::Frames);
        assert!(line.contains(r#""source":"x.png""#) && line.contains(r#""state":"cat""#), "{line}");
    }

    #[test]
    fn lines_of_events() {
        let event = Event { seq: 15, ..Event::new(Change::Entered, "cat", 0.75) };
        let answer = Answer { events: vec![event], ..answer() };
        let want = concat!(
            r#"{"v":1,"t":"1970-01-01T00:00:00.000Z","seq":15,"event":"entered","label":"cat","p":0.75}"#,
            "\n"
        );
        assert_eq!(written(&answer, Lines::Events), want);
        let both = written(&answer, Lines::Both);
        assert!(both.starts_with(r#"{"v":1,"seq":17"#) && both.ends_with(want), "{both}");
    }
}

//! One JSON line an answer.

use super::{Answer, ResultSink};
use crate::classify::Class;
use serde::Serialize;
use std::io::Write;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Version of the line's fields: it grows when one changes its meaning or goes; new ones may come at any time.
const VERSION: u32 = 1;

/// Writes JSON lines, each flushed.
pub struct JsonLines<W: Write>(pub W);

#[derive(Serialize)]
struct Line<'a> {
    v: u32,
    seq: u64,
    t: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<&'a str>,
    ms: Times,
    top: &'a [Class],
    dropped: u64,
}

#[derive(Serialize)]
struct Times {
    capture: f64,
    preprocess: f64,
    infer: f64,
    total: f64,
}

impl<W: Write> ResultSink for JsonLines<W> {
    fn put(&mut self, a: &Answer) -> std::io::Result<()> {
        let ms = |d: Duration| d.as_micros() as f64 / 1e3;
        let ms = Times { capture: ms(a.capture), preprocess: ms(a.preprocess), infer: ms(a.infer), total: ms(a.total) };
        let source = a.source.as_deref();
        let line = Line { v: VERSION, seq: a.seq, t: rfc3339(a.time), source, ms, top: &a.top, dropped: a.dropped };
        let mut bytes = serde_json::to_vec(&line)?;
        bytes.push(b'\n');
        // one write: a reader never sees half a line
        self.0.write_all(&bytes)?;
        self.0.flush()
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

    #[test]
    fn dates() {
        let at = |s: u64| rfc3339(UNIX_EPOCH + Duration::from_millis(s * 1000 + 7));
        assert_eq!(at(0), "1970-01-01T00:00:00.007Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00.007Z");
        assert_eq!(at(951_868_799), "2000-02-29T23:59:59.007Z");
        assert_eq!(at(1_767_225_599), "2025-12-31T23:59:59.007Z");
        assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00.007Z");
    }

    #[test]
    fn the_line() {
        let ms = Duration::from_micros(1500);
        let mut answer = Answer {
            seq: 17,
            time: UNIX_EPOCH,
            source: None,
            capture: ms,
            preprocess: ms * 2,
            infer: ms * 4,
            total: ms * 8,
            top: vec![Class { label: "a \"b\"".into(), index: 3, p: 0.5 }],
            dropped: 2,
        };
        let mut out = vec![];
        JsonLines(&mut out).put(&answer).unwrap();
        let want = concat!(
            r#"{"v":1,"seq":17,"t":"1970-01-01T00:00:00.000Z","#,
            r#""ms":{"capture":1.5,"preprocess":3.0,"infer":6.0,"total":12.0},"#,
            r#""top":[{"label":"a \"b\"","index":3,"p":0.5}],"dropped":2}"#,
            "\n"
        );
        assert_eq!(String::from_utf8(out).unwrap(), want);
        answer.source = Some("x.png".into());
        let mut out = vec![];
        JsonLines(&mut out).put(&answer).unwrap();
        assert!(String::from_utf8(out).unwrap().contains(r#""source":"x.png""#));
    }
}

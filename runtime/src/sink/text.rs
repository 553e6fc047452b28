//! One line an answer, for people.

use super::{Answer, ResultSink};
use std::io::Write;

/// Writes plain lines, each flushed.
pub struct Text<W: Write + Send>(pub W);

impl<W: Write + Send> ResultSink for Text<W> {
    fn put(&mut self, a: &Answer) -> std::io::Result<()> {
        let top: Vec<String> = a.top.iter().map(|c| format!("{} {:.1}%", c.label, c.p * 100.0)).collect();
        let source = a.source.as_ref().map(|s| format!("{s}: ")).unwrap_or_default();
        let dropped = if a.dropped > 0 { format!(", {} dropped", a.dropped) } else { String::new() };
        let ms = a.total.as_secs_f64() * 1e3;
        self.0.write_all(format!("{source}{}   ({ms:.1} ms{dropped})\n", top.join(", ")).as_bytes())?;
        self.0.flush()
    }
}

//! Messages on standard error.

use std::fmt::Display;
use std::io::Write;

/// Writes a message and the end of its line at once, so that no answer that another thread prints lands in its middle when
/// both streams go to one file or terminal. Unlike `eprintln!` it does not panic when standard error is closed or full.
pub fn tell(message: impl Display) {
    let _ = std::io::stderr().write_all(format!("{message}\n").as_bytes());
}

//! Progress of long work on standard error, on a terminal only.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar that counts up to `total`; draws nothing where standard error is no terminal.
pub fn bar(what: &str, total: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:24} {wide_bar} {pos}/{len} {eta}")
        .unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(total as u64).with_style(style).with_message(what.to_string())
}

/// A spinner for work of unknown length; draws nothing where standard error is no terminal.
pub fn spinner(what: &str) -> ProgressBar {
    let s = ProgressBar::new_spinner().with_message(what.to_string());
    s.enable_steady_tick(std::time::Duration::from_millis(100));
    s
}

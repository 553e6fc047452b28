//! Picture folders, observers and statistics with bounded memory.
//!
//! A [`Dataset`] names pictures, [`collect`] runs the float model on them and keeps one [`Histogram`] for each
//! watched value; nothing grows with the number of pictures.

pub mod dataset;
pub mod moments;
pub mod observer;
pub mod statistics;

pub use dataset::{Dataset, Item};
pub use moments::{Moments, moments};
pub use observer::{Calibrator, Histogram};
pub use statistics::{Statistics, collect};

//! Picture folders, observers and statistics with bounded memory.
//!
//! A [`Dataset`] names pictures, [`collect`] runs the float model on them and keeps one [`Histogram`] for each
//! watched value, and [`InputMoments`] where they are asked for; nothing grows with the number of pictures.

pub mod cache;
pub mod dataset;
pub mod input_moments;
pub mod moments;
pub mod observer;
pub mod statistics;

pub use cache::Cache;
pub use dataset::{Dataset, Item};
pub use input_moments::{InputMoments, View};
pub use moments::{Moments, moments};
pub use observer::{Calibrator, Histogram};
pub use statistics::{Partial, Statistics, Tap, collect};

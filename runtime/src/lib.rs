//! Runs converted vision transformers: load, lower to integer operators, preprocess, classify.
//!
//! The same code decides on the workstation (calibration, evaluation) and on the board.

pub mod appearance;
pub mod bench;
pub mod classify;
pub mod decide;
pub mod error;
pub mod exec;
pub mod files;
pub mod guard;
pub mod kernels;
pub mod machine;
pub mod memory;
pub mod model;
pub mod npy;
pub mod onnx;
pub mod pipeline;
pub mod preprocess;
pub mod selftest;
pub mod session;
pub mod sink;
pub mod source;

pub use error::{Error, Result};
pub use model::card::Card;
pub use session::{Options, Session};

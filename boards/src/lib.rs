//! Board profiles as data, detection, and what goes onto a board: bundles and their deployment.
//!
//! A profile is a TOML file under `boards/profiles`; its file name is the board's name. Every fact names its source.

pub mod bundle;
mod catalogue;
mod checks;
mod detect;
mod profile;

pub use catalogue::Catalogue;
pub use checks::{CHECKS, Check, GLIBC, TARGETS};
pub use detect::{Detected, Evidence};
pub use profile::{Accelerator, CameraRoute, Cpu, Detect, Image, Kind, Memory, Profile, Route, SCHEMA, Soc, Thermal};

/// What can go wrong with profiles.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No board of this name.
    #[error("no board `{name}`; known are {known}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// All names, joined by commas.
        known: String,
    },
    /// A profile that is not what the schema says, or that a check refuses.
    #[error("board profile `{name}`: {reason}")]
    Bad {
        /// Name of the board.
        name: String,
        /// What the parser or the check says.
        reason: String,
    },
    /// A folder of profiles that cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The folder or file.
        path: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

//! What can go wrong, in words a user can act on.

use std::path::{Path, PathBuf};

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Every message names the thing, its value and what was expected; [`Error::hint`] names the next step.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file could not be written; nothing half-written stays.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not an ONNX model, or contradicts itself.
    #[error("{0}")]
    BadModel(String),
    /// The model is valid but has something that vedge does not run.
    #[error("{what}")]
    Unsupported {
        /// What, with the node's name and operator.
        what: String,
        /// The next step.
        hint: String,
    },
    /// A tensor or picture does not have the shape the model needs.
    #[error("{0}")]
    Shape(String),
    /// A picture or frame could not be decoded.
    #[error("{0}")]
    Picture(String),
    /// A camera or another source of frames failed.
    #[error("{what}")]
    Source {
        /// What, with the device.
        what: String,
        /// The next step; may be empty.
        hint: String,
    },
    /// A value given by the user is not usable.
    #[error("{what}")]
    Usage {
        /// The option, its value and what was expected.
        what: String,
        /// The next step; may be empty.
        hint: String,
    },
    /// tract failed where vedge expected it to work.
    #[error("engine: {0}")]
    Engine(String),
    /// Another error, in a file.
    #[error("{path}: {error}")]
    InFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        error: Box<Error>,
    },
}

impl Error {
    /// Names the file the error is about (unless the message already does).
    #[must_use]
    pub fn in_file(self, path: &Path) -> Error {
        match self {
            Error::Read { .. } | Error::Write { .. } | Error::InFile { .. } => self,
            error => Error::InFile { path: path.into(), error: Box::new(error) },
        }
    }

    /// Exit status of a program that ends with this error: 2 for wrong usage, 1 for everything else.
    pub fn exit_status(&self) -> u8 {
        match self {
            Error::Usage { .. } => 2,
            Error::InFile { error, .. } => error.exit_status(),
            _ => 1,
        }
    }

    /// What to do next, if there is something to say.
    pub fn hint(&self) -> Option<&str> {
        match self {
            Error::Unsupported { hint, .. } | Error::Source { hint, .. } | Error::Usage { hint, .. } => {
                Some(hint.as_str()).filter(|h| !h.is_empty())
            }
            Error::InFile { error, .. } => error.hint(),
            _ => None,
        }
    }
}

/// A number with its noun, as `1 picture` or `3 pictures`.
pub fn counted(n: usize, noun: &str) -> String {
    format!("{n} {noun}{}", if n == 1 { "" } else { "s" })
}

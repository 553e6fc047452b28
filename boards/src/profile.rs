//! The schema of a profile.

use crate::Error;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A board. Fields named `source` hold a key of [`Profile::sources`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Name on the command line, the file's stem.
    #[serde(skip_deserializing, default)]
    pub name: String,
    /// Name for people.
    pub title: String,
    /// Rust targets that run on it, the preferred first.
    pub targets: Vec<String>,
    /// System on a chip; `None` for a generic board.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub soc: Option<Soc>,
    /// Processor.
    pub cpu: Cpu,
    /// Memory; `None` for a generic board.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
    /// Ways to its cameras.
    pub cameras: Vec<CameraRoute>,
    /// Addresses of the documents that the facts come from.
    pub sources: BTreeMap<String, String>,
}

/// System on a chip.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Soc {
    /// Maker and name.
    pub name: String,
    /// Where that is written.
    pub source: String,
}

/// Processor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cpu {
    /// Core as compilers name it (`-C target-cpu`), or the architecture.
    pub core: String,
    /// Number of cores; `None` where boards differ.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cores: Option<u32>,
    /// Highest clock in MHz as sold; `None` where boards differ.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mhz: Option<u32>,
    /// Which of the features that the kernels use it has, in Rust's spelling.
    pub features: Vec<String>,
    /// Where core, number and clock are written.
    pub source: String,
    /// Where the features are written.
    pub features_source: String,
}

/// Memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// Sizes sold, in MiB, ascending.
    pub sizes_mb: Vec<u32>,
    /// Where that is written.
    pub source: String,
}

/// A way to a camera's pictures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CameraRoute {
    /// How the camera is connected.
    pub route: Route,
    /// A source for `vedge-run`, or the program that gives pictures.
    #[serde(rename = "use")]
    pub usage: String,
    /// Why this way.
    pub about: String,
    /// Where that is written.
    pub source: String,
}

/// How a camera is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Route {
    /// USB video class: a V4L2 device that gives pictures.
    Usb,
    /// MIPI CSI: raw sensor data that the board's own software turns into pictures.
    Csi,
}

impl Profile {
    /// Reads a profile.
    ///
    /// # Errors
    /// [`Error::Bad`] with the parser's message: a missing or unknown field, its line.
    pub fn parse(name: &str, toml: &str) -> Result<Profile, Error> {
        let profile: Profile =
            toml::from_str(toml).map_err(|e| Error::Bad { name: name.into(), reason: e.to_string() })?;
        Ok(Profile { name: name.into(), ..profile })
    }

    /// Every key into [`Profile::sources`] that the facts use.
    pub(crate) fn used_sources(&self) -> Vec<&str> {
        let mut used = vec![self.cpu.source.as_str(), &self.cpu.features_source];
        used.extend(self.soc.iter().map(|s| s.source.as_str()));
        used.extend(self.memory.iter().map(|m| m.source.as_str()));
        used.extend(self.cameras.iter().map(|c| c.source.as_str()));
        used
    }
}

//! The schema of a profile.

use crate::Error;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// A board. Fields named `source` hold a key of `sources`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    /// Name on the command line, the file's stem.
    #[serde(skip_deserializing, default)]
    pub name: String,
    /// Name for people.
    pub title: String,
    /// Other, shorter names on the command line.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<String>,
    /// Rust targets that run on it, the preferred first.
    pub targets: Vec<String>,
    /// How the board is recognised; absent for a generic board.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detect: Option<Detect>,
    /// System on a chip; absent for a generic board.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub soc: Option<Soc>,
    /// Processor.
    pub cpu: Cpu,
    /// Memory; absent for a generic board.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
    /// Operating systems that people run on it, with their C library.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub images: Vec<Image>,
    /// Ways to its cameras.
    pub cameras: Vec<CameraRoute>,
    /// What could compute faster than the processor, and whether vedge uses it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub accelerators: Vec<Accelerator>,
    /// When and how the board slows down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thermal: Option<Thermal>,
    /// Addresses of the documents that the facts come from.
    pub sources: BTreeMap<String, String>,
}

/// How a board is recognised.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Detect {
    /// Entries of `/proc/device-tree/compatible`, one of which is enough; `*` at the end stands for anything.
    pub compatible: Vec<String>,
    /// Where they are written.
    pub source: String,
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
    /// Which of the features that the kernels use all its cores have, in Rust's spelling.
    pub features: Vec<String>,
    /// Where the features are written.
    pub features_source: String,
    /// Its kinds of cores, the fastest first.
    pub kinds: Vec<Kind>,
}

/// A kind of core.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kind {
    /// Core as compilers name it (`-C target-cpu`), or the architecture.
    pub core: String,
    /// Number of cores; absent where boards differ.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cores: Option<u32>,
    /// Highest clock in MHz as sold; absent where boards differ.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mhz: Option<u32>,
    /// Where core, number and clock are written.
    pub source: String,
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

/// An operating system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// Name and release.
    pub name: String,
    /// Version of its GNU C library, `2.36`; absent where images differ.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub glibc: Option<String>,
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

/// Something that computes beside the processor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Accelerator {
    /// Its name.
    pub name: String,
    /// Whether vedge uses it.
    pub used: bool,
    /// What it is.
    pub about: String,
    /// Where that is written.
    pub source: String,
}

/// Slowing down by heat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Thermal {
    /// From this temperature on it slows down, in °C; absent where that is not written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slows_at: Option<u32>,
    /// How, and what helps.
    pub about: String,
    /// Where that is written.
    pub source: String,
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

    /// Whether `name` means this board.
    pub fn is(&self, name: &str) -> bool {
        self.name == name || self.aliases.iter().any(|a| a == name)
    }

    /// Cores of all kinds together; `None` where boards differ.
    pub fn cores(&self) -> Option<u32> {
        self.cpu.kinds.iter().map(|k| k.cores).sum()
    }

    /// The processor in a few words: `4 x cortex-a76 at 2400 MHz, 4 x cortex-a55 at 1800 MHz`.
    pub fn processor(&self) -> String {
        let kind = |k: &Kind| {
            let cores = k.cores.map_or(String::new(), |n| format!("{n} x "));
            let clock = k.mhz.map_or(String::new(), |m| format!(" at {m} MHz"));
            format!("{cores}{}{clock}", k.core)
        };
        self.cpu.kinds.iter().map(kind).collect::<Vec<_>>().join(", ")
    }

    /// Every key into [`Profile::sources`] that the facts use.
    pub(crate) fn used_sources(&self) -> Vec<&str> {
        let mut used = vec![self.cpu.features_source.as_str()];
        used.extend(self.cpu.kinds.iter().map(|k| k.source.as_str()));
        used.extend(self.detect.iter().map(|d| d.source.as_str()));
        used.extend(self.soc.iter().map(|s| s.source.as_str()));
        used.extend(self.memory.iter().map(|m| m.source.as_str()));
        used.extend(self.images.iter().map(|i| i.source.as_str()));
        used.extend(self.cameras.iter().map(|c| c.source.as_str()));
        used.extend(self.accelerators.iter().map(|a| a.source.as_str()));
        used.extend(self.thermal.iter().map(|t| t.source.as_str()));
        used
    }
}

/// The schema of a profile file: JSON Schema, draft 2020-12.
pub const SCHEMA: &str = include_str!("../profile.schema.json");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Catalogue;
    use serde_json::Value;
    use std::collections::BTreeSet;

    /// What of JSON Schema the file uses, checked on a value; collects which properties were seen.
    fn validate(schema: &Value, root: &Value, value: &Value, at: &str, seen: &mut BTreeSet<String>) {
        let schema = match schema["$ref"].as_str() {
            Some(name) => &root["$defs"][name.strip_prefix("#/$defs/").unwrap()],
            None => schema,
        };
        if let Some(options) = schema["oneOf"].as_array() {
            assert!(options.iter().any(|o| o["const"] == *value), "{at}: {value}");
            return;
        }
        match (schema["type"].as_str().unwrap(), value) {
            ("string", Value::String(_)) | ("boolean", Value::Bool(_)) => {}
            ("integer", Value::Number(n)) => assert!(n.as_u64() >= schema["minimum"].as_u64(), "{at}: {n}"),
            ("array", Value::Array(items)) => {
                items.iter().for_each(|i| validate(&schema["items"], root, i, at, seen));
            }
            ("object", Value::Object(fields)) => {
                let required = schema["required"].as_array().into_iter().flatten();
                required.for_each(|r| assert!(fields.contains_key(r.as_str().unwrap()), "{at} lacks {r}"));
                for (key, field) in fields {
                    let known = &schema["properties"][key];
                    let at = format!("{at}.{key}");
                    match schema["additionalProperties"].as_bool() {
                        Some(false) => {
                            assert!(known.is_object(), "{at} is not in the schema");
                            seen.insert(at.clone());
                            validate(known, root, field, &at, seen);
                        }
                        _ => validate(&schema["additionalProperties"], root, field, &at, seen),
                    }
                }
            }
            (kind, value) => panic!("{at}: expected {kind}, is {value}"),
        }
    }

    /// Every property that a schema's object has, with its place.
    fn properties(schema: &Value, root: &Value, at: &str, all: &mut BTreeSet<String>) {
        let schema = match schema["$ref"].as_str() {
            Some(name) => &root["$defs"][name.strip_prefix("#/$defs/").unwrap()],
            None => schema,
        };
        if schema["items"].is_object() {
            properties(&schema["items"], root, at, all);
        }
        for (key, field) in schema["properties"].as_object().into_iter().flatten() {
            let at = format!("{at}.{key}");
            all.insert(at.clone());
            properties(field, root, &at, all);
        }
    }

    #[test]
    fn the_schema_is_what_profiles_are() {
        let schema: Value = serde_json::from_str(SCHEMA).unwrap();
        let (mut seen, mut all) = (BTreeSet::new(), BTreeSet::new());
        for profile in Catalogue::built_in().profiles() {
            let mut value = serde_json::to_value(profile).unwrap();
            value.as_object_mut().unwrap().remove("name");
            validate(&schema, &schema, &value, &profile.name, &mut seen);
        }
        properties(&schema, &schema, "", &mut all);
        let seen: BTreeSet<String> = seen.iter().map(|s| s[s.find('.').unwrap()..].to_string()).collect();
        assert_eq!(seen, all, "the schema has what no profile has, or the other way round");
    }
}

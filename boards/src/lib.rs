//! Board profiles as data: what a board is, how to build for it, how its cameras are reached.
//!
//! A profile is a TOML file under `boards/profiles`; its file name is the board's name. Every fact names its source.

mod checks;
mod profile;

pub use checks::{CHECKS, Check};
pub use profile::{CameraRoute, Cpu, Memory, Profile, Route, Soc};

/// Why a profile cannot be had.
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
    /// A profile that is not what the schema says.
    #[error("board profile `{name}`: {reason}")]
    Bad {
        /// Name of the board.
        name: String,
        /// What the parser says.
        reason: String,
    },
}

/// The built-in profiles, by name and TOML text.
const FILES: [(&str, &str); 4] = [
    ("generic-aarch64", include_str!("../profiles/generic-aarch64.toml")),
    ("jetson-orin-nano", include_str!("../profiles/jetson-orin-nano.toml")),
    ("raspberry-pi-4b", include_str!("../profiles/raspberry-pi-4b.toml")),
    ("raspberry-pi-5", include_str!("../profiles/raspberry-pi-5.toml")),
];

/// All built-in profiles, sorted by name.
pub fn profiles() -> Vec<Profile> {
    FILES.iter().map(|(name, text)| Profile::parse(name, text).expect("a test parses every built-in profile")).collect()
}

/// The built-in profile of a name.
///
/// # Errors
/// [`Error::Unknown`], listing the names there are.
pub fn profile(name: &str) -> Result<Profile, Error> {
    match FILES.iter().find(|(known, _)| *known == name) {
        Some((name, text)) => Profile::parse(name, text),
        None => Err(Error::Unknown { name: name.into(), known: FILES.map(|(known, _)| known).join(", ") }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_is_built_in_and_sorted() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("profiles");
        let mut files: Vec<String> =
            std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        files.sort();
        assert_eq!(files, FILES.map(|(name, _)| format!("{name}.toml")));
    }

    #[test]
    fn built_in_profiles_pass_every_check() {
        let mut failures = vec![];
        for profile in profiles() {
            for check in CHECKS {
                if let Err(reason) = (check.run)(&profile) {
                    failures.push(format!("{}: {}: {reason}", profile.name, check.name));
                }
            }
        }
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }

    #[test]
    fn an_unknown_board_lists_the_known() {
        let message = profile("raspberry-pi-3").unwrap_err().to_string();
        assert_eq!(
            message,
            "no board `raspberry-pi-3`; known are generic-aarch64, jetson-orin-nano, raspberry-pi-4b, raspberry-pi-5"
        );
        assert_eq!(profile("raspberry-pi-5").unwrap().title, "Raspberry Pi 5");
    }
}

//! All known boards: the built-in profiles, and folders of the user's own.

use crate::{CHECKS, Error, Profile};
use std::path::Path;

macro_rules! files {
    ($($name:literal)*) => { &[$(($name, include_str!(concat!("../profiles/", $name, ".toml")))),*] };
}

/// The built-in profiles, by name and TOML text.
const FILES: &[(&str, &str)] = files!(
    "beagleplay" "generic-aarch64" "generic-armv7" "generic-x86-64" "imx8m-plus" "imx93" "jetson-agx-orin" "jetson-nano"
    "jetson-orin-nano" "jetson-orin-nx" "jetson-xavier-nx" "orange-pi-5" "raspberry-pi-3b-plus" "raspberry-pi-4b"
    "raspberry-pi-5" "raspberry-pi-cm4" "raspberry-pi-cm5" "raspberry-pi-zero-2-w" "rock-5b"
);

/// Profiles, sorted by name.
#[derive(Clone, Debug)]
pub struct Catalogue {
    profiles: Vec<Profile>,
}

impl Default for Catalogue {
    fn default() -> Self {
        Catalogue::built_in()
    }
}

impl Catalogue {
    /// The profiles that ship.
    ///
    /// # Panics
    /// Never: a test parses every one.
    pub fn built_in() -> Catalogue {
        let parse = |(name, text): &(&str, &str)| Profile::parse(name, text).expect("a test parses every profile");
        Catalogue { profiles: FILES.iter().map(parse).collect() }
    }

    /// Adds the `*.toml` files of a folder; one of a built-in profile's name replaces it.
    ///
    /// # Errors
    /// [`Error::Read`]; [`Error::Bad`] when a file does not fit the schema or a check refuses it; a folder without
    /// profiles, and a name or alias that two boards have, are errors too.
    pub fn with_folder(mut self, folder: &Path) -> Result<Catalogue, Error> {
        let read = |source| Error::Read { path: folder.into(), source };
        let mut added = 0;
        for entry in std::fs::read_dir(folder).map_err(read)? {
            let path = entry.map_err(read)?.path();
            if path.extension().is_none_or(|e| e != "toml") {
                continue;
            }
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            let text = std::fs::read_to_string(&path).map_err(|source| Error::Read { path: path.clone(), source })?;
            let profile = Profile::parse(&name, &text)?;
            for check in CHECKS {
                (check.run)(&profile)
                    .map_err(|why| Error::Bad { name: name.clone(), reason: format!("{}: {why}", check.name) })?;
            }
            self.profiles.retain(|p| p.name != name);
            self.profiles.push(profile);
            added += 1;
        }
        if added == 0 {
            return Err(read(std::io::Error::other("has no profile (*.toml)")));
        }
        self.profiles.sort_by(|a, b| a.name.cmp(&b.name));
        self.names_are_unique()?;
        Ok(self)
    }

    fn names_are_unique(&self) -> Result<(), Error> {
        for p in &self.profiles {
            for name in p.aliases.iter().chain([&p.name]) {
                let same: Vec<&str> = self.profiles.iter().filter(|o| o.is(name)).map(|o| o.name.as_str()).collect();
                if same.len() > 1 {
                    let reason = format!("the name `{name}` means {}", same.join(" and "));
                    return Err(Error::Bad { name: p.name.clone(), reason });
                }
            }
        }
        Ok(())
    }

    /// All profiles.
    pub fn profiles(&self) -> &[Profile] {
        &self.profiles
    }

    /// The profile of a name or alias.
    ///
    /// # Errors
    /// [`Error::Unknown`], listing the names there are.
    pub fn get(&self, name: &str) -> Result<&Profile, Error> {
        self.profiles.iter().find(|p| p.is(name)).ok_or_else(|| {
            let known: Vec<&str> = self.profiles.iter().map(|p| p.name.as_str()).collect();
            Error::Unknown { name: name.into(), known: known.join(", ") }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_is_built_in_and_sorted() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("profiles");
        let mut files: Vec<String> =
            std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        files.sort();
        let built_in: Vec<String> = FILES.iter().map(|(name, _)| format!("{name}.toml")).collect();
        assert_eq!(files, built_in);
    }

    #[test]
    fn built_in_profiles_pass_every_check() {
        let all = Catalogue::built_in();
        all.names_are_unique().unwrap();
        let mut failures = vec![];
        for profile in all.profiles() {
            for check in CHECKS {
                if let Err(reason) = (check.run)(profile) {
                    failures.push(format!("{}: {}: {reason}", profile.name, check.name));
                }
            }
        }
        assert!(failures.is_empty(), "{}", failures.join("\n"));
    }

    #[test]
    fn by_name_by_alias_or_not_at_all() {
        let all = Catalogue::built_in();
        assert_eq!(all.get("raspberry-pi-5").unwrap().title, "Raspberry Pi 5");
        assert_eq!(all.get("pi5").unwrap().name, "raspberry-pi-5");
        let message = all.get("pi-6").unwrap_err().to_string();
        assert!(message.starts_with("no board `pi-6`; known are beagleplay, generic-aarch64, "), "{message}");
    }

    #[test]
    fn a_folder_of_the_users_own() {
        let dir = tempfile::tempdir().unwrap();
        let mine = Profile::parse("mine", FILES[0].1).unwrap();
        let write = |name: &str, profile: &Profile| {
            let mut value = toml::Value::try_from(profile).unwrap();
            value.as_table_mut().unwrap().remove("name");
            std::fs::write(dir.path().join(name), toml::to_string(&value).unwrap()).unwrap();
        };
        let open = || Catalogue::built_in().with_folder(dir.path());
        assert!(open().unwrap_err().to_string().ends_with("has no profile (*.toml)"));
        // The same aliases as the built-in board that it was copied from.
        write("mine.toml", &mine);
        assert!(open().unwrap_err().to_string().contains("the name `am62` means beagleplay and mine"));
        write("mine.toml", &Profile { aliases: vec![], ..mine.clone() });
        assert_eq!(open().unwrap().get("mine").unwrap().title, mine.title);
        write("mine.toml", &Profile { aliases: vec![], targets: vec!["riscv".into()], ..mine.clone() });
        let message = open().unwrap_err().to_string();
        assert!(message.contains("targets are ones that vedge is built for: `riscv` is not of"), "{message}");
        std::fs::write(dir.path().join("mine.toml"), "title = 1").unwrap();
        assert!(open().unwrap_err().to_string().starts_with("board profile `mine`: "));
    }
}

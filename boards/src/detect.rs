//! Which board is this? From the device tree, else from the processor's architecture; the rest is compared.

use crate::{Catalogue, Detect, Profile};
use serde::Serialize;
use std::path::Path;

/// What a running system says of itself: the text of some files of /proc.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Evidence {
    /// `/proc/device-tree/model`; empty where there is no device tree.
    pub model: String,
    /// Entries of `/proc/device-tree/compatible`, the most specific first.
    pub compatible: Vec<String>,
    /// Text of `/proc/cpuinfo`.
    pub cpuinfo: String,
    /// Text of `/proc/meminfo`.
    pub meminfo: String,
    /// Machine as `uname -m` tells it; empty where it is not known.
    pub machine: String,
}

/// A recognised board.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Detected {
    /// The profile's name.
    pub board: String,
    /// What it was recognised by.
    pub by: String,
    /// The board's name for itself; empty where there is no device tree.
    pub model: String,
    /// Processor features found, of those that kernels use.
    pub features: Vec<String>,
    /// Processors found.
    pub cpus: usize,
    /// Memory that Linux has, in MiB; 0 where that is not known.
    pub memory_mb: u64,
    /// Where the running system is not what the profile says.
    pub differences: Vec<String>,
}

/// Feature names of /proc/cpuinfo (64-bit ARM, 32-bit ARM) and of Rust.
const FEATURES: [(&str, &str); 5] =
    [("asimd", "neon"), ("neon", "neon"), ("asimdhp", "fp16"), ("asimddp", "dotprod"), ("i8mm", "i8mm")];

impl Evidence {
    /// Reads the files below `root`: `/` for this machine, or a captured tree. What is missing stays empty.
    pub fn read(root: &Path) -> Evidence {
        let bytes = |path: &str| std::fs::read(root.join(path)).unwrap_or_default();
        let text = |path: &str| String::from_utf8_lossy(&bytes(path)).trim_end_matches('\0').to_string();
        let machine = if root == Path::new("/") { std::env::consts::ARCH.to_string() } else { String::new() };
        Evidence {
            model: text("proc/device-tree/model"),
            compatible: split(&bytes("proc/device-tree/compatible")),
            cpuinfo: text("proc/cpuinfo"),
            meminfo: text("proc/meminfo"),
            machine,
        }
    }

    /// Features in Rust's spelling that every processor has.
    pub fn features(&self) -> Vec<String> {
        let lines = self.cpuinfo.lines().filter_map(|l| l.split_once(':'));
        let lists: Vec<Vec<&str>> =
            lines.filter(|(key, _)| key.trim() == "Features").map(|(_, v)| v.split_whitespace().collect()).collect();
        let everywhere = |name: &str| !lists.is_empty() && lists.iter().all(|l| l.contains(&name));
        let mut found: Vec<String> = vec![];
        for (linux, rust) in FEATURES {
            if everywhere(linux) && !found.iter().any(|f| f == rust) {
                found.push(rust.into());
            }
        }
        found
    }

    /// Number of processors.
    pub fn cpus(&self) -> usize {
        self.cpuinfo.lines().filter(|l| l.split(':').next().is_some_and(|key| key.trim() == "processor")).count()
    }

    /// Memory that Linux has, in MiB.
    pub fn memory_mb(&self) -> Option<u64> {
        let line = self.meminfo.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? / 1024)
    }

    /// Which generic profile fits, and by what.
    fn architecture(&self) -> Option<(&'static str, String)> {
        let has = |word: &str| self.cpuinfo.split_whitespace().any(|w| w == word);
        let by = |what: &str| format!("the architecture ({what})");
        match self.machine.as_str() {
            "aarch64" => Some(("generic-aarch64", by("aarch64"))),
            m @ ("armv7l" | "arm") => Some(("generic-armv7", by(m))),
            m @ "x86_64" => Some(("generic-x86-64", by(m))),
            "" if has("asimd") => Some(("generic-aarch64", by("asimd in /proc/cpuinfo"))),
            "" if has("vfpv3") || has("neon") => Some(("generic-armv7", by("neon or vfpv3 in /proc/cpuinfo"))),
            "" if has("sse2") => Some(("generic-x86-64", by("sse2 in /proc/cpuinfo"))),
            _ => None,
        }
    }
}

/// The entries of a device tree's string list.
pub(crate) fn split(bytes: &[u8]) -> Vec<String> {
    let entries = bytes.split(|b| *b == 0).filter(|e| !e.is_empty());
    entries.map(|e| String::from_utf8_lossy(e).into_owned()).collect()
}

impl Detect {
    /// The first of the board's entries that this one recognises.
    fn recognises<'a>(&self, compatible: &'a [String]) -> Option<&'a str> {
        let fits = |entry: &str, pattern: &str| match pattern.strip_suffix('*') {
            Some(start) => entry.starts_with(start),
            None => entry == pattern,
        };
        compatible.iter().map(String::as_str).find(|e| self.compatible.iter().any(|p| fits(e, p)))
    }
}

impl Catalogue {
    /// Recognises the board; `None` when not even its architecture is known.
    pub fn detect(&self, evidence: &Evidence) -> Option<Detected> {
        let exact = self.profiles().iter().find_map(|p| {
            let entry = p.detect.as_ref()?.recognises(&evidence.compatible)?;
            Some((p, format!("{entry} in /proc/device-tree/compatible")))
        });
        let generic = || {
            let (name, by) = evidence.architecture()?;
            Some((self.get(name).ok()?, by))
        };
        let (profile, by) = exact.or_else(generic)?;
        Some(Detected {
            board: profile.name.clone(),
            by,
            model: evidence.model.clone(),
            features: evidence.features(),
            cpus: evidence.cpus(),
            memory_mb: evidence.memory_mb().unwrap_or(0),
            differences: differences(profile, evidence),
        })
    }
}

/// Where a running system is not what the profile says.
fn differences(profile: &Profile, evidence: &Evidence) -> Vec<String> {
    let mut found = vec![];
    let features = evidence.features();
    let missing: Vec<&str> =
        profile.cpu.features.iter().filter(|f| !features.contains(f)).map(String::as_str).collect();
    if !missing.is_empty() && !evidence.cpuinfo.is_empty() {
        let what = missing.join(", ");
        found.push(format!(
            "the processor should have {what}, Linux does not show it (a 32-bit system, or a virtual machine?)"
        ));
    }
    let cpus = evidence.cpus();
    match profile.cores() {
        Some(cores) if cpus > 0 && cpus != cores as usize => {
            found.push(format!("{cpus} processors are on, the board has {cores}"));
        }
        _ => {}
    }
    if let (Some(memory), Some(mb)) = (&profile.memory, evidence.memory_mb()) {
        // Firmware and graphics keep a part: a board of 1024 MiB shows some 900.
        let fits = memory.sizes_mb.iter().any(|size| (u64::from(*size) * 70 / 100..=u64::from(*size)).contains(&mb));
        if !fits {
            found.push(format!("Linux has {mb} MiB of memory, the board is sold with {:?} MiB", memory.sizes_mb));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Trees of public listings: the folder's name is the profile that must be found.
    fn tree(name: &str) -> Evidence {
        Evidence::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("trees").join(name))
    }

    #[test]
    fn every_board_has_a_tree_with_its_source_and_is_recognised() {
        let all = Catalogue::built_in();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("trees");
        for profile in all.profiles().iter().filter(|p| p.name != "generic-aarch64") {
            let name = &profile.name;
            let found = all.detect(&tree(name)).unwrap_or_else(|| panic!("{name} is not recognised"));
            assert_eq!(found.board, *name, "{found:?}");
            assert_eq!(found.differences, Vec::<String>::new(), "{name}");
            let source = std::fs::read_to_string(folder.join(name).join("SOURCE")).expect(name);
            assert!(source.contains("https://") || source.contains("made up"), "{name}: {source}");
        }
        let trees = std::fs::read_dir(folder).unwrap().flatten().filter(|e| e.path().is_dir()).count();
        assert_eq!(trees, all.profiles().len() - 1, "a tree has no profile");
    }

    /// Entries as these systems have them, which leave out the module or name another carrier board.
    #[test]
    fn entries_of_vendor_systems_are_recognised() {
        let cases = [
            // adafruit/Adafruit_Python_PlatformDetect, JetPack 4
            ("nvidia,p3449-0000-b00+p3448-0000-b00 nvidia,jetson-nano nvidia,tegra210", "jetson-nano"),
            // NVIDIA's JETSON_COMPATIBLE_P3768, JetPack 6.1 and newer
            ("nvidia,p3768-0000+p3767-0005-super nvidia,tegra234", "jetson-orin-nano"),
            ("nvidia,p3768-0000+p3767-0003 nvidia,tegra234", "jetson-orin-nano"),
            ("nvidia,p3509-0000+p3767-0001 nvidia,tegra234", "jetson-orin-nx"),
            ("nvidia,p3768-0000+p3767-0000-super nvidia,tegra234", "jetson-orin-nx"),
        ];
        for (entries, board) in cases {
            let compatible = entries.split(' ').map(String::from).collect();
            let found = Catalogue::built_in().detect(&Evidence { compatible, ..Evidence::default() });
            assert_eq!(found.expect(entries).board, board, "{entries}");
        }
    }

    #[test]
    fn features_of_a_board_with_dot_products() {
        let found = Catalogue::built_in().detect(&tree("raspberry-pi-5")).unwrap();
        assert_eq!(found.features, ["neon", "fp16", "dotprod"]);
        assert_eq!((found.cpus, found.by.as_str()), (4, "raspberrypi,5-model-b in /proc/device-tree/compatible"));
    }

    #[test]
    fn differences_are_told() {
        let mut evidence = tree("raspberry-pi-5");
        evidence.cpuinfo = evidence.cpuinfo.replace("asimddp", "").replacen("processor", "gone", 1);
        evidence.meminfo = "MemTotal:        2500000 kB\n".into();
        let found = Catalogue::built_in().detect(&evidence).unwrap();
        assert_eq!(found.differences.len(), 3, "{found:?}");
        assert!(found.differences[0].starts_with("the processor should have dotprod"));
        assert_eq!(found.differences[1], "3 processors are on, the board has 4");
        assert!(found.differences[2].starts_with("Linux has 2441 MiB of memory"));
    }

    #[test]
    fn an_unknown_board_is_generic_and_nothing_is_nothing() {
        let mut evidence = tree("raspberry-pi-5");
        evidence.compatible = vec!["acme,board".into()];
        assert_eq!(Catalogue::built_in().detect(&evidence).unwrap().board, "generic-aarch64");
        assert_eq!(Catalogue::built_in().detect(&Evidence::default()), None);
    }
}

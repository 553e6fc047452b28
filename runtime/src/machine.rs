//! The state of the machine that a measurement depends on: clock governor, temperature, throttling, memory. Read below a
//! root folder: `/`, or a captured tree of /proc and /sys.

use crate::error::{Error, Result};
use serde::Serialize;
use std::path::Path;
use std::time::{Duration, Instant};

/// What /proc and /sys say; what is not there is absent.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Machine {
    /// The device tree's name of the board.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub board: String,
    /// Clock governors in use, without repetition.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub governors: Vec<String>,
    /// Highest present clock of a processor, in MHz.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mhz: Option<u32>,
    /// Highest possible clock, in MHz.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_mhz: Option<u32>,
    /// Temperatures.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub zones: Vec<Zone>,
    /// What a Raspberry Pi's firmware says of its clock and supply.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub throttled: Option<Throttled>,
    /// Memory that Linux has, in MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u64>,
    /// Memory that can be had without swapping, in MiB.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub available_mib: Option<u64>,
    /// Swap on a disk or card, in MiB.
    pub swap_mib: u64,
    /// Swap in compressed memory (zram), in MiB.
    pub zram_mib: u64,
}

/// A thermal zone.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Zone {
    /// Its name.
    pub name: String,
    /// °C.
    pub celsius: f64,
    /// From this temperature on the kernel slows down, in °C.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slows_at: Option<f64>,
}

/// Flags of `vcgencmd get_throttled`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Throttled {
    /// As the firmware gives them.
    pub flags: u32,
    /// What holds now.
    pub now: Vec<&'static str>,
    /// What happened since the board was started.
    pub before: Vec<&'static str>,
}

/// Bits 0 to 3; bits 16 to 19 say the same of the past.
const FLAGS: [&str; 4] = ["under-voltage", "clock capped", "throttled", "soft temperature limit"];

impl Throttled {
    /// Reads `50005`, `0x50005` or `throttled=0x50005`.
    pub fn parse(text: &str) -> Option<Throttled> {
        let hex = text.trim().trim_start_matches("throttled=").trim_start_matches("0x");
        let flags = u32::from_str_radix(hex, 16).ok()?;
        let set =
            |from: u32| (0..4).filter(|bit| flags >> (from + bit) & 1 == 1).map(|bit| FLAGS[bit as usize]).collect();
        Some(Throttled { flags, now: set(0), before: set(16) })
    }
}

impl Machine {
    /// Reads the state; asks `vcgencmd` where a Raspberry Pi's kernel does not tell and `root` is `/`.
    pub fn read(root: &Path) -> Machine {
        let at = |pattern: &str| matching(root, pattern);
        let mhz = |pattern: &str| {
            let khz = at(pattern).into_iter().filter_map(|p| text(&p)?.parse::<u32>().ok());
            khz.max().map(|khz| khz / 1000).filter(|mhz| *mhz > 0)
        };
        let mut governors: Vec<String> =
            at("sys/devices/system/cpu/cpu*/cpufreq/scaling_governor").iter().filter_map(|p| text(p)).collect();
        governors.sort();
        governors.dedup();
        let meminfo = text(&root.join("proc/meminfo")).unwrap_or_default();
        let mib = |name: &str| {
            let line = meminfo.lines().find_map(|l| l.strip_prefix(name))?;
            Some(line.split_whitespace().next()?.parse::<u64>().ok()? / 1024)
        };
        let (swap_mib, zram_mib) = swaps(&text(&root.join("proc/swaps")).unwrap_or_default());
        Machine {
            board: text(&root.join("proc/device-tree/model")).unwrap_or_default().trim_end_matches('\0').to_string(),
            governors,
            mhz: mhz("sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq"),
            max_mhz: mhz("sys/devices/system/cpu/cpu*/cpufreq/cpuinfo_max_freq"),
            zones: at("sys/class/thermal/thermal_zone*").iter().filter_map(|p| zone(p)).collect(),
            throttled: throttled(root),
            memory_mib: mib("MemTotal:"),
            available_mib: mib("MemAvailable:"),
            swap_mib,
            zram_mib,
        }
    }

    /// The hottest zone.
    pub fn hottest(&self) -> Option<&Zone> {
        self.zones.iter().max_by(|a, b| a.celsius.total_cmp(&b.celsius))
    }
}

/// Waits until the hottest zone is at most `celsius`; returns the seconds waited.
///
/// # Errors
/// [`Error::Usage`] where the machine tells no temperature, [`Error::Source`] when it is still hotter after `patience`.
pub fn cool_down(root: &Path, celsius: f64, patience: Duration) -> Result<u64> {
    let begun = Instant::now();
    loop {
        let machine = Machine::read(root);
        let Some(zone) = machine.hottest() else {
            return Err(Error::Usage {
                what: format!("--cool-down {celsius}: this machine tells no temperature"),
                hint: "leave --cool-down out".into(),
            });
        };
        if zone.celsius <= celsius {
            return Ok(begun.elapsed().as_secs());
        }
        if begun.elapsed() >= patience {
            return Err(Error::Source {
                what: format!(
                    "--cool-down {celsius}: {} is still at {:.0} °C after {} s",
                    zone.name,
                    zone.celsius,
                    begun.elapsed().as_secs()
                ),
                hint: "end other programs, add a fan, or ask for a higher temperature".into(),
            });
        }
        std::thread::sleep(Duration::from_secs(2).min(patience));
    }
}

fn matching(root: &Path, pattern: &str) -> Vec<std::path::PathBuf> {
    let pattern = format!("{}/{pattern}", glob::Pattern::escape(root.to_string_lossy().trim_end_matches('/')));
    glob::glob(&pattern).map(|paths| paths.flatten().collect()).unwrap_or_default()
}

fn text(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|s| s.trim().to_string()).filter(|s| !s.is_empty())
}

/// A zone that gives a possible temperature (some give nonsense while their device sleeps).
fn zone(path: &Path) -> Option<Zone> {
    let celsius = |file: &str| Some(text(&path.join(file))?.parse::<f64>().ok()? / 1000.0);
    let degrees = celsius("temp").filter(|d| (-50.0..200.0).contains(d))?;
    let passive = |n: &usize| text(&path.join(format!("trip_point_{n}_type"))).is_some_and(|t| t == "passive");
    let slows_at = (0..16).filter(passive).filter_map(|n| celsius(&format!("trip_point_{n}_temp")));
    Some(Zone {
        name: text(&path.join("type")).unwrap_or_default(),
        celsius: degrees,
        slows_at: slows_at.filter(|d| *d > 0.0).reduce(f64::min),
    })
}

fn throttled(root: &Path) -> Option<Throttled> {
    let told = matching(root, "sys/devices/platform/soc*/*firmware/get_throttled");
    let asked = || {
        let here = root == Path::new("/") && !matching(root, "usr/bin/vcgencmd").is_empty();
        let output = || std::process::Command::new("vcgencmd").arg("get_throttled").output().ok();
        here.then(output).flatten().map(|done| String::from_utf8_lossy(&done.stdout).into_owned())
    };
    Throttled::parse(&told.first().and_then(|p| text(p)).or_else(asked)?)
}

/// MiB of swap on devices and in compressed memory.
fn swaps(text: &str) -> (u64, u64) {
    let (mut disk, mut zram) = (0, 0);
    for line in text.lines().skip(1) {
        let mut fields = line.split_whitespace();
        let (Some(name), Some(kib)) = (fields.next(), fields.nth(1).and_then(|n| n.parse::<u64>().ok())) else {
            continue;
        };
        *(if name.contains("zram") { &mut zram } else { &mut disk }) += kib / 1024;
    }
    (disk, zram)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(name: &str) -> Machine {
        Machine::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../boards/trees").join(name))
    }

    #[test]
    fn a_hot_raspberry_pi_with_a_weak_supply() {
        let m = tree("raspberry-pi-zero-2-w");
        assert_eq!((m.board.as_str(), m.mhz, m.memory_mib), ("Raspberry Pi Zero 2 W Rev 1.0", Some(1000), Some(426)));
        assert_eq!(m.governors, ["ondemand"]);
        let throttled = m.throttled.as_ref().unwrap();
        assert_eq!(throttled.now, ["under-voltage", "throttled"]);
        assert_eq!(throttled.before, ["under-voltage", "throttled"]);
        assert_eq!(m.hottest().unwrap().celsius, 81.2);
    }

    #[test]
    fn a_jetson_with_many_zones() {
        let m = tree("jetson-orin-nano");
        let hottest = m.hottest().unwrap();
        assert_eq!((hottest.name.as_str(), hottest.slows_at), ("tj-thermal", Some(99.0)));
        assert_eq!((m.swap_mib, m.zram_mib, m.throttled), (0, 97, None));
    }

    #[test]
    fn cooling_down() {
        let root = |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("../boards/trees").join(name);
        assert_eq!(cool_down(&root("raspberry-pi-5"), 60.0, Duration::ZERO).unwrap(), 0);
        let message = |name: &str| cool_down(&root(name), 60.0, Duration::ZERO).unwrap_err().to_string();
        assert_eq!(message("raspberry-pi-zero-2-w"), "--cool-down 60: cpu-thermal is still at 81 °C after 0 s");
        assert_eq!(message("generic-armv7"), "--cool-down 60: this machine tells no temperature");
    }

    #[test]
    fn flags_in_three_spellings_and_nonsense() {
        for text in ["50005\n", "0x50005", "throttled=0x50005\n"] {
            assert_eq!(Throttled::parse(text).unwrap().flags, 0x50005, "{text}");
        }
        assert_eq!(Throttled::parse("VCHI initialization failed"), None);
        assert_eq!(Machine::read(Path::new("/nowhere")), Machine::default());
    }
}

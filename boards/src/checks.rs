//! What must hold for every profile, as a list of named checks.

use crate::{Profile, Route};

/// One rule.
pub struct Check {
    /// What must hold.
    pub name: &'static str,
    /// Whether it does, else what is wrong.
    pub run: fn(&Profile) -> Result<(), String>,
}

/// Targets that vedge is built for.
pub const TARGETS: [&str; 5] = [
    "aarch64-unknown-linux-musl",
    "aarch64-unknown-linux-gnu",
    "armv7-unknown-linux-gnueabihf",
    "x86_64-unknown-linux-musl",
    "x86_64-unknown-linux-gnu",
];

/// Oldest glibc that a gnu build is made for; see `vedge build`.
pub const GLIBC: &str = "2.31";

/// Processor features that kernels ask for.
const FEATURES: [&str; 4] = ["neon", "fp16", "dotprod", "i8mm"];

/// All rules.
pub const CHECKS: &[Check] = &[
    Check { name: "the name is lower case with hyphens", run: name },
    Check { name: "targets are ones that vedge is built for", run: targets },
    Check { name: "features are ones that kernels use", run: features },
    Check { name: "numbers are possible", run: numbers },
    Check { name: "every fact has a source, every source a use", run: sources },
    Check { name: "a USB camera is a V4L2 source", run: cameras },
    Check { name: "a gnu build starts on one of its systems", run: glibc },
    Check { name: "it is recognised by a device tree entry", run: detection },
];

fn ensure(holds: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise()) }
}

fn name(p: &Profile) -> Result<(), String> {
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let bad = |n: &&String| n.is_empty() || !n.chars().all(|c| good(c) || (c == '+' && **n != p.name));
    match p.aliases.iter().chain([&p.name]).find(bad) {
        Some(name) => Err(format!("`{name}`")),
        None => Ok(()),
    }
}

fn targets(p: &Profile) -> Result<(), String> {
    ensure(!p.targets.is_empty(), || "there is none".into())?;
    p.targets.iter().try_for_each(|t| ensure(TARGETS.contains(&t.as_str()), || format!("`{t}` is not of {TARGETS:?}")))
}

fn features(p: &Profile) -> Result<(), String> {
    let known = |f: &String| ensure(FEATURES.contains(&f.as_str()), || format!("`{f}` is not of {FEATURES:?}"));
    p.cpu.features.iter().try_for_each(known)?;
    let neon = p.cpu.features.iter().any(|f| f == "neon");
    ensure(neon || !p.targets.iter().any(|t| t.starts_with("aarch64")), || "64-bit ARM always has neon".into())
}

fn numbers(p: &Profile) -> Result<(), String> {
    ensure(!p.cpu.kinds.is_empty(), || "there is no kind of core".into())?;
    for kind in &p.cpu.kinds {
        ensure(kind.cores.is_none_or(|n| (1..=64).contains(&n)), || format!("{:?} cores", kind.cores))?;
        ensure(kind.mhz.is_none_or(|n| (200..=6000).contains(&n)), || format!("{:?} MHz", kind.mhz))?;
    }
    let slows = p.thermal.as_ref().and_then(|t| t.slows_at);
    ensure(slows.is_none_or(|d| (40..=125).contains(&d)), || format!("slows at {slows:?} °C"))?;
    let Some(memory) = &p.memory else { return Ok(()) };
    let ascending = memory.sizes_mb.windows(2).all(|w| w[0] < w[1]);
    let possible = memory.sizes_mb.iter().all(|mb| (64..=262_144).contains(mb));
    ensure(!memory.sizes_mb.is_empty() && ascending && possible, || format!("memory sizes {:?}", memory.sizes_mb))
}

fn sources(p: &Profile) -> Result<(), String> {
    let used = p.used_sources();
    used.iter().try_for_each(|s| ensure(p.sources.contains_key(*s), || format!("`{s}` is not under [sources]")))?;
    p.sources.iter().try_for_each(|(key, address)| {
        ensure(used.contains(&key.as_str()), || format!("`{key}` is used by no fact"))?;
        ensure(address.starts_with("https://"), || format!("`{key}` has the address `{address}`"))
    })
}

fn cameras(p: &Profile) -> Result<(), String> {
    ensure(!p.cameras.is_empty(), || "there is no camera route".into())?;
    p.cameras.iter().try_for_each(|c| {
        let v4l2 = c.usage.starts_with("v4l2://");
        ensure(v4l2 == (c.route == Route::Usb), || format!("{:?} by `{}`", c.route, c.usage))
    })
}

fn glibc(p: &Profile) -> Result<(), String> {
    let number = |version: &str| {
        let (major, minor) = version.split_once('.')?;
        Some((major.parse::<u32>().ok()?, minor.parse::<u32>().ok()?))
    };
    for image in &p.images {
        let version = image.glibc.as_deref();
        ensure(version.is_none_or(|v| number(v).is_some()), || format!("{}: glibc {version:?}", image.name))?;
    }
    let gnu = p.targets.iter().find(|t| t.contains("-gnu"));
    let known: Vec<&str> = p.images.iter().filter_map(|i| i.glibc.as_deref()).collect();
    let starts = known.is_empty() || known.iter().any(|v| number(v) >= number(GLIBC));
    ensure(gnu.is_none() || starts, || format!("made for glibc {GLIBC}, its systems have {known:?}"))
}

fn detection(p: &Profile) -> Result<(), String> {
    let generic = p.name.starts_with("generic-");
    ensure(generic || p.detect.is_some(), || "there is no [detect]".into())?;
    let Some(detect) = &p.detect else { return Ok(()) };
    let good = |c: &String| c.split_once(',').is_some_and(|(vendor, board)| !vendor.is_empty() && board.len() > 1);
    let bad = detect.compatible.iter().find(|c| !good(c));
    ensure(!detect.compatible.is_empty() && bad.is_none(), || format!("compatible {:?}", detect.compatible))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Catalogue;

    /// A change to a good profile that one check must refuse.
    type Break = fn(&mut Profile);

    #[test]
    fn each_check_refuses_what_it_is_for() {
        let breaks: [(&str, Break); 13] = [
            ("`Pi 5`", |p| p.name = "Pi 5".into()),
            ("there is none", |p| p.targets.clear()),
            ("`riscv64gc-unknown-linux-gnu` is not of", |p| p.targets.push("riscv64gc-unknown-linux-gnu".into())),
            ("`asimd` is not of", |p| p.cpu.features.push("asimd".into())),
            ("64-bit ARM always has neon", |p| p.cpu.features.clear()),
            ("memory sizes [4096, 2048]", |p| p.memory.as_mut().unwrap().sizes_mb = vec![4096, 2048]),
            ("`blog` is not under [sources]", |p| p.images[0].source = "blog".into()),
            ("`blog` is used by no fact", |p| drop(p.sources.insert("blog".into(), "https://example.org".into()))),
            ("Csi by `v4l2:///dev/video0`", |p| p.cameras[0].route = Route::Csi),
            ("made for glibc 2.31, its systems have [\"2.27\"]", |p| {
                p.images.truncate(1);
                p.images[0].glibc = Some("2.27".into());
            }),
            ("Raspberry Pi OS Bookworm: glibc Some(\"new\")", |p| p.images[0].glibc = Some("new".into())),
            ("there is no [detect]", |p| {
                p.detect = None;
                p.sources.remove("dt-bindings");
            }),
            ("compatible [\"pi\"]", |p| p.detect.as_mut().unwrap().compatible = vec!["pi".into()]),
        ];
        for (expected, break_it) in breaks {
            let mut p = Catalogue::built_in().get("raspberry-pi-5").unwrap().clone();
            break_it(&mut p);
            let reasons: Vec<String> = CHECKS.iter().filter_map(|c| (c.run)(&p).err()).collect();
            assert_eq!(reasons.len(), 1, "{expected}: {reasons:?}");
            assert!(reasons[0].starts_with(expected), "expected {expected}, got {}", reasons[0]);
        }
    }
}

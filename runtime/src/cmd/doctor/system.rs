//! Findings about the machine: processor, clock, heat, supply, memory, cameras.

use super::Finding;
use super::estimate::Profile;
use vedge_runtime::kernels;
use vedge_runtime::machine::Machine;
use vedge_runtime::source::v4l2;

/// Processor and kernels, on the machine itself.
pub fn processor(profile: Option<&Profile>) -> Vec<Finding> {
    let found = features();
    let list = if found.is_empty() { "no vector features known to vedge".to_string() } else { found.join(" ") };
    let cpus = super::super::threads(None);
    let mut findings = vec![Finding::ok("cpu", format!("{cpus} CPUs, {}: {list}", std::env::consts::ARCH))];
    if let Some(p) = profile {
        let missing: Vec<&str> = p.cpu.features.iter().map(String::as_str).filter(|f| !found.contains(f)).collect();
        findings.push(if missing.is_empty() {
            Finding::ok("profile", p.title.clone())
        } else {
            let what = format!("{} should have {}, this machine does not show it", p.title, missing.join(", "));
            Finding::note("profile", what, "is it this board, and a 64-bit system? vedge boards detect tells")
        });
    }
    findings.push(match kernels::detect() {
        Ok(k) => match std::env::var("VEDGE_KERNEL") {
            Ok(_) => {
                Finding::note("kernels", format!("{}, by VEDGE_KERNEL", k.name), "unset VEDGE_KERNEL for the best")
            }
            Err(_) => Finding::ok("kernels", format!("{}: {}", k.name, why(k.name))),
        },
        Err(e) => Finding::bad("kernels", e.to_string(), e.hint().unwrap_or_default()),
    });
    findings
}

/// Why a kernel is the one in use.
fn why(kernel: &str) -> &'static str {
    match kernel {
        "generic" => "this CPU has no instructions that vedge has faster kernels for",
        "neon" => "64-bit ARM without 8-bit dot products",
        "neon-dotprod" => "the CPU has 8-bit dot products (SDOT)",
        "neon-i8mm" => "the CPU has 8-bit matrix products (I8MM)",
        "avx2" => "the CPU has AVX2 without VNNI of AVX-512",
        "avx512-vnni" => "the CPU has 8-bit dot products (VNNI of AVX-512)",
        _ => "the best for this CPU",
    }
}

/// CPU features that matter for the kernels.
fn features() -> Vec<&'static str> {
    let mut found: Vec<&str> = vec![];
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    macro_rules! detect {
        ($test:ident: $($name:tt)*) => { $( if std::arch::$test!($name) { found.push($name); } )* };
    }
    #[cfg(target_arch = "x86_64")]
    detect!(is_x86_feature_detected: "avx2" "fma" "avx512f" "avx512vnni" "avxvnni");
    #[cfg(target_arch = "aarch64")]
    detect!(is_aarch64_feature_detected: "neon" "fp16" "dotprod" "i8mm" "bf16");
    // Nothing to ask for on other architectures.
    found.truncate(found.len());
    found
}

/// Clock, heat, supply, memory.
pub fn state(m: &Machine) -> Vec<Finding> {
    let mut findings = vec![];
    if !m.board.is_empty() {
        findings.push(Finding::ok("board", m.board.clone()));
    }
    findings.extend(governor(m));
    findings.extend(memory(m));
    findings.extend(temperature(m));
    findings.extend(throttling(m));
    findings
}

fn governor(m: &Machine) -> Option<Finding> {
    let clock = match (m.mhz, m.max_mhz) {
        (Some(now), Some(most)) => format!(", {now} of {most} MHz now"),
        _ => String::new(),
    };
    let found = format!("{}{clock}", m.governors.join(", "));
    match m.governors.as_slice() {
        [] => None,
        [one] if one == "performance" => Some(Finding::ok("governor", found)),
        _ => Some(Finding::note(
            "governor",
            found,
            "for steady latency: echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor",
        )),
    }
}

fn memory(m: &Machine) -> Option<Finding> {
    let (available, total) = (m.available_mib?, m.memory_mib?);
    let swap = match (m.swap_mib, m.zram_mib) {
        (0, 0) => "no swap".to_string(),
        (0, zram) => format!("{zram} MiB of compressed swap"),
        (disk, 0) => format!("{disk} MiB of swap on a device"),
        (disk, zram) => format!("{disk} MiB of swap on a device, {zram} MiB compressed"),
    };
    let found = format!("{available} MiB of {total} MiB available, {swap}");
    Some(if available < 100 {
        Finding::note("memory", found, "end other programs, or use a smaller model: ViT-S in INT8 takes some 90 MiB")
    } else {
        Finding::ok("memory", found)
    })
}

fn temperature(m: &Machine) -> Option<Finding> {
    let zone = m.hottest()?;
    // Where no trip point is told: boards without one slow down from 80 °C (Raspberry Pi).
    let limit = zone.slows_at.unwrap_or(80.0);
    let found = format!("{:.0} °C ({}), slows down from {limit:.0} °C", zone.celsius, zone.name);
    Some(if zone.celsius >= limit {
        Finding::note("temperature", found, "the clock is lowered now: add a heat sink or a fan, or use fewer threads")
    } else if zone.celsius >= limit - 5.0 {
        Finding::note("temperature", found, "close to slowing down: add a heat sink or a fan, or use fewer threads")
    } else {
        Finding::ok("temperature", found)
    })
}

fn throttling(m: &Machine) -> Option<Finding> {
    let t = m.throttled.as_ref()?;
    let supply = |list: &[&str]| list.contains(&"under-voltage");
    let remedy = if supply(&t.now) || supply(&t.before) {
        "use the board's own power supply and a short cable"
    } else {
        "add a heat sink or a fan"
    };
    Some(match (t.now.as_slice(), t.before.as_slice()) {
        ([], []) => Finding::ok("throttling", "none since the start"),
        ([], before) => {
            Finding::note("throttling", format!("none now; since the start: {}", before.join(", ")), remedy)
        }
        (now, _) => Finding::note("throttling", format!("now: {}", now.join(", ")), remedy),
    })
}

/// Cameras with their formats, and what keeps them from use.
pub fn cameras() -> Vec<Finding> {
    let list = v4l2::list();
    if list.is_empty() {
        return vec![Finding::note("camera", "none", "plug a USB camera in; synthetic:// is a source without one")];
    }
    let describe = |c: v4l2::Listed| {
        if c.usable {
            let formats: Vec<String> = c.formats.into_iter().filter(|f| f.supported).map(|f| f.fourcc).collect();
            Finding::ok("camera", format!("{} {} ({})", c.device.display(), c.name, formats.join(", ")))
        } else {
            Finding::note("camera", format!("{} is not usable", c.device.display()), c.problem)
        }
    };
    list.into_iter().map(describe).collect()
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn every_kernel_of_this_machine_has_a_reason() {
        for kernel in kernels::available() {
            assert_ne!(why(kernel.name), why("another"), "{}", kernel.name);
        }
    }

    use std::path::Path;

    fn found(tree: &str) -> Vec<Finding> {
        state(&Machine::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../boards/trees").join(tree)))
    }

    #[test]
    fn findings_on_captured_trees() {
        let text = |tree: &str| super::super::text(&found(tree));
        assert_eq!(
            text("raspberry-pi-5"),
            "ok    board        Raspberry Pi 5 Model B Rev 1.0\n\
             note  governor     ondemand, 2400 of 2400 MHz now\n                   -> for steady latency: echo performance \
             | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor\n\
             ok    memory       7226 MiB of 8052 MiB available, no swap\n\
             ok    temperature  54 °C (cpu-thermal), slows down from 80 °C\n\
             ok    throttling   none since the start\n"
        );
        let zero = text("raspberry-pi-zero-2-w");
        assert!(
            zero.contains("81 °C (cpu-thermal), slows down from 80 °C\n                   -> the clock is lowered now"),
            "{zero}"
        );
        assert!(
            zero.contains("now: under-voltage, throttled\n                   -> use the board's own power supply"),
            "{zero}"
        );
        let orin = text("jetson-orin-nano");
        assert!(orin.contains("99 °C (tj-thermal), slows down from 99 °C"), "{orin}");
        assert!(orin.contains("97 MiB of compressed swap"), "{orin}");
        assert!(found("rock-5b").iter().all(|f| f.verdict == Verdict::Ok));
    }

    #[test]
    fn nothing_known_is_nothing_said() {
        assert_eq!(state(&Machine::default()), []);
    }
}

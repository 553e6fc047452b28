//! How long a model should take on a board, roughly: work divided by what the cores could do at best.

use serde::Deserialize;

/// What of a board's profile is of use here.
#[derive(Clone, Debug, Deserialize)]
pub struct Profile {
    /// Name for people.
    pub title: String,
    /// Processor.
    pub cpu: Cpu,
}

/// Processor of a profile.
#[derive(Clone, Debug, Deserialize)]
pub struct Cpu {
    /// Features that all cores have.
    pub features: Vec<String>,
    /// Kinds of cores, the fastest first.
    pub kinds: Vec<Kind>,
}

/// Kind of core.
#[derive(Clone, Debug, Deserialize)]
pub struct Kind {
    /// Its name.
    pub core: String,
    /// How many.
    pub cores: Option<u32>,
    /// Clock.
    pub mhz: Option<u32>,
}

/// Share of the peak that kernels reach over a whole model: assumed, to be replaced by measurements on boards.
const EFFICIENCY: f64 = 0.4;

/// 8-bit multiply-accumulates a cycle at best, by the width and number of a core's vector pipes: two of 128 bits with dot
/// products (16 each), one where the core is small; without dot products a widening product gives 8.
fn macs_a_cycle(core: &str, dotprod: bool) -> f64 {
    match (core, dotprod) {
        ("cortex-a55", true) => 16.0,
        (_, true) => 32.0,
        ("cortex-a53", false) => 4.0,
        (_, false) => 8.0,
    }
}

/// Milliseconds for so many multiply-accumulates on so many threads; `None` where the profile does not tell the clock.
pub fn milliseconds(profile: &Profile, macs: usize, threads: usize) -> Option<f64> {
    let dotprod = profile.cpu.features.iter().any(|f| f == "dotprod");
    let mut left = threads as u32;
    let mut rate = 0.0;
    for kind in &profile.cpu.kinds {
        let used = kind.cores.unwrap_or(left).min(left);
        left -= used;
        rate += f64::from(used) * f64::from(kind.mhz?) * 1e6 * macs_a_cycle(&kind.core, dotprod) * EFFICIENCY;
    }
    (rate > 0.0 && macs > 0).then(|| macs as f64 / rate * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_of_two_kinds_add_up() {
        let kind = |core: &str, mhz| Kind { core: core.into(), cores: Some(4), mhz };
        let cpu = Cpu {
            features: vec!["dotprod".into()],
            kinds: vec![kind("cortex-a76", Some(2400)), kind("cortex-a55", Some(1800))],
        };
        let mut p = Profile { title: "Board".into(), cpu };
        let four = milliseconds(&p, 1_000_000_000, 4).unwrap();
        assert!((four - 1e9 / (4.0 * 2.4e9 * 32.0 * EFFICIENCY) * 1e3).abs() < 1e-9, "{four}");
        assert!(milliseconds(&p, 1_000_000_000, 8).unwrap() < four);
        p.cpu.kinds[0].mhz = None;
        assert_eq!(milliseconds(&p, 1_000_000_000, 4), None);
    }
}

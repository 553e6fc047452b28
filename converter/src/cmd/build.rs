//! `vedge build`

use super::boards::Profiles;
use super::out;
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::process::Command;
use vedge_boards::GLIBC;
use vedge_boards::bundle::elf;
use vedge_runtime::Error;

/// The program for a board, `vedge-run`, from this checkout; checks what came out.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The board: a name from `vedge boards list`.
    #[arg(long, value_name = "NAME")]
    board: String,
    /// Rust target [default: the board's first].
    #[arg(long, value_name = "TARGET")]
    target: Option<String>,
    /// How to link: `auto` takes the system's compiler for musl and x86-64; for gnu on ARM cargo-zigbuild or else cross, as
    /// they are installed, which alone make programs for old systems, and for armv7 at last the system's cross compiler.
    #[arg(long, value_enum, default_value_t)]
    route: Route,
    /// A quick build for trying, not small: the profile `release` instead of `dist`.
    #[arg(long)]
    quick: bool,
    /// With MQTT over TLS, which makes the program 0.8 MB larger.
    #[arg(long)]
    tls: bool,
    /// Print the command and do not run it.
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    profiles: Profiles,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, clap::ValueEnum)]
enum Route {
    #[default]
    Auto,
    /// cargo with a cross compiler of the system.
    System,
    /// cargo-zigbuild, no cross compiler and no docker.
    Zig,
    /// cross, in the images of boards/images (docker or podman).
    Cross,
}

/// Program, arguments and environment of a build.
#[derive(Debug, PartialEq)]
struct Plan {
    words: Vec<String>,
    environment: Vec<(String, String)>,
}

/// The checkout that this program was built from.
fn checkout() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Where cargo puts what it builds for this checkout.
pub fn target_folder() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| checkout().join("target"), PathBuf::from)
}

/// Runs the command.
pub fn run(a: &Args) -> Result<()> {
    let profile = a.profiles.get(&a.board)?;
    let target = a.target.clone().unwrap_or_else(|| profile.targets[0].clone());
    if !profile.targets.contains(&target) {
        let what = format!("--target {target}: {} runs {}", profile.name, profile.targets.join(", "));
        return Err(Error::Usage { what, hint: String::new() }.into());
    }
    let route = if a.route == Route::Auto { auto(&target, installed) } else { a.route };
    let plan = plan(&target, route, if a.quick { "release" } else { "dist" }, a.tls)?;
    let line: Vec<String> =
        plan.environment.iter().map(|(k, v)| format!("{k}={v}")).chain(plan.words.clone()).collect();
    if a.dry_run {
        return out::text(&(line.join(" ") + "\n"));
    }
    let checkout = checkout();
    if !checkout.join("Cargo.toml").is_file() {
        return Err(Error::Source {
            what: format!("{}: the checkout that this vedge was built from is gone", checkout.display()),
            hint: "clone it again, and: cargo run --release --bin vedge -- build --board NAME".into(),
        }
        .into());
    }
    eprintln!("{}", line.join(" "));
    let mut command = Command::new(&plan.words[0]);
    let status = command.args(&plan.words[1..]).envs(plan.environment.clone()).current_dir(&checkout).status();
    let status = status.map_err(|e| Error::Source {
        what: format!("cannot run {}: {e}", plan.words[0]),
        hint: "docs/building.md has what each route needs".into(),
    })?;
    if !status.success() {
        let what = format!("the build ended with {status}");
        return Err(Error::Source { what, hint: "docs/building.md has what each route needs".into() }.into());
    }
    let path = target_folder().join(&target).join(if a.quick { "release" } else { "dist" }).join("vedge-run");
    let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let found = elf::read(&bytes).map_err(|why| anyhow::anyhow!("{}: {why}", path.display()))?;
    out::text(&report(&path.display().to_string(), &found))?;
    let problems = found.problems(&target, if route == Route::System { "2.99" } else { GLIBC });
    if !problems.is_empty() {
        let what = format!("{}: {}", path.display(), problems.join("; "));
        return Err(Error::Source { what, hint: "docs/building.md has what each route needs".into() }.into());
    }
    eprintln!("next: vedge bundle MODEL --board {} -o OUT", profile.name);
    Ok(())
}

fn report(path: &str, e: &elf::Elf) -> String {
    let linking = match (&e.glibc, e.is_static) {
        (_, true) => "static".to_string(),
        (Some(version), _) => format!("dynamic, needs glibc {version}"),
        (None, _) => "dynamic".to_string(),
    };
    let dots =
        if e.machine == "aarch64" { format!(", {} dot product instructions", e.dot_products) } else { String::new() };
    format!("{path}: {}, {:.1} MB, {linking}{dots}\n", e.machine, e.size as f64 / 1e6)
}

/// Whether a program is on the search path.
fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}

/// The route for a target, by which programs are there.
fn auto(target: &str, installed: impl Fn(&str) -> bool) -> Route {
    let old_glibc = target.contains("-gnu") && !target.starts_with("x86_64");
    let engine = || installed("docker") || installed("podman");
    match target {
        _ if !old_glibc => Route::System,
        _ if installed("cargo-zigbuild") => Route::Zig,
        _ if installed("cross") && engine() => Route::Cross,
        "armv7-unknown-linux-gnueabihf" => Route::System,
        // its error says what to install
        _ => Route::Zig,
    }
}

fn plan(target: &str, route: Route, profile: &str, tls: bool) -> Result<Plan, Error> {
    let (words, named): (&[&str], String) = match route {
        Route::Zig if target.contains("-gnu") => (&["cargo-zigbuild", "rustc"], format!("{target}.{GLIBC}")),
        Route::Zig => (&["cargo-zigbuild", "rustc"], target.into()),
        Route::Cross => (&["cross", "rustc"], target.into()),
        _ => (&["cargo", "rustc"], target.into()),
    };
    let mut words: Vec<String> = words.iter().map(|w| (*w).to_string()).collect();
    let rest = ["--profile", profile, "--package", "vedge-runtime", "--bin", "vedge-run", "--target", &named];
    words.extend(rest.map(String::from));
    if tls {
        words.extend(["--features", "tls"].map(String::from));
    }
    // Cargo forgets the profile's `strip` for a package with settings of its own.
    words.extend(["--", "-C", "strip=symbols"].map(String::from));
    let rust_lld = route == Route::System && target == "aarch64-unknown-linux-musl";
    if rust_lld {
        // Functions that are the same machine code once, and no index of frames, which only unwinding reads.
        words.extend(["-C", "link-arg=--icf=all"].map(String::from));
        if profile == "dist" {
            words.extend(["-C", "link-arg=--no-eh-frame-hdr"].map(String::from));
        }
    }
    let mut environment = vec![];
    if route == Route::System {
        let upper = target.to_uppercase().replace('-', "_");
        let mut set = |key: String, value: &str| environment.push((key, value.to_string()));
        match target {
            // glibc's compiler builds tract's assembly for musl as well; rust-lld links what is static.
            "aarch64-unknown-linux-musl" => {
                set(format!("CC_{}", target.replace('-', "_")), "aarch64-linux-gnu-gcc");
                set(format!("CARGO_TARGET_{upper}_LINKER"), "rust-lld");
            }
            "aarch64-unknown-linux-gnu" => set(format!("CARGO_TARGET_{upper}_LINKER"), "aarch64-linux-gnu-gcc"),
            "armv7-unknown-linux-gnueabihf" => {
                set(format!("CARGO_TARGET_{upper}_LINKER"), "arm-linux-gnueabihf-gcc");
            }
            "x86_64-unknown-linux-musl" => set(format!("CC_{}", target.replace('-', "_")), "gcc"),
            "x86_64-unknown-linux-gnu" => {}
            other => {
                let what = format!("no way to build for {other} with the system's compiler is known");
                return Err(Error::Usage { what, hint: "try --route zig or --route cross".into() });
            }
        }
    }
    Ok(Plan { words, environment })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_target_has_a_route() {
        for target in vedge_boards::TARGETS {
            let plan = plan(target, auto(target, |_| false), "dist", false).unwrap();
            assert!(plan.words.iter().any(|w| w.starts_with(target)), "{plan:?}");
        }
        for target in ["aarch64-unknown-linux-gnu", "armv7-unknown-linux-gnueabihf"] {
            let zig = plan(target, auto(target, |p| p == "cargo-zigbuild"), "dist", false).unwrap();
            assert!(zig.words[0] == "cargo-zigbuild", "{zig:?}");
            assert!(zig.words.contains(&format!("{target}.2.31")), "{zig:?}");
            assert_eq!(auto(target, |p| p == "cross" || p == "podman"), Route::Cross);
        }
        // without an engine, cross is of no use
        assert_eq!(auto("aarch64-unknown-linux-gnu", |p| p == "cross"), Route::Zig);
        assert_eq!(auto("armv7-unknown-linux-gnueabihf", |p| p == "cross"), Route::System);
        let musl =
            plan("aarch64-unknown-linux-musl", auto("aarch64-unknown-linux-musl", |_| true), "dist", false).unwrap();
        assert_eq!(musl.environment[1].0, "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_LINKER");
        assert_eq!(
            plan("aarch64-unknown-linux-musl", Route::Cross, "dist", false).unwrap().words[..2],
            ["cross", "rustc"]
        );
        let tls = plan("aarch64-unknown-linux-musl", Route::System, "dist", true).unwrap();
        let place = |word: &str| tls.words.iter().position(|w| w == word).unwrap();
        assert!(place("--features") < place("--") && tls.words[place("--features") + 1] == "tls");
        assert!(plan("riscv64gc-unknown-linux-gnu", Route::System, "dist", false).is_err());
    }
}

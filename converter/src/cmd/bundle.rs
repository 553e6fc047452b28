//! `vedge bundle`

use super::boards::Profiles;
use super::out;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use vedge_boards::bundle::{self, Entry, Manifest, Package, Parts, SIGNATURE, SUMS, elf};
use vedge_boards::{GLIBC, Profile};
use vedge_runtime::{Card, Error, Options, Session, bench, files, selftest};

/// All that a board needs in one folder, archive or Debian package: program, model, settings, service, checksums.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The converted model.
    model: PathBuf,
    /// The board: a name from `vedge boards list`.
    #[arg(long, value_name = "NAME")]
    board: String,
    /// Where to: a folder, FILE.tar.gz or FILE.deb.
    #[arg(short, long, value_name = "OUT")]
    output: PathBuf,
    /// The program for the board, `vedge-run` [default: what `vedge build --board NAME` made].
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// Where frames come from on the board; changed there in the settings file.
    #[arg(long, value_name = "SOURCE", default_value = "v4l2:///dev/video0")]
    source: String,
    /// More options of vedge-run, as one word: "--top 1".
    #[arg(long, value_name = "OPTIONS", default_value = "", allow_hyphen_values = true)]
    options: String,
    /// Name of the service and of the Debian package.
    #[arg(long, default_value = "vedge", value_parser = service_name)]
    name: String,
    /// Memory of the board in MiB, where boards of several sizes are sold [default: the smallest].
    #[arg(long, value_name = "MIB")]
    memory: Option<u32>,
    /// Sign the checksums with this minisign secret key (needs the program `minisign`).
    #[arg(long, value_name = "KEY")]
    sign: Option<PathBuf>,
    /// Who answers for a Debian package.
    #[arg(long, value_name = "NAME <ADDRESS>", default_value = "vedge <root@localhost>")]
    maintainer: String,
    #[command(flatten)]
    profiles: Profiles,
}

fn service_name(s: &str) -> Result<String, String> {
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let named = s.len() >= 2 && s.starts_with(|c: char| c.is_ascii_lowercase()) && s.chars().all(good);
    if named { Ok(s.into()) } else { Err("expected lower-case letters, digits and hyphens, a letter first".into()) }
}

/// Runs the command.
pub fn run(a: &Args) -> Result<()> {
    let profile = a.profiles.get(&a.board)?;
    one_line("--source", &a.source)?;
    one_line("--options", &a.options)?;
    let folder = a.output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if !folder.is_dir() {
        let what = format!("{}: the folder {} is not there", a.output.display(), folder.display());
        return Err(Error::Usage { what, hint: "make it first".into() }.into());
    }
    let (target, program, elf) = program(a, &profile)?;
    let (card, peak) = measured(&a.model)?;
    let size = a.memory.or_else(|| profile.memory.as_ref().and_then(|m| m.sizes_mb.first().copied()));
    if let Some(size) = size {
        bundle::fits(peak, size).map_err(|why| Error::Usage {
            what: format!("{} on {}: {why}", a.model.display(), profile.name),
            hint: "convert to INT8 or for smaller pictures (--size), or name the board's real size: --memory MIB"
                .into(),
        })?;
    }
    let about = format!("{} ({}, {})", card.name, card.architecture, card.precision);
    let model = files::map(&a.model)?.to_vec();
    let parts = Parts {
        name: &a.name,
        profile: &profile,
        target: &target,
        peak_memory_mib: estimated_memory(program.len(), model.len()),
        program,
        elf,
        model,
        about,
        source: &a.source,
        options: &a.options,
    };
    let (manifest, mut entries) = bundle::assemble(parts);
    if let Some(key) = &a.sign {
        entries.push(sign(key, &manifest, &entries)?);
    }
    write(a, &manifest, &entries)?;
    let bytes: usize = entries.iter().map(|e| e.data.len()).sum();
    out::text(&format!(
        "{}: {} {} for {}, {:.1} MB in {} files; {peak} MiB of memory at its peak (measured here)\n",
        a.output.display(),
        manifest.name,
        manifest.version,
        profile.title,
        bytes as f64 / 1e6,
        entries.len(),
    ))?;
    eprintln!("next: {}", next(&a.output));
    Ok(())
}

pub fn next(output: &Path) -> String {
    let path = output.display();
    match output.extension().is_some_and(|e| e == "deb") {
        true => format!("scp {path} USER@HOST: && ssh USER@HOST sudo dpkg -i {}", file_name(output)),
        false => format!("vedge deploy {path} USER@HOST"),
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The settings file has one setting a line.
fn one_line(option: &str, value: &str) -> Result<(), Error> {
    if value.contains(|c: char| c.is_control() || c == '"' || c == '\\') {
        let what = format!("{option} {value:?}: quotes, backslashes and line breaks cannot stand in the settings file");
        return Err(Error::Usage { what, hint: String::new() });
    }
    Ok(())
}

/// Target, bytes and self-check of the program for the board.
fn program(a: &Args, profile: &Profile) -> Result<(String, Vec<u8>, elf::Elf), Error> {
    let Some((target, path)) = find_program(a, profile) else {
        return Err(Error::Usage {
            what: format!("there is no program built for {}", profile.name),
            hint: format!("build it: vedge build --board {}; or name it: --program FILE", profile.name),
        });
    };
    let bytes = files::map(&path)?.to_vec();
    let usage = |what: String| Error::Usage {
        what: format!("{}: {what}", path.display()),
        hint: format!("build it again: vedge build --board {}", profile.name),
    };
    let found = elf::read(&bytes).map_err(usage)?;
    // A program for the machine that it is built on may use that machine's glibc.
    let problems = |t: &String| found.problems(t, if t.starts_with("x86_64") { "2.99" } else { GLIBC });
    let target = target.or_else(|| profile.targets.iter().min_by_key(|t| problems(t).len()).cloned());
    let target = target.unwrap_or_else(|| profile.targets[0].clone());
    let problems = problems(&target);
    if problems.is_empty() { Ok((target, bytes, found)) } else { Err(usage(problems.join("; "))) }
}

/// The program named, else the newest of those that `vedge build` puts into the checkout's target folder.
fn find_program(a: &Args, profile: &Profile) -> Option<(Option<String>, PathBuf)> {
    if let Some(path) = &a.program {
        return Some((None, path.clone()));
    }
    built(profile).map(|(target, path)| (Some(target), path))
}

/// Target and path of the newest program that was built for a board.
pub fn built(profile: &Profile) -> Option<(String, PathBuf)> {
    let folder = super::build::target_folder();
    let places = profile.targets.iter().flat_map(|t| ["dist", "release"].map(|p| (t, folder.join(t).join(p))));
    let built = places.map(|(t, dir)| (t.clone(), dir.join("vedge-run")));
    built.filter(|(_, path)| path.is_file()).max_by_key(|(_, path)| path.metadata().and_then(|m| m.modified()).ok())
}

/// What a process needs at most, in MiB, from the sizes of program and model alone: a measured value differs from run to
/// run, and the bundle with it. The model is mapped, packed anew, and has activations; measured peaks lie below.
fn estimated_memory(program: usize, model: usize) -> u32 {
    ((program + model * 5 / 2) >> 20) as u32 + 24
}

/// The card and the peak memory in MiB of a process that loads the model, tests it and runs it once.
fn measured(path: &Path) -> Result<(Card, u32)> {
    let mut session = Session::load(path, &Options::default())?;
    let usage = |what: &str| Error::Usage {
        what: format!("{}: {what}", path.display()),
        hint: "convert it first: vedge convert MODEL -o OUT".into(),
    };
    let card = session.card().cloned().ok_or_else(|| usage("has no card: it does not come from vedge convert"))?;
    let test = card.self_test.as_ref().ok_or_else(|| usage("has no self-test"))?;
    let outcome = selftest::run(&mut session, &card, test)?;
    if !outcome.passed() {
        return Err(usage(&format!("fails its own self-test here: {outcome:?}")).into());
    }
    let peak = bench::peak_memory().context("this system does not tell how much memory a process uses")?;
    Ok((card, peak.ceil() as u32))
}

/// Has the user's own minisign sign the checksums. The trusted comment holds no time: the signature is the same every time.
fn sign(key: &Path, manifest: &Manifest, entries: &[Entry]) -> Result<Entry> {
    let dir = tempfile::tempdir()?;
    let sums = entries.iter().find(|e| e.path == SUMS).context("no checksums")?;
    let (file, signature) = (dir.path().join(SUMS), dir.path().join(SIGNATURE));
    std::fs::write(&file, &sums.data)?;
    let comment = format!("{} {}", manifest.name, manifest.version);
    let failed = |what: String| Error::Source {
        what,
        hint: "install minisign; make a key pair: minisign -G -p trusted.pub -s secret.key".into(),
    };
    let mut command = std::process::Command::new("minisign");
    command.arg("-S").arg("-s").arg(key).arg("-t").arg(&comment).arg("-x").arg(&signature).arg("-m").arg(&file);
    let status = command.stdout(std::process::Stdio::null()).status();
    match status {
        Ok(status) if status.success() => {
            Ok(Entry { path: SIGNATURE.into(), mode: 0o644, data: std::fs::read(&signature)? })
        }
        Ok(status) => Err(failed(format!("minisign did not sign with {}: {status}", key.display())).into()),
        Err(e) => Err(failed(format!("cannot run minisign: {e}")).into()),
    }
}

fn write(a: &Args, manifest: &Manifest, entries: &[Entry]) -> Result<()> {
    let name = file_name(&a.output);
    let writing = || format!("cannot write {}", a.output.display());
    if name.ends_with(".deb") {
        let package = Package { manifest, maintainer: &a.maintainer };
        files::write_atomic(&a.output, &bundle::deb(&package, entries).with_context(writing)?)?;
    } else if name.ends_with(".tar.gz") {
        files::write_atomic(
            &a.output,
            &bundle::tar_gz(&format!("{}/", manifest.name), entries).with_context(writing)?,
        )?;
    } else {
        // Beside it, then renamed: no half bundle stays.
        if a.output.exists() && !a.output.join(bundle::MANIFEST).is_file() {
            let what = format!("{} exists and is no bundle", a.output.display());
            return Err(Error::Usage { what, hint: "name a new folder, FILE.tar.gz or FILE.deb".into() }.into());
        }
        let parent = a.output.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let temporary = tempfile::Builder::new().prefix(".vedge-bundle-").tempdir_in(parent).with_context(writing)?;
        bundle::folder(&temporary.path().join("new"), entries).with_context(writing)?;
        if a.output.exists() {
            std::fs::rename(&a.output, temporary.path().join("old")).with_context(writing)?;
        }
        std::fs::rename(temporary.path().join("new"), &a.output).with_context(writing)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_services_and_settings() {
        assert_eq!(service_name("vedge-door2"), Ok("vedge-door2".into()));
        for bad in ["", "v", "Vedge", "2doors", "a b", "a/b", "ü"] {
            assert!(service_name(bad).is_err(), "{bad}");
        }
        assert!(one_line("--source", "v4l2:///dev/video0?format=MJPG&size=640x480").is_ok());
        assert!(one_line("--source", "a\nEXEC=b").is_err() && one_line("--options", "\"").is_err());
    }
}

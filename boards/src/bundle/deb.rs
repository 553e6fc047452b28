//! A bundle as a Debian package: an `ar` archive of two compressed tar archives (deb(5)), written here so that it needs no
//! Debian and is the same every time.

use super::{Entry, Manifest, pack, unit::Unit};
use std::io;

/// What a package says beyond its bundle.
#[derive(Clone, Debug)]
pub struct Package<'a> {
    /// The bundle.
    pub manifest: &'a Manifest,
    /// Name and address of who answers for it.
    pub maintainer: &'a str,
}

/// Debian's name of an architecture.
///
/// # Errors
/// When Debian has none for this target.
fn architecture(target: &str) -> io::Result<&'static str> {
    match target.split('-').next() {
        Some("aarch64") => Ok("arm64"),
        Some("armv7") => Ok("armhf"),
        Some("x86_64") => Ok("amd64"),
        _ => Err(io::Error::other(format!("no Debian architecture for the target {target}"))),
    }
}

/// The package file.
///
/// # Errors
/// When a name does not fit the formats.
pub fn deb(package: &Package<'_>, files: &[Entry]) -> io::Result<Vec<u8>> {
    let m = package.manifest;
    let name = &m.name;
    let home = format!("/usr/lib/vedge/{name}");
    let settings = format!("/etc/vedge/{name}.conf");
    let unit = Unit { about: &m.model, folder: &home, settings: &settings }.text();

    let mut data = vec![];
    for file in files {
        if file.path == "vedge.conf" {
            data.push(Entry { path: settings.clone(), ..file.clone() });
        }
        if file.path == "LICENSES.txt" {
            data.push(Entry { path: format!("/usr/share/doc/{name}/copyright"), ..file.clone() });
        }
        data.push(Entry { path: format!("{home}/{}", file.path), ..file.clone() });
    }
    data.push(Entry::new(&format!("/lib/systemd/system/{name}.service"), 0o644, unit));
    data.sort_by(|a, b| a.path.cmp(&b.path));

    let kib = data.iter().map(|f| f.data.len().div_ceil(1024)).sum::<usize>();
    let control = format!(
        "Package: {name}\nVersion: {}\nArchitecture: {}\nMaintainer: {}\nInstalled-Size: {kib}\nSection: misc\n\
         Priority: optional\nDescription: {} on {}, by vedge\n Classifies what a camera sees and writes one JSON line a \
         frame to the journal.\n Settings are in {settings}.\n",
        m.version,
        architecture(&m.target)?,
        package.maintainer,
        m.model,
        m.board,
    );
    let script =
        |path: &str, text: &str| Entry::new(path, 0o755, text.replace("@NAME@", name).replace("@HOME@", &home));
    let control = [
        Entry::new("conffiles", 0o644, format!("{settings}\n")),
        Entry::new("control", 0o644, control),
        script("postinst", include_str!("../../deploy/postinst.sh")),
        script("postrm", include_str!("../../deploy/postrm.sh")),
        script("prerm", include_str!("../../deploy/prerm.sh")),
    ];
    let mut out = b"!<arch>\n".to_vec();
    member(&mut out, "debian-binary", b"2.0\n");
    member(&mut out, "control.tar.gz", &pack::tar_gz("./", &control)?);
    member(&mut out, "data.tar.gz", &pack::tar_gz(".", &data)?);
    Ok(out)
}

/// One member of an `ar` archive: a header of 60 bytes, then the content, padded to even length.
fn member(out: &mut Vec<u8>, name: &str, data: &[u8]) {
    let (time, owner, group, mode) = (0, 0, 0, "100644");
    out.extend(format!("{name:<16}{time:<12}{owner:<6}{group:<6}{mode:<8}{:<10}`\n", data.len()).bytes());
    out.extend(data);
    if !data.len().is_multiple_of(2) {
        out.push(b'\n');
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::sample;
    use super::*;

    #[test]
    fn a_package_is_the_same_every_time() {
        let (manifest, files) = sample();
        let package = Package { manifest: &manifest, maintainer: "Someone <someone@example.org>" };
        let bytes = deb(&package, &files).unwrap();
        assert_eq!(bytes, deb(&package, &files).unwrap());
        assert!(bytes.starts_with(b"!<arch>\ndebian-binary   0           0     0     100644  4         `\n2.0\n"));
        let bad = Manifest { target: "riscv64gc-unknown-linux-gnu".into(), ..manifest.clone() };
        assert!(deb(&Package { manifest: &bad, ..package }, &files).is_err());
    }

    #[test]
    fn debians_own_tool_reads_it() {
        let Ok(dir) = tempfile::tempdir() else { return };
        let (manifest, files) = sample();
        let path = dir.path().join("vedge.deb");
        std::fs::write(&path, deb(&Package { manifest: &manifest, maintainer: "A <a@b>" }, &files).unwrap()).unwrap();
        let tool = |option: &str| std::process::Command::new("dpkg-deb").arg(option).arg(&path).output();
        let Ok(fields) = tool("--field") else {
            println!("skipped: dpkg-deb is not there");
            return;
        };
        let fields = String::from_utf8(fields.stdout).unwrap();
        assert!(fields.contains("Package: vedge\nVersion: 0.1.0+"), "{fields}");
        assert!(fields.contains("Architecture: arm64"), "{fields}");
        let listing = String::from_utf8(tool("--contents").unwrap().stdout).unwrap();
        for expected in [" etc/vedge/vedge.conf", " usr/lib/vedge/vedge/vedge-run", " lib/systemd/system/vedge.service"]
        {
            assert!(listing.contains(expected), "{expected}: {listing}");
        }
    }
}

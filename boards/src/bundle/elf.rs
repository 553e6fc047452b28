//! What is in a built program: the self-check of a build.

use object::read::elf::{FileHeader, ProgramHeader, SectionHeader};
use object::{Endianness, elf};
use serde::{Deserialize, Serialize};

/// What was found in an ELF file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Elf {
    /// `aarch64`, `arm`, `x86_64`, or the number of another machine.
    pub machine: String,
    /// Size of the file in bytes.
    pub size: u64,
    /// Whether it needs no dynamic linker.
    pub is_static: bool,
    /// Highest version of the GNU C library that a symbol asks for; `None` for a static program.
    pub glibc: Option<String>,
    /// 8-bit dot product instructions (SDOT) in its code; 0 for other machines than aarch64.
    pub dot_products: usize,
    /// Whether the engine's own dot product kernel is there: it is assembly, and left out where the assembler is too old.
    #[serde(default)]
    pub engine_dot_kernel: bool,
}

/// Name of that kernel in tract-linalg 0.23; a program that has it names it.
const ENGINE_DOT_KERNEL: &[u8] = b"arm64simd_mmm_i32_8x8_dot";

/// Reads a program.
///
/// # Errors
/// When it is not an ELF file, or damaged.
pub fn read(data: &[u8]) -> Result<Elf, String> {
    let class = data.get(..5).filter(|head| head.starts_with(b"\x7fELF")).map(|head| head[4]);
    match class {
        Some(1) => of::<elf::FileHeader32<Endianness>>(data),
        Some(2) => of::<elf::FileHeader64<Endianness>>(data),
        _ => Err("is not an ELF program".into()),
    }
}

fn of<H: FileHeader<Endian = Endianness>>(data: &[u8]) -> Result<Elf, String> {
    let damaged = |e: object::Error| format!("is a damaged ELF file: {e}");
    let header = H::parse(data).map_err(damaged)?;
    let endian = header.endian().map_err(damaged)?;
    let machine = match header.e_machine(endian) {
        elf::EM_AARCH64 => "aarch64".to_string(),
        elf::EM_ARM => "arm".to_string(),
        elf::EM_X86_64 => "x86_64".to_string(),
        other => format!("machine {other}"),
    };
    let segments = header.program_headers(endian, data).map_err(damaged)?;
    let is_static = !segments.iter().any(|s| s.p_type(endian) == elf::PT_INTERP);
    let sections = header.sections(endian, data).map_err(damaged)?;
    let mut dot_products = 0;
    for section in sections.iter().filter(|_| machine == "aarch64") {
        let flags: u64 = section.sh_flags(endian).into();
        if flags & u64::from(elf::SHF_EXECINSTR) != 0 {
            let code = section.data(endian, data).map_err(damaged)?;
            dot_products +=
                code.chunks_exact(4).filter(|w| is_sdot(u32::from_le_bytes([w[0], w[1], w[2], w[3]]))).count();
        }
    }
    let engine_dot_kernel = data.windows(ENGINE_DOT_KERNEL.len()).any(|w| w == ENGINE_DOT_KERNEL);
    Ok(Elf { machine, size: data.len() as u64, is_static, glibc: glibc(data), dot_products, engine_dot_kernel })
}

/// SDOT on 16 bytes: by vector, or by element (Arm ARM, C7.2).
fn is_sdot(word: u32) -> bool {
    word & 0xFFE0_FC00 == 0x4E80_9400 || word & 0xFFC0_F400 == 0x4F80_E000
}

/// The highest `GLIBC_x.y` among the names of symbol versions.
fn glibc(data: &[u8]) -> Option<String> {
    let mark = b"GLIBC_2.";
    let digits = |at: usize| data[at..].iter().take_while(|b| b.is_ascii_digit()).map(|b| u32::from(b - b'0'));
    let number = |at: usize| digits(at).take(3).fold(0, |n, d| n * 10 + d);
    let found = data.windows(mark.len()).enumerate().filter(|(_, w)| w == mark);
    found.map(|(at, _)| number(at + mark.len())).max().map(|minor| format!("2.{minor}"))
}

impl Elf {
    /// The machine that a Rust target is for.
    pub fn machine_of(target: &str) -> &str {
        match target.split('-').next().unwrap_or_default() {
            "armv7" | "arm" => "arm",
            machine => machine,
        }
    }

    /// What is wrong with this program for a target: the machine, dynamic linking, glibc, missing dot products.
    pub fn problems(&self, target: &str, newest_glibc: &str) -> Vec<String> {
        let mut found = vec![];
        let machine = Elf::machine_of(target);
        if self.machine != machine {
            // nothing else matters then
            return vec![format!("the program is for {}, the target {target} is {machine}", self.machine)];
        }
        if target.contains("-musl") && !self.is_static {
            found.push("the program is not static".into());
        }
        let minor = |v: &str| v.split_once('.').and_then(|(_, m)| m.parse::<u32>().ok()).unwrap_or(0);
        if let Some(version) = self.glibc.as_ref().filter(|v| !self.is_static && minor(v) > minor(newest_glibc)) {
            found.push(format!("the program needs glibc {version}, at most {newest_glibc} is expected"));
        }
        if machine == "aarch64" && self.dot_products == 0 {
            found.push("the program has no dot product kernels".into());
        }
        if machine == "aarch64" && !self.engine_dot_kernel {
            found.push(
                "the engine's dot product kernel is left out: the assembler is too old (binutils 2.30 or newer)".into(),
            );
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_test_is_a_program() {
        let elf = read(&std::fs::read(std::env::current_exe().unwrap()).unwrap()).unwrap();
        assert_eq!(elf.machine, std::env::consts::ARCH);
        assert!(elf.size > 1000);
        assert_eq!(read(b"#!/bin/sh\n"), Err("is not an ELF program".into()));
        assert!(read(b"\x7fELF\x02\x01\x01").unwrap_err().starts_with("is a damaged ELF file"));
    }

    #[test]
    fn dot_products_by_their_encoding() {
        // sdot v0.4s, v1.16b, v2.16b; sdot v0.4s, v1.16b, v2.4b[3]; udot; add
        assert!(is_sdot(0x4E82_9420) && is_sdot(0x4FA2_E820));
        assert!(!is_sdot(0x6E82_9420) && !is_sdot(0x4E82_8420));
    }

    #[test]
    fn problems_are_named() {
        let glibc = Some("2.36".into());
        let machine = "x86_64".into();
        let elf = Elf { machine, size: 1, is_static: false, glibc, dot_products: 0, engine_dot_kernel: false };
        let found = elf.problems("aarch64-unknown-linux-musl", "2.31");
        assert_eq!(found, ["the program is for x86_64, the target aarch64-unknown-linux-musl is aarch64"]);
        let wrong = Elf { machine: "aarch64".into(), ..elf.clone() };
        assert_eq!(wrong.problems("aarch64-unknown-linux-musl", "2.31").len(), 4);
        let old_assembler = Elf { machine: "aarch64".into(), is_static: true, dot_products: 9, ..elf.clone() };
        let found = old_assembler.problems("aarch64-unknown-linux-musl", "2.31");
        assert!(found.len() == 1 && found[0].contains("the assembler is too old"), "{found:?}");
        assert_eq!(elf.problems("x86_64-unknown-linux-gnu", "2.36"), Vec::<String>::new());
    }
}

//! `vedge boards`

use super::{out, table};
use crate::preset::nearest_first;
use crate::row;
use anyhow::Result;
use clap::Subcommand;
use std::path::PathBuf;
use vedge_boards::{Catalogue, Detected, Evidence, Profile};
use vedge_runtime::Error;

/// What is known of each board.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
    #[command(flatten)]
    profiles: Profiles,
}

/// Where profiles come from.
#[derive(Debug, clap::Args)]
pub struct Profiles {
    /// Folder with board profiles of your own (*.toml) beside the built-in ones [default: the variable VEDGE_BOARDS].
    #[arg(long = "profiles", value_name = "DIR", global = true)]
    folder: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum What {
    /// All boards with a profile.
    List {
        /// Result as JSON on standard output.
        #[arg(long)]
        json: bool,
    },
    /// One board: processor, memory, systems, ways to its cameras, and where each fact is written.
    Show {
        /// The board's name.
        name: String,
        /// Result as JSON on standard output.
        #[arg(long)]
        json: bool,
    },
    /// Which board this is, or the one whose files of /proc are below a folder.
    Detect {
        /// Folder that stands for the board's `/`.
        #[arg(long, value_name = "DIR", default_value = "/")]
        root: PathBuf,
        /// Result as JSON on standard output.
        #[arg(long)]
        json: bool,
    },
    /// The JSON schema of a profile file.
    Schema,
}

impl Profiles {
    /// The built-in profiles and the user's own.
    pub fn open(&self) -> Result<Catalogue, Error> {
        let built_in = Catalogue::built_in();
        let variable = || std::env::var_os("VEDGE_BOARDS").filter(|v| !v.is_empty()).map(PathBuf::from);
        match self.folder.clone().or_else(variable) {
            None => Ok(built_in),
            Some(folder) => built_in.with_folder(&folder).map_err(|e| Error::Usage {
                what: e.to_string(),
                hint: "the fields of a profile: vedge boards schema; an example: boards/profiles/raspberry-pi-5.toml"
                    .into(),
            }),
        }
    }

    /// The profile of a name.
    pub fn get(&self, name: &str) -> Result<Profile, Error> {
        let all = self.open()?;
        let nearest = || nearest(&all, name);
        all.get(name).cloned().map_err(|e| Error::Usage { what: e.to_string(), hint: nearest() })
    }
}

/// Runs the command.
pub fn run(a: &Args) -> Result<()> {
    match &a.what {
        What::List { json: true } => out::json(&a.profiles.open()?.profiles())?,
        What::List { json: false } => {
            let mut rows = vec![row!["name", "board", "processor", "target"]];
            for p in a.profiles.open()?.profiles() {
                let target = p.targets.first().cloned().unwrap_or_default();
                rows.push(row![p.name, p.title, p.processor(), target]);
            }
            out::text(&table::format(&rows))?;
            eprintln!("next: vedge boards show NAME");
        }
        What::Show { name, json } => {
            let p = a.profiles.get(name)?;
            match json {
                true => out::json(&p)?,
                false => out::text(&show(&p))?,
            }
        }
        What::Detect { root, json } => {
            let found = a.profiles.open()?.detect(&Evidence::read(root)).ok_or_else(|| Error::Source {
                what: format!("{}: neither the board nor its architecture can be told", root.display()),
                hint: "expected are proc/device-tree/compatible and proc/cpuinfo below that folder".into(),
            })?;
            match json {
                true => out::json(&found)?,
                false => out::text(&detected(&found))?,
            }
        }
        What::Schema => out::text(vedge_boards::SCHEMA)?,
    }
    Ok(())
}

fn nearest(all: &Catalogue, name: &str) -> String {
    let names = all.profiles().iter().flat_map(|p| p.aliases.iter().chain([&p.name]));
    let names = nearest_first(name, names.map(String::as_str));
    names.first().map_or(String::new(), |n| format!("the nearest is {n}: vedge boards show {n}"))
}

fn show(p: &Profile) -> String {
    let source = |key: &str| p.sources.get(key).cloned().unwrap_or_default();
    let mut rows = vec![];
    let mut fact = |name: &str, value: String, key: &str| {
        rows.push(format!("  {name:11}  {value}\n               {}", source(key)))
    };
    if let Some(soc) = &p.soc {
        fact("chip", soc.name.clone(), &soc.source);
    }
    fact("processor", p.processor(), &p.cpu.kinds[0].source);
    let features = if p.cpu.features.is_empty() { "none taken for granted".into() } else { p.cpu.features.join(", ") };
    fact("features", features, &p.cpu.features_source);
    if let Some(m) = &p.memory {
        let sizes: Vec<String> = m.sizes_mb.iter().map(u32::to_string).collect();
        fact("memory", format!("{} MiB", sizes.join(", ")), &m.source);
    }
    for i in &p.images {
        let glibc = i.glibc.as_ref().map_or(String::new(), |v| format!(", glibc {v}"));
        fact("system", format!("{}{glibc}", i.name), &i.source);
    }
    for c in &p.cameras {
        fact("camera", format!("{} ({})", c.usage, c.about), &c.source);
    }
    for x in &p.accelerators {
        fact("accelerator", format!("{}: {}", x.name, x.about), &x.source);
    }
    if let Some(t) = &p.thermal {
        fact("heat", t.about.clone(), &t.source);
    }
    if let Some(d) = &p.detect {
        fact("device tree", d.compatible.join(", "), &d.source);
    }
    let facts: String = rows.iter().map(|r| format!("{}\n", r.trim_end())).collect();
    let names = if p.aliases.is_empty() { String::new() } else { format!(" ({})", p.aliases.join(", ")) };
    format!("{}{names}: {}\n{facts}  {:11}  {}\n", p.name, p.title, "targets", p.targets.join(", "))
}

fn detected(d: &Detected) -> String {
    let model = if d.model.is_empty() { String::new() } else { format!("calls itself  {}\n", d.model) };
    let differences: String = d.differences.iter().map(|x| format!("note          {x}\n")).collect();
    let features = if d.features.is_empty() { "none known".into() } else { d.features.join(", ") };
    format!(
        "board         {}\nby            {}\n{model}processors    {}\nfeatures      {features}\nmemory        {} MiB\n{differences}",
        d.board, d.by, d.cpus, d.memory_mb
    )
}
